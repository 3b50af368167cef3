"""How the next token is chosen for a request that does not want the most likely one.

`generate` samples with torch's global generator, so what one request draws changes what the next
one gets. Here every request has a generator of its own, and with a `seed` the same reply again.
"""

from collections.abc import Sequence

import torch
from transformers import LogitsProcessor, TopKLogitsWarper, TopPLogitsWarper


class Sampler:
    """Draws the tokens of one reply.

    `temperature`, over 0, divides the logits; then the `top_k` most likely tokens stay (0: all),
    and of those the fewest whose probabilities add up to `top_p`.
    """

    def __init__(
        self, temperature: float, top_k: int, top_p: float, seed: int | None, device: torch.device
    ) -> None:
        self.temperature = temperature
        self.filters: list[LogitsProcessor] = []
        if top_k:
            self.filters.append(TopKLogitsWarper(top_k))
        if top_p < 1:
            self.filters.append(TopPLogitsWarper(top_p))
        self.generator = torch.Generator(device)
        if seed is None:
            self.generator.seed()
        else:
            self.generator.manual_seed(seed)

    def __call__(self, logits: torch.Tensor) -> torch.Tensor:
        """Scores whose largest is at the token drawn; both of shape (vocabulary size,).

        The largest of logits with Gumbel noise is a draw from their distribution (Maddison,
        Tarlow and Minka, 2014, https://arxiv.org/abs/1411.0030), so that whoever takes the most
        likely token, as greedy decoding does, takes this one.
        """
        # The largest is 0 first, or a small temperature would make many of them infinite.
        scores = (logits.float() - logits.max()).unsqueeze(0) / self.temperature
        for keep in self.filters:
            scores = keep(None, scores)
        exponential = torch.empty_like(scores).exponential_(generator=self.generator)
        return (scores - exponential.log()).squeeze(0)


class SampleRows(LogitsProcessor):
    """Lets each row of a batch have its own sampler; None takes the most likely token."""

    def __init__(self, samplers: Sequence[Sampler | None]) -> None:
        self.samplers = samplers

    def __call__(self, input_ids: torch.Tensor | None, scores: torch.Tensor) -> torch.Tensor:
        """Scores of shape (rows, vocabulary size), changed where a row has a sampler."""
        for row, sampler in enumerate(self.samplers):
            if sampler is not None:
                scores[row] = sampler(scores[row])
        return scores
