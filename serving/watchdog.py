"""Notices that a model makes no progress."""

import asyncio
import time
from collections.abc import Callable

DEFAULT_STALL_TIMEOUT_S = 120.0  # one layer for a long prompt may take a slow machine long


class ModelStalled(Exception):
    """The model makes no progress, or its thread is dead. The replica must be replaced."""


class Watchdog:
    """Calls `give_up` on the event loop after `stall_timeout_s` seconds of work without progress.

    All methods are called on the event loop, but `note_progress`, which any thread may call.
    """

    def __init__(
        self,
        stall_timeout_s: float,
        has_work: Callable[[], bool],
        give_up: Callable[[ModelStalled], None],
    ) -> None:
        self.stall_timeout_s = stall_timeout_s
        self.has_work = has_work
        self.give_up = give_up
        self.progress = 0.0  # when there last was some, by time.monotonic
        self.watching: asyncio.TimerHandle | None = None

    def note_progress(self) -> None:
        self.progress = time.monotonic()

    def expect_progress(self) -> None:
        """To be called before there is more work."""
        if not self.has_work():
            self.note_progress()
        if self.watching is None:
            self._look_in(self.stall_timeout_s)

    def _look_in(self, seconds: float, stood_at: float | None = None) -> None:
        loop = asyncio.get_running_loop()
        self.watching = loop.call_later(seconds, self._look, stood_at)

    def _look(self, stood_at: float | None) -> None:
        """Look whether there was progress; `stood_at` is what there was when it seemed to stand."""
        self.watching = None
        if not self.has_work():
            return  # until there is more
        progress = self.progress
        if (left := progress + self.stall_timeout_s - time.monotonic()) > 0:
            self._look_in(left)
        elif progress != stood_at:
            # The whole process may have been suspended. Then the model now goes on.
            self._look_in(self.stall_timeout_s / 10, progress)
        else:
            self.give_up(ModelStalled(f"the model made no progress for {self.stall_timeout_s} s"))
