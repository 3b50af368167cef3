"""Faults of each bot: what the client sees, what the model does, and what the bot counts.

The tests hold on both of Serve's ingresses. `pytest` and `pytest -m haproxy` run the cases that
take different code. `-m exhaustive` runs every bot, moment and way.
"""

import os
import select
import signal
import socket
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from urllib.parse import urlsplit

import pytest
import ray
import requests
from bot_fixtures import (
    ALLOWED_ORIGIN,
    CHAT_MAX_NEW_TOKENS,
    EMOJI_PROMPT,
    EMOJI_REPLY,
    HANG_S,
    INGRESS,
    KEY,
    MAX_NEW_TOKENS,
    V1,
    WITH_KEY,
    Bot,
    batches_of,
    reference,
    wait_until,
)
from callers import ChatCaller, CompletionCaller, HttpCaller
from deployments import deployed
from products import cases
from stepped_bots import DECODE_ERROR, ENCODE_ERROR, MAX_CHATS
from test_access import in_base64
from test_requests import ACCESS
from websockets.exceptions import ConnectionClosedError, InvalidStatus
from websockets.sync.client import connect

if INGRESS == "haproxy":
    pytestmark = pytest.mark.haproxy

LONG = "Tell me a story about dogs."
SHORT = "Thank you, good night!"
OUTCOMES = ("finished", "failed", "cancelled", "refused")

BOTS = ("textbot", "chatbot", "batchbot", "continuousbot", "batched_chatbot")
BY_V1 = ("textbot/v1", "chatbot/v1", "batchbot/v1", "continuousbot/v1")
# A continuous batch has no queue until its places are taken. A failure of the model ends it.
ONE_AT_A_TIME = ("textbot", "chatbot", "batchbot")
REFUSED_WITHIN_S = 1  # if refusals take longer, the test sends more requests
HTTP_BOTS = ("textbot", "batchbot", "continuousbot")
WAYS = ("close", "reset", "half-close")
MOMENTS = {  # tokens that the client has waited for, and the limit of the reply
    "before the first token": (0, None),
    "in mid-reply": (3, None),
    "at the last token": (2, 3),
}


class Subject:
    """A bot under test, and how to talk to it."""

    def __init__(self, name: str, bot: Bot) -> None:
        self.name, self.bot, self.gate = name.removesuffix(V1), bot, bot.gate
        self.is_chat = name.endswith("chatbot")  # and is asked over a WebSocket
        self.limit = CHAT_MAX_NEW_TOKENS if self.name.endswith("chatbot") else MAX_NEW_TOKENS
        self.caller = ChatCaller if self.is_chat else HttpCaller
        if name.endswith(V1):
            self.caller = CompletionCaller

    def call(self, prompt: str, limit: int | None = None, **options: dict[str, str]):
        return self.caller(self.bot, prompt, limit, **options)

    def wait_for(self, **expected: int) -> None:
        """Wait until this many requests have these outcomes, and check that there are no others."""
        for outcome, count in expected.items():
            self.gate.wait(outcome, count)
        counted = {outcome: self.gate.count(outcome) for outcome in OUTCOMES}
        assert counted == dict.fromkeys(OUTCOMES, 0) | expected


@pytest.fixture
def subject(request: pytest.FixtureRequest, served: Bot) -> Subject:
    return Subject(request.node.callspec.params["served"], served)


def of(*names: str) -> pytest.MarkDecorator:
    """Make these bots the subjects."""
    return pytest.mark.parametrize("served", names, indirect=True)


@pytest.fixture
def triple(subject: Subject) -> Iterator[Subject]:
    """A Batchbot that begins a batch only when three requests wait."""
    batches_of(subject.bot, 3, wait_s=HANG_S)
    yield subject
    batches_of(subject.bot)


@pytest.mark.parametrize(
    ("served", "way"),
    cases(
        (*ONE_AT_A_TIME, "textbot/v1", "chatbot/v1"),
        WAYS,
        chosen=lambda bot, way: way == "close" and V1 not in bot,
    ),
    indirect=["served"],
)
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


