"""`POST /` of the HTTP bots: what they accept and refuse, and how they report failures."""

from concurrent.futures import ThreadPoolExecutor
from http.client import HTTPConnection
from urllib.parse import urlsplit

import pytest
import requests
from bot_fixtures import (
    ALLOWED_ORIGIN,
    EMOJI_PROMPT,
    EMOJI_REPLY,
    HANG_S,
    MAX_NEW_TOKENS,
    WITH_KEY,
    Bot,
    Bots,
    http_reply,
    reference,
)
from callers import HttpCaller
from stepped_bots import DECODE_ERROR, ENCODE_ERROR

from batchbot import Batchbot
from continuousbot import Continuousbot
from streaming_bots.http import request
from textbot import Textbot

STORY = "Tell me a story about dogs."
ACCESS = [  # headers, and the status that a bot with a key answers
    (WITH_KEY, 200),
    ({}, 401),
    (WITH_KEY | {"Host": "evil.example"}, 400),
    (WITH_KEY | {"Origin": "https://evil.example"}, 403),
    (WITH_KEY | {"Origin": "null"}, 403),
    (WITH_KEY | {"Origin": ALLOWED_ORIGIN}, 200),
]


@pytest.fixture(params=["textbot", "batchbot", "continuousbot"])
def bot(request: pytest.FixtureRequest, bots: Bots) -> Bot:
    bot = getattr(bots, request.param)
    bot.gate.open()
    return bot


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
def test_bad_parameters_are_a_422_that_names_the_field(bot, query, field):
    for place, response in {
        "query": requests.post(bot.http, params=query),
        "body": requests.post(bot.http, json=query),
    }.items():
        assert response.status_code == 422
        assert response.json()["detail"][0]["loc"] == [place, field]
        assert response.headers["X-Model"] == "tiny-dialog"


def test_a_422_lists_only_the_first_problems_with_shortened_names(bot):
    unknown = {"prompt": "Hi"} | {f"{number}{'x' * 200}": 0 for number in range(20)}
    for response in (
        requests.post(bot.http, params=unknown),
        requests.post(bot.http, json=unknown),
    ):
        assert response.status_code == 422
        names = [problem["loc"][1] for problem in response.json()["detail"]]
        assert names == [f"{number}{'x' * 99}" for number in range(5)]


def test_a_body_that_does_not_come_is_a_408(bot, monkeypatch):
    monkeypatch.setattr(request, "BODY_TIMEOUT_S", 0.2)
    url = urlsplit(bot.http)
    connection = HTTPConnection(url.hostname, url.port, timeout=HANG_S)
    connection.putrequest("POST", url.path)
    connection.putheader("Content-Length", "10")
    connection.endheaders(b"{")
    response = connection.getresponse()
    assert response.status == 408
    assert b"was not there after" in response.read()
    connection.close()


def test_the_body_takes_precedence_over_the_query(bot, loaded):
    query = {"prompt": "Hello!", "max_new_tokens": 1}
    text = requests.post(bot.http, params=query, json={"max_new_tokens": 2}).text
    assert text == reference(loaded, ["Hello!"], 2)


def test_a_422_names_the_query_if_the_problem_is_there_and_the_prompt_in_the_body(bot):
    response = requests.post(bot.http, params={"temperature": 9}, json={"prompt": "Hi", "seed": -1})
    assert response.status_code == 422
    places = [problem["loc"] for problem in response.json()["detail"]]
    assert places == [["query", "temperature"], ["body", "seed"]]


def test_a_null_in_the_body_is_as_good_as_no_value(bot, loaded):
    query = {"prompt": "Hello!", "max_new_tokens": 2}
    nulls = dict.fromkeys(["max_new_tokens", "temperature", "seed", "stop"])
    text = requests.post(bot.http, params=query, json=nulls).text
    assert text == reference(loaded, ["Hello!"], 2)


def test_a_body_lost_to_an_upgrade_is_a_400_that_says_so(bot):
    upgrade = {"Connection": "Upgrade, HTTP2-Settings", "Upgrade": "h2c", "HTTP2-Settings": "AA"}
    response = requests.post(bot.http, json={"prompt": "Hello!"}, headers=upgrade)
    assert response.status_code == 400
    assert "use HTTP/1.1" in response.json()["detail"]
    response = requests.post(bot.http, params={"prompt": "Hello!"}, headers=upgrade)  # no body
    assert response.status_code == 200


