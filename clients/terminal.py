"""What makes a terminal pleasant to chat in, so that chat_client.py need not be about it."""

import re
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from prompt_toolkit import PromptSession
from prompt_toolkit.enums import DEFAULT_BUFFER
from prompt_toolkit.filters import has_focus
from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent
from prompt_toolkit.output import create_output

HELP = "Alt-Enter breaks a line, Ctrl-C stops a reply, /reset begins anew, /quit or Ctrl-D leaves."
keys = KeyBindings()


@keys.add("enter", filter=has_focus(DEFAULT_BUFFER))
def send(event: KeyPressEvent) -> None:
    event.current_buffer.validate_and_handle()


@keys.add("escape", "enter", filter=has_focus(DEFAULT_BUFFER))  # as terminals report Alt-Enter
def break_line(event: KeyPressEvent) -> None:
    event.current_buffer.insert_text("\n")


def is_typed() -> bool:
    """Whether somebody is there to type; else prompts come through a pipe."""
    return sys.stdin.isatty()


def prompts() -> Iterator[str | None]:
    """What is typed, with the arrow keys for what was typed before; None for /reset.

    Through a pipe, each line as it is.
    """
    if not is_typed():
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
        if typed.strip() == "/quit":
            return
        if typed.strip() == "/reset":
            print("(a new conversation)", file=sys.stderr)
            yield None
        elif re.fullmatch(r"/\w+", typed.strip()):
            print(HELP, file=sys.stderr)
        else:
            yield typed


@contextmanager
def on_ctrl_c(act: Callable[[], object]) -> Iterator[None]:
    """Have the first Ctrl-C call something instead of interrupting; a second one interrupts.

    It is called in a thread, since Ctrl-C may come in the middle of what it would disturb.
    """
    threads: list[threading.Thread] = []
    before = signal.getsignal(signal.SIGINT)

    def handle(*_: object) -> None:
        signal.signal(signal.SIGINT, before)
        threads.append(threading.Thread(target=act))
        threads[0].start()

    signal.signal(signal.SIGINT, handle)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
        for thread in threads:
            thread.join()