@pytest.mark.exhaustive
@of("chatbot")
def test_a_client_that_answers_no_ping_counts_as_gone_after_40_s(subject):
    """A sleeping laptop has such a client. uvicorn pings every 20 s, and waits another 20 s."""
    subject.gate.hold_after(0)
    staying = subject.call(SHORT, 2)
    subject.gate.wait("step", 1)
    url = urlsplit(subject.bot.ws)
    handshake = [
        f"GET {url.path} HTTP/1.1",
        f"Host: {url.netloc}",
        "Connection: Upgrade",
        "Upgrade: websocket",
        "Sec-WebSocket-Version: 13",
        "Sec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==",
    ]
    with socket.create_connection((url.hostname, url.port)) as asleep:
        asleep.sendall("\r\n".join([*handshake, "", ""]).encode())
        assert b" 101 " in asleep.recv(4096)
        asleep.sendall(b"\x81\x86\0\0\0\0Hello!")  # a text frame
        subject.gate.wait("submitted", 2)
        subject.wait_for(cancelled=1)
    subject.gate.release()
    assert staying.outcome() == "finished"


def differs_in_code(bot: str, moment: str, way: str) -> bool:
    """Whether a case takes other code: moments do over HTTP, and ways over a WebSocket."""
    if bot == "chatbot" and moment == "in mid-reply":
        return True
    if bot.endswith(V1):
        return way == "close" and bot == "textbot/v1" and moment != "at the last token"
    if bot == "batched_chatbot":
        return way == "close" and moment != "at the last token"
    begins = bot == "continuousbot" and moment == "before the first token"
    return way == "close" and (bot == "textbot" or moment == "in mid-reply" or begins)


@pytest.mark.parametrize(
    ("served", "moment", "way"),
    cases(BOTS + BY_V1, MOMENTS, WAYS, chosen=differs_in_code),
    indirect=["served"],
)
def test_a_client_that_leaves_stops_the_model_within_one_token(subject, loaded, moment, way):
    tokens, limit = MOMENTS[moment]
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
    """Return whether HAProxy fails to report all clients that have left.

    Sometimes, version 2.8.25 keeps the connection to the replica open, and notices that the client
    has left only when it has text to pass on. The reply must end then, or at its own end. A client
    that has only closed its own half may still read it.
    """
    if INGRESS != "haproxy" or subject.is_chat:
        return False
    if subject.gate.happens("cancelled", leaving, 3):
        return False
    subject.gate.release()
    subject.gate.wait("left", requests)
    return True


@pytest.mark.parametrize(
    ("served", "step"),
    cases(
        (*ONE_AT_A_TIME, "textbot/v1", "chatbot/v1", "batchbot/v1"),
        (1, 4),
        chosen=lambda bot, step: bot in ("textbot", "textbot/v1") or (step == 4 and V1 not in bot),
    ),
    indirect=["served"],
)
def test_an_exception_of_the_model_fails_its_request_alone(subject, loaded, step):
    subject.gate.fail_at(step)
    caller = subject.call(LONG)
    assert caller.outcome() == "failed"
    if step > 1:
        assert caller.text == reference(loaded, [LONG], step - 1)
    if isinstance(caller, CompletionCaller):
        assert caller.events[-1]["error"]["message"] == "the reply failed: RuntimeError"
    following = subject.call(SHORT, 2)
    assert following.outcome() == "finished"
    assert following.text == reference(loaded, [SHORT], 2)
    subject.wait_for(failed=1, finished=1)


@pytest.mark.parametrize(
    ("served", "prompt"),
    # Before the first byte, and in a row of a batch with other rows.
    cases(
        BOTS + BY_V1,
        (ENCODE_ERROR, DECODE_ERROR),
        chosen=lambda bot, prompt: (
            (bot, prompt)
            in (
                ("textbot", ENCODE_ERROR),
                ("continuousbot", DECODE_ERROR),
                ("batched_chatbot", DECODE_ERROR),
            )
        ),
    ),
    indirect=["served"],
)
def test_an_exception_of_the_tokenizer_fails_its_request_alone(subject, loaded, prompt):
    assert subject.call(prompt).outcome() == "failed"
    following = subject.call(SHORT, 2)
    assert following.outcome() == "finished"
    assert following.text == reference(loaded, [SHORT], 2)
    subject.wait_for(failed=1, finished=1)


