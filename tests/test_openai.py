"""http/openai/: what OpenAI's clients ask for, and what they get, mostly in this process."""

import json
import logging
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from importlib import import_module
from typing import Any

import openai
import pytest
import requests
from bot_fixtures import (
    ALLOWED_ORIGIN,
    CHAT_MAX_NEW_TOKENS,
    EMOJI_PROMPT,
    EMOJI_REPLY,
    HANG_S,
    MAX_NEW_TOKENS,
    Bot,
    Bots,
    http_reply,
    reference,
)
from callers import CompletionCaller
from openai.types.chat import ChatCompletion, ChatCompletionChunk
from openai_clients import CLIENTS, client_of, complete, text_of, user
from scripted_model import name_end_tokens, save_random_model
from transformers import GPT2Config

from streaming_bots.http import app
from streaming_bots.http.openai import completion
from streaming_bots.http.openai.completion_request import CompletionRequest
from streaming_bots.models.source import BUNDLED
from streaming_bots.settings import (
    BatchbotSettings,
    BotSettings,
    ChatbotSettings,
    ContinuousbotSettings,
)
from textbot import Textbot

BOTS = ("textbot", "chatbot", "batchbot", "continuousbot")
LONG = "Tell me a story about dogs."
TURNS = ["Hi there!", "Hello! How are you?", "I am tired.", "Then you should sleep.", LONG]

every_bot = pytest.mark.parametrize("name", BOTS)


def events_of(bot: Bot, **body: Any) -> list[str]:
    """Return the events of a streamed reply, as they are on the wire."""
    body = {"messages": [user("Hello!")], "stream": True, "max_tokens": 5} | body
    response = requests.post(f"{bot.http}v1/chat/completions", json=body, timeout=HANG_S)
    assert response.headers["Content-Type"] == "text/event-stream; charset=utf-8"
    assert response.headers["Cache-Control"] == "no-cache"
    assert response.headers["X-Accel-Buffering"] == "no"
    *events, rest = response.text.split("\n\n")
    assert rest == ""
    return events


def free(bots: Bots, name: str) -> Bot:
    bot = getattr(bots, name)
    bot.gate.open()
    return bot


@pytest.fixture
def textbot(bots: Bots) -> Bot:
    return free(bots, "textbot")


@every_bot
def test_the_text_equals_that_of_the_bots_own_route(bots, loaded, name):
    bot = free(bots, name)
    answer = complete(bot, LONG, 40)
    expected = reference(loaded, [LONG], min(40, CHAT_MAX_NEW_TOKENS)) if name == "chatbot" else ""
    assert text_of(answer) == (expected or http_reply(bot, LONG, 40))
    assert answer.choices[0].finish_reason == "length"
    assert answer.model == BUNDLED


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("textbot", BotSettings),
        ("chatbot", ChatbotSettings),
        ("chatbot", partial(ChatbotSettings, max_batch_size=2)),
        ("batchbot", BatchbotSettings),
        ("continuousbot", ContinuousbotSettings),
    ],
)
def test_a_reply_of_a_model_without_end_tokens_ends_at_its_limit(
    run_other, tmp_path, name, settings
):
    save_random_model(GPT2Config(n_positions=128, n_embd=32, n_layer=1, n_head=2), tmp_path)
    name_end_tokens(tmp_path, None)
    build = import_module(name).build
    bot = run_other(build(settings(model=str(tmp_path), max_new_tokens=5)))
    *_, last, done = events_of(bot)
    reason = json.loads(last.removeprefix("data: "))["choices"][0]["finish_reason"]
    assert (reason, done) == ("length", "data: [DONE]")


@every_bot
def test_the_reply_to_a_conversation_beside_others_equals_that_of_generate(bots, loaded, name):
    bot = free(bots, name)
    roles = ["user", "assistant"] * 2 + ["user"]
    conversation = [
        {"role": role, "content": turn} for role, turn in zip(roles, TURNS, strict=True)
    ]
    prompts = [conversation, [user(LONG)], [user("Thank you!")], conversation]
    with ThreadPoolExecutor(len(prompts)) as callers:
        answers = list(callers.map(lambda prompt: text_of(complete(bot, prompt, 20)), prompts))
    limit = min(20, CHAT_MAX_NEW_TOKENS) if name == "chatbot" else 20
    assert answers == [
        reference(loaded, [message["content"] for message in prompt], limit) for prompt in prompts
    ]


