"""Send a bot many prompts at once, and watch how their replies grow.

python clients/load_client.py --num-prompts 8
python clients/load_client.py --url ws://localhost:8000/ "Hello!" "Tell me a joke."
"""

import argparse
import math
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import cycle, islice
from pathlib import Path

from chat_client import ReplyError
from chat_client import ask as ask_over_websocket
from chat_connection import CHAT_V1
from connection import Refused, add_options, authorization, printable, wait_until_ready
from huggingface_hub import try_to_load_from_cache
from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text
from stream_client import ask as ask_over_http
from tokenizers import Tokenizer
from websockets.exceptions import ConnectionClosedError, InvalidStatus
from websockets.sync.client import connect

from streaming_bots.models.source import BUNDLED, BUNDLED_FOLDER

PROMPTS = ["Tell me a story.", "Write a poem.", "Why is the sky blue?", "Tell me a joke."]
REFUSED = {1003, 1007, 1009, 1012, 1013}  # a Chatbot's close codes, except for failures
LINES = 3  # how many of a reply's last lines are shown


@dataclass(eq=False)
class Row:
    """A prompt and its outcome. Times are by time.monotonic(), in seconds."""

    prompt: str
    text: str = ""
    asked: float | None = None
    first: float | None = None
    ended: float | None = None
    outcome: str = ""

    def run(self, options: argparse.Namespace, headers: dict[str, str], delay: float) -> None:
        """Send the prompt, and keep the reply."""
        time.sleep(delay)
        self.asked = time.monotonic()
        try:
            for piece in ask(options, headers, self.prompt):
                self.first = self.first or (time.monotonic() if piece else None)
                self.text += piece
            self.outcome = "finished"
        except Refused as answer:
            self.outcome = outcome_of(answer.status)
        except InvalidStatus as answer:
            self.outcome = outcome_of(answer.response.status_code)
        except ConnectionClosedError as closed:
            code = closed.rcvd.code if closed.rcvd else 1006
            self.outcome = f"{'refused' if code in REFUSED else 'failed: closed with'} {code}"
        except ReplyError as error:
            self.outcome = str(error)
        except Exception as error:  # any error is this row's outcome
            self.outcome = f"failed: {type(error).__name__}"
        self.ended = time.monotonic()

    @property
    def state(self) -> str:
        if self.outcome:
            return self.outcome
        return "replying" if self.first else "waiting" if self.asked else ""


def outcome_of(status: int) -> str:
    return f"{'failed:' if status >= 500 and status != 503 else 'refused'} {status}"


def ask(options: argparse.Namespace, headers: dict[str, str], prompt: str) -> Iterator[str]:
    """Yield a reply, piece by piece, over HTTP or over a WebSocket."""
    if not options.url.startswith("ws"):
        yield from ask_over_http(options.url, {"prompt": prompt}, headers)
        return
    with connect(options.url, subprotocols=[CHAT_V1], additional_headers=headers) as websocket:
        yield from ask_over_websocket(websocket, prompt, options.end_of_response)


def token_counter(model: str) -> Callable[[str], int] | None:
    """Return a function that counts tokens, or None if tokenizer.json is not on this machine."""
    folder = BUNDLED_FOLDER if model == BUNDLED else Path(model)
    file = str(folder / "tokenizer.json")
    if not folder.is_dir():
        try:
            cached = try_to_load_from_cache(model, "tokenizer.json")
        except ValueError:  # not a hub id
            return None
        if not isinstance(cached, str):
            return None
        file = cached
    try:
        tokenizer = Tokenizer.from_file(file)
    except Exception:  # tokenizers raises no other type
        return None
    return lambda text: len(tokenizer.encode(text, add_special_tokens=False))


def draw(rows: list[Row], title: str, count: Callable[[str], int] | None, room: int) -> Table:
    """Draw the rows as they are now, with at most the last `room` characters of each reply."""
    table = Table(title=Text(title), title_justify="left", expand=True)
    table.add_column("prompt", max_width=16, no_wrap=True, overflow="ellipsis")
    table.add_column("reply", ratio=1, overflow="fold")
    table.add_column("first text", justify="right", min_width=7)
    table.add_column("tokens/s", justify="right")
    table.add_column("state", min_width=8)
    for row in rows:
        shown = row.text if len(row.text) <= room else "…" + row.text[1 - room :]
        first = f"{(row.first - row.asked) * 1000:.0f} ms" if row.first and row.asked else ""
        # Text keeps rich from interpreting markup.
        words = [Text(printable(part)) for part in (row.prompt, shown)]
        table.add_row(*words, first, speed(row, count), Text(printable(row.state)))
    return table


def speed(row: Row, count: Callable[[str], int] | None) -> str:
    """Return the tokens per second after the first token, once the reply has ended."""
    if count is None or row.first is None or row.ended is None or row.ended == row.first:
        return ""
    return f"{(count(row.text) - 1) / (row.ended - row.first):.0f}"


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="Ask many prompts at once.")
    parser.add_argument("prompts", nargs="*", metavar="prompt", help="by default, built-in ones")
    parser.add_argument("--num-prompts", type=int, help="how many to send, in rotation")
    parser.add_argument(
        "--interval", type=float, default=0, metavar="SECONDS", help="time between prompts"
    )
    parser.add_argument("--end-of-response", default="<>", help="a plain Chatbot's marker")
    add_options(parser, "http://localhost:8000/")
    return parser


def main() -> None:
    options = parser().parse_args()
    if options.num_prompts is not None and options.num_prompts < 1:
        sys.exit("--num-prompts must be 1 or more")
    if not 0 <= options.interval < math.inf:
        sys.exit("--interval must be 0 seconds or more")
    prompts = options.prompts or PROMPTS
    rows = [Row(prompt) for prompt in islice(cycle(prompts), options.num_prompts or len(prompts))]
    headers = authorization(options)
    try:
        model = wait_until_ready(options, headers)
        watch(rows, options, headers, model)
    except KeyboardInterrupt:
        print()
    sys.exit(any(row.outcome != "finished" for row in rows))


def start(
    rows: list[Row], options: argparse.Namespace, headers: dict[str, str]
) -> list[threading.Thread]:
    """Send each prompt in a daemon thread, so that Ctrl-C can end the program."""
    threads = [
        threading.Thread(
            target=row.run, args=(options, headers, number * options.interval), daemon=True
        )
        for number, row in enumerate(rows)
    ]
    for thread in threads:
        thread.start()
    return threads


def watch(
    rows: list[Row], options: argparse.Namespace, headers: dict[str, str], model: str
) -> None:
    """Send all prompts, and show the rows until the last one has ended."""
    console = Console()
    room = max(1, console.width - 68) * LINES if console.is_terminal else sys.maxsize
    title, count = f"{options.url} {model}", token_counter(model)
    with Live(
        get_renderable=lambda: draw(rows, title, count, room),
        console=console,
        refresh_per_second=20,
    ):
        for thread in start(rows, options, headers):
            thread.join()
    if not console.is_terminal:
        print()
    outcomes = {row.outcome for row in rows}
    if outcomes == {"refused 405"}:
        print("the Chatbot? add --url ws://localhost:8000/", file=sys.stderr)
    elif outcomes == {"refused 403"} and options.url.startswith("ws"):
        print("not the Chatbot? add --url http://localhost:8000/", file=sys.stderr)


if __name__ == "__main__":
    main()
