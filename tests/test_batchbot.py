"""batchbot.py: rows run together, and each row ends by itself."""

import asyncio
import logging
import threading
import time
import weakref
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import Mock

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
    batches_of,
    http_reply,
    reference,
)
from callers import HttpCaller
from engines import new_thread, reply_options
from local_serve import CURRENT
from ray import serve
from ray.serve import Application
from scripted_model import byte_tokenizer, save_random_model
from stepped_bots import DECODE_ERROR
from transformers import (
    BartConfig,
    GPTNeoConfig,
    Llama4TextConfig,
    MambaConfig,
    MiniMaxConfig,
    OpenAIGPTConfig,
    Phi3Config,
    PreTrainedConfig,
    RecurrentGemmaConfig,
    RwkvConfig,
)
from transformers.generation.utils import DeferredStopCheck

from batchbot import Batchbot, RawStreamer
from continuousbot import Continuousbot
from streaming_bots.errors import ModelStalled
from streaming_bots.generation.padding import check_padding, keep_rows
from streaming_bots.generation.row import Row, split_rows
from streaming_bots.models.loaded_model import load_model
from streaming_bots.models.source import BUNDLED
from streaming_bots.settings import BatchbotSettings

PROMPTS = [
    "Hi",
    "Tell me a story about dogs.",
    "What should I cook for my family tonight? They like pasta, but we had pasta yesterday and the "
    "day before, and my sister does not eat meat, so I am a little lost and would like some help.",
    "Thank you, good night!",
]
SHORT, LONG = "Thank you, good night!", "Tell me a story about dogs."


@pytest.fixture
def batchbot(bots: Bots) -> Iterator[Bot]:
    bots.batchbot.gate.open()
    yield bots.batchbot
    batches_of(bots.batchbot)


@pytest.fixture
def pairs(batchbot: Bot) -> Bot:
    """A Batchbot that begins a batch only when two requests wait."""
    batches_of(batchbot, 2, wait_s=60)
    return batchbot


def test_every_row_of_a_mixed_batch_equals_the_reply_of_generate_alone(batchbot, loaded):
    batches_of(batchbot, len(PROMPTS), wait_s=60)
    with ThreadPoolExecutor(len(PROMPTS)) as callers:
        replies = list(callers.map(lambda prompt: http_reply(batchbot, prompt), PROMPTS))
    assert replies == [reference(loaded, [prompt], MAX_NEW_TOKENS) for prompt in PROMPTS]
    assert batchbot.gate.count("submitted") == 1  # it was one batch


def test_a_lone_request_does_not_wait_for_company(batchbot, loaded):
    began = time.monotonic()
    assert http_reply(batchbot, SHORT, 1) == reference(loaded, [SHORT], 1)
    assert time.monotonic() - began < 5  # the published example takes at least 15 s


def test_the_first_chunk_arrives_while_the_model_still_generates(batchbot):
    batchbot.gate.hold_after(1)
    with requests.post(batchbot.http, params={"prompt": LONG}, stream=True) as response:
        chunks = response.iter_content(chunk_size=None)
        first = next(chunks)
        batchbot.gate.wait("step", 2)
        batchbot.gate.release()
        rest = b"".join(chunks)
    assert first and rest


def test_a_short_reply_closes_before_the_long_one(pairs, loaded):
    short_tokens = len(loaded.tokenizer(reference(loaded, [SHORT], MAX_NEW_TOKENS))["input_ids"])
    pairs.gate.hold_after(short_tokens + 1)  # its text and its end token
    with ThreadPoolExecutor(2) as callers:
        long = callers.submit(http_reply, pairs, LONG)
        short = callers.submit(http_reply, pairs, SHORT)
        assert short.result() == reference(loaded, [SHORT], MAX_NEW_TOKENS)
        pairs.gate.wait("step", short_tokens + 2)
        assert not long.done()
        pairs.gate.release()
        assert long.result() == reference(loaded, [LONG], MAX_NEW_TOKENS)


