"""What the guide to the gate shows is what the examples hold, and what it says of answers is so."""

import ast
import json
import re
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

import pytest
from harness import clean_environment

from gatelodge.errors import PartnerMismatch
from gatelodge.problems import STATUSES, problem_of
from gatelodge.verify import Caller

ROOT = Path(__file__).parents[2]
GUIDE = (ROOT / "docs" / "guides" / "gate.md").read_text("utf-8")
BLOCKS = re.findall(r"```python\n(.*?)```", GUIDE, re.DOTALL)
SNIPPETS = [block for block in BLOCKS if block.startswith("# examples/")]
CALLS = """
import asyncio
import httpx2

@api.get("/orders")
async def list_orders() -> str:
    return "orders"

async def call():
    transport = httpx2.ASGITransport(service)
    async with lifespan(service), httpx2.AsyncClient(transport=transport, base_url="https://api.example") as client:
        for path in ("/health", "/api/orders"):
            print((await client.get(path)).status_code)

asyncio.run(call())
"""


def test_the_guide_shows_each_example():
    assert {snippet.split("\n", 1)[0] for snippet in SNIPPETS} == {
        f"# {path.relative_to(ROOT)}" for path in ROOT.glob("examples/*.py")
    }


@pytest.mark.parametrize("snippet", SNIPPETS, ids=lambda snippet: snippet.split("\n", 1)[0])
def test_what_is_shown_of_an_example_stands_in_it(snippet):
    first, *lines = snippet.splitlines()
    example = (ROOT / first.removeprefix("# ")).read_text("utf-8")
    parts = re.split(r"\n\n+", "\n".join(lines))
    assert [part for part in parts if f"\n{part}\n" not in example] == []


def test_what_is_shown_of_no_example_works(tmp_path):
    own = "\n".join(block for block in BLOCKS if block not in SNIPPETS)
    environ = clean_environment({"GATELODGE_DATA": str(tmp_path / "data")})
    done = subprocess.run([sys.executable, "-c", own + CALLS], env=environ, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "200\n401\n"), done.stderr


def test_every_field_of_a_caller_is_told():
    table = GUIDE.partition("`caller_of(scope)` is a `Caller`")[2].partition("\n## ")[0]
    told = [name for row in re.findall(r"^\| (`.*?) \|", table, re.MULTILINE) for name in re.findall(r"`(\w+)`", row)]
    assert told == list(Caller.__dataclass_fields__)


def test_the_refusal_that_is_shown_is_one():
    shown = json.loads(re.search(r"```json\n(.*?)```", GUIDE, re.DOTALL)[1])
    assert shown == problem_of(PartnerMismatch(), shown["requestId"]).members


def test_every_refusal_of_the_gate_is_listed_with_its_status():
    listed = {
        code: int(status)
        for status, codes in re.findall(r"^\| (\d{3})\b.*? \| (.*) \|$", GUIDE, re.MULTILINE)
        for code in re.findall(r"`(\w+)`", codes)
    }
    assert listed == dict(STATUSES)


@pytest.mark.parametrize("path", sorted(ROOT.glob("examples/*.py")), ids=lambda path: path.name)
def test_an_example_says_how_to_run_and_to_call_it(path):
    told = ast.get_docstring(ast.parse(path.read_text("utf-8")))
    assert f"uvicorn examples.{path.stem}:app" in told
    assert "--ssl-certfile" in told
    assert "curl " in told


def test_the_three_frameworks_do_the_same():
    opening = defaultdict(list)
    for framework in ("Starlette", "FastAPI", "Litestar"):
        told = (ROOT / f"examples/{framework.lower()}_app.py").read_text("utf-8").split('"""')[1]
        opening[told.replace(framework, "X").replace(framework.lower(), "x")].append(framework)
    assert len(opening) == 1


def test_the_service_on_another_host_needs_the_light_package_only():
    tree = ast.parse((ROOT / "examples/offline_app.py").read_text("utf-8"))
    imported = {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert "gatelodge" in imported
    assert not [module for module in imported if module.startswith("gatelodge_server")]
