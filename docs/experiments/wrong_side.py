"""A batch that is padded on the right, without a mask: `python -m docs.experiments.wrong_side`."""

from concurrent.futures import ThreadPoolExecutor

import requests
from transformers import AutoModelForCausalLM, AutoTokenizer

from batchbot import Batchbot
from docs.experiments.side_by_side import served
from streaming_bots.models.source import BUNDLED, BUNDLED_FOLDER

PROMPTS = ["Hello!", "I am tired. I worked all day. What can I do?"]


def generate_padded() -> list[str]:
    """Reply to both prompts in one run of the model, as the tokenizer pads them by default."""
    tokenizer = AutoTokenizer.from_pretrained(BUNDLED_FOLDER)
    model = AutoModelForCausalLM.from_pretrained(BUNDLED_FOLDER)
    tokenizer.pad_token = tokenizer.eos_token
    texts = [prompt + tokenizer.eos_token for prompt in PROMPTS]
    input_ids = tokenizer(texts, padding=True, return_tensors="pt")["input_ids"]
    output = model.generate(input_ids, max_new_tokens=24, pad_token_id=tokenizer.pad_token_id)
    return tokenizer.batch_decode(output[:, input_ids.shape[1] :], skip_special_tokens=True)


def ask(address: str, prompt: str) -> str:
    params: dict[str, str | int] = {"prompt": prompt, "max_new_tokens": 24}
    return requests.post(f"http://{address}", params=params).text


def show(replies: list[str]) -> None:
    for prompt, reply in zip(PROMPTS, replies, strict=True):
        print(f"  {prompt} -> {reply.strip()}", flush=True)


def main() -> None:
    print("padded on the right, without a mask:", flush=True)
    show(generate_padded())
    print("batchbot.py:", flush=True)
    # The batch begins as soon as it has both prompts.
    both = {"max_batch_size": 2, "batch_wait_timeout_s": 60}
    app = Batchbot.options(user_config=both).bind(BUNDLED)
    with served(app) as (address,), ThreadPoolExecutor() as clients:
        replies = list(clients.map(ask, [address] * 2, PROMPTS))
    show(replies)


if __name__ == "__main__":
    main()
