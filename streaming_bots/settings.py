"""The settings of a bot, for its constructor and for its `build` function."""

import logging
from typing import Any, ClassVar, Literal

from pydantic import (
    BaseModel,
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    ValidationError,
    model_validator,
)
from ray.serve import Application, Deployment
from ray.serve.config import BackpressureConfig

from streaming_bots.access import AccessSettings
from streaming_bots.models.loaded_model import check_model
from streaming_bots.models.prompt import encode, system_messages, token_limits
from streaming_bots.models.source import BUNDLED, ModelError
from streaming_bots.operations.drain import HEALTH_CHECK_PERIOD_S, LONGEST_REPLY_S
from streaming_bots.operations.machine import cores

logger = logging.getLogger("ray.serve")

DEFAULT_MODEL = "microsoft/DialoGPT-small"
RETRY_AFTER_S = 10  # the Retry-After of a 503


def queue_beside(max_batch_size: int) -> dict[str, int]:
    """Return Serve's limits on requests: one batch that runs and one that waits, at least 100."""
    requests = max(100, 2 * max_batch_size)
    return {"max_ongoing_requests": requests, "max_queued_requests": requests}


# For a bot whose requests queue. A hundred replies take minutes, so further clients get a 503 at
# once. Serve's proxy queues every request for a moment, so its queue is as long as a replica's.
QUEUE_OPTIONS: dict[str, Any] = {
    **queue_beside(1),
    "backpressure_config": BackpressureConfig(retry_after_s=RETRY_AFTER_S),
}

MAX_CHATS = 500  # open at once in a replica; even an idle one takes memory

# Serve counts an open WebSocket as one request, even an idle one. Over Serve's limit, a handshake
# would hang, so the Chatbot refuses chats over MAX_CHATS itself, and Serve's limit is higher.
CHAT_OPTIONS: dict[str, Any] = {
    "max_ongoing_requests": 2 * MAX_CHATS,
    "health_check_period_s": HEALTH_CHECK_PERIOD_S,
    "graceful_shutdown_timeout_s": LONGEST_REPLY_S,
}


class BotSettings(AccessSettings, allow_inf_nan=False):
    """The settings of all bots, on the command line or as `args:` in a Serve config file."""

    max_waiting: ClassVar[int | None] = None  # prompts that may wait; None: Serve limits them

    model: str = Field(default=DEFAULT_MODEL, min_length=1)
    """Hub id, folder, or <folder or hub id>:<file>.gguf. By default microsoft/DialoGPT-small, or
    the bundled model if that is not available."""

    fallback: str | None = None
    """The model to load instead if `model` is not available. By default none, except for the
    default model."""

    served_model_name: str | None = Field(default=None, min_length=1)
    """The model's name for clients, as in X-Model. By default, the hub id, or the last part of a
    folder."""

    max_new_tokens: PositiveInt | None = None
    """Maximum number of tokens in a reply; a request may ask for fewer. By default, 256, or half
    the model's context if that is less."""

    max_prompt_tokens: PositiveInt | None = None
    """Maximum number of tokens in a prompt and the conversation before it. By default, the model's
    context less one token, but at most 8192: a prompt of 100,000 tokens can take a core many
    minutes, and gigabytes of memory."""

    dtype: Literal["float32", "bfloat16", "float16", "int8", "auto"] = "float32"
    """Number format of the weights; auto is the model's own. int8 needs a CPU: it is faster, takes
    a third of the memory, and is slightly less exact."""

    prefix_cache_mb: NonNegativeInt = 512
    """Megabytes for the KV caches of earlier replies, a quarter of the free memory at most. The
    model then reads only what is new in the next turn of a conversation. 0 keeps none, so that
    neither timing nor `usage` tells clients what others have asked. A continuous batch keeps them
    in its own cache."""

    system_prompt: str | None = None
    """Instructions that begin every conversation."""

    stall_timeout_s: PositiveFloat = 120.0
    """Seconds without progress by the model after which replies fail and Serve replaces the
    replica. Must be longer than one layer takes to read a prompt."""

    num_cpus: NonNegativeFloat | None = None
    """Cores that Ray reserves per replica, and threads of its model. By default, Ray reserves one,
    but the model of a single replica uses all cores."""

    num_gpus: NonNegativeFloat = 0.0
    """GPUs that Ray reserves per replica. Below 1, replicas share one."""

    num_replicas: PositiveInt | Literal["auto"] = 1
    """Copies of the bot: a number, or "auto" to follow the load."""

    @model_validator(mode="after")
    def _check_dtype(self) -> "BotSettings":
        if self.dtype == "int8" and self.num_gpus:
            raise ValueError("dtype=int8 is for a CPU: on a GPU, say dtype=bfloat16")
        return self

    def bind(self, bot: Deployment) -> Application:
        """Return the application of a bot. Raises the errors of `constructor_arguments`."""
        return bot.options(**self.deployment_options()).bind(**self.constructor_arguments())

    def autoscaling_config(self) -> dict[str, Any]:
        """For `num_replicas=auto`: a replica writes one reply at a time, and one may wait."""
        return {"target_ongoing_requests": 2}

    def threads(self) -> int:
        """Return how many threads the model computes with."""
        if self.num_cpus is None and self.num_replicas == 1:
            return cores()
        return max(1, int(self.num_cpus or 1))

    def deployment_options(self) -> dict[str, Any]:
        """Return the arguments for `Deployment.options`."""
        options: dict[str, Any] = {
            "num_replicas": self.num_replicas,
            "ray_actor_options": {
                "num_cpus": 1.0 if self.num_cpus is None else self.num_cpus,
                "num_gpus": self.num_gpus,
            },
        }
        if self.num_replicas == "auto":
            options["autoscaling_config"] = self.autoscaling_config()
            options["graceful_shutdown_timeout_s"] = LONGEST_REPLY_S  # no downscale cuts a reply
        return options

    def constructor_arguments(self) -> dict[str, Any]:
        """Check the given settings as far as possible before deployment, and return them.

        Raises ModelError if neither the model nor its fallback is available. Raises ValueError if
        the token limits or the system prompt do not suit the model, or if the key is unusable.
        """
        given = self.model_dump(exclude_unset=True)
        if self.api_key_file is not None:
            given["api_key_file"] = self.api_key_file.expanduser().absolute()
            self.read_api_key()
        if "model" not in given:
            given = {"model": DEFAULT_MODEL, "fallback": BUNDLED} | given
        try:
            given["model"], tokenizer, context = check_model(given["model"])
        except ModelError:
            if given.get("fallback") is None:
                raise
            given["fallback"], tokenizer, context = check_model(given["fallback"])
        reply, prompt = token_limits(self.max_new_tokens, self.max_prompt_tokens, context)
        shortest = [*system_messages(self.system_prompt), {"role": "user", "content": "Hi"}]
        try:
            encode(shortest, tokenizer, min(context - reply, prompt))
        except Exception as error:
            limit = "max_prompt_tokens" if prompt < context - reply else "max_new_tokens"
            culprit = "system_prompt" if self.system_prompt else limit
            raise ValueError(f"{culprit}: the model cannot take it: {error}") from error
        return given


