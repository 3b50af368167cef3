"""chat.v1: the subprotocol in which clients can stop replies and conversations survive errors."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from bot_fixtures import (
    ALLOWED_ORIGIN,
    CHAT_MAX_NEW_TOKENS,
    HANG_S,
    KEY,
    Bot,
    Bots,
    reference,
)
from stepped_bots import ENCODE_ERROR
from test_access import in_base64
from websockets.exceptions import ConnectionClosedError
from websockets.sync.client import connect

from streaming_bots.chat.connection import MAX_PROMPTS_AHEAD

HELLO, STORY = "Hello!", "Tell me a story about dogs."


class Client:
    """A client of chat.v1."""

    def __init__(self, websocket: Any) -> None:
        self.websocket = websocket

    def send(self, **message: Any) -> None:
        self.websocket.send(json.dumps(message))

    def prompt(self, prompt: str, **options: Any) -> None:
        self.send(type="prompt", prompt=prompt, **options)

    def receive(self) -> dict[str, Any]:
        return json.loads(self.websocket.recv(timeout=HANG_S))

    def answer(self) -> tuple[str, dict[str, Any]]:
        """Return the text of a reply, and the message that ends it."""
        text = ""
        while (message := self.receive())["type"] in ("waiting", "text"):
            text += message.get("text", "")
        return text, message

    def ask(self, prompt: str, **options: Any) -> tuple[str, dict[str, Any]]:
        self.prompt(prompt, **options)
        return self.answer()


@contextmanager
def chat(bot: Bot) -> Iterator[Client]:
    with connect(bot.ws, subprotocols=["chat.v1"]) as websocket:
        assert websocket.subprotocol == "chat.v1"
        yield Client(websocket)


@pytest.fixture(params=["chatbot", "batched_chatbot"])
def chatbot(request: pytest.FixtureRequest, bots: Bots) -> Bot:
    bot = getattr(bots, request.param)
    bot.gate.open()
    return bot


@pytest.fixture
def one_at_a_time(bots: Bots) -> Bot:
    bots.chatbot.gate.open()
    return bots.chatbot


def test_a_reply_ends_with_its_reason_its_tokens_and_its_time(chatbot, loaded):
    with chat(chatbot) as client:
        text, done = client.ask(HELLO)
        assert text == reference(loaded, [HELLO], CHAT_MAX_NEW_TOKENS)
        tokens = len(loaded.tokenizer(text + loaded.tokenizer.eos_token)["input_ids"])
        assert (done["type"], done["finish_reason"], done["tokens"]) == ("done", "stop", tokens)
        assert done["seconds"] > 0


def test_a_prompt_may_limit_its_reply(chatbot, loaded):
    with chat(chatbot) as client:
        text, done = client.ask(STORY, max_new_tokens=5)
    assert text == reference(loaded, [STORY], 5)
    assert (done["finish_reason"], done["tokens"]) == ("length", 5)


def test_a_conversation_is_remembered(chatbot, loaded):
    turns = ["My name is Anna."]
    with chat(chatbot) as client:
        turns += [client.ask(turns[0])[0], "What is my name?"]
        text, _ = client.ask(turns[-1])
    assert text == reference(loaded, turns, CHAT_MAX_NEW_TOKENS)


def test_the_end_of_a_reply_says_how_many_messages_the_model_no_longer_sees(chatbot):
    with chat(chatbot) as client:
        ends = [client.ask(f"{'word ' * 30}{number}")[1] for number in range(3)]
        sees = [(end["messages"], end["dropped"]) for end in ends]
    assert sees[0] == (2, 0)
    assert sees[-1][1] > 0
    assert [sum(pair) for pair in sees] == [2, 4, 6]


def test_a_ping_is_answered_even_during_a_reply(chatbot):
    chatbot.gate.hold_after(1)
    with chat(chatbot) as client:
        client.prompt(STORY)
        assert client.receive()["type"] == "text"
        chatbot.gate.wait("step", 2)
        client.send(type="ping")
        assert client.receive() == {"type": "pong"}
        chatbot.gate.release()
        assert client.answer()[1]["type"] == "done"


def test_the_length_limit_of_a_prompt_does_not_depend_on_its_json_escapes(chatbot, loaded):
    # In JSON, each character is \u00e4, six bytes. The bot counts tokens, and these are too many.
    with chat(chatbot) as client:
        text, end = client.ask("ä" * 3000)
    assert (text, end["type"]) == ("", "error")
    assert "tokens, 112 fit" in end["detail"]


def test_stop_ends_the_reply_and_keeps_the_conversation(chatbot, loaded):
    chatbot.gate.hold_after(3)
    with chat(chatbot) as client:
        client.prompt(STORY)
        first = client.receive()["text"]
        chatbot.gate.wait("step", 4)
        client.send(type="stop")
        rest, done = client.answer()
        assert (done["finish_reason"], done["tokens"]) == ("cancelled", 3)
        assert first + rest == reference(loaded, [STORY], 3)
        chatbot.gate.release()
        turns = [STORY, first + rest, HELLO]
        assert client.ask(HELLO)[0] == reference(loaded, turns, CHAT_MAX_NEW_TOKENS)
    chatbot.gate.wait("cancelled", 1)
    chatbot.gate.wait("finished", 1)


def test_stop_also_ends_waiting_prompts_but_no_later_ones(chatbot, loaded):
    chatbot.gate.hold_after(2)
    with chat(chatbot) as client:
        client.send(type="stop")  # there is nothing to stop
        client.prompt(STORY)
        client.prompt("What is my name?")
        assert client.receive()["type"] == "text"
        chatbot.gate.wait("step", 3)
        client.send(type="stop")
        client.prompt(HELLO, max_new_tokens=2)
        _, done = client.answer()
        assert done["finish_reason"] == "cancelled"
        assert client.receive() | {"seconds": 0} == {
            "type": "done",
            "finish_reason": "cancelled",
            "tokens": 0,
            "seconds": 0,
            "messages": 2,
            "dropped": 0,
        }
        chatbot.gate.release()
        while (message := client.receive())["type"] != "done":
            assert message["type"] in ("waiting", "text")
        assert (message["finish_reason"], message["tokens"]) == ("length", 2)


def test_a_waiting_client_is_told_how_many_prompts_are_ahead(one_at_a_time, loaded):
    one_at_a_time.gate.hold_after(0)
    with chat(one_at_a_time) as one, chat(one_at_a_time) as two, chat(one_at_a_time) as three:
        one.prompt(HELLO)
        one_at_a_time.gate.wait("step", 1)
        two.prompt("My name is Anna.")
        assert two.receive() == {"type": "waiting", "ahead": 1}
        three.prompt(HELLO)
        assert three.receive() == {"type": "waiting", "ahead": 2}
        two.send(type="stop")  # it ends before its turn
        assert two.answer()[1]["finish_reason"] == "cancelled"
        assert three.receive() == {"type": "waiting", "ahead": 1}  # the line has moved
        one_at_a_time.gate.release()
        assert one.answer()[1]["finish_reason"] == "stop"
        assert three.receive() == {"type": "waiting", "ahead": 0}
        assert three.answer()[1]["finish_reason"] == "stop"
        # The conversation does not remember a prompt that never began.
        question = "What is my name?"
        assert two.ask(question)[0] == reference(loaded, [question], CHAT_MAX_NEW_TOKENS)


@pytest.mark.parametrize(
    ("frame", "detail"),
    [
        (b"Hello!", "a message is JSON in a text message, not a binary one"),
        ("Hello!", "the message is not a JSON object"),
        ("[]", "the message is not a JSON object"),
        ("{}", 'a message is {"type": "prompt", "prompt": ...}, a "stop" or a "ping"'),
        ('{"type": "stop", "now": 1}', "a message is"),
        ('{"type": "prompt"}', "prompt: Field required"),
        ('{"type": "prompt", "prompt": " "}', "prompt: Value error, a blank prompt has no reply"),
        ('{"type": "prompt", "prompt": "\\ud800"}', "the message has a lone surrogate"),
        ('{"type": "prompt", "prompt": "Hi", "max_new_tokens": 0}', "max_new_tokens: "),
        ('{"type": "prompt", "prompt": "Hi", "loudness": 3}', "loudness: Extra inputs"),
        (
            '{"type": "prompt", "prompt": "' + "x" * 20_000 + '"}',
            "the prompt has 20000 bytes, 7168 are allowed",
        ),
        (
            '{"type": "prompt", "prompt": "' + "word " * 400 + '"}',
            "the prompt has 403 tokens, 112 fit",
        ),
    ],
)
def test_an_error_answers_its_message_and_leaves_the_conversation_open(
    chatbot, loaded, frame, detail
):
    turns = ["My name is Anna."]
    with chat(chatbot) as client:
        turns += [client.ask(turns[0])[0], "What is my name?"]
        client.websocket.send(frame)
        error = client.receive()
        assert error["type"] == "error"
        assert error["detail"].startswith(detail)
        assert client.ask(turns[-1])[0] == reference(loaded, turns, CHAT_MAX_NEW_TOKENS)
    chatbot.gate.wait("refused", 1)
    chatbot.gate.wait("finished", 2)


def test_a_failure_answers_its_prompt_and_leaves_the_conversation_open(one_at_a_time, loaded):
    turns = ["My name is Anna."]
    with chat(one_at_a_time) as client:
        turns += [client.ask(turns[0])[0], "What is my name?"]
        assert client.ask(ENCODE_ERROR)[1] == {
            "type": "error",
            "detail": "the reply failed: ValueError",
        }
        one_at_a_time.gate.fail_at(3)
        began, error = client.ask(STORY)
        assert began
        assert error == {"type": "error", "detail": "the reply failed: RuntimeError"}
        assert client.ask(turns[-1])[0] == reference(loaded, turns, CHAT_MAX_NEW_TOKENS)


def test_every_message_is_answered_in_order(chatbot):
    with chat(chatbot) as client:
        client.prompt(HELLO, max_new_tokens=2)
        client.websocket.send("{")
        client.prompt(HELLO, max_new_tokens=3)
        assert client.answer()[1]["tokens"] == 2
        assert client.answer()[1]["type"] == "error"
        assert client.answer()[1]["tokens"] == 3


def test_a_client_that_sends_too_much_ahead_is_told_to_try_again_later(chatbot):
    chatbot.gate.hold_after(0)
    with chat(chatbot) as client, pytest.raises(ConnectionClosedError) as closed:
        for _ in range(MAX_PROMPTS_AHEAD + 2):
            client.prompt(HELLO)
        client.receive()
    assert closed.value.rcvd.code == 1013
    chatbot.gate.wait("cancelled", MAX_PROMPTS_AHEAD + 1)
    chatbot.gate.wait("refused", 1)


def test_a_key_that_a_browser_offers_as_a_subprotocol_is_not_echoed(bots: Bots):
    offered = ["chat.v1", in_base64(KEY)]
    with connect(bots.emoji_chatbot.ws, subprotocols=offered, origin=ALLOWED_ORIGIN) as websocket:
        assert websocket.subprotocol == "chat.v1"
        assert KEY not in str(websocket.response.headers)
        assert in_base64(KEY) not in str(websocket.response.headers)


def test_a_prompt_may_have_options_of_its_own(chatbot, loaded):
    with chat(chatbot) as client:
        drawn = [
            client.ask(STORY, temperature=1.5, seed=seed, max_new_tokens=10)[0] for seed in (7, 8)
        ]
    with chat(chatbot) as client:
        text, end = client.ask(STORY, temperature=1.5, seed=7, max_new_tokens=10)
        assert text == drawn[0] != drawn[1]
        assert end["finish_reason"] == "length"
    with chat(chatbot) as client:
        text, end = client.ask(STORY, stop=["dog"])
        story = reference(loaded, [STORY], CHAT_MAX_NEW_TOKENS)
        assert text == story[: story.index("dog")]
        assert end["finish_reason"] == "stop"
        client.prompt(STORY, temperature=3)
        detail = "temperature: Input should be less than or equal to 2"
        assert client.receive() == {"type": "error", "detail": detail}


def test_an_option_that_is_null_is_that_of_the_connection(chatbot, loaded):
    with connect(f"{chatbot.ws}?max_new_tokens=3&stop=x", subprotocols=["chat.v1"]) as websocket:
        options = dict.fromkeys(["max_new_tokens", "temperature", "seed", "stop"])
        text, end = Client(websocket).ask(STORY, **options)
    assert (text, end["finish_reason"]) == (reference(loaded, [STORY], 3), "length")