def test_a_row_that_reached_its_own_limit_closes_alone(pairs, loaded):
    pairs.gate.hold_after(3)
    with ThreadPoolExecutor(2) as callers:
        long = callers.submit(http_reply, pairs, LONG)
        short = callers.submit(http_reply, pairs, LONG, 3)
        assert short.result() == reference(loaded, [LONG], 3)
        pairs.gate.wait("step", 4)
        pairs.gate.release()
        assert long.result() == reference(loaded, [LONG], MAX_NEW_TOKENS)


def test_the_model_runs_no_longer_than_the_longest_row(pairs):
    with ThreadPoolExecutor(2) as callers:
        rows = [callers.submit(http_reply, pairs, LONG, limit) for limit in (3, 5)]
        for row in rows:
            row.result()
    assert pairs.gate.count("step") == 5


def test_a_finished_or_abandoned_row_costs_nothing_more(batchbot, loaded):
    batches_of(batchbot, 3, wait_s=60)
    batchbot.gate.hold_after(4)
    staying, _, leaving = (HttpCaller(batchbot, LONG, limit) for limit in (8, 3, None))
    leaving.first()
    batchbot.gate.wait("step", 5)
    leaving.leave("close")
    batchbot.gate.wait("cancelled", 1)
    batchbot.gate.release()
    assert staying.outcome() == "finished"
    assert staying.text == reference(loaded, [LONG], 8)
    prompt = len(loaded.tokenizer(LONG)["input_ids"]) + 1
    # Three prompts; two steps with three rows; two with two rows; three with the last row.
    assert batchbot.gate.count("tokens") == 3 * prompt + 2 * 3 + 2 * 2 + 3
    batchbot.gate.wait("finished", 2)


def test_prompts_that_arrive_while_a_batch_runs_make_one_next_batch(batchbot, loaded):
    batches_of(batchbot, wait_s=0.001)  # less than the time between two prompts
    batchbot.gate.hold_after(0)
    with ThreadPoolExecutor(4) as callers:
        replies = [callers.submit(http_reply, batchbot, SHORT, 2)]
        batchbot.gate.wait("step", 1)
        for number in range(3):  # one by one, not at the same moment
            replies.append(callers.submit(http_reply, batchbot, SHORT, 2))
            batchbot.gate.wait("asked", number + 2)
        batchbot.gate.release()
        assert {reply.result() for reply in replies} == {reference(loaded, [SHORT], 2)}
    assert batchbot.gate.count("submitted") == 2


def test_a_client_that_leaves_stops_its_row_alone(pairs, loaded):
    pairs.gate.hold_after(3)
    with ThreadPoolExecutor(1) as caller:
        staying = caller.submit(http_reply, pairs, LONG)
        with requests.post(pairs.http, params={"prompt": PROMPTS[2]}, stream=True) as leaving:
            chunks = leaving.iter_content(chunk_size=None)
            assert next(chunks)
            pairs.gate.wait("step", 4)
        pairs.gate.wait("left", 1)
        pairs.gate.release()
        assert staying.result() == reference(loaded, [LONG], MAX_NEW_TOKENS)


def test_a_reply_that_its_reader_closes_leaves_nothing_in_the_log(batchbot, bots: Bots, caplog):
    replica = bots.local.replicas["/batchbot"]

    async def read_one_text() -> None:
        CURRENT.set(replica)
        reply = await replica.servable_object.start_reply(
            [{"role": "user", "content": LONG}], reply_options()
        )
        assert await anext(reply.chunks)
        await reply.aclose()

    batchbot.gate.hold_after(3)
    asyncio.run_coroutine_threadsafe(read_one_text(), bots.local.loop).result(HANG_S)
    batchbot.gate.release()
    http_reply(batchbot, SHORT, 2)  # begins after the end of the first batch
    assert not [record.message for record in caplog.records if record.name == "asyncio"]


