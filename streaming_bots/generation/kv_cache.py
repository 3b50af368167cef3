"""The KV cache of a continuous batch: the manager of transformers, sized for a replica."""

import threading
from bisect import bisect_left
from collections import deque
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, ClassVar

import psutil
import torch
from transformers import ContinuousBatchingConfig, LogitsProcessorList, PreTrainedModel
from transformers.generation.continuous_batching import ContinuousBatchingManager
from transformers.generation.continuous_batching.cb_logits_processors import (
    ContinuousBatchingLogitsProcessor,
    ContinuousBatchingLogitsProcessorList,
)
from transformers.generation.continuous_batching.requests import FutureRequestState, RequestState
from transformers.generation.continuous_batching.scheduler import SCHEDULER_MAPPING, FIFOScheduler
from transformers.generation.continuous_batching.utils import (
    find_head_dim,
    find_num_key_value_heads,
)

from streaming_bots.generation.padding import (
    LENGTH,
    STEPS,
    Recorder,
    are_alike,
    in_a_thread,
    logits_of_reply,
    prompt_of,
)
from streaming_bots.generation.sampling import Sampler, SamplingLogitsProcessor

TOKENS_PER_ROW = 256  # of the cache, if all rows are taken
TOKENS_OF_ONE = 8192  # at least, if the context has as many: what one reply alone may have
PAGE_SIZE = 32  # tokens
CGROUP = Path("/sys/fs/cgroup")
PROMPT_TOKENS_PER_STEP = 256  # longer prompts hold up the other replies no longer than that


