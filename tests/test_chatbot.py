"""chatbot.py: one conversation per socket, and how it ends."""

import asyncio
import json
import weakref
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import pytest
from bot_fixtures import CHAT_MAX_NEW_TOKENS, EMOJI_PROMPT, EMOJI_REPLY, WITH_KEY, Bots, reference
from callers import ChatCaller, ask, receive
from engines import limits_of, reply_options
from fastapi import WebSocket
from ray.exceptions import ActorDiedError, TaskCancelledError
from websockets.exceptions import ConnectionClosedError, InvalidStatus
from websockets.sync.client import connect

from chatbot import Chatbot
from streaming_bots.chat import connection
from streaming_bots.chat.connection import MAX_PROMPTS_AHEAD, ChatConnection
from streaming_bots.errors import BadMessage, PromptTooLong
from streaming_bots.settings import ChatbotSettings

HANG_S = 60


@pytest.fixture
def chatbot(bots: Bots):
    bots.chatbot.gate.open()
    return bots.chatbot


def test_the_handshake_names_the_model(chatbot):
    with connect(chatbot.ws) as websocket:
        assert websocket.response.headers["X-Model"] == "tiny-dialog"


def test_a_conversation_is_remembered(chatbot, loaded):
    first, second = "My name is Anna.", "What is my name?"
    with connect(chatbot.ws) as websocket:
        reply = ask(websocket, first)
        assert reply == reference(loaded, [first], CHAT_MAX_NEW_TOKENS)
        with_memory = ask(websocket, second)
    assert with_memory == reference(loaded, [first, reply, second], CHAT_MAX_NEW_TOKENS)
    assert with_memory != reference(loaded, [second], CHAT_MAX_NEW_TOKENS)
    assert "Anna" in with_memory


def test_the_last_slash_of_the_address_may_be_left_out(chatbot, loaded):
    with connect(chatbot.ws.removesuffix("/")) as websocket:
        assert ask(websocket, "Hello!") == reference(loaded, ["Hello!"], CHAT_MAX_NEW_TOKENS)


def test_two_clients_have_two_conversations(chatbot, loaded):
    question = "What is my name?"
    with connect(chatbot.ws) as one, connect(chatbot.ws) as other:
        ask(one, "My name is Anna.")
        ask(other, "My name is Omar.")
        assert "Anna" in ask(one, question)
        assert "Omar" in ask(other, question)
    with connect(chatbot.ws) as stranger:
        assert ask(stranger, question) == reference(loaded, [question], CHAT_MAX_NEW_TOKENS)


def test_a_conversation_longer_than_the_context_drops_its_oldest_exchanges(chatbot, loaded):
    room = loaded.context - CHAT_MAX_NEW_TOKENS
    tokenizer, turns, dropped = loaded.tokenizer, [], False
    prompts = ["My name is Anna.", "I like apples.", "Tell me a joke.", "What is the weather like?"]
    with connect(chatbot.ws) as websocket:
        for prompt in prompts * 2 + ["What is my name?"]:
            turns.append(prompt)
            while len(tokenizer(tokenizer.eos_token.join([*turns, ""]))["input_ids"]) > room:
                turns, dropped = turns[2:], True
            reply = ask(websocket, prompt)
            assert reply == reference(loaded, turns, CHAT_MAX_NEW_TOKENS)
            turns.append(reply)
    assert dropped


def test_the_first_text_arrives_while_the_model_still_generates(chatbot):
    chatbot.gate.hold_after(1)
    with connect(chatbot.ws) as websocket:
        websocket.send("Hello!")
        assert websocket.recv(timeout=HANG_S) != "<>"
        chatbot.gate.wait("step", 2)
        chatbot.gate.release()
        assert receive(websocket)


def test_emoji_and_chinese_arrive_whole_and_each_with_its_last_byte(bots: Bots):
    gate = bots.emoji_chatbot.gate
    gate.hold_after(0)
    with connect(bots.emoji_chatbot.ws, additional_headers=WITH_KEY) as websocket:
        websocket.send(EMOJI_PROMPT)
        for character in EMOJI_REPLY:
            gate.release(len(character.encode()))  # a token for each byte
            assert websocket.recv(timeout=HANG_S) == character
        gate.release()
        assert receive(websocket) == []


