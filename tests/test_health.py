"""If a model hangs or dies, its replies fail, and the health check makes Serve replace it."""

import asyncio
import inspect
import threading

import pytest
from bot_fixtures import HANG_S, Bot, Bots, wait_until
from callers import ChatCaller, HttpCaller
from gates import Gate
from stepped_bots import stepped

from batchbot import Batchbot
from chatbot import Chatbot
from continuousbot import Continuousbot
from streaming_bots.errors import ModelStalled
from streaming_bots.generation.continuous_batch import BatchFailed
from streaming_bots.models.source import BUNDLED
from streaming_bots.operations import drain as drain_module
from textbot import Textbot

LONG = "Tell me a story about dogs."


@pytest.fixture(params=["textbot", "chatbot", "batchbot", "continuousbot"])
def breaking(request: pytest.FixtureRequest, bots: Bots) -> Bot:
    gate = Gate()
    app = stepped(request.param, gate, {}, model=BUNDLED)
    return bots.run(app, f"breaking-{request.param}", gate)


@pytest.mark.parametrize("fault", ["hang", "death"])
def test_a_model_that_hangs_or_dies_fails_its_replies_and_makes_the_replica_unhealthy(
    breaking, fault
):
    breaking.call("check_health")
    if fault == "hang":
        breaking.call("stall_after", 0.3)
        breaking.gate.hold_after(2)
    else:
        breaking.gate.fail_at(3, SystemExit())
    call = ChatCaller if "chatbot" in breaking.address else HttpCaller
    callers = [call(breaking, LONG), call(breaking, LONG)]
    assert {caller.outcome() for caller in callers} == {"failed"}
    breaking.gate.wait("failed", 2)
    assert breaking.gate.count("failed") == 2

    def is_ill() -> bool:
        try:
            breaking.call("check_health")
        except (ModelStalled, BatchFailed):
            return True
        return False

    wait_until(is_ill, HANG_S, "the replica is well")  # the thread ends a little later
    breaking.gate.open()


@pytest.mark.parametrize("name", ["textbot", "chatbot", "batchbot", "continuousbot"])
def test_a_prompt_that_takes_long_to_read_is_no_stall(bots: Bots, name):
    gate = Gate()
    bot = bots.run(stepped(name, gate, {}, model=BUNDLED, stall_timeout_s=2), "slow", gate)
    bot.call("slow_down", 0.6)  # 2.4 s for its four layers
    caller = (ChatCaller if name == "chatbot" else HttpCaller)(bot, LONG, 1)
    assert caller.outcome() == "finished"
    bot.call("check_health")


def test_a_replica_stops_draining_when_serve_asks_for_its_health_again(monkeypatch):
    monkeypatch.setattr(drain_module, "is_stopping", lambda: True)
    monkeypatch.setattr(drain_module, "SILENCE_S", 0.1)
    monkeypatch.setattr(drain_module, "LOOK_EVERY_S", 0.01)

    async def drain_and_stay() -> None:
        drain = drain_module.Drain()
        await asyncio.wait_for(drain.begun.wait(), HANG_S)
        drain.health_was_asked()
        assert not drain.begun.is_set()

    asyncio.run(drain_and_stay())


def test_a_health_check_during_the_look_at_serves_status_prevents_draining(monkeypatch):
    looked = threading.Event()

    async def stay() -> None:
        drain = drain_module.Drain()

        def be_asked_first() -> bool:
            if not looked.is_set():
                drain.health_was_asked()
                looked.set()
                monkeypatch.setattr(drain_module, "SILENCE_S", HANG_S)
            return True

        monkeypatch.setattr(drain_module, "is_stopping", be_asked_first)
        await asyncio.to_thread(looked.wait, HANG_S)
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(drain.begun.wait(), 0.5)

    monkeypatch.setattr(drain_module, "SILENCE_S", 0.1)
    monkeypatch.setattr(drain_module, "LOOK_EVERY_S", 0.01)
    asyncio.run(stay())


def test_serve_asks_for_health_on_the_event_loop():
    """Serve calls a method that is not a coroutine in another thread, where state would change."""
    for bot in (Textbot, Chatbot, Batchbot, Continuousbot):
        assert inspect.iscoroutinefunction(bot.func_or_class.check_health)
