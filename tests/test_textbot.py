"""textbot.py: what it streams, when, and how each stream ends."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import requests
from bot_fixtures import (
    EMOJI_PROMPT,
    EMOJI_REPLY,
    MAX_NEW_TOKENS,
    WITH_KEY,
    Bots,
    http_reply,
    reference,
)

PROMPTS = ["Hello!", "Tell me a story about dogs.", "I am tired. I worked all day. What can I do?"]


@pytest.fixture
def textbot(bots: Bots):
    bots.textbot.gate.open()
    return bots.textbot


@pytest.mark.parametrize("prompt", PROMPTS)
def test_the_streamed_text_is_what_generate_says(textbot, loaded, prompt):
    assert http_reply(textbot, prompt) == reference(loaded, [prompt], MAX_NEW_TOKENS)


def test_a_json_body_says_the_same_as_the_query(textbot):
    query = {"prompt": "Tell me a joke", "max_new_tokens": 9}
    by_query = requests.post(textbot.http, params=query)
    assert requests.post(textbot.http, json=query).text == by_query.text
    assert by_query.headers["Content-Type"] == "text/plain; charset=utf-8"
    assert by_query.headers["X-Model"] == "tiny-dialog"


def test_the_last_slash_of_the_address_may_be_left_out(textbot, loaded):
    address = textbot.http.removesuffix("/")
    response = requests.post(address, params={"prompt": "Hello!"}, allow_redirects=False)
    assert response.text == reference(loaded, ["Hello!"], MAX_NEW_TOKENS)


def test_a_request_may_ask_for_a_shorter_reply(textbot, loaded):
    prompt = "Tell me a story about dogs."
    assert http_reply(textbot, prompt, max_new_tokens=7) == reference(loaded, [prompt], 7)


def test_the_first_chunk_arrives_while_the_model_still_generates(textbot):
    textbot.gate.hold_after(1)
    with requests.post(textbot.http, params={"prompt": "Hello!"}, stream=True) as response:
        chunks = response.iter_content(chunk_size=None)
        first = next(chunks)
        textbot.gate.wait("step", 2)  # the model now waits before its second token
        textbot.gate.release()
        rest = b"".join(chunks)
    assert first and rest


def test_unicode_arrives_whole(bots: Bots):
    bot = bots.emoji_textbot
    bot.gate.open()
    with requests.post(
        bot.http, params={"prompt": EMOJI_PROMPT}, headers=WITH_KEY, stream=True
    ) as response:
        chunks = [chunk.decode() for chunk in response.iter_content(chunk_size=None)]
    assert "".join(chunks) == EMOJI_REPLY


def test_64_requests_are_open_at_once_and_replied_to_in_order(textbot, loaded):
    textbot.gate.hold_after(0)
    finished = []

    def ask(number: int) -> str:
        text = http_reply(textbot, "Hello!", max_new_tokens=2)
        finished.append(number)
        return text

    with ThreadPoolExecutor(64) as callers:
        replies = []
        for number in range(64):
            replies.append(callers.submit(ask, number))
            textbot.gate.wait("submitted", number + 1)
        assert textbot.gate.count("step") <= 1  # one generates, the others wait
        for number in range(64):
            textbot.gate.release(2)
            replies[number].result()
    assert finished == list(range(64))
    assert {reply.result() for reply in replies} == {reference(loaded, ["Hello!"], 2)}


def test_a_client_that_leaves_stops_the_model(textbot, loaded):
    textbot.gate.hold_after(3)
    with requests.post(textbot.http, params={"prompt": PROMPTS[1]}, stream=True) as response:
        chunks = response.iter_content(chunk_size=None)
        assert next(chunks)
        textbot.gate.wait("step", 4)
    textbot.gate.wait("left", 1)
    textbot.gate.release()
    assert http_reply(textbot, "Hello!", max_new_tokens=2) == reference(loaded, ["Hello!"], 2)
    assert textbot.gate.count("step") == 4 + 2


def test_a_failure_before_the_first_token_is_a_500_with_a_detail(textbot, loaded):
    textbot.gate.fail_at(1)
    response = requests.post(textbot.http, params={"prompt": "Hello!"})
    assert response.status_code == 500
    assert response.json() == {"detail": "the reply failed: RuntimeError"}
    assert response.headers["X-Model"] == "tiny-dialog"
    assert http_reply(textbot, "Hello!") == reference(loaded, ["Hello!"], MAX_NEW_TOKENS)


def test_a_failure_in_the_middle_breaks_the_stream_off(textbot, loaded):
    textbot.gate.fail_at(3)
    with pytest.raises(requests.exceptions.ChunkedEncodingError):
        requests.post(textbot.http, params={"prompt": "Hello!"})
    assert http_reply(textbot, "Hello!") == reference(loaded, ["Hello!"], MAX_NEW_TOKENS)