def test_replies_are_complete_even_if_generate_stops_one_step_late(pairs, loaded, monkeypatch):
    """On Apple's GPUs, transformers checks the stopping criteria one step late."""
    monkeypatch.setattr(DeferredStopCheck, "is_supported", lambda *_, **__: True)
    monkeypatch.setattr(torch, "Event", Mock)  # CPUs have no events
    for lengths in ((3, 4), (4, 3), (3, 9)):
        replies = replies_together(pairs, [LONG, LONG], list(lengths))
        assert replies == [reference(loaded, [LONG], length) for length in lengths]


def test_when_no_client_is_left_the_model_stops(batchbot, loaded):
    batchbot.gate.hold_after(3)
    with requests.post(batchbot.http, params={"prompt": LONG}, stream=True) as response:
        chunks = response.iter_content(chunk_size=None)
        assert next(chunks)
        batchbot.gate.wait("step", 4)
    batchbot.gate.wait("left", 1)
    batchbot.gate.release()
    assert http_reply(batchbot, SHORT, 2) == reference(loaded, [SHORT], 2)
    assert batchbot.gate.count("step") == 4 + 2


def test_a_failure_before_the_first_token_is_a_500_for_every_row(pairs, loaded):
    pairs.gate.fail_at(1)
    with ThreadPoolExecutor(2) as callers:
        ask = {"params": {"prompt": LONG}}
        rows = [callers.submit(requests.post, pairs.http, **ask) for _ in range(2)]
        for row in rows:
            assert row.result().status_code == 500
            assert row.result().json() == {"detail": "the reply failed: RuntimeError"}
    batches_of(pairs, 1, wait_s=0)
    assert http_reply(pairs, SHORT) == reference(loaded, [SHORT], MAX_NEW_TOKENS)


def test_a_failure_in_mid_reply_breaks_off_only_the_unfinished_rows(pairs, loaded):
    pairs.gate.fail_at(4)
    with ThreadPoolExecutor(2) as callers:
        broken = callers.submit(http_reply, pairs, LONG)
        whole = callers.submit(http_reply, pairs, LONG, 2)
        assert whole.result() == reference(loaded, [LONG], 2)
        with pytest.raises(requests.exceptions.ChunkedEncodingError):
            broken.result()
    batches_of(pairs, 1, wait_s=0)
    assert http_reply(pairs, SHORT) == reference(loaded, [SHORT], MAX_NEW_TOKENS)


def test_a_reply_that_cannot_be_decoded_fails_alone(pairs, loaded):
    callers = [HttpCaller(pairs, DECODE_ERROR), HttpCaller(pairs, SHORT)]
    assert [caller.outcome() for caller in callers] == ["failed", "finished"]
    assert callers[1].text == reference(loaded, [SHORT], MAX_NEW_TOKENS)


def test_invalid_settings_leave_a_running_bot_unchanged(batchbot, loaded):
    batches_of(batchbot, 1, wait_s=60)
    batches_of(batchbot, 0, wait_s=30)
    assert http_reply(batchbot, SHORT, 2) == reference(loaded, [SHORT], 2)  # one is a full batch


MINIMAX = MiniMaxConfig(
    hidden_size=32,
    intermediate_size=32,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=2,
    head_dim=16,
    num_local_experts=2,
    block_size=16,
    max_position_embeddings=128,
    layer_types=["linear_attention", "full_attention"],
)
MAMBA = MambaConfig(hidden_size=32, num_hidden_layers=2, tie_word_embeddings=False)
OPENAI_GPT = OpenAIGPTConfig(n_embd=32, n_layer=2, n_head=2, n_positions=128)
GPT_NEO = GPTNeoConfig(
    hidden_size=32,
    num_layers=2,
    num_heads=2,
    max_position_embeddings=64,
    window_size=16,
    attention_types=[[["global", "local"], 1]],
)
RECURRENT_GEMMA = RecurrentGemmaConfig(
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=3,
    num_attention_heads=2,
    head_dim=16,
    lru_width=32,
    attention_window_size=64,
)
RWKV = RwkvConfig(hidden_size=32, num_hidden_layers=2, context_length=128)  # ignores the mask
BART = BartConfig(d_model=32, decoder_layers=2, decoder_attention_heads=2)  # counts padding, too