@every_bot
def test_every_answer_is_one_of_openais_types(bots, name):
    bot = free(bots, name)
    body = {"messages": [user("Hello!")], "max_tokens": 5}
    whole = requests.post(f"{bot.http}v1/chat/completions", json=body, timeout=HANG_S)
    ChatCompletion.model_validate(whole.json(), strict=True)
    *events, done = events_of(bot, stream_options={"include_usage": True})
    assert done == "data: [DONE]"
    chunks = [
        ChatCompletionChunk.model_validate_json(event.removeprefix("data: ")) for event in events
    ]
    assert len({chunk.id for chunk in chunks}) == 1


def test_a_stream_sends_the_role_the_text_the_finish_reason_and_the_usage(textbot, loaded):
    *events, done = events_of(textbot, stream_options={"include_usage": True})
    first, *pieces, last, usage = [json.loads(event.removeprefix("data: ")) for event in events]
    (beginning,) = first["choices"]
    assert beginning["delta"] == {"role": "assistant", "content": ""}
    contents = [piece["choices"][0]["delta"]["content"] for piece in pieces]
    assert len(contents) > 1
    assert "".join(contents) == reference(loaded, ["Hello!"], 5)
    assert last["choices"] == [
        {"index": 0, "delta": {}, "logprobs": None, "finish_reason": "length"}
    ]
    assert usage["choices"] == []
    prompt = len(loaded.tokenizer("Hello!")["input_ids"]) + 1  # with the end of the message
    cached = usage["usage"].pop("prompt_tokens_details")["cached_tokens"]
    assert 0 <= cached < prompt
    assert usage["usage"] == {
        "prompt_tokens": prompt,
        "completion_tokens": 5,
        "total_tokens": prompt + 5,
    }
    assert done == "data: [DONE]"


def test_a_stream_has_no_usage_unless_the_client_asks_for_it(textbot):
    for options in ({}, {"stream_options": {"include_usage": None}}, {"stream_options": None}):
        assert not any("usage" in event for event in events_of(textbot, **options))


@pytest.mark.parametrize("name", ["emoji_textbot", "emoji_batchbot", "emoji_continuousbot"])
def test_a_reply_that_ends_by_itself_says_stop_and_its_emoji_are_whole(bots, name):
    bot = free(bots, name)
    limit = MAX_NEW_TOKENS
    model = "emoji-model"
    answer = complete(bot, EMOJI_PROMPT, limit, model=None, extra_body={"model": None})
    assert (text_of(answer), answer.choices[0].finish_reason) == (EMOJI_REPLY, "stop")
    with client_of(bot).chat.completions.create(
        model=answer.model, messages=[user(EMOJI_PROMPT)], stream=True
    ) as chunks:
        pieces = [chunk.choices[0].delta.content or "" for chunk in chunks]
    assert "".join(pieces) == EMOJI_REPLY
    assert answer.model.startswith(model)


def test_a_reply_without_text_still_has_a_role_and_an_end(textbot, loaded):
    first = reference(loaded, ["Hello!"], 5)[:3]
    answer = complete(textbot, stop=[first])
    assert (text_of(answer), answer.choices[0].finish_reason) == ("", "stop")
    events = events_of(textbot, stop=first)
    assert '"role": "assistant"' in events[0]
    assert '"finish_reason": "stop"' in events[-2]


def test_each_request_of_a_batch_gets_its_own_options(bots, loaded):
    bot = free(bots, "continuousbot")
    options = [
        {"temperature": 1.5, "seed": 7},
        {"temperature": 0},
        {"temperature": 1.5, "seed": -7},
        {"top_p": 0, "seed": 1},
        {"extra_body": {"top_k": -1}, "temperature": 1.5, "seed": 7},
        {"extra_body": {"top_k": 1}, "seed": 3},
        {"seed": -1},
    ]
    with ThreadPoolExecutor(len(options)) as callers:
        answers = list(callers.map(lambda each: text_of(complete(bot, LONG, 20, **each)), options))
    greedy = reference(loaded, [LONG], 20)
    assert [answers[1], answers[3], answers[5], answers[6]] == [greedy] * 4
    assert answers[0] == answers[4] != greedy
    assert answers[2] not in (greedy, answers[0])


