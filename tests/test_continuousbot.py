"""continuousbot.py: requests join and leave a running batch."""

import asyncio
import shutil
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing
from functools import partial
from itertools import count, cycle, pairwise, product
from typing import Any

import pytest
import requests
import torch
from bot_fixtures import (
    EMOJI_PROMPT,
    EMOJI_REPLY,
    HANG_S,
    MAX_NEW_TOKENS,
    WITH_KEY,
    Bot,
    Bots,
    http_reply,
    needs_gpu,
    reference,
    wait_until,
)
from callers import HttpCaller
from engines import new_batch, new_streamer
from gates import Gate
from hypothesis import given, settings
from hypothesis import strategies as st
from stepped_bots import stepped
from tokenizers.normalizers import Replace
from torch.utils.hooks import RemovableHandle
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DiffLlamaConfig,
    DogeConfig,
    FalconConfig,
    Gemma2Config,
    Gemma3TextConfig,
    GPTJConfig,
    Llama4TextConfig,
    LlamaConfig,
    MambaConfig,
)
from transformers.generation.continuous_batching import ContinuousBatchingManager
from transformers.generation.continuous_batching.offloading_manager import OffloadingManager
from transformers.generation.continuous_batching.requests import FutureRequestState, RequestState

from continuousbot import Continuousbot
from streaming_bots.errors import ModelStalled, TooManyWaiting
from streaming_bots.generation import continuous_batch, kv_cache
from streaming_bots.generation.continuous_batch import BatchFailed, ContinuousBatch
from streaming_bots.generation.sampling import ReplyOptions
from streaming_bots.generation.streamer import ReplyStreamer
from streaming_bots.models.loaded_model import LoadedModel, load_model
from streaming_bots.models.prompt import encode
from streaming_bots.models.source import BUNDLED

PROMPTS = [
    "Hi",
    "Tell me a story about dogs.",
    "What should I cook for my family tonight? They like pasta, but we had pasta yesterday and the "
    "day before, and my sister does not eat meat, so I am a little lost and would like some help.",
    "Thank you, good night!",
]
SHORT, LONG = "Thank you, good night!", "Tell me a story about dogs."


@pytest.fixture
def bot(bots: Bots) -> Iterator[Bot]:
    bots.continuousbot.gate.open()
    yield bots.continuousbot
    bots.continuousbot.gate.release()


def test_replies_written_together_equal_those_of_generate_alone(bot, loaded):
    prompts = PROMPTS * 3
    with ThreadPoolExecutor(len(prompts)) as callers:
        replies = list(callers.map(lambda prompt: http_reply(bot, prompt), prompts))
    assert replies == [reference(loaded, [prompt], MAX_NEW_TOKENS) for prompt in prompts]


def test_a_request_joins_the_batch_that_runs_and_ends_before_it(bot, loaded):
    bot.gate.hold_after(3)
    running = HttpCaller(bot, LONG)
    running.first()
    bot.gate.wait("step", 4)
    joining = HttpCaller(bot, SHORT, 2)
    bot.gate.wait("submitted", 2)
    bot.gate.release(3)  # the 4th step, and two with both rows
    assert joining.outcome() == "finished"
    assert joining.text == reference(loaded, [SHORT], 2)
    bot.gate.wait("step", 7)
    bot.gate.release()
    assert running.outcome() == "finished"
    assert running.text == reference(loaded, [LONG], MAX_NEW_TOKENS)


def test_a_finished_or_abandoned_row_costs_nothing_more(bot, loaded):
    bot.gate.hold_after(0)
    staying = HttpCaller(bot, LONG, 8)
    bot.gate.wait("step", 1)
    finishing, leaving = HttpCaller(bot, LONG, 3), HttpCaller(bot, LONG)
    bot.gate.wait("submitted", 3)
    bot.gate.release(4)
    assert finishing.outcome() == "finished"
    bot.gate.wait("step", 5)
    leaving.leave("close")
    bot.gate.wait("cancelled", 1)
    bot.gate.release()
    assert staying.outcome() == "finished"
    prompt = len(loaded.tokenizer(LONG)["input_ids"]) + 1
    # One prompt; one token and two prompts; two steps with three rows; one with two; three alone.
    assert bot.gate.count("tokens") == prompt + (1 + 2 * prompt) + 2 * 3 + 2 + 3
    bot.gate.wait("finished", 2)


