"""Engines and streamers without a bot, for tests that script the runs of the model."""

from collections.abc import Callable, Sequence
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from streaming_bots.generation.continuous_batch import ContinuousBatch
from streaming_bots.generation.engine import Streamer
from streaming_bots.generation.model_thread import ModelThread
from streaming_bots.generation.sampling import ReplyOptions
from streaming_bots.generation.streamer import ReplyStreamer

HANG_S = 60  # only bounds a hang


def reply_options(max_new_tokens: int = 256, stop: Sequence[str] = ()) -> ReplyOptions:
    return ReplyOptions.model_construct(max_new_tokens=max_new_tokens, stop=list(stop))


def new_streamer(
    tokenizer: PreTrainedTokenizerBase,
    stop: Sequence[str] = (),
    input_ids: Sequence[int] = (),
    max_new_tokens: int = 256,
) -> ReplyStreamer:
    return ReplyStreamer(tokenizer, input_ids, reply_options(max_new_tokens, stop), ())


class ScriptedThread(ModelThread):
    """A ModelThread that calls the function submitted with each streamer, not a model."""

    def __init__(self, limits: Any, metrics: Any) -> None:
        self.scripts: dict[Streamer, Callable[[Streamer], None]] = {}
        model = torch.nn.Module()
        model.device = torch.device("cpu")
        super().__init__(model, self.play, limits, metrics)

    def submit(self, streamer: Streamer, function: Callable[..., None], *arguments: Any) -> None:
        self.scripts[streamer] = partial(function, *arguments)
        super().submit(streamer)

    def play(self, streamer: Streamer) -> None:
        self.scripts.pop(streamer)(streamer)


def settings(stall_timeout_s: float, max_waiting: int | None = None, **others: Any) -> Any:
    return SimpleNamespace(
        stall_timeout_s=stall_timeout_s,
        max_waiting=max_waiting,
        **{"prefix_cache_mb": 512} | others,
    )


def limits_of(prompt_budget: int, max_new_tokens: int, **others: Any) -> Any:
    """Return the part of a bot that a protocol needs."""
    return SimpleNamespace(
        max_new_tokens=max_new_tokens,
        max_prompt_tokens=prompt_budget,
        prompt_budget=lambda max_new_tokens: prompt_budget,
        **others,
    )


def new_thread(
    stall_timeout_s: float = HANG_S, max_waiting: int | None = None, metrics: Any = None
) -> ScriptedThread:
    return ScriptedThread(settings(stall_timeout_s, max_waiting), metrics)


def new_batch(
    model: PreTrainedModel,
    context: int,
    rows: int,
    cache_tokens: int | None = None,
    stall_timeout_s: float = HANG_S,
    max_waiting: int | None = None,
    **others: Any,
) -> ContinuousBatch:
    others |= {"max_batch_size": rows, "cache_tokens": cache_tokens}
    sizes = settings(stall_timeout_s, max_waiting, **others)
    return ContinuousBatch(model, context, sizes)
