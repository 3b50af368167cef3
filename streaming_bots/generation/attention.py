"""Attention in a continuous batch on a CPU: each request reads only its own keys and values."""

from collections import defaultdict
from functools import lru_cache
from itertools import pairwise
from typing import Any

import torch
from transformers.generation.continuous_batching import PagedAttentionCache
from transformers.generation.continuous_batching.cache_allocators.full_attention import (
    FullAttentionCacheAllocator,
)
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
        or attention_mask.shape[1] > 1  # it is not the batch's, which all heads share
        or options.get("position_bias") is not None
        or len(options["cu_seq_lens_q"]) == 2  # there is one request
    ):
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, cache=cache, **options
        )
    allocator = cache.layer_to_allocator[module.layer_idx]
    ends = options["cu_seq_lens_k"][allocator.layer_type]
    order, groups = group_requests(options["cu_seq_lens_q"], ends, attention_mask)
    cached = options["read_index"][allocator.index]
    if len(cached) and type(allocator) is FullAttentionCacheAllocator:  # reads what it has written
        options["read_index"] = {allocator.index: cached[order]}
        key, value = cache.update(key, value, module.layer_idx, options)
    else:
        key, value = cache.update(key, value, module.layer_idx, options)
        key, value = key.index_select(2, order), value.index_select(2, order)
    # Shapes: query (1, heads, new tokens, head size), key and value (1, heads, tokens in `order`,
    # head size), outputs (1, new tokens, heads, head size); of a group, as in a batch with padding
    outputs = value.new_empty(1, query.shape[2], query.shape[1], value.shape[3])
    begin = 0
    for new, mask in groups:
        padded = len(mask), mask.shape[-1]
        own = slice(begin, begin := begin + padded[0] * padded[1])
        outputs[0, new], _ = sdpa_attention_forward(
            module,
            query[0, :, new].transpose(0, 1),
            key[0, :, own].unflatten(1, padded).transpose(0, 1),
            value[0, :, own].unflatten(1, padded).transpose(0, 1),
            mask,
            **options,
        )
    return outputs, None


@lru_cache(maxsize=4)  # for all layers of a step; a tensor is equal only to itself
def group_requests(
    cu_seq_lens_q: torch.Tensor, cu_seq_lens_k: torch.Tensor, attention_mask: torch.Tensor
) -> tuple[torch.Tensor, list[tuple[torch.Tensor, torch.Tensor]]]:
    """Group requests that a call can compute as a batch, in which padding is less than half.

    Takes the ends of the requests' new tokens and of all their tokens, (requests + 1,), and the
    mask, (1, 1, new tokens, all tokens). Returns the indices of all tokens, padded and group by
    group, and for each group the indices of the new tokens, (requests, new tokens of each), and a
    mask, (requests, 1, new tokens of each, all tokens of each). Padding repeats the first token.
    """
    alike = defaultdict(list)
    new_tokens, all_tokens = pairwise(cu_seq_lens_q.tolist()), pairwise(cu_seq_lens_k.tolist())
    for (new, new_end), (first, end) in zip(new_tokens, all_tokens, strict=True):
        alike[new_end - new, (end - first).bit_length()].append((new, first, end))
    order, groups = [], []
    for (count, _), requests in alike.items():
        new, first, end = torch.tensor(requests)[..., None].unbind(1)
        new = new + torch.arange(count)
        own = first + torch.arange((end - first).max().item())
        padding = own >= end
        own = torch.where(padding, first, own)
        mask = attention_mask[0, 0][new[:, :, None], own[:, None]]
        mask.masked_fill_(padding[:, None], torch.finfo(mask.dtype).min)
        order.append(own.flatten())
        groups.append((new, mask[:, None]))
    return torch.cat(order), groups