def test_unicode_arrives_whole(bots: Bots):
    bot = bots.emoji_continuousbot
    bot.gate.open()

    def chunks_of(prompt: str) -> list[str]:
        with requests.post(
            bot.http, params={"prompt": prompt}, headers=WITH_KEY, stream=True
        ) as response:
            return [chunk.decode() for chunk in response.iter_content(chunk_size=None)]

    with ThreadPoolExecutor(2) as callers:
        # If a prompt is shorter by two characters, two dots come before its reply.
        replies = callers.map(chunks_of, [EMOJI_PROMPT, EMOJI_PROMPT[2:]])
        assert ["".join(reply) for reply in replies] == [EMOJI_REPLY, ".." + EMOJI_REPLY]


def test_a_failure_of_the_model_ends_all_replies_and_makes_the_replica_unhealthy(
    bots: Bots, loaded
):
    gate = Gate()
    bot = bots.run(stepped("continuousbot", gate, {}, model=BUNDLED), "breaking", gate)
    gate.fail_at(4)
    callers = [HttpCaller(bot, LONG), HttpCaller(bot, LONG)]
    assert [caller.outcome() for caller in callers] == ["failed", "failed"]
    gate.wait("failed", 2)
    with pytest.raises(BatchFailed, match="this step was told to fail"):
        bot.call("check_health")
    assert requests.post(bot.http, params={"prompt": SHORT}).status_code == 500


def test_a_request_that_the_manager_no_longer_takes_has_failed(loaded):
    async def test() -> None:
        batch = new_batch(loaded.model, 128, 2)
        streamer = new_streamer(loaded.tokenizer, (), [1, 2, 3], 8)
        batch.manager.stop(hard_stop=True)
        batch.manager.is_running = lambda: True  # it still seems to run, but takes no more
        batch.submit(streamer)
        with pytest.raises(BatchFailed, match="the model's thread is dead"):
            await asyncio.wait_for(anext(aiter(streamer)), HANG_S)
        with pytest.raises(BatchFailed):
            batch.check()

    asyncio.run(test())


def test_replies_are_right_though_the_cache_does_not_hold_them_all(loaded, monkeypatch):
    """The manager then removes a reply from the batch, and computes it again later."""
    monkeypatch.setattr(kv_cache, "TOKENS_PER_ROW", 32)
    monkeypatch.setattr(loaded.model.generation_config, "eos_token_id", None)  # so that all grow
    offload, offloaded = OffloadingManager.offload_requests, []

    def count(self: OffloadingManager) -> bool:
        offloaded.append(offload(self))
        return offloaded[-1]

    monkeypatch.setattr(OffloadingManager, "offload_requests", count)
    tokens, prompts = 60, PROMPTS * 2
    manager = kv_cache.start_manager(loaded.model, context=128, rows=4)
    assert manager.continuous_batching_config.num_blocks * kv_cache.PAGE_SIZE == 128
    replies = replies_of(manager, loaded, [[prompt] for prompt in prompts], tokens)
    manager.stop(hard_stop=True)
    assert any(offloaded)
    assert replies == [reference(loaded, [prompt], tokens) for prompt in prompts]


def test_offloaded_replies_are_written_even_if_all_other_clients_have_left(loaded, monkeypatch):
    monkeypatch.setattr(kv_cache, "TOKENS_PER_ROW", 32)
    offload, left = OffloadingManager.offload_requests, set()

    def offload_and_leave(self: OffloadingManager) -> bool:
        offloaded = offload(self)
        if offloaded and not left:
            left.update(self.scheduler.active_requests)
            for request in left:
                manager.cancel_request(request)
        return offloaded

    monkeypatch.setattr(OffloadingManager, "offload_requests", offload_and_leave)
    manager = kv_cache.start_manager(loaded.model, context=128, rows=4)
    input_ids = encode([{"role": "user", "content": LONG}], loaded.tokenizer, 400)
    for number in range(6):
        manager.add_request(input_ids, str(number), 60, sampler=None)
    outputs = [manager.get_result(timeout=HANG_S)]
    while outputs[-1] is not None and len(outputs) + len(left) < 6:
        outputs.append(manager.get_result(timeout=HANG_S))
    manager.stop(hard_stop=True)
    assert left
    assert {
        loaded.tokenizer.decode(output.generated_tokens, skip_special_tokens=True)
        for output in outputs
    } == {reference(loaded, [LONG], 60)}


