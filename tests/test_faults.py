"""What can go wrong, by bot: what the client sees, what the model does, what is counted.

All of it holds on both of Serve's ingresses: `pytest` and `pytest -m haproxy`.
"""

import json
import os
import signal
import socket
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import urlsplit

import pytest
import ray
import requests
from callers import ChatCaller, HttpCaller
from gated import (
    DECODE_ERROR,
    ENCODE_ERROR,
    MAX_CHATS,
    Gate,
    GatedChatbot,
    GatedTextbot,
    gated,
)
from ray import serve
from running_bots import (
    ALLOWED_ORIGIN,
    CHAT_MAX_NEW_TOKENS,
    EMOJI_PROMPT,
    EMOJI_REPLY,
    HANG_S,
    INGRESS,
    KEY,
    MAX_NEW_TOKENS,
    WITH_KEY,
    Bot,
    Bots,
    reference,
)
from test_access import in_base64
from test_batchbot import batches_of
from websockets.exceptions import ConnectionClosedError, InvalidStatus
from websockets.sync.client import connect

from chatbot import MAX_WAITING, Chatbot
from serving.arguments import DEFAULT_BATCH_SIZE, DEFAULT_BATCH_WAIT_S
from serving.locating import EMBEDDED
from textbot import Textbot

if INGRESS == "haproxy":
    pytestmark = pytest.mark.haproxy

LONG = "Tell me a story about dogs."
SHORT = "Thank you, good night!"
OUTCOMES = ("finished", "failed", "cancelled", "refused")


class Subject:
    """A bot under test, and how one talks to it."""

    def __init__(self, name: str, bot: Bot) -> None:
        self.name, self.bot, self.gate = name, bot, bot.gate
        self.limit = CHAT_MAX_NEW_TOKENS if name == "chatbot" else MAX_NEW_TOKENS

    def call(self, prompt: str, limit: int | None = None, **options: dict[str, str]):
        caller = ChatCaller if self.name == "chatbot" else HttpCaller
        return caller(self.bot, prompt, limit, **options)

    def wait_for(self, **expected: int) -> None:
        """Wait until so many requests have had these outcomes, and see that there are no others."""
        for outcome, count in expected.items():
            self.gate.wait(outcome, count)
        counted = {outcome: self.gate.count(outcome) for outcome in OUTCOMES}
        assert counted == dict.fromkeys(OUTCOMES, 0) | expected

    def handle(self):
        return serve.get_app_handle(self.name)


@pytest.fixture(params=["textbot", "chatbot", "batchbot", "continuousbot"])
def subject(request: pytest.FixtureRequest, bots: Bots) -> Subject:
    subject = Subject(request.param, getattr(bots, request.param))
    subject.handle().flush.remote().result()
    subject.gate.open()
    return subject


# A Continuousbot has no queue before its places are taken, and a failure of the model ends it.
one_at_a_time = pytest.mark.parametrize(
    "subject", ["textbot", "chatbot", "batchbot"], indirect=True
)


@pytest.fixture
def batchbot(bots: Bots) -> Iterator[Subject]:
    """A Batchbot whose batches start as soon as, and not before, three requests are there."""
    bots.batchbot.gate.open()
    batches_of("batchbot", 3, wait_s=HANG_S)
    yield Subject("batchbot", bots.batchbot)
    batches_of("batchbot", DEFAULT_BATCH_SIZE, DEFAULT_BATCH_WAIT_S)


WAYS = ["close", "reset", "half-close"]