@pytest.mark.parametrize(
    "served",
    cases(BOTS, chosen=lambda bot: bot in ("textbot", "chatbot")),
    indirect=True,
)
def test_a_slow_reader_gets_everything_and_holds_up_nobody(subject, loaded):
    slow = subject.call(LONG)
    quick = subject.call(SHORT, 2)
    assert quick.outcome() == "finished"
    subject.wait_for(finished=2)  # the slow reply is written, though its client has read none of it
    assert slow.outcome() == "finished"
    assert slow.text == reference(loaded, [LONG], subject.limit)


@pytest.mark.parametrize(
    ("served", "tokens"),
    cases(
        (*HTTP_BOTS, "textbot/v1"),
        (0, 3),
        chosen=lambda bot, tokens: V1 not in bot and (bot == "textbot" or tokens == 3),
    ),
    indirect=["served"],
)
def test_the_request_timeout_of_serve_stops_the_model(subject, tokens):
    subject.gate.hold_after(tokens)
    caller = subject.call(LONG, headers={"X-Request-Timeout-Seconds": "1"})
    subject.gate.wait("step", tokens + 1)
    assert caller.outcome() in (("refused", "failed") if tokens == 0 else ("failed",))
    subject.wait_for(cancelled=1)
    subject.gate.release()
    assert subject.call(SHORT, 2).outcome() == "finished"
    assert subject.gate.count("step") == tokens + 1 + 2
    subject.wait_for(cancelled=1, finished=1)


@pytest.mark.parametrize(
    ("served", "leaving"),
    cases(["batchbot"], [(0,), (2,), (0, 1, 2)], chosen=lambda bot, leaving: leaving == (0,)),
    indirect=["served"],
)
def test_only_the_abandoned_rows_of_a_batch_stop(triple, loaded, leaving):
    triple.gate.hold_after(3)
    rows = []
    for number in range(3):
        rows.append(triple.call(LONG))
        triple.gate.wait("asked", number + 1)
    for row in rows:
        row.first()
    triple.gate.wait("step", 4)
    for number in leaving:
        rows[number].leave("close")
    if overlooked(triple, requests=3, leaving=len(leaving)):
        return
    triple.wait_for(cancelled=len(leaving))
    triple.gate.release()
    staying = [row for number, row in enumerate(rows) if number not in leaving]
    for row in staying:
        assert row.outcome() == "finished"
        assert row.text == reference(loaded, [LONG], MAX_NEW_TOKENS)
    batches_of(triple.bot, 1, wait_s=0)
    steps = triple.gate.count("step")
    assert triple.call(SHORT, 2).outcome() == "finished"
    if not staying:
        assert (steps, triple.gate.count("step")) == (4, 4 + 2)
    triple.wait_for(cancelled=len(leaving), finished=len(staying) + 1)


@pytest.mark.exhaustive
@of("batchbot")
def test_a_decode_error_in_one_row_fails_that_row_alone(triple, loaded):
    prompts = [LONG, DECODE_ERROR, SHORT]
    rows = [triple.call(prompt) for prompt in prompts]
    assert [row.outcome() for row in rows] == ["finished", "failed", "finished"]
    for row, prompt in zip(rows, prompts, strict=True):
        if prompt != DECODE_ERROR:
            assert row.text == reference(loaded, [prompt], MAX_NEW_TOKENS)
    triple.wait_for(finished=2, failed=1)


@pytest.mark.parametrize(
    "served", cases((*BOTS, "textbot/v1"), chosen=lambda bot: bot == "textbot"), indirect=True
)
def test_a_killed_replica_fails_its_requests_and_is_replaced(subject, loaded):
    process = subject.bot.call("process")
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
    """Ask again until the ingress has a replica for the request."""
    for _ in range(100):
        try:
            caller = subject.call(SHORT, 2)
            if caller.outcome() == "finished":
                subject.gate.wait("finished", 1)
                return caller
        except (ConnectionClosedError, InvalidStatus):
            continue
    raise AssertionError("no replica answers")


