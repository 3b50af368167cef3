"""Text from the model's thread to the event loop: decoded, handed over, stopped, failed.

`model.generate` runs in a thread and calls its streamer once for each token; a coroutine reads
the streamer on the event loop. Nobody polls: each piece of text wakes the loop once.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from tokenizers.decoders import DecodeStream
from transformers import AsyncTextIteratorStreamer, PreTrainedTokenizerBase, StoppingCriteria


class TokenDecoder:
    """Turns the token ids of one reply into text, whole characters at a time.

    The pieces joined are `tokenizer.decode(ids, skip_special_tokens=True)`. An emoji or a Chinese
    character is often several tokens; its first ones give "" and its last one the whole.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer = tokenizer
        self.ids: list[int] = []
        self.decoded = 0  # characters given so far
        # Incremental decoding comes with the Rust tokenizers, which nearly all models have.
        self.backend: Any = getattr(tokenizer, "backend_tokenizer", None)
        self.stream = DecodeStream(skip_special_tokens=True)

    def step(self, token: int) -> str:
        """The text that this token completes, "" if it completes none."""
        self.ids.append(token)
        text = self._next(token) if self.backend else self._rest()
        if not self.backend and text.endswith("\ufffd"):  # bytes that are no character yet
            return ""
        self.decoded += len(text)
        return text

    def flush(self) -> str:
        """What is still held back when a reply ends inside a character: decoded as it is."""
        text = self._rest()
        self.decoded += len(text)
        return text

    def _next(self, token: int) -> str:
        try:
            return self.stream.step(self.backend, token) or ""
        except Exception:
            # DecodeStream gives up on a byte-fallback tokenizer (Llama 2) if the model writes
            # bytes that can become no character. The long way goes on.
            self.backend = None
            return self._rest()

    def _rest(self) -> str:
        text = self.tokenizer.decode(
            self.ids, skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
        return text[self.decoded :]


class ReplyStreamer(AsyncTextIteratorStreamer, StoppingCriteria):
    """The text of one reply: written by `generate` in its thread, read with `async for`.

    Pass it to `generate` twice, as `streamer` and in `stopping_criteria`. It adds to the streamer
    of transformers what that lacks: text leaves as soon as a token completes it instead of at the
    next space, a failure reaches the reader (`fail`), and a reader who leaves stops the model
    (`cancel`). Must be created on the event loop.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        super().__init__(tokenizer)
        self.decoder = TokenDecoder(tokenizer)
        self.seen_prompt = False
        self.cancelled = False

    # Called in the model's thread

    def put(self, value: torch.Tensor) -> None:
        """Take the prompt, shape (1, prompt length), and then one token at a time, shape (1,)."""
        if not self.seen_prompt:
            self.seen_prompt = True
        elif text := self.decoder.step(int(value)):
            self.on_finalized_text(text)

    def end(self) -> None:
        """The reply is complete."""
        if text := self.decoder.flush():
            self.on_finalized_text(text)
        self.loop.call_soon_threadsafe(self.text_queue.put_nowait, self.stop_signal)

    def fail(self, error: Exception) -> None:
        """End the stream with an exception, raised where it is read."""
        self.loop.call_soon_threadsafe(self.text_queue.put_nowait, error)

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        """Whether to stop, shape (1,): asked by `generate` after each token."""
        return torch.full(input_ids.shape[:1], self.cancelled, device=input_ids.device)

    # Called on the event loop

    async def __anext__(self) -> str:
        text = await super().__anext__()
        if isinstance(text, Exception):
            raise text
        return text

    def cancel(self) -> None:
        """Nobody reads on: `generate` stops at its next token, or never starts."""
        self.cancelled = True


class Failing(Protocol):
    """A streamer that can end with an exception."""

    def fail(self, error: Exception) -> None: ...


@contextmanager
def errors_to(streamer: Failing) -> Iterator[None]:
    """Send an exception of the `generate` inside to whoever reads the streamer.

    Without it the exception would end in the thread's future, and the reader would wait for ever.
    """
    try:
        yield
    except Exception as error:
        streamer.fail(error)
