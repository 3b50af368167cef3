"""textbot.py on a real Serve: what it streams, when, and how each stream ends."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import requests
from running_bots import (
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
        textbot.gate.wait("step", 2)  # the model now stands before its second token
        textbot.gate.release()
        rest = b"".join(chunks)
    assert first and rest


def test_emoji_and_chinese_arrive_whole(bots: Bots):
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


def test_a_client_that_leaves_while_it_waits_never_starts_the_model(textbot, loaded):
    textbot.gate.hold_after(0)
    with ThreadPoolExecutor(1) as caller:
        running = caller.submit(http_reply, textbot, "Hello!", 2)
        textbot.gate.wait("step", 1)
        with pytest.raises(requests.ReadTimeout):
            requests.post(textbot.http, params={"prompt": PROMPTS[1]}, timeout=2)
        textbot.gate.wait("left", 1)
        textbot.gate.release()
        assert running.result() == reference(loaded, ["Hello!"], 2)
    http_reply(textbot, "Hello!", 2)
    assert textbot.gate.count("step") == 2 + 2


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


@pytest.mark.parametrize("name", ["textbot", "batchbot", "continuousbot"])
@pytest.mark.parametrize(
    ("query", "field"),
    [
        ({}, "prompt"),
        ({"prompt": ""}, "prompt"),
        ({"prompt": " \n"}, "prompt"),
        ({"prompt": "Hi", "max_new_tokens": "0"}, "max_new_tokens"),
        ({"prompt": "Hi", "max_new_tokens": "-1"}, "max_new_tokens"),
        ({"prompt": "Hi", "max_new_tokens": "many"}, "max_new_tokens"),
        ({"prompt": "Hi", "max_new_tokens": str(MAX_NEW_TOKENS + 1)}, "max_new_tokens"),
        ({"prompt": "Hi", "max_tokens": "5"}, "max_tokens"),
        ({"prompt": "Hi", "max_new_tokens": True}, "max_new_tokens"),
        ({"prompt": "Hi", "temperature": "2.5"}, "temperature"),
        ({"prompt": "Hi", "temperature": "nan"}, "temperature"),
        ({"prompt": "Hi", "top_p": "0"}, "top_p"),
        ({"prompt": "Hi", "top_k": "-1"}, "top_k"),
        ({"prompt": "Hi", "seed": "-1"}, "seed"),
        ({"prompt": "Hi", "stop": ["a", "b", "c", "d", "e"]}, "stop"),
    ],
)
def test_bad_parameters_are_a_422_that_names_the_field(bots: Bots, name, query, field):
    bot = getattr(bots, name)
    for place, response in {
        "query": requests.post(bot.http, params=query),
        "body": requests.post(bot.http, json=query),
    }.items():
        assert response.status_code == 422
        assert response.json()["detail"][0]["loc"] == [place, field]
        assert response.headers["X-Model"] == "tiny-dialog"


@pytest.mark.parametrize("name", ["textbot", "batchbot", "continuousbot"])
@pytest.mark.parametrize(
    "body", [b"Hi!", b'"Hi!"', b"[]", b"[" * 100_000, b'{"prompt": "\\ud800"}', b"\xff"]
)
def test_a_body_that_is_no_json_object_is_a_422(bots: Bots, name, body):
    response = requests.post(getattr(bots, name).http, data=body)
    assert response.status_code == 422
    assert response.json()["detail"][0]["loc"][0] == "body"


@pytest.mark.parametrize("name", ["textbot", "batchbot", "continuousbot"])
def test_a_prompt_that_does_not_fit_is_a_413_that_says_what_does(bots: Bots, name, loaded):
    room = loaded.context - MAX_NEW_TOKENS
    prompt = "word " * room
    tokens = len(loaded.tokenizer(prompt + loaded.tokenizer.eos_token)["input_ids"])
    bot = getattr(bots, name)
    response = requests.post(bot.http, json={"prompt": prompt})
    assert response.status_code == 413
    assert response.json() == {"detail": f"the prompt has {tokens} tokens, {room} fit"}
    response = requests.post(bot.http, json={"prompt": "x" * 1_000_000})
    assert response.status_code == 413
    assert response.json() == {"detail": f"the prompt has 1000000 bytes, {room * 64} are allowed"}
    response = requests.post(bot.http, json={"prompt": "x" * 5_000_000})
    assert response.status_code == 413
    assert response.json() == {"detail": "the body has more than the 4001000 bytes allowed"}
    assert response.headers["X-Model"] == "tiny-dialog"


STORY = "Tell me a story about dogs."


@pytest.mark.parametrize("name", ["textbot", "batchbot", "continuousbot"])
def test_a_seed_draws_the_same_reply_beside_others_and_alone(bots: Bots, name):
    bot = getattr(bots, name)
    bot.gate.open()

    def ask(seed: int | None) -> str:
        body = {"prompt": STORY, "temperature": 1.5, "max_new_tokens": 20, "seed": seed}
        return requests.post(bot.http, json=body).text

    with ThreadPoolExecutor(6) as callers:
        beside = list(callers.map(ask, [7, 8, None, 7, None, 8]))
    assert beside[0] == beside[3] == ask(7)
    assert beside[1] == beside[5] == ask(8)
    assert len(set(beside)) == 4


@pytest.mark.parametrize("name", ["textbot", "batchbot", "continuousbot"])
def test_a_stop_string_ends_the_reply_before_it_and_frees_the_model(bots: Bots, loaded, name):
    bot = getattr(bots, name)
    bot.gate.open()
    whole = reference(loaded, [STORY], MAX_NEW_TOKENS)
    parameters = {"prompt": STORY, "stop": [whole[20:26], "dog named"]}
    for send in ({"params": parameters}, {"json": parameters}):
        text = requests.post(bot.http, **send).text
        assert text == whole[: min(whole.index(stop) for stop in parameters["stop"])]
    assert bot.gate.count("step") < 2 * 12