def batchbot_of(config: PreTrainedConfig, folder: Path, size: int) -> Application:
    """Return a Batchbot with a random model. A batch begins when `size` prompts wait."""
    save_random_model(config, folder)
    settings = {"max_batch_size": size, "batch_wait_timeout_s": 60}
    return Batchbot.options(user_config=settings).bind(str(folder))


def replies_together(bot: Bot, prompts: list[str], lengths: list[int]) -> list[str]:
    with ThreadPoolExecutor(len(prompts)) as callers:
        return list(callers.map(partial(http_reply, bot), prompts, lengths))


def replies_alone(folder: Path, prompts: list[str], lengths: list[int]) -> list[str]:
    model = load_model(str(folder))
    return [
        reference(model, [prompt], length) for prompt, length in zip(prompts, lengths, strict=True)
    ]


def test_the_log_names_an_argument_that_user_config_overrides(caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("ray.serve"), "propagate", True)
    given = BatchbotSettings(model=BUNDLED, max_batch_size=8).constructor_arguments()
    settings = BatchbotSettings(**given)  # as in the replica
    settings.reconfigure({"max_batch_size": 8, "batch_wait_timeout_s": 3})
    assert caplog.messages == []
    settings.reconfigure({"max_batch_size": 4, "batch_wait_timeout_s": 3})
    told = {record.getMessage() for record in caplog.records}  # both handlers record it
    assert told == {"max_batch_size is 4, from user_config, and not 8, from args"}


def test_a_batch_ends_at_once_if_all_clients_leave_before_it_begins(loaded):
    async def read() -> list[Any]:
        row = Row(loaded.tokenizer, [0], reply_options(9), [])
        row.cancelled = True
        streamer = RawStreamer([row])
        new_thread().submit(streamer, RawStreamer.fail, AssertionError())  # is not called
        async with asyncio.timeout(HANG_S):
            return [steps async for steps in streamer.steps]

    assert asyncio.run(read()) == []


def test_a_reply_with_unread_tokens_fails_when_the_model_dies(loaded):
    def die(streamer: RawStreamer) -> None:
        streamer(torch.tensor([[0, 5]]), None)
        streamer.put(torch.tensor([5]))
        raise SystemExit

    async def read() -> None:
        rows = [Row(loaded.tokenizer, [0], reply_options(9), [])]
        streamer, thread = RawStreamer(rows), new_thread()
        thread.submit(streamer, die)
        thread.thread.join(HANG_S)
        async for items in Batchbot.func_or_class.consume_streamer(None, rows, streamer):
            assert items != [StopIteration]

    with pytest.raises(ModelStalled, match="died of SystemExit"):
        asyncio.run(read())


@pytest.mark.parametrize(
    ("config", "goes_on"),
    [
        (MAMBA, False),
        (OPENAI_GPT, False),
        (RECURRENT_GEMMA, False),
        (GPT_NEO, True),
    ],
    ids=["mamba", "openai-gpt", "recurrent-gemma", "gpt-neo"],
)
def test_rows_end_independently_with_any_kind_of_cache(
    config, goes_on, bots: Bots, run_other, tmp_path
):
    """GPT has no cache, Mamba reads everything again, and RecurrentGemma hides its state."""
    prompts, lengths = ["Hi!", "Bye!", "How?"], [3, 6, 9]
    bot = run_other(batchbot_of(config, tmp_path, 3))
    read: list[int] = []  # tokens in each step
    bots.local.replicas["/other"].servable_object.model.register_forward_pre_hook(
        lambda model, arguments, options: read.append(options["input_ids"].numel()),
        with_kwargs=True,
    )
    replies = replies_together(bot, prompts, lengths)
    assert len(set(map(len, replies))) > 1  # they ended apart
    assert (max(read[1:]) <= len(prompts)) == goes_on  # tokens per step: the cache is used
    assert replies == replies_alone(tmp_path, prompts, lengths)