@one_at_a_time
@pytest.mark.parametrize("way", WAYS)
def test_a_client_that_leaves_the_queue_never_starts_the_model(subject, loaded, way):
    subject.gate.hold_after(0)
    staying = subject.call(SHORT, 2)
    subject.gate.wait("step", 1)
    leaving = subject.call(LONG)
    subject.gate.wait("asked" if subject.name == "batchbot" else "submitted", 2)
    leaving.leave(way)
    if overlooked(subject, requests=2):
        return
    subject.wait_for(cancelled=1)
    subject.gate.release()
    assert staying.outcome() == "finished"
    assert staying.text == reference(loaded, [SHORT], 2)
    following = subject.call(SHORT, 2)
    assert following.outcome() == "finished"
    assert subject.gate.count("step") == 2 + 2
    subject.wait_for(cancelled=1, finished=2)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(
    ("tokens", "limit"),
    [(0, None), (3, None), (2, 3)],
    ids=["before the first token", "in mid-reply", "at the last token"],
)
def test_a_client_that_leaves_stops_the_model_within_one_token(subject, loaded, tokens, limit, way):
    subject.gate.hold_after(tokens)
    leaving = subject.call(LONG, limit)
    if tokens:
        leaving.first()
    subject.gate.wait("step", tokens + 1)
    leaving.leave(way)
    if overlooked(subject, requests=1):
        return
    subject.wait_for(cancelled=1)
    subject.gate.release()
    following = subject.call(SHORT, 2)
    assert following.outcome() == "finished"
    assert following.text == reference(loaded, [SHORT], 2)
    assert subject.gate.count("step") == tokens + 1 + 2
    subject.wait_for(cancelled=1, finished=1)


def overlooked(subject: Subject, requests: int, leaving: int = 1) -> bool:
    """Whether HAProxy does not tell of all clients that have left.

    Version 2.8.25 now and then keeps the connection to the replica open, busily, and only notices
    when it has text to pass on. The reply must end then, at the latest by itself: a client that
    has only closed its own half may still read it.
    """
    if INGRESS != "haproxy" or subject.name == "chatbot":
        return False
    if subject.gate.happens("cancelled", leaving, within_s=3):
        return False
    subject.gate.release()
    subject.gate.wait("left", requests)
    return True


@one_at_a_time
@pytest.mark.parametrize("step", [1, 4], ids=["token 0", "token 3"])
def test_an_exception_of_the_model_fails_its_request_alone(subject, loaded, step):
    subject.gate.fail_at(step)
    caller = subject.call(LONG)
    assert caller.outcome() == "failed"
    if step > 1:
        assert caller.text == reference(loaded, [LONG], step - 1)
    following = subject.call(SHORT, 2)
    assert following.outcome() == "finished"
    assert following.text == reference(loaded, [SHORT], 2)
    subject.wait_for(failed=1, finished=1)


@pytest.mark.parametrize("prompt", [ENCODE_ERROR, DECODE_ERROR], ids=["encode", "decode"])
def test_an_exception_of_the_tokenizer_fails_its_request_alone(subject, loaded, prompt):
    assert subject.call(prompt).outcome() == "failed"
    following = subject.call(SHORT, 2)
    assert following.outcome() == "finished"
    assert following.text == reference(loaded, [SHORT], 2)
    subject.wait_for(failed=1, finished=1)


def test_a_slow_reader_gets_everything_and_holds_up_nobody(subject, loaded):
    slow = subject.call(LONG)
    quick = subject.call(SHORT, 2)
    assert quick.outcome() == "finished"
    subject.wait_for(finished=2)  # its whole reply is written, though it has read none of it
    assert slow.outcome() == "finished"
    assert slow.text == reference(loaded, [LONG], subject.limit)


@pytest.mark.parametrize("tokens", [0, 3], ids=["before the first token", "in mid-reply"])
def test_the_request_timeout_of_serve_stops_the_model(bots: Bots, loaded, tokens):
    for name in ("textbot", "batchbot", "continuousbot"):
        subject = Subject(name, getattr(bots, name))
        subject.gate.hold_after(tokens)
        caller = subject.call(LONG, headers={"X-Request-Timeout-Seconds": "1"})
        subject.gate.wait("step", tokens + 1)
        assert caller.outcome() in (("refused", "failed") if tokens == 0 else ("failed",))
        subject.wait_for(cancelled=1)
        subject.gate.release()
        assert subject.call(SHORT, 2).outcome() == "finished"
        assert subject.gate.count("step") == tokens + 1 + 2
        subject.wait_for(cancelled=1, finished=1)