class BatchSettings(BaseModel, extra="forbid", allow_inf_nan=False, use_attribute_docstrings=True):
    """The settings that `user_config` may change while a Batchbot runs."""

    max_batch_size: PositiveInt = 16
    """Maximum number of prompts in one run of the model."""

    batch_wait_timeout_s: NonNegativeFloat = 0.1
    """Seconds that a prompt waits for others to join it."""


class BatchbotSettings(BotSettings, BatchSettings):
    prefix_cache_mb: int = Field(default=0, ge=0, le=0)
    """0, since a static batch keeps nothing."""

    _in_force: BatchSettings | None = None

    def reconfigure(self, user_config: dict[str, Any]) -> BatchSettings:
        """Return the settings in force after a new `user_config`.

        If it is invalid, the earlier settings stay in force: an error would make Serve stop the
        replica, and its replacements would fail, too. Raises ValidationError if there are none.
        """
        try:
            settings = BatchSettings.model_validate(user_config)
        except ValidationError as error:
            if self._in_force is None:
                raise
            logger.error(f"the batches stay as they are: {error}")
            return self._in_force
        for name in self.model_fields_set & set(BatchSettings.model_fields):
            if (given := getattr(self, name)) != (used := getattr(settings, name)):
                logger.warning(f"{name} is {used}, from user_config, and not {given}, from args")
        self._in_force = settings
        return settings

    def autoscaling_config(self) -> dict[str, Any]:
        """Aim at a full batch."""
        return {"target_ongoing_requests": self.max_batch_size}

    def deployment_options(self) -> dict[str, Any]:
        settings = self.model_dump(include=set(BatchSettings.model_fields))
        options = super().deployment_options() | {"user_config": settings}
        return options | queue_beside(self.max_batch_size)


class ContinuousBatchSettings(BotSettings):
    max_batch_size: PositiveInt | None = None
    """Maximum number of replies at once. By default, one."""

    cache_tokens: PositiveInt | None = None
    """Tokens in the KV cache that the replies of a continuous batch share, in half of the free
    memory at most; a prompt must fit it with its reply. Each reply counts with its whole prompt,
    even if others begin alike. By default, 256 for each reply, or the model's context, up to 8192,
    if that is more."""

    def autoscaling_config(self) -> dict[str, Any]:
        """Aim at half of a batch's places, so that a new prompt begins at once."""
        if self.max_batch_size is None:
            return super().autoscaling_config()
        return {"target_ongoing_requests": (self.max_batch_size + 1) // 2}


class ContinuousbotSettings(ContinuousBatchSettings):
    max_batch_size: PositiveInt = 32
    """Maximum number of replies at once."""

    def deployment_options(self) -> dict[str, Any]:
        return super().deployment_options() | queue_beside(self.max_batch_size)


class ChatbotSettings(ContinuousBatchSettings):
    max_waiting: ClassVar[int | None] = 100  # a hundred replies take minutes

    # At least two characters, since a chunk that equals it is sent in two messages.
    end_of_response: str = Field(default="<>", min_length=2)
    """The marker that follows each reply, in a message of its own."""

    @model_validator(mode="after")
    def _check_cache_tokens(self) -> "ChatbotSettings":
        if self.cache_tokens is not None and self.max_batch_size is None:
            raise ValueError("cache_tokens is for a batch: give max_batch_size, too")
        return self

    def autoscaling_config(self) -> dict[str, Any]:
        """Count replies, not open connections."""
        policy = {"policy_function": "streaming_bots.operations.autoscaling:replies_in_progress"}
        return super().autoscaling_config() | {"policy": policy}
