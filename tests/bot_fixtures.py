"""What tests share: bots in this process, bots on a real Serve, and their expected replies."""

import fcntl
import os
import shutil
import socket
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import ray
import requests
import torch
from gates import Gate, Gates, RemoteGate
from huggingface_hub import constants
from local_serve import LocalServe
from playwright.sync_api import Browser, sync_playwright
from ray import serve
from ray.serve import Application
from scripted_model import save_scripted_model
from stepped_bots import stepped

from streaming_bots.generation.sampling import Sampler, SamplingLogitsProcessor
from streaming_bots.models.loaded_model import LoadedModel, load_model
from streaming_bots.models.source import BUNDLED
from streaming_bots.settings import BatchSettings

REPOSITORY = Path(__file__).parent.parent
EMOJI_REPLY = "🎉 你好，世界! 👩‍👩‍👧 żółw 🐢🐢 <> <b>end</b>"
EMOJI_PROMPT = "Say it."
MAX_NEW_TOKENS = 96
CHAT_MAX_NEW_TOKENS = 400
ALLOWED_ORIGIN = "https://chat.example.org"
KEY = "correct-horse-battery-staple"
WITH_KEY = {"Authorization": f"Bearer {KEY}"}
INGRESS = "haproxy" if os.environ["RAY_SERVE_ENABLE_HA_PROXY"] == "1" else "default"
V1 = "/v1"  # suffix of a bot's name: ask it through OpenAI's routes
HANG_S = 120  # only bounds a hang


def wait_until(condition: Callable[[], Any], within_s: float, what: str) -> None:
    """Wait until the condition holds. If it does not in time, fail with `what` as the reason."""
    deadline = time.monotonic() + within_s
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(0.2)


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


class Bot(NamedTuple):
    """A running bot."""

    address: str  # without the scheme, which is http:// or ws://
    gate: Gate | None = None
    call: Callable[..., Any] | None = None  # calls a method of the bot, by its name

    @property
    def http(self) -> str:
        return f"http://{self.address}"

    @property
    def ws(self) -> str:
        return f"ws://{self.address}"


def arguments_of(name: str, emoji_model: Path, key_file: Path) -> dict[str, Any]:
    """Return the constructor arguments of one of the tests' bots.

    `textbot` and others use the bundled model. `emoji_textbot` and others need a key, and their
    model writes emoji and Chinese. The Chatbot's context holds only a few exchanges, so that tests
    soon exceed it.
    """
    if name.startswith("emoji_"):
        return {
            "model": str(emoji_model),
            "max_new_tokens": MAX_NEW_TOKENS,
            "allowed_origins": [ALLOWED_ORIGIN],
            "api_key_file": key_file,
            "num_cpus": 1,
        }
    limit = CHAT_MAX_NEW_TOKENS if name.endswith("chatbot") else MAX_NEW_TOKENS
    return {"model": BUNDLED, "max_new_tokens": limit, "num_cpus": 1}


@pytest.fixture(scope="session")
def emoji_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("emoji-model")
    save_scripted_model(folder, len(EMOJI_PROMPT), EMOJI_REPLY)
    return folder


@pytest.fixture(scope="session")
def key_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("access") / "key"
    file.write_text(KEY)
    return file


# In this process


@pytest.fixture(scope="session")
def local_serve() -> Iterator[LocalServe]:
    torch.set_num_threads(1)
    local = LocalServe()
    yield local
    local.stop()


class Bots:
    """The bots in this process, by name. Each bot starts when a test first asks for it."""

    def __init__(self, local: LocalServe, arguments: Callable[[str], dict[str, Any]]) -> None:
        self.local = local
        self.arguments = arguments
        self.started: dict[str, Bot] = {}

    def __getattr__(self, name: str) -> Bot:
        if name not in self.started:
            kind, gate = name.removeprefix("emoji_"), Gate()
            app = stepped(kind, gate, {}, **self.arguments(name))
            self.started[name] = self.run(app, name, gate)
        return self.started[name]

    def run(self, app: Application, name: str, gate: Gate) -> Bot:
        self.local.run(app, f"/{name}")
        call = partial(self.local.call, f"/{name}")
        return Bot(f"127.0.0.1:{self.local.port}/{name}/", gate, call)


@pytest.fixture(scope="session")
def bots(local_serve: LocalServe, emoji_model: Path, key_file: Path) -> Bots:
    return Bots(local_serve, partial(arguments_of, emoji_model=emoji_model, key_file=key_file))


@pytest.fixture
def run_other(bots: Bots) -> Callable[[Application], Bot]:
    """Runs one more application beside the bots, without a gate."""
    return partial(bots.run, name="other", gate=None)


@pytest.fixture(scope="module")
def port_8000() -> Iterator[None]:
    """The port of the commands in the documents. Tests that run beside these wait for it."""
    folder = os.open(tempfile.gettempdir(), os.O_RDONLY)
    fcntl.flock(folder, fcntl.LOCK_EX)
    yield
    os.close(folder)


@pytest.fixture
def local_8000(port_8000: None, monkeypatch: pytest.MonkeyPatch) -> Iterator[LocalServe]:
    """A local Serve where the commands in the documents find a bot, without a hub."""
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    local = LocalServe(8000)
    yield local
    local.stop()


CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
needs_gpu = pytest.mark.skipif(
    not torch.cuda.is_available(), reason="torch sees no GPU on this machine"
)
needs_chromium = pytest.mark.skipif(
    CHROMIUM is None, reason="needs Chromium: apt-get install chromium"
)


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


# On a real Serve