@every_bot
@pytest.mark.parametrize("name_of_limit", ["max_tokens", "max_completion_tokens"])
def test_the_request_the_bot_and_the_context_limit_the_length_of_a_reply(
    bots, loaded, name, name_of_limit
):
    bot = free(bots, name)
    own = CHAT_MAX_NEW_TOKENS if name == "chatbot" else MAX_NEW_TOKENS

    def tokens(prompt: str, asked: int) -> int:
        answer = complete(bot, prompt, None, **{name_of_limit: asked})
        by_itself = answer.choices[0].finish_reason == "stop"
        return 0 if by_itself else answer.usage.completion_tokens

    assert tokens(LONG, 3) == 3
    assert tokens(LONG, 1000) in (0, own)
    full = "a " * 600
    full_ids = loaded.tokenizer(full)["input_ids"]
    nearly_full = loaded.tokenizer.decode(full_ids[: loaded.context - 4])
    left = loaded.context - len(loaded.tokenizer(nearly_full)["input_ids"]) - 1
    assert 0 < left < own
    assert tokens(nearly_full, 1000) == left


def test_a_conversation_that_does_not_fit_is_refused_and_nothing_is_dropped(textbot):
    conversation = [user("Hello! " * 100), {"role": "assistant", "content": "Hi."}] * 4
    for prompt in ([*conversation, user("Hi!")], "a " * 600, "x" * 40_000):
        with pytest.raises(openai.BadRequestError) as refused:
            complete(textbot, prompt)
        assert (refused.value.code, refused.value.param) == ("context_length_exceeded", "messages")
        assert "maximum context length is 511 tokens" in refused.value.message
    with pytest.raises(openai.BadRequestError, match="1000 messages with 64000 bytes are too many"):
        complete(textbot, [user("")] * 1000)


@pytest.mark.parametrize(
    "options",
    [
        {"user": "me", "metadata": {"a": "b"}, "store": True},
        {"repetition_penalty": 1.0, "ignore_eos": True, "max_new_tokens": -3},
        {"logprobs": None, "stop": None, "temperature": None, "n": None, "stream": None},
        {"n": 1, "logprobs": False, "response_format": {"type": "text"}, "stop": []},
        {"tools": [{"type": "function", "function": {"name": "f"}}], "tool_choice": "auto"},
        {"messages": [user([{"type": "text", "text": "Hello!"}])]},
        {"messages": [user("Hello!") | {"name": "Ann"}]},
        {"model": f"somebody/{BUNDLED}".partition("/")[2]},
    ],
    ids=lambda options: ",".join(options),
)
def test_parameters_that_a_client_would_not_miss_are_ignored(textbot, loaded, options):
    assert text_of(complete(textbot, extra_body=options)) == reference(loaded, ["Hello!"], 5)


def test_parts_of_text_are_lines_and_a_reply_that_called_a_tool_is_empty(textbot, loaded):
    parts = [{"type": "text", "text": text} for text in ("Hello!", LONG)]
    messages = [user(parts), {"role": "assistant", "content": None}, user("Well?")]
    expected = reference(loaded, [f"Hello!\n{LONG}", "", "Well?"], 5)
    assert text_of(complete(textbot, messages)) == expected


def test_the_names_of_ignored_parameters_are_logged_at_debug(textbot, caplog):
    logger = logging.getLogger("ray.serve")
    logger.addHandler(caplog.handler)
    try:
        caplog.set_level(logging.DEBUG, "ray.serve")
        complete(textbot, user="secret", extra_body={"x" * 1000: 1})
    finally:
        logger.removeHandler(caplog.handler)
    (line,) = {text for text in caplog.messages if text.startswith("ignored")}
    assert line == f"ignored: ['user', '{'x' * 100}']"


