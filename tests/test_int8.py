"""models/int8.py: 8-bit weights, in every bot."""

from pathlib import Path

import pytest
import torch
from callers import ChatCaller, HttpCaller, check_replies
from scripted_model import save_random_model
from torch import nn
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig, PreTrainedConfig
from transformers.pytorch_utils import Conv1D

from batchbot import Batchbot
from chatbot import Chatbot
from continuousbot import Continuousbot
from streaming_bots.generation.kv_cache import start_manager
from streaming_bots.generation.padding import check_padding
from streaming_bots.models import int8
from streaming_bots.models.int8 import Int8Linear, input_levels, precise
from streaming_bots.models.loaded_model import LoadedModel, load_model
from streaming_bots.models.source import BUNDLED, ModelError
from streaming_bots.settings import (
    BatchbotSettings,
    BotSettings,
    ChatbotSettings,
    ContinuousbotSettings,
)
from textbot import Textbot

SIZES = {"hidden_size": 256, "intermediate_size": 768, "num_hidden_layers": 8}
GPT2 = GPT2Config(n_embd=256, n_layer=8, n_head=4, tie_word_embeddings=True)
LLAMA = LlamaConfig(**SIZES, num_attention_heads=4, num_key_value_heads=2)
TEXT = Path(__file__).with_name("test_int8.py").read_text()


@pytest.fixture(scope="module")
def loaded_int8() -> LoadedModel:
    return load_model(BUNDLED, "int8")


def byte_size(model: nn.Module) -> int:
    """Return the bytes of a model's weights. The int8 ones are in no parameter or buffer."""
    packed = [each.packed.unpack()[0] for each in model.modules() if isinstance(each, Int8Linear)]
    tensors = {each.data_ptr(): each.nbytes for each in (*model.parameters(), *model.buffers())}
    return sum(tensors.values()) + sum(each.numel() + 4 * each.shape[0] for each in packed)


def perplexity(loaded: LoadedModel, input_ids: torch.Tensor) -> torch.Tensor:
    """Return the perplexity of each row."""
    with torch.inference_mode():
        logits = loaded.model(input_ids).logits[:, :-1]
    losses = nn.functional.cross_entropy(logits.transpose(1, 2), input_ids[:, 1:], reduction="none")
    return losses.mean(1).exp()


@pytest.mark.parametrize("levels", sorted({input_levels(), 63}))  # a processor may overflow at 127
def test_a_layer_gives_nearly_what_its_weights_of_32_bits_give(levels):
    torch.manual_seed(0)
    weight, bias, hidden = torch.randn(48, 64), torch.randn(48), torch.randn(2, 5, 64)
    hidden[..., 3] *= 50  # an outlier, as language models have them
    expected = nn.functional.linear(hidden, weight, bias)
    layer = Int8Linear(weight, bias, hidden.abs().amax((0, 1)), levels)
    error = (layer(hidden) - expected).std() / expected.std()
    unaware = Int8Linear(weight, bias, torch.ones(64), levels)(hidden)
    assert error < 0.6 * (unaware - expected).std() / expected.std()
    assert error < 1.5 / levels


def test_a_token_of_zeros_gives_the_bias():
    layer = Int8Linear(torch.randn(4, 8), torch.arange(4.0), torch.ones(8), 127)
    assert layer(torch.zeros(1, 8)).tolist() == [[0, 1, 2, 3]]


def test_a_broken_token_stays_broken():
    layer = Int8Linear(torch.randn(4, 8), None, torch.ones(8), 127)
    assert layer(torch.full((1, 8), torch.nan)).isnan().all()


def test_a_layer_can_multiply_what_it_rounds_away_of_its_inputs():
    torch.manual_seed(0)
    weight, hidden = torch.randn(48, 64), torch.randn(2, 5, 64)
    hidden[0, 0] = 0
    layer = Int8Linear(weight, None, torch.ones(64), input_levels())
    expected = nn.functional.linear(hidden, layer.packed.unpack()[0].dequantize())
    with precise(layer):
        assert torch.allclose(layer(hidden), expected, atol=1e-4)
    assert not torch.allclose(layer(hidden), expected, atol=1e-2)


