"""The KV cache of a continuous batch: the manager of transformers, sized for a replica."""

from copy import deepcopy
from threading import Thread
from typing import Any, ClassVar

import torch
from transformers import (
    AttentionInterface,
    ContinuousBatchingConfig,
    LogitsProcessorList,
    PreTrainedModel,
)
from transformers.generation.continuous_batching import ContinuousBatchingManager
from transformers.generation.continuous_batching.cb_logits_processors import (
    ContinuousBatchingLogitsProcessor,
    ContinuousBatchingLogitsProcessorList,
)
from transformers.generation.continuous_batching.requests import FutureRequestState
from transformers.generation.continuous_batching.scheduler import SCHEDULER_MAPPING
from transformers.generation.continuous_batching.utils import (
    find_head_dim,
    find_num_key_value_heads,
)

from streaming_bots.generation.attention import attend_by_request
from streaming_bots.generation.padding import (
    LENGTH,
    STEPS,
    Recorder,
    are_alike,
    logits_of_reply,
    prompt_of,
)
from streaming_bots.generation.sampling import Sampler, SamplingLogitsProcessor
from streaming_bots.generation.scheduler import RoomScheduler
from streaming_bots.models.int8 import precise
from streaming_bots.operations.machine import free_memory, in_a_thread

TOKENS_PER_ROW = 256  # of the KV cache, if all rows are taken
TOKENS_OF_ONE = 8192  # a single reply may have at least this many, or the whole context if less
PAGE_SIZE = 32  # tokens
GRAPH_TOKENS = 1024  # cached tokens that a step reads, rounded up: each multiple has a CUDA graph
PROMPT_TOKENS_PER_STEP = 256  # limits how long the prefill of a long prompt delays other replies


