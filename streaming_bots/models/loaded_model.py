"""Loads a language model by its name: from the hub, a folder, GGUF weights, or the bundled one."""

import logging
from typing import NamedTuple

import torch
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_MASKED_LM_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from streaming_bots.models.bfloat16 import pack
from streaming_bots.models.int8 import SAMPLE, to_int8
from streaming_bots.models.loading_progress import report_progress
from streaming_bots.models.source import ModelError, Source, resolve
from streaming_bots.operations.machine import in_a_thread

logger = logging.getLogger("ray.serve")


class LoadedModel(NamedTuple):
    name: str  # the name that clients see, in the header X-Model
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    context: int  # tokens that a prompt and its reply may have together


def load_model(
    name: str, dtype: str = "float32", fallback: str | None = None, device: str = "cpu"
) -> LoadedModel:
    """Load a causal language model and its tokenizer.

    `name` is a hub id, a folder, `<folder or hub id>:<file>.gguf`, or "tiny-dialog", the bundled
    model. If it is not available, this logs a warning and loads `fallback`. Raises ModelError if
    there is none. `device` is "cpu", or "cuda" for the first GPU that this process sees: in a
    replica, the one that Ray has reserved. Replies are greedy, whatever the model's config says.
    """
    return in_a_thread(_load_model, name, dtype, fallback, device)


def _load_model(name: str, dtype: str, fallback: str | None, device: str) -> LoadedModel:
    if device == "cuda" and not torch.cuda.is_available():
        raise ModelError(
            f"model {name!r}: a GPU is reserved for it, but torch {torch.__version__} sees none; "
            "install its CUDA build and NVIDIA's driver, or say num_gpus=0"
        )
    if device == "cuda":
        # On Hopper and Blackwell, torch prefers cuDNN's attention for 2-byte numbers. cuDNN plans
        # for each length that a thread has not seen, and a reply has a new one at each token.
        torch.backends.cuda.enable_cudnn_sdp(False)
    try:
        source = resolve(name)
        with report_progress(source):
            config, tokenizer = read(source)
            context = context_length(config, tokenizer)
            try:
                model = AutoModelForCausalLM.from_pretrained(
                    source.place,
                    config=config,
                    dtype="bfloat16" if dtype == "int8" else dtype,
                    **source.options,
                )
            except Exception as error:
                raise source.problem("the weights cannot be loaded", error) from error
            if dtype == "int8":
                try:
                    to_int8(model, tokenizer(SAMPLE)["input_ids"][:context])
                except Exception as error:
                    raise source.problem("it cannot compute with int8 weights", error) from error
    except ModelError as error:
        if fallback is None:
            raise
        logger.warning(f"{error}, and start again. Until then, {fallback} answers in its place.")
        return _load_model(fallback, dtype, None, device)
    model.to(device)
    model.generation_config = greedy_config(model, tokenizer)
    if device == "cpu":
        pack(model)
    return LoadedModel(source.served_name, model, tokenizer, context)


def check_model(name: str) -> tuple[str, PreTrainedTokenizerBase, int]:
    """Return a model's name, tokenizer and context length, without loading its weights.

    A folder in the name is absolute. Raises ModelError if the model is unavailable or unsuitable.
    """
    source = resolve(name)
    config, tokenizer = read(source)
    return source.name, tokenizer, context_length(config, tokenizer)


def read(source: Source) -> tuple[PreTrainedConfig, PreTrainedTokenizerBase]:
    """Read a model's configuration and tokenizer. Raises ModelError."""
    try:
        config = AutoConfig.from_pretrained(source.place, **source.options)
    except Exception as error:
        raise source.problem("the configuration cannot be read", error) from error
    # Encoders such as BERT also attend to later tokens, unless configured as decoders. Of a model
    # such as BART, only the decoder would be loaded.
    is_encoder = getattr(config, "is_encoder_decoder", False) or (
        type(config) in MODEL_FOR_MASKED_LM_MAPPING and not getattr(config, "is_decoder", False)
    )
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING or is_encoder:
        raise source.problem(f"{config.model_type} is not a causal language model")
    try:
        tokenizer = AutoTokenizer.from_pretrained(source.place, **source.options)
    except Exception as error:
        raise source.problem("the tokenizer cannot be read", error) from error
    tokenizer.model_vocab_size = getattr(config.get_text_config(), "vocab_size", None)
    return config, tokenizer


def context_length(config: PreTrainedConfig, tokenizer: PreTrainedTokenizerBase) -> int:
    """Return how many tokens fit the model: a huge number if its architecture has no limit."""
    text_config = config.get_text_config()
    for name in ("max_position_embeddings", "max_seq_len", "seq_length"):
        length = getattr(text_config, name, None)
        if isinstance(length, int) and length > 0:  # XLNet has -1
            return length
    return int(tokenizer.model_max_length)


def greedy_config(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> GenerationConfig:
    """Return a greedy config that keeps only the end tokens of the model's own.

    The model's sampling, beams, penalties and length limits do not apply: requests decide.
    """
    # The chat template may end a turn with a token that the model's configuration does not name.
    own = model.generation_config.eos_token_id
    named = [*(own if isinstance(own, list) else [own]), tokenizer.eos_token_id]
    ends = {token for token in named if token is not None and token >= 0}  # -1 means none, too
    # Any token will do for padding, since the attention mask hides it, but the model must know it.
    pads = [tokenizer.pad_token_id, *sorted(ends), 0]
    known = model.get_input_embeddings().num_embeddings
    return GenerationConfig(
        do_sample=False,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=sorted(ends) or None,
        pad_token_id=next(pad for pad in pads if pad is not None and 0 <= pad < known),
    )
