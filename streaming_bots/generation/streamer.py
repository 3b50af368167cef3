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

# A chunk of a response costs Serve and its proxy 0.8 ms of two cores, more than a token costs a
# small model. So each further reply that is written at the same time adds this much to the
# interval between two chunks. A fast model's tokens travel together, a slow model's alone.
SECONDS_PER_CHUNK = 0.004

Item = TypeVar("Item")


def min_interval(replies: int) -> float:
    """Return the least seconds between two chunks of a reply while `replies` are being written."""
    return SECONDS_PER_CHUNK * (replies - 1)


class End(NamedTuple):
    error: Exception | None


class TokenQueue(Generic[Item]):
    """Takes tokens, or their text, in any thread, and gives them to one reader on the event loop.

    Read it with `async for`, which yields lists of all items that are there, in order. The first
    list comes at once, and each further one at least `min_interval` seconds after the last. The
    end also comes at once. Must be created on the event loop.
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

    Pass it to `generate` twice, as `streamer` and in `stopping_criteria`. Unlike the streamers of
    transformers, it sends text as soon as a token completes a character, not at the next space. It
    passes a failure to the reader (`fail`). It stops the model if the reader leaves (`cancel`),
    and at a `stop` string. Must be created on the event loop.
    """

    text: TokenQueue[str] = field(default_factory=TokenQueue, init=False)
    past_key_values: Cache | None = field(default=None, init=False)  # for `generate`
    seen_prompt: bool = field(default=False, init=False)
    complete: bool = field(default=False, init=False)  # the model has written all of it
    read_to_end: bool = field(default=False, init=False)

    @property
    def done(self) -> bool:
        """Whether nobody reads it any more, or it has been read to its end."""
        return self.cancelled or self.read_to_end

    # Called in the model's thread

    def put(self, value: torch.Tensor) -> None:
        """Take the prompt, shape (1, prompt length), and then one token at a time, shape (1,)."""
        if not self.seen_prompt:
            self.seen_prompt = True
        elif not self.decoder.stopped:  # else `generate` stops after one more token
            self.add(int(value))

    def add(self, token: int) -> None:
        """Take one token."""
        self.token_times.append(time.monotonic())
        if text := self.decoder.step(token):
            self.text.put(text)

    def end(self) -> None:
        """Complete the reply."""
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
        """Stop `generate` at its next token, or before its first. The reader gets the text so far.

        A complete reply stays complete.
        """
        if not self.complete and not self.cancelled:
            self.cancelled = True
            self.text.end()
