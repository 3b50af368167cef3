"""A gate before each step of a model, so that tests decide what happens and when.

This module imports no bot, since Ray's process for gates would import all that bots need.
"""

import math
import threading
from collections import Counter, defaultdict
from typing import Any

import ray

HANG_S = 120  # only bounds a hang


class Gate:
    """Counts the events of one bot, and holds its model before a step.

    The events:
    - "started", of the bot's replica
    - "submitted" and "step", of the model, and "tokens", which it read in its steps
    - "left", when nobody reads a reply any more
    - "asked", of the Batchbot
    - the outcomes "finished", "failed", "cancelled" and "refused"
    """

    def __init__(self) -> None:
        self.changed = threading.Condition()
        self.era = 0
        self.events: Counter[str] = Counter()
        self.allowed: float = math.inf
        self.failing_step: int | None = None
        self.error: BaseException | None = None

    # Called by tests

    def open(self) -> None:
        """Let the model run freely, and forget what happened."""
        self._reset(math.inf)

    def hold_after(self, steps: int) -> None:
        """Let the model take some steps and hold it before the next; forget what happened."""
        self._reset(steps)

    def fail_at(self, step: int, error: BaseException | None = None) -> None:
        """Let the model run, and fail it at a step, counted from 1; forget what happened."""
        self._reset(math.inf, step, error or RuntimeError("this step was told to fail"))

    def release(self, steps: float = math.inf) -> None:
        with self.changed:
            self.allowed += steps
            self.changed.notify_all()

    def happens(self, event: str, count: int, within_s: float) -> bool:
        with self.changed:
            return self.changed.wait_for(lambda: self.events[event] >= count, within_s)

    def wait(self, event: str, count: int) -> None:
        """Wait until an event has happened `count` times."""
        if not self.happens(event, count, HANG_S):
            raise TimeoutError(f"{self.count(event)} of {count} {event}; {dict(self.events)}")

    def count(self, event: str) -> int:
        return self.events[event]

    # Called by the bot

    def record(self, event: str) -> None:
        with self.changed:
            self.events[event] += 1
            self.changed.notify_all()

    def step(self, tokens: int) -> BaseException | None:
        """Wait until the model may take a step; return the error with which it must fail."""
        with self.changed:
            self.events["step"] += 1
            self.events["tokens"] += tokens
            step, era = self.events["step"], self.era
            self.changed.notify_all()
            self.changed.wait_for(lambda: self.allowed >= step or self.era != era)
            return self.error if step == self.failing_step and self.era == era else None

    def _reset(
        self, steps: float, failing_step: int | None = None, error: BaseException | None = None
    ) -> None:
        """Begin a new era, and release the steps that an earlier era holds."""
        with self.changed:
            self.era += 1
            self.events.clear()
            self.allowed, self.failing_step, self.error = steps, failing_step, error
            self.changed.notify_all()


class Gates:
    """The gates of all replicas, in one process of Ray."""

    def __init__(self) -> None:
        self.gates: defaultdict[int, Gate] = defaultdict(Gate)

    def call(self, number: int, method: str, *arguments: Any) -> Any:
        return getattr(self.gates[number], method)(*arguments)


class RemoteGate:
    """A Gate that both tests and a replica of Serve can call."""

    def __init__(self, gates: Any, number: int) -> None:
        self.gates, self.number = gates, number

    def __getattr__(self, method: str) -> Any:
        if method in ("gates", "number") or method.startswith("__"):  # while it is unpickled
            raise AttributeError(method)
        return lambda *arguments: ray.get(self.gates.call.remote(self.number, method, *arguments))
