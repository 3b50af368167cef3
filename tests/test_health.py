"""A model that hangs or dies fails its replies, and the bot's health says so, to be replaced."""

import pytest
from bot_fixtures import HANG_S, Bot, Bots, wait_until
from callers import ChatCaller, HttpCaller
from gates import Gate
from stepped_bots import stepped

from serving.continuous import BatchFailed
from serving.locating import EMBEDDED
from serving.model_thread import ModelStalled

LONG = "Tell me a story about dogs."


@pytest.fixture(params=["textbot", "chatbot", "batchbot", "continuousbot"])
def breaking(request: pytest.FixtureRequest, bots: Bots) -> Bot:
    gate = Gate()
    app = stepped(request.param, gate, {}, model=EMBEDDED)
    return bots.run(app, f"breaking-{request.param}", gate)


@pytest.mark.parametrize("fault", ["hang", "death"])
def test_a_model_that_hangs_or_dies_fails_its_replies_and_the_replica_is_ill(breaking, fault):
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