@pytest.mark.parametrize(
    ("param", "options"),
    [
        ("n", {"n": 2}),
        ("n", {"n": True}),
        ("logprobs", {"logprobs": True}),
        ("messages", {"messages": []}),
        ("messages.0.role", {"messages": [{"role": "tool", "content": "3"}]}),
        ("messages.1.content", {"messages": [user("Hi"), user([{"type": "image_url"}])]}),
        ("messages.0.content", {"messages": [user([{"type": "input_audio"}])]}),
        ("messages.0.content", {"messages": [user(3)]}),
        ("messages.0.content", {"messages": [user(False)]}),
        ("modalities.1", {"modalities": ["text", "audio"]}),
        ("tool_choice", {"tool_choice": "required"}),
        ("tool_choice", {"tool_choice": {"type": "function", "function": {"name": "f"}}}),
        ("function_call", {"function_call": {"name": "f"}}),
        ("response_format.type", {"response_format": {"type": "json_object"}}),
        ("response_format.type", {"response_format": {"type": "json_schema", "json_schema": {}}}),
        ("max_tokens", {"max_tokens": 0}),
        ("max_tokens", {"max_tokens": True}),
        ("max_completion_tokens", {"max_completion_tokens": -1}),
        ("temperature", {"temperature": 2.1}),
        ("top_p", {"top_p": -0.1}),
        ("top_k", {"top_k": -2}),
        ("stop", {"stop": list("abcde")}),
        ("stop.0", {"stop": ""}),
        ("seed", {"seed": "x"}),
        ("stream_options", {"stream_options": 1}),
    ],
    ids=lambda each: each if isinstance(each, str) else json.dumps(each)[:40],
)
@pytest.mark.parametrize("stream", [True, False])
def test_a_parameter_that_a_client_would_miss_is_a_400_that_names_it(
    textbot, param, options, stream
):
    with pytest.raises(openai.BadRequestError) as refused:
        complete(textbot, extra_body=options, stream=stream)
    assert refused.value.param == param
    assert refused.value.body["message"].startswith(f"{param}: ")
    assert refused.value.type == "invalid_request_error"


@pytest.mark.parametrize("body", [b"", b"[]", b"{", b"\xff", b'{"messages": [' + b"[" * 5000])
def test_a_body_that_is_no_object_is_a_400(textbot, body):
    response = requests.post(f"{textbot.http}v1/chat/completions", data=body, timeout=HANG_S)
    assert response.status_code == 400
    assert response.json()["error"]["code"] == "json_invalid"


SYSTEM = "You are a pirate."
TEMPLATE = (
    "{% for message in messages %}{% if message.role == 'user' and loop.first %}"
    "{{ raise_exception('Begin with a system prompt, please') }}{% endif %}"
    "{{ message.role + message.content }}{% endfor %}"
)


@pytest.mark.parametrize(
    ("messages", "turns"),
    [
        ([], [SYSTEM]),
        ([{"role": "system", "content": " "}], [SYSTEM]),
        ([{"role": "system", "content": "Be brief."}], ["Be brief."]),
        ([{"role": "developer", "content": "Be brief."}], ["Be brief."]),
    ],
    ids=["the bot's", "a blank one", "the messages'", "a developer's"],
)
def test_the_bots_system_prompt_begins_a_conversation_without_one(
    run_other, loaded, messages, turns
):
    bot = run_other(Textbot.bind(BUNDLED, system_prompt=SYSTEM))
    answer = complete(bot, [*messages, user("Hello!")])
    assert text_of(answer) == reference(loaded, [*turns, "Hello!"], 5)
    whole = loaded.tokenizer.eos_token.join([*turns, "Hello!", ""])
    assert answer.usage.prompt_tokens == len(loaded.tokenizer(whole)["input_ids"])


def test_a_developer_speaks_as_the_system_which_chat_templates_know():
    request = CompletionRequest.model_validate(
        {"messages": [{"role": "developer", "content": "Be brief."}], "max_new_tokens": 5},
        context={"limit": 5},
    )
    assert request.conversation([]) == [{"role": "system", "content": "Be brief."}]


def test_a_conversation_that_a_chat_template_refuses_is_a_400_with_its_words(
    run_other, loaded, tmp_path
):
    loaded.model.save_pretrained(tmp_path)
    loaded.tokenizer.save_pretrained(tmp_path)
    (tmp_path / "chat_template.jinja").write_text(TEMPLATE)
    bot = run_other(Textbot.bind(str(tmp_path)))
    beginning = [{"role": "system", "content": "Hi."}]
    assert complete(bot, [*beginning, user("Hello!")], model=tmp_path.name)
    with pytest.raises(openai.BadRequestError, match="Begin with a system prompt, please"):
        complete(bot, model=tmp_path.name)
    response = requests.post(bot.http, params={"prompt": "Hello!"}, timeout=HANG_S)
    assert response.status_code == 400
    assert "Begin with a system prompt, please" in response.json()["detail"]