def test_a_token_that_the_model_does_not_know_is_a_422_and_harms_nobody(
    run_other, emoji_model, tmp_path
):
    shutil.copytree(emoji_model, tmp_path, dirs_exist_ok=True)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    tokenizer.add_tokens(["[PAD]"])
    tokenizer.save_pretrained(tmp_path)
    bot = run_other(Continuousbot.bind(str(tmp_path)))
    caller = HttpCaller(bot, EMOJI_PROMPT)
    response = requests.post(bot.http, json={"prompt": "[PAD]"})
    assert response.status_code == 422
    (problem,) = response.json()["detail"]
    assert problem["loc"] == ["body", "prompt"]
    assert problem["msg"].endswith("does not know: [PAD]")
    assert (caller.outcome(), caller.text) == ("finished", EMOJI_REPLY)


def test_a_prompt_without_a_token_is_a_422_and_harms_nobody(run_other, emoji_model, tmp_path):
    shutil.copytree(emoji_model, tmp_path, dirs_exist_ok=True)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    tokenizer.backend_tokenizer.normalizer = Replace("~", "")
    tokenizer.save_pretrained(tmp_path)
    bot = run_other(Continuousbot.bind(str(tmp_path)))
    caller = HttpCaller(bot, EMOJI_PROMPT + "!")  # as long as a prompt with the end of a turn
    response = requests.post(bot.http, json={"prompt": "~"})
    assert response.status_code == 422
    assert [problem["type"] for problem in response.json()["detail"]] == ["no_token"]
    assert (caller.outcome(), caller.text) == ("finished", EMOJI_REPLY)


SMALL = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 99,
    "eos_token_id": 2,
}


@pytest.mark.parametrize(
    ("config", "problem"),
    [
        (
            GPTJConfig(n_embd=32, n_layer=1, n_head=2, rotary_dim=8, vocab_size=9),
            "depend on the rest",
        ),
        (DiffLlamaConfig(**SMALL), "depend on the rest"),
        (DogeConfig(**SMALL), "must match"),  # of others in the same step
        (FalconConfig(hidden_size=64, num_attention_heads=4, vocab_size=9), "must match"),
        (Llama4TextConfig(**SMALL, intermediate_size_mlp=64, head_dim=8), "Invalid layer type"),
        (MambaConfig(hidden_size=32, num_hidden_layers=1, vocab_size=9), "head"),
    ],
    ids=["gptj", "diffllama", "doge", "falcon", "llama4", "mamba"],
)
def test_a_model_unfit_for_continuous_batching_is_refused_at_the_start(config, problem):
    model = AutoModelForCausalLM.from_config(config).eval()
    line = f"^transformers cannot batch {config.model_type} .*{problem}.*; the Textbot can use it$"
    with pytest.raises(ValueError, match=line):
        kv_cache.start_manager(model, context=64, rows=2)


def test_a_prompt_that_the_cache_cannot_hold_is_a_413_that_says_so(run_other):
    bot = run_other(Continuousbot.bind(BUNDLED, cache_tokens=64))  # half is for the reply
    assert HttpCaller(bot, SHORT).outcome() == "finished"
    response = requests.post(bot.http, json={"prompt": "word " * 99})
    assert response.status_code == 413
    assert response.json()["detail"].endswith(" tokens, 32 fit; the cache has 64")
    bot = run_other(Continuousbot.bind(BUNDLED, cache_tokens=64, max_prompt_tokens=16))
    response = requests.post(bot.http, json={"prompt": "word " * 99})
    assert response.json()["detail"].endswith(" tokens, 16 fit")


GEMMA = Gemma3TextConfig(
    hidden_size=64,
    intermediate_size=64,
    num_hidden_layers=26,  # 4 with full and 22 with sliding attention
    num_attention_heads=4,
    num_key_value_heads=1,
    head_dim=16,
    vocab_size=512,
    sliding_window=512,
    max_position_embeddings=4096,
)


def test_a_model_without_sdpa_is_tried_out_before_it_computes_in_pages():
    """The start compares the batch with `generate`, which fails after the switch to pages."""
    config = Gemma2Config(
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        vocab_size=300,
    )

    async def start() -> ContinuousBatch:
        return new_batch(AutoModelForCausalLM.from_config(config).eval(), 128, 2)

    batch = asyncio.run(start())
    assert batch.manager.is_running()
    batch.manager.stop(hard_stop=True)


def test_a_reply_with_a_free_place_does_not_wait(loaded):
    async def test() -> None:
        batch = new_batch(loaded.model, 128, 4, max_waiting=1)
        for _ in range(4 + 1):
            batch.submit(new_streamer(loaded.tokenizer, (), [1, 2, 3], 8))
        with pytest.raises(TooManyWaiting, match="1 prompts already wait"):
            batch.submit(new_streamer(loaded.tokenizer, (), [1, 2, 3], 8))
        batch.manager.stop(hard_stop=True)

    asyncio.run(test())


