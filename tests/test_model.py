"""training/: the bundled model replies as its card says, and the script that made it runs."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from bot_fixtures import REPOSITORY, reference

from streaming_bots.models.loaded_model import load_model
from streaming_bots.models.source import BUNDLED_FOLDER

CARD = (BUNDLED_FOLDER / "README.md").read_text()
MAX_NEW_TOKENS = 256


def dialogues(title: str) -> list[list[str]]:
    """Return the dialogues under a heading of the card. Prompts follow "> "; replies alternate."""
    (block,) = re.findall(rf"## {title}\n.*?```\n(.*?)```", CARD, re.DOTALL)
    return [
        [line.removeprefix("> ") for line in dialogue.splitlines()]
        for dialogue in block.strip().split("\n\n")
    ]


@pytest.mark.parametrize("title", ["Sample dialogues", "Held-out prompts"])
def test_the_model_reproduces_the_dialogues_of_its_card(loaded, title):
    shown = dialogues(title)
    assert len(shown) >= 10
    for turns in shown:
        for length in range(1, len(turns), 2):
            assert reference(loaded, turns[:length], MAX_NEW_TOKENS) == turns[length]


def test_the_held_out_prompts_are_not_in_the_dialogues_word_for_word():
    def bare(text: str) -> str:
        return re.sub(r"[^a-z0-9 ]", "", text.lower()).strip()

    folder = REPOSITORY / "training" / "dialogues"
    lines = [line for path in folder.glob("*.txt") for line in path.read_text().splitlines()]
    shown = {bare(text) for line in lines for text in line[2:].split(" | ")}
    for turns in dialogues("Held-out prompts"):
        for prompt in turns[::2]:
            assert bare(prompt) not in shown, prompt


def test_the_model_is_small_enough_to_live_in_the_repository():
    files = BUNDLED_FOLDER.iterdir()
    assert sum(file.stat().st_size for file in files) <= 8_000_000


def train(*arguments: str | Path) -> str:
    """Run two steps of the training script; return what it prints."""
    command = [sys.executable, REPOSITORY / "training" / "train_tiny_dialog.py", "--max-steps", "2"]
    ran = subprocess.run([*command, *arguments], capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    assert "step 2: reply loss on held-out prompts" in ran.stdout
    return ran.stdout


def test_the_training_script_trains_and_saves_a_model(tmp_path):
    few = tmp_path / "dialogues"
    few.mkdir()
    shutil.copy(REPOSITORY / "training" / "dialogues" / "slots.txt", few)
    prompts = " | ".join(f"Hello number {number}" for number in range(8))
    (few / "few.txt").write_text(f"U: {prompts}\nB: Hi!\n\nU: I am {{name}}.\nB: Hi, {{name}}!\n")
    train("--dialogues", few, "--output", tmp_path / "model")
    assert load_model(str(tmp_path / "model")).context == 512


@pytest.mark.exhaustive
def test_the_training_script_takes_all_dialogues(tmp_path):
    printed = train("--output", tmp_path)
    folder = REPOSITORY / "training" / "dialogues"
    texts = [path.read_text() for path in folder.glob("*.txt")]
    number = sum("U:" in block for text in texts for block in text.split("\n\n"))
    assert printed.startswith(f"{number} dialogues, ")