@every_bot
def test_the_model_is_listed_and_no_other_is_there(bots, name):
    bot = free(bots, name)
    client = client_of(bot)
    (model,) = client.models.list()
    assert (model.id, model.object) == (BUNDLED, "model")
    assert client.models.retrieve(BUNDLED) == model
    for ask in (lambda: client.models.retrieve("gpt-9"), lambda: complete(bot, model="gpt-9")):
        with pytest.raises(openai.NotFoundError) as refused:
            ask()
        assert (refused.value.code, refused.value.param) == ("model_not_found", "model")
        assert "there is no model 'gpt-9'; 'tiny-dialog' answers here" in refused.value.message


def test_a_hub_id_is_known_by_its_last_part_as_well(run_other):
    bot = run_other(Textbot.bind(BUNDLED, served_model_name="somebody/tiny"))
    for name in ("somebody/tiny", "tiny"):
        assert complete(bot, model=name).model == "somebody/tiny"
        assert client_of(bot).models.retrieve(name).id == "somebody/tiny"
    with pytest.raises(openai.NotFoundError):
        complete(bot, model="body/tiny")


def test_other_paths_of_openais_api_are_404_in_its_error_format(textbot):
    with pytest.raises(openai.NotFoundError) as refused:
        client_of(textbot).completions.create(model=BUNDLED, prompt="Hello!")
    assert refused.value.code == "unknown_url"
    response = requests.get(f"{textbot.http}v1/chat/completions", timeout=HANG_S)
    assert (response.status_code, list(response.json())) == (405, ["error"])
    assert list(requests.get(f"{textbot.http}v2/", timeout=HANG_S).json()) == ["detail"]
    body = {"messages": [user("Hello!")]}
    url = f"{textbot.http}v1/chat/completions/"
    response = requests.post(url, json=body, timeout=HANG_S, allow_redirects=False)
    assert (response.status_code, list(response.json())) == (404, ["error"])


def test_the_sdk_sends_the_key_and_access_errors_have_openais_format(bots):
    bot = free(bots, "emoji_textbot")
    with pytest.raises(openai.AuthenticationError) as refused:
        client_of(bot, api_key="wrong").models.list()
    assert refused.value.code == "invalid_api_key"
    assert refused.value.response.headers["WWW-Authenticate"] == "Bearer"
    pages = {"Origin": "https://evil.example"}
    with pytest.raises(openai.PermissionDeniedError, match=r"origin https://evil\.example"):
        client_of(bot, default_headers=pages).models.list()
    with pytest.raises(openai.BadRequestError, match="Invalid host header"):
        client_of(bot, default_headers={"Host": "evil.example"}).models.list()
    with pytest.raises(openai.APIStatusError) as too_long:
        complete(bot, "x" * 1_000_000)
    assert too_long.value.status_code == 413


def test_the_sdk_may_send_its_headers_from_allowed_pages(bots):
    bot = free(bots, "emoji_textbot")
    asked = {
        "Origin": ALLOWED_ORIGIN,
        "Access-Control-Request-Method": "POST",
        "Access-Control-Request-Headers": "authorization,content-type,x-stainless-retry-count",
    }
    answer = requests.options(f"{bot.http}v1/chat/completions", headers=asked, timeout=HANG_S)
    assert answer.status_code == 200
    assert "x-stainless-retry-count" in answer.headers["Access-Control-Allow-Headers"]
    refused = {**asked, "Origin": "https://evil.example"}
    answer = requests.options(f"{bot.http}v1/chat/completions", headers=refused, timeout=HANG_S)
    assert answer.status_code == 403


def test_a_client_is_told_when_to_try_again_if_too_many_prompts_wait(bots, monkeypatch):
    bot = free(bots, "chatbot")
    engine = bots.local.replicas["/chatbot"].servable_object.engine
    monkeypatch.setattr(engine, "max_waiting", 1)
    bot.gate.hold_after(0)
    waiting = [CompletionCaller(bot, "Hello!", 2)]
    bot.gate.wait("submitted", 1)
    waiting.append(CompletionCaller(bot, "Hello!", 2))
    bot.gate.wait("submitted", 2)
    with pytest.raises(openai.InternalServerError) as refused:
        complete(bot)
    assert refused.value.status_code == 503
    assert refused.value.response.headers["Retry-After"] == "10"
    bot.gate.release()
    assert [caller.outcome() for caller in waiting] == ["finished", "finished"]
    for outcome, count in (("refused", 1), ("finished", 2)):
        bot.gate.wait(outcome, count)


