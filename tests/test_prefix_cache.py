"""prefix_cache.py: the next turn of a conversation reads only what is new."""

import asyncio

import pytest
import torch
from bot_fixtures import CHAT_MAX_NEW_TOKENS, HANG_S, reference
from callers import ask
from engines import new_batch, new_streamer
from openai_clients import complete, text_of, user
from scripted_model import save_random_model
from transformers import DynamicCache, MistralConfig
from transformers.cache_utils import DynamicLayer
from transformers.generation.continuous_batching.requests import RequestState
from websockets.sync.client import connect

from streaming_bots.generation.padding import LENGTH
from streaming_bots.generation.prefix_cache import PrefixCache, byte_size, crop
from streaming_bots.models.loaded_model import load_model

TURNS = ["Hi there!", "How are you?", "I am tired.", "Thank you!"]


@pytest.fixture
def cache(loaded):
    return PrefixCache(loaded.model, 10_000_000)


def write(cache: PrefixCache, loaded, ids: list[int], tokens: int = 4) -> tuple[list[int], int]:
    """Generate a reply; return its tokens, and how many tokens of the prompt were cached."""

    async def run() -> tuple[list[int], int]:
        streamer = new_streamer(loaded.tokenizer, (), ids, tokens)
        with cache.used_by(streamer):
            prompt = torch.tensor([ids])
            loaded.model.generate(
                prompt,
                attention_mask=torch.ones_like(prompt),
                past_key_values=streamer.past_key_values,
                max_new_tokens=tokens,
                streamer=streamer,
            )
        assert streamer.past_key_values is None  # so that only PrefixCache keeps it alive
        return streamer.decoder.ids, streamer.cached_tokens

    return asyncio.run(run())


def storage(cache: DynamicCache) -> int:
    """Return the bytes that a cache keeps alive, including those outside its views."""
    return sum(layer.keys.untyped_storage().nbytes() for layer in cache.layers)


def test_a_next_turn_reads_only_what_is_new(cache, loaded):
    ids = list(range(20, 40))
    reply, known = write(cache, loaded, ids)
    assert known == 0
    longer = [*ids, *reply, 7, 8, 9]
    continued, known = write(cache, loaded, longer)
    assert known == len(ids) + len(reply) - 1  # the model has not read its last token
    assert continued == write(PrefixCache(loaded.model, 0), loaded, longer)[0]
    assert len(cache.kept) == 1


def test_what_another_conversation_has_in_common_is_copied(cache, loaded):
    ids = list(range(20, 60))
    reply, _ = write(cache, loaded, ids)
    other, known = write(cache, loaded, [*ids[:10], 5, 6])
    assert known == 10
    assert cache.kept[-1][2] == byte_size(cache.kept[-1][1]) < cache.kept[0][2]
    assert storage(cache.kept[-1][1]) < storage(cache.kept[0][1])  # the rest is not copied
    assert other == write(PrefixCache(loaded.model, 0), loaded, [*ids[:10], 5, 6])[0]
    _, known = write(cache, loaded, [*ids, *reply, 7])
    assert known == len(ids) + len(reply) - 1


def test_at_least_one_token_is_read(cache, loaded):
    ids = list(range(20, 40))
    first, _ = write(cache, loaded, ids)
    assert write(cache, loaded, ids) == (first, len(ids) - 1)


def test_the_oldest_are_dropped_when_there_is_no_room(loaded):
    cache = PrefixCache(loaded.model, 300_000)
    for number in range(5):
        write(cache, loaded, [number * 50 + place for place in range(40)])
    assert 0 < sum(byte_size(each) for _, each, _ in cache.kept) <= 300_000
    assert write(cache, loaded, [4 * 50 + place for place in range(40)])[1] == 39
    assert write(cache, loaded, list(range(40)))[1] == 0


def test_a_reply_that_fails_keeps_nothing(cache, loaded):
    async def fail() -> None:
        with cache.used_by(new_streamer(loaded.tokenizer, (), [1, 2, 3])):
            raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError):
        asyncio.run(fail())
    assert cache.kept == []


