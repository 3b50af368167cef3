"""`serve run` with arguments: what they change, and what a mistake costs."""

import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import psutil
import pytest
import requests
from requests.adapters import HTTPAdapter
from running_bots import HANG_S, reference
from serve_run import ENVIRONMENT, SERVE, serve_run
from urllib3.util import Retry


def test_arguments_configure_a_bot(checkout, emoji_model):
    arguments = [f"model={emoji_model}", "max_new_tokens=3", "num_cpus=0.5"]
    with serve_run(checkout, "textbot:build", *arguments):
        response = requests.post("http://localhost:8000/?prompt=x")
        assert response.headers["X-Model"] == str(emoji_model)
        assert len(response.text) == 3
        response = requests.post("http://localhost:8000/?prompt=x&max_new_tokens=4")
        assert response.status_code == 422


@pytest.mark.parametrize(
    ("bot", "client", "url"),
    [("textbot", "stream", "http://localhost:8000/"), ("chatbot", "chat", "ws://localhost:8000/")],
)
def test_a_client_that_is_early_says_so_and_waits(checkout, loaded, bot, client, url):
    command = [sys.executable, f"clients/{client}_client.py"]
    command += ["Hello!"] if client == "stream" else []
    with subprocess.Popen(
        command,
        cwd=checkout,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as early:
        waiting = f"waiting up to 60 s for {url} (Ctrl-C leaves)\n"
        assert early.stderr.readline() == waiting  # before the bot is even started
        with serve_run(checkout, f"{bot}:app"):
            printed, problems = early.communicate("Hello!\n", timeout=HANG_S)
    assert printed == reference(loaded, ["Hello!"], 256) + "\n"
    assert (problems, early.returncode) == ("", 0)


def test_the_config_for_haproxy_answers_this_machine_only(checkout, loaded):
    environment = {"RAY_SERVE_ENABLE_HA_PROXY": "1", "RAY_SERVE_THROUGHPUT_OPTIMIZED": "1"}
    submitted = "Submitted deploy config"  # `serve run` says no more of a config file
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


def test_what_ctrl_c_cuts_is_seen_as_cut(checkout, loaded):
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


@pytest.mark.parametrize(
    ("argument", "parts"),
    [
        ("max_new_tokens=0", ["max_new_tokens", "greater than 0"]),
        ("modell=x", ["modell", "Extra inputs are not permitted"]),
        ("model=./nowhere", ["'./nowhere'", "there is no folder", "give a hub id"]),
    ],
)
def test_a_mistake_is_named_and_ends_with_status_1(checkout, argument, parts):
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
    for part in parts:
        assert any(part in line for line in end), ran.stderr
