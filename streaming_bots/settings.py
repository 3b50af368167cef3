"""The settings of a bot, for its constructor and for its `build` function.

serve run textbot:build model=./my-model max_new_tokens=64
"""

import logging
from typing import Any, ClassVar, Literal

from pydantic import (
    BaseModel,
    Field,
    PositiveInt,
    PrivateAttr,
    ValidationError,
    model_validator,
)
from ray.serve import Application, Deployment
from ray.serve.config import BackpressureConfig

from streaming_bots.access import AccessSettings
from streaming_bots.models.loaded_model import check_model
from streaming_bots.models.prompt import encode, new_conversation, prompt_limit, reply_limit
from streaming_bots.models.source import BUNDLED, ModelError
from streaming_bots.operations.drain import HEALTH_CHECK_PERIOD_S, LONGEST_REPLY_S
from streaming_bots.operations.machine import cores

logger = logging.getLogger("ray.serve")

DEFAULT_MODEL = "microsoft/DialoGPT-small"
RETRY_AFTER_S = 10  # told to a client that is refused because too many wait


def queue_beside(max_batch_size: int) -> dict[str, int]:
    """Limit the requests in a replica and in Serve's proxies: a batch, and as many that wait."""
    requests = max(100, 2 * max_batch_size)
    return {"max_ongoing_requests": requests, "max_queued_requests": requests}


# For a bot whose requests wait for their turn. Waiting costs next to nothing, but a hundred replies
# take minutes. A client that would have to wait longer gets a 503 at once. Serve's proxy queues
# every request for a moment, so its queue has room for as many as a replica takes.
QUEUE_OPTIONS: dict[str, Any] = {
    **queue_beside(1),
    "backpressure_config": BackpressureConfig(retry_after_s=RETRY_AFTER_S),
}

MAX_CHATS = 500  # open at once in a replica; an idle one costs some memory

# Serve counts an open WebSocket as one request, even while it is idle. Over Serve's limit, a
# handshake would hang, so the Chatbot has its own limit. Serve's limit leaves room for clients that
# are told to try again later. A replica that Serve stops needs time to finish its replies.
CHAT_OPTIONS: dict[str, Any] = {
    "max_ongoing_requests": 2 * MAX_CHATS,
    "health_check_period_s": HEALTH_CHECK_PERIOD_S,
    "graceful_shutdown_timeout_s": LONGEST_REPLY_S,
}


class BotSettings(AccessSettings):
    """The settings of all bots, on the command line or as `args:` in a Serve config file."""

    max_waiting: ClassVar[int | None] = None  # prompts that may wait; None: Serve limits them

    model: str = Field(
        default=DEFAULT_MODEL,
        min_length=1,
        description="Hub id, folder, or <folder or hub id>:<file>.gguf. By default "
        "microsoft/DialoGPT-small, or the bundled model if that is not available.",
    )
    fallback: str | None = Field(
        default=None,
        description="The model to load instead if `model` is not available. By default none, "
        "except for the default model.",
    )
    served_model_name: str | None = Field(
        default=None,
        min_length=1,
        description="What clients are told as X-Model. By default the hub id, or the last part of "
        "a folder.",
    )
    max_new_tokens: int | None = Field(
        default=None,
        gt=0,
        description="The most tokens of a reply; a request may ask for fewer. By default 256, or "
        "half the model's context if that is less.",
    )
    max_prompt_tokens: int | None = Field(
        default=None,
        gt=0,
        description="The most tokens of a prompt, with the conversation before it. By default what "
        "the model's context leaves to the reply, 8192 at most: a prompt is read as a whole, and "
        "one of 100,000 tokens can take a core many minutes, and its memory.",
    )
    dtype: Literal["float32", "bfloat16", "float16", "int8", "auto"] = Field(
        default="float32",
        description="Number format of the weights; auto is the model's own. int8 is for a CPU: "
        "quicker, in a third of the memory, and a little less exact.",
    )
    prefix_cache_mb: int = Field(
        default=512,
        ge=0,
        description="Megabytes for keys and values of earlier replies: the next turn of a "
        "conversation only reads what is new; a quarter of the free memory at most. 0 keeps none, "
        "and lets no client learn from timing what others have asked. A continuous batch keeps "
        "them in its cache.",
    )
    system_prompt: str | None = Field(
        default=None, description="Instructions that begin every conversation."
    )
    stall_timeout_s: float = Field(
        default=120.0,
        gt=0,
        description="Seconds without progress of the model after which a reply has failed and "
        "Serve replaces the replica. Must be longer than one of its layers takes for a prompt.",
    )
    num_cpus: float | None = Field(
        default=None,
        ge=0,
        description="Cores that Ray reserves per replica, and threads of its model. By default one "
        "is reserved, and the model of a single replica computes with all cores that there are.",
    )
    num_gpus: float = Field(
        default=0.0,
        ge=0,
        description="GPUs that Ray reserves per replica, where its model then runs. Less than 1: "
        "replicas share one.",
    )
    num_replicas: PositiveInt | Literal["auto"] = Field(
        default=1, description='Copies of the bot: a number, or "auto" to follow the load.'
    )

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
        """With how many the model computes."""
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
        """Return the given settings, checked as far as possible before anything is deployed.

        Raises ModelError if a model that was named cannot be loaded. Raises ValueError if
        `max_new_tokens`, `max_prompt_tokens` or `system_prompt` do not suit it, or if
        `api_key_file` holds no key.
        """
        given = self.model_dump(exclude_unset=True)
        if self.api_key_file is not None:
            given["api_key_file"] = self.api_key_file.expanduser().absolute()
            self.read_api_key()
        if "model" not in given:
            given |= {"model": DEFAULT_MODEL, "fallback": BUNDLED}
        try:
            given["model"], tokenizer, context = check_model(given["model"])
        except ModelError:
            if given.get("fallback") is None:
                raise
            _, tokenizer, context = check_model(given["fallback"])
        budget = min(
            context - reply_limit(self.max_new_tokens, context),
            prompt_limit(self.max_prompt_tokens, context),
        )
        shortest = [*new_conversation(self.system_prompt), {"role": "user", "content": "Hi"}]
        try:
            encode(shortest, tokenizer, budget)
        except Exception as error:
            culprit = "system_prompt" if self.system_prompt else "max_new_tokens"
            raise ValueError(f"{culprit}: the model cannot take it: {error}") from error
        return given


