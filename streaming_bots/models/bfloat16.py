"""Faster layers for bfloat16 on a CPU: their weights are laid out once, not for each product."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from streaming_bots.operations.machine import returning_freed_memory


class PackedLinear(nn.Module):
    """A linear layer whose weights lie as oneDNN multiplies them.

    In torch's own layers, oneDNN lays them out again in each call, which can take as long as the
    product. `weight` has the shape (outputs, inputs), but its elements cannot be read.
    """

    weight: torch.Tensor

    def __init__(self, weight: torch.Tensor, bias: nn.Parameter | None) -> None:
        super().__init__()
        packed = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous())
        self.register_buffer("weight", packed, persistent=False)
        self.bias = bias

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return torch.ops.mkldnn._linear_pointwise(hidden, self.weight, self.bias, "none", [], "")

    def unpacked(self) -> nn.Linear:
        linear = nn.Linear(self.weight.shape[1], self.weight.shape[0], device="meta")
        linear.weight = nn.Parameter(self.weight.to_dense())
        linear.register_parameter("bias", self.bias)
        return linear


@torch.no_grad()
def pack(model: PreTrainedModel) -> None:
    """Replace a model's bfloat16 linear layers, and GPT-2's Conv1D, with PackedLinear layers.

    They stay as they are if this processor, torch or the model cannot do so. An output layer that
    shares the weights of the embeddings gets a copy of them.
    """
    if model.dtype != torch.bfloat16 or not is_supported():
        return
    packed = {}
    with returning_freed_memory():
        for name, layer, weight in linear_layers(model):
            if weight.dtype == torch.bfloat16:
                packed[name] = PackedLinear(weight, layer.bias)
                model.set_submodule(name, packed[name])
    try:
        model.generate(torch.tensor([[0]]), min_new_tokens=2, max_new_tokens=2)
    except Exception:  # Mamba, for one, reads the weights of a layer
        for name, layer in packed.items():
            model.set_submodule(name, layer.unpacked())


def is_supported() -> bool:
    """Return whether oneDNN is there, and multiplies bfloat16 on this processor."""
    onednn = torch.backends.mkldnn.is_available()
    return onednn and torch.ops.mkldnn._is_mkldnn_bf16_supported()


def linear_layers(model: nn.Module) -> Iterator[tuple[str, Any, torch.Tensor]]:
    """Yield a model's linear layers, and Conv1D: name, layer, weight of shape (outputs, inputs).

    A caller that replaces each at once needs memory for only one more.
    """
    for name in [name for name, each in model.named_modules() if type(each) in (nn.Linear, Conv1D)]:
        layer: Any = model.get_submodule(name)
        yield name, layer, layer.weight.T if isinstance(layer, Conv1D) else layer.weight
