"""The engine that writes many replies together. Replies join and leave the running batch."""

from transformers import PreTrainedModel
from transformers.generation.continuous_batching.model_runner import (
    infer_max_single_request_tokens,
)
from transformers.generation.continuous_batching.requests import GenerationOutput

from streaming_bots.errors import BatchFailed
from streaming_bots.generation.engine import Engine, Streamer, watch_layers
from streaming_bots.generation.kv_cache import PAGE_SIZE, start_manager
from streaming_bots.generation.padding import batch_context
from streaming_bots.generation.streamer import ReplyStreamer, min_interval
from streaming_bots.operations.metrics import BotMetrics
from streaming_bots.settings import ContinuousBatchSettings


class ContinuousBatch(Engine):
    """Adds requests to the ContinuousBatchingManager of transformers, whose thread runs the model.

    If the thread fails, all replies end with BatchFailed.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        context: int,
        settings: ContinuousBatchSettings,
        metrics: BotMetrics | None = None,
    ) -> None:
        rows = settings.max_batch_size or 1
        super().__init__(rows, settings, metrics)
        self.model = model
        self.requests: dict[Streamer, str] = {}  # ids at the manager
        self.added = 0
        context = batch_context(model, context)
        shares = settings.prefix_cache_mb > 0
        self.manager = start_manager(model, context, rows, settings.cache_tokens, shares)
        self.cached_tokens = self.manager.batch_processor.scheduler.cached_tokens
        watch_layers(model, self.note_progress)
        cache = self.manager.batch_processor.cache
        # One request cannot fill a cache in which full and sliding attention take whole sectors.
        # With a short window, it could have more tokens than the setting `cache_tokens` allows.
        fitting = infer_max_single_request_tokens(cache)
        self.cache_tokens = min(fitting, cache.num_blocks * PAGE_SIZE)
        self.context = min(context, self.cache_tokens)  # tokens of a prompt and its reply
        in_cache = self.cache_tokens < context
        self.context_reason = f"; the cache has {self.cache_tokens}" if in_cache else ""

    def check(self) -> None:
        if self.error is None and not self.manager.is_running():
            self.give_up(BatchFailed("the model's thread is dead"))
        super().check()

    def has_work(self) -> bool:
        """Also true while the manager has requests whose clients have left."""
        batch = self.manager.batch_processor  # None once the manager has stopped
        return super().has_work() or (batch is not None and batch.has_pending_requests())

    def cancel(self, streamer: Streamer) -> None:
        streamer.cancel()
        self._remove(streamer)

    def _start(self, streamer: Streamer) -> None:
        assert isinstance(streamer, ReplyStreamer)
        self.added += 1
        request = self.requests[streamer] = f"{self.added:015}"  # RoomScheduler sorts by it
        self.manager.register_result_handler(request, lambda output: self._take(streamer, output))
        # This never blocks: the manager's queue is unlimited. Serve or `submit` limits requests.
        added = self.manager.add_request(
            streamer.input_ids,
            request,
            streamer.options.max_new_tokens,
            streaming=True,
            sampler=streamer.options.sampler(self.model.device),
        )
        if added is None:  # the manager is stopping
            self.give_up(BatchFailed("the model's thread is dead"))

    def _take(self, streamer: ReplyStreamer, output: GenerationOutput) -> None:
        """Called on the event loop for every token, with all tokens of the reply so far."""
        self.note_progress()  # a CUDA graph computes without calling the layers' hooks
        if streamer not in self.requests:
            return  # it was cancelled
        if output.error is not None:
            self.give_up(BatchFailed(output.error))
            return
        if streamer not in self.running:
            streamer.cached_tokens = self.cached_tokens.get(output.request_id, 0)
            self.running.add(streamer)
            self._changed()
        streamer.text.min_interval = min_interval(len(self.running))
        try:
            for token in output.generated_tokens[streamer.reply_tokens :]:
                streamer.add(token)
            if not (output.is_finished() or streamer.decoder.stopped):
                return
            streamer.end()
        except Exception as error:  # affects only this reply
            streamer.fail(error)
        self._remove(streamer)  # frees its place, even if its client reads slowly

    def _remove(self, streamer: Streamer) -> None:
        request = self.requests.pop(streamer, None)
        if request is None:
            return
        self.cached_tokens.pop(request, None)
        self.manager.cancel_request(request)
        # The manager removes a handler only when its reply ends. It keeps output that has no
        # handler until somebody fetches it.
        router = self.manager.output_router
        router.result_handlers.pop(request, None)
        while not router.output_queue.empty():
            # A request cancelled as it was added may still run: its cancel can come before it.
            self.manager.cancel_request(router.output_queue.get_nowait().request_id)
        self.submitted.pop(streamer, None)
        self.running.discard(streamer)
        self._changed()