def test_the_capacity_of_the_cache_is_known_even_if_layers_share_it_unequally():
    async def start() -> ContinuousBatch:
        model = AutoModelForCausalLM.from_config(GEMMA).eval()
        return new_batch(model, 4096, 2, 96)

    batch = asyncio.run(start())
    tokens, manager = batch.context, batch.manager
    assert 0 < tokens == batch.cache_tokens < 96
    for number in range(2):  # twice, in the same cache
        manager.add_request(list(range(tokens - 8)), str(number), max_new_tokens=8, sampler=None)
        output = manager.get_result(timeout=HANG_S)
        assert (output.error, len(output.generated_tokens)) == (None, 8)
    manager.stop(hard_stop=True)


@pytest.mark.parametrize(
    ("context", "rows", "cache_tokens", "free", "expected"),
    [
        (128, 3, None, 10**9, 3 * 256),
        (1024, 3, None, 10**9, 1024),
        (131_072, 3, None, 10**9, 8192),
        (10**30, 64, None, 10**9, 64 * 256),
        (131_072, 3, 12_000, 10**9, 12_000),
        (131_072, 3, None, 1_000_000, None),
    ],
)
def test_the_cache_has_room_for_the_rows_or_a_long_prompt_in_half_of_the_memory(
    loaded, monkeypatch, context, rows, cache_tokens, free, expected
):
    monkeypatch.setattr(kv_cache, "free_memory", lambda device: free)
    manager = kv_cache.start_manager(loaded.model, context, rows, cache_tokens)
    manager.stop(hard_stop=True)
    tokens = manager.continuous_batching_config.num_blocks * kv_cache.PAGE_SIZE
    bound = expected or free // 2 // kv_cache.bytes_per_token(loaded.model, rows)
    assert bound - kv_cache.PAGE_SIZE < tokens <= bound


def test_a_client_that_does_not_read_its_reply_is_no_stall(loaded):
    """A reply leaves the batch when the model has written it."""

    async def test() -> None:
        batch = new_batch(loaded.model, 128, 2, stall_timeout_s=0.5)
        for stop in ([], ["e"]):
            ids = encode([{"role": "user", "content": LONG}], loaded.tokenizer, 99)
            streamer = new_streamer(loaded.tokenizer, stop, ids, 8)
            batch.submit(streamer)
            await asyncio.wait_for(streamer.text.ended.wait(), HANG_S)
            assert not batch.running
            await asyncio.sleep(1)  # time for the watchdog to report a stall
            batch.check()
            batch.cancel(streamer)
        batch.manager.stop(hard_stop=True)

    asyncio.run(test())


def end_stalled(batch: ContinuousBatch, hook: RemovableHandle, go: threading.Event) -> None:
    """Check that a batch is ill after a stall, and let its thread, which a hook holds, end."""
    with pytest.raises(ModelStalled):
        batch.check()
    hook.remove()
    go.set()
    batch.manager.stop(hard_stop=True)


def test_a_stall_is_noticed_even_if_all_clients_have_left(loaded):
    async def test() -> None:
        batch = new_batch(loaded.model, 128, 2, stall_timeout_s=0.5)
        begun, go, given_up = threading.Event(), threading.Event(), asyncio.Event()

        def give_up_and_tell(error: Exception) -> None:
            give_up(error)
            given_up.set()

        give_up, batch.give_up = batch.give_up, give_up_and_tell

        def hang(*_: object) -> None:
            begun.set()
            go.wait(HANG_S)

        hook = loaded.model.register_forward_pre_hook(hang)
        streamer = new_streamer(loaded.tokenizer, (), [1, 2, 3], 8)
        batch.submit(streamer)
        await asyncio.to_thread(begun.wait, HANG_S)
        batch.cancel(streamer)
        await asyncio.wait_for(given_up.wait(), HANG_S)
        end_stalled(batch, hook, go)

    asyncio.run(test())