@pytest.mark.parametrize("leaving", [(0,), (2,), (0, 1, 2)], ids=["first", "last", "all"])
def test_rows_of_a_batch_that_are_left_stop_alone(batchbot, loaded, leaving):
    batchbot.gate.hold_after(3)
    rows = []
    for number in range(3):
        rows.append(batchbot.call(LONG))
        batchbot.gate.wait("asked", number + 1)
    for row in rows:
        row.first()
    batchbot.gate.wait("step", 4)
    for number in leaving:
        rows[number].leave("close")
    if overlooked(batchbot, requests=3, leaving=len(leaving)):
        return
    batchbot.wait_for(cancelled=len(leaving))
    batchbot.gate.release()
    staying = [row for number, row in enumerate(rows) if number not in leaving]
    for row in staying:
        assert row.outcome() == "finished"
        assert row.text == reference(loaded, [LONG], MAX_NEW_TOKENS)
    batches_of("batchbot", 1, wait_s=0)
    steps = batchbot.gate.count("step")
    assert batchbot.call(SHORT, 2).outcome() == "finished"
    if not staying:
        assert (steps, batchbot.gate.count("step")) == (4, 4 + 2)
    batchbot.wait_for(cancelled=len(leaving), finished=len(staying) + 1)


def test_a_decode_error_in_one_row_fails_that_row_alone(batchbot, loaded):
    prompts = [LONG, DECODE_ERROR, SHORT]
    rows = [batchbot.call(prompt) for prompt in prompts]
    assert [row.outcome() for row in rows] == ["finished", "failed", "finished"]
    for row, prompt in zip(rows, prompts, strict=True):
        if prompt != DECODE_ERROR:
            assert row.text == reference(loaded, [prompt], MAX_NEW_TOKENS)
    batchbot.wait_for(finished=2, failed=1)


def test_a_replica_that_is_killed_fails_what_it_was_doing_and_is_replaced(subject, loaded):
    process = subject.handle().process.remote().result()
    subject.gate.hold_after(3)
    caller = subject.call(LONG)
    caller.first()
    subject.gate.wait("step", 4)
    os.kill(process, signal.SIGKILL)
    assert caller.outcome() == "failed"
    subject.gate.wait("started", 1)
    subject.gate.open()
    following = ask_until_served(subject)
    assert following.text == reference(loaded, [SHORT], 2)


def ask_until_served(subject: Subject):
    """Ask again as long as the ingress has no replica to send the request to."""
    for _ in range(100):
        try:
            caller = subject.call(SHORT, 2)
            if caller.outcome() == "finished":
                subject.gate.wait("finished", 1)
                return caller
        except (ConnectionClosedError, InvalidStatus):
            continue
    raise AssertionError("no replica answers")


@pytest.mark.parametrize("fault", ["hang", "death"])
def test_a_replica_whose_model_hangs_or_dies_fails_its_requests_and_is_replaced(
    subject, loaded, fault
):
    if fault == "hang":
        subject.handle().stall_after.remote(1).result()
        subject.gate.hold_after(2)
    else:
        subject.gate.fail_at(3, SystemExit())
    callers = [subject.call(LONG), subject.call(LONG)]
    assert {caller.outcome() for caller in callers} == {"failed"}
    subject.wait_for(failed=2)
    subject.gate.wait("started", 1)
    subject.gate.open()
    assert ask_until_served(subject).text == reference(loaded, [SHORT], 2)


@contextmanager
def temporary(name: str, port: int, **options: float) -> Iterator[tuple[Subject, Callable]]:
    """A bot of its own, and a function that deploys it with another limit of tokens."""
    bot, original = {"textbot": (GatedTextbot, Textbot), "chatbot": (GatedChatbot, Chatbot)}[name]
    gate, prefix = Gate(), f"temporary-{name}"

    def deploy(limit: int) -> None:
        app = gated(bot, original).options(**options)
        arguments = {"model": EMBEDDED, "max_new_tokens": limit}
        serve.run(app.bind(gate.actor, **arguments), name=prefix, route_prefix=f"/{prefix}")

    deploy(MAX_NEW_TOKENS)
    subject = Subject(name, Bot(f"127.0.0.1:{port}/{prefix}/", gate))
    assert ask_until_served(subject)
    try:
        yield subject, deploy
    finally:
        serve.delete(prefix)


