"""Random input to the bots causes no 5xx, no hang and no wrong reply."""

import gc
import json
from collections.abc import Iterator
from typing import Any, NamedTuple

import pytest
import requests
import schemathesis
from bot_fixtures import CHAT_MAX_NEW_TOKENS, HANG_S, Bot, Bots, reference
from callers import CompletionCaller
from engines import limits_of
from hypothesis import example, given, settings
from hypothesis import strategies as st
from schemathesis import GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)
from scripted_model import save_random_model
from test_prompt import assistant, user
from test_properties import json_texts, texts
from transformers import BloomConfig
from websockets.exceptions import ConnectionClosed
from websockets.sync.client import ClientConnection, connect

from streaming_bots.chat.protocol import CHAT_V1, JsonProtocol
from streaming_bots.errors import PromptTooLong, Refusal
from streaming_bots.http.request import MAX_BYTES_OUTSIDE_STRINGS, ReplyOptions
from streaming_bots.models.loaded_model import LoadedModel
from streaming_bots.models.prompt import MAX_BYTES, encode
from textbot import Textbot

CHECKS = [
    not_a_server_error,
    status_code_conformance,
    content_type_conformance,
    response_schema_conformance,
]
MAX_FRAME_BYTES = 2**24  # uvicorn's limit

fuzz = settings(deadline=None, derandomize=True, max_examples=60)


COMPLETIONS = "/v1/chat/completions"


@pytest.mark.parametrize(
    ("name", "path"),
    [
        ("textbot", "/"),
        ("batchbot", "/"),
        ("continuousbot", "/"),
        ("textbot", COMPLETIONS),
        ("chatbot", COMPLETIONS),
    ],
)
def test_every_response_is_one_that_the_openapi_describes(bots: Bots, loaded, name, path):
    bot = getattr(bots, name)
    bot.gate.open()
    description = requests.get(f"{bot.http}openapi.json", timeout=HANG_S).text
    short = description.replace('"minimum":1', '"minimum":1,"maximum":5')
    operation = schemathesis.openapi.from_dict(json.loads(short))[path]["POST"]
    valid, invalid = (operation.as_strategy(generation_mode=mode) for mode in GenerationMode)

    @fuzz
    @given(case=valid | invalid)
    def ask(case: schemathesis.Case) -> None:
        case.call_and_validate(base_url=bot.http, checks=CHECKS, timeout=HANG_S)

    ask()
    body = {"prompt": "Hello!"} if path == "/" else {"messages": [user("Hello!")], "stream": True}
    operation.Case(body=body, media_type="application/json").call_and_validate(
        base_url=bot.http, checks=CHECKS, timeout=HANG_S
    )
    following = CompletionCaller(bot, "Hello!", 2)
    assert following.outcome() == "finished"
    assert following.text == reference(loaded, ["Hello!"], 2)


@pytest.fixture(scope="module")
def roomy(bots: Bots, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bot]:
    """A bot that takes the longest prompts."""
    gc.collect()
    gc.freeze()  # a collection of all the tests' objects takes half a second on any thread
    folder = tmp_path_factory.mktemp("roomy")
    config = BloomConfig(hidden_size=8, n_layer=1, n_head=1)
    save_random_model(config, folder, context=20_000)
    yield bots.run(
        Textbot.bind(str(folder), max_new_tokens=5, max_prompt_tokens=19_000), "roomy", None
    )
    gc.unfreeze()


MOST = 3 * MAX_BYTES + MAX_BYTES_OUTSIDE_STRINGS
parts = st.sampled_from(['"', "\\", "{", "[", "]", "}", ":", ",", "1", "a", " ", "\\u4e2d", "é"])


