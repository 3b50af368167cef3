"""Makes all pictures of the README from real runs: `python pictures/make.py`.

It takes about five minutes on two cores. The pictures show the speed of the machine, so run nothing
else on it. The script needs port 8000, Chromium, and the packages of the extra `test`, which
bring Pillow and Playwright. `python pictures/make.py <folder>` writes to another folder.
"""

import os
import shutil
import sys
import tempfile
import time
from argparse import Namespace
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from playwright.sync_api import Browser, sync_playwright

FOLDER = Path(__file__).parent
sys.path[:0] = [str(FOLDER.parent / name) for name in ("clients", "benchmarks")]

from chat_picture import record_chat, render_frames, save_animation  # noqa: E402
from load_client import PROMPTS, Row, ask, start  # noqa: E402
from load_client import parser as load_options  # noqa: E402
from load_picture import Piece, Reply, draw  # noqa: E402
from servers import our_bot  # noqa: E402

URL = "http://127.0.0.1:8000/"
MODEL = "tiny-dialog"
INTERVAL_S = 0.06  # from one prompt to the next; two fit into a Batchbot's batch_wait_timeout_s
SLOWDOWN = 5  # of the replay, since tiny-dialog writes faster than people read
TRIES = 20  # runs at each bot; the picture shows the quickest one
WARM_UP = "Good morning!"  # the first request to a bot is slower than later ones
CHAT = ["Hi, my name is Anna.", "What is my name?", "Tell me a story about dogs."]


class RecordedRow(Row):
    """A row of the load client that keeps when each piece of its reply arrived."""

    def run(self, options: Namespace, headers: dict[str, str], delay: float) -> None:
        time.sleep(delay)
        self.asked = time.monotonic()
        self.pieces = [
            Piece(time.monotonic(), text) for text in ask(options, headers, self.prompt) if text
        ]
        self.ended = time.monotonic()

    def reply(self, start: float) -> Reply:
        assert self.asked is not None and self.ended is not None
        pieces = [Piece(at - start, text) for at, text in self.pieces]
        return Reply(self.prompt, self.asked - start, pieces, self.ended - start)


@contextmanager
def running(bot: str) -> Iterator[None]:
    server = our_bot(bot, Path(MODEL), [])
    with tempfile.TemporaryDirectory() as folder, server.running(Path(folder) / "log"):
        yield


def record_load(bot: str) -> list[Reply]:
    """Send the prompts to a bot as the load client does, and return the quickest run."""
    options = load_options().parse_args(["--url", URL, "--interval", str(INTERVAL_S)])
    runs = []
    with running(bot.lower()):
        RecordedRow(WARM_UP).run(options, {}, 0)
        for _ in range(TRIES):
            rows = [RecordedRow(prompt) for prompt in PROMPTS]
            for thread in start(list[Row](rows), options, {}):
                thread.join()
            assert rows[0].asked is not None
            runs.append([row.reply(rows[0].asked) for row in rows])
    runs = [run for run in runs if shows_its_lesson(bot, run)]
    if not runs:
        raise SystemExit(f"{bot}: no run shows what the picture is about. Is the machine busy?")
    return min(runs, key=lambda run: max(reply.ended for reply in run))


def shows_its_lesson(bot: str, replies: list[Reply]) -> bool:
    """Tell whether a run shows what the picture's description says of a bot."""
    one, two, three, four = replies
    if bot == "Textbot":
        return one.ended < two.first and two.ended < three.first and three.ended < four.first
    if bot == "Batchbot":
        together = max(one.first, two.first) < min(one.ended, two.ended)
        return together and max(one.ended, two.ended) < min(three.first, four.first)
    return max(two.first, three.first, four.first) < one.ended


def draw_load(folder: Path) -> None:
    """Replay the load client at three bots: in columns, and for phones one below another."""
    runs = {bot: record_load(bot) for bot in ("Textbot", "Batchbot", "Continuousbot")}
    note = (
        f"Real runs of {MODEL}, replayed {SLOWDOWN} times slower. "
        f"A client sends a prompt every {INTERVAL_S} s."
    )
    for name, narrow in (("load.svg", False), ("load-narrow.svg", True)):
        (folder / name).write_text(draw(runs, SLOWDOWN, note, narrow), encoding="utf-8")


def film_chat(browser: Browser, folder: Path) -> None:
    """Show one conversation on the chat page, in light and dark, moving and as a still image."""
    with running("chatbot"):
        page = browser.new_page(viewport={"width": 480, "height": 665}, device_scale_factor=1.5)
        moments = record_chat(page, URL, CHAT)
        for scheme in ("light", "dark"):
            page.emulate_media(color_scheme=scheme)
            frames = render_frames(page, moments)
            save_animation(frames, folder / f"chat-{scheme}.webp")
            frames[-1].image.save(folder / f"chat-{scheme}.png", optimize=True)


def main() -> None:
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else FOLDER
    draw_load(folder)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=shutil.which("chromium"),
            args=["--no-sandbox"] if os.getuid() == 0 else [],
        )
        film_chat(browser, folder)
        browser.close()


if __name__ == "__main__":
    main()
