"""Padding: batches of prompts of unequal lengths, and how they continue after a row ends."""

from collections.abc import Callable
from typing import Any

import torch
from transformers import DynamicCache, PreTrainedModel

from streaming_bots.generation.sampling import Sampler, SamplingLogitsProcessor
from streaming_bots.models.int8 import precise
from streaming_bots.operations.machine import in_a_thread

LENGTH = 4  # tokens of the test prompts; the padding before them depends on it
STEPS = 4  # tokens of the test replies

# In units of the logits' standard deviation. Rounding alone changes the logits by 1e-6 in float32
# and by 1e-2 in bfloat16. Any difference that matters is at least 2e-3.
TOLERANCE, COARSE_TOLERANCE = 1e-3, 0.1


def batch_context(model: PreTrainedModel, context: int) -> int:
    """Return how many tokens a prompt and its reply may have when other rows share the run.

    With "longrope", as in Phi-3 with 128k, one row longer than the model's original context
    changes the positions of all rows. Llama 4 counts padding to find where its attention becomes
    sharper. A reply would then depend on its neighbours.
    """
    config = model.config.get_text_config()
    if getattr(config, "attn_temperature_tuning", False):
        context = min(context, config.floor_scale - 1)
    rope = getattr(config, "rope_parameters", None) or {}
    for part in (rope, *rope.values()):  # one for all layers, or one for each kind of layer
        if isinstance(part, dict) and part.get("rope_type") == "longrope":
            context = min(context, part["original_max_position_embeddings"])
    return context


def check_padding(model: PreTrainedModel) -> None:
    """Raise ValueError if padding would change a model's replies, or the model's own error.

    Some models ignore the attention mask, or shift the prompt's positions by the padding.
    """
    if in_a_thread(padding_changes, model):
        raise ValueError(
            f"transformers cannot batch {model.config.model_type}: it reads the padding before "
            "short prompts, so that replies would depend on the rest of the batch; the Textbot and "
            "the Chatbot can use it"
        )


def padding_changes(model: PreTrainedModel) -> bool:
    """Whether a reply's logits depend on padding before its prompt."""
    alone, *padded = (logits_of_reply(model, LENGTH, pads) for pads in (0, LENGTH // 2, 4 * LENGTH))
    return not all(are_alike(logits, alone, model) for logits in padded)


def can_cut_cache(model: PreTrainedModel) -> bool:
    """Whether rows can continue with their part of the KV cache after another row ends.

    Some models have no cache, keep some of it elsewhere, or read everything again on top of it.
    """
    rows = torch.arange(2 * LENGTH, device=model.device).view(2, LENGTH)
    last = torch.tensor([1], device=model.device)
    return in_a_thread(can_continue, model, rows, lambda cache: cache.reorder_cache(last))


def keep_rows(
    inputs: dict[str, torch.Tensor], output: Any, kept: list[int], cuts_cache: bool
) -> dict[str, Any]:
    """Return the inputs with which `generate` continues only the `kept` rows of a batch.

    `inputs` are those of the run that returned `output`. If the model's KV cache cannot be cut,
    `generate` computes all tokens again.
    """
    rows = torch.tensor(kept, device=output.sequences.device)
    input_ids, mask = output.sequences[rows], inputs["attention_mask"][rows]
    written = input_ids.shape[1] - mask.shape[1]
    remaining = {
        "input_ids": input_ids,
        "attention_mask": torch.nn.functional.pad(mask, (0, written), value=1),
    }
    cache = output.past_key_values
    output["past_key_values"] = None  # the caller has `output` until the next run ends
    if cuts_cache:
        cache.reorder_cache(rows)
        remaining["past_key_values"] = cache
    return remaining


class Recorder(Sampler):
    """Keeps the logits of a reply, and always draws the same tokens, none of which ends it."""

    def __init__(self, model: PreTrainedModel) -> None:
        its = model.generation_config.eos_token_id
        ends = {its} if isinstance(its, int) else set(its or ())
        self.tokens = [token for token in range(STEPS + len(ends)) if token not in ends]
        self.steps: list[torch.Tensor] = []

    def __call__(self, logits: torch.Tensor) -> torch.Tensor:
        self.steps.append(logits.float().clone())
        scores = torch.zeros_like(logits)
        scores[self.tokens[len(self.steps) % len(self.tokens)]] = 1
        return scores

    @property
    def logits(self) -> torch.Tensor:
        """Shape (steps, vocabulary size)."""
        return torch.stack(self.steps[:STEPS])


def prompt_of(model: PreTrainedModel, length: int) -> torch.Tensor:
    """Return different token ids, of shape (1, length)."""
    known = model.get_input_embeddings().num_embeddings
    return torch.arange(length, device=model.device)[None] % known


def logits_of_reply(model: PreTrainedModel, length: int, pads: int = 0) -> torch.Tensor:
    """Return the logits, (steps, vocabulary size), after `pads` pads and `length` tokens."""
    recorder, prompt = Recorder(model), prompt_of(model, length)
    pad = model.generation_config.pad_token_id
    with precise(model):
        model.generate(
            torch.nn.functional.pad(prompt, (pads, 0), value=pad),
            attention_mask=torch.nn.functional.pad(torch.ones_like(prompt), (pads, 0)),
            max_new_tokens=STEPS,
            logits_processor=[SamplingLogitsProcessor([recorder])],
        )
    return recorder.logits


def can_continue(
    model: PreTrainedModel, rows: torch.Tensor, cut: Callable[[DynamicCache], None]
) -> bool:
    """Whether the last row continues from what `cut` leaves of the cache as it does without one.

    `cut` may raise an error for a cache that it cannot cut.
    """
    try:
        output = next_token(model, rows)
        prompt, cache = output.sequences[-1:], output.past_key_values
        if type(cache) is not DynamicCache:
            return False
        cut(cache)
        continued = next_token(model, prompt, past_key_values=cache)
    except Exception:
        return False
    return are_alike(continued.logits[0], next_token(model, prompt).logits[0], model)


def next_token(model: PreTrainedModel, input_ids: torch.Tensor, **options: Any) -> Any:
    """Generate one token. The output's `logits` hold one tensor of (rows, vocabulary size)."""
    with precise(model):
        return model.generate(
            input_ids,
            attention_mask=torch.ones_like(input_ids),
            max_new_tokens=1,
            output_logits=True,
            return_dict_in_generate=True,
            **options,
        )


def are_alike(some: torch.Tensor, others: torch.Tensor, model: PreTrainedModel) -> bool:
    """Whether two tensors of the model's logits differ by rounding alone."""
    known = others.isfinite()  # tokens that a model never writes are minus infinity
    difference, spread = (some - others)[known].float(), others[known].float()
    tolerance = COARSE_TOLERANCE if model.dtype.itemsize < 4 else TOLERANCE
    return bool(
        known.any()
        and torch.equal(known, some.isfinite())
        and difference.std() <= tolerance * spread.std()
    )
