"""Streamers, which carry a reply's text from the model's thread to the event loop.

`model.generate` runs in a thread, and calls its streamer once for each token. A coroutine reads
the streamer on the event loop. Nothing polls: a token wakes the loop.
"""

import asyncio
import time
from collections import deque
from collections.abc import AsyncGenerator
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, Generic, NamedTuple, TypeVar

import torch
from transformers import Cache, StoppingCriteria
from transformers.generation.streamers import BaseStreamer

from streaming_bots.generation.reply import ReplyState

# A chunk costs Serve and its proxy 0.8 ms of two cores, more than a token costs a small model. So
# each further concurrent reply adds this to the interval, and tokens of a fast model share chunks.
SECONDS_PER_CHUNK = 0.004

Item = TypeVar("Item")


def min_interval(replies: int) -> float:
    """Return the minimum seconds between two chunks of a reply while `replies` replies run."""
    return SECONDS_PER_CHUNK * (replies - 1)


class End(NamedTuple):
    error: Exception | None


class TokenQueue(Generic[Item]):
    """Takes tokens, or their text, in any thread, for one reader on the event loop.

    `async for` yields lists of all items so far, at least `min_interval` seconds apart. The first
    list and the end come at once. Create it on the event loop.
    """

    def __init__(self, min_interval: float = 0.0) -> None:
        self.loop = asyncio.get_running_loop()
        self.min_interval = min_interval
        self.last_read = float("-inf")  # by time.monotonic
        self.items: deque[Item | End] = deque()
        self.arrived = asyncio.Event()
        self.announced = False  # `arrived` is set, or will be
        self.ended = asyncio.Event()

    def put(self, item: Item) -> None:
        self.items.append(item)
        if not self.announced:
            self.announced = True
            self.loop.call_soon_threadsafe(self.arrived.set)

    def end(self, error: Exception | None = None) -> None:
        """End the queue: later items are never read, and any `error` is raised in the reader."""
        self.items.append(End(error))
        self.loop.call_soon_threadsafe(self._announce_end)

    def _announce_end(self) -> None:
        self.arrived.set()
        self.ended.set()

    def __aiter__(self) -> "TokenQueue[Item]":
        return self

    async def __anext__(self) -> list[Item]:
        while not self.items:
            await self.arrived.wait()
            self.arrived.clear()
            self.announced = False
        if (early := self.last_read + self.min_interval - time.monotonic()) > 0:
            with suppress(TimeoutError):
                async with asyncio.timeout(early):
                    await self.ended.wait()
        self.last_read = time.monotonic()
        ready: list[Item] = []
        while self.items:
            if isinstance(item := self.items[0], End):
                if ready:
                    break  # the end comes next
                raise item.error or StopAsyncIteration
            ready.append(item)
            self.items.popleft()
        return ready


@dataclass(eq=False, repr=False)
class ReplyStreamer(ReplyState, BaseStreamer, StoppingCriteria):
    """The text of one reply: `generate` writes it in its thread, and `async for` reads it.

    Pass it to `generate` both as `streamer` and in `stopping_criteria`. Unlike the streamers of
    transformers, it sends text when a token completes a character, not at the next space. It
    passes a failure to the reader, and stops the model at a stop string or when the reader leaves.
    """

    text: TokenQueue[str] = field(default_factory=TokenQueue, init=False)
    past_key_values: Cache | None = field(default=None, init=False)  # for `generate`
    complete: bool = field(default=False, init=False)  # the model has written all of it
    read_to_end: bool = field(default=False, init=False)

    @property
    def done(self) -> bool:
        """Whether its reader has left, or has read to its end."""
        return self.cancelled or self.read_to_end

    # Called in the model's thread

    def put(self, value: torch.Tensor) -> None:
        """Take the prompt, shape (1, prompt length), and then one token at a time, shape (1,)."""
        if value.dim() == 1 and not self.decoder.stopped:  # after that, one more token comes
            self.add(int(value))

    def add(self, token: int) -> None:
        """Take one token."""
        self.token_times.append(time.monotonic())
        if text := self.decoder.step(token):
            self.text.put(text)

    def end(self) -> None:
        if text := self.decoder.flush():
            self.text.put(text)
        self.complete = True
        self.text.end()

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        """Tell `generate`, which asks after each token, whether to stop; shape (1,)."""
        stop = self.cancelled or self.decoder.stopped
        return torch.full(input_ids.shape[:1], stop, device=input_ids.device)

    # Called on the event loop

    async def __aiter__(self) -> AsyncGenerator[str]:
        async for texts in self.text:
            yield "".join(texts)
        self.read_to_end = True

    # Called in both

    def fail(self, error: Exception) -> None:
        """End the stream with an exception, which is raised in its reader."""
        self.text.end(error)

    def cancel(self) -> None:
        """Stop an incomplete reply at its next token. The reader gets the text so far."""
        if not self.complete and not self.cancelled:
            self.cancelled = True
            self.text.end()