@pytest.mark.parametrize(
    "body",
    [b"Hi!", b'"Hi!"', b"[]", b"[" * 4000, b"[" * 100_000, b'{"prompt": "\\ud800"}', b"\xff"],
)
def test_a_body_that_is_no_json_object_is_a_422(bot, body):
    response = requests.post(bot.http, data=body)
    assert response.status_code == 422
    assert response.json()["detail"][0]["loc"][0] == "body"


def test_a_prompt_that_does_not_fit_is_a_413_that_says_what_does(bot, loaded):
    room = loaded.context - MAX_NEW_TOKENS
    prompt = "word " * room
    tokens = len(loaded.tokenizer(prompt + loaded.tokenizer.eos_token)["input_ids"])
    response = requests.post(bot.http, json={"prompt": prompt})
    assert response.status_code == 413
    assert response.json() == {"detail": f"the prompt has {tokens} tokens, {room} fit"}
    response = requests.post(bot.http, json={"prompt": "x" * 80_000})
    assert response.status_code == 413
    assert response.json() == {"detail": f"the prompt has 80000 bytes, {room * 64} are allowed"}
    longest = 3 * (loaded.context - 1) * 64 + 4096
    response = requests.post(bot.http, json={"prompt": "x" * longest})
    assert response.status_code == 413
    assert response.json() == {"detail": f"the body has more than the {longest} bytes allowed"}
    assert response.headers["X-Model"] == "tiny-dialog"


def test_a_seed_draws_the_same_reply_beside_others_and_alone(bot):
    def ask(seed: int | None) -> str:
        body = {"prompt": STORY, "temperature": 2, "max_new_tokens": 20, "seed": seed}
        return requests.post(bot.http, json=body).text

    with ThreadPoolExecutor(6) as callers:
        beside = list(callers.map(ask, [7, 8, None, 7, None, 8]))
    assert beside[0] == beside[3] == ask(7)
    assert beside[1] == beside[5] == ask(8)
    assert len(set(beside)) == 4


def test_a_stop_string_ends_the_reply_before_it_and_frees_the_model(bot, loaded):
    whole = reference(loaded, [STORY], MAX_NEW_TOKENS)
    parameters = {"prompt": STORY, "stop": [whole[20:26], "dog named"]}
    for send in ({"params": parameters}, {"json": parameters}):
        text = requests.post(bot.http, **send).text
        assert text == whole[: min(whole.index(stop) for stop in parameters["stop"])]
    assert bot.gate.count("step") < 2 * 12


@pytest.mark.parametrize("prompt", [ENCODE_ERROR, DECODE_ERROR], ids=["encode", "decode"])
def test_an_exception_of_the_tokenizer_fails_its_request_alone(bot, loaded, prompt):
    assert HttpCaller(bot, prompt).outcome() == "failed"
    assert http_reply(bot, "Hello!", 2) == reference(loaded, ["Hello!"], 2)
    bot.gate.wait("failed", 1)
    bot.gate.wait("finished", 1)


def test_a_failure_before_the_first_text_is_a_normal_answer_even_for_an_allowed_page(bots: Bots):
    bots.emoji_textbot.gate.open()
    headers = {"Origin": ALLOWED_ORIGIN, **WITH_KEY}
    response = requests.post(
        bots.emoji_textbot.http, json={"prompt": ENCODE_ERROR}, headers=headers
    )
    assert response.status_code == 500
    assert response.json() == {"detail": "the reply failed: ValueError"}
    assert response.headers["Access-Control-Allow-Origin"] == ALLOWED_ORIGIN
    assert response.headers["X-Model"]
    bots.emoji_textbot.gate.wait("failed", 1)


@pytest.mark.parametrize(("headers", "status"), ACCESS)
@pytest.mark.parametrize("name", ["emoji_textbot", "emoji_batchbot", "emoji_continuousbot"])
def test_requests_without_access_are_refused(bots: Bots, name, headers, status):
    bot = getattr(bots, name)
    bot.gate.open()
    response = requests.post(bot.http, params={"prompt": EMOJI_PROMPT}, headers=headers)
    assert response.status_code == status
    assert ("X-Model" in response.headers) == (status == 200)
    if status == 200:
        assert response.content.decode() == EMOJI_REPLY
    bot.gate.wait("finished" if status == 200 else "refused", 1)


@pytest.mark.parametrize(
    "deployment", [Textbot, Batchbot, Continuousbot], ids=lambda each: each.name
)
def test_serve_is_told_the_request_limit_of_a_replica_and_the_retry_delay(deployment):
    assert (deployment.max_ongoing_requests, deployment.max_queued_requests) == (100, 100)
    assert deployment._deployment_config.backpressure_config.retry_after_s == 10