def test_a_cache_that_cannot_be_cut_is_freed_before_the_next_run(loaded):
    inputs = {"input_ids": torch.tensor([[5, 6], [7, 8]]), "attention_mask": torch.ones(2, 2)}
    output = loaded.model.generate(**inputs, max_new_tokens=2, return_dict_in_generate=True)
    cache = weakref.ref(output.past_key_values)
    remaining = keep_rows(inputs, output, [1], cuts_cache=False)
    assert "past_key_values" not in remaining
    assert cache() is None


def test_a_long_prompt_in_the_batch_takes_no_room_from_another_reply(run_other, tmp_path):
    """GPT-Neo has no positions beyond its context, even if the context begins with padding."""
    prompts, lengths = ["x" * 59, "Hey!", "Hi!"], [4, 32, 4]
    replies = replies_together(run_other(batchbot_of(GPT_NEO, tmp_path, 3)), prompts, lengths)
    assert replies == replies_alone(tmp_path, prompts, lengths)


def rows_of(*lengths: int) -> list[Row]:
    """Return rows of prompts with these numbers of tokens. Each reply may have ten tokens."""
    tokenizer = byte_tokenizer(512)
    return [Row(tokenizer, [0] * length, reply_options(10), []) for length in lengths]


PHI = Phi3Config(
    hidden_size=32,
    intermediate_size=32,
    num_hidden_layers=1,
    num_attention_heads=4,
    max_position_embeddings=512,
    original_max_position_embeddings=32,
    rope_parameters={
        "rope_type": "longrope",
        "rope_theta": 10_000.0,
        "original_max_position_embeddings": 32,
        "long_factor": [9.0] * 4,
        "short_factor": [1.0] * 4,
    },
)


LLAMA_4 = Llama4TextConfig(
    hidden_size=32,
    intermediate_size=32,
    intermediate_size_mlp=32,
    num_hidden_layers=4,  # the last without RoPE, which is the one that becomes sharper
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    num_local_experts=2,
    max_position_embeddings=512,
    floor_scale=33,
)


@pytest.mark.parametrize(
    ("bot", "config"),
    [(Batchbot, PHI), (Continuousbot, PHI), (Batchbot, LLAMA_4)],
    ids=["phi-batchbot", "phi-continuousbot", "llama4-batchbot"],
)
def test_a_model_whose_attention_depends_on_its_neighbours_lengths_has_less_context(
    bot, config, run_other, tmp_path
):
    save_random_model(config, tmp_path)
    served = run_other(bot.bind(str(tmp_path)))
    long = requests.post(served.http, json={"prompt": "x" * 100, "max_new_tokens": 4})
    assert (long.status_code, "28 fit" in long.text) == (413, True)
    assert http_reply(served, "Hey!", 12) == replies_alone(tmp_path, ["Hey!"], [12])[0]


def test_batches_of_mostly_padding_are_split_and_the_shortest_prompts_run_first():
    def lengths(context: int, *prompts: int) -> list[list[int]]:
        parts = split_rows(rows_of(*prompts), context)
        return [[len(row.input_ids) for row in part] for part in parts]

    assert lengths(512, 5, 400, 30) == [[5, 400, 30]]
    assert lengths(32_000, 30_000, *[5] * 15) == [[5] * 15, [30_000]]
    assert lengths(32_000, 15_000, 12_000) == [[15_000, 12_000]]


def test_rows_that_need_too_much_memory_together_run_in_separate_parts():
    parts = split_rows(rows_of(*[8000] * 9), 32_000)
    assert [len(part) for part in parts] == [4, 4, 1]


def test_a_failing_part_of_a_batch_fails_no_other_part(bots: Bots, run_other, tmp_path):
    bot = run_other(batchbot_of(GPT_NEO, tmp_path, 2))

    def fail_for_long(model, arguments, options) -> None:
        if options["input_ids"].shape[1] > 50:
            raise MemoryError

    model = bots.local.replicas["/other"].servable_object.model
    model.register_forward_pre_hook(fail_for_long, with_kwargs=True)
    callers = [HttpCaller(bot, "x" * 59, 4), HttpCaller(bot, "Hey!", 32)]
    assert [caller.outcome() for caller in callers] == ["failed", "finished"]