def test_the_time_without_work_is_no_stall(loaded):
    async def test() -> None:
        batch, go = new_batch(loaded.model, 128, 2, stall_timeout_s=0.5), threading.Event()
        streamers = [new_streamer(loaded.tokenizer, (), [1, 2, 3], 2) for _ in range(2)]
        batch.submit(streamers[0])
        await asyncio.wait_for(streamers[0].text.ended.wait(), HANG_S)
        await asyncio.sleep(0.4)
        hook = loaded.model.register_forward_pre_hook(lambda *_: go.wait(HANG_S) and None)
        began = time.monotonic()
        batch.submit(streamers[1])
        await asyncio.wait_for(streamers[1].text.ended.wait(), HANG_S)
        assert time.monotonic() - began >= 0.5
        end_stalled(batch, hook, go)

    asyncio.run(test())


def test_tokens_are_progress_even_if_no_layer_reports_any(loaded, monkeypatch):
    """A CUDA graph computes all layers without calling their hooks."""
    monkeypatch.setattr(continuous_batch, "watch_layers", lambda *_: None)
    monkeypatch.setattr(loaded.model.generation_config, "eos_token_id", None)

    async def test() -> None:
        batch = new_batch(loaded.model, 128, 2, stall_timeout_s=0.5)
        hook = loaded.model.register_forward_pre_hook(lambda *_: time.sleep(0.1))
        streamer = new_streamer(loaded.tokenizer, (), [1, 2, 3], 20)  # these take 2 s
        batch.submit(streamer)
        await asyncio.wait_for(streamer.text.ended.wait(), HANG_S)
        hook.remove()
        batch.check()
        assert streamer.reply_tokens == 20
        batch.manager.stop(hard_stop=True)

    asyncio.run(test())


def test_a_request_whose_cancel_came_too_early_is_cancelled_with_the_next(loaded, monkeypatch):
    """The manager takes new requests first, and then cancels; one added in between runs on."""
    monkeypatch.setattr(loaded.model.generation_config, "eos_token_id", None)
    clear, gone = kv_cache.RoomScheduler.clear_cancelled_requests, threading.Event()

    def note(self: kv_cache.RoomScheduler) -> list[RequestState]:
        states = clear(self)
        if "ghost" in [state.request_id for state in states]:
            gone.set()
        return states

    monkeypatch.setattr(kv_cache.RoomScheduler, "clear_cancelled_requests", note)

    async def test() -> None:
        batch = new_batch(loaded.model, 512, 2)
        batch.manager.add_request([1, 2, 3], "ghost", max_new_tokens=400, streaming=True)
        batch.submit(new_streamer(loaded.tokenizer, (), [1, 2, 3], 8))
        assert await asyncio.to_thread(gone.wait, HANG_S)
        batch.manager.stop(hard_stop=True)

    asyncio.run(test())


def test_no_more_replies_are_written_at_once_than_the_batch_has_places(loaded, monkeypatch):
    prepare, rows = kv_cache.RequestsLogitsProcessor.prepare_tensor_args, []

    def count(
        self: kv_cache.RequestsLogitsProcessor, going_on: list[FutureRequestState]
    ) -> torch.Tensor:
        rows.append(len(going_on))
        return prepare(self, going_on)

    monkeypatch.setattr(kv_cache.RequestsLogitsProcessor, "prepare_tensor_args", count)
    manager = kv_cache.start_manager(loaded.model, context=128, rows=3)
    replies = replies_of(manager, loaded, [[prompt] for prompt in PROMPTS], 8)
    manager.stop(hard_stop=True)
    assert max(rows) == 3
    assert replies == [reference(loaded, [prompt], 8) for prompt in PROMPTS]


@pytest.mark.parametrize("tokens", [16, 40])
def test_replies_with_a_common_beginning_all_advance(loaded, monkeypatch, tokens):
    """The cache has room for five such replies, but a step can read no more than three of them.

    Once they have 214 tokens each, it can read two, and they take turns.
    """
    monkeypatch.setattr(loaded.model.generation_config, "eos_token_id", None)
    schedule, stood_still = kv_cache.RoomScheduler.schedule_batch, [set()]

    def compare(self: kv_cache.RoomScheduler, *budgets: int) -> Any:
        requests, *others = schedule(self, *budgets)
        scheduled = {each.state.request_id for each in requests}
        stood_still.append(self.active_requests.keys() - scheduled)
        return requests, *others

    monkeypatch.setattr(kv_cache.RoomScheduler, "schedule_batch", compare)
    system = [7 + place % 50 for place in range(6 * kv_cache.PAGE_SIZE)]

    async def test() -> list[ReplyStreamer]:
        batch = new_batch(loaded.model, loaded.context, 5, 640)
        streamers = []
        for number in [0, *range(6)]:
            ids = [*system, 100 + number]
            streamers.append(new_streamer(loaded.tokenizer, (), ids, tokens))
            batch.submit(streamers[-1])
            if len(streamers) < 3:  # the first reads the beginning for all
                await asyncio.wait_for(streamers[-1].text.ended.wait(), HANG_S)
        for streamer in streamers:
            await asyncio.wait_for(streamer.text.ended.wait(), HANG_S)
        batch.manager.stop(hard_stop=True)
        return streamers

    first, again, *others = asyncio.run(test())
    assert [streamer.cached_tokens for streamer in (first, again, *others)] == [0] + 6 * [192]
    assert again.decoder.ids == first.decoder.ids
    assert any(stood_still) == (tokens == 40)
    assert not any(before & after for before, after in pairwise(stood_still))