@pytest.mark.parametrize(
    ("served", "fault"),
    cases(BOTS, ("hang", "death"), chosen=lambda *each: each == ("textbot", "hang")),
    indirect=["served"],
)
def test_a_replica_with_a_hung_or_dead_model_fails_its_requests_and_is_replaced(
    subject, loaded, fault
):
    if fault == "hang":
        subject.bot.call("stall_after", 1)
        subject.gate.hold_after(2)
    else:
        subject.gate.fail_at(3, SystemExit())
    callers = [subject.call(LONG), subject.call(LONG)]
    assert {caller.outcome() for caller in callers} == {"failed"}
    subject.wait_for(failed=2)
    subject.gate.wait("started", 1)
    subject.gate.open()
    assert ask_until_served(subject).text == reference(loaded, [SHORT], 2)


@pytest.mark.parametrize(
    "name", cases(("textbot", "chatbot", "batched_chatbot"), chosen=lambda name: name == "textbot")
)
def test_a_redeploy_lets_running_streams_finish_unless_they_outlast_the_shutdown(
    port, new_gate, loaded, name
):
    # The first replica stays until its successor has started, however long that takes.
    options = {"graceful_shutdown_timeout_s": HANG_S}
    # When a replica ends behind HAProxy, Serve closes its sockets after this period.
    period = {"RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S": str(HANG_S)}
    if INGRESS == "haproxy" and name.endswith("chatbot"):
        options |= {"ray_actor_options": {"runtime_env": {"env_vars": period}}}
    with deployed(name, port, new_gate(), **options) as own, ThreadPoolExecutor(1) as thread:
        subject = Subject(name, own.bot)
        assert ask_until_served(subject)
        subject.gate.hold_after(3)
        caller = subject.call(LONG)
        caller.first()
        deploying = thread.submit(own.deploy, graceful_shutdown_timeout_s=1)
        subject.gate.wait("started", 1)  # its successor
        subject.gate.release()
        assert caller.outcome() == "finished"
        assert caller.text == reference(loaded, [LONG], MAX_NEW_TOKENS)
        deploying.result()
        subject.gate.open()
        assert ask_until_served(subject)
        subject.gate.hold_after(3)
        caller = subject.call(LONG)
        caller.first()
    assert caller.outcome() == "failed"


SECRET = "The password is swordfish."


class Logs:
    """Everything that Ray and Serve have written."""

    def __init__(self) -> None:
        self.folder = Path(ray._private.worker._global_node.get_logs_dir_path())

    def of_replica(self, name: str) -> str:
        return "".join(
            path.read_text(errors="replace") for path in self.folder.rglob(f"replica_{name}_*")
        )

    def with_word(self, word: str) -> list[str]:
        paths = self.folder.rglob("*.*")
        return [path.name for path in paths if word in path.read_text(errors="replace")]


@pytest.fixture
def logs() -> Logs:
    return Logs()


@of("textbot", "chatbot", "batchbot")
def test_an_exception_is_logged_once_and_no_prompt_or_reply_is(subject, loaded, logs):
    error = f"logged once by the {subject.name}"
    subject.gate.fail_at(3, RuntimeError(error))
    if subject.name == "batchbot":
        batches_of(subject.bot, 3, wait_s=HANG_S)  # three callers share the exception
    callers = [subject.call(SECRET) for _ in range(3 if subject.name == "batchbot" else 1)]
    assert {caller.outcome() for caller in callers} == {"failed"}
    subject.wait_for(failed=len(callers))
    if subject.name == "batchbot":
        batches_of(subject.bot)
    subject.gate.open()
    assert subject.call(SECRET).outcome() == "finished"
    subject.wait_for(finished=1)
    if subject.name != "chatbot":
        requests.post(subject.bot.http, params={"prompt": SECRET}).raise_for_status()
        requests.post(subject.bot.http, params={"prompt": SECRET, "max_new_tokens": "0"})
        subject.wait_for(finished=2, refused=1)
    line = f"RuntimeError: {error}"
    wait_until(lambda: line in logs.of_replica(subject.name), HANG_S, f"{line} is not logged")
    assert logs.of_replica(subject.name).count(line) == 1
    for private in ("swordfish", reference(loaded, [SECRET], 3)):
        assert logs.with_word(private) == []


