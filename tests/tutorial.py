"""The tutorial's blocks, and the sources that its Python blocks quote."""

import re
from collections.abc import Iterator
from textwrap import indent

from bot_fixtures import REPOSITORY

TUTORIAL = (REPOSITORY / "docs" / "tutorial.md").read_text()
SOURCES = [
    *(REPOSITORY / f"{name}.py" for name in ("textbot", "chatbot", "batchbot", "continuousbot")),
    *sorted((REPOSITORY / "docs").rglob("*.py")),
    *sorted((REPOSITORY / "streaming_bots").rglob("*.py")),
]


def python_blocks() -> list[str]:
    return re.findall(r"^```python\n(.*?)^```", TUTORIAL, re.DOTALL | re.MULTILINE)


def prose() -> str:
    return re.sub(r"^```.*?^```", "", TUTORIAL, flags=re.DOTALL | re.MULTILINE)


def quotes(block: str, source: str) -> bool:
    """Whether a block has a source's own lines, in their order. A line `...` leaves some out.

    The block may begin further left than the source.
    """
    parts = re.split(r"^ *\.\.\.\n", block, flags=re.MULTILINE)
    return any(
        contains_in_order("\n" + source, [indent(part, " " * spaces) for part in parts])
        for spaces in range(0, 25, 4)
    )


def contains_in_order(source: str, parts: list[str]) -> bool:
    end = 0
    for part in parts:
        start = source.find("\n" + part, end)
        if start < 0:
            return False
        end = start + len(part)  # the last line break may begin the next part
    return True


def anchors(text: str) -> Iterator[str]:
    """Yield the anchors that GitHub gives to the headings of a text in Markdown."""
    without_code = re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE)
    for heading in re.findall(r"^#+ (.*)", without_code, re.MULTILINE):
        yield re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-")


def links(text: str) -> list[str]:
    """Return the relative links in a text in Markdown, but not those in its code."""
    text = re.sub(r"^```.*?^```|`[^`\n]*`(?!\])", "", text, flags=re.DOTALL | re.MULTILINE)
    found = re.findall(r"\]\(([^)\s]+)\)|(?:src|srcset|href)=\"([^\"]+)\"", text)
    return [link for link in map("".join, found) if not re.match(r"\w+:", link)]