@pytest.mark.parametrize("name", ["textbot", "chatbot"])
def test_a_redeploy_lets_running_streams_finish(port, loaded, name):
    with temporary(name, port) as (subject, deploy), ThreadPoolExecutor(1) as thread:
        subject.gate.hold_after(3)
        caller = subject.call(LONG)
        caller.first()
        deployed = thread.submit(deploy, 5)
        subject.gate.wait("started", 1)  # its successor
        subject.gate.release()
        assert caller.outcome() == "finished"
        assert caller.text == reference(loaded, [LONG], MAX_NEW_TOKENS)
        deployed.result()


@pytest.mark.parametrize("name", ["textbot", "chatbot"])
def test_a_stream_that_outlasts_the_shutdown_is_seen_as_cut(port, name):
    with temporary(name, port, graceful_shutdown_timeout_s=1) as (subject, _):
        subject.gate.hold_after(3)
        caller = subject.call(LONG)
        caller.first()
    assert caller.outcome() == "failed"


def test_an_exception_is_logged_once_and_no_prompt_reply_or_key_is(batchbot, bots, loaded):
    secret = "The password is swordfish."
    logs = Path(ray._private.worker._global_node.get_logs_dir_path())
    batchbot.gate.fail_at(3, RuntimeError("logged once"))
    rows = [batchbot.call(secret) for _ in range(3)]
    assert {row.outcome() for row in rows} == {"failed"}
    batches_of("batchbot", 1, wait_s=0)
    requests.post(batchbot.bot.http, params={"prompt": secret}).raise_for_status()
    requests.post(batchbot.bot.http, params={"prompt": secret, "max_new_tokens": "0"})
    batchbot.wait_for(failed=3, finished=1, refused=1)
    for name in ("textbot", "chatbot"):
        subject = Subject(name, getattr(bots, name))
        subject.gate.open()
        assert subject.call(secret).outcome() == "finished"
        subject.wait_for(finished=1)
        subject.gate.fail_at(3, RuntimeError("logged once"))
        assert subject.call(secret).outcome() == "failed"
        subject.wait_for(failed=1)
    requests.post(bots.emoji_textbot.http, params={"prompt": secret}, headers=WITH_KEY)
    connect(
        bots.emoji_chatbot.ws, subprotocols=["chat.v1", in_base64(KEY)], origin=ALLOWED_ORIGIN
    ).__enter__().close()
    words = reference(loaded, [secret], 3)
    written = {path.name: path.read_text(errors="replace") for path in logs.rglob("*.*")}
    for name in ("textbot", "chatbot", "batchbot"):
        replicas = [text for file, text in written.items() if file.startswith(f"replica_{name}_")]
        assert "".join(replicas).count("RuntimeError: logged once") == 1
    for private in ("swordfish", KEY, in_base64(KEY), words):
        assert [file for file, text in written.items() if private in text] == []


def test_100_sockets_that_are_open_and_idle_disturb_nobody(bots: Bots, loaded):
    bots.chatbot.gate.open()
    idle = [connect(bots.chatbot.ws).__enter__() for _ in range(100)]
    subject = Subject("chatbot", bots.chatbot)
    for _ in range(3):
        caller = subject.call(SHORT, 2)
        assert caller.outcome() == "finished"
        assert caller.text == reference(loaded, [SHORT], 2)
    for websocket in idle:
        websocket.send(" ")
        assert websocket.recv(timeout=HANG_S) == "<>"
        websocket.close()
    subject.wait_for(finished=3 + len(idle))


def test_chats_over_the_limit_are_told_to_try_again_later(bots: Bots):
    bots.chatbot.gate.open()
    chats = [connect(bots.chatbot.ws).__enter__() for _ in range(MAX_CHATS)]
    with connect(bots.chatbot.ws) as refused, pytest.raises(ConnectionClosedError) as closed:
        refused.recv(timeout=HANG_S)
    assert closed.value.rcvd.code == 1013
    assert closed.value.rcvd.reason == "too many chats are open"
    subject = Subject("chatbot", bots.chatbot)
    subject.wait_for(refused=1)
    for websocket in chats:
        websocket.close()
    assert ask_until_served(subject).text