def start_manager(
    model: PreTrainedModel,
    context: int,
    rows: int,
    cache_tokens: int | None = None,
    shares_prefixes: bool = True,
) -> ContinuousBatchingManager:
    """Start a manager, whose thread runs the model for up to `rows` requests at once.

    The KV cache has room for `cache_tokens`, in half of the free memory at most. Its default is
    TOKENS_PER_ROW times `rows`, or the context, up to TOKENS_OF_ONE, if that is more. Raises
    MemoryError if the cache does not fit, and ValueError if transformers cannot batch the model.
    """
    # This must come first, since the manager changes the model's attention. The prompts are
    # shorter than a page, since the manager would keep longer ones to share. On a CPU, the longest
    # two attend in one call, in which the shorter one is padded.
    longest = min(PAGE_SIZE - 2 * STEPS, context - STEPS)
    lengths = {LENGTH, max(LENGTH, longest - LENGTH), longest}
    alone = {length: in_a_thread(logits_of_reply, model, length) for length in lengths}
    SCHEDULER_MAPPING[RoomScheduler.name] = RoomScheduler
    on_gpu = model.device.type == "cuda"
    if model.device.type == "cpu":
        AttentionInterface.register("sdpa", attend_by_request)  # elsewhere, it does what it did
    config = ContinuousBatchingConfig(
        scheduler_type=RoomScheduler.name,
        page_size=PAGE_SIZE,
        max_batch_tokens=rows + PROMPT_TOKENS_PER_STEP,
        max_requests_per_batch=rows,
        allow_block_sharing=shares_prefixes,  # reads common beginnings, such as earlier turns, once
        # Launching a step's kernels one by one takes longer than computing them.
        use_cuda_graph=on_gpu,
        # Preparing a step during the one before fails in transformers if a request is cancelled
        # then, and loses a sampler's draw if a request has to leave the cache.
        use_async_batching=False,
        kv_padding_interval_size=GRAPH_TOKENS,
        # Flash attention needs a GPU and 2-byte numbers.
        auto_switch_to_flash=on_gpu and model.dtype.itemsize == 2,
    )
    # By default, the cache would take most of the memory. That slows each step on a CPU, and
    # leaves none for other replicas on a GPU.
    wanted = cache_tokens or max(rows * TOKENS_PER_ROW, min(context, TOKENS_OF_ONE))
    manager = None
    try:
        tokens = min(wanted, free_memory(model.device) // 2 // bytes_per_token(model, rows))
        config.num_blocks = max(1, tokens // PAGE_SIZE)
        # The manager changes the end token in its generation config if the model has none.
        manager = model.init_continuous_batching(deepcopy(model.generation_config), config)
        manager.logit_processor = ContinuousBatchingLogitsProcessorList(
            LogitsProcessorList([RequestsLogitsProcessor(manager)])
        )
        manager.logit_processor.tensors_required = 1
        # `load_model` turns cuDNN off, since it plans for each new length. Here, lengths are few.
        torch.backends.cuda.enable_cudnn_sdp(True)
        in_a_thread(try_out, manager, model, alone)
    except Exception as problem:
        if manager is not None:
            manager.stop()
        if isinstance(problem, MemoryError):
            raise
        reason = str(problem).partition("\n")[0]  # some show the whole configuration after it
        raise ValueError(
            f"transformers cannot batch {model.config.model_type} continuously: {reason}; "
            "the Textbot can use it"
        ) from problem
    return manager


def try_out(
    manager: ContinuousBatchingManager, model: PreTrainedModel, alone: dict[int, torch.Tensor]
) -> None:
    """Start the manager. Raise ValueError if replies together fail, or differ from those alone.

    `alone` maps each prompt's length to the logits, (steps, vocabulary size), of its reply alone.
    """
    manager.warmup()  # allocates the cache
    # The manager's thread inherits `daemon` from its starter, so the process need not wait for it.
    starter = Thread(target=manager.start, daemon=True)
    starter.start()
    starter.join()
    recorders = {length: Recorder(model) for length in alone}
    with precise(model):
        for length, recorder in recorders.items():
            prompt = prompt_of(model, length)[0].tolist()
            manager.add_request(prompt, max_new_tokens=STEPS, sampler=recorder)
        for _ in recorders:
            while (output := manager.get_result(timeout=1)) is None:
                if not manager.is_running():
                    raise ValueError("the model's thread has ended")
            if output.error:
                raise ValueError(output.error)
    for length, logits in alone.items():
        if not are_alike(recorders[length].logits, logits, model):
            raise ValueError("replies would depend on the rest of the batch")


def bytes_per_token(model: PreTrainedModel, rows: int) -> int:
    """Return the bytes that one token of the KV cache takes: its keys and values, and its mask."""
    config = model.config.get_text_config()
    width = find_num_key_value_heads(config) * find_head_dim(config)
    numbers = 2 * config.num_hidden_layers * width + rows + PROMPT_TOKENS_PER_STEP
    return numbers * model.dtype.itemsize


class RequestsLogitsProcessor(ContinuousBatchingLogitsProcessor):
    """Lets each request have its own `sampler`; None takes the most likely token.

    The manager's own processors sort the whole vocabulary for every row, even a greedy one, and
    draw with torch's global generator.
    """

    supported_kwargs: ClassVar[dict[str, Any]] = {"sampler": (Sampler, type(None))}
    ignored_kwargs = ()

    def __init__(self, manager: ContinuousBatchingManager) -> None:
        self.manager = manager

    def fill_defaults(self, int32_tensor: torch.Tensor) -> None:
        int32_tensor.zero_()

    def prepare_tensor_args(
        self, requests_with_new_token: list[FutureRequestState]
    ) -> torch.Tensor:
        """Called before each step, with the requests in the order of their logits."""
        samplers = [
            request.state.logit_processor_kwargs.get("sampler")  # a warm-up's requests have none
            for request in requests_with_new_token
        ]
        self.rows = SamplingLogitsProcessor(samplers)
        # A graph would replay the samplers' old draws, or none.
        graphs = self.manager.continuous_batching_config.cuda_graph_booleans
        runner = self.manager.batch_processor.model_runner
        runner.use_cuda_graph_varlen, runner.use_cuda_graph_decode = (
            (False, False) if any(samplers) else graphs
        )
        return torch.zeros(len(samplers), dtype=torch.int32)

    def __call__(self, scores: torch.Tensor, tensor_arg: torch.Tensor) -> torch.Tensor:
        """Return the scores, of shape (requests, vocabulary size), after sampling."""
        return self.rows(None, scores)
