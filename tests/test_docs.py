"""What the documentation says is held to what is so."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

from experiments.catalogue import EXPERIMENTS
from harness import Server, clean_environment

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


def test_the_commands_of_the_readme_work_when_they_are_pasted_one_block_after_another(tmp_path):
    blocks = re.findall(r"^```\n(.*?)^```$", (ROOT / "README.md").read_text(), re.DOTALL | re.MULTILINE)
    blocks = [block for block in blocks if "curl" in block]
    assert len(blocks) == 3
    (tmp_path / ".venv" / "bin").mkdir(parents=True)
    (tmp_path / ".venv" / "bin" / "gatelodge").symlink_to(Path(sys.executable).with_name("gatelodge"))
    bash = shutil.which("bash")
    assert bash
    answers = []
    with Server(tmp_path / "gatelodge-data", "--sample-api") as server:
        for block in blocks:
            done = subprocess.run(
                [bash, "-c", "set -euo pipefail\n" + block.replace(":8443/", f":{server.port}/")],
                cwd=tmp_path,
                env=clean_environment(),
                capture_output=True,
                text=True,
                check=False,
                timeout=120,
            )
            assert done.returncode == 0, done.stderr
            answers.append([json.loads(line) for line in done.stdout.replace("}{", "}\n{").splitlines()])
    nothing_yet = {"companies": [], "nextCursor": None}
    (first,), (registered, call, usage), (plans,) = answers
    assert first == call == nothing_yet
    assert registered["contactEmail"] == "dev@globex.example"
    assert (usage["partnerId"], usage["status"]) == ("globex", "active")
    assert plans["plans"]


def test_the_page_of_promises_names_each_experiment_under_its_promise():
    page = (ROOT / "experiments" / "README.md").read_text("utf-8")
    told = {
        label: set(re.findall(r"`(\w+)`", experiments))
        for label, experiments in re.findall(r"^\| (P\d+) \| .* \| (.*) \|$", page, re.MULTILINE)
    }
    proved = {label: set() for label in told}
    for name, experiment in EXPERIMENTS.items():
        for label in re.findall(r"\bP\d+\b", experiment.promise.partition(":")[0]):
            proved[label].add(name)
    assert told == proved
    assert set(EXPERIMENTS) <= set(re.findall(r"`(\w+)`", page))


def test_every_link_between_the_pages_leads_somewhere():
    pages = [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("packages/*/README.md"), *ROOT.glob("experiments/*.md")]
    links = [(page, link) for page in pages for link in re.findall(r"\]\(([^)#]+)\)", page.read_text())]
    assert links
    assert [(page.name, link) for page, link in links if "://" not in link and not (page.parent / link).exists()] == []


def test_the_architecture_names_only_what_is_there():
    source = "\n".join(path.read_text() for path in ROOT.glob("packages/*/src/**/*.py"))
    names = set(re.findall(r"`([A-Za-z_][A-Za-z_.]+)`", (ROOT / "ARCHITECTURE.md").read_text()))
    symbols = {name for name in names if "/" not in name and "." not in name}
    assert symbols
    assert [name for name in sorted(symbols) if not re.search(rf"\b{name}\b", source)] == []