def test_rounding_is_not_taken_for_an_influence_of_the_padding(monkeypatch, tmp_path):
    """Attention that differs by 5e-5 makes some inputs round to another level."""
    attend, noise = nn.functional.scaled_dot_product_attention, torch.Generator().manual_seed(0)

    def attend_noisily(*arguments, **options) -> torch.Tensor:
        output = attend(*arguments, **options)
        return output * (1 + 5e-5 * torch.randn(output.shape, generator=noise))

    monkeypatch.setattr(int8, "input_levels", lambda: 31)
    save_random_model(LLAMA, tmp_path, context=512)
    model = load_model(str(tmp_path), "int8").model
    monkeypatch.setattr(nn.functional, "scaled_dot_product_attention", attend_noisily)
    check_padding(model)
    start_manager(model, context=64, rows=2).stop(hard_stop=True)


def test_a_processor_whose_sums_overflow_gets_smaller_inputs(monkeypatch):
    class Overflowing(Int8Linear):
        def forward(self, hidden: torch.Tensor) -> torch.Tensor:
            return super().forward(hidden) * (0.5 if self.zero_point == 128 else 1)

    assert input_levels() in (127, 63)
    monkeypatch.setattr(int8, "Int8Linear", Overflowing)
    assert input_levels() == 63


@pytest.mark.parametrize("config", [GPT2, LLAMA], ids=["gpt2", "llama"])
def test_the_weights_take_less_than_half(config: PreTrainedConfig, tmp_path):
    save_random_model(config, tmp_path, context=512)
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    model.resize_token_embeddings(8192)  # so that embeddings weigh as in real models
    model.save_pretrained(tmp_path)
    whole, small = (load_model(str(tmp_path), dtype).model for dtype in ("float32", "int8"))
    assert small.dtype == torch.float32
    assert byte_size(small) < 0.45 * byte_size(whole)
    kinds = [type(module) for module in small.modules()]
    assert not {nn.Linear, Conv1D} & {*kinds}


def test_a_model_can_be_called_where_gradients_are_computed(loaded_int8):
    ids = torch.tensor([[1, 2, 3]])
    with torch.inference_mode():
        expected = loaded_int8.model(ids).logits
    assert torch.equal(loaded_int8.model(ids).logits, expected)


def test_a_model_reads_nearly_as_well_as_in_float32(loaded, loaded_int8):
    ids = loaded.tokenizer(TEXT, return_tensors="pt")["input_ids"][:, :512]
    assert perplexity(loaded_int8, ids) < 1.05 * perplexity(loaded, ids)


def test_the_company_of_other_rows_changes_nothing(loaded_int8):
    rows = loaded_int8.tokenizer(TEXT, return_tensors="pt")["input_ids"][0, : 16 * 60].view(16, 60)
    together = perplexity(loaded_int8, rows)
    alone = torch.cat([perplexity(loaded_int8, row[None]) for row in rows])
    assert torch.allclose(together, alone, rtol=0.01)


BOTS = {
    "textbot": (Textbot, BotSettings, {}),
    "chatbot": (Chatbot, ChatbotSettings, {}),
    "batched_chatbot": (Chatbot, ChatbotSettings, {"max_batch_size": 4}),
    "batchbot": (Batchbot, BatchbotSettings, {}),
    "continuousbot": (Continuousbot, ContinuousbotSettings, {}),
}


@pytest.mark.parametrize("name", BOTS)
def test_a_bot_replies_as_generate_does(name, run_other, loaded_int8):
    deployment, settings, options = BOTS[name]
    bot = run_other(settings(model=BUNDLED, dtype="int8", **options).bind(deployment))
    check_replies(bot, ChatCaller if "chatbot" in name else HttpCaller, loaded_int8)


def test_a_gpu_is_refused_with_the_reason():
    with pytest.raises(ValueError, match="int8 is for a CPU"):
        BotSettings(dtype="int8", num_gpus=1)


def test_a_platform_without_the_operator_is_told_at_the_start(monkeypatch):
    def missing(*arguments: object) -> None:
        raise RuntimeError("Didn't find engine for operation quantized::linear_prepack")

    monkeypatch.setattr(torch.ops.quantized, "linear_prepack", missing)
    with pytest.raises(ModelError, match=r"cannot compute with int8 weights .*find engine"):
        load_model(BUNDLED, "int8")
