"""Stepped bots with their own deployment, for tests that replace or end replicas."""

import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

from bot_fixtures import HANG_S, MAX_NEW_TOKENS, Bot, call_replica
from gates import Gate
from ray import serve
from stepped_bots import stepped

from streaming_bots.models.source import BUNDLED


class Deployed:
    """A bot with its own deployment."""

    def __init__(self, name: str, port: int, gate: Gate, **options: Any) -> None:
        self.name, self.options, self.application = name, options, f"own-{name}"
        self.gate = gate
        address = f"127.0.0.1:{port}/{self.application}/"
        self.bot = Bot(address, self.gate, partial(call_replica, self.application))
        self.deploy()

    def deploy(self, **options: Any) -> None:
        """Replace the bot's replicas with new ones."""
        arguments = {"model": BUNDLED, "max_new_tokens": MAX_NEW_TOKENS}
        app = stepped(self.name, self.gate, self.options | options, **arguments)
        serve.run(app, name=self.application, route_prefix=f"/{self.application}")

    def replicas(self) -> Counter[str]:
        """Count the replicas in each state."""
        (deployment,) = serve.status().applications[self.application].deployments.values()
        return Counter(deployment.replica_states)

    def wait_for(self, most: int = 4, **states: int) -> None:
        """Wait until this many replicas are in these states. At most `most` may start or run."""
        deadline = time.monotonic() + HANG_S
        while any((now := self.replicas())[state] != number for state, number in states.items()):
            assert now["STARTING"] + now["RUNNING"] <= most, now
            assert time.monotonic() < deadline, now
            time.sleep(0.1)


@contextmanager
def deployed(name: str, port: int, gate: Gate, **options: Any) -> Iterator[Deployed]:
    """Deploy a bot; delete its application at the end."""
    own = Deployed(name, port, gate, **options)
    try:
        yield own
    finally:
        serve.delete(own.application)
