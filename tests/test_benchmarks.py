"""benchmarks/: the load is as described, and replies are as long as requested."""

import argparse
import asyncio
import json
import subprocess
import sys
from collections.abc import Callable

import bench
import in_process
import psutil
import pytest
from bot_fixtures import HANG_S, REPOSITORY, Bot, Bots, wait_until
from load import Ask, Reply, closed_loop, mean_length, open_loop, openai, summarize
from report import write_report
from servers import SETTINGS, our_bot, stopped
from transformers import GPT2Config, LlamaConfig

from streaming_bots.models.loaded_model import load_model
from streaming_bots.models.prompt import encode
from streaming_bots.models.source import BUNDLED, BUNDLED_FOLDER


@pytest.mark.parametrize("source", [BUNDLED, "gpt2-shape", "llama-1b-shape"])
def test_an_endless_model_writes_as_many_tokens_as_it_may(tmp_path, source, monkeypatch):
    small = GPT2Config(n_layer=1, n_embd=48, vocab_size=3000)
    monkeypatch.setitem(in_process.SHAPES, "gpt2-shape", small)
    llama = in_process.SHAPES["llama-1b-shape"].to_dict()
    small = {"hidden_size": 128, "intermediate_size": 128, "num_hidden_layers": 1, "head_dim": 4}
    small["vocab_size"] = 3000
    monkeypatch.setitem(in_process.SHAPES, "llama-1b-shape", LlamaConfig(**llama | small))
    in_process.save_endless(source, tmp_path)
    loaded = load_model(str(tmp_path))
    for way in (in_process.Generate(loaded), in_process.Continuous(loaded, 2)):
        way.run(3, 150)  # asserts that this many tokens came, or waits for them
    text = [{"role": "user", "content": "Thank you, good night!"}]
    assert encode(text, loaded.tokenizer, 100)


def ask_of(bot: Bot) -> Ask:
    return openai(f"{bot.http}v1")


def test_the_closed_loop_asks_as_often_as_it_is_told_to(bots: Bots):
    bots.continuousbot.gate.open()
    done: list[Reply] = []
    replies = asyncio.run(closed_loop(ask_of(bots.continuousbot), 3, 2, 4, done.append))
    assert len(replies) == len(done) == 6
    summary = summarize(replies)
    assert (summary["requests"], summary["failures"]) == (6, 0)
    assert 0 < summary["ttft_ms_p50"] <= summary["ttft_ms_p95"] <= summary["ttft_ms_max"]


def test_the_open_loop_sends_requests_at_its_rate_with_mixed_lengths(bots: Bots):
    bots.continuousbot.gate.open()
    ask = ask_of(bots.continuousbot)
    replies = asyncio.run(open_loop(ask, 20, 2, (2, 16), lambda reply: None))
    assert 20 <= len(replies) <= 60
    assert {reply.error for reply in replies} == {None}
    lengths = [reply.tokens for reply in replies]
    assert min(lengths) >= 2 and max(lengths) <= 16 and len(set(lengths)) > 4
    assert mean_length((8, 8)) == 8


def test_a_failure_is_counted_and_not_timed(bots: Bots):
    bots.textbot.gate.fail_at(3)
    replies = asyncio.run(closed_loop(ask_of(bots.textbot), 1, 1, 8, lambda reply: None))
    assert summarize(replies) == {"requests": 1, "failures": 1}
    assert replies[0].error is not None


def test_the_load_command_prints_a_summary(bots: Bots):
    bots.batchbot.gate.open()
    url = f"{bots.batchbot.http}v1"
    command = [sys.executable, "benchmarks/bench.py", "load", url, "--tokens", "4"]
    ran = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=120)
    assert ran.returncode == 0, ran.stderr
    printed = dict(line.split() for line in ran.stdout.splitlines())
    assert (printed["requests"], printed["failures"]) == ("16.0", "0.0")
    assert "16 replies" in ran.stderr  # progress


def test_a_bot_is_measured_with_the_requested_options(tmp_path):
    options = argparse.Namespace(dtype="bfloat16", cpus=1, gpus=1.0, max_batch_size=64)
    common = ["dtype=bfloat16", "num_cpus=1", "num_gpus=1.0"]
    assert bench.bot_arguments("textbot", options) == common
    batch = bench.bot_arguments("continuousbot+haproxy", options)
    assert batch == [*common, "max_batch_size=64"]
    server = our_bot("continuousbot+haproxy", tmp_path, batch)
    assert server.command == ["serve", "run", "continuousbot:build", f"model={tmp_path}", *batch]
    assert server.environment == SETTINGS["haproxy"]


def test_an_in_process_benchmark_waits_until_it_is_asked():
    options = argparse.Namespace(dtype="float32", cpus=1, gpus=0, max_batch_size=2, tokens=4)
    with bench.InProcess("generate", BUNDLED_FOLDER, options) as limit:
        assert limit.measure(1) > 0
        assert limit.measure(3) > 0
    assert limit.process.returncode is not None


def test_a_stopped_server_and_its_children_do_not_run():
    command = "sleep 60 & echo; wait"
    server = subprocess.Popen(["bash", "-c", command], stdout=subprocess.PIPE)
    assert server.stdout is not None
    server.stdout.readline()
    family = psutil.Process(server.pid)

    def wait_for(holds: Callable[[str], bool]) -> None:
        wait_until(
            lambda: all(holds(each.status()) for each in [family, *family.children()]),
            HANG_S,
            "the server and its children are in another state",
        )

    with stopped(family):
        wait_for(lambda status: status == psutil.STATUS_STOPPED)
    wait_for(lambda status: status != psutil.STATUS_STOPPED)
    for process in [*family.children(), family]:
        process.kill()
    server.communicate()


def test_the_report_has_a_table_a_plot_and_the_numbers(tmp_path):
    times = {f"{kind}_ms_{at}": 5.0 for kind in ("ttft", "itl") for at in ("p50", "p95", "p99")}
    served = {"tokens_per_s": 80.0, "limit": 100.0, "failures": 1, "requests": 4, **times}
    slower = {**served, "tokens_per_s": 30.0, "limit": 50.0}
    result = {
        "date": "2026-01-02",
        "machine": "m",
        "versions": {"ray": "1"},
        "options": {
            "model": "m",
            "dtype": "d",
            "tokens": 8,
            "cpus": 2,
            "gpus": 0.0,
            "rounds": 2,
            "streams": [1, 4],
        },
        "rounds": {"textbot": [{1: served, 4: served}, {1: slower, 4: slower}]},
        "replica_rss_anon_mb": {"textbot": 700.4, "peer": None},
        "float32_weights_mb": 475.0,
        "arrivals": {"requests_per_s": 2.0, "of": "batchbot", "textbot": served},
    }
    write_report(result, tmp_path)
    table = (tmp_path / "results.md").read_text()
    assert "| `generate` in process | 75 | 75 |" in table
    # The median of the ratios, not the ratio of the medians, which would be 0.73.
    assert "| textbot | 55 (0.70), 5 ms, 2 failed | 55 (0.70), 5 ms, 2 failed |" in table
    assert "textbot 700; the weights are 475" in table
    assert "| textbot | 4 | 1 | 5 ms |" in table
    assert json.loads((tmp_path / "results.json").read_text())["date"] == "2026-01-02"
    assert (tmp_path / "results.png").read_bytes()[1:4] == b"PNG"