def test_a_blank_message_is_answered_by_the_marker_alone(chatbot, loaded):
    with connect(chatbot.ws) as websocket:
        websocket.send(" \n")
        assert receive(websocket) == []
        websocket.send("")
        assert receive(websocket) == []
        assert ask(websocket, "Hello!") == reference(loaded, ["Hello!"], CHAT_MAX_NEW_TOKENS)


def test_prompts_sent_ahead_are_answered_in_order(chatbot, loaded):
    prompts, turns = ["Hello!", "My name is Anna.", "What is my name?"], []
    with connect(chatbot.ws) as websocket:
        for prompt in prompts:
            websocket.send(prompt)
        for prompt in prompts:
            turns.append(prompt)
            turns.append("".join(receive(websocket)))
            assert turns[-1] == reference(loaded, turns[:-1], CHAT_MAX_NEW_TOKENS)


def test_a_client_that_sends_too_many_prompts_ahead_is_told_so(chatbot):
    chatbot.gate.hold_after(0)
    with connect(chatbot.ws) as websocket, pytest.raises(ConnectionClosedError) as closed:
        for _ in range(MAX_PROMPTS_AHEAD + 2):
            websocket.send("Hello!")
        websocket.recv(timeout=HANG_S)
    assert closed.value.rcvd.code == 1013
    chatbot.gate.wait("cancelled", MAX_PROMPTS_AHEAD + 1)


def test_a_client_that_sends_too_many_characters_ahead_is_told_so(chatbot, monkeypatch):
    monkeypatch.setattr(connection, "MAX_CHARACTERS_AHEAD", 99)
    chatbot.gate.hold_after(0)
    with connect(chatbot.ws) as websocket, pytest.raises(ConnectionClosedError) as closed:
        for prompt in ("x" * 99, "x", "Hello!"):  # the last prompt comes when 100 characters wait
            websocket.send(prompt)
        websocket.recv(timeout=HANG_S)
    assert (closed.value.rcvd.code, closed.value.rcvd.reason) == (
        1013,
        "100 characters wait for a reply",
    )


def test_100_sockets_are_open_at_once_and_prompts_wait_their_turn(chatbot):
    sockets = [connect(chatbot.ws).__enter__() for _ in range(100)]
    chatbot.gate.hold_after(0)
    for number, websocket in enumerate(sockets):
        websocket.send("Hello!")
        chatbot.gate.wait("submitted", number + 1)
    assert chatbot.gate.count("step") <= 1
    chatbot.gate.release()
    assert len({"".join(receive(websocket)) for websocket in sockets}) == 1
    for websocket in sockets:
        websocket.close()


def test_clients_are_told_to_try_again_later_if_too_many_prompts_wait(chatbot):
    chatbot.gate.hold_after(0)
    callers = [ChatCaller(chatbot, "Hello!")]
    chatbot.gate.wait("step", 1)
    for number in range(ChatbotSettings.max_waiting):
        callers.append(ChatCaller(chatbot, "Hello!"))
        chatbot.gate.wait("submitted", number + 2)
    assert ChatCaller(chatbot, "Hello!").outcome() == "refused"
    with connect(chatbot.ws, subprotocols=["chat.v1"]) as websocket:
        websocket.send('{"type": "prompt", "prompt": "Hello!"}')
        assert json.loads(websocket.recv(timeout=HANG_S)) == {
            "type": "error",
            "detail": f"{ChatbotSettings.max_waiting} prompts already wait for the model",
        }
    chatbot.gate.wait("refused", 2)
    for caller in callers:
        caller.leave("close")
    chatbot.gate.wait("cancelled", len(callers))
    chatbot.gate.release()
    assert chatbot.gate.count("refused") == 2


@pytest.mark.parametrize("abort", [False, True], ids=["close", "reset"])
def test_a_client_that_leaves_stops_the_model(chatbot, loaded, abort):
    chatbot.gate.hold_after(3)
    with connect(chatbot.ws, close_timeout=0) as websocket:
        websocket.send("Tell me a story about dogs.")
        websocket.recv(timeout=HANG_S)
        chatbot.gate.wait("step", 4)
        if abort:
            websocket.socket.close()
        else:
            websocket.close()
    chatbot.gate.wait("left", 1)
    chatbot.gate.release()
    with connect(chatbot.ws) as websocket:
        reply = ask(websocket, "Hello!")
    assert reply == reference(loaded, ["Hello!"], CHAT_MAX_NEW_TOKENS)
    tokens = len(loaded.tokenizer(reply + loaded.tokenizer.eos_token)["input_ids"])
    assert chatbot.gate.count("step") == 4 + tokens


