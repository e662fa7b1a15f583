"""What the documentation says is held to what is so."""

import re
from pathlib import Path

from gatelodge_server.settings import OPTIONS

ROOT = Path(__file__).parent.parent


def settings_page() -> str:
    rows = "\n".join(
        f"| `{name}` | {f'`{option.default}`' if option.default else ''} | {option.meaning} |"
        for name, option in OPTIONS.items()
    )
    return f"""# Settings

A setting `tls_cert` is the flag `--tls-cert` (where the command has it), the variable `GATELODGE_TLS_CERT`, or `tls_cert` in the file
`DIR/gatelodge.toml` (or the one that `GATELODGE_CONFIG` names), in this order. Durations are such as `90s`, `15m`, `24h`, `30d`; lists are
separated by commas. The master key is no setting: it is read from `DIR/master.key` or `GATELODGE_MASTER_KEY`.

| setting | default | what it is |
|---|---|---|
{rows}
"""


def test_the_page_of_settings_lists_the_settings_that_there_are():
    assert (ROOT / "docs" / "settings.md").read_text() == settings_page()


def test_every_link_between_the_pages_leads_somewhere():
    pages = [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("packages/*/README.md")]
    links = [(page, link) for page in pages for link in re.findall(r"\]\(([^)#]+)\)", page.read_text())]
    assert links
    assert [(page.name, link) for page, link in links if "://" not in link and not (page.parent / link).exists()] == []


def test_the_architecture_names_only_what_is_there():
    source = "\n".join(path.read_text() for path in ROOT.glob("packages/*/src/**/*.py"))
    names = set(re.findall(r"`([A-Za-z_][A-Za-z_.]+)`", (ROOT / "ARCHITECTURE.md").read_text()))
    symbols = {name for name in names if "/" not in name and "." not in name}
    assert symbols
    assert [name for name in sorted(symbols) if not re.search(rf"\b{name}\b", source)] == []
