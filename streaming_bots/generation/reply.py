"""The state of one reply while the model writes it."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from transformers import PreTrainedTokenizerBase

from streaming_bots.generation.sampling import ReplyOptions
from streaming_bots.generation.text_decoder import TextDecoder


@dataclass(eq=False, repr=False)
class ReplyState:
    """One reply: its prompt, its tokens so far, and why it ended."""

    tokenizer: PreTrainedTokenizerBase
    input_ids: Sequence[int]  # the prompt's
    options: ReplyOptions
    end_tokens: Sequence[int]  # the model's; any of them ends a reply
    # When the model wrote each token, by time.monotonic
    token_times: list[float] = field(default_factory=list, init=False)
    cached_tokens: int = field(default=0, init=False)  # of the prompt, found in a cache
    cancelled: bool = field(default=False, init=False)  # the reader has left or stopped it

    def __post_init__(self) -> None:
        self.decoder = TextDecoder(self.tokenizer, self.options.stop)

    @property
    def reply_tokens(self) -> int:
        return len(self.token_times)

    @property
    def finish_reason(self) -> str:
        """Why it ended: "cancelled", "stop" (an end token or a stop string), or "length"."""
        if self.cancelled:
            return "cancelled"
        last = self.decoder.ids[-1:]
        return "stop" if self.decoder.stopped or (last and last[0] in self.end_tokens) else "length"
