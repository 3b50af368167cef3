"""Errors as a client sees them: an HTTP status, or the close code of a WebSocket.

Any exception that is not a Refusal is a failure of the bot: a 500, or the close code 1011.
"""

from typing import Any, ClassVar


class Refusal(Exception):
    """The bot refuses to answer this request. The client gets the whole message."""

    status: ClassVar[int]
    close_code: ClassVar[int]  # RFC 6455, 7.4.1, and IANA's registry of WebSocket close codes
    kind: ClassVar[str | None] = None  # of the problem, in a detail that names the parameter
    parameter: ClassVar[str] = "prompt"

    @property
    def detail(self) -> str | list[dict[str, Any]]:
        """The `detail` in the body of an HTTP response."""
        if self.kind is None:
            return str(self)
        return [{"type": self.kind, "loc": ["body", self.parameter], "msg": str(self)}]


class BadMessage(Refusal):
    """A WebSocket message that is not a prompt."""

    status, close_code = 400, 1003


class PromptTooLong(Refusal):
    """A prompt that does not fit the context, even with all earlier exchanges dropped.

    A body or a message is refused likewise if no prompt that fits needs so many bytes.
    """

    status, close_code = 413, 1009


class ContextExceeded(PromptTooLong):
    """Messages that do not fit the context, none of which may be dropped."""

    status, kind, parameter = 400, "context_length_exceeded", "messages"


class TemplateRefusal(Refusal):
    """A conversation that the model's chat template refuses."""

    status, close_code = 400, 1007


class ModelNotFound(Refusal):
    """A request for a model other than the one that answers here."""

    status, close_code, kind, parameter = 404, 1008, "model_not_found", "model"


class NoToken(Refusal):
    """A prompt for which the tokenizer returns no token."""

    status, close_code, kind = 422, 1007, "no_token"


class UnknownToken(Refusal):
    """A prompt with a token that was added to the tokenizer but not to the model."""

    status, close_code, kind = 422, 1007, "unknown_token"


class BodyLost(Refusal):
    """A body that Serve's HTTP server drops, since the request asks for another protocol, too."""

    status, close_code = 400, 1008


class BodyTimeout(Refusal):
    """A body that did not arrive in time."""

    status, close_code = 408, 1008


class TooManyWaiting(Refusal):
    """The bot accepts no further prompt or chat for now."""

    status, close_code = 503, 1013


class Restarting(Refusal):
    """The replica is shutting down. The client may send unanswered prompts to another."""

    status, close_code = 503, 1012


class ModelStalled(Exception):
    """The model makes no progress, or its thread is dead. Serve must replace the replica."""


class BatchFailed(Exception):
    """The continuous batch has ended with an error. Serve must replace the replica."""


def close_code(error: Exception) -> int:
    return error.close_code if isinstance(error, Refusal) else 1011


def describe(error: Exception) -> str:
    """Describe an error to a client: a refusal in full, a failure only by its type."""
    return str(error) if isinstance(error, Refusal) else f"the reply failed: {type(error).__name__}"
