"""The rows of a batch, and which of them may run together."""

import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from streaming_bots.generation.reply import ReplyState

ALWAYS_ALLOWED = 4096  # tokens of padding that any batch may have, since they take little time
MAX_TOKENS = 32_768  # of all rows' prompts and replies, since their KV cache must fit in memory


@dataclass(eq=False, repr=False)
class Row(ReplyState):
    """One prompt of a batch and the state of its reply."""

    device: torch.device | None = None
    text: str = ""  # not taken yet
    end: Exception | type[StopIteration] | None = None  # how the row ended, once it has

    def __post_init__(self) -> None:
        super().__post_init__()
        self.sampler = self.options.sampler(self.device)

    def add(self, token: int) -> None:
        """Take one token, and note whether it ends the reply. Called in the model's thread."""
        self.token_times.append(time.monotonic())
        try:
            self.text += self.decoder.step(token)
            if (
                token in self.end_tokens
                or self.reply_tokens >= self.options.max_new_tokens
                or self.decoder.stopped
                or self.cancelled
            ):
                self.text += self.decoder.flush()
                self.end = StopIteration
        except Exception as error:  # affects only this row
            self.end = error

    def take_text(self) -> str:
        """Return the text that the tokens since the last call have completed."""
        text, self.text = self.text, ""
        return text


def split_rows(rows: Sequence[Row], context: int) -> list[list[Row]]:
    """Split a batch into parts, usually one, whose rows may run together; short prompts first."""
    parts: list[list[Row]] = []
    for row in rows:
        part = next((part for part in parts if may_run_together([*part, row], context)), None)
        if part is None:
            parts.append([row])
        else:
            part.append(row)
    return sorted(parts, key=lambda part: max(len(row.input_ids) for row in part))


def may_run_together(rows: Sequence[Row], context: int) -> bool:
    """Whether rows may share a run of the model, which pads all prompts to the longest.

    The longest prompt and reply must fit the context together, and all rows must fit MAX_TOKENS.
    Padding may be a fifth of the padded prompts, or ALWAYS_ALLOWED tokens if that is more.
    """
    prompts = [len(row.input_ids) for row in rows]
    padded = len(rows) * max(prompts)
    longest = max(prompts) + max(row.options.max_new_tokens for row in rows)
    fits = longest <= context and len(rows) * longest <= MAX_TOKENS
    return fits and padded - sum(prompts) <= max(ALWAYS_ALLOWED, padded // 5)
