"""A program on a terminal, and what a person sees there."""

import sys
from collections.abc import Callable

import pexpect
import pyte
from bot_fixtures import HANG_S, REPOSITORY

WIDTH, HEIGHT = 120, 30


class Terminal:
    """A client script in a pseudo-terminal."""

    def __init__(self, script: str, *arguments: str) -> None:
        self.process = pexpect.spawn(
            sys.executable,
            [script, *arguments],
            cwd=REPOSITORY,
            timeout=HANG_S,
            encoding="utf-8",
            dimensions=(HEIGHT, WIDTH),
        )
        self.screen = pyte.Screen(WIDTH, HEIGHT)
        self.screen.write_process_input = self.process.send  # such as the cursor's position
        self.stream = pyte.Stream(self.screen)

    @property
    def shown(self) -> str:
        return "\n".join(line.rstrip() for line in self.screen.display).rstrip()

    def expect(self, screen: str) -> None:
        """Wait until the whole screen equals this, except for spaces at the ends of lines."""
        lines = [
            line[start : start + WIDTH].rstrip()
            for line in screen.rstrip().split("\n")
            for start in range(0, max(len(line), 1), WIDTH)
        ]
        self.wait_for(lambda shown: shown == "\n".join(lines), screen)

    def wait_for(self, is_right: Callable[[str], bool], wanted: str = "something else") -> None:
        while not is_right(self.shown):
            try:
                self.stream.feed(self.process.read_nonblocking(4096, HANG_S))
            except (pexpect.TIMEOUT, pexpect.EOF) as error:
                raise AssertionError(f"{wanted}\n--- but the screen is\n{self.shown}") from error

    def type(self, keys: str) -> None:
        self.process.send(keys)

    def end(self) -> int:
        """Wait until the program has ended, and return its status."""
        try:
            while True:
                self.stream.feed(self.process.read_nonblocking(4096, HANG_S))
        except pexpect.EOF:
            self.process.wait()
            return self.process.exitstatus