@pytest.mark.parametrize("step", [1, 3], ids=["before the first token", "in the middle"])
def test_a_failure_closes_the_socket_with_1011(chatbot, loaded, step):
    chatbot.gate.fail_at(step)
    with connect(chatbot.ws) as websocket, pytest.raises(ConnectionClosedError) as closed:
        ask(websocket, "Hello!")
    assert closed.value.rcvd.code == 1011
    assert closed.value.rcvd.reason == "the reply failed: RuntimeError"
    with connect(chatbot.ws) as websocket:
        assert ask(websocket, "Hello!") == reference(loaded, ["Hello!"], CHAT_MAX_NEW_TOKENS)


def test_a_binary_message_closes_the_socket_with_1003(chatbot):
    with connect(chatbot.ws) as websocket, pytest.raises(ConnectionClosedError) as closed:
        websocket.send(b"Hello!")
        websocket.recv(timeout=HANG_S)
    assert closed.value.rcvd.code == 1003


def test_a_prompt_that_does_not_fit_closes_the_socket_with_1009(chatbot, loaded):
    room = loaded.context - CHAT_MAX_NEW_TOKENS
    prompt = "word " * room
    tokens = len(loaded.tokenizer(prompt + loaded.tokenizer.eos_token)["input_ids"])
    for too_long, reason in {
        prompt: f"the prompt has {tokens} tokens, {room} fit",
        "x" * 100_000: f"the prompt has 100000 bytes, {room * 64} are allowed",
    }.items():
        with connect(chatbot.ws) as websocket, pytest.raises(ConnectionClosedError) as closed:
            websocket.send(too_long)
            websocket.recv(timeout=HANG_S)
        assert (closed.value.rcvd.code, closed.value.rcvd.reason) == (1009, reason)


def test_a_shorter_reply_leaves_more_room_for_a_prompt(chatbot, loaded):
    prompt = "word " * 200
    with connect(f"{chatbot.ws}?max_new_tokens=3") as websocket:
        assert ask(websocket, prompt) == reference(loaded, [prompt], 3)
    with connect(f"{chatbot.ws}?max_new_tokens=3") as websocket:
        websocket.send("x" * 10_000)  # more bytes than would fit beside a reply of 400 tokens
        with pytest.raises(ConnectionClosedError, match="tokens"):
            websocket.recv(timeout=HANG_S)


def test_the_options_of_a_chat_are_in_the_query_of_its_handshake(chatbot, loaded):
    def replies(query: str) -> list[str]:
        with connect(f"{chatbot.ws}?{query}") as websocket:
            return [ask(websocket, "Tell me a story about dogs.") for _ in range(2)]

    sampled = "temperature=1.5&max_new_tokens=10&seed"
    assert replies(f"{sampled}=7") == replies(f"{sampled}=7") != replies(f"{sampled}=8")
    story = reference(loaded, ["Tell me a story about dogs."], CHAT_MAX_NEW_TOKENS)
    assert replies("stop=dog&stop=sea")[0] == story[: story.index("dog")]
    assert replies("max_new_tokens=3")[0] == reference(loaded, ["Tell me a story about dogs."], 3)


@pytest.mark.parametrize("subprotocols", [None, ["chat.v1"]], ids=["plain", "chat.v1"])
@pytest.mark.parametrize(
    ("query", "field"),
    [("temperature=hot", "temperature"), ("max_new_tokens=0", "max_new_tokens"), ("a=b", "a")],
)
def test_a_handshake_with_a_bad_option_is_refused_with_its_name(
    chatbot, query, field, subprotocols
):
    with pytest.raises(InvalidStatus) as refused:
        connect(f"{chatbot.ws}?{query}", subprotocols=subprotocols).__enter__()
    assert refused.value.response.status_code == 422
    assert json.loads(refused.value.response.body)["detail"][0]["loc"] == ["query", field]
    chatbot.gate.wait("refused", 1)


def connection_to(ws: Any) -> ChatConnection:
    """Return a connection without a real bot."""
    drain = SimpleNamespace(begun=asyncio.Event())
    bot = limits_of(9, 9, system_messages=list, metrics=Mock(), drain=drain)
    return ChatConnection(ws, bot, reply_options(9), "<>")


