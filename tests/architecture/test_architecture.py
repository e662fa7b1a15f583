"""What holds for all of the code at once."""

import ast
import importlib
import pkgutil
import re
import subprocess
import sys
from pathlib import Path

import pytest

import gatelodge.errors
import gatelodge_server
from gatelodge.errors import Fault, QuotaExceeded, Rejected, Unavailable
from gatelodge_server.core import ports, refusals
from gatelodge_server.core.refusals import Refusal
from gatelodge_server.http import problems
from gatelodge_server.http.problems import STATUSES

ROOT = Path(__file__).parents[2]
MODULES = sorted((ROOT / "packages").rglob("*.py"))
NEVER_IMPORTED = {"pickle", "shelve", "marshal", "random", "imp", "telnetlib", "xmlrpc"}
NEVER_CALLED = {"eval", "exec", "compile", "__import__", "breakpoint", "print_exc", "system", "popen", "mktemp"}


def every_module():
    """Import all that is there, so that no class is overlooked."""
    for module in pkgutil.walk_packages(gatelodge_server.__path__, "gatelodge_server."):
        if not module.name.endswith("__main__") and ".migrations" not in module.name:
            importlib.import_module(module.name)


def descendants(kind):
    for child in kind.__subclasses__():
        yield child
        yield from descendants(child)


def answers():
    every_module()
    kinds = [
        *descendants(Rejected),
        *descendants(Refusal),
        *descendants(Fault),
        QuotaExceeded,
        Unavailable,
        *descendants(Unavailable),
    ]
    return [kind for kind in kinds if kind.__module__.startswith("gatelodge")]


def test_imports_go_one_way():
    command = [Path(sys.executable).with_name("lint-imports"), "--no-cache"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


def test_every_refusal_has_a_status_and_every_status_a_refusal():
    assert {kind.code for kind in answers()} == set(STATUSES)


def test_no_two_refusals_have_one_code():
    codes = [kind.code for kind in answers()]
    assert len(codes) == len(set(codes))


@pytest.mark.parametrize("code", STATUSES)
def test_a_code_is_a_word_and_its_status_an_errors(code):
    assert re.fullmatch(r"[a-z]+(_[a-z]+)*", code)
    assert 400 <= STATUSES[code] <= 503


def test_every_refusal_says_in_a_sentence_what_to_do():
    for code, detail in problems.details().items():
        if code in STATUSES:
            assert re.fullmatch(r"[A-Z`][^\n]*\.", detail), code
    assert set(STATUSES) <= set(problems.details())


@pytest.mark.parametrize("module", [refusals, gatelodge.errors], ids=lambda module: module.__name__)
def test_the_tree_at_the_head_of_the_refusals_shows_them_all(module):
    tree = [line.lstrip(" │├└─") for line in module.__doc__.splitlines()]
    drawn = dict(re.findall(r"^(\w+) {2,}([a-z_]+)(?: {2,}|$)", "\n".join(tree), re.MULTILINE))
    defined = {kind.__name__: kind.code for kind in answers() if kind.__module__ == module.__name__}
    assert drawn == defined


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT / "packages")))
def test_a_module_can_be_read_at_one_sitting_and_does_nothing_forbidden(path):
    text = path.read_text("utf-8")
    assert text.count("\n") < 600
    tree = ast.parse(text)
    if "migrations/versions" not in str(path):
        assert ast.get_docstring(tree), "a module says what it is for"
    for node in ast.walk(tree):
        match node:
            case ast.Import(names):
                assert not {name.name.split(".")[0] for name in names} & NEVER_IMPORTED
            case ast.ImportFrom(module=str(module)):
                assert module.split(".")[0] not in NEVER_IMPORTED
            case ast.Call(func=ast.Name(id=name) | ast.Attribute(value=ast.Name(id="os"), attr=name)):
                assert name not in NEVER_CALLED
            case ast.keyword(arg="shell", value=value):
                assert isinstance(value, ast.Constant)
                assert value.value is False


def test_the_search_for_what_is_forbidden_searches_something():
    assert len(MODULES) > 40


def test_every_verb_of_the_store_has_a_case_on_every_backend():
    cases = "\n".join(path.read_text("utf-8") for path in (ROOT / "tests/store/conformance").glob("*.py"))
    protocols = [kind for kind in ports.Store.__mro__ if kind.__module__.startswith(ports.__name__)]
    verbs = [name for protocol in protocols for name in vars(protocol) if not name.startswith("_")]
    assert len(verbs) > 25
    assert [verb for verb in verbs if f".{verb}(" not in cases] == []


def test_no_case_of_the_conformance_suite_opts_out_of_a_backend():
    for path in (ROOT / "tests/store/conformance").glob("*.py"):
        text = path.read_text("utf-8")
        for word in ("skip", "xfail", "importorskip", "sqlite", "dialect"):
            assert word not in text.lower(), f"{path.name}: {word}"


def test_a_secret_leaves_its_wrapper_in_few_places():
    """``reveal`` is one word, so that this list can be kept: each place is a decision."""
    places = {
        str(path.relative_to(ROOT / "packages/gatelodge-server/src/gatelodge_server"))
        for path in MODULES
        if ".reveal()" in path.read_text("utf-8")
    }
    assert places <= {
        "cli.py",
        "commands_tokens.py",
        "core/companies.py",
        "core/credentials.py",
        "core/refresh_tokens.py",
        "core/registration.py",
        "http/fields.py",
        "http/guard.py",
        "http/sessions.py",
        "mail/letters.py",
        "mail/mailer.py",
        "mail/transports.py",
        "store/address.py",
        "store/postgres.py",
    }
