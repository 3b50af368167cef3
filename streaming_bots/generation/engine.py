"""What both engines share: their line, their watchdog, and how replies end."""

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
    """Receives what the model writes: the text of one reply, or the tokens of a batch."""

    @property
    def done(self) -> bool:
        """Whether nobody reads it any more, or it was read to its end."""

    def end(self) -> None: ...
    def fail(self, error: Exception) -> None: ...
    def cancel(self) -> None: ...


class Engine(ABC):
    """Runs the model for the streamers that are submitted.

    Every streamer ends: with its reply, with the exception of its run, or with ModelStalled after
    `stall_timeout_s` seconds without progress. Must be created on the event loop, where all public
    methods are called.
    """

    def __init__(
        self,
        places: int,  # replies at once
        settings: BotSettings,
        metrics: BotMetrics | None,  # None: the bot itself counts what waits and what runs
    ) -> None:
        self.places = places
        self.metrics = metrics
        self.max_waiting = settings.max_waiting
        self.submitted: dict[Streamer, None] = {}  # what the model has not ended, in order
        self.running: set[Streamer] = set()  # of these, what it has begun
        self.moved = asyncio.Event()  # set, and replaced, when either changes
        self.error: Exception | None = None
        self.watchdog = Watchdog(
            settings.stall_timeout_s, lambda: bool(self.submitted), self.give_up
        )

    def submit(self, streamer: Streamer) -> None:
        """Have a reply written when its turn comes, or at once if there is a free place.

        Raises TooManyWaiting, and what has ended the engine.
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
        """How many replies must end before it begins: whenever that changes, until it begins.

        Nothing if there is a place for it.
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

    def in_progress(self) -> int:
        """How many replies wait or are written, and still have a reader."""
        return sum(not streamer.done for streamer in self.submitted)

    @abstractmethod
    def cancel(self, streamer: Streamer) -> None:
        """Stop its run, or leave its place to those behind it. Does nothing after its end."""

    def check(self) -> None:
        """Raise what has ended the engine, such as ModelStalled."""
        if self.error is not None:
            raise type(self.error)(*self.error.args)

    def give_up(self, error: Exception) -> None:
        """Fail all replies, with one exception, so that it is logged once."""
        if self.error is None:
            self.error = error
            logger.error(f"{error}; Serve will replace this replica")
            for streamer in list(self.submitted):
                streamer.fail(error)
                self.cancel(streamer)

    @abstractmethod
    def _start(self, streamer: Streamer) -> None:
        """Have it written, at once or later."""

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
    """Have it called before each layer computes, also when a long prompt is read for minutes."""
    for module in model.modules():
        if isinstance(module, torch.nn.ModuleList):
            for layer in module:
                layer.register_forward_pre_hook(lambda *_: note_progress())