def test_a_client_that_leaves_during_an_earlier_part_costs_the_next_nothing(
    bots: Bots, run_other, tmp_path
):
    bot = run_other(batchbot_of(GPT_NEO, tmp_path, 3))
    its = bots.local.replicas["/other"].servable_object
    begun, go, shapes = threading.Event(), threading.Event(), []

    def hold(model, arguments, options) -> None:
        shapes.append(tuple(options["input_ids"].shape))
        begun.set()
        go.wait(HANG_S)

    its.model.register_forward_pre_hook(hold, with_kwargs=True)
    callers = [HttpCaller(bot, *each) for each in (("Hey!", 32), ("x" * 58, 4), ("y" * 59, 4))]
    assert begun.wait(HANG_S)  # with the short prompt
    assert [len(row.input_ids) for row in its.metrics.running.members] == [5]
    (row,) = (row for row in its.metrics.waiting.members if len(row.input_ids) == 60)
    row.cancelled = True  # as Serve would do
    callers.pop().leave("close")
    go.set()
    assert {caller.outcome() for caller in callers} == {"finished"}
    assert [shape for shape in shapes if shape[1] > 50] == [(1, 59)]


@pytest.mark.parametrize("config", [RWKV, BART], ids=lambda each: each.model_type)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_model_that_reads_padding_is_detected_by_its_logits(config, dtype, tmp_path):
    save_random_model(config, tmp_path)
    with pytest.raises(ValueError, match=f"cannot batch {config.model_type}: it reads the padding"):
        check_padding(load_model(str(tmp_path), dtype).model)


def test_a_model_that_reads_padding_only_while_it_writes_is_detected_too(tmp_path):
    save_random_model(MINIMAX, tmp_path)
    with pytest.raises(ValueError, match="cannot batch minimax: it reads the padding"):
        check_padding(load_model(str(tmp_path)).model)


def test_a_model_with_nan_logits_is_refused_but_tokens_it_never_writes_are_accepted(loaded):
    def spoil(value: float, *tokens: int):
        def change(model, arguments, output) -> None:
            output.logits[..., list(tokens) or slice(None)] = value

        return loaded.model.register_forward_hook(change)

    hook = spoil(float("-inf"), 3, 5)
    check_padding(loaded.model)
    hook.remove()
    hook = spoil(float("nan"))
    with pytest.raises(ValueError, match="it reads the padding"):
        check_padding(loaded.model)
    hook.remove()


def test_rounding_errors_are_not_mistaken_for_reading_padding():
    check_padding(load_model("tiny-dialog", "bfloat16").model)


def test_a_bot_with_a_model_that_reads_padding_does_not_start(run_other, tmp_path):
    save_random_model(RWKV, tmp_path)
    with pytest.raises(ValueError, match="it reads the padding"):
        run_other(Batchbot.bind(str(tmp_path)))


@pytest.mark.exhaustive
def test_serve_says_why_a_bot_does_not_start(port, tmp_path):
    save_random_model(RWKV, tmp_path)
    try:
        with pytest.raises(RuntimeError):
            serve.run(Batchbot.bind(str(tmp_path)), name="other", route_prefix="/other")
        (failed,) = serve.status().applications["other"].deployments.values()
        assert "it reads the padding" in failed.message
    finally:
        serve.delete("other")


def test_unicode_arrives_whole_in_every_row(bots: Bots):
    bot = bots.emoji_batchbot
    bot.gate.open()
    batches_of(bot, 2, wait_s=60)

    def chunks_of(prompt: str) -> list[str]:
        with requests.post(
            bot.http, params={"prompt": prompt}, headers=WITH_KEY, stream=True
        ) as response:
            return [chunk.decode() for chunk in response.iter_content(chunk_size=None)]

    with ThreadPoolExecutor(2) as callers:
        # If a prompt is shorter by two characters, two dots come before its reply.
        rows = callers.map(chunks_of, [EMOJI_PROMPT, EMOJI_PROMPT[2:]])
        assert ["".join(row) for row in rows] == [EMOJI_REPLY, ".." + EMOJI_REPLY]
    batches_of(bot)
