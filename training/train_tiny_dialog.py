"""Train the bundled model, tiny-dialog, from scratch on the dialogues in training/dialogues.

    python training/train_tiny_dialog.py --minutes 18 --output streaming_bots/models/tiny_dialog

The model has GPT-2's architecture and DialoGPT's format: prompts and replies in turn, each followed
by the end-of-sequence token. So it can take DialoGPT's place if the hub is unreachable.
"""

import argparse
import itertools
import math
import random
import re
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.nn.functional import cross_entropy
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

EOS = "<|endoftext|>"
CONTEXT = 512
VOCABULARY = 2560
TOKENS_PER_STEP = 2048
PROMPT_WEIGHT = 0.3  # of a prompt's tokens in the loss, since the model has to write replies
HERE = Path(__file__).parent

# A dialogue is a list of lines, prompts and replies in turn. A line is a list of alternatives.
Dialogue = list[list[str]]


def read_dialogues(folder: Path) -> tuple[list[Dialogue], dict[str, list[str]]]:
    """Read the dialogues of a folder, and its `slots.txt`: words for {name}, {food} and so on."""
    slots = {}
    for line in (folder / "slots.txt").read_text().splitlines():
        name, _, words = line.partition(": ")
        slots[name] = words.split(", ")
    dialogues = []
    for path in sorted(folder.glob("*.txt")):
        if path.name == "slots.txt":
            continue
        for block in path.read_text().split("\n\n"):
            lines = [line for line in block.splitlines() if line[:2] in ("U:", "B:")]
            if lines:
                dialogues.append([line[2:].strip().split(" | ") for line in lines])
    return dialogues, slots


def hold_out(dialogues: list[Dialogue]) -> tuple[list[Dialogue], list[Dialogue]]:
    """Keep the last wording of every prompt with at least eight wordings out of the training."""
    training, held_out = [], []
    for dialogue in dialogues:
        prompts = dialogue[0]
        if len(prompts) >= 8:
            held_out.append([prompts[-1:], *dialogue[1:]])
            prompts = prompts[:-1]
        training.append([prompts, *dialogue[1:]])
    return training, held_out


def reworded(prompt: str, rng: random.Random) -> str:
    """Return the prompt as another person might type it: capitals, final punctuation, a typo."""
    if rng.random() < 0.35:
        prompt = prompt.lower()
    elif rng.random() < 0.5:
        prompt = prompt[0].upper() + prompt[1:]
    if rng.random() < 0.4:
        prompt = prompt.rstrip("?.!")
    elif prompt[-1].isalnum() and rng.random() < 0.5:
        question = re.match(
            r"(?i)(what|who|where|when|why|how|which|do|does|did|are|is|can)\b", prompt
        )
        prompt += "?" if question else rng.choice([".", ".", "!"])
    if rng.random() < 0.08:
        prompt = rng.choice(["hey, ", "Hey, ", "ok, ", "Well, ", "so ", "So, ", "please "]) + prompt
    if rng.random() < 0.1:
        prompt = prompt.replace("'", "")
    if rng.random() < 0.06 and len(prompt) > 6:
        slip = rng.randrange(1, len(prompt))
        prompt = prompt[:slip] + prompt[slip + 1 :]
    return prompt


def invented_name(rng: random.Random) -> str:
    """Invent a name from no list, so that the model learns to repeat names, not to know them."""
    syllables = [rng.choice("bcdfghjklmnprstvwz") + rng.choice("aeiou") for _ in range(3)]
    return "".join(
        [*syllables[: rng.randint(1, 3)], rng.choice(["", "n", "l", "r", "s", "m"])]
    ).title()


def spoken(dialogue: Dialogue, slots: dict[str, list[str]], rng: random.Random) -> list[str]:
    """Return the turns of one way that a dialogue may go, prompts and replies in turn."""
    words = {name: rng.choice(choices) for name, choices in slots.items()}
    if rng.random() < 0.4:
        words["name"] = invented_name(rng)
    turns = []
    for number, alternatives in enumerate(dialogue):
        turn = rng.choice(alternatives)
        for name, word in words.items():
            turn = turn.replace("{" + name + "}", word)
        turns.append(reworded(turn, rng) if number % 2 == 0 else turn)
    return turns


