"""A language model by name: from the hub, a folder, GGUF weights, or the bundled one."""

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

from streaming_bots.models.loading_progress import report_progress
from streaming_bots.models.source import ModelError, Source, resolve

logger = logging.getLogger("ray.serve")


class LoadedModel(NamedTuple):
    name: str  # what answers, for the header X-Model
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    context: int  # tokens that a prompt and its reply may have together


def load_model(
    name: str, dtype: str = "float32", fallback: str | None = None, device: str = "cpu"
) -> LoadedModel:
    """Load a causal language model and its tokenizer.

    `name` is a hub id, a folder, `<folder or hub id>:<file>.gguf`, or "tiny-dialog", the bundled
    model. If it is not available, `fallback` is loaded in its place, with a warning; without one,
    ModelError is raised. `device` is torch's: "cpu", or "cuda" for the first GPU that this process
    sees, which in a replica is the one that Ray has reserved for it. Replies are greedy, whatever
    the model's generation_config.json says.
    """
    if device == "cuda" and not torch.cuda.is_available():
        raise ModelError(
            f"model {name!r}: a GPU is reserved for it, but torch {torch.__version__} sees none; "
            "install its CUDA build and NVIDIA's driver, or say num_gpus=0"
        )
    try:
        source = resolve(name)
        with report_progress(source):
            config, tokenizer = read(source)
            try:
                model = AutoModelForCausalLM.from_pretrained(
                    source.place, config=config, dtype=dtype, **source.options
                )
            except Exception as error:
                raise source.problem("the weights cannot be loaded", error) from error
    except ModelError as error:
        if fallback is None:
            raise
        logger.warning(f"{error}. Until then the model {fallback} answers in its place.")
        return load_model(fallback, dtype, device=device)
    model.to(device)
    model.generation_config = greedy_config(model, tokenizer)
    return LoadedModel(source.served_name, model, tokenizer, context_length(config, tokenizer))


def check_model(name: str) -> tuple[str, PreTrainedTokenizerBase, int]:
    """Read a model's configuration and tokenizer, which is quick, without its weights.

    Returns its name, with an absolute folder, its tokenizer and its context length. Raises
    ModelError for what load_model would find out only when a replica starts.
    """
    source = resolve(name)
    config, tokenizer = read(source)
    return source.name, tokenizer, context_length(config, tokenizer)


def read(source: Source) -> tuple[PreTrainedConfig, PreTrainedTokenizerBase]:
    """The model's configuration and tokenizer, without its weights."""
    try:
        config = AutoConfig.from_pretrained(source.place, **source.options)
    except Exception as error:
        raise source.problem("the configuration cannot be read", error) from error
    # Encoders such as BERT read what comes after a token, too, unless they are told not to.
    is_encoder = type(config) in MODEL_FOR_MASKED_LM_MAPPING and not (
        getattr(config, "is_decoder", False) or getattr(config, "is_encoder_decoder", False)
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
    """Tokens that fit the model; a huge number for an architecture without a limit."""
    text_config = config.get_text_config()
    for name in ("max_position_embeddings", "max_seq_len", "seq_length"):
        if isinstance(length := getattr(text_config, name, None), int):
            return length
    return int(tokenizer.model_max_length)


def greedy_config(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> GenerationConfig:
    """The most likely token at each step, until a token that ends the reply; nothing else.

    Of the model's own generation config only the tokens that end a reply are kept: sampling,
    beams, penalties and length limits are for a request to ask for.
    """
    # The chat template may end a turn with another token than the model's configuration knows.
    own = model.generation_config.eos_token_id
    ends = {*(own if isinstance(own, list) else [own]), tokenizer.eos_token_id} - {None}
    # Any token will do for padding, since the attention mask hides it, but the model must know it.
    pads = [tokenizer.pad_token_id, *sorted(ends), 0]
    known = model.get_input_embeddings().num_embeddings
    return GenerationConfig(
        do_sample=False,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=sorted(ends) or None,
        pad_token_id=next(pad for pad in pads if pad is not None and pad < known),
    )