@settings(fuzz, max_examples=30)
@given(
    before=st.sampled_from(["", '{"', '{"prompt": "', '{"prompt": "Hi", "a": ', '{"stop": [']),
    repeated=st.lists(parts, min_size=1, max_size=5).map("".join),
)
@example('{"stop": [', "[],")
@example("", "[")
@example("", '"')
@example("{", '"é":1,')
@example('{"prompt": "', "\\u4e2d")
@example('{"prompt": "', '\\"')
@example('{"a', "a")
def test_no_body_holds_up_others(local_serve, roomy, before, repeated):
    text = before + repeated * (MOST // len(repeated.encode()))
    local_serve.longest_s = 0.0
    response = requests.post(roomy.http, data=text.encode()[:MOST], timeout=HANG_S)
    assert response.status_code in (413, 422)
    assert len(response.content) < 10_000
    assert local_serve.longest_s < 0.1


@pytest.mark.parametrize(
    "names",
    [
        [f"{number:x}" for number in range(MOST // 12)],
        [f"{number:x}" for number in range(1000)],
        [f"{number:x}" * 400 for number in range(1000)],
    ],
    ids=["many", "as many as are read", "long"],
)
def test_no_parameters_hold_up_others(local_serve, roomy, names):
    local_serve.longest_s = 0.0
    response = requests.post(roomy.http, json=dict.fromkeys(names, 1), timeout=HANG_S)
    assert response.status_code == 422
    assert len(response.content) < 10_000
    assert local_serve.longest_s < 0.1


@pytest.mark.parametrize(
    "body",
    [
        {"messages": [{"role": "user", "content": ""}] * 5000},
        {"messages": [{"role": "user", "content": ["x"] * 15_000}]},
        {"messages": [{}] * 15_000},
        {"messages": [1] * 30_000},
        {"messages": [{"role": "user"}] * 4500},
        {"messages": [{"role": "user", "content": "Hi"}], "stop": [1] * 30_000},
        {"messages": [{"role": "user", "content": "Hi"}], "modalities": [1] * 30_000},
        {f"{number:x}": 1 for number in range(8_000)},
        {"messages": [{"role": "user", "content": "Hi"}], "tools": [[]] * 15_000},
        {"messages": [{"role": "user", "content": "Hi " * MAX_BYTES}]},
    ],
    ids=lambda body: ",".join(body)[:40],
)
def test_no_conversation_holds_up_others(local_serve, roomy, body):
    data = json.dumps(body, separators=(",", ":"))
    local_serve.longest_s = 0.0
    response = requests.post(f"{roomy.http}{COMPLETIONS[1:]}", data=data, timeout=HANG_S)
    assert response.status_code in (200, 400, 413)
    assert len(response.content) < 10_000
    requests.get(f"{roomy.http}v1/models", timeout=HANG_S)  # what was timed has ended now
    assert local_serve.longest_s < 0.1


def test_the_openapi_of_the_chatbot_has_openais_routes_alone(bots: Bots):
    description = requests.get(f"{bots.chatbot.http}openapi.json", timeout=HANG_S).json()
    assert description["paths"].keys() == {COMPLETIONS, "/v1/models", "/v1/models/{model}"}


BOUNDS = {"minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum"}


def test_the_openapi_names_the_bounds_of_numbers(bots: Bots):
    description = requests.get(f"{bots.textbot.http}openapi.json", timeout=HANG_S).json()

    def bounds(path: str) -> dict[str, dict[str, float]]:
        body = description["paths"][path]["post"]["requestBody"]["content"]["application/json"]
        schemas = {
            name: field.get("anyOf", [field])[0]
            for name, field in body["schema"]["properties"].items()
        }
        numbers = {name: s for name, s in schemas.items() if s.get("type") in ("number", "integer")}
        return {name: {key: s[key] for key in BOUNDS & s.keys()} for name, s in numbers.items()}

    temperature = {"minimum": 0, "maximum": 2}
    assert bounds("/") == {
        "max_new_tokens": {"minimum": 1},
        "temperature": temperature,
        "top_p": {"exclusiveMinimum": 0, "maximum": 1},
        "top_k": {"minimum": 0},
        "seed": {"minimum": 0, "exclusiveMaximum": 2**63},
    }
    assert bounds(COMPLETIONS) == {
        "max_new_tokens": {"minimum": 1},
        "max_tokens": {"minimum": 1},
        "max_completion_tokens": {"minimum": 1},
        "temperature": temperature,
        "top_p": {"minimum": 0, "maximum": 1},
        "top_k": {"minimum": -1},
        "seed": {},
        "n": {"minimum": 1, "maximum": 1},
    }


class Frame(NamedTuple):
    """A message in one or two fragments."""

    fragments: list[bytes]
    is_text: bool

    def text(self) -> str:
        return b"".join(self.fragments).decode()


def cut(data: bytes, at: int) -> list[bytes]:
    return [data[:at], data[at:]]


def text_frames(strategy: st.SearchStrategy[str]) -> st.SearchStrategy[Frame]:
    fragments = st.builds(cut, strategy.map(str.encode), st.integers(0, 50))
    return st.builds(Frame, fragments, st.just(True))


huge = st.sampled_from([7_168, 7_169, 100_000]).map(lambda size: "x" * size)
bad_frames = st.one_of(
    st.builds(Frame, st.lists(st.binary(), min_size=1, max_size=2), st.booleans()),
    text_frames(huge),
)
json_prompts = st.builds(
    lambda prompt, limit: json.dumps({"type": "prompt", "prompt": prompt, "max_new_tokens": limit}),
    texts,
    st.integers(1, 5),
)
json_frames = st.one_of(
    text_frames(json_prompts),
    text_frames(st.sampled_from(['{"type": "stop"}', '{"type": "ping"}'])),
    text_frames(json_texts),
    bad_frames,
)


@pytest.fixture(scope="module")
def chatbot(bots: Bots) -> Bot:
    bots.chatbot.gate.open()
    return bots.chatbot


def budget(loaded: LoadedModel) -> int:
    return loaded.context - CHAT_MAX_NEW_TOKENS


def send(websocket: ClientConnection, frames: list[Frame]) -> None:
    for frame in frames:
        websocket.send(frame.fragments, text=frame.is_text)


def expected(loaded: LoadedModel, exchanges: list[tuple[str, str]], max_new_tokens: int) -> str:
    """Return the reply to "Hello!" after these exchanges."""
    turns = [turn for said, reply in exchanges for turn in (user(said), assistant(reply))]
    turns.append(user("Hello!"))
    encode(turns, loaded.tokenizer, budget(loaded))
    return reference(loaded, [turn["content"] for turn in turns], max_new_tokens)


def close_code(closed: ConnectionClosed) -> int:
    """Return the code with which the server closed a socket.

    After text that is not UTF-8, the server reads no further. If the client still sends, it gets a
    reset, which may overtake the server's 1007.
    """
    return 1007 if closed.rcvd is None else closed.rcvd.code


def plain_code(loaded: LoadedModel, frame: Frame) -> int | None:
    """Return the code with which a message closes a plain chat, if it does."""
    if not frame.is_text:
        return 1003
    try:
        encode([user(frame.text())], loaded.tokenizer, budget(loaded))
    except UnicodeDecodeError:
        return 1007
    except PromptTooLong:
        return 1009
    return None


def plain_reply(websocket: ClientConnection) -> str:
    chunks = []
    while (chunk := websocket.recv(timeout=HANG_S)) != "<>":
        chunks.append(chunk)
    return "".join(chunks)


def talk_plainly(chatbot: Bot, loaded: LoadedModel, frames: list[Frame]) -> None:
    with connect(chatbot.ws) as websocket:
        send(websocket, [*frames, Frame([b"Hello!"], True)])
        replies = [plain_reply(websocket) for _ in frames]
        last = plain_reply(websocket)
        websocket.close()
        assert list(websocket) == []
    exchanges = [
        (frame.text(), reply)
        for frame, reply in zip(frames, replies, strict=True)
        if frame.text().strip()
    ]
    assert last == expected(loaded, exchanges, CHAT_MAX_NEW_TOKENS)


@fuzz
@given(frames=st.lists(text_frames(texts) | bad_frames, max_size=3))
def test_a_plain_chat_answers_every_message_or_closes_with_the_code_of_a_bad_one(
    chatbot, loaded, frames
):
    codes = {plain_code(loaded, frame) for frame in frames} - {None}
    try:
        talk_plainly(chatbot, loaded, frames)
        assert not codes
    except ConnectionClosed as closed:
        assert close_code(closed) in codes
        talk_plainly(chatbot, loaded, [])


def answers(loaded: LoadedModel, frame: Frame) -> set[str]:
    """Return the types of messages that may answer a message in chat.v1."""
    try:
        message = {"text": frame.text()} if frame.is_text else {"bytes": b""}
        options = ReplyOptions.model_construct(max_new_tokens=CHAT_MAX_NEW_TOKENS)
        limits = limits_of(budget(loaded), CHAT_MAX_NEW_TOKENS)
        prompt = JsonProtocol(limits, options, "<>").read(message)
        if isinstance(prompt, str):  # stop, or ping
            return set()
        encode([user(prompt.prompt)], loaded.tokenizer, budget(loaded))
        return {"done"}
    except PromptTooLong:
        return {"done", "error"}  # the former if a stop comes before the tokenizer
    except (Refusal, UnicodeDecodeError):
        return {"error"}  # or the socket closes


def receive(websocket: ClientConnection) -> dict[str, Any]:
    return json.loads(websocket.recv(timeout=HANG_S))


def talk_json(chatbot: Bot, loaded: LoadedModel, frames: list[Frame]) -> None:
    hello = Frame([b'{"type": "prompt", "prompt": "Hello!", "max_new_tokens": 5}'], True)
    exchanges, reply = [], ""
    with connect(chatbot.ws, subprotocols=[CHAT_V1]) as websocket:
        send(websocket, [*frames, hello])
        for frame in [*frames, hello]:
            if not (possible := answers(loaded, frame)):
                continue
            reply = ""
            while (message := receive(websocket))["type"] in ("waiting", "text", "pong"):
                reply += message.get("text", "")
            assert message["type"] in possible
            begun = reply or message.get("finish_reason") != "cancelled"
            if frame is not hello and message["type"] == "done" and begun:
                exchanges.append((json.loads(frame.text())["prompt"], reply))
        websocket.close()
        assert list(websocket) == []
    assert reply == expected(loaded, exchanges, 5)


def is_utf8(data: bytes) -> bool:
    try:
        data.decode()
    except UnicodeDecodeError:
        return False
    return True


@fuzz
@given(frames=st.lists(json_frames, max_size=6))
def test_a_json_chat_answers_every_message_once_unless_one_is_not_utf8(chatbot, loaded, frames):
    utf8 = all(is_utf8(b"".join(frame.fragments)) for frame in frames if frame.is_text)
    try:
        talk_json(chatbot, loaded, frames)
        assert utf8
    except ConnectionClosed as closed:
        assert close_code(closed) == 1007
        assert not utf8
        talk_json(chatbot, loaded, [])


@pytest.mark.parametrize("subprotocols", [None, [CHAT_V1]], ids=["plain", CHAT_V1])
def test_a_message_over_the_servers_limit_closes_the_socket_with_1009(
    chatbot, loaded, subprotocols
):
    with (
        connect(chatbot.ws, subprotocols=subprotocols) as websocket,
        pytest.raises(ConnectionClosed) as closed,
    ):
        websocket.send("x" * (MAX_FRAME_BYTES + 1))  # compressed, so that all of it is sent
        websocket.recv(timeout=HANG_S)
    assert closed.value.rcvd is not None
    assert closed.value.rcvd.code == 1009
    talk_plainly(chatbot, loaded, [])
