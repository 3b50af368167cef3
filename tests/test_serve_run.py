"""`serve run` in a subprocess: its output, its arguments, and mistakes."""

import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import psutil
import pytest
import requests
from bot_fixtures import HANG_S, REPOSITORY, reference
from products import cases
from readme import check_log, check_transcripts
from requests.adapters import HTTPAdapter
from serve_command import ENVIRONMENT, READY_S, SERVE, serve_run
from urllib3.util import Retry

pytestmark = pytest.mark.usefixtures("port_8000")


class Run(NamedTuple):
    """`serve run textbot:app`."""

    printed: list[str]
    early: subprocess.CompletedProcess[str]  # the client that started before the bot


@pytest.fixture(scope="module")
def textbot(port_8000: None, checkout: Path) -> Iterator[Run]:
    with (
        early_client(checkout, "stream", "Hello!") as answered,
        serve_run(checkout, "textbot:app") as printed,
    ):
        yield Run(printed, answered())


@contextmanager
def early_client(folder: Path, name: str, *arguments: str) -> Iterator:
    """Start a client before its bot; yield a function that waits for the client to end."""
    command = [sys.executable, f"clients/{name}_client.py", "--wait", str(READY_S), *arguments]
    pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    with subprocess.Popen(command, cwd=folder, text=True, **pipes) as client:
        waiting = client.stderr.readline()  # before the bot is even started

        def answered() -> subprocess.CompletedProcess[str]:
            printed, problems = client.communicate("Hello!\n", timeout=HANG_S)
            return subprocess.CompletedProcess(
                command, client.returncode, printed, waiting + problems
            )

        yield answered


def test_a_client_that_is_early_says_so_and_waits(textbot, loaded):
    assert textbot.early.stdout == reference(loaded, ["Hello!"], 256) + "\n"
    waiting = f"waiting up to {READY_S} s for http://localhost:8000/ (Ctrl-C leaves)\n"
    assert (textbot.early.stderr, textbot.early.returncode) == (waiting, 0)


def test_the_readme_shows_what_serve_run_and_the_clients_print(textbot, checkout):
    check_transcripts("textbot", checkout)
    check_log(textbot.printed)


def test_serve_status_needs_the_token_as_the_troubles_say(textbot, checkout):
    """The first command here gives the quoted error, and the one that is shown does not."""
    quoted, shown = re.search(
        r"### serve status asks for a token\n+```log\n(.*?)\n```.*?```console\n\$ (.*?)\n```",
        (REPOSITORY / "docs" / "troubleshooting.md").read_text(),
        re.DOTALL,
    ).groups()

    def status(command: str) -> subprocess.CompletedProcess[str]:
        environment = ENVIRONMENT | {"PATH": f"{SERVE.parent}:{ENVIRONMENT['PATH']}"}
        return subprocess.run(
            command, shell=True, cwd=checkout, env=environment, capture_output=True, text=True
        )

    refused, allowed = status("serve status"), status(shown)
    assert (refused.returncode, allowed.returncode) == (1, 0)
    assert quoted in refused.stderr
    assert "status: RUNNING" in allowed.stdout


@pytest.mark.exhaustive
def test_a_chat_client_that_is_early_says_so_and_waits(checkout, loaded):
    with early_client(checkout, "chat") as answered, serve_run(checkout, "chatbot:app"):
        early = answered()
    assert early.stdout == reference(loaded, ["Hello!"], 256) + "\n"
    waiting = f"waiting up to {READY_S} s for ws://localhost:8000/ (Ctrl-C leaves)\n"
    assert (early.stderr, early.returncode) == (waiting, 0)


@pytest.mark.exhaustive
def test_arguments_configure_a_bot(checkout, emoji_model):
    arguments = [f"model={emoji_model}", "max_new_tokens=3", "num_cpus=0.5"]
    with serve_run(checkout, "textbot:build", *arguments):
        response = requests.post("http://localhost:8000/?prompt=x")
        assert response.headers["X-Model"] == emoji_model.name
        assert len(response.text) == 3
        response = requests.post("http://localhost:8000/?prompt=x&max_new_tokens=4")
        assert response.status_code == 422


@pytest.mark.exhaustive
def test_clients_see_that_ctrl_c_has_cut_their_replies(checkout, loaded):
    prompt, cut = "Tell me a story about dogs.", requests.exceptions.ChunkedEncodingError
    whole, begun = reference(loaded, [prompt], 256), threading.Event()

    def ask(_: int) -> str:
        with requests.post(
            "http://localhost:8000/", params={"prompt": prompt}, stream=True
        ) as reply:
            begun.set()
            return reply.content.decode() if reply.ok else str(reply.status_code)

    with ThreadPoolExecutor(60) as threads:
        with serve_run(checkout, "textbot:app"):
            replies = [threads.submit(ask, number) for number in range(60)]
            assert begun.wait(HANG_S)
        errors = [reply.exception() for reply in replies]
    assert any(isinstance(error, cut | requests.ConnectionError) for error in errors)
    for reply, error in zip(replies, errors, strict=True):
        if error is None:
            assert reply.result() in (whole, "500", "503")
        else:
            assert isinstance(error, cut | requests.ConnectionError)


@pytest.mark.cluster
def test_the_config_for_haproxy_answers_this_machine_only(checkout, loaded):
    environment = {
        "RAY_SERVE_ENABLE_HA_PROXY": "1",
        "RAY_SERVE_THROUGHPUT_OPTIMIZED": "1",
        "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S": "1",  # else shutting down takes 30 s
    }
    submitted = "Submitted deploy config"  # for a config file, `serve run` prints nothing later
    until_ready = Retry(
        100, status_forcelist=[404, 503], allowed_methods=None, backoff_factor=1, backoff_max=1
    )
    with (
        serve_run(checkout, "deploy/haproxy.yaml", ready_line=submitted, **environment),
        requests.Session() as session,
    ):
        session.mount("http://", HTTPAdapter(max_retries=until_ready))
        response = session.post("http://localhost:8000/?prompt=Hello!")
        assert response.text == reference(loaded, ["Hello!"], 256)
        listening = {
            tuple(connection.laddr)
            for connection in psutil.net_connections("tcp")
            if connection.status == psutil.CONN_LISTEN
        }
    ports = (8000, 8500, 30000)  # HAProxy, Serve's own proxy in reserve, and the replica
    found = {(address, port) for address, port in listening if port in ports}
    assert found == {("127.0.0.1", port) for port in ports}


MISTAKES = {
    "max_new_tokens=0": ["max_new_tokens", "greater than 0"],
    "modell=x": ["modell", "Extra inputs are not permitted"],
    "model=./nowhere": ["'./nowhere'", "there is no folder", "give a hub id"],
}


# Serve names what is wrong with the arguments. `build` names what is wrong with the model.
@pytest.mark.parametrize(
    "argument", cases(MISTAKES, chosen=lambda argument: argument == "model=./nowhere")
)
def test_a_mistake_is_named_and_ends_with_status_1(checkout, argument):
    ran = subprocess.run(
        [SERVE, "run", "textbot:build", argument],
        cwd=checkout,
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert ran.returncode == 1
    end = ran.stderr.strip().splitlines()[-4:]
    for part in MISTAKES[argument]:
        assert any(part in line for line in end), ran.stderr
