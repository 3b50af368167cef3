"""Measures a model without a server: `generate`, or continuous batching, in this process.

    echo 16 | python benchmarks/in_process.py generate --model ./my-model

For each line of its input, a number of streams, it prints the tokens per second of all streams
together. `cost` prints the microseconds per token of our own code, early and late in a reply.
`quality` reads a text, and prints what a dtype costs beside float32.
"""

import argparse
import asyncio
import json
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch
from load import PROMPTS
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    GenerationConfig,
    GPT2Config,
    LlamaConfig,
    PreTrainedTokenizerFast,
)

from streaming_bots.generation.kv_cache import start_manager
from streaming_bots.generation.sampling import ReplyOptions
from streaming_bots.generation.streamer import ReplyStreamer
from streaming_bots.models.loaded_model import LoadedModel, load_model
from streaming_bots.models.prompt import encode
from streaming_bots.operations.machine import set_threads

NEVER = "<never>"  # an end token for which the model has no logit
SHAPES = {
    "gpt2-shape": GPT2Config(),  # 124M parameters
    "llama-1b-shape": LlamaConfig(  # 1.24B parameters, as in Llama 3.2
        vocab_size=128256,
        hidden_size=2048,
        intermediate_size=8192,
        num_hidden_layers=16,
        num_attention_heads=32,
        num_key_value_heads=8,
        max_position_embeddings=8192,
        tie_word_embeddings=True,
    ),
}
TEMPLATE = "{% for message in messages %}{{ message['content'] }} {% endfor %}"


def save_endless(source: str, folder: Path) -> None:
    """Save a model that never ends a reply early, so that all servers do the same work.

    `source` is one of the SHAPES, with random weights, or a model's name.
    """
    if config := SHAPES.get(source):
        torch.manual_seed(0)
        vocabulary = {f"w{number}": number for number in range(config.vocab_size)}
        words = Tokenizer(models.WordLevel(vocabulary, unk_token="w0"))
        words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, chat_template=TEMPLATE)
        model = AutoModelForCausalLM.from_config(config)
    else:
        _, loaded, tokenizer, _ = load_model(source)
        # A model that was read from GGUF cannot be saved, so this builds a new one.
        fields = loaded.config.to_dict()
        fields.pop("quantization_config", None)
        model = type(loaded)(type(loaded.config).from_dict(fields))
        model.load_state_dict(loaded.state_dict())
        tokenizer.chat_template = tokenizer.chat_template or TEMPLATE
    tokenizer.add_special_tokens({"eos_token": NEVER})
    model.config.eos_token_id = model.config.bos_token_id = None
    model.generation_config = GenerationConfig()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def prompts(loaded: LoadedModel, streams: int) -> list[list[int]]:
    return [
        encode(
            [{"role": "user", "content": PROMPTS[number % len(PROMPTS)]}], loaded.tokenizer, 1000
        )
        for number in range(streams)
    ]


class Generate:
    """Calls `generate` once for all streams."""

    def __init__(self, loaded: LoadedModel) -> None:
        self.loaded = loaded
        loaded.tokenizer.padding_side = "left"
        loaded.tokenizer.pad_token_id = loaded.model.generation_config.pad_token_id

    def run(self, streams: int, tokens: int) -> None:
        rows = {"input_ids": prompts(self.loaded, streams)}
        inputs = self.loaded.tokenizer.pad(rows, padding=True, return_tensors="pt")
        inputs = inputs.to(self.loaded.model.device)
        ids = self.loaded.model.generate(**inputs, max_new_tokens=tokens, min_new_tokens=tokens)
        assert ids.shape[1] == inputs["input_ids"].shape[1] + tokens


class Continuous:
    """Adds all streams to a manager like the Continuousbot's."""

    def __init__(self, loaded: LoadedModel, max_batch_size: int) -> None:
        self.loaded = loaded
        self.manager = start_manager(loaded.model, loaded.context, max_batch_size)

    def run(self, streams: int, tokens: int) -> None:
        for input_ids in prompts(self.loaded, streams):
            self.manager.add_request(input_ids, max_new_tokens=tokens, sampler=None)
        while streams:
            output = self.manager.get_result(timeout=600)
            assert output is not None and output.error is None, output
            streams -= output.is_finished()


