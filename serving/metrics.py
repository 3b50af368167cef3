"""What a bot counts, on Ray's Prometheus endpoint; Ray puts `ray_` before the names.

Serve adds the tags `deployment` (the bot), `application` and `replica` to each.
"""

from collections.abc import Sequence
from itertools import pairwise

from ray import serve
from ray.exceptions import TaskCancelledError
from ray.serve.metrics import Counter, Gauge, Histogram
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

CLIENT_LEFT = (ClientDisconnect, TaskCancelledError)  # raised by `receive` then
SECONDS = [0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30, 60]


class BotMetrics:
    """The metrics of one replica. Must be created in it."""

    def __init__(self) -> None:
        self.requests = Counter(
            "bot_requests",
            description="Requests by outcome: finished, failed, cancelled or refused. Of a "
            "Chatbot: prompts, and sockets that were refused.",
            tag_keys=("outcome",),
        )
        self.tokens = Counter("bot_generated_tokens", description="Tokens generated.")
        self.first_token = Histogram(
            "bot_time_to_first_token_s",
            description="Seconds from a prompt to the first token of its reply.",
            boundaries=SECONDS,
        )
        self.inter_token = Histogram(
            "bot_inter_token_latency_s",
            description="Seconds from one token of a reply to the next.",
            boundaries=SECONDS,
        )
        self.waiting = Gauge(
            "bot_prompts_waiting", description="Prompts that the model has not begun with."
        )
        self.batch_rows = Gauge(
            "bot_batch_rows", description="Rows of the running batch that are not finished."
        )

    def count(self, outcome: str) -> None:
        self.requests.inc(tags={"outcome": outcome})

    def record_reply(self, asked: float, token_times: Sequence[float]) -> None:
        """Count a reply's tokens and how long each took; times are in seconds."""
        if token_times:
            self.tokens.inc(len(token_times))
            self.first_token.observe(token_times[0] - asked)
            for before, after in pairwise(token_times):
                self.inter_token.observe(after - before)


class Population:
    """A gauge of how many are somewhere."""

    def __init__(self, gauge: Gauge) -> None:
        self.gauge = gauge
        self.members: set[object] = set()

    def add(self, *members: object) -> None:
        self.members.update(members)
        self.gauge.set(len(self.members))

    def discard(self, *members: object) -> None:
        self.members.difference_update(members)
        self.gauge.set(len(self.members))


class CountOutcomes:
    """ASGI middleware that counts the outcome of each POST, and WebSockets that are refused.

    What comes over a WebSocket, the Chatbot counts itself, prompt by prompt.
    """

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        status, complete = 0, False

        async def send_watched(message: Message) -> None:
            nonlocal status, complete
            if message["type"] in ("http.response.start", "websocket.http.response.start"):
                status = message["status"]
            elif message["type"] == "http.response.body":
                complete = not message.get("more_body", False)
            await send(message)

        outcome = "cancelled"  # unless it goes well, or wrong
        try:
            await self.app(scope, receive, send_watched)
            if 300 <= status < 500:
                outcome = "refused"
            elif complete:
                outcome = "finished"
        except CLIENT_LEFT:
            raise
        except Exception:
            outcome = "failed"
            raise
        finally:
            if scope.get("method") == "POST" or (scope["type"] == "websocket" and status >= 400):
                serve.get_replica_context().servable_object.metrics.count(outcome)
