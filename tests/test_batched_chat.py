"""The Chatbot on continuous batches: many conversations at once, each on its own."""

from concurrent.futures import ThreadPoolExecutor

import pytest
from bot_fixtures import CHAT_MAX_NEW_TOKENS, Bot, Bots, reference
from callers import ChatCaller, ask
from gates import Gate
from stepped_bots import stepped
from test_chat_v1 import chat
from websockets.sync.client import connect

from streaming_bots.models.source import BUNDLED

STORY, QUESTION = "Tell me a story about dogs.", "What is my name?"
NAMES = ["Anna", "Omar", "Lucy", "Emma", "Jack", "Maria", "Tom", "Ben"]


@pytest.fixture
def chatbot(bots: Bots) -> Bot:
    bots.batched_chatbot.gate.open()
    return bots.batched_chatbot


def test_32_chats_at_once_get_the_replies_they_would_get_alone(chatbot, loaded):
    """The chats have different lengths. Each remembers only its own messages."""
    introductions = [
        f"My name is {NAMES[number % len(NAMES)]}{'!' * (number // len(NAMES))}"
        for number in range(32)
    ]

    def talk(introduction: str) -> list[str]:
        with connect(chatbot.ws) as websocket:
            return [ask(websocket, prompt) for prompt in (introduction, QUESTION)]

    with ThreadPoolExecutor(len(introductions)) as clients:
        replies = list(clients.map(talk, introductions))
    for introduction, (welcome, answer) in zip(introductions, replies, strict=True):
        assert welcome == reference(loaded, [introduction], CHAT_MAX_NEW_TOKENS)
        turns = [introduction, welcome, QUESTION]
        assert answer == reference(loaded, turns, CHAT_MAX_NEW_TOKENS)
    assert chatbot.gate.count("finished") == 64


def test_a_reply_begins_beside_31_others_within_one_step(chatbot, loaded):
    chatbot.gate.hold_after(0)
    others = [ChatCaller(chatbot, STORY) for _ in range(31)]
    chatbot.gate.wait("submitted", 31)
    chatbot.gate.release(4)
    for other in others:
        other.first()
    chatbot.gate.wait("step", 5)
    joining = ChatCaller(chatbot, STORY)
    chatbot.gate.wait("submitted", 32)
    chatbot.gate.release(2)  # the step that has begun, and one with all rows
    joining.first()
    chatbot.gate.release()
    for caller in (*others, joining):
        assert caller.outcome() == "finished"
        assert caller.text == reference(loaded, [STORY], CHAT_MAX_NEW_TOKENS)


@pytest.fixture(scope="module")
def two_places(bots: Bots) -> Bot:
    gate = Gate()
    app = stepped("batched_chatbot", gate, {}, model=BUNDLED, max_batch_size=2)
    return bots.run(app, "two_places", gate)


def test_a_chat_without_a_place_is_told_how_many_must_end_first(two_places):
    two_places.gate.hold_after(0)
    with chat(two_places) as one, chat(two_places) as two, chat(two_places) as three:
        for number, client in enumerate((one, two)):
            client.prompt(STORY)
            two_places.gate.wait("submitted", number + 1)
        three.prompt(STORY)
        assert three.receive() == {"type": "waiting", "ahead": 1}
        two.send(type="stop")  # which frees its place for the third
        assert two.answer()[1]["finish_reason"] == "cancelled"
        assert three.receive() == {"type": "waiting", "ahead": 0}
        two_places.gate.release()
        for client in (one, three):
            assert client.answer()[1]["type"] == "done"
    two_places.gate.wait("cancelled", 1)


def test_an_abandoned_chat_frees_its_place(two_places):
    two_places.gate.hold_after(0)
    leaving, staying = ChatCaller(two_places, STORY), ChatCaller(two_places, STORY)
    two_places.gate.wait("submitted", 2)
    two_places.gate.release(3)  # the model reads the second prompt in the first step or the next
    for caller in (leaving, staying):
        caller.first()
    waiting = ChatCaller(two_places, STORY)
    two_places.gate.wait("submitted", 3)
    leaving.leave("close")
    two_places.gate.wait("cancelled", 1)
    two_places.gate.release()
    assert {caller.outcome() for caller in (staying, waiting)} == {"finished"}
