"""README and the pages of docs: where they are, and the Python in them."""

import re
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parent.parent
PAGES = ["README.md", *[f"docs/{path.name}" for path in sorted((ROOT / "docs").glob("*.md"))]]


class Block(NamedTuple):
    page: str
    line: int  # of the page, where the code begins
    language: str
    code: str


def read(page):
    return (ROOT / page).read_text(encoding="utf-8")


def blocks(page):
    """The fenced blocks of a page that name a language."""
    text = read(page)
    found = re.finditer(r"^```(\w+)\n(.*?)^```$", text, re.M | re.S)
    return [Block(page, text.count("\n", 0, each.start(2)) + 1, *each.groups()) for each in found]


def python(page):
    return [block for block in blocks(page) if block.language in ("python", "py")]


def block_with(word):
    """The code of the first block of Python, on any page, that holds a word."""
    return next(block.code for page in PAGES for block in python(page) if word in block.code)
