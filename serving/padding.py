"""Whether a model can have prompts of unequal lengths in one batch: padding must change nothing."""

from concurrent.futures import ThreadPoolExecutor

import torch
from transformers import PreTrainedModel

LENGTH = 4  # tokens, of the prompt that is tried and of the padding before it

# Of the logits' standard deviation. Padding that is hidden changes them by rounding alone, which
# is 1e-7 of it in float32 and 1e-2 in bfloat16; padding that is read, by about as much as it.
TOLERANCE = 0.1


def check_padding(model: PreTrainedModel) -> None:
    """Raise ValueError if a reply would depend on the padding that others in the batch bring.

    Raises the model's own error if it cannot generate. Some models ignore the mask or, on padding,
    move the positions of the prompt, and write something else than they would alone.
    """
    # Not in this thread: one that has computed keeps its OpenMP threads, with which those of the
    # model's thread would have to share the cores.
    with ThreadPoolExecutor(1) as thread:
        alone, padded = (thread.submit(next_logits, model, pads).result() for pads in (0, LENGTH))
    # What is no number compares as false. Tokens that a model never writes are minus infinity.
    known = alone.isfinite()
    if not (
        known.any()
        and torch.equal(known, padded.isfinite())
        and (padded - alone)[known].std() <= TOLERANCE * alone[known].std()
    ):
        raise ValueError(
            f"transformers cannot batch {model.config.model_type}: it reads the padding before "
            "short prompts, so that replies would depend on the rest of the batch; the Textbot and "
            "the Chatbot can use it"
        )


def next_logits(model: PreTrainedModel, pads: int) -> torch.Tensor:
    """The logits that follow a prompt with so many pads before it, shape (vocabulary size,)."""
    prompt = torch.arange(LENGTH, device=model.device)[None]
    pad = model.generation_config.pad_token_id
    output = model.generate(
        torch.nn.functional.pad(prompt, (pads, 0), value=pad),
        attention_mask=torch.nn.functional.pad(torch.ones_like(prompt), (pads, 0)),
        max_new_tokens=1,
        output_logits=True,
        return_dict_in_generate=True,
    )
    return output.logits[0][0].float()
