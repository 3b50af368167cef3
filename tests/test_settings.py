"""settings.py: what the settings check before Serve deploys anything."""

import json
from functools import partial
from pathlib import Path
from types import ModuleType

import pytest
import requests
from bot_fixtures import EMOJI_PROMPT, HANG_S, Bot
from callers import ChatCaller, HttpCaller
from huggingface_hub import constants
from pydantic import ValidationError
from scripted_model import save_scripted_model
from transformers import AutoTokenizer
from websockets.sync.client import connect

import batchbot
import chatbot
import continuousbot
import textbot
from streaming_bots.models.prompt import token_limits
from streaming_bots.models.source import BUNDLED
from streaming_bots.settings import (
    BatchbotSettings,
    BotSettings,
    ChatbotSettings,
    ContinuousbotSettings,
)

NO_SYSTEM = (
    "{% if messages[0].role == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
)


@pytest.fixture(autouse=True)
def no_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")


@pytest.fixture
def model(tmp_path: Path) -> Path:
    save_scripted_model(tmp_path / "model", len(EMOJI_PROMPT), "Hello", context=128)
    return tmp_path / "model"


def test_without_arguments_the_default_model_may_be_replaced():
    assert BotSettings().constructor_arguments() == {
        "model": "microsoft/DialoGPT-small",
        "fallback": "tiny-dialog",
    }


def test_a_fallback_of_ones_own_is_also_that_of_the_default_model(model):
    arguments = BotSettings(fallback=str(model)).constructor_arguments()
    assert arguments == {"model": "microsoft/DialoGPT-small", "fallback": str(model)}


def test_a_limit_of_prompts_that_is_too_low_is_named():
    with pytest.raises(ValueError, match="max_prompt_tokens: the model cannot take it"):
        BotSettings(model=BUNDLED, max_prompt_tokens=1).constructor_arguments()


def test_a_relative_folder_becomes_absolute(model, monkeypatch):
    monkeypatch.chdir(model.parent)
    arguments = BotSettings(model="./model").constructor_arguments()
    assert arguments["model"] == str(model)
    assert "fallback" not in arguments
    arguments = BotSettings(fallback="./model").constructor_arguments()
    assert arguments["fallback"] == str(model)


def test_the_size_of_a_continuous_batch_reaches_the_bot_and_its_autoscaling():
    arguments = ContinuousbotSettings(model=BUNDLED, max_batch_size=75, num_replicas="auto")
    assert arguments.constructor_arguments()["max_batch_size"] == 75
    options = arguments.deployment_options()
    assert options["autoscaling_config"] == {"target_ongoing_requests": 38}
    assert (options["max_ongoing_requests"], options["max_queued_requests"]) == (150, 150)
    with pytest.raises(ValidationError, match="greater than 0"):
        ContinuousbotSettings(max_batch_size=0)


def test_the_size_of_a_cache_without_a_batch_is_refused():
    with pytest.raises(ValidationError, match="give max_batch_size, too"):
        ChatbotSettings(cache_tokens=1000)
    assert ChatbotSettings(cache_tokens=1000, max_batch_size=2)


def test_options_reach_ray_and_the_batch():
    arguments = BatchbotSettings(num_cpus=0.5, num_replicas="auto", max_batch_size=3)
    assert arguments.deployment_options() == {
        "num_replicas": "auto",
        "ray_actor_options": {"num_cpus": 0.5, "num_gpus": 0.0},
        "autoscaling_config": {"target_ongoing_requests": 3},  # a full batch
        "graceful_shutdown_timeout_s": 120.0,
        "user_config": {"max_batch_size": 3, "batch_wait_timeout_s": 0.1},
        "max_ongoing_requests": 100,
        "max_queued_requests": 100,
    }
    batchbot.build(arguments)


each_bot = pytest.mark.parametrize(
    ("module", "arguments"),
    [
        (textbot, BotSettings),
        (chatbot, ChatbotSettings),
        (batchbot, BatchbotSettings),
        (continuousbot, ContinuousbotSettings),
    ],
)


def call(module: ModuleType, bot: Bot, prompt: str) -> ChatCaller | HttpCaller:
    return (ChatCaller if module is chatbot else HttpCaller)(bot, prompt)


@pytest.mark.parametrize("module", [textbot, chatbot, batchbot, continuousbot])
def test_an_app_answers_even_without_a_hub(run_other, module):
    bot = run_other(module.app)
    assert requests.head(bot.http).headers["X-Model"] == BUNDLED


@each_bot
def test_a_built_bot_has_the_given_arguments(run_other, model, module, arguments):
    bot = run_other(module.build(arguments(model=str(model), max_new_tokens=3, num_cpus=0.5)))
    prompt = "x" * len(EMOJI_PROMPT)
    caller = call(module, bot, prompt)
    assert caller.outcome() == "finished"
    assert caller.text == "Hel"
    assert requests.head(bot.http).headers["X-Model"] == model.name


