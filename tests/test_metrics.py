"""serving/metrics.py on Ray's Prometheus endpoint: what is counted is what was done."""

import re
import time
from collections import Counter

import pytest
import ray
import requests
from callers import ChatCaller, HttpCaller
from running_bots import HANG_S, Bot, Bots
from websockets.exceptions import ConnectionClosedError
from websockets.sync.client import connect

REPORTED_S = 60  # Ray reports counters every few seconds
CALLERS = {
    "textbot": HttpCaller,
    "chatbot": ChatCaller,
    "batchbot": HttpCaller,
    "continuousbot": HttpCaller,
}
STORY = "Tell me a story about dogs."


def scrape(application: str) -> Counter[str]:
    """The bot's metrics, summed over its replicas, those with an outcome under its name."""
    port = ray.nodes()[0]["MetricsExportPort"]
    page = requests.get(f"http://127.0.0.1:{port}/metrics", timeout=HANG_S).text
    found: Counter[str] = Counter()
    for name, labels, value in re.findall(r"^ray_(bot_\w+)\{(.*)\} (\S+)$", page, re.MULTILINE):
        tags = dict(re.findall(r'(\w+)="([^"]*)"', labels))
        if tags["application"] == application and "le" not in tags:
            found[tags.get("outcome", name)] += float(value)
    return found


def increase(application: str, before: Counter[str], expected: dict[str, int]) -> dict[str, float]:
    """What has been added to the metrics, once it is as expected or it will never be."""
    deadline = time.monotonic() + REPORTED_S
    while True:
        now = scrape(application)
        added = {name: now[name] - before[name] for name in expected}
        if added == expected or time.monotonic() > deadline:
            return added
        time.sleep(0.5)


@pytest.mark.parametrize("name", ["textbot", "chatbot", "batchbot"])
def test_what_is_counted_is_what_was_done(bots: Bots, name):
    bot: Bot = getattr(bots, name)
    bot.gate.open()
    before, call = scrape(name), CALLERS[name]
    for _ in range(2):
        assert call(bot, STORY, 5).outcome() == "finished"
    bot.gate.fail_at(4)
    assert call(bot, STORY, 5).outcome() == "failed"
    bot.gate.hold_after(2)
    leaving = call(bot, STORY, 5)
    leaving.first()
    bot.gate.wait("step", 3)
    leaving.leave("close")
    bot.gate.wait("cancelled", 1)
    bot.gate.open()
    refuse(bot, name)
    expected = {
        "finished": 2,
        "failed": 1,
        "cancelled": 1,
        "refused": 1,
        "bot_generated_tokens_total": 5 + 5 + 3 + 2,
        "bot_time_to_first_token_s_count": 4,
        "bot_inter_token_latency_s_count": 4 + 4 + 2 + 1,
    }
    assert increase(name, before, expected) == expected


def refuse(bot: Bot, name: str) -> None:
    if name == "chatbot":
        with connect(bot.ws) as websocket, pytest.raises(ConnectionClosedError):
            websocket.send(b"Hello!")
            websocket.recv(timeout=HANG_S)
    else:
        assert requests.post(bot.http, params={"prompt": ""}).status_code == 422


@pytest.mark.parametrize(
    ("name", "gauges"),
    [
        ("textbot", {"bot_prompts_waiting": 2}),
        ("chatbot", {"bot_prompts_waiting": 2}),
        ("batchbot", {"bot_prompts_waiting": 2, "bot_batch_rows": 1}),
        ("continuousbot", {"bot_prompts_waiting": 2, "bot_batch_rows": 1}),
    ],
)
def test_who_waits_and_who_is_in_the_batch_is_shown(bots: Bots, name, gauges):
    bot: Bot = getattr(bots, name)
    bot.gate.hold_after(1)
    callers = [CALLERS[name](bot, STORY, 5)]
    callers[0].first()
    for number in (2, 3):
        callers.append(CALLERS[name](bot, STORY, 5))
        bot.gate.wait("asked" if name == "batchbot" else "submitted", number)
    assert increase(name, Counter(), gauges) == gauges
    bot.gate.release()
    assert {caller.outcome() for caller in callers} == {"finished"}
    nothing = dict.fromkeys(gauges, 0)
    assert increase(name, Counter(), nothing) == nothing
