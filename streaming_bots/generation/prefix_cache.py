"""The KV caches of earlier replies, from which the next turn of a conversation continues."""

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import takewhile

import torch
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer

from streaming_bots.generation.engine import Streamer
from streaming_bots.generation.padding import LENGTH, batch_context, can_continue
from streaming_bots.generation.streamer import ReplyStreamer
from streaming_bots.operations.machine import in_a_thread

REWRITTEN = 8  # last tokens of a reply, which the next turn may tokenize differently


class PrefixCache:
    """Keeps the KV caches of the latest replies, up to `max_bytes`; the oldest are dropped first.

    After construction, only the model's thread may use it.
    """

    def __init__(self, model: PreTrainedModel, max_bytes: int) -> None:
        self.model = model
        self.max_bytes = max_bytes if max_bytes and in_a_thread(can_crop, model) else 0
        # Token ids, their keys and values, and the bytes of these
        self.kept: list[tuple[list[int], DynamicCache, int]] = []

    @contextmanager
    def used_by(self, streamer: Streamer) -> Iterator[None]:
        """Give a reply the cache of its prompt's known beginning, and keep the cache afterwards."""
        if not self.max_bytes:
            yield
            return
        assert isinstance(streamer, ReplyStreamer)
        cache, streamer.cached_tokens = self._take(streamer.input_ids)
        streamer.past_key_values = cache
        try:
            yield
        finally:  # the streamer lives on, such as in an idle chat, and would keep the cache
            streamer.past_key_values = None
        known = cache.get_seq_length()  # without the last token, which the model has not read
        if not known:  # the model has used another cache
            return
        ids = [*streamer.input_ids, *streamer.decoder.ids][:known]
        self.kept.append((ids, cache, byte_size(cache)))
        excess = sum(size for _, _, size in self.kept) - self.max_bytes
        while excess > 0:
            excess -= self.kept.pop(0)[2]

    def _take(self, input_ids: Sequence[int]) -> tuple[DynamicCache, int]:
        """Return a cache of the longest known beginning of a prompt, and its length in tokens.

        At least one token is left for the model to read.
        """
        common, index = max(
            ((common_length(ids, input_ids), index) for index, (ids, *_) in enumerate(self.kept)),
            default=(0, 0),
        )
        common = min(common, len(input_ids) - 1)
        new = DynamicCache(config=self.model.config)
        if common == 0:
            return new, 0
        ids, cache, _ = self.kept[index]
        if common >= len(ids) - REWRITTEN:  # the same conversation
            del self.kept[index]
            cache.crop(common - len(ids))
            return cache, common
        for number, layer in enumerate(cache.layers):  # shape (1, heads, tokens, head size)
            new.update(layer.keys[..., :common, :], layer.values[..., :common, :], number)
        return new, common


def common_length(some: Sequence[int], others: Sequence[int]) -> int:
    pairs = zip(some, others, strict=False)
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))


def byte_size(cache: DynamicCache) -> int:
    return sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)


def can_crop(model: PreTrainedModel) -> bool:
    """Whether replies can continue from a part of the model's cache.

    A sliding window has lost its beginning, and some models keep a state without positions. With
    "longrope", keys also depend on the length of their prompt.
    """
    prompt = torch.arange(2 * LENGTH, device=model.device)[None]
    return can_continue(model, prompt, crop) and batch_context(model, sys.maxsize) == sys.maxsize


def crop(cache: DynamicCache) -> None:
    if any(type(each) is not DynamicLayer or not each.is_initialized for each in cache.layers):
        raise ValueError("a layer does not keep all keys and values")
    cache.crop(-LENGTH)
