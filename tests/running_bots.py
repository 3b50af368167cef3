"""One Ray and one Serve for all tests, with the bots behind gates on a free port."""

import os
import shutil
import socket
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import ray
import requests
import torch
from gated import Gate, GatedBatchbot, GatedChatbot, GatedContinuousbot, GatedTextbot, gated
from ray import serve
from ray.serve import Application
from scripted import save_scripted_model

from batchbot import Batchbot
from chatbot import Chatbot
from continuousbot import Continuousbot
from serving.access import Access
from serving.loading import LoadedModel, load_model
from serving.locating import EMBEDDED
from textbot import Textbot

REPOSITORY = Path(__file__).parent.parent
EMOJI_REPLY = "🎉 你好，世界! 👩‍👩‍👧 żółw 🐢🐢 <> <b>end</b>"
EMOJI_PROMPT = "Say it."
MAX_NEW_TOKENS = 96
CHAT_MAX_NEW_TOKENS = 400
ALLOWED_ORIGIN = "https://chat.example.org"
KEY = "correct-horse-battery-staple"
WITH_KEY = {"Authorization": f"Bearer {KEY}"}
INGRESS = "haproxy" if os.environ["RAY_SERVE_ENABLE_HA_PROXY"] == "1" else "default"
HANG_S = 60  # only bounds a hang


def wait_until(condition: Callable[[], Any], within_s: float, what: str) -> None:
    """Look again and again until it is so; `what` says what is wrong if it is not in time."""
    deadline = time.monotonic() + within_s
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(0.2)


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


@pytest.fixture(scope="session")
def port() -> Iterator[int]:
    """The port of a Serve that ends with the tests."""
    port = free_port()
    path = f"{REPOSITORY}{os.pathsep}{REPOSITORY / 'tests'}"
    ray.init(
        address="local",
        num_cpus=16,  # bookkeeping: how many replicas fit, not how fast they are
        include_dashboard=False,
        log_to_driver=False,
        runtime_env={"env_vars": {"PYTHONPATH": path}},
        # Not every 10 s, since tests read them; at every second a busy machine lost some.
        _system_config={"metrics_report_interval_ms": 4000},
    )
    serve.start(http_options={"host": "127.0.0.1", "port": port})
    yield port
    serve.shutdown()
    ray.shutdown()


@pytest.fixture(scope="session")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of what the repository holds, away from the installed one."""
    ignored = shutil.ignore_patterns(".*", "__pycache__", "*.egg-info", "tests")
    folder = tmp_path_factory.mktemp("checkout") / "repository"
    return Path(shutil.copytree(REPOSITORY, folder, ignore=ignored))


class Bot(NamedTuple):
    address: str  # without the scheme, which is http:// or ws://
    gate: Gate

    @property
    def http(self) -> str:
        return f"http://{self.address}"

    @property
    def ws(self) -> str:
        return f"ws://{self.address}"


class Bots(NamedTuple):
    """The bots with the embedded model, and with one that writes emoji and Chinese, under key."""

    textbot: Bot
    chatbot: Bot
    batchbot: Bot
    continuousbot: Bot
    emoji_textbot: Bot
    emoji_chatbot: Bot
    emoji_batchbot: Bot
    emoji_continuousbot: Bot


def answers(bot: Bot) -> bool:
    return "X-Model" in requests.get(bot.http, timeout=HANG_S).headers


@pytest.fixture(scope="session")
def emoji_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("emoji-model")
    save_scripted_model(folder, len(EMOJI_PROMPT), EMOJI_REPLY)
    return folder


@pytest.fixture(scope="session")
def bots(port: int, emoji_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Bots:
    """All bots, started together."""
    key_file = tmp_path_factory.mktemp("access") / "key"
    key_file.write_text(KEY)
    guarded = Access(allowed_origins=[ALLOWED_ORIGIN], api_key_file=key_file)
    running, targets = {}, []
    for prefix, model in {"": EMBEDDED, "emoji_": str(emoji_model)}.items():
        for bot, original in {
            GatedTextbot: Textbot,
            GatedChatbot: Chatbot,
            GatedBatchbot: Batchbot,
            GatedContinuousbot: Continuousbot,
        }.items():
            name, gate = prefix + original.name.lower(), Gate()
            # The Chatbot's context holds only a few exchanges, so that tests soon outgrow it.
            limit = CHAT_MAX_NEW_TOKENS if name == "chatbot" else MAX_NEW_TOKENS
            access = guarded if prefix else Access()
            app = gated(bot, original).bind(
                gate.actor, model=model, max_new_tokens=limit, access=access
            )
            targets.append(serve.RunTarget(app, name=name, route_prefix=f"/{name}"))
            running[name] = Bot(f"127.0.0.1:{port}/{name}/", gate)
    serve.run_many(targets)
    for bot in running.values():  # HAProxy learns of them a little later
        wait_until(partial(answers, bot), HANG_S, f"{bot.http} is not there")
    return Bots(**running)


@pytest.fixture
def run_other(port: int) -> Iterator[Callable[[Application], Bot]]:
    """Runs one more application beside the bots, for one test."""

    def run(app: Application) -> Bot:
        serve.run(app, name="other", route_prefix="/other")
        return Bot(f"127.0.0.1:{port}/other/", None)

    yield run
    serve.delete("other")


@pytest.fixture(scope="session")
def loaded() -> LoadedModel:
    """The embedded model in the tests' own process, to say what a reply must be."""
    torch.set_num_threads(1)
    return load_model(EMBEDDED)


def reference(loaded: LoadedModel, turns: list[str], max_new_tokens: int) -> str:
    """What `generate` in process replies to the turns of a conversation."""
    eos = loaded.tokenizer.eos_token
    input_ids = loaded.tokenizer(eos.join([*turns, ""]), return_tensors="pt")["input_ids"]
    output = loaded.model.generate(
        input_ids,
        attention_mask=torch.ones_like(input_ids),
        max_new_tokens=max_new_tokens,
        do_sample=False,
    )
    return loaded.tokenizer.decode(output[0, input_ids.shape[1] :], skip_special_tokens=True)


def http_reply(bot: Bot, prompt: str, max_new_tokens: int | None = None) -> str:
    """The whole reply of a Textbot or Batchbot."""
    body = {"prompt": prompt}
    if max_new_tokens is not None:
        body["max_new_tokens"] = max_new_tokens
    response = requests.post(bot.http, json=body, timeout=120)
    response.raise_for_status()
    return response.text
