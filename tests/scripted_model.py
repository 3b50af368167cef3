"""A real GPT-2 that writes a given text, which a trained model would write only by chance."""

import json
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    PreTrainedConfig,
    PreTrainedTokenizerFast,
)

EOS = "<|endoftext|>"


def byte_tokenizer(context: int) -> PreTrainedTokenizerFast:
    """A tokenizer with one token for each byte, so that no emoji is whole in one token."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        [], trainers.BpeTrainer(special_tokens=[EOS], initial_alphabet=alphabet)
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=EOS, model_max_length=context
    )


def save_scripted_model(folder: Path, prompt_length: int, reply: str, context: int = 512) -> None:
    """Save a model that gives every prompt of `prompt_length` ASCII characters the same reply.

    The model's next token depends only on the position. The embedding of a position is a unit
    vector. Attention and MLP add nothing. The head maps each vector to a token of the reply. If a
    prompt is shorter by n characters, the model writes n more tokens "." before the reply.
    """
    tokenizer = byte_tokenizer(context)
    config = GPT2Config(
        vocab_size=len(tokenizer),
        n_positions=context,
        n_embd=context,
        n_layer=1,
        n_head=1,
        n_inner=1,
        bos_token_id=tokenizer.eos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        tie_word_embeddings=False,
    )
    model = GPT2LMHeadModel(config)
    dot = tokenizer("...")["input_ids"][0]
    # The prompt's EOS is at position prompt_length. The reply's first token follows it.
    script = [dot] * prompt_length + tokenizer(reply)["input_ids"]
    script += [tokenizer.eos_token_id] * (context - len(script))
    with torch.no_grad():
        for parameter in model.transformer.parameters():
            parameter.zero_()
        model.transformer.wpe.weight.copy_(torch.eye(context))
        model.transformer.ln_f.weight.fill_(1.0)
        model.lm_head.weight.zero_()
        for position, token in enumerate(script):
            model.lm_head.weight[token, position] = 1.0
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def name_end_tokens(folder: Path, token: int | None) -> None:
    """Let a saved model name this end token, and its tokenizer none."""
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    settings |= {"eos_token": None, "pad_token": None}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    for name in ("config.json", "generation_config.json"):
        config = json.loads((folder / name).read_text())
        (folder / name).write_text(json.dumps(config | {"eos_token_id": token}))


def save_random_model(config: PreTrainedConfig, folder: Path, context: int = 128) -> None:
    """Save a model of this configuration, with random weights, and a tokenizer for it."""
    torch.manual_seed(0)
    tokenizer = byte_tokenizer(context)
    config.vocab_size = len(tokenizer)
    config.bos_token_id = config.eos_token_id = config.pad_token_id = tokenizer.eos_token_id
    model = AutoModelForCausalLM.from_config(config)
    for parameter in model.parameters():
        parameter.data.mul_(3)  # so large that earlier tokens decide the next one
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
