"""metrics.py on Ray's Prometheus endpoint: the metrics count what the bots did."""

import asyncio
import re
import time
from collections import Counter
from types import SimpleNamespace
from unittest.mock import Mock, call

import pytest
import ray
import requests
from bot_fixtures import HANG_S, Bot
from callers import ChatCaller, HttpCaller
from ray.exceptions import ActorDiedError, TaskCancelledError
from ray.serve.metrics import Gauge
from starlette.requests import ClientDisconnect
from starlette.types import Receive, Scope, Send
from websockets.exceptions import ConnectionClosedError, InvalidStatus
from websockets.sync.client import connect

from streaming_bots.http import middleware
from streaming_bots.http.middleware import OutcomeMiddleware
from streaming_bots.operations.metrics import GAPS_PER_TURN, BotMetrics, SetGauge

REPORTED_S = 60  # Ray reports counters every few seconds
CALLERS = {
    "textbot": HttpCaller,
    "chatbot": ChatCaller,
    "batched_chatbot": ChatCaller,
    "batchbot": HttpCaller,
    "continuousbot": HttpCaller,
}
STORY = "Tell me a story about dogs."


def scrape(application: str) -> Counter[str]:
    """Return a bot's metrics, summed over its replicas. An outcome's name replaces the metric's."""
    port = ray.nodes()[0]["MetricsExportPort"]
    page = requests.get(f"http://127.0.0.1:{port}/metrics", timeout=HANG_S).text
    found: Counter[str] = Counter()
    for name, labels, value in re.findall(r"^ray_(bot_\w+)\{(.*)\} (\S+)$", page, re.MULTILINE):
        tags = dict(re.findall(r'(\w+)="([^"]*)"', labels))
        if tags.get("application") == application and "le" not in tags:
            found[tags.get("outcome", name)] += float(value)
    return found


def increases(
    before: dict[str, Counter[str]], expected: dict[str, dict[str, int]]
) -> dict[str, dict[str, float]]:
    """Return the increase of each bot's metrics, once it is as expected or time is up."""
    deadline = time.monotonic() + REPORTED_S
    while True:
        added = {}
        for bot, numbers in expected.items():
            now = scrape(bot)
            added[bot] = {name: now[name] - before[bot][name] for name in numbers}
        if added == expected or time.monotonic() > deadline:
            return added
        time.sleep(0.5)


def reported(bots: dict[str, Bot]) -> dict[str, Counter[str]]:
    """Return the bots' metrics once Ray has reported all that earlier tests did.

    A refused request marks the end of that. When Ray has reported it, a second one follows, since
    the first report may have been under way before the first mark.
    """
    now = {name: scrape(name) for name in bots}
    for _ in range(2):
        before, now, deadline = now, {}, time.monotonic() + REPORTED_S
        for bot in bots.values():
            with pytest.raises(InvalidStatus, match="403"):
                connect(f"{bot.ws}nowhere")
        while len(now) < len(bots):
            assert time.monotonic() < deadline, "Ray reports no refused request"
            time.sleep(0.5)
            for name in bots.keys() - now.keys():
                found = scrape(name)
                if found["refused"] > before[name]["refused"]:
                    now[name] = found
    return now


@pytest.mark.serves("textbot", "chatbot", "batchbot")
def test_the_metrics_count_what_the_bots_did(served_bots, loaded):
    bots = {name: served_bots[name] for name in ("textbot", "chatbot", "batchbot")}
    before = reported(bots)
    for name, bot in bots.items():
        bot.gate.open()
        ask = CALLERS[name]
        for _ in range(2):
            assert ask(bot, STORY, 5).outcome() == "finished"
        bot.gate.fail_at(4)
        assert ask(bot, STORY, 5).outcome() == "failed"
        bot.gate.hold_after(2)
        leaving = ask(bot, STORY, 5)
        leaving.first()
        bot.gate.wait("step", 3)
        leaving.leave("close")
        bot.gate.wait("cancelled", 1)
        bot.gate.open()
        refuse(bot, name)
    # The bundled model's tokens of the prompt, and one that ends it.
    prompt = len(loaded.tokenizer(STORY)["input_ids"]) + 1
    expected = {
        "finished": 2,
        "bot_prompt_tokens_total": 4 * prompt,
        "failed": 1,
        "cancelled": 1,
        "refused": 2,
        "bot_generated_tokens_total": 5 + 5 + 3 + 2,
        "bot_time_to_first_token_seconds_count": 4,
        "bot_inter_token_latency_seconds_count": 4 + 4 + 2 + 1,
    }
    assert increases(before, {name: expected for name in bots}) == {name: expected for name in bots}


