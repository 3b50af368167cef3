"""Line editing, notes and Ctrl-C for chatting in a terminal."""

import re
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

from chat_connection import ChatConnection
from prompt_toolkit import PromptSession
from prompt_toolkit.enums import DEFAULT_BUFFER
from prompt_toolkit.filters import has_focus
from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent
from prompt_toolkit.output import create_output
from websockets.exceptions import WebSocketException

HELP = "Alt-Enter breaks a line, Ctrl-C stops a reply, /reset starts anew, /quit ends."
STOP = '{"type": "stop"}'
keys = KeyBindings()


@keys.add("enter", filter=has_focus(DEFAULT_BUFFER))
def send(event: KeyPressEvent) -> None:
    event.current_buffer.validate_and_handle()


@keys.add("escape", "enter", filter=has_focus(DEFAULT_BUFFER))  # Alt-Enter, as terminals send it
def break_line(event: KeyPressEvent) -> None:
    event.current_buffer.insert_text("\n")


def is_typed() -> bool:
    """Whether a person types the prompts. If not, they come through a pipe."""
    return sys.stdin.isatty()


def prompts() -> Iterator[str | None]:
    """Yield typed prompts, and None for /reset. The arrow keys bring back earlier prompts.

    From a pipe, yield each line as it is.
    """
    if not is_typed():
        sys.stdin.reconfigure(errors="replace")  # type: ignore[union-attr]
        yield from (line.rstrip("\n") for line in sys.stdin)
        return
    session: PromptSession[str] = PromptSession(
        "> ",
        multiline=True,
        key_bindings=keys,
        prompt_continuation="  ",
        output=create_output(always_prefer_tty=True),  # replies may go to a file
    )
    while True:
        try:
            typed = session.prompt()
        except EOFError:
            return
        except KeyboardInterrupt:  # it may have been meant for a reply that has just ended
            print(HELP, file=sys.stderr)
            continue
        if typed.strip() == "/quit":
            return
        if typed.strip() == "/reset":
            print("(a new conversation)", file=sys.stderr)
            yield None
        elif re.fullmatch(r"/\w+", typed.strip()):
            print(HELP, file=sys.stderr)
        else:
            yield typed


class Notes:
    """Shows what chat.v1 says beside a reply's text, such as the place in the queue."""

    def __init__(self) -> None:
        self.ending = ""
        self.dropped = 0

    def tell(self, message: dict[str, Any]) -> None:
        self.dropped = int(message.get("dropped", 0))
        self.ending = " (stopped)" if message.get("finish_reason") == "cancelled" else ""
        if (ahead := int(message.get("ahead", 0))) and is_typed():
            print(f"({ahead} ahead)", file=sys.stderr)

    def print(self) -> None:
        """End the reply's line, and say how many messages the model has forgotten."""
        print(self.ending, flush=True)
        if self.dropped and is_typed():
            print(f"(the first {self.dropped} messages are forgotten)", file=sys.stderr)


@contextmanager
def stop_on_ctrl_c(connection: ChatConnection) -> Iterator[None]:
    """Let the first Ctrl-C on a terminal stop the reply. A second one interrupts, as always.

    A thread sends the stop, since Ctrl-C may interrupt the WebSocket's own code.
    """
    if not (connection.websocket.subprotocol and is_typed()):
        yield
        return
    threads: list[threading.Thread] = []
    before = signal.getsignal(signal.SIGINT)

    def stop() -> None:
        with suppress(WebSocketException):  # the reader of the reply gets it, too
            connection.websocket.send(STOP)

    def handle(*_: object) -> None:
        signal.signal(signal.SIGINT, before)
        if connection.websocket.close_code is not None:  # nothing to stop while it reconnects
            raise KeyboardInterrupt
        threads.append(threading.Thread(target=stop))
        threads[0].start()

    signal.signal(signal.SIGINT, handle)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
        for thread in threads:
            thread.join()
