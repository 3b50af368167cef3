"""A watchdog that notices when a model makes no progress."""

import asyncio
import time
from collections.abc import Callable

from streaming_bots.errors import ModelStalled


class Watchdog:
    """Calls `give_up` on the event loop after `stall_timeout_s` seconds of work without progress.

    All methods are called on the event loop, except `note_progress`, which any thread may call.
    """

    def __init__(
        self,
        stall_timeout_s: float,
        has_work: Callable[[], bool],
        give_up: Callable[[Exception], None],
    ) -> None:
        self.stall_timeout_s = stall_timeout_s
        self.has_work = has_work
        self.give_up = give_up
        self.progress = 0.0  # when the model last made some, by time.monotonic
        self.watching: asyncio.TimerHandle | None = None

    def note_progress(self) -> None:
        self.progress = time.monotonic()

    def expect_progress(self) -> None:
        """Call this before adding work."""
        if not self.has_work():
            self.note_progress()
        if self.watching is None:
            self._look_in(self.stall_timeout_s)

    def _look_in(self, seconds: float, stood_at: float | None = None) -> None:
        loop = asyncio.get_running_loop()
        self.watching = loop.call_later(seconds, self._look, stood_at)

    def _look(self, stood_at: float | None) -> None:
        """Check for progress. `stood_at` is the last one if the model seemed to hang before."""
        self.watching = None
        if not self.has_work():
            return  # until there is work again
        progress = self.progress
        if (left := progress + self.stall_timeout_s - time.monotonic()) > 0:
            self._look_in(left)
        elif progress != stood_at:
            # If the whole process was suspended, the model continues only now. So check once more.
            self._look_in(self.stall_timeout_s / 10, progress)
        else:
            self.give_up(ModelStalled(f"the model made no progress for {self.stall_timeout_s} s"))
