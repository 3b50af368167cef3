"""The thread in which a replica's model runs, and what happens when it hangs or dies."""

import asyncio
import logging
import threading
from collections.abc import AsyncGenerator, Callable
from contextlib import suppress
from typing import Any, Protocol

import torch
from transformers import PreTrainedModel

from serving.watchdog import DEFAULT_STALL_TIMEOUT_S, ModelStalled, Watchdog

logger = logging.getLogger("ray.serve")


class Streamer(Protocol):
    """Where a run of the model goes: text for one reader, or tokens for those of a batch."""

    @property
    def unread(self) -> bool:
        """Whether nobody reads it any more, or to its end."""

    def end(self) -> None: ...
    def fail(self, error: Exception) -> None: ...
    def cancel(self) -> None: ...


class TooManyWaiting(Exception):
    """No further prompt may wait for the model."""


class ModelThread:
    """Runs the model for one streamer after the other.

    In one thread: a second would bring its own OpenMP team and fight for the same cores. Every
    streamer that is submitted ends: with its reply, with the exception that its run raised, or
    with ModelStalled when there was no progress for `stall_timeout_s` seconds. The thread ends
    with the replica's process, which must not wait for it: it may hang. Must be created on the
    event loop.
    """

    def __init__(
        self,
        stall_timeout_s: float = DEFAULT_STALL_TIMEOUT_S,
        max_waiting: int | None = None,
        report_waiting: Callable[[int], None] = lambda count: None,
    ) -> None:
        self.loop = asyncio.get_running_loop()
        self.moved = asyncio.Event()  # set, and replaced, when one comes, begins or is cancelled
        self.max_waiting = max_waiting
        self.report_waiting = report_waiting  # called when the line has moved
        self.jobs: dict[Streamer, tuple[Callable[..., None], tuple[Any, ...]]] = {}  # in line
        self.new_job = threading.Condition()  # and the lock of `jobs`
        self.running: Streamer | None = None
        self.error: ModelStalled | None = None
        self.watchdog = Watchdog(stall_timeout_s, self._has_work, self._give_up)
        self.thread = threading.Thread(target=self._run, name="model", daemon=True)
        self.thread.start()

    # Called on the event loop

    def submit(self, streamer: Streamer, generate: Callable[..., None], *arguments: Any) -> None:
        """Have `generate(*arguments, streamer)` run when its turn comes.

        Raises TooManyWaiting and ModelStalled.
        """
        self.check()
        if self.max_waiting is not None and len(self.jobs) >= self.max_waiting:
            raise TooManyWaiting(f"{self.max_waiting} prompts already wait for the model")
        self.watchdog.expect_progress()
        with self.new_job:
            self.jobs[streamer] = generate, arguments
            self.new_job.notify()
        self._line_moved()

    async def line(self, streamer: Streamer) -> AsyncGenerator[int]:
        """How many are ahead of it, if any: at once and whenever that changes, until it begins."""
        told = 0
        while not streamer.unread:
            there = self._there()
            ahead = count_read(there[: there.index(streamer)]) if streamer in there else 0
            if ahead != told:
                told = ahead
                yield ahead
            elif streamer in self.jobs:
                await self.moved.wait()
            else:
                return

    def cancel(self, streamer: Streamer) -> None:
        """Stop its run, or leave its place to those behind it."""
        if streamer.unread and streamer not in self.jobs:
            return  # the line stays as it is
        with self.new_job:
            self.jobs.pop(streamer, None)
        streamer.cancel()
        self._line_moved()

    def in_progress(self) -> int:
        """How many wait, or are written, and still have a reader."""
        return count_read(self._there())

    def check(self) -> None:
        """Raise ModelStalled if the model hangs or its thread is dead."""
        if self.error is not None:
            raise ModelStalled(*self.error.args)

    def _there(self) -> list[Streamer]:
        with self.new_job:
            return [*filter(None, [self.running]), *self.jobs]

    def _line_moved(self) -> None:
        self.report_waiting(len(self.jobs))
        self.moved.set()
        self.moved = asyncio.Event()

    def _recover(self) -> None:
        self.error = None

    def _has_work(self) -> bool:
        return self.running is not None or bool(self.jobs)

    def _give_up(self, error: ModelStalled) -> None:
        """Fail all streamers; what of them has not begun never will."""
        if self.error is not None:
            return
        self.error = error
        logger.error(f"{error}; Serve will replace this replica")
        for streamer in self._there():
            streamer.fail(error)
            self.cancel(streamer)

    # Called in the model's thread

    def _run(self) -> None:
        while True:
            with self.new_job:
                self.new_job.wait_for(lambda: self.jobs)
                self.watchdog.note_progress()
                streamer = self.running = next(iter(self.jobs))
                generate, arguments = self.jobs.pop(streamer)
            try:
                self._on_loop(self._line_moved)
                if streamer.unread:  # its readers have just left
                    streamer.end()
                else:
                    generate(*arguments, streamer)
            except Exception as error:
                if streamer.unread:
                    logger.exception("The model failed for a reply that nobody reads any more")
                streamer.fail(error)
                if gpu_is_lost():
                    self._on_loop(self._give_up, ModelStalled("the GPU has failed"))
                    return
            except BaseException as error:  # such as SystemExit
                death = ModelStalled(f"the model's thread died of {type(error).__name__}")
                death.__cause__ = error
                self._on_loop(self._give_up, death)
                return
            self.watchdog.note_progress()
            self._on_loop(self._recover)  # if it had stalled, it was only slow
            self.running = None

    def _on_loop(self, function: Callable[..., None], *arguments: Any) -> None:
        with suppress(RuntimeError):  # the loop is closed: the process ends
            self.loop.call_soon_threadsafe(function, *arguments)


def count_read(streamers: list[Streamer]) -> int:
    return sum(not streamer.unread for streamer in streamers)


def watch_layers(model: PreTrainedModel, note_progress: Callable[[], None]) -> None:
    """Have it called before each layer computes, also when a long prompt is read for minutes."""
    for module in model.modules():
        if isinstance(module, torch.nn.ModuleList):
            for layer in module:
                layer.register_forward_pre_hook(lambda *_: note_progress())


def gpu_is_lost() -> bool:
    """Whether an error has left the GPU of no use to this process: all that follows fails, too."""
    if not torch.cuda.is_initialized():
        return False
    try:
        torch.cuda.synchronize()
    except RuntimeError:
        return True
    return False
