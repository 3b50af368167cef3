"""The options of a reply, and how its tokens are drawn.

`generate` draws from torch's global generator, so each request changes the draws of the next. Here,
each request has its own generator, so the same `seed` draws the same reply again.
"""

import time
from collections.abc import Sequence
from typing import Annotated, ClassVar

import torch
from pydantic import (
    BaseModel,
    BeforeValidator,
    Field,
    PrivateAttr,
    ValidationInfo,
    field_validator,
)
from transformers import LogitsProcessor, TopKLogitsWarper, TopPLogitsWarper


class Sampler:
    """Draws the tokens of one reply.

    First, `temperature`, which is over 0, divides the logits. Then the `top_k` most likely tokens
    stay (0: all), and finally only the fewest of these whose probabilities add up to `top_p`.
    """

    def __init__(
        self,
        temperature: float,
        top_k: int,
        top_p: float,
        seed: int | None,
        device: torch.device | None,
    ) -> None:
        self.temperature = temperature
        self.filters: list[LogitsProcessor] = []
        if top_k:
            self.filters.append(TopKLogitsWarper(top_k))
        if top_p < 1:
            self.filters.append(TopPLogitsWarper(top_p))
        self.generator = torch.Generator(device or "cpu")
        if seed is None:
            self.generator.seed()
        else:
            self.generator.manual_seed(seed)

    def __call__(self, logits: torch.Tensor) -> torch.Tensor:
        """Map logits to scores whose maximum is at the drawn token; both are (vocabulary size,).

        The maximum of logits with Gumbel noise is a draw from their distribution
        (https://arxiv.org/abs/1411.0030), and greedy decoding takes the maximum.
        """
        # Without the subtraction, a small temperature would make many logits infinite.
        scores = (logits.float() - logits.max()).unsqueeze(0) / self.temperature
        for keep in self.filters:
            scores = keep(None, scores)
        exponential = torch.empty_like(scores).exponential_(generator=self.generator)
        return (scores - exponential.log()).squeeze(0)


class SamplingLogitsProcessor(LogitsProcessor):
    """Gives each row of a batch its own sampler; None takes the most likely token."""

    def __init__(self, samplers: Sequence[Sampler | None]) -> None:
        self.samplers = samplers

    def __call__(self, input_ids: torch.Tensor | None, scores: torch.Tensor) -> torch.Tensor:
        """Change scores, of shape (rows, vocabulary size), in rows that have a sampler."""
        for row, sampler in enumerate(self.samplers):
            if sampler is not None:
                scores[row] = sampler(scores[row])
        return scores


MIN_TEMPERATURE = 1e-6  # below it, float32 would divide by zero, and the draw is certain anyway
StopString = Annotated[str, Field(min_length=1, max_length=100)]


def refuse_boolean(value: object) -> object:
    """Raise ValueError for a boolean, which Pydantic would take for 0 or 1."""
    if isinstance(value, bool):
        raise ValueError("a number is needed")
    return value


# After a field's bounds: Pydantic leaves bounds that follow a validator out of the JSON schema
NotBoolean = BeforeValidator(refuse_boolean)


class ReplyOptions(BaseModel, extra="forbid", use_attribute_docstrings=True):
    """The options of a reply, which is greedy unless one of them asks for sampling.

    Validate it with the context `{"limit": <the bot's max_new_tokens>}`.
    """

    whole: ClassVar[bool] = False  # if true, no message may be dropped to make a conversation fit

    max_new_tokens: Annotated[int, NotBoolean] = Field(json_schema_extra={"minimum": 1})
    """Maximum number of tokens in the reply; the default is the bot's own limit."""

    temperature: Annotated[float, Field(ge=0, le=2), NotBoolean] | None = Field(
        default=None,
        # A docstring of two lines would put a line break into the text for clients.
        description="Divides the logits: the higher, the more varied the reply. 0 takes the most "
        "likely token, as does a request without temperature, top_p, top_k and seed.",
    )

    top_p: Annotated[float, Field(gt=0, le=1), NotBoolean] | None = None
    """Draw from the fewest tokens whose probabilities add up to this."""

    top_k: Annotated[int, Field(ge=0), NotBoolean] | None = None
    """Draw from this many of the most likely tokens; 0 is all."""

    seed: Annotated[int, Field(ge=0, lt=2**63), NotBoolean] | None = None
    """The same seed draws the same reply again."""

    stop: list[StopString] = Field(default=[], max_length=4)
    """Strings before which the reply ends. In the query, repeat the parameter."""

    _asked: float = PrivateAttr(default_factory=time.monotonic)

    @property
    def asked(self) -> float:
        """When the request arrived, by time.monotonic."""
        return self._asked

    @field_validator("max_new_tokens")
    @classmethod
    def _check_max_new_tokens(cls, value: int, info: ValidationInfo) -> int:
        limit = (info.context or {})["limit"]
        if not 0 < value <= limit:
            raise ValueError(f"from 1 to {limit} tokens are possible")
        return value

    @field_validator("stop", mode="before")
    @classmethod
    def _take_one_string(cls, value: object) -> object:
        return [value] if isinstance(value, str) else value

    def sampler(self, device: torch.device | None) -> Sampler | None:
        """Return the sampler of this reply's tokens, or None if the reply is greedy."""
        temperature, asked = self.temperature, (self.top_p, self.top_k, self.seed)
        if temperature is None:
            temperature = 0.0 if asked == (None, None, None) else 1.0
        if temperature < MIN_TEMPERATURE or self.top_k == 1:  # which would draw between equals
            return None
        return Sampler(temperature, self.top_k or 0, self.top_p or 1.0, self.seed, device)