SLIDING = {"sliding_window": 8}
LONGROPE = {  # keys depend on the length of their prompt
    "sliding_window": None,
    "rope_parameters": {
        "rope_type": "longrope",
        "rope_theta": 10000.0,
        "original_max_position_embeddings": 64,
        "factor": 2.0,
        "short_factor": [1.0] * 8,
        "long_factor": [4.0] * 8,
    },
}


@pytest.mark.parametrize("kind", [SLIDING, LONGROPE], ids=["sliding", "longrope"])
def test_a_model_whose_cache_cannot_be_cropped_reads_everything(tmp_path, kind):
    config = MistralConfig(
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        **kind,
    )
    save_random_model(config, tmp_path, context=128)
    assert PrefixCache(load_model(str(tmp_path)).model, 10_000_000).max_bytes == 0


def test_a_cache_with_a_layer_that_the_model_leaves_out_cannot_be_cropped():
    keys = torch.zeros(1, 1, 2 * LENGTH, 4)
    cache = DynamicCache()
    cache.update(keys, keys, 0)
    crop(cache)
    cache.layers.append(DynamicLayer())
    with pytest.raises(ValueError, match="a layer does not keep"):
        crop(cache)


def test_a_cache_that_the_model_did_not_use_is_not_kept(cache, loaded):
    async def reply() -> None:
        with cache.used_by(new_streamer(loaded.tokenizer, (), [1, 2, 3])):
            pass

    asyncio.run(reply())
    assert cache.kept == []


def test_a_chat_reads_each_message_once_and_its_replies_stay_the_same(bots, loaded):
    bot = bots.chatbot
    bot.gate.open()
    said, read = [], []
    with connect(bot.ws) as websocket:
        for turn in TURNS:
            before = bot.gate.count("tokens")
            reply = ask(websocket, turn)
            read.append(bot.gate.count("tokens") - before)
            said += [turn, reply]
            assert reply == reference(loaded, said[:-1], CHAT_MAX_NEW_TOKENS)
    whole = len(loaded.tokenizer(loaded.tokenizer.eos_token.join([*said, ""]))["input_ids"])
    assert sum(read) < whole + 4 * len(TURNS)


@pytest.mark.parametrize("name", ["textbot", "continuousbot"])
def test_the_usage_says_how_much_of_a_prompt_was_known(bots, name):
    bot = getattr(bots, name)
    bot.gate.open()
    messages = [user("Please remember this: " + "the dog is brown. " * 20)]
    first = complete(bot, messages, 40)
    messages += [{"role": "assistant", "content": text_of(first)}, user("What is brown?")]
    second = complete(bot, messages, 2)
    known = second.usage.prompt_tokens_details.cached_tokens
    assert first.usage.prompt_tokens - 32 <= known < second.usage.prompt_tokens


@pytest.mark.parametrize("megabytes", [0, 1])
def test_a_batch_shares_pages_unless_it_is_told_not_to(loaded, megabytes):
    async def test() -> int:
        batch = new_batch(loaded.model, 256, 2, prefix_cache_mb=megabytes)
        for _ in range(2):
            streamer = new_streamer(loaded.tokenizer, (), list(range(100, 200)), 2)
            batch.submit(streamer)
            await asyncio.wait_for(streamer.text.ended.wait(), HANG_S)
        assert batch.cached_tokens == {}
        batch.manager.stop(hard_stop=True)
        return streamer.cached_tokens

    assert asyncio.run(test()) == (96 if megabytes else 0)


def test_a_request_that_had_to_leave_the_cache_has_nothing_cached(loaded):
    async def test() -> dict[str, int]:
        batch = new_batch(loaded.model, 256, 2)
        scheduler = batch.manager.batch_processor.scheduler
        batch.manager.stop(hard_stop=True)
        scheduler.cached_tokens["1"] = 96
        scheduler.add_waiting_request(RequestState("1", list(range(100, 200))))
        return scheduler.cached_tokens

    assert asyncio.run(test()) == {}
