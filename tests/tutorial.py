"""The tutorial's blocks, and the sources that its Python blocks quote."""

import re
from textwrap import indent

from bot_fixtures import REPOSITORY

TUTORIAL = (REPOSITORY / "docs" / "tutorial.md").read_text()
SOURCES = [
    *(REPOSITORY / f"{name}.py" for name in ("textbot", "chatbot", "batchbot", "continuousbot")),
    *sorted((REPOSITORY / "clients").glob("*.py")),
    *sorted((REPOSITORY / "docs").rglob("*.py")),
    *sorted((REPOSITORY / "streaming_bots").rglob("*.py")),
]


def python_blocks() -> list[str]:
    return re.findall(r"^```python\n(.*?)^```", TUTORIAL, re.DOTALL | re.MULTILINE)


def quotes(block: str, source: str) -> bool:
    """Whether a block quotes a source's lines in order. A line `...` stands for omitted ones.

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