@pytest.fixture(scope="session")
def port() -> Iterator[int]:
    """The port of a Serve that ends with the tests."""
    port = free_port()
    path = f"{REPOSITORY}{os.pathsep}{REPOSITORY / 'tests'}"
    ray.init(
        address="local",
        num_cpus=16,  # bookkeeping: decides how many replicas fit, not how fast they run
        include_dashboard=False,
        log_to_driver=False,
        runtime_env={"env_vars": {"PYTHONPATH": path}},
        # Tests read the metrics, so 10 s is too long. At 1 s, a busy machine lost some.
        _system_config={"metrics_report_interval_ms": 4000},
    )
    serve.start(http_options={"host": "127.0.0.1", "port": port})
    yield port
    serve.shutdown()
    ray.shutdown()


@pytest.fixture(scope="session")
def new_gate(port: int) -> Callable[[], RemoteGate]:
    """Makes gates for replicas. Each held step and each waiting test takes a thread."""
    gates = ray.remote(Gates).options(num_cpus=0, max_concurrency=64).remote()
    return partial(map(partial(RemoteGate, gates), count()).__next__)


def answers(bot: Bot) -> bool:
    headers = requests.get(bot.http, timeout=HANG_S).headers
    return "X-Model" in headers or "WWW-Authenticate" in headers


def call_replica(application: str, method: str, *arguments: Any) -> Any:
    """Return what a method of an application's replica returns, or raise what it raises."""

    def call() -> Any:
        handle = serve.get_app_handle(application)
        return getattr(handle, method).remote(*arguments).result(timeout_s=HANG_S)

    with ThreadPoolExecutor(1) as thread:  # the handle fails where an event loop runs
        return thread.submit(call).result()


def run_on_serve(port: int, apps: dict[str, tuple[Application, Gate]]) -> dict[str, Bot]:
    """Deploy applications together, and wait until the ingress knows them all."""
    serve.run_many(
        [
            serve.RunTarget(app, name=name, route_prefix=f"/{name}")
            for name, (app, _) in apps.items()
        ]
    )
    running = {
        name: Bot(f"127.0.0.1:{port}/{name}/", gate, partial(call_replica, name))
        for name, (_, gate) in apps.items()
    }
    for bot in running.values():  # HAProxy learns of the bots a little later
        wait_until(partial(answers, bot), HANG_S, f"{bot.http} is not there")
    return running


@pytest.fixture(scope="session")
def served_bots(
    request: pytest.FixtureRequest,
    port: int,
    new_gate: Callable[[], RemoteGate],
    emoji_model: Path,
    key_file: Path,
) -> dict[str, Bot]:
    """The bots on a real Serve, by name: only those that the selected tests ask for."""
    names = set()
    for item in request.session.items:
        callspec, serves = getattr(item, "callspec", None), item.get_closest_marker("serves")
        names.update(serves.args if serves else [])
        names.update(
            [callspec.params["served"].removesuffix(V1)]
            if callspec and "served" in callspec.params
            else []
        )
    apps = {}
    for name in sorted(names):
        gate = new_gate()
        arguments = arguments_of(name, emoji_model, key_file)
        apps[name] = stepped(name.removeprefix("emoji_"), gate, {}, **arguments), gate
    return run_on_serve(port, apps)


@pytest.fixture
def served(request: pytest.FixtureRequest, served_bots: dict[str, Bot]) -> Bot:
    """One bot on a real Serve, by parameter. Its model runs freely."""
    bot = served_bots[request.param.removesuffix(V1)]
    bot.call("flush")
    bot.gate.open()
    return bot


# The replies that tests expect


@pytest.fixture(scope="session")
def loaded() -> LoadedModel:
    """The bundled model in the tests' own process, for the expected replies."""
    torch.set_num_threads(1)
    return load_model(BUNDLED)


def reference(
    loaded: LoadedModel, turns: list[str], max_new_tokens: int, sampler: Sampler | None = None
) -> str:
    """Return the reply of `generate`, in process, to the turns of a conversation."""
    eos = loaded.tokenizer.eos_token
    input_ids = loaded.tokenizer(eos.join([*turns, ""]), return_tensors="pt")["input_ids"]
    input_ids = input_ids.to(loaded.model.device)
    output = loaded.model.generate(
        input_ids,
        attention_mask=torch.ones_like(input_ids),
        max_new_tokens=max_new_tokens,
        do_sample=False,
        logits_processor=[SamplingLogitsProcessor([sampler])] if sampler else [],
    )
    return loaded.tokenizer.decode(output[0, input_ids.shape[1] :], skip_special_tokens=True)


def http_reply(bot: Bot, prompt: str, max_new_tokens: int | None = None) -> str:
    """The whole reply of a Textbot, Batchbot or Continuousbot."""
    body = {"prompt": prompt}
    if max_new_tokens is not None:
        body["max_new_tokens"] = max_new_tokens
    response = requests.post(bot.http, json=body, timeout=120)
    response.raise_for_status()
    return response.text


def batches_of(
    bot: Bot,
    size: int = BatchSettings().max_batch_size,
    wait_s: float = BatchSettings().batch_wait_timeout_s,
) -> None:
    """Make a Batchbot begin a batch at `size` requests, or after `wait_s` seconds."""
    bot.call("reconfigure", {"max_batch_size": size, "batch_wait_timeout_s": wait_s})


# On this machine


@pytest.fixture(scope="session")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the repository's files, apart from the installed ones."""
    ignored = shutil.ignore_patterns(".*", "__pycache__", "*.egg-info", "tests")
    folder = tmp_path_factory.mktemp("checkout") / "repository"
    return Path(shutil.copytree(REPOSITORY, folder, ignore=ignored))
