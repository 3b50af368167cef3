"""8-bit weights for `dtype=int8` on a CPU: they take less memory, and are read faster."""

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from streaming_bots.models.bfloat16 import linear_layers
from streaming_bots.operations.machine import returning_freed_memory

TINY = torch.finfo(torch.float32).tiny

# The inputs of a layer that are much larger than its others here are so in any text
SAMPLE = """The lighthouse keeper's daughter asked: "How many ships passed in 1987?" He shrugged.

- Yes, 42 of them, at least!
- def count(ships): return len(ships) + 1  # and why not?"""


class Int8Linear(nn.Module):
    """A linear layer that takes and returns float32, but multiplies 8-bit integers.

    Each output has a scale for its weights, and each token its own scale for its inputs. An input
    that is often much larger than the others would leave them few levels. So it is divided by a
    factor that multiplies its weights (SmoothQuant, Xiao et al., 2022). `weight` has the shape
    (outputs, inputs). `largest`, of shape (inputs,), has the largest magnitudes of the inputs in
    SAMPLE. `levels` is the largest integer for an input.
    """

    divided: torch.Tensor
    is_precise = False

    def __init__(
        self, weight: torch.Tensor, bias: torch.Tensor | None, largest: torch.Tensor, levels: int
    ) -> None:
        super().__init__()
        factors = (largest / largest.mean().clamp(min=TINY)).clamp(min=1).sqrt()
        weight = weight.float() * factors
        scales = weight.abs().amax(1).clamp(min=TINY) / 127
        zeros = torch.zeros_like(scales, dtype=torch.long)
        with warnings.catch_warnings():  # nothing in torch 2.13 replaces qint8 as fast
            warnings.filterwarnings("ignore", message=".*quantized tensor creation functions")
            packed = torch.quantize_per_channel(weight, scales, zeros, 0, torch.qint8)
        self.packed = torch.ops.quantized.linear_prepack(packed, None)
        self.register_buffer("divided", 1 / factors, persistent=False)
        self.bias = None if bias is None else nn.Parameter(bias.float(), requires_grad=False)
        self.scale, self.zero_point = 1 / levels, levels + 1

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        hidden = hidden * self.divided
        output = self._multiply_all(hidden) if self.is_precise else self._multiply(hidden)
        return output if self.bias is None else output.add_(self.bias)

    def _multiply(self, hidden: torch.Tensor) -> torch.Tensor:
        largest = hidden.abs().amax(-1, keepdim=True)  # zeros give NaN, any integer, then zero
        return torch.ops.quantized.linear_with_input_q_dq_qweight_dq_output_fp32(
            hidden / largest, self.scale, self.zero_point, self.packed
        ).mul_(largest)

    def _multiply_all(self, hidden: torch.Tensor) -> torch.Tensor:
        """Multiply the inputs rounded, then what that has left, and then the rest of that."""
        products = []
        for _ in range(3):
            largest = hidden.abs().amax(-1, keepdim=True).clamp(min=TINY)
            rounded = largest * torch.fake_quantize_per_tensor_affine(
                hidden / largest, self.scale, self.zero_point, 0, 255
            )
            products.append(self._multiply(rounded))
            hidden = hidden - rounded
        return sum(products[1:], products[0])


@contextmanager
def precise(model: nn.Module) -> Iterator[None]:
    """Let the Int8Linear layers of a model also multiply what they round away of their inputs.

    Then two ways to compute the same reply differ no more than in float32. Otherwise, rounding
    makes much of any difference, above all with the few levels of a processor without VNNI.
    """
    layers = [module for module in model.modules() if isinstance(module, Int8Linear)]
    for layer in layers:
        layer.is_precise = True
    try:
        yield
    finally:
        for layer in layers:
            layer.is_precise = False


@torch.no_grad()
def to_int8(model: PreTrainedModel, sample: Sequence[int]) -> None:
    """Replace a model's linear layers, and GPT-2's Conv1D, with Int8Linear layers.

    `sample` is SAMPLE as token ids. The other layers compute in float32, but embeddings keep their
    dtype. Raises an error if this processor, or the model, cannot do so.
    """
    levels = input_levels()
    input_ids = torch.tensor([sample])
    hooks = [layer.register_forward_pre_hook(note_largest) for _, layer, _ in linear_layers(model)]
    model(input_ids)
    for hook in hooks:
        hook.remove()
    with returning_freed_memory():
        for name, layer, weight in linear_layers(model):
            inputs = getattr(layer, "largest", torch.ones(weight.shape[1]))
            model.set_submodule(name, Int8Linear(weight, layer.bias, inputs, levels))
    embeddings: list[Any] = [each for each in model.modules() if isinstance(each, nn.Embedding)]
    weights = [each._parameters.pop("weight").detach() for each in embeddings]
    nn.Module.float(model).requires_grad_(False)  # transformers has a `float` that refuses GGUF
    for embedding, weight in zip(embeddings, weights, strict=True):
        embedding.register_buffer("weight", weight, persistent=False)  # not in `model.dtype`
        embedding.register_forward_hook(lambda module, inputs, output: output.float())
    model(input_ids)


def note_largest(layer: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
    """Set `layer.largest` to the largest magnitudes of its inputs, (inputs,) in float32."""
    layer.largest = inputs[0].flatten(end_dim=-2).abs().amax(0).float()


def input_levels() -> int:
    """Return 127, or 63 on processors without VNNI, which add two products in 16 bits.

    Raises an error if both overflow, or if torch has no such operator here.
    """
    numbers = torch.ones(1, 256)
    for levels in (127, 63):
        if Int8Linear(numbers, None, numbers[0], levels)(numbers).item() > 255:
            return levels
    raise RuntimeError("this processor multiplies int8 wrongly")
