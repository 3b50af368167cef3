"""What is known of one reply while the model writes it."""

from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

from streaming_bots.generation.sampling import ReplyOptions
from streaming_bots.generation.text_decoder import TextDecoder


class ReplyState:
    """One reply: the length of its prompt, its tokens so far, and why it ended."""

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        input_ids: Sequence[int],
        options: ReplyOptions,
        end_tokens: Sequence[int],
    ) -> None:
        self.decoder = TextDecoder(tokenizer, options.stop)
        self.prompt_tokens = len(input_ids)
        self.end_tokens = end_tokens  # of the model, any of which ends a reply
        self.asked = options.asked  # by time.monotonic
        self.token_times: list[float] = []  # when the model wrote each token, by time.monotonic
        self.cancelled = False  # the reader has left or stopped it

    @property
    def reply_tokens(self) -> int:
        return len(self.token_times)

    @property
    def finish_reason(self) -> str:
        """Why it is over: "cancelled", "stop" (an end token or a stop string), or "length"."""
        if self.cancelled:
            return "cancelled"
        last = self.decoder.ids[-1:]
        return "stop" if self.decoder.stopped or (last and last[0] in self.end_tokens) else "length"