def refuse(bot: Bot, name: str) -> None:
    if name == "chatbot":
        with connect(bot.ws) as websocket, pytest.raises(ConnectionClosedError):
            websocket.send(b"Hello!")
            websocket.recv(timeout=HANG_S)
    else:
        assert requests.post(bot.http, params={"prompt": ""}).status_code == 422
    with pytest.raises(InvalidStatus, match="403"):
        connect(f"{bot.ws}nowhere")


GAUGES = {name: {"bot_requests_waiting": 2, "bot_requests_running": 1} for name in CALLERS}


@pytest.mark.serves(*GAUGES)
def test_the_gauges_show_how_many_requests_wait_and_run(served_bots):
    callers = []
    for name in GAUGES:
        bot, ask = served_bots[name], CALLERS[name]
        bot.gate.hold_after(1)
        callers.append(ask(bot, STORY, 5))
        callers[-1].first()
        for number in (2, 3):
            callers.append(ask(bot, STORY, 5))
            bot.gate.wait("asked" if name == "batchbot" else "submitted", number)
    none_before = {name: Counter() for name in GAUGES}
    assert increases(none_before, GAUGES) == GAUGES
    for name in GAUGES:
        served_bots[name].gate.release()
    assert {caller.outcome() for caller in callers} == {"finished"}
    nothing = {name: dict.fromkeys(gauges, 0) for name, gauges in GAUGES.items()}
    assert increases(none_before, nothing) == nothing


def test_a_gauge_goes_up_and_down_with_its_members(monkeypatch):
    gauge = SetGauge("members", "How many there are.")
    monkeypatch.setattr(gauge, "set", told := Mock())
    gauge.add("one", "two")
    gauge.add("two")
    gauge.discard("one", "three")
    gauge.discard("two")
    assert told.call_args_list == [call(2), call(2), call(1), call(0)]


def test_a_health_check_sets_the_gauges_again_since_ray_forgets_them(bots, monkeypatch):
    bots.textbot.gate.open()
    told: list[tuple[str, float]] = []
    monkeypatch.setattr(Gauge, "set", lambda gauge, value, tags: told.append((gauge._name, value)))
    bots.textbot.call("check_health")
    assert {*told} == {("bot_requests_waiting", 0), ("bot_requests_running", 0)}


@pytest.mark.parametrize("left", [ClientDisconnect, TaskCancelledError, ActorDiedError])
def test_a_client_that_leaves_while_its_request_is_read_counts_as_cancelled(left, monkeypatch):
    outcomes: list[str] = []
    bot = SimpleNamespace(metrics=SimpleNamespace(count=outcomes.append))
    monkeypatch.setattr(middleware, "current_bot", lambda: bot)

    async def leave() -> None:
        raise left

    async def read(scope: Scope, receive: Receive, send: Send) -> None:
        await receive()

    post = {"type": "http", "method": "POST"}
    # It does not raise what would be a traceback in Serve's log.
    asyncio.run(OutcomeMiddleware(read)(post, leave, None))
    assert outcomes == ["cancelled"]

    async def fail(*_: object) -> None:
        raise ActorDiedError  # of another deployment that the bot asks

    with pytest.raises(ActorDiedError):
        asyncio.run(OutcomeMiddleware(fail)(post, leave, None))
    assert outcomes == ["cancelled", "failed"]


def test_a_long_reply_is_observed_on_several_turns_of_the_event_loop():
    metrics = BotMetrics.__new__(BotMetrics)  # without Ray's metrics
    metrics.tokens = metrics.prompt_tokens = metrics.first_token = metrics.inter_token = Mock()
    reply = SimpleNamespace(
        token_times=[float(2**power) for power in range(1000)],
        reply_tokens=1000,
        input_ids=[1],
        cached_tokens=0,
        options=SimpleNamespace(asked=0.0),
    )

    async def test() -> None:
        metrics.record_reply(reply)
        seen = metrics.inter_token.observe.mock_calls
        assert len(seen) < 1000
        while len(seen) < 1000:
            before = len(seen)
            await asyncio.sleep(0)
            assert 0 < len(seen) - before <= GAPS_PER_TURN
        assert seen == [call(1.0), *(call(time) for time in reply.token_times[:-1])]

    asyncio.run(test())