@each_bot
def test_a_prompt_has_no_more_tokens_than_the_operator_allows(run_other, model, module, arguments):
    tokens = len(EMOJI_PROMPT) + 1  # one for each letter, and the end of the turn
    bot = run_other(module.build(arguments(model=str(model), max_prompt_tokens=tokens)))
    outcomes = [call(module, bot, "x" * length).outcome() for length in (tokens - 1, tokens)]
    assert outcomes == ["finished", "refused"]


@each_bot
def test_a_system_prompt_begins_every_conversation(run_other, model, module, arguments):
    bot = run_other(module.build(arguments(model=str(model), system_prompt="!")))
    # The model's reply depends on the number of tokens. The system prompt has two.
    caller = call(module, bot, "x" * (len(EMOJI_PROMPT) - 2))
    assert (caller.outcome(), caller.text) == ("finished", "Hello")


@each_bot
def test_a_bot_may_be_served_under_another_name(run_other, model, module, arguments):
    bot = run_other(module.build(arguments(model=str(model), served_model_name="ours/größer")))
    assert requests.head(bot.http).headers["X-Model"] == "ours/gr%C3%B6%C3%9Fer"


def test_the_key_is_read_once(run_other, model, tmp_path):
    (tmp_path / "key").write_text("secret")
    arguments = BotSettings(model=str(model), api_key_file=tmp_path / "key")
    bot = run_other(textbot.build(arguments))
    (tmp_path / "key").unlink()
    for key, status in (("secret", 200), ("other", 401)):
        headers = {"Authorization": f"Bearer {key}"}
        assert requests.post(f"{bot.http}?prompt=Hi", headers=headers).status_code == status


def test_prompts_are_limited_by_default_even_if_the_context_is_long():
    contexts = (512, 131_072)
    assert [token_limits(None, None, context)[1] for context in contexts] == [511, 8192]


def test_a_limit_of_prompts_beyond_the_context_is_refused(model):
    arguments = BotSettings(model=str(model), max_prompt_tokens=128)
    with pytest.raises(ValueError, match="max_prompt_tokens is 128: from 1 to 127 are possible"):
        arguments.constructor_arguments()


def test_another_marker_follows_the_replies(run_other, model):
    bot = run_other(chatbot.build(ChatbotSettings(model=str(model), end_of_response="END")))
    with connect(bot.ws) as websocket:
        websocket.send("x" * len(EMOJI_PROMPT))
        frames = list(iter(partial(websocket.recv, HANG_S), "END"))
    assert "".join(frames) == "Hello"


@pytest.mark.parametrize("name", [None, "model"])
def test_a_reply_that_leaves_no_room_for_a_prompt_is_refused(model, name):
    named = {"model": str(model)} if name else {}
    arguments = BotSettings(**named, max_new_tokens=512)
    with pytest.raises(ValueError, match="max_new_tokens is 512: from 1 to"):
        arguments.constructor_arguments()


def test_a_reply_that_leaves_no_room_for_the_shortest_prompt_is_refused(model):
    arguments = BotSettings(model=str(model), max_new_tokens=127)
    with pytest.raises(ValueError, match=r"^max_new_tokens: .* tokens, 1 fit"):
        arguments.constructor_arguments()


def test_a_system_prompt_that_does_not_fit_is_refused(model):
    arguments = BotSettings(model=str(model), system_prompt="Be kind. " * 30)
    with pytest.raises(ValueError, match=r"system_prompt: .* tokens, 64 fit"):
        arguments.constructor_arguments()


def test_a_system_prompt_that_the_chat_template_does_not_know_is_refused(model):
    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.chat_template = NO_SYSTEM + "{{ messages[0].content }}"
    tokenizer.save_pretrained(model)
    BotSettings(model=str(model)).constructor_arguments()
    arguments = BotSettings(model=str(model), system_prompt="Be kind.")
    with pytest.raises(ValueError, match=r"system_prompt: .*no system"):
        arguments.constructor_arguments()


@pytest.mark.parametrize(
    "wrong",
    [
        {"max_new_tokens": "0"},
        {"max_new_tokens": "many"},
        {"dtype": "int4"},
        {"num_cpus": "-1"},
        {"num_cpus": "inf"},
        {"num_gpus": "inf"},
        {"stall_timeout_s": "inf"},
        {"num_replicas": "0"},
        {"end_of_response": "x"},
        {"model": ""},
        {"api_key": "secret"},
    ],
    ids=json.dumps,
)
def test_a_wrong_argument_is_named(wrong):
    with pytest.raises(ValidationError) as error:
        ChatbotSettings(**wrong)
    assert error.value.errors()[0]["loc"][0] == next(iter(wrong))


@each_bot
def test_every_bot_can_be_told_to_keep_no_prefixes_on_the_command_line(module, arguments):
    assert arguments(prefix_cache_mb="0").prefix_cache_mb == 0


def test_a_batch_cannot_wait_for_ever():
    with pytest.raises(ValidationError, match="batch_wait_timeout_s"):
        BatchbotSettings(batch_wait_timeout_s="inf")