@pytest.mark.parametrize("shared", [0, 64])
def test_a_long_prompt_gets_its_turn_though_short_ones_keep_coming(loaded, monkeypatch, shared):
    """The cache has no room for both, and they may begin alike."""
    monkeypatch.setattr(loaded.model.generation_config, "eos_token_id", None)
    distinct, lengths = count(1), cycle([10, 25, 40, 60, 33, 17])

    async def test() -> None:
        batch = new_batch(loaded.model, loaded.context, 8, 640)
        ended = 0

        async def ask(length: int, tokens: int) -> None:
            nonlocal ended
            prompt = [7 + place % 50 for place in range(shared)]
            prompt += [next(distinct) % 2500 for _ in range(length)]
            streamer = new_streamer(loaded.tokenizer, (), prompt, tokens)
            batch.submit(streamer)
            await streamer.text.ended.wait()
            ended += 1

        async def keep_asking() -> None:
            while True:
                await ask(20, next(lengths))

        others = [asyncio.create_task(keep_asking()) for _ in range(24)]
        while ended < 24:
            await batch.moved.wait()
        before = ended
        await asyncio.wait_for(ask(400 - shared, 2), HANG_S / 2)
        assert ended - before < 24 + 2 * 8  # those that came before it, and a few more
        for other in others:
            other.cancel()
        batch.manager.stop(hard_stop=True)

    asyncio.run(test())


def test_a_common_beginning_of_prompts_is_computed_once(loaded):
    system = "You are a friendly and patient assistant who knows a lot about the sea. " * 6
    conversations = [[system, prompt] for prompt in PROMPTS]
    computed = []
    hook = loaded.model.register_forward_pre_hook(
        lambda model, arguments, options: computed.append(options["input_ids"].numel()),
        with_kwargs=True,
    )
    manager = kv_cache.start_manager(loaded.model, context=512, rows=32)
    replies = replies_of(manager, loaded, conversations[:1], 8)
    first = sum(computed)
    replies += replies_of(manager, loaded, conversations[1:], 8)
    manager.stop(hard_stop=True)
    hook.remove()
    assert replies == [reference(loaded, turns, 8) for turns in conversations]
    assert sum(computed) - first < 2 * first  # for three prompts


def test_a_request_reads_only_its_own_keys_and_values(loaded, monkeypatch):
    """Nor is a short one padded to the length of a long one."""
    attend, lengths, later_lengths = torch.nn.functional.scaled_dot_product_attention, [], []

    def attend_and_note(query, key, *arguments, **options) -> torch.Tensor:
        lengths.append(key.shape[-2])
        if query.shape[-2] == 1:
            later_lengths.append(key.shape[-2])
        return attend(query, key, *arguments, **options)

    conversations = [[prompt] for prompt in PROMPTS]
    expected = [reference(loaded, turns, 8) for turns in conversations]
    manager = kv_cache.start_manager(loaded.model, context=512, rows=4, shares_prefixes=False)
    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", attend_and_note)
    assert replies_of(manager, loaded, conversations, 8) == expected
    manager.stop(hard_stop=True)
    longest = max(len(loaded.tokenizer(prompt)["input_ids"]) for prompt in PROMPTS)
    assert longest < max(lengths) <= longest + 1 + 8  # with the end of a turn, and the reply
    joined = next(place for place, length in enumerate(later_lengths) if length > longest)
    assert min(later_lengths[joined:]) < longest // 2  # while the longest runs