def test_prompts_that_would_wait_too_long_are_told_to_try_again_later(bots: Bots):
    subject = Subject("chatbot", bots.chatbot)
    subject.gate.hold_after(0)
    callers = [subject.call(SHORT)]
    subject.gate.wait("step", 1)
    for number in range(MAX_WAITING):
        callers.append(subject.call(SHORT))
        subject.gate.wait("submitted", number + 2)
    refused = subject.call(SHORT)
    assert refused.outcome() == "refused"
    with connect(bots.chatbot.ws, subprotocols=["chat.v1"]) as websocket:
        websocket.send('{"type": "prompt", "prompt": "Hello!"}')
        assert json.loads(websocket.recv(timeout=HANG_S)) == {
            "type": "error",
            "detail": f"{MAX_WAITING} prompts already wait for the model",
        }
    subject.wait_for(refused=2)
    for caller in callers:
        caller.leave("close")
    subject.wait_for(refused=2, cancelled=len(callers))
    subject.gate.release()


@pytest.mark.parametrize("name", ["textbot", "batchbot", "continuousbot"])
def test_requests_over_the_limit_of_serve_are_503_with_retry_after(bots: Bots, name):
    subject = Subject(name, getattr(bots, name))
    subject.gate.hold_after(0)

    def ask() -> HttpCaller:
        caller = subject.call(SHORT, 1)
        caller.outcome()
        return caller

    with ThreadPoolExecutor(300) as threads:
        callers = as_completed([threads.submit(ask) for _ in range(300)], timeout=HANG_S)
        refused_while_held = next(callers).result()
        subject.gate.release()
        answered = [refused_while_held, *(caller.result() for caller in callers)]
    assert refused_while_held.response.status == 503
    refused = [caller for caller in answered if caller.response.status == 503]
    assert {caller.response.headers["Retry-After"] for caller in refused} == {"10"}
    assert {caller.response.status for caller in answered} == {200, 503}
    subject.wait_for(finished=300 - len(refused))


@pytest.mark.parametrize("name", ["emoji_textbot", "emoji_batchbot", "emoji_continuousbot"])
@pytest.mark.parametrize(
    ("headers", "status"),
    [
        (WITH_KEY, 200),
        ({}, 401),
        (WITH_KEY | {"Host": "evil.example"}, 400),
        (WITH_KEY | {"Origin": "https://evil.example"}, 403),
        (WITH_KEY | {"Origin": "null"}, 403),
        (WITH_KEY | {"Origin": ALLOWED_ORIGIN}, 200),
    ],
)
def test_who_may_not_come_in_over_http_is_refused(bots: Bots, name, headers, status):
    bot = getattr(bots, name)
    bot.gate.open()
    response = requests.post(bot.http, params={"prompt": EMOJI_PROMPT}, headers=headers)
    assert response.status_code == status
    assert response.headers["X-Model"]
    if status == 200:
        assert response.content.decode() == EMOJI_REPLY
    Subject(name, bot).wait_for(**{"finished" if status == 200 else "refused": 1})


@pytest.mark.parametrize(
    ("host", "headers", "status"),
    [
        ("localhost", {}, 401),
        ("evil.example", WITH_KEY, 400),
        ("localhost", WITH_KEY | {"Origin": "https://evil.example"}, 403),
        ("localhost", WITH_KEY | {"Origin": "null"}, 403),
    ],
)
def test_who_may_not_come_in_over_a_websocket_is_refused(bots: Bots, host, headers, status):
    bots.emoji_chatbot.gate.open()
    url = urlsplit(bots.emoji_chatbot.ws)
    connection = socket.create_connection((url.hostname, url.port))
    with pytest.raises(InvalidStatus) as refused:
        connect(f"ws://{host}{url.path}", sock=connection, additional_headers=headers).__enter__()
    assert refused.value.response.status_code == status
    Subject("emoji_chatbot", bots.emoji_chatbot).wait_for(refused=1)
