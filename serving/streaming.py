"""Text from the model's thread to the event loop: handed over, stopped, failed.

`model.generate` runs in a thread and calls its streamer once for each token; a coroutine reads
the streamer on the event loop. Nobody polls: what is new wakes the loop.
"""

import asyncio
import time
from collections import deque
from collections.abc import AsyncGenerator, Collection, Sequence
from contextlib import suppress
from typing import Any, Generic, NamedTuple, TypeVar

import torch
from transformers import PreTrainedTokenizerBase, StoppingCriteria
from transformers.generation.streamers import BaseStreamer

from serving.decoding import TokenDecoder

# What a chunk of a response takes Serve and its proxy, more than a token takes a small model, is
# 0.8 ms of two cores. So from one chunk of a reply to its next, this passes at least for every
# other reply that is written at once: the tokens of a quick model travel together, of a slow one
# each alone.
SECONDS_PER_CHUNK = 0.004

Item = TypeVar("Item")


def pace(replies: int) -> float:
    """Seconds from one chunk of a reply to its next, of so many that are written at once."""
    return SECONDS_PER_CHUNK * (replies - 1)


class End(NamedTuple):
    error: Exception | None


class Handover(Generic[Item]):
    """Takes items in any thread, gives them to one reader on the event loop, in order.

    Read it with `async for`: a list of all items that are there. The first one comes at once, each
    further one `pace` seconds after the one before or later, and the end at once. Must be created
    on the event loop.
    """

    def __init__(self, pace: float = 0.0) -> None:
        self.loop = asyncio.get_running_loop()
        self.pace = pace
        self.read = float("-inf")  # when it was last, by time.monotonic
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
        """What is put after this is not read; `error` is raised where it is read."""
        self.items.append(End(error))
        self.loop.call_soon_threadsafe(self._announce_end)

    def _announce_end(self) -> None:
        self.arrived.set()
        self.ended.set()

    def __aiter__(self) -> "Handover[Item]":
        return self

    async def __anext__(self) -> list[Item]:
        while not self.items:
            await self.arrived.wait()
            self.arrived.clear()
            self.announced = False
        if (early := self.read + self.pace - time.monotonic()) > 0:
            with suppress(TimeoutError):
                async with asyncio.timeout(early):
                    await self.ended.wait()
        self.read = time.monotonic()
        ready: list[Item] = []
        while self.items:
            if isinstance(item := self.items[0], End):
                if ready:
                    break  # the end comes next
                raise item.error or StopAsyncIteration
            ready.append(item)
            self.items.popleft()
        return ready


class ReplyStreamer(BaseStreamer, StoppingCriteria):
    """The text of one reply: written by `generate` in its thread, read with `async for`.

    Pass it to `generate` twice, as `streamer` and in `stopping_criteria`. It has what the
    streamers of transformers lack: text leaves as soon as a token completes it instead of at the
    next space, a failure reaches the reader (`fail`), a reader who leaves stops the model
    (`cancel`), and so does one of the `stop` strings. Must be created on the event loop.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, stop: Sequence[str] = ()) -> None:
        self.text: Handover[str] = Handover()
        self.decoder = TokenDecoder(tokenizer, stop)
        self.asked = time.monotonic()
        self.token_times: list[float] = []
        self.seen_prompt = False
        self.complete = False  # all of it is there
        self.cancelled = False
        self.finished = False

    @property
    def unread(self) -> bool:
        """Whether nobody reads it any more, or to its end."""
        return self.cancelled or self.finished

    def finish_reason(self, ends: Collection[int]) -> str:
        """Why the reply is over: "cancelled", "stop" at what ends it, or "length"."""
        if self.cancelled:
            return "cancelled"
        ended = self.decoder.stopped or (self.decoder.ids and self.decoder.ids[-1] in ends)
        return "stop" if ended else "length"

    # Called in the model's thread

    def put(self, value: torch.Tensor) -> None:
        """Take the prompt, shape (1, prompt length), and then one token at a time, shape (1,)."""
        if not self.seen_prompt:
            self.seen_prompt = True
        elif not self.decoder.stopped:  # else `generate` learns of it at its next step
            self.add(int(value))

    def add(self, token: int) -> None:
        """Take one token."""
        self.token_times.append(time.monotonic())
        if text := self.decoder.step(token):
            self.text.put(text)

    def end(self) -> None:
        """The reply is complete."""
        if text := self.decoder.flush():
            self.text.put(text)
        self.complete = True
        self.text.end()

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        """Whether to stop, shape (1,): asked by `generate` after each token."""
        stop = self.cancelled or self.decoder.stopped
        return torch.full(input_ids.shape[:1], stop, device=input_ids.device)

    # Called on the event loop

    async def __aiter__(self) -> AsyncGenerator[str]:
        async for texts in self.text:
            yield "".join(texts)
        self.finished = True

    # Called in both

    def fail(self, error: Exception) -> None:
        """End the stream with an exception, raised where it is read."""
        self.text.end(error)

    def cancel(self) -> None:
        """Stop `generate` at its next token, or before its first. Text that is there is still read.

        A reply that is complete stays so.
        """
        if not self.complete and not self.cancelled:
            self.cancelled = True
            self.text.end()