def socket_that_receives(*messages: dict[str, Any]) -> tuple[WebSocket, list[str]]:
    """Return a WebSocket whose client sends these, and the list of message types it gets."""
    received, sent = [{"type": "websocket.connect"}, *messages], []

    async def receive() -> Any:
        if not received:
            await asyncio.Event().wait()
        return received.pop(0)

    async def send(message: Any) -> None:
        sent.append(message["type"])

    return WebSocket({"type": "websocket", "subprotocols": []}, receive, send), sent


@pytest.mark.parametrize("error", [TaskCancelledError, ActorDiedError])
def test_a_read_that_serve_ends_is_treated_as_a_client_that_has_left(error, caplog):
    """Serve cancels reads when many clients leave at once. On Ctrl-C, its proxy dies."""

    async def open_chat() -> None:
        ws, _ = socket_that_receives()
        await ws.accept()
        async with asyncio.timeout(HANG_S), connection_to(ws).open(), asyncio.TaskGroup():
            raise error

    asyncio.run(open_chat())
    assert not [record for record in caplog.records if record.name == "ray.serve"]


def test_a_client_that_keeps_sending_on_a_closed_socket_causes_no_error(caplog):
    """An error closes a plain socket, but prompts may still arrive before the client's close."""
    prompt = {"type": "websocket.receive", "text": "Hello!"}

    async def open_chat() -> list[str]:
        ws, sent = socket_that_receives(*[prompt] * (MAX_PROMPTS_AHEAD + 2))
        await ws.accept()
        connection = connection_to(ws)
        async with asyncio.timeout(HANG_S), connection.open(), asyncio.TaskGroup():
            await connection.close(BadMessage("no prompt"))
            await Chatbot.func_or_class.receive(None, ws, connection)
        return sent

    assert asyncio.run(open_chat()) == ["websocket.accept", "websocket.close"]
    assert not [record for record in caplog.records if record.name == "ray.serve"]


class Text(str):
    """Text that can be watched by a weak reference."""


@pytest.mark.parametrize("text", ["no JSON", '{"type": "prompt", "prompt": 7}', 1_000_000 * "["])
def test_a_refused_message_is_not_kept_until_its_answer(text):
    async def take() -> None:
        ws = WebSocket({"type": "websocket", "subprotocols": ["chat.v1"]}, None, None)
        connection = connection_to(ws)
        message = {"type": "websocket.receive", "text": Text(text)}
        kept = weakref.ref(message["text"])
        await connection.take(message)
        message.clear()
        assert isinstance(connection.unanswered[0].error, BadMessage | PromptTooLong)
        assert kept() is None

    asyncio.run(take())


@pytest.mark.parametrize("leaves", [True, False])
def test_an_ending_replica_distinguishes_clients_that_left_from_those_it_refuses(leaves):
    prompt = {"type": "websocket.receive", "text": "Hello!"}
    leaving = {"type": "websocket.disconnect", "code": 1001}

    async def open_chat() -> Mock:
        ws, _ = socket_that_receives(prompt, *[leaving] * leaves)
        await ws.accept()
        connection, read = connection_to(ws), asyncio.Event()
        take = connection.take

        async def take_and_tell(message: Any) -> None:
            await take(message)
            read.set()

        connection.take = take_and_tell
        async with asyncio.timeout(HANG_S), connection.open(), asyncio.TaskGroup() as tasks:
            connection.prompts.put_nowait(None)  # the replica is about to end
            tasks.create_task(Chatbot.func_or_class.receive(None, ws, connection))
            await read.wait()
            if leaves:
                await asyncio.Event().wait()
            async for _ in connection:
                pass
        return connection.bot.metrics

    metrics = asyncio.run(open_chat())
    metrics.count.assert_called_once_with("cancelled" if leaves else "refused")


FLOODS = {
    "pings": ({"text": '{"type": "ping"}'}, 201),
    "stops": ({"text": '{"type": "stop"}'}, 201),
    "what is no prompt": ({"text": "{}"}, 201),
    "much text": ({"text": "x" * 2_000_000}, 3),
}


@pytest.mark.parametrize("flood", FLOODS)
def test_a_client_that_floods_its_connection_is_told_to_try_again_later(chatbot, flood):
    message, count = FLOODS[flood]
    with connect(chatbot.ws, subprotocols=["chat.v1"], max_queue=None) as websocket:
        for _ in range(count):
            websocket.send(message["text"])
        with pytest.raises(ConnectionClosedError) as closed:
            while True:
                websocket.recv(timeout=HANG_S)
    assert (closed.value.rcvd.code, closed.value.rcvd.reason) == (
        1013,
        "too many messages in a second",
    )
