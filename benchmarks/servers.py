"""Starts, suspends and ends the servers to measure."""

import os
import shlex
import signal
import socket
import subprocess
import time
import urllib.parse
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import psutil
from load import Ask, openai

REPOSITORY = Path(__file__).parent.parent
SETTINGS = {
    "haproxy": {"RAY_SERVE_ENABLE_HA_PROXY": "1", "RAY_SERVE_THROUGHPUT_OPTIMIZED": "1"},
    # Ray's workers get the priority of its daemons, and the controller runs less often.
    "calm": {"RAY_worker_niceness": "0", "RAY_SERVE_CONTROL_LOOP_INTERVAL_S": "2"},
}
START_S = 300  # longest start of a server
END_S = 120  # longest end; HAProxy takes half a minute
SETTLE_S = 1  # until a resumed server has caught up


@dataclass
class Server:
    """A server, the command that starts it, and how to ask it."""

    name: str
    command: list[str]
    ask: Ask
    ready: str  # a URL that answers once the server is ready
    environment: dict[str, str] = field(default_factory=dict)

    @contextmanager
    def running(self, log: Path) -> Iterator[psutil.Process]:
        if listens(self.ready):
            raise SystemExit(f"something else answers at {self.ready} already")
        environment = os.environ | {"RAY_USAGE_STATS_ENABLED": "0"} | self.environment
        with log.open("a") as output:
            process = subprocess.Popen(
                self.command, cwd=REPOSITORY, env=environment, stdout=output, stderr=output
            )
        try:
            deadline = time.monotonic() + START_S
            while not answers(self.ready):
                if process.poll() is not None or time.monotonic() > deadline:
                    lines = log.read_text(errors="replace").splitlines()[-20:]
                    raise SystemExit("\n".join([*lines, f"{self.name} does not start"]))
                time.sleep(0.5)
            yield psutil.Process(process.pid)
        finally:
            process.send_signal(signal.SIGINT)
            try:
                process.wait(60)
            except subprocess.TimeoutExpired:
                process.kill()
            deadline = time.monotonic() + END_S
            while listens(self.ready) and time.monotonic() < deadline:
                time.sleep(0.5)


@contextmanager
def stopped(server: psutil.Process) -> Iterator[None]:
    """Suspend a server and its child processes during the `with` block."""
    family = [server, *server.children(recursive=True)]
    try:
        signal_all(family, signal.SIGSTOP)
        yield
    finally:
        signal_all(family, signal.SIGCONT)
        time.sleep(SETTLE_S)


def signal_all(processes: list[psutil.Process], number: int) -> None:
    for process in processes:
        with suppress(psutil.NoSuchProcess):
            process.send_signal(number)


def listens(url: str) -> bool:
    address = urllib.parse.urlsplit(url)
    with socket.socket() as probe:
        return probe.connect_ex((address.hostname, address.port)) == 0


def answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=5):
            return True
    except OSError:
        return False


def our_bot(name: str, model: Path, arguments: list[str]) -> Server:
    """Return a bot by name, such as `textbot`, or `textbot+haproxy+calm` with those SETTINGS."""
    module, *settings = name.split("+")
    environment = {key: value for name in settings for key, value in SETTINGS[name].items()}
    return Server(
        name,
        ["serve", "run", f"{module}:build", f"model={model}", *arguments],
        openai("http://127.0.0.1:8000/v1", model.name),
        "http://127.0.0.1:8000/v1/models",
        environment,
    )


def peer(definition: str, model: Path) -> Server:
    """Return a peer from `NAME=URL=COMMAND`; {model} in the command is the model's folder."""
    name, url, command = definition.split("=", 2)
    words = shlex.split(command.replace("{model}", str(model)))
    return Server(name, words, openai(url, str(model)), f"{url}/models")