class Timed(ReplyStreamer):
    """Records in `taken` how many seconds of the model's thread it takes."""

    taken = 0.0

    def put(self, value: torch.Tensor) -> None:
        began = time.thread_time()
        super().put(value)
        self.taken += time.thread_time() - began

    def __call__(self, *arguments: Any, **options: Any) -> torch.Tensor:
        began = time.thread_time()
        stop = super().__call__(*arguments, **options)
        self.taken += time.thread_time() - began
        return stop


async def cost_of_tokens(loaded: LoadedModel, windows: list[range]) -> dict[str, float]:
    """Return microseconds per token, by window: in the model's thread plus on the event loop."""
    ids = prompts(loaded, 1)
    options = ReplyOptions.model_construct(max_new_tokens=windows[-1].stop + 1)
    streamer, marks = Timed(loaded.tokenizer, ids[0], options, []), {}
    input_ids = torch.tensor(ids, device=loaded.model.device)

    def generate() -> None:
        loaded.model.generate(
            input_ids,
            attention_mask=torch.ones_like(input_ids),
            max_new_tokens=options.max_new_tokens,
            streamer=streamer,
            stopping_criteria=[streamer],
        )

    running = asyncio.create_task(asyncio.to_thread(generate))
    async for _ in streamer:
        marks[len(streamer.token_times)] = streamer.taken + time.thread_time()
    await running
    return {
        f"tokens {window.start} to {window.stop}": 1e6
        * (marks[window.stop] - marks[window.start])
        / len(window)
        for window in windows
    }


def perplexity(loaded: LoadedModel, windows: torch.Tensor) -> float:
    """Return the perplexity of a text, in windows of shape (windows, tokens)."""
    with torch.inference_mode():
        logits = torch.cat([loaded.model(window[None]).logits[:, :-1] for window in windows])
    losses = torch.nn.functional.cross_entropy(logits.float().transpose(1, 2), windows[:, 1:])
    return float(losses.exp())


def agreement(loaded: LoadedModel, exact: LoadedModel, windows: torch.Tensor, tokens: int) -> float:
    """Return how many tokens of two models' greedy replies agree before they differ, on average."""
    starts = windows[:, :32]
    options = {"attention_mask": torch.ones_like(starts), "max_new_tokens": tokens}
    replies, expected = (
        each.model.generate(starts, min_new_tokens=tokens, **options)[:, starts.shape[1] :]
        for each in (loaded, exact)
    )
    return float((replies == expected).cumprod(1).sum(1).float().mean())


def compare_quality(loaded: LoadedModel, exact: LoadedModel, text: str, tokens: int) -> None:
    """Print both models' perplexity, and how many tokens of their replies agree."""
    ids = loaded.tokenizer(text, return_tensors="pt")["input_ids"][0, : 8 * 256]
    windows = ids[: len(ids) // 256 * 256].view(-1, 256)
    print(f"perplexity {perplexity(loaded, windows):.3f}, {perplexity(exact, windows):.3f} exact")
    print(f"{agreement(loaded, exact, windows, tokens):.1f} of {tokens} tokens agree")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("way", choices=["generate", "continuous", "cost", "quality"])
    parser.add_argument("--model", required=True)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--max-batch-size", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=48)
    arguments = parser.parse_args()
    set_threads(arguments.threads)
    loaded = load_model(arguments.model, arguments.dtype, device=arguments.device)
    if arguments.way == "cost":
        windows = [range(10, 90), range(860, 940)]
        print(json.dumps(asyncio.run(cost_of_tokens(loaded, windows))))
        return
    if arguments.way == "quality":
        compare_quality(loaded, load_model(arguments.model), sys.stdin.read(), arguments.tokens)
        return
    generates = arguments.way == "generate"
    runner = Generate(loaded) if generates else Continuous(loaded, arguments.max_batch_size)
    runner.run(1, 4)
    for line in sys.stdin:
        streams = int(line)
        began = time.perf_counter()
        runner.run(streams, arguments.tokens)
        print(streams * arguments.tokens / (time.perf_counter() - began), flush=True)


if __name__ == "__main__":
    main()
