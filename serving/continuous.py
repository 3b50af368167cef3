"""Continuous batching by transformers: a request joins the batch that runs, and leaves it alone."""

import logging

from transformers import PreTrainedModel
from transformers.generation.continuous_batching.requests import GenerationOutput

from serving.metrics import BotMetrics, Population
from serving.model_thread import watch_layers
from serving.paging import start_manager, tokens_that_fit
from serving.sampling import Sampler
from serving.streaming import ReplyStreamer, pace
from serving.watchdog import Watchdog

logger = logging.getLogger("ray.serve")


class BatchFailed(Exception):
    """The manager has ended with an error. The replica must be replaced."""


class ContinuousBatch:
    """The requests that the manager of transformers, with a thread of its own, runs together.

    Every streamer that is added ends: with its reply, with BatchFailed, or with ModelStalled when
    the model made no progress for `stall_timeout_s` seconds. The thread ends with the process. All
    methods are called on the event loop.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        context: int,
        max_batch_size: int,
        cache_tokens: int | None,
        stall_timeout_s: float,
        metrics: BotMetrics,
    ) -> None:
        self.waiting = Population(metrics.waiting)  # for their first token
        self.running = Population(metrics.batch_rows)
        self.streamers: dict[ReplyStreamer, str] = {}  # and the ids of their requests
        self.added = 0
        self.error: Exception | None = None
        self.watchdog = Watchdog(stall_timeout_s, self._has_work, self._give_up)
        self.manager = start_manager(model, context, max_batch_size, cache_tokens)
        watch_layers(model, self.watchdog.note_progress)
        self.cache_tokens = tokens_that_fit(self.manager)
        self.context = min(context, self.cache_tokens)

    def add(
        self,
        streamer: ReplyStreamer,
        input_ids: list[int],
        max_new_tokens: int,
        sampler: Sampler | None,
    ) -> None:
        """Have a reply written to the streamer. Raises BatchFailed and ModelStalled.

        The prompt and its reply, of up to `max_new_tokens`, must fit `context`.
        """
        self.check()
        self.added += 1
        request = str(self.added)
        self.watchdog.expect_progress()
        self.streamers[streamer] = request
        self.waiting.add(streamer)
        self.manager.register_result_handler(request, lambda output: self._take(streamer, output))
        # Its queue has no limit, so this does not block; how many come in, Serve limits.
        added = self.manager.add_request(
            input_ids, request, max_new_tokens, streaming=True, sampler=sampler
        )
        if added is None:  # it has just begun to end
            self._give_up(BatchFailed("the model's thread is dead"))

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
        if streamer not in self.waiting.members and streamer not in self.running.members:
            return
        self.waiting.discard(streamer)
        self.running.add(streamer)
        streamer.text.pace = pace(len(self.running.members))
        if output.error is not None:
            self._give_up(BatchFailed(output.error))
            return
        try:
            for token in output.generated_tokens[len(streamer.token_times) :]:
                streamer.add(token)
            if not (output.is_finished() or streamer.decoder.stopped):
                return
            streamer.end()
        except Exception as error:  # concerns this reply alone
            streamer.fail(error)
        # Its place is free, though its client may take long to read it.
        self.running.discard(streamer)
        self.manager.cancel_request(self.streamers[streamer])

    def _has_work(self) -> bool:
        """Whether there are replies that the model has not written to their ends."""
        return bool(self.waiting.members or self.running.members)

    def _give_up(self, error: Exception) -> None:
        """Fail all streamers, with one exception, so that it is logged once."""
        if self.error is None:
            self.error = error
            logger.error(f"{error}; Serve will replace this replica")
            for streamer in self.streamers:
                streamer.fail(error)
