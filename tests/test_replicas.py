"""Replicas scale with the load, are replaced and end, and no client loses a reply."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from typing import Any

import pytest
from bot_fixtures import HANG_S, MAX_NEW_TOKENS, REPOSITORY, reference
from callers import ChatCaller, HttpCaller, ask, receive
from deployments import Deployed, deployed
from gates import Gate
from websockets.exceptions import ConnectionClosedError
from websockets.frames import Close
from websockets.sync.client import ClientConnection, connect

from streaming_bots.settings import BotSettings, ChatbotSettings

ARGUMENTS = {"textbot": BotSettings, "chatbot": ChatbotSettings}
HELLO, STORY = "Hello!", "Tell me a story about dogs."
AT_ONCE = {
    "max_replicas": 4,
    "target_ongoing_requests": 1,
    "metrics_interval_s": 0.5,
    "look_back_period_s": 2,
    "upscale_delay_s": 0,
    "downscale_delay_s": 1,
}


def scaling(name: str) -> dict[str, Any]:
    """Return the options of a bot with `num_replicas=auto`, but with quicker scaling."""
    options = ARGUMENTS[name](num_replicas="auto", num_cpus=0.1).deployment_options()
    options["autoscaling_config"] |= AT_ONCE
    return options


@pytest.fixture(scope="module")
def chatbot(port: int, new_gate: Callable[[], Gate]) -> Iterator[Deployed]:
    with deployed("chatbot", port, new_gate(), **scaling("chatbot")) as chatbot:
        yield chatbot


def closed(websocket: ClientConnection) -> Close:
    """Return how the bot closes a socket; fail if a message arrives first."""
    with pytest.raises(ConnectionClosedError) as error:
        websocket.recv(timeout=HANG_S)
    return error.value.rcvd


def test_the_chatbot_scales_with_replies_not_sockets_and_a_downscale_cuts_no_reply(chatbot, loaded):
    story, bot = reference(loaded, [STORY], MAX_NEW_TOKENS), chatbot.bot
    with ExitStack() as sockets:
        idle = [sockets.enter_context(connect(bot.ws)) for _ in range(6)]
        bot.gate.hold_after(3)
        leaving = [ChatCaller(bot, STORY), ChatCaller(bot, STORY)]
        chatbot.wait_for(RUNNING=2, most=2)  # not one for each of eight sockets

        # The new replica has no sockets yet. Once the proxy knows it, these sockets go to it.
        while True:
            staying = sockets.enter_context(connect(bot.ws))
            staying.send(STORY)
            if bot.gate.happens("step", 5, 5):  # the old replica took the first four
                break
            staying.close()
        beside = sockets.enter_context(connect(bot.ws))
        for caller in leaving:
            caller.leave("close")
        chatbot.wait_for(RUNNING=1, STOPPING=1)  # one reply needs one replica, the older one
        assert closed(beside).code == 1012  # the other one now knows that it must end
        bot.gate.release()
        assert "".join(receive(staying)) == story
        assert closed(staying).code == 1012
        chatbot.wait_for(RUNNING=1, STOPPING=0)
        for websocket in idle:
            assert ask(websocket, HELLO) == reference(loaded, [HELLO], MAX_NEW_TOKENS)


@pytest.mark.exhaustive
def test_the_textbot_scales_with_its_requests(port, new_gate, loaded):
    story = reference(loaded, [STORY], MAX_NEW_TOKENS)
    with deployed("textbot", port, new_gate(), **scaling("textbot")) as textbot:
        textbot.gate.hold_after(3)
        callers = [HttpCaller(textbot.bot, STORY) for _ in range(3)]
        textbot.wait_for(RUNNING=3, most=3)
        textbot.gate.release()
        assert [caller.outcome() for caller in callers] == ["finished"] * 3
        assert {caller.text for caller in callers} == {story}
        textbot.wait_for(RUNNING=1, STOPPING=0)


@contextmanager
def chat_client(url: str, hello: str) -> Iterator[subprocess.Popen[str]]:
    """Run clients/chat_client.py for one reply; a second reply begins a new conversation."""
    command = [sys.executable, "clients/chat_client.py", "--url", url]
    pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    with subprocess.Popen(command, cwd=REPOSITORY, text=True, **pipes) as client:
        client.stdin.write(f"{HELLO}\n")
        client.stdin.flush()
        assert client.stdout.readline() == f"{hello}\n"
        yield client
        printed, problems = client.communicate(f"{HELLO}\n", timeout=HANG_S)
    assert printed == f"{hello}\n"
    assert problems == "(connected again: a new conversation)\n"
    assert client.returncode == 0


def test_a_replaced_replica_answers_its_prompts_and_the_client_connects_again(chatbot, loaded):
    hello, bot = reference(loaded, [HELLO], MAX_NEW_TOKENS), chatbot.bot
    bot.gate.open()
    with (
        chat_client(bot.ws, hello),
        connect(bot.ws, subprotocols=["chat.v1"]) as websocket,
        connect(bot.ws) as idle,
        ThreadPoolExecutor(1) as thread,
    ):
        bot.gate.hold_after(3)

        def send(prompt: str) -> None:
            websocket.send(json.dumps({"type": "prompt", "prompt": prompt}))

        send(HELLO)
        send("My name is Anna.")
        bot.gate.wait("step", 4)
        deploying = thread.submit(chatbot.deploy)
        end = closed(idle)  # the replica now knows that it must end
        assert (end.code, "connect again" in end.reason) == (1012, True)
        send("What is my name?")
        bot.gate.release()
        messages = []
        with pytest.raises(ConnectionClosedError) as error:
            while True:
                messages.append(json.loads(websocket.recv(timeout=HANG_S)))
        assert [m["finish_reason"] for m in messages if m["type"] == "done"] == ["stop", "stop"]
        texts = [message["text"] for message in messages if message["type"] == "text"]
        turns = [HELLO, hello, "My name is Anna."]
        assert "".join(texts) == hello + reference(loaded, turns, MAX_NEW_TOKENS)
        assert error.value.rcvd.code == 1012
        deploying.result()
        chatbot.wait_for(RUNNING=1, STOPPING=0)


@pytest.mark.exhaustive
def test_the_chat_client_connects_again_when_its_replica_was_killed(chatbot, loaded):
    chatbot.gate.open()
    with chat_client(chatbot.bot.ws, reference(loaded, [HELLO], MAX_NEW_TOKENS)):
        process = chatbot.bot.call("process")
        chatbot.gate.open()
        os.kill(process, signal.SIGKILL)
        chatbot.gate.wait("started", 1)
        chatbot.wait_for(RUNNING=1)