@pytest.mark.parametrize(
    "config",
    [
        LlamaConfig(**SMALL),
        Gemma3TextConfig(**GEMMA.to_dict() | {"layer_types": None, "sliding_window": 8}),
    ],
    ids=["grouped-query", "sliding window"],
)
def test_any_attention_computes_requests_of_a_step_together_as_alone(config):
    model = AutoModelForCausalLM.from_config(config).eval()
    prompts = [list(range(length, 2 * length)) for length in (3, 20, 23, 5, 40, 24)]
    expected = [
        model.generate(torch.tensor([ids]), max_new_tokens=12)[0, len(ids) :].tolist()
        for ids in prompts
    ]
    manager = kv_cache.start_manager(model, context=128, rows=4)  # so two join later
    for number, ids in enumerate(prompts):
        manager.add_request(ids, str(number), max_new_tokens=12, sampler=None)
    written = {}
    while len(written) < len(prompts):
        output = manager.get_result(timeout=HANG_S)
        assert output is not None and output.error is None
        written[int(output.request_id)] = output.generated_tokens
    manager.stop(hard_stop=True)
    assert [written[number] for number in range(len(prompts))] == expected


async def known_pages(
    batch: ContinuousBatch, loaded: LoadedModel, first: int, pages: int, leaves: bool = False
) -> int:
    """Ask with a prompt of `pages` pages and a token. Return how many of them were cached.

    Prompts with another `first` begin otherwise. A client that `leaves` does so at the first token.
    """
    ids = [7 + (first + place) % 2000 for place in range(pages * kv_cache.PAGE_SIZE)]
    streamer = new_streamer(loaded.tokenizer, (), [*ids, 5], 20 if leaves else 2)
    batch.submit(streamer)
    if leaves:
        while not streamer.token_times:
            await batch.moved.wait()
        batch.cancel(streamer)
        gone = partial(wait_until, lambda: not batch.has_work(), HANG_S, "its pages are not free")
        await asyncio.to_thread(gone)
    await streamer.text.ended.wait()
    return streamer.cached_tokens // kv_cache.PAGE_SIZE


@pytest.mark.parametrize(
    ("pages", "beginnings", "expected"),
    [
        (3, [0, 100, 200, 100, 0], [0, 0, 0, 3, 1]),  # the oldest leaves first, its end before all
        (4, [0, 100, 0, 100], [0, 0, 3, 3]),  # a known prompt needs one more page, not five
    ],
)
def test_ended_replies_leave_the_cache_page_by_page(loaded, pages, beginnings, expected):
    """The cache has ten pages, of which two stay free."""

    async def test() -> list[int]:
        batch = new_batch(loaded.model, loaded.context, 2, 10 * kv_cache.PAGE_SIZE)
        cached = [await known_pages(batch, loaded, first, pages) for first in beginnings]
        batch.manager.stop(hard_stop=True)
        return cached

    with asyncio.Runner() as runner:
        assert runner.run(test()) == expected


def test_abandoned_replies_lose_their_last_page_first(loaded, monkeypatch):
    monkeypatch.setattr(loaded.model.generation_config, "eos_token_id", None)

    async def test() -> list[int]:
        batch = new_batch(loaded.model, loaded.context, 2, 10 * kv_cache.PAGE_SIZE)
        cached = [
            await known_pages(batch, loaded, first, 4, leaves=True) for first in (0, 100, 0, 100)
        ]
        batch.manager.stop(hard_stop=True)
        return cached

    with asyncio.Runner() as runner:
        assert min(runner.run(test())[2:]) >= 3  # of four


def test_pages_with_which_a_waiting_prompt_begins_leave_the_cache_last(loaded):
    """Two prompts wait for the only place, and the second begins with the oldest pages."""

    async def test() -> list[int]:
        batch = new_batch(loaded.model, loaded.context, 1, 10 * kv_cache.PAGE_SIZE)
        cached = [await known_pages(batch, loaded, first, 3) for first in (0, 100)]
        cached += await asyncio.gather(
            *(known_pages(batch, loaded, first, 3) for first in (200, 0))
        )
        batch.manager.stop(hard_stop=True)
        return cached

    with asyncio.Runner() as runner:
        assert runner.run(test()) == [0, 0, 0, 3]


def test_requests_that_come_together_cost_others_no_more_pages_than_they_need(loaded):
    """The cache has ten pages, nearly all of two ended replies, and room for one more request."""

    async def test() -> list[int]:
        batch = new_batch(loaded.model, loaded.context, 2, 10 * kv_cache.PAGE_SIZE)
        cached = [await known_pages(batch, loaded, first, 4) for first in (0, 100)]
        together = [known_pages(batch, loaded, first, pages) for first, pages in ((200, 1), (0, 4))]
        cached += await asyncio.gather(*together)
        cached.append(await known_pages(batch, loaded, 100, 4))
        batch.manager.stop(hard_stop=True)
        return cached

    with asyncio.Runner() as runner:
        assert runner.run(test()) == [0, 0, 0, 3, 1]


