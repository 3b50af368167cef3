"""The base class of both engines: their queue, their watchdog, and how replies end."""

import asyncio
import logging
from abc import ABC, abstractmethod
from collections.abc import AsyncGenerator, Callable
from typing import Protocol

import torch
from transformers import PreTrainedModel

from streaming_bots.errors import TooManyWaiting
from streaming_bots.generation.watchdog import Watchdog
from streaming_bots.operations.metrics import BotMetrics
from streaming_bots.settings import BotSettings

logger = logging.getLogger("ray.serve")


class Streamer(Protocol):
    """Receives the model's output: the text of one reply, or the tokens of a batch."""

    @property
    def done(self) -> bool:
        """Whether its reader has left, or has read to its end."""

    def end(self) -> None: ...
    def fail(self, error: Exception) -> None: ...
    def cancel(self) -> None: ...


class Engine(ABC):
    """Runs the model for each submitted streamer.

    A streamer ends with its reply, with the exception that its run raised, or with ModelStalled
    after `stall_timeout_s` seconds without progress. Create and use it on the event loop.
    """

    def __init__(
        self,
        places: int,  # how many streamers run at once
        settings: BotSettings,
        metrics: BotMetrics | None,  # None: the bot itself counts waiting and running replies
    ) -> None:
        self.places = places
        self.metrics = metrics
        self.max_waiting = settings.max_waiting
        self.submitted: dict[Streamer, None] = {}  # all that have not ended, in order
        self.running: set[Streamer] = set()  # those of them that have begun
        self.moved = asyncio.Event()  # set and replaced when either changes
        self.error: Exception | None = None
        self.watchdog = Watchdog(settings.stall_timeout_s, self.has_work, self.give_up)

    def submit(self, streamer: Streamer) -> None:
        """Queue a streamer. If a place is free, its reply begins at once.

        Raises TooManyWaiting, or the error that ended the engine.
        """
        self.check()
        without_place = len(self.submitted) - self.places
        if self.max_waiting is not None and without_place >= self.max_waiting:
            raise TooManyWaiting(f"{self.max_waiting} prompts already wait for the model")
        self.watchdog.expect_progress()
        self.submitted[streamer] = None
        self._start(streamer)
        self._changed()

    async def line(self, streamer: Streamer) -> AsyncGenerator[int]:
        """Yield how many replies must end before this one begins, each time that number changes.

        Stops when the reply begins. If a place is free for it, yields nothing.
        """
        told = 0
        while not streamer.done:
            ahead = self._ahead(streamer)
            if ahead != told:
                told = ahead
                yield ahead
            elif streamer in self.submitted and streamer not in self.running:
                await self.moved.wait()
            else:
                return

    def has_work(self) -> bool:
        """Whether the model must make progress."""
        return bool(self.submitted)

    def in_progress(self) -> int:
        """Return how many replies wait or run, and still have a reader."""
        return sum(not streamer.done for streamer in self.submitted)

    @abstractmethod
    def cancel(self, streamer: Streamer) -> None:
        """Stop a streamer's run, or remove it from the queue. Does nothing after its end."""

    def check(self) -> None:
        """Raise the error that ended the engine, such as ModelStalled."""
        if self.error is not None:
            raise type(self.error)(*self.error.args)

    def give_up(self, error: Exception) -> None:
        """Fail all replies with the same exception, so that it is logged only once."""
        if self.error is None:
            self.error = error
            logger.error(f"{error}; Serve will replace this replica")
            for streamer in list(self.submitted):
                streamer.fail(error)
                self.cancel(streamer)

    @abstractmethod
    def _start(self, streamer: Streamer) -> None:
        """Run the model for a streamer, now or later."""

    def _ahead(self, streamer: Streamer) -> int:
        earlier = 0
        for other in self.submitted:
            if other is streamer:
                return 0 if streamer in self.running else max(0, earlier - self.places + 1)
            earlier += not other.done
        return 0

    def _waiting(self) -> int:
        return len(self.submitted) - len(self.running)

    def _changed(self) -> None:
        if self.metrics is not None:
            self.metrics.waiting.set(self._waiting())
            self.metrics.running.set(len(self.running))
        self.moved.set()
        self.moved = asyncio.Event()


def watch_layers(model: PreTrainedModel, note_progress: Callable[[], None]) -> None:
    """Call `note_progress` before each layer computes, even in a prefill that takes minutes."""
    for module in model.modules():
        if isinstance(module, torch.nn.ModuleList):
            for layer in module:
                layer.register_forward_pre_hook(lambda *_: note_progress())
