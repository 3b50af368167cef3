"""Replicas that follow the load, and end without costing anybody a reply."""

import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager

import pytest
from callers import ChatCaller, HttpCaller, ask, receive
from gated import Gate, GatedChatbot, GatedTextbot, gated
from ray import serve
from running_bots import HANG_S, MAX_NEW_TOKENS, REPOSITORY, Bot, reference
from websockets.exceptions import ConnectionClosedError
from websockets.frames import Close
from websockets.sync.client import ClientConnection, connect

from chatbot import Chatbot
from serving.arguments import BotArguments, ChatbotArguments
from serving.locating import EMBEDDED
from textbot import Textbot

BOTS = {
    "textbot": (GatedTextbot, Textbot, BotArguments),
    "chatbot": (GatedChatbot, Chatbot, ChatbotArguments),
}
AT_ONCE = {
    "max_replicas": 4,
    "target_ongoing_requests": 1,
    "metrics_interval_s": 0.5,
    "look_back_period_s": 2,
    "upscale_delay_s": 0,
    "downscale_delay_s": 1,
}


@contextmanager
def scaling(name: str, port: int) -> Iterator[tuple[Bot, Callable[[], None]]]:
    """A bot of its own as `num_replicas=auto` makes it, but quicker, and what deploys it anew."""
    bot, original, arguments = BOTS[name]
    gate, prefix = Gate(), f"scaling-{name}"
    settings = arguments(num_replicas="auto", num_cpus=0.1).deployment_options()
    settings["autoscaling_config"] |= AT_ONCE

    def deploy() -> None:
        app = gated(bot, original).options(**settings)
        app = app.bind(gate.actor, model=EMBEDDED, max_new_tokens=MAX_NEW_TOKENS)
        serve.run(app, name=prefix, route_prefix=f"/{prefix}")

    deploy()
    try:
        yield Bot(f"127.0.0.1:{port}/{prefix}/", gate), deploy
    finally:
        serve.delete(prefix)


def replicas(name: str) -> Counter[str]:
    """How many are in which state."""
    (deployment,) = serve.status().applications[f"scaling-{name}"].deployments.values()
    return Counter(deployment.replica_states)


def wait_for(name: str, most: int = 4, **states: int) -> None:
    """Wait until so many replicas are in these states; at no time may more than `most` be there."""
    deadline = time.monotonic() + HANG_S
    while any((now := replicas(name))[state] != number for state, number in states.items()):
        assert now["STARTING"] + now["RUNNING"] <= most, now
        assert time.monotonic() < deadline, now
        time.sleep(0.1)


def closed(websocket: ClientConnection) -> Close:
    """How the bot closes a socket on which nothing more comes."""
    with pytest.raises(ConnectionClosedError) as error:
        websocket.recv(timeout=HANG_S)
    return error.value.rcvd


STORY = "Tell me a story about dogs."


def test_the_chatbot_follows_replies_not_sockets_and_a_downscale_cuts_none(port, loaded):
    story = reference(loaded, [STORY], MAX_NEW_TOKENS)
    with scaling("chatbot", port) as (bot, _), ExitStack() as sockets:
        idle = [sockets.enter_context(connect(bot.ws)) for _ in range(6)]
        bot.gate.hold_after(3)
        leaving = [ChatCaller(bot, STORY), ChatCaller(bot, STORY)]
        wait_for("chatbot", RUNNING=2, most=2)  # not one for each of eight sockets

        # The new replica has no sockets yet, so that these come to it, once the proxy knows it.
        while True:
            staying = sockets.enter_context(connect(bot.ws))
            staying.send(STORY)
            if bot.gate.happens("step", 5, within_s=5):  # the first four are the old one's
                break
            staying.close()
        beside = sockets.enter_context(connect(bot.ws))
        for caller in leaving:
            caller.leave("close")
        wait_for("chatbot", RUNNING=1, STOPPING=1)  # one reply needs one replica, the older
        assert closed(beside).code == 1012  # the other one knows now that it ends
        bot.gate.release()
        assert "".join(receive(staying)) == story
        assert closed(staying).code == 1012
        wait_for("chatbot", RUNNING=1, STOPPING=0)
        for websocket in idle:
            assert ask(websocket, "Hello!") == reference(loaded, ["Hello!"], MAX_NEW_TOKENS)


def test_the_textbot_follows_its_requests(port, loaded):
    story = reference(loaded, [STORY], MAX_NEW_TOKENS)
    with scaling("textbot", port) as (bot, _):
        bot.gate.hold_after(3)
        callers = [HttpCaller(bot, STORY) for _ in range(3)]
        wait_for("textbot", RUNNING=3, most=3)
        bot.gate.release()
        assert [caller.outcome() for caller in callers] == ["finished"] * 3
        assert {caller.text for caller in callers} == {story}
        wait_for("textbot", RUNNING=1, STOPPING=0)


@pytest.mark.parametrize("end", ["replaced", "killed"])
def test_the_chat_client_connects_again_when_its_idle_socket_is_closed(port, loaded, end):
    hello = reference(loaded, ["Hello!"], MAX_NEW_TOKENS)
    with (
        scaling("chatbot", port) as (bot, deploy),
        subprocess.Popen(
            [sys.executable, "clients/chat_client.py", "--url", bot.ws],
            cwd=REPOSITORY,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        ) as client,
    ):
        client.stdin.write("Hello!\n")
        client.stdin.flush()
        assert client.stdout.readline() == hello + "\n"
        if end == "replaced":
            deploy()
            wait_for("chatbot", RUNNING=1, STOPPING=0)
        else:
            process = serve.get_app_handle("scaling-chatbot").process.remote().result()
            bot.gate.open()
            os.kill(process, signal.SIGKILL)
            bot.gate.wait("started", 1)
            wait_for("chatbot", RUNNING=1)
        printed, problems = client.communicate("Hello!\n", timeout=HANG_S)
    assert printed == hello + "\n"
    assert problems == "(connected again: a new conversation)\n"
    assert client.returncode == 0


def test_a_replica_that_ends_answers_what_it_was_asked_and_refuses_the_rest(port, loaded):
    with (
        scaling("chatbot", port) as (bot, deploy),
        connect(bot.ws, subprotocols=["chat.v1"]) as websocket,
        connect(bot.ws) as idle,
        ThreadPoolExecutor(1) as thread,
    ):
        bot.gate.hold_after(3)

        def send(prompt: str) -> None:
            websocket.send(json.dumps({"type": "prompt", "prompt": prompt}))

        send("Hello!")
        send("My name is Anna.")
        bot.gate.wait("step", 4)
        deployed = thread.submit(deploy)
        end = closed(idle)  # the replica knows now that it ends
        assert (end.code, "connect again" in end.reason) == (1012, True)
        send("What is my name?")
        bot.gate.release()
        messages = []
        with pytest.raises(ConnectionClosedError) as error:
            while True:
                messages.append(json.loads(websocket.recv(timeout=HANG_S)))
        assert [m["finish_reason"] for m in messages if m["type"] == "done"] == ["stop", "stop"]
        assert error.value.rcvd.code == 1012
        deployed.result()
