"""What a bot can be configured with: the typed arguments of the `build` functions.

serve run textbot:build model=./my-model max_new_tokens=64
"""

from typing import Any, Literal

from pydantic import BaseModel, Field, PositiveInt

from serving.access import Access
from serving.encoding import begin, encode, prompt_limit, reply_limit
from serving.loading import check_model
from serving.locating import EMBEDDED, ModelError
from serving.scaling import LONGEST_REPLY_S
from serving.watchdog import DEFAULT_STALL_TIMEOUT_S

DEFAULT_MODEL = "microsoft/DialoGPT-small"
DEFAULT_BATCH_SIZE = 16
DEFAULT_BATCH_WAIT_S = 0.1
DEFAULT_CONTINUOUS_BATCH_SIZE = 32


class BotArguments(Access):
    """What all bots take, on the command line or as `args:` in a Serve config file."""

    model: str | None = Field(
        default=None,
        min_length=1,
        description="Hub id, folder, or <folder or hub id>:<file>.gguf. By default "
        "microsoft/DialoGPT-small, or the embedded model where that cannot be had.",
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
        "the model's context leaves to the reply; fewer bound how long one prompt may take.",
    )
    dtype: Literal["float32", "bfloat16", "float16", "auto"] = Field(
        default="float32", description="Number format of the weights; auto is the model's own."
    )
    system_prompt: str | None = Field(
        default=None, description="Instructions that begin every conversation."
    )
    stall_timeout_s: float = Field(
        default=DEFAULT_STALL_TIMEOUT_S,
        gt=0,
        description="Seconds without progress of the model after which a reply has failed and "
        "Serve replaces the replica. Must be longer than one of its layers takes for a prompt.",
    )
    num_cpus: float = Field(
        default=1.0,
        ge=0,
        description="Cores that Ray reserves per replica, and threads of its model. One reply at a "
        "time gains little from a second core, a batch more.",
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

    def autoscaling_config(self) -> dict[str, Any]:
        """For `num_replicas=auto`: one reply is written at a time, and one may wait."""
        return {"target_ongoing_requests": 2}

    def deployment_options(self) -> dict[str, Any]:
        """For `Deployment.options`."""
        options: dict[str, Any] = {
            "num_replicas": self.num_replicas,
            "ray_actor_options": {"num_cpus": self.num_cpus, "num_gpus": self.num_gpus},
        }
        if self.num_replicas == "auto":
            options["autoscaling_config"] = self.autoscaling_config()
            options["graceful_shutdown_timeout_s"] = LONGEST_REPLY_S  # no downscale cuts one
        return options

    def constructor_arguments(self) -> dict[str, Any]:
        """For `Deployment.bind`, checked as far as that is possible before anything is deployed.

        A model that is named is never replaced by another: ModelError is raised if it cannot be
        loaded, ValueError if `max_new_tokens`, `max_prompt_tokens` or `system_prompt` do not suit
        it, or if `api_key_file` holds no key.
        """
        access = Access.model_validate(self.model_dump(include=set(Access.model_fields)))
        if access.api_key_file is not None:
            access.api_key_file = access.api_key_file.expanduser().absolute()
            access.read_api_key()
        arguments = self.model_dump(
            include={
                "served_model_name",
                "max_new_tokens",
                "max_prompt_tokens",
                "dtype",
                "system_prompt",
                "stall_timeout_s",
            }
        )
        arguments |= {"access": access, "device": "cuda" if self.num_gpus else "cpu"}
        if self.model is None:
            arguments |= {"model": DEFAULT_MODEL, "fallback": EMBEDDED}
            try:
                _, tokenizer, context = check_model(DEFAULT_MODEL)
            except ModelError:
                _, tokenizer, context = check_model(EMBEDDED)
        else:
            arguments["model"], tokenizer, context = check_model(self.model)
        room = min(
            context - reply_limit(self.max_new_tokens, context),
            prompt_limit(self.max_prompt_tokens, context),
        )
        try:
            encode([*begin(self.system_prompt), {"role": "user", "content": "Hi"}], tokenizer, room)
        except Exception as error:
            culprit = "system_prompt" if self.system_prompt else "max_new_tokens"
            raise ValueError(f"{culprit}: the model cannot take it: {error}") from error
        return arguments


class ChatbotArguments(BotArguments):
    end_of_response: str = Field(
        default="<>",
        min_length=2,  # a piece of a reply that equals it is sent in two frames
        description="The marker that follows each reply in a frame of its own.",
    )

    def autoscaling_config(self) -> dict[str, Any]:
        """Replies count, not open sockets."""
        policy = {"policy_function": "serving.scaling:replies_in_progress"}
        return super().autoscaling_config() | {"policy": policy}

    def constructor_arguments(self) -> dict[str, Any]:
        return super().constructor_arguments() | {"end_of_response": self.end_of_response}


class BatchSettings(BaseModel, extra="forbid"):
    """What may change while a Batchbot runs, through `user_config`."""

    max_batch_size: int = Field(
        default=DEFAULT_BATCH_SIZE, gt=0, description="Prompts in one run of the model, at most."
    )
    batch_wait_timeout_s: float = Field(
        default=DEFAULT_BATCH_WAIT_S,
        ge=0,
        description="Seconds that a prompt waits for others to join it.",
    )


def requests_beside(max_batch_size: int) -> dict[str, int]:
    """How many requests a replica and Serve's proxies take: a batch, and as many that wait."""
    requests = max(100, 2 * max_batch_size)
    return {"max_ongoing_requests": requests, "max_queued_requests": requests}


class ContinuousbotArguments(BotArguments):
    max_batch_size: int = Field(
        default=DEFAULT_CONTINUOUS_BATCH_SIZE,
        gt=0,
        description="Replies at once, at most.",
    )
    cache_tokens: int | None = Field(
        default=None,
        gt=0,
        description="Tokens of the cache that the replies share, in half of the free memory at "
        "most; a prompt must fit it with its reply. By default 256 for each reply, or the model's "
        "context if that is more, up to 8192.",
    )

    def autoscaling_config(self) -> dict[str, Any]:
        """Half of its places, so that a new prompt begins at once."""
        return {"target_ongoing_requests": (self.max_batch_size + 1) // 2}

    def deployment_options(self) -> dict[str, Any]:
        return super().deployment_options() | requests_beside(self.max_batch_size)

    def constructor_arguments(self) -> dict[str, Any]:
        own = self.model_dump(include={"max_batch_size", "cache_tokens"})
        return super().constructor_arguments() | own


class BatchbotArguments(BotArguments, BatchSettings):
    def autoscaling_config(self) -> dict[str, Any]:
        """A full batch."""
        return {"target_ongoing_requests": self.max_batch_size}

    def deployment_options(self) -> dict[str, Any]:
        settings = self.model_dump(include=set(BatchSettings.model_fields))
        options = super().deployment_options() | {"user_config": settings}
        return options | requests_beside(self.max_batch_size)

    def constructor_arguments(self) -> dict[str, Any]:
        """With the settings that were given, to notice where the config's `user_config` differs."""
        given = self.model_dump(include=self.model_fields_set & set(BatchSettings.model_fields))
        return super().constructor_arguments() | {"batch_arguments": given}
