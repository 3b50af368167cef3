"""A bot's metrics on Ray's Prometheus endpoint. Ray puts `ray_` before their names.

Serve adds the tags `deployment` (the bot), `application` and `replica` to each metric.
"""

import asyncio
from collections.abc import Iterator
from itertools import islice, pairwise

from ray.serve.metrics import Counter, Gauge, Histogram

from streaming_bots.generation.reply import ReplyState

GAPS_PER_TURN = 500  # take 2 ms; all of a reply of 32,768 tokens would take 0.2 s
SECONDS = [0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30, 60]


class SetGauge(Gauge):
    """A gauge that shows how many members it has, or the value that it is set to."""

    def __init__(self, name: str, description: str) -> None:
        super().__init__(name, description=description)
        self.members: set[object] = set()
        self.set(0)

    def set(self, value: float, tags: dict[str, str] | None = None) -> None:
        self.value = value
        super().set(value, tags)

    def add(self, *members: object) -> None:
        self.members.update(members)
        self.set(len(self.members))

    def discard(self, *members: object) -> None:
        self.members.difference_update(members)
        self.set(len(self.members))


class BotMetrics:
    """The metrics of one replica. Must be created in it."""

    def __init__(self) -> None:
        self.requests = Counter(
            "bot_requests",
            description="Requests by outcome: finished, failed, cancelled or refused. Of a "
            "Chatbot: prompts, and connections that were refused.",
            tag_keys=("outcome",),
        )
        self.tokens = Counter("bot_generated_tokens", description="Tokens generated.")
        self.prompt_tokens = Counter(
            "bot_prompt_tokens", description="Tokens of prompts whose replies have begun."
        )
        self.cached_tokens = Counter(
            "bot_cached_prompt_tokens", description="Those of them that were known already."
        )
        self.first_token = Histogram(
            "bot_time_to_first_token_seconds",
            description="Seconds from a prompt to the first token of its reply.",
            boundaries=SECONDS,
        )
        self.inter_token = Histogram(
            "bot_inter_token_latency_seconds",
            description="Seconds from one token of a reply to the next.",
            boundaries=SECONDS,
        )
        self.waiting = SetGauge(
            "bot_requests_waiting", description="Prompts that the model has not begun with."
        )
        self.running = SetGauge(
            "bot_requests_running", description="Replies that the model is writing."
        )

    def repeat_gauges(self) -> None:
        """Set the gauges again, since Ray drops one that is not set for some 20 s."""
        for gauge in (self.waiting, self.running):
            gauge.set(gauge.value)

    def count(self, outcome: str) -> None:
        self.requests.inc(tags={"outcome": outcome})

    def record_reply(self, reply: ReplyState) -> None:
        """Count a reply's tokens, and how long each took."""
        if reply.token_times:
            self.tokens.inc(reply.reply_tokens)
            self.prompt_tokens.inc(len(reply.input_ids))
            if reply.cached_tokens:
                self.cached_tokens.inc(reply.cached_tokens)
            self.first_token.observe(reply.token_times[0] - reply.options.asked)
            self._observe(pairwise(reply.token_times))

    def _observe(self, gaps: Iterator[tuple[float, float]]) -> None:
        """Observe some gaps now, and the others on later turns of the event loop."""
        some = list(islice(gaps, GAPS_PER_TURN))
        for before, after in some:
            self.inter_token.observe(after - before)
        if len(some) == GAPS_PER_TURN:
            asyncio.get_running_loop().call_soon(self._observe, gaps)
