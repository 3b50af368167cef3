"""Continuous batching by transformers: a request joins the batch that runs, and leaves it alone."""

import asyncio
import logging
import threading
import time
from typing import Any, ClassVar

import torch
from transformers import ContinuousBatchingConfig, LogitsProcessorList, PreTrainedModel
from transformers.generation.continuous_batching import ContinuousBatchingManager
from transformers.generation.continuous_batching.cb_logits_processors import (
    ContinuousBatchingLogitsProcessor,
    ContinuousBatchingLogitsProcessorList,
)
from transformers.generation.continuous_batching.requests import (
    FutureRequestState,
    GenerationOutput,
)

from serving.metrics import BotMetrics, Population
from serving.model_thread import ModelStalled
from serving.sampling import Sampler, SampleRows
from serving.streaming import ReplyStreamer

MAX_ROWS = 32  # replies at once
TOKENS_PER_ROW = 256  # of the cache, if all rows are taken; one reply alone may have the context
PAGE_SIZE = 32  # tokens
MAX_STEP_TOKENS = 256  # of prompts in one step: longer ones hold up the others no longer than that

logger = logging.getLogger("ray.serve")


class BatchFailed(Exception):
    """The manager has ended with an error. The replica must be replaced."""


class ContinuousBatch:
    """The requests that the manager of transformers, with a thread of its own, runs together.

    Every streamer that is added ends: with its reply, with BatchFailed, or with ModelStalled when
    no request made progress for `stall_timeout_s` seconds. The thread ends with the process. All
    methods are called on the event loop.
    """

    def __init__(
        self, model: PreTrainedModel, context: int, stall_timeout_s: float, metrics: BotMetrics
    ) -> None:
        self.stall_timeout_s = stall_timeout_s
        self.waiting = Population(metrics.waiting)  # for their first token
        self.running = Population(metrics.batch_rows)
        self.streamers: dict[ReplyStreamer, str] = {}  # and the ids of their requests
        self.added = 0
        self.progress = 0.0  # when there was last something new, by time.monotonic
        self.watched = False
        self.error: Exception | None = None
        self.manager = start_manager(model, context)

    def add(
        self,
        streamer: ReplyStreamer,
        input_ids: list[int],
        max_new_tokens: int,
        sampler: Sampler | None,
    ) -> None:
        """Have a reply written to the streamer. Raises BatchFailed and ModelStalled."""
        self.check()
        self.added += 1
        request = str(self.added)
        if not self.streamers:
            self.progress = time.monotonic()
        self.streamers[streamer] = request
        self.waiting.add(streamer)
        self.manager.register_result_handler(request, lambda output: self._take(streamer, output))
        # Its queue has no limit, so this does not block; how many come in, Serve limits.
        self.manager.add_request(
            input_ids, request, max_new_tokens, streaming=True, sampler=sampler
        )
        if not self.watched:
            self._watch_in(self.stall_timeout_s)

    def remove(self, streamer: ReplyStreamer) -> None:
        """Take a request out of the batch, if it is still there."""
        request = self.streamers.pop(streamer)
        self.waiting.discard(streamer)
        self.running.discard(streamer)
        self.manager.cancel_request(request)
        # The manager forgets its handlers at the end of a reply only, and keeps for somebody to
        # fetch what has none any more.
        router = self.manager.output_router
        router.result_handlers.pop(request, None)
        while not router.output_queue.empty():
            router.output_queue.get_nowait()

    def check(self) -> None:
        """Raise what has ended the manager, if it has ended."""
        if self.error is None and not self.manager.is_running():
            self._give_up(BatchFailed("the model's thread is dead"))
        if self.error is not None:
            raise type(self.error)(*self.error.args)

    def _take(self, streamer: ReplyStreamer, output: GenerationOutput) -> None:
        """Called with all tokens of a reply so far, whenever there is one more."""
        if streamer not in self.streamers or streamer.finished:
            return
        self.progress = time.monotonic()
        self.waiting.discard(streamer)
        self.running.add(streamer)
        if output.error is not None:
            self._give_up(BatchFailed(output.error))
            return
        try:
            for token in output.generated_tokens[len(streamer.token_times) :]:
                streamer.add(token)
            if output.is_finished() or streamer.decoder.stopped:
                streamer.end()
        except Exception as error:  # concerns this reply alone
            streamer.fail(error)

    def _watch_in(self, seconds: float) -> None:
        self.watched = True
        asyncio.get_running_loop().call_later(seconds, self._watch)

    def _watch(self) -> None:
        self.watched = False
        if not self.streamers:
            return  # until the next one is added
        left = self.progress + self.stall_timeout_s - time.monotonic()
        if left > 0:
            self._watch_in(left)
        else:
            self._give_up(ModelStalled(f"no token came for {self.stall_timeout_s} s"))

    def _give_up(self, error: Exception) -> None:
        """Fail all streamers, with one exception, so that it is logged once."""
        if self.error is None:
            self.error = error
            logger.error(f"{error}; Serve will replace this replica")
            for streamer in self.streamers:
                streamer.fail(error)


def start_manager(model: PreTrainedModel, context: int) -> ContinuousBatchingManager:
    """Start the thread that runs the model for all requests that are added."""
    config = ContinuousBatchingConfig(
        page_size=PAGE_SIZE,
        max_batch_tokens=MAX_STEP_TOKENS,
        max_requests_per_batch=MAX_ROWS,
        allow_block_sharing=False,  # between prompts that begin alike: short ones gain nothing
    )
    if model.device.type == "cpu":
        # By default it would take most of the memory, and each step would cost accordingly.
        config.num_blocks = -(-max(context, MAX_ROWS * TOKENS_PER_ROW) // PAGE_SIZE)
    manager = model.init_continuous_batching(continuous_batching_config=config)
    manager.logit_processor = ContinuousBatchingLogitsProcessorList(
        LogitsProcessorList([SampleRequests()])
    )
    manager.logit_processor.tensors_required = 1
    # The thread inherits `daemon` from the one that starts it; the process must not wait for it.
    starter = threading.Thread(target=manager.start, daemon=True)
    starter.start()
    starter.join()
    return manager


class SampleRequests(ContinuousBatchingLogitsProcessor):
    """Lets each request have a `sampler`; None takes the most likely token.

    The processors that come with the manager sort the whole vocabulary for every row, also for
    those that want the most likely token, and draw with torch's global generator.
    """

    supported_kwargs: ClassVar[dict[str, Any]] = {"sampler": (Sampler, type(None))}
    ignored_kwargs = ()

    def fill_defaults(self, int32_tensor: torch.Tensor) -> None:
        int32_tensor.zero_()

    def prepare_tensor_args(
        self, requests_with_new_token: list[FutureRequestState]
    ) -> torch.Tensor:
        """Called before each step, with the requests in the order of their logits."""
        samplers = [
            request.state.logit_processor_kwargs["sampler"] for request in requests_with_new_token
        ]
        self.rows = SampleRows(samplers)
        return torch.zeros(len(samplers), dtype=torch.int32)

    def __call__(self, scores: torch.Tensor, tensor_arg: torch.Tensor) -> torch.Tensor:
        """Scores of shape (requests, vocabulary size)."""
        return self.rows(None, scores)
