"""models/bfloat16.py: packed weights on a CPU, where it has products of bfloat16."""

import weakref
from pathlib import Path

import pytest
import torch
from callers import HttpCaller, check_replies
from scripted_model import save_random_model
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    LlamaConfig,
    MambaConfig,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.pytorch_utils import Conv1D

from continuousbot import Continuousbot
from streaming_bots.models import bfloat16
from streaming_bots.models.bfloat16 import PackedLinear, is_supported, linear_layers, pack
from streaming_bots.models.loaded_model import load_model
from streaming_bots.models.source import BUNDLED
from streaming_bots.settings import ContinuousbotSettings

GPT2 = GPT2Config(n_embd=64, n_layer=2, n_head=4, tie_word_embeddings=True)
LLAMA = LlamaConfig(
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    attention_bias=True,
)
MAMBA = MambaConfig(hidden_size=32, num_hidden_layers=2)
IDS = torch.tensor([[5, 6, 7, 8], [9, 8, 7, 6]])


def kinds(model: nn.Module) -> set[type]:
    return {type(module) for module in model.modules()} & {nn.Linear, Conv1D, PackedLinear}


def logits(model: PreTrainedModel) -> torch.Tensor:
    with torch.inference_mode():
        return model(IDS).logits


def unpacked(folder: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)


@pytest.mark.parametrize("config", [GPT2, LLAMA], ids=["gpt2", "llama"])
def test_a_model_gives_what_it_gives_with_layers_of_torch(config: PreTrainedConfig, tmp_path):
    save_random_model(config, tmp_path)
    model = unpacked(tmp_path)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):  # which were zero
            nn.init.normal_(parameter)
    model.save_pretrained(tmp_path)
    model = load_model(str(tmp_path), "bfloat16").model
    assert (kinds(model) == {PackedLinear}) is is_supported()
    assert model.dtype == torch.bfloat16
    assert torch.allclose(logits(model), logits(unpacked(tmp_path)), rtol=0.02, atol=0.02)


def test_a_model_that_reads_its_weights_keeps_the_layers_of_torch(tmp_path):
    save_random_model(MAMBA, tmp_path)
    model = load_model(str(tmp_path), "bfloat16").model
    assert kinds(model) == {nn.Linear}
    assert torch.equal(logits(model), logits(unpacked(tmp_path)))


def test_a_model_of_another_dtype_keeps_the_layers_of_torch():
    assert PackedLinear not in kinds(load_model(BUNDLED).model)


def test_a_processor_without_bfloat16_keeps_the_layers_of_torch(monkeypatch):
    monkeypatch.setattr(bfloat16, "is_supported", lambda: False)
    assert PackedLinear not in kinds(load_model(BUNDLED, "bfloat16").model)


def test_a_layer_that_computes_in_float32_stays_as_it_is(tmp_path):
    save_random_model(LLAMA, tmp_path)
    model = unpacked(tmp_path)
    head = model.lm_head.float()
    model.lm_head.register_forward_pre_hook(lambda layer, inputs: inputs[0].float())
    pack(model)
    assert model.lm_head is head
    assert (PackedLinear in kinds(model)) is is_supported()


def test_packing_needs_memory_for_one_layer_more(tmp_path, monkeypatch):
    save_random_model(LLAMA, tmp_path)
    model = unpacked(tmp_path)
    weights = [weakref.ref(layer.weight) for _, layer, _ in linear_layers(model)]
    alive = []

    class Counting(PackedLinear):
        def __init__(self, weight: torch.Tensor, bias: nn.Parameter | None) -> None:
            alive.append(sum(each() is not None for each in weights))
            super().__init__(weight, bias)

    monkeypatch.setattr(bfloat16, "PackedLinear", Counting)
    pack(model)
    assert alive == ([*range(len(weights), 0, -1)] if is_supported() else [])


def test_a_bot_replies_as_generate_does(run_other):
    settings = ContinuousbotSettings(model=BUNDLED, dtype="bfloat16")
    bot = run_other(settings.bind(Continuousbot))
    check_replies(bot, HttpCaller, load_model(BUNDLED, "bfloat16"))
