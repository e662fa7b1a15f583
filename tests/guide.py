"""Blocks of a guide, so that a test runs what is shown."""

import re
from collections.abc import Mapping
from pathlib import Path
from textwrap import dedent

ROOT = Path(__file__).parent.parent
DEPLOYMENT = ROOT / "docs" / "deployment.md"


def blocks(language: str) -> list[str]:
    """The blocks of the deployment guide in this language; without one they have none."""
    # Fences come in pairs, and the first of each says the language.
    parts = re.split(r"^ *```(.*)\n", DEPLOYMENT.read_text("utf-8"), flags=re.MULTILINE)
    return [dedent(text) for said, text in zip(parts[1::4], parts[2::4], strict=True) if said == language]


def block(language: str, containing: str = "") -> str:
    """The one of them that holds these words."""
    (found,) = [text for text in blocks(language) if containing in text]
    return found


def fit(text: str, fitting: Mapping[str, str]) -> str:
    """The text with the words on the left replaced. Each must be there: otherwise something else is tested than is shown."""
    for shown, ours in fitting.items():
        assert shown in text, f"{shown!r} is not shown"
        text = text.replace(shown, ours)
    return text
