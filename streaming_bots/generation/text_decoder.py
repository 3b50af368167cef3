"""Decodes the tokens of one reply, whole characters at a time, up to a stop string."""

from collections.abc import Sequence
from typing import Any

from tokenizers.decoders import DecodeStream
from transformers import PreTrainedTokenizerBase


class TextDecoder:
    """Turns the token ids of one reply into text, whole characters at a time.

    An emoji is often several tokens: `step` returns it with the last one, and "" before. The
    `stop` string that is complete first ends the text, and is not part of it. Text that may be the
    beginning of one is held back. Joined, the pieces equal `tokenizer.decode` of all ids, without
    special tokens and space cleanup. Only bytes that form no character may look different.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, stop: Sequence[str] = ()) -> None:
        self.tokenizer = tokenizer
        self.stop = stop
        self.stopped = False  # at one of these strings
        self.held = ""  # perhaps the beginning of one
        self.ids: list[int] = []
        self.decoded = 0  # characters decoded so far
        # Only the Rust tokenizers decode incrementally. Nearly all models have one.
        self.backend: Any = getattr(tokenizer, "backend_tokenizer", None)
        self.stream = DecodeStream(skip_special_tokens=True)

    def step(self, token: int) -> str:
        """Return the text that this token completes, or "" if it completes none."""
        self.ids.append(token)
        text = self._next(token) if self.backend else self._rest()
        if not self.backend and text.endswith("\ufffd"):  # bytes that form no character yet
            return ""
        return self._until_stop(text)

    def flush(self) -> str:
        """Return the text still held back when a reply ends; half a character is decoded as is."""
        text, self.held = self._until_stop(self._rest()) + self.held, ""
        return text

    def _until_stop(self, text: str) -> str:
        """Return the new text up to a stop string, or hold back what may begin one."""
        self.decoded += len(text)
        if self.stopped:
            return ""
        text, self.held = self.held + text, ""
        found = [(at + len(stop), at) for stop in self.stop if (at := text.find(stop)) >= 0]
        if found:
            self.stopped = True
            return text[: min(found)[1]]  # the one that was completed first
        longest = max(map(len, self.stop), default=0)
        for at in range(max(0, len(text) - longest), len(text)):
            if any(stop.startswith(text[at:]) for stop in self.stop):
                text, self.held = text[:at], text[at:]
                break
        return text

    def _next(self, token: int) -> str:
        try:
            return self.stream.step(self.backend, token) or ""
        except Exception:
            # With a byte-fallback tokenizer (Llama 2), DecodeStream fails at bytes that form no
            # character. From now on, each token decodes the whole reply again.
            self.backend = None
            return self._rest()

    def _rest(self) -> str:
        text = self.tokenizer.decode(
            self.ids, skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
        return text[self.decoded :]