class BatchSettings(BaseModel, extra="forbid"):
    """The settings that `user_config` may change while a Batchbot runs."""

    max_batch_size: int = Field(
        default=16, gt=0, description="Prompts in one run of the model, at most."
    )
    batch_wait_timeout_s: float = Field(
        default=0.1, ge=0, description="Seconds that a prompt waits for others to join it."
    )


class BatchbotSettings(BotSettings, BatchSettings):
    prefix_cache_mb: Literal[0] = Field(default=0, description="A static batch keeps nothing.")
    _in_force: BatchSettings | None = PrivateAttr(default=None)

    def reconfigure(self, user_config: dict[str, Any]) -> BatchSettings:
        """Return the settings that apply after a new `user_config`.

        If it is wrong, the earlier settings stay. An error would make Serve stop the replica, and
        its replacements would fail, too. Raises ValidationError if there are no earlier settings.
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
    max_batch_size: int | None = Field(
        default=None, gt=0, description="Replies at once, at most. By default one at a time."
    )
    cache_tokens: int | None = Field(
        default=None,
        gt=0,
        description="Tokens of the cache that the replies of a continuous batch share, in half of "
        "the free memory at most; a prompt must fit it with its reply. By default 256 for each "
        "reply, or the model's context if that is more, up to 8192.",
    )

    def autoscaling_config(self) -> dict[str, Any]:
        """Aim at half of a batch's places, so that a new prompt begins at once."""
        if self.max_batch_size is None:
            return super().autoscaling_config()
        return {"target_ongoing_requests": (self.max_batch_size + 1) // 2}


class ContinuousbotSettings(ContinuousBatchSettings):
    max_batch_size: int = Field(default=32, gt=0, description="Replies at once, at most.")

    def deployment_options(self) -> dict[str, Any]:
        return super().deployment_options() | queue_beside(self.max_batch_size)


class ChatbotSettings(ContinuousBatchSettings):
    max_waiting: ClassVar[int | None] = 100  # a hundred replies take minutes

    end_of_response: str = Field(
        default="<>",
        min_length=2,  # a piece of a reply that equals it is sent in two messages
        description="The marker that follows each reply, in a message of its own.",
    )

    @model_validator(mode="after")
    def _check_cache_tokens(self) -> "ChatbotSettings":
        if self.cache_tokens is not None and self.max_batch_size is None:
            raise ValueError("cache_tokens is for a batch: give max_batch_size, too")
        return self

    def autoscaling_config(self) -> dict[str, Any]:
        """Count replies, not open connections."""
        policy = {"policy_function": "streaming_bots.operations.autoscaling:replies_in_progress"}
        return super().autoscaling_config() | {"policy": policy}
