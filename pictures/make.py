"""Makes the README's pictures from real runs: `python pictures/make.py`.

Needs Chromium, port 8000, and the extra `test`.
"""

import io
import os
import re
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from playwright.sync_api import expect, sync_playwright
from rich.console import CONSOLE_SVG_FORMAT, Console

FOLDER = Path(__file__).parent
sys.path[:0] = [str(FOLDER.parent / name) for name in ("clients", "benchmarks")]

from load_client import PROMPTS, Row, draw, start, token_counter  # noqa: E402
from load_client import parser as load_options  # noqa: E402
from servers import our_bot  # noqa: E402

URL = "http://127.0.0.1:8000/"
MODEL = "tiny-dialog"
APART_S = 0.06  # from one prompt to the next
WIDTH = 110  # characters of a line
SVG_FORMAT = re.sub(
    r"@font-face \{\{.*?\}\}", "", CONSOLE_SVG_FORMAT, flags=re.DOTALL
)  # no fonts of others
ROOM = 76  # characters of a reply, for two lines
CHAT = ["Hi, my name is Anna.", "What is my name?", "Tell me a story about dogs."]


@contextmanager
def running(bot: str) -> Iterator[None]:
    server = our_bot(bot, Path(MODEL), "float32", 1)
    with tempfile.TemporaryDirectory() as folder, server.running(Path(folder) / "log"):
        yield


def photograph_page() -> None:
    """The chat page, light and dark, after a short conversation."""
    with running("chatbot"), sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=shutil.which("chromium"),
            args=["--no-sandbox"] if os.getuid() == 0 else [],
        )
        for scheme in ("light", "dark"):
            page = browser.new_page(
                viewport={"width": 720, "height": 600}, color_scheme=scheme, device_scale_factor=1.5
            )
            page.goto(URL)
            for prompt in CHAT:
                expect(page.get_by_role("status")).to_have_text("ready")
                page.get_by_label("Your message").fill(prompt)
                page.keyboard.press("Enter")
                expect(page.locator(".note")).to_have_count(CHAT.index(prompt) + 1)
            page.screenshot(path=FOLDER / f"chat-{scheme}.png")
        browser.close()


def draw_load(bot: str) -> None:
    """The load client at a bot: when the first reply has ended, and at the end."""
    options = load_options().parse_args(["--url", URL, "--interval", str(APART_S)])
    console = Console(record=True, width=WIDTH, file=io.StringIO())
    with running(bot):
        Row("Hello!").run(options, {}, 0)  # what a first request costs is not the subject
        rows = [Row(prompt) for prompt in PROMPTS]
        threads = start(rows, options, {})
        while not any(row.outcome for row in rows):
            time.sleep(0.001)
        count = token_counter(MODEL)
        console.print(draw(rows, "when the first reply is complete", count, ROOM))
        for thread in threads:
            thread.join()
        console.print(draw(rows, "at the end", count, ROOM))
    command = f"python clients/load_client.py --interval {APART_S}"
    title, place = f"{bot}: {command}", str(FOLDER / f"load-{bot}.svg")
    console.save_svg(place, title=title, code_format=SVG_FORMAT)


def main() -> None:
    photograph_page()
    for bot in ("textbot", "batchbot", "continuousbot"):
        draw_load(bot)


if __name__ == "__main__":
    main()