asked = st.tuples(
    st.sampled_from(PROMPTS),
    st.sampled_from([4, 60]),  # tokens of the reply
    st.sampled_from([[], ["e"]]),  # stop strings
    st.sampled_from([None, None, 7]),  # seed; without one, the reply is greedy
    st.integers(0, 40) | st.none(),  # pieces after which the client leaves
    st.integers(0, 20),  # ms after which the client comes
)


@pytest.mark.parametrize(
    "device", ["cpu", pytest.param("cuda", marks=[pytest.mark.gpu, needs_gpu])]
)
def test_clients_get_their_replies_while_others_come_and_go(loaded, monkeypatch, device):
    """The cache holds two long replies, so some must leave it. All other clients may then leave."""
    if device != "cpu":
        loaded = load_model(BUNDLED, device=device)
    offload, leaving = OffloadingManager.offload_requests, [0]  # after this many offloads

    def offload_and_leave(self: OffloadingManager) -> bool:
        offloaded = offload(self)
        leaving[0] -= 1
        if leaving[0] == 0:
            for streamer, request in list(batch.requests.items()):
                if request in self.scheduler.active_requests:
                    streamer.cancel()
        return offloaded

    monkeypatch.setattr(OffloadingManager, "offload_requests", offload_and_leave)
    expected: dict[tuple[str, int, int | None], str] = {}
    for prompt, tokens, seed in product(PROMPTS, [4, 60], [None, 7]):
        sampler = ReplyOptions.model_construct(max_new_tokens=tokens, seed=seed).sampler(device)
        expected[prompt, tokens, seed] = reference(loaded, [prompt], tokens, sampler)

    async def start() -> ContinuousBatch:
        return new_batch(loaded.model, loaded.context, 4, 128, 20)

    async def ask(batch, prompt, tokens, stop, seed, pieces, delay_ms) -> None:
        await asyncio.sleep(delay_ms / 1000)
        ids = encode([{"role": "user", "content": prompt}], loaded.tokenizer, 400)
        streamer, text = new_streamer(loaded.tokenizer, stop, ids, tokens), ""
        streamer.options.seed = seed
        batch.submit(streamer)
        try:
            async with aclosing(aiter(streamer)) as chunks:
                while pieces is None or pieces > 0:
                    text += await anext(chunks, "")
                    if streamer.cancelled:
                        return
                    if streamer.read_to_end:
                        whole = expected[prompt, tokens, seed]
                        assert text == (whole.split(stop[0])[0] if stop else whole)
                        return
                    pieces = pieces and pieces - 1
        finally:
            streamer.cancel()
            batch.cancel(streamer)

    async def ask_all(batch, requests) -> None:
        async with asyncio.timeout(HANG_S), asyncio.TaskGroup() as tasks:
            for request in requests:
                tasks.create_task(ask(batch, *request))
        await ask(batch, SHORT, 4, [], None, None, 0)

    with asyncio.Runner() as runner:
        batch = runner.run(start())

        @settings(deadline=None, derandomize=True, max_examples=30)
        @given(requests=st.lists(asked, max_size=10), offloads=st.integers(1, 4))
        def come_and_go(requests, offloads) -> None:
            leaving[0] = offloads
            runner.run(ask_all(batch, requests))

        come_and_go()
        batch.manager.stop(hard_stop=True)


def replies_of(
    manager: ContinuousBatchingManager,
    loaded: LoadedModel,
    conversations: list[list[str]],
    tokens: int,
) -> list[str]:
    """Return the replies to conversations, which the manager writes together."""
    for number, turns in enumerate(conversations):
        roles = ("system", "user")[-len(turns) :]
        messages = [
            {"role": role, "content": turn} for role, turn in zip(roles, turns, strict=True)
        ]
        input_ids = encode(messages, loaded.tokenizer, 400)
        manager.add_request(input_ids, str(number), tokens, sampler=None)
    replies: dict[str, str] = {}
    while len(replies) < len(conversations):
        output = manager.get_result(timeout=60)
        assert output is not None and output.error is None
        replies[output.request_id] = loaded.tokenizer.decode(
            output.generated_tokens, skip_special_tokens=True
        )
    return [replies[str(number)] for number in range(len(conversations))]
