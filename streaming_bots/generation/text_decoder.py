"""The tokens of one reply to text, whole characters at a time, up to a stop string."""

from collections.abc import Sequence
from typing import Any

from tokenizers.decoders import DecodeStream
from transformers import PreTrainedTokenizerBase


class TextDecoder:
    """Turns the token ids of one reply into text, whole characters at a time.

    The pieces joined are what `tokenizer.decode` makes of all ids, without special tokens and
    without cleaning up spaces (but bytes that become no character may look different), up to the
    `stop` string that is complete first, which ends the reply and is not part of it. An emoji or a
    Chinese character is often several tokens; its first ones give "" and its last one the whole.
    What may be the beginning of a stop string is held back as well.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, stop: Sequence[str] = ()) -> None:
        self.tokenizer = tokenizer
        self.stop = stop
        self.stopped = False  # at one of them
        self.held = ""  # the beginning of one, perhaps
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
        return self._until_stop(text)

    def flush(self) -> str:
        """What is still held back when a reply ends: half a character is decoded as it is."""
        text = self._rest()
        self.decoded += len(text)
        text, self.held = self._until_stop(text) + self.held, ""
        return text

    def _until_stop(self, text: str) -> str:
        """The text up to a stop string, less the beginning of one at its end."""
        if self.stopped:
            return ""
        text, self.held = self.held + text, ""
        found = [(at + len(stop), at) for stop in self.stop if (at := text.find(stop)) >= 0]
        if found:
            self.stopped = True
            return text[: min(found)[1]]  # the one that was complete first
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
            # DecodeStream gives up on a byte-fallback tokenizer (Llama 2) if the model writes
            # bytes that can become no character. The long way goes on.
            self.backend = None
            return self._rest()

    def _rest(self) -> str:
        text = self.tokenizer.decode(
            self.ids, skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
        return text[self.decoded :]
