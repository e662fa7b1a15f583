"""Blocks of a guide, so that a test runs what is shown."""

import re
from collections.abc import Mapping
from pathlib import Path
from textwrap import dedent

ROOT = Path(__file__).parent.parent
DEPLOYMENT = ROOT / "docs" / "deployment.md"


def block(language: str, containing: str = "") -> str:
    """The one block of the deployment guide in this language that holds these words."""
    # Fences come in pairs, the first with a language or none.
    parts = re.split(r"^ *```(.*)\n", DEPLOYMENT.read_text("utf-8"), flags=re.MULTILINE)
    blocks = [text for said, text in zip(parts[1::4], parts[2::4], strict=True) if said == language]
    (found,) = [dedent(text) for text in blocks if containing in text]
    return found


def fit(text: str, fitting: Mapping[str, str]) -> str:
    """The text with the words on the left replaced. Each must be there: otherwise something else is tested than is shown."""
    for shown, ours in fitting.items():
        assert shown in text, f"{shown!r} is not shown"
        text = text.replace(shown, ours)
    return text
