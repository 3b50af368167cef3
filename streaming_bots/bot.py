"""The base class of all bots, and the reply that a bot returns."""

import asyncio
import logging
import time
from abc import ABC, abstractmethod
from collections.abc import AsyncGenerator
from dataclasses import dataclass

from ray import serve

from streaming_bots.errors import PromptTooLong
from streaming_bots.generation.engine import Engine
from streaming_bots.generation.reply import ReplyState
from streaming_bots.generation.sampling import ReplyOptions
from streaming_bots.models.loaded_model import load_model
from streaming_bots.models.prompt import Message, encode, system_messages, token_limits
from streaming_bots.operations.drain import Drain
from streaming_bots.operations.log import not_the_end_of_an_unread_batch, traceback_once
from streaming_bots.operations.machine import set_threads
from streaming_bots.operations.metrics import BotMetrics
from streaming_bots.settings import BotSettings

logger = logging.getLogger("ray.serve")


@dataclass
class Reply:
    """One reply. `async for` yields its text as the model writes it; `state` says how it ended.

    The caller must close it. Closing it before its end stops the model.
    """

    state: ReplyState
    chunks: AsyncGenerator[str]

    def __aiter__(self) -> AsyncGenerator[str]:
        return self.chunks

    async def aclose(self) -> None:
        await self.chunks.aclose()


class Bot(ABC):
    """What every replica has: a model, its tokenizer, settings, metrics and an engine.

    Construct it in the replica, on its event loop.
    """

    engine: Engine  # runs the model; each bot sets its own

    def __init__(self, settings: BotSettings) -> None:
        logger.addFilter(traceback_once)
        logging.getLogger("asyncio").addFilter(not_the_end_of_an_unread_batch)
        self.settings = settings
        set_threads(settings.threads())  # instead of Ray's default, the reserved cores
        device = "cuda" if settings.num_gpus else "cpu"
        name, self.model, self.tokenizer, context = load_model(
            settings.model, settings.dtype, settings.fallback, device
        )
        self.model_name = settings.served_model_name or name
        self.created = int(time.time())
        self.api_key = settings.read_api_key()
        self.metrics = BotMetrics()
        self.drain = Drain()
        self.limit_context(context)

    def limit_context(self, tokens: int, reason: str = "") -> None:
        """Limit a prompt and its reply to `tokens` together; PromptTooLong tells `reason`.

        Raises ValueError if a limit in the settings does not fit.
        """
        self.context = tokens
        self.context_reason = reason
        its = self.settings
        self.max_new_tokens, self.max_prompt_tokens = token_limits(
            its.max_new_tokens, its.max_prompt_tokens, tokens
        )

    def system_messages(self) -> list[Message]:
        return system_messages(self.settings.system_prompt)

    def prompt_budget(self, max_new_tokens: int) -> int:
        """Return how many tokens a prompt may have beside a reply of `max_new_tokens`."""
        return min(self.context - max_new_tokens, self.max_prompt_tokens)

    async def encode(self, messages: list[Message], options: ReplyOptions) -> list[int]:
        """Tokenize a conversation in a thread, so that a long one does not block the event loop.

        Drops the oldest exchanges from `messages` if not all fit. With `options.whole`, it drops
        none, and shortens the reply instead. Raises a Refusal.
        """
        whole = options.whole
        reply_tokens = 1 if whole else options.max_new_tokens
        budget = self.prompt_budget(reply_tokens)
        try:
            ids = await asyncio.to_thread(encode, messages, self.tokenizer, budget, whole)
        except PromptTooLong as error:
            reason = self.context_reason if budget == self.context - reply_tokens else ""
            raise type(error)(f"{error}{reason}") from None
        options.max_new_tokens = min(options.max_new_tokens, self.context - len(ids))
        return ids

    @property
    def end_tokens(self) -> list[int]:
        """The ids of the tokens that end a reply."""
        return self.model.generation_config.eos_token_id or []

    @abstractmethod
    async def start_reply(self, messages: list[Message], options: ReplyOptions) -> Reply:
        """Start the reply to a conversation whose last message is the prompt.

        Raises a Refusal, or the error that ended the engine.
        """

    async def record_autoscaling_stats(self) -> dict[str, int]:
        """Called by Serve, for the policy in operations/autoscaling.py."""
        return {"replies": self.engine.in_progress()}

    async def check_health(self) -> None:
        """Called by Serve, which replaces the replica if this raises."""
        self.drain.health_was_asked()
        self.metrics.repeat_gauges()
        self.engine.check()


def current_bot() -> Bot:
    """Return the bot of the replica in which this code runs."""
    bot = serve.get_replica_context().servable_object
    assert isinstance(bot, Bot)
    return bot