def start_manager(
    model: PreTrainedModel, context: int, rows: int, cache_tokens: int | None = None
) -> ContinuousBatchingManager:
    """Start the thread that runs the model for all requests that are added, so many at once.

    Their cache has room for `cache_tokens`, by default for TOKENS_PER_ROW times the rows, or for
    the context, up to TOKENS_OF_ONE, if that is more; half of the free memory at most. Raises
    MemoryError if the cache does not fit, ValueError or the model's own error if it cannot
    be batched so.
    """
    # Before the manager changes how the model computes attention. The prompts are shorter than a
    # page, or the manager would keep them to share.
    lengths = {LENGTH, min(PAGE_SIZE - 2 * STEPS, context - STEPS)}
    alone = {length: in_a_thread(logits_of_reply, model, length) for length in lengths}
    SCHEDULER_MAPPING[RoomScheduler.name] = RoomScheduler
    config = ContinuousBatchingConfig(
        scheduler_type=RoomScheduler.name,
        page_size=PAGE_SIZE,
        max_batch_tokens=rows + PROMPT_TOKENS_PER_STEP,
        max_requests_per_batch=rows,
        allow_block_sharing=True,  # prompts that begin alike, as with a system prompt, do so once
        # Samplers draw anew at each step, which a recorded graph would not, and know the rows of
        # one step, which is done before the next one is prepared.
        use_cuda_graph=False,
        use_async_batching=False,
        # Where flash attention is installed, it computes on a GPU only, and in no other numbers.
        auto_switch_to_flash=model.device.type == "cuda" and model.dtype.itemsize == 2,
    )
    # By default it would take most of the memory. On a CPU each step would cost accordingly, and on
    # a GPU there may be other replicas.
    wanted = cache_tokens or max(rows * TOKENS_PER_ROW, min(context, TOKENS_OF_ONE))
    tokens = min(wanted, free_memory(model) // 2 // bytes_per_token(model))
    config.num_blocks = max(1, tokens // PAGE_SIZE)
    manager = model.init_continuous_batching(continuous_batching_config=config)
    manager.logit_processor = ContinuousBatchingLogitsProcessorList(
        LogitsProcessorList([RequestsLogitsProcessor()])
    )
    manager.logit_processor.tensors_required = 1
    problems: list[Exception] = []

    def start() -> None:
        try:
            manager.warmup()  # allocates the cache
            manager.start()
            try_out(manager, model, alone)
        except Exception as problem:
            problems.append(problem)

    # Not in this thread: the manager's inherits `daemon` from the one that starts it, and the
    # process must not wait for it. And a thread that has computed keeps its OpenMP threads, with
    # which those of the manager's would have to share the cores.
    starter = threading.Thread(target=start, daemon=True)
    starter.start()
    starter.join()
    if problems:
        manager.stop()
        raise problems[0]
    return manager


def try_out(
    manager: ContinuousBatchingManager, model: PreTrainedModel, alone: dict[int, torch.Tensor]
) -> None:
    """Write replies together: some models cannot, and some write nonsense then.

    `alone` has the logits of each reply alone, by the length of its prompt.
    """
    recorders = {length: Recorder(model) for length in alone}
    for length, recorder in recorders.items():
        prompt = prompt_of(model, length)[0].tolist()
        manager.add_request(prompt, max_new_tokens=STEPS, sampler=recorder)
    problem = None
    for _ in recorders:
        while (output := manager.get_result(timeout=1)) is None and manager.is_running():
            pass
        problem = problem or (output.error if output else "the model's thread has ended")
    if not problem and not all(
        are_alike(recorders[length].logits, logits, model.dtype) for length, logits in alone.items()
    ):
        problem = "replies would depend on the rest of the batch"
    if problem:
        raise ValueError(
            f"transformers cannot batch {model.config.model_type} continuously: {problem}; "
            "the Textbot can use it"
        )


def tokens_that_fit(manager: ContinuousBatchingManager) -> int:
    """Tokens that one request may have in an empty cache.

    Less than all, if layers with full and with sliding attention take whole sectors of it each.
    """
    cache = manager.batch_processor.cache
    nothing = RequestState("", [])

    def is_too_much(tokens: int) -> bool:
        return not cache.can_store_request_tokens(nothing, tokens, dry_run=True)

    blocks = manager.continuous_batching_config.num_blocks
    return bisect_left(range(1, blocks * PAGE_SIZE + 1), True, key=is_too_much)


def free_memory(model: PreTrainedModel) -> int:
    """Bytes that are free where the model is: on the GPU, or for this container on this machine."""
    if model.device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(model.device)
        return free
    return min([psutil.virtual_memory().available, *container_memory()])


def container_memory() -> Iterator[int]:
    """Bytes that a container has left of its limit, by Linux' cgroups of both versions."""
    for folder, limit, used in (
        (CGROUP, "memory.max", "memory.current"),
        (CGROUP / "memory", "memory.limit_in_bytes", "memory.usage_in_bytes"),
    ):
        with suppress(OSError, ValueError):  # there are none, or the limit is "max"
            statistics = dict(map(str.split, (folder / "memory.stat").read_text().splitlines()))
            # What is used holds files that have been read, which give way.
            files = int(statistics.get("inactive_file", 0))
            limit_bytes, used_bytes = (int((folder / name).read_text()) for name in (limit, used))
            yield max(0, limit_bytes - used_bytes + files)


def bytes_per_token(model: PreTrainedModel) -> int:
    """What the keys and values of one token take in the cache."""
    config = model.config.get_text_config()
    width = find_num_key_value_heads(config) * find_head_dim(config)
    return 2 * config.num_hidden_layers * width * model.dtype.itemsize


class RoomScheduler(FIFOScheduler):
    """Takes requests in again also when others have left, and none before its turn.

    When the cache is full, the manager takes requests out of the batch, and nobody in until a reply
    has come to its end. If all that run are cancelled first, that never happens. And it passes over
    a request that does not fit, and puts one that made room at the end of the line: a long prompt
    would wait as long as short ones come.
    """

    name = "room"

    def add_waiting_request(self, state: RequestState) -> None:
        super().add_waiting_request(state)
        waiting: deque[str] = self.waiting_requests_order  # type: ignore[has-type]
        self.waiting_requests_order = deque(sorted(waiting))  # by arrival

    def _get_waiting_candidates(self) -> list[RequestState]:
        candidates: list[RequestState] = super()._get_waiting_candidates()
        if not candidates or self._fits(candidates[0]):
            return candidates
        self.cache.evict_cached_blocks()  # of replies that have ended
        self.cache.pool.try_to_free_sectors()
        # Those behind it wait, too. Alone, it gets what there is.
        return [] if self.active_requests and not self._fits(candidates[0]) else candidates

    def _fits(self, state: RequestState) -> bool:
        """Whether the cache has room for a whole prompt now."""
        tokens = len(state.remaining_prefill_tokens)
        fits: bool = self.cache.can_store_request_tokens(state, tokens, dry_run=True)
        return fits

    def clear_cancelled_requests(self) -> list[RequestState]:
        active = len(self.active_requests)
        cancelled: list[RequestState] = super().clear_cancelled_requests()
        if len(self.active_requests) < active:
            self.block_new_requests = False
        return cancelled


class RequestsLogitsProcessor(ContinuousBatchingLogitsProcessor):
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
        self.rows = SamplingLogitsProcessor(samplers)
        return torch.zeros(len(samplers), dtype=torch.int32)

    def __call__(self, scores: torch.Tensor, tensor_arg: torch.Tensor) -> torch.Tensor:
        """Scores of shape (requests, vocabulary size)."""
        return self.rows(None, scores)
