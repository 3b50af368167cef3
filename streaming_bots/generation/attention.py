"""Attention in a continuous batch on a CPU: each request reads only its own keys and values."""

from itertools import pairwise
from typing import Any

import torch
from transformers.generation.continuous_batching import PagedAttentionCache
from transformers.integrations.sdpa_attention import sdpa_attention_forward


def attend_by_request(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    cache: PagedAttentionCache | None = None,
    **options: Any,
) -> tuple[torch.Tensor, None]:
    """Return what `sdpa_attention_forward` of transformers returns for these arguments.

    A step of a continuous batch computes the new tokens of all requests in one row. transformers
    multiplies each of them by the keys of all requests, and masks those of the others. On a CPU,
    that can take longer than the rest of the step.
    """
    if (
        cache is None
        or attention_mask is None
        or options.get("position_bias") is not None
        or len(options["cu_seq_lens_q"]) == 2  # there is one request
    ):
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, cache=cache, **options
        )
    # Shapes: query (1, heads, new tokens, head size), key and value (1, heads, all tokens, head
    # size), attention_mask (1, 1, new tokens, all tokens). `update` sets options["cu_seq_lens_k"].
    key, value = cache.update(key, value, module.layer_idx, options)
    new_tokens, all_tokens = (
        [slice(*ends) for ends in pairwise(options[name].tolist())]
        for name in ("cu_seq_lens_q", "cu_seq_lens_k")
    )
    outputs = [
        sdpa_attention_forward(
            module,
            query[:, :, new],
            key[:, :, own],
            value[:, :, own],
            attention_mask[:, :, new, own],
            **options,
        )[0]
        for new, own in zip(new_tokens, all_tokens, strict=True)
    ]
    return torch.cat(outputs, dim=1), None
