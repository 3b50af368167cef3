"""What a model gives without a server: `generate`, or continuous batching, in this process.

    echo 16 | python benchmarks/in_process.py generate --model ./my-model

For each line of its input, a number of streams, it prints the tokens per second of all of them
together. Or, for `cost`, the microseconds that our own code takes for a token, early and late in a
reply.
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
from transformers import GenerationConfig, GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from serving.encoding import encode
from serving.loading import LoadedModel, load_model
from serving.paging import start_manager
from serving.streaming import ReplyStreamer

NEVER = "<never>"  # a token that ends a reply and that the model has no logit for
TEMPLATE = "{% for message in messages %}{{ message['content'] }} {% endfor %}"


def save_endless(source: str, folder: Path) -> None:
    """Save a model whose replies are as long as they may be, so that all servers do the same work.

    `source` is "gpt2-shape", random weights in the shape of GPT-2 124M, or a model's name.
    """
    if source == "gpt2-shape":
        torch.manual_seed(0)
        config = GPT2Config()
        vocabulary = {f"w{number}": number for number in range(config.vocab_size)}
        words = Tokenizer(models.WordLevel(vocabulary, unk_token="w0"))
        words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, chat_template=TEMPLATE)
        model = GPT2LMHeadModel(config)
    else:
        _, loaded, tokenizer, _ = load_model(source)
        # Built anew, since what was read from GGUF cannot be saved.
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
    """One call of `generate` for all streams."""

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
    """All streams added to the batch of the manager that the Continuousbot uses."""

    def __init__(self, loaded: LoadedModel) -> None:
        self.loaded = loaded
        self.manager = start_manager(loaded.model, loaded.context)

    def run(self, streams: int, tokens: int) -> None:
        for input_ids in prompts(self.loaded, streams):
            self.manager.add_request(input_ids, max_new_tokens=tokens, sampler=None)
        while streams:
            output = self.manager.get_result(timeout=600)
            assert output is not None and output.error is None, output
            streams -= output.is_finished()


class Timed(ReplyStreamer):
    """Notes the seconds that it takes from the model's thread."""

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
    """Microseconds per token, in the model's thread and on the event loop, for each window."""
    streamer, marks = Timed(loaded.tokenizer), {}
    input_ids = torch.tensor(prompts(loaded, 1))

    def generate() -> None:
        loaded.model.generate(
            input_ids,
            attention_mask=torch.ones_like(input_ids),
            max_new_tokens=windows[-1].stop + 1,
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


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("way", choices=["generate", "continuous", "cost"])
    parser.add_argument("--model", required=True)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--tokens", type=int, default=48)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    loaded = load_model(arguments.model, arguments.dtype)
    if arguments.way == "cost":
        windows = [range(10, 90), range(860, 940)]
        print(json.dumps(asyncio.run(cost_of_tokens(loaded, windows))))
        return
    runner = (Generate if arguments.way == "generate" else Continuous)(loaded)
    runner.run(1, 4)
    for line in sys.stdin:
        streams = int(line)
        began = time.perf_counter()
        runner.run(streams, arguments.tokens)
        print(streams * arguments.tokens / (time.perf_counter() - began), flush=True)


if __name__ == "__main__":
    main()