def test_an_sdk_tries_again_when_it_was_told_to(bots, loaded, monkeypatch):
    bot = free(bots, "chatbot")
    engine = bots.local.replicas["/chatbot"].servable_object.engine
    monkeypatch.setattr(engine, "max_waiting", 0)
    monkeypatch.setattr(app, "RETRY_AFTER_S", 1)
    bot.gate.hold_after(0)
    waiting = CompletionCaller(bot, "Hello!", 2)
    bot.gate.wait("step", 1)
    with ThreadPoolExecutor(1) as thread:
        asking = thread.submit(complete, bot, LONG, client=client_of(bot, max_retries=1))
        bot.gate.wait("refused", 1)
        bot.gate.release()
        assert waiting.outcome() == "finished"
        assert text_of(asking.result()) == reference(loaded, [LONG], 5)


@pytest.mark.parametrize("stream", [True, False])
def test_a_failure_before_the_first_text_is_a_500(textbot, stream):
    textbot.gate.fail_at(1)
    with pytest.raises(openai.InternalServerError) as failed:
        complete(textbot, stream=stream)
    assert failed.value.status_code == 500
    assert failed.value.message.count("the reply failed: RuntimeError") == 1
    assert failed.value.type == "server_error"
    textbot.gate.wait("failed", 1)


def test_a_later_failure_is_an_event_and_the_body_breaks_off(textbot, loaded):
    textbot.gate.fail_at(3)
    pieces = []
    stream = client_of(textbot).chat.completions.create(
        model=BUNDLED, messages=[user(LONG)], stream=True
    )
    with pytest.raises(openai.APIError, match="the reply failed: RuntimeError"):
        pieces.extend(chunk.choices[0].delta.content for chunk in stream)
    assert "".join(pieces) == reference(loaded, [LONG], 2)
    textbot.gate.fail_at(3)
    with pytest.raises(requests.exceptions.ChunkedEncodingError):
        events_of(textbot, messages=[user(LONG)])
    textbot.gate.wait("failed", 1)


def test_a_failure_of_a_reply_that_is_not_streamed_is_a_500(textbot):
    textbot.gate.fail_at(3)
    with pytest.raises(openai.InternalServerError, match="the reply failed: RuntimeError"):
        complete(textbot, LONG)


def test_a_silent_stream_sends_comments_and_then_reports_a_failure_as_an_event(
    textbot, loaded, monkeypatch
):
    monkeypatch.setattr(completion, "SILENCE_S", 0.2)
    textbot.gate.hold_after(0)
    first = CompletionCaller(textbot, LONG, 2)
    textbot.gate.wait("step", 1)
    second = CompletionCaller(textbot, LONG, 2)
    for caller in (first, second):
        caller.response = caller.connection.getresponse()
        received = b"".join(caller.response.read1() for _ in range(2))
        assert received.startswith(b": ")
        assert set(received.split(b"\n\n")) == {completion.COMMENT.strip().encode(), b""}
    textbot.gate.fail_at(1)  # after the held step
    assert first.outcome() == "failed"
    assert "error" in first.events[-1]
    assert second.outcome() == "finished"
    assert second.text == reference(loaded, [LONG], 2)


def test_an_sdk_does_not_see_the_comments(textbot, loaded, monkeypatch):
    monkeypatch.setattr(completion, "SILENCE_S", 0.01)
    with client_of(textbot).chat.completions.create(
        model=BUNDLED, messages=[user(LONG)], stream=True, max_tokens=20
    ) as chunks:
        pieces = [chunk.choices[0].delta.content or "" for chunk in chunks]
    assert "".join(pieces) == reference(loaded, [LONG], 20)


def test_the_counts_of_both_routes_are_one(textbot):
    complete(textbot)
    for _ in events_of(textbot):
        pass
    with pytest.raises(openai.BadRequestError):
        complete(textbot, n=2)
    client_of(textbot).models.list()
    for outcome, count in (("finished", 2), ("refused", 1)):
        textbot.gate.wait(outcome, count)
    assert textbot.gate.count("finished") == 2
    assert textbot.gate.count("refused") == 1


@every_bot
@pytest.mark.parametrize("ask", CLIENTS)
def test_third_party_clients_get_the_reply(bots, loaded, name, ask):
    assert ask(free(bots, name)) == reference(loaded, [LONG], 5)