def train_tokenizer(
    dialogues: list[Dialogue], slots: dict[str, list[str]]
) -> PreTrainedTokenizerFast:
    """Learn a byte-level BPE, which can encode any text, from the dialogues."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    rng = random.Random(0)
    texts = (turn for _ in range(4) for one in dialogues for turn in spoken(one, slots, rng))
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe, bos_token=EOS, eos_token=EOS, model_max_length=CONTEXT
    )


def rows(
    dialogues: list[Dialogue],
    slots: dict[str, list[str]],
    tokenizer: PreTrainedTokenizerFast,
    length: int,
    rng: random.Random,
) -> Iterator[tuple[list[int], list[float]]]:
    """Yield conversations of `length` tokens, each of some dialogues in a row, and loss weights."""
    # Every wording of a first prompt is equally likely, except that one with slots stands for many.
    shares = [len(one[0]) * (3 if any("{" in text for text in one[0]) else 1) for one in dialogues]
    cumulative = list(itertools.accumulate(shares))
    while True:
        ids: list[int] = []
        weights: list[float] = []
        while len(ids) < length:
            (dialogue,) = rng.choices(dialogues, cum_weights=cumulative)
            for number, turn in enumerate(spoken(dialogue, slots, rng)):
                tokens = tokenizer(turn + EOS)["input_ids"]
                ids += tokens
                weights += [1.0 if number % 2 else PROMPT_WEIGHT] * len(tokens)
        yield ids[:length], weights[:length]


def loss_of(model: GPT2LMHeadModel, batch: list[tuple[list[int], list[float]]]) -> torch.Tensor:
    """Return the weighted mean cross-entropy in nats per token."""
    ids = torch.tensor([ids for ids, _ in batch])  # (rows, length)
    weights = torch.tensor([weights for _, weights in batch])[:, 1:]  # (rows, length - 1)
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(ids).logits[:, :-1]  # (rows, length - 1, vocabulary)
    losses = cross_entropy(logits.float().transpose(1, 2), ids[:, 1:], reduction="none")
    return (losses * weights).sum() / weights.sum()


def reply_loss(
    model: GPT2LMHeadModel,
    tokenizer: PreTrainedTokenizerFast,
    dialogues: list[Dialogue],
    slots: dict[str, list[str]],
) -> float:
    """Return the mean loss of the first reply to a held-out prompt, in nats per token."""
    rng = random.Random(0)
    total, count = 0.0, 0
    model.eval()
    for dialogue in dialogues:
        prompt, reply = spoken(dialogue, slots, rng)[:2]
        prompt_ids, reply_ids = tokenizer([prompt + EOS, reply + EOS])["input_ids"]
        weights = [0.0] * len(prompt_ids) + [1.0] * len(reply_ids)
        with torch.no_grad():
            total += float(loss_of(model, [(prompt_ids + reply_ids, weights)])) * len(reply_ids)
        count += len(reply_ids)
    model.train()
    return total / count


def train(dialogues_folder: Path, minutes: float, max_steps: int | None, output: Path) -> None:
    """Train for `minutes`, or at most `max_steps` steps, and save the model and the tokenizer."""
    began = time.monotonic()
    torch.manual_seed(0)
    rng = random.Random(0)
    dialogues, slots = read_dialogues(dialogues_folder)
    training, held_out = hold_out(dialogues)
    tokenizer = train_tokenizer(training, slots)
    config = GPT2Config(
        vocab_size=len(tokenizer),
        n_positions=CONTEXT,
        n_embd=224,
        n_layer=4,
        n_head=7,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        bos_token_id=tokenizer.eos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    model = GPT2LMHeadModel(config)
    print(f"{len(dialogues)} dialogues, {model.num_parameters():,} parameters")

    # Most prompts come early in a conversation, so most rows are short. The long rows teach the
    # positions up to the end of the context.
    sources = {
        length: rows(training, slots, tokenizer, length, rng) for length in (128, 256, CONTEXT)
    }
    peak_rate = 2e-3
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=peak_rate, betas=(0.9, 0.98), weight_decay=0.1, fused=True
    )
    for step in itertools.count():
        done = (time.monotonic() - began) / (minutes * 60)
        if done >= 1 or step == max_steps:
            break
        warmup = min(1.0, (step + 1) / 100)
        for group in optimizer.param_groups:
            group["lr"] = peak_rate * warmup * (0.02 + 0.98 * (1 + math.cos(math.pi * done)) / 2)
        length = rng.choices(list(sources), weights=[6, 2, 2])[0]
        batch = list(itertools.islice(sources[length], TOKENS_PER_STEP // length))
        loss = loss_of(model, batch)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if step % 50 == 0:
            print(f"step {step}, {done:.0%}: loss {loss.item():.3f}", flush=True)

    print(
        f"step {step}: reply loss on held-out prompts "
        f"{reply_loss(model, tokenizer, held_out, slots):.3f}"
    )
    model.half().save_pretrained(output)
    tokenizer.save_pretrained(output)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dialogues", type=Path, default=HERE / "dialogues")
    parser.add_argument("--minutes", type=float, default=18)
    parser.add_argument("--max-steps", type=int)
    parser.add_argument("--output", type=Path, required=True)
    options = parser.parse_args()
    train(options.dialogues, options.minutes, options.max_steps, options.output)