@of("chatbot")
def test_100_sockets_that_are_open_and_idle_disturb_nobody(subject, loaded):
    idle = [connect(subject.bot.ws).__enter__() for _ in range(100)]
    for _ in range(3):
        caller = subject.call(SHORT, 2)
        assert caller.outcome() == "finished"
        assert caller.text == reference(loaded, [SHORT], 2)
    for websocket in idle:
        websocket.send(" ")
        assert websocket.recv(timeout=HANG_S) == "<>"
        websocket.close()
    subject.wait_for(finished=3 + len(idle))


@of("chatbot")
def test_chats_over_the_limit_are_told_to_try_again_later(subject):
    chats = [connect(subject.bot.ws).__enter__() for _ in range(MAX_CHATS)]
    with connect(subject.bot.ws) as refused, pytest.raises(ConnectionClosedError) as closed:
        refused.recv(timeout=HANG_S)
    assert closed.value.rcvd.code == 1013
    assert closed.value.rcvd.reason == "too many chats are open"
    subject.wait_for(refused=1)
    for websocket in chats:
        websocket.close()
    assert ask_until_served(subject).text


@pytest.mark.parametrize(
    "served", cases((*HTTP_BOTS, "textbot/v1"), chosen=lambda bot: bot == "textbot"), indirect=True
)
def test_requests_over_the_limit_of_serve_are_503_with_retry_after(subject):
    subject.gate.hold_after(0)
    waiting = [subject.call(SHORT, 1) for _ in range(100)]
    subject.gate.wait("asked" if subject.name == "batchbot" else "submitted", 100)
    answered: list[socket.socket] = []
    # Serve looks at its count some time before it counts who waits, so the test sends waves.
    while not answered:
        assert len(waiting) < 400, "nobody is refused"
        waiting += [subject.call(SHORT, 1) for _ in range(50)]
        sockets = {caller.socket: caller for caller in waiting}
        answered, _, _ = select.select(sockets, [], [], REFUSED_WITHIN_S)
    assert len(waiting) > 100 + 100
    refused = [sockets[each] for each in answered]
    for caller in refused:
        assert caller.outcome() == "refused"
        assert caller.response.status == 503
        assert caller.response.headers["Retry-After"] == "10"
    first, *others = [caller for caller in waiting if caller not in refused]
    for caller in others:
        caller.leave("close")
    subject.gate.release()
    assert first.outcome() == "finished"
    assert ask_until_served(subject)


@pytest.mark.parametrize(("headers", "status"), ACCESS)
@pytest.mark.parametrize(
    "served",
    cases(
        ["emoji_textbot", "emoji_batchbot", "emoji_continuousbot"],
        chosen=lambda bot: bot == "emoji_textbot",
    ),
    indirect=True,
)
def test_http_requests_without_access_are_refused(subject, logs, headers, status):
    response = requests.post(subject.bot.http, params={"prompt": EMOJI_PROMPT}, headers=headers)
    assert response.status_code == status
    assert ("X-Model" in response.headers) == (status == 200)
    if status == 200:
        assert response.content.decode() == EMOJI_REPLY
    subject.wait_for(**{"finished" if status == 200 else "refused": 1})
    assert logs.with_word(KEY) == []


@pytest.mark.parametrize("served", ["emoji_chatbot"], indirect=True)
@pytest.mark.parametrize(
    ("host", "headers", "status"),
    [
        ("localhost", {}, 401),
        ("evil.example", WITH_KEY, 400),
        ("localhost", WITH_KEY | {"Origin": "https://evil.example"}, 403),
        ("localhost", WITH_KEY | {"Origin": "null"}, 403),
    ],
)
def test_websockets_without_access_are_refused(subject, host, headers, status):
    url = urlsplit(subject.bot.ws)
    connection = socket.create_connection((url.hostname, url.port))
    with pytest.raises(InvalidStatus) as refused:
        connect(f"ws://{host}{url.path}", sock=connection, additional_headers=headers).__enter__()
    assert refused.value.response.status_code == status
    subject.wait_for(refused=1)


@of("emoji_chatbot")
def test_a_browser_connects_with_its_key_as_a_subprotocol_and_no_log_has_the_key(subject, logs):
    offered = ["chat.v1", in_base64(KEY)]
    with connect(subject.bot.ws, subprotocols=offered, origin=ALLOWED_ORIGIN) as websocket:
        assert websocket.subprotocol == "chat.v1"
    for private in (KEY, in_base64(KEY)):
        assert logs.with_word(private) == []
