"""What every bot answers with: text as it comes, the model's name, and errors as JSON."""

import logging
from collections.abc import AsyncGenerator
from typing import Any
from urllib.parse import quote

from fastapi import Request, WebSocket
from fastapi.exceptions import WebSocketRequestValidationError
from fastapi.responses import JSONResponse, StreamingResponse
from ray import serve
from starlette.datastructures import MutableHeaders
from starlette.middleware import Middleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serving.access import GuardAccess
from serving.encoding import NoToken, PromptTooLong, UnknownToken
from serving.metrics import CLIENT_LEFT, CountOutcomes
from serving.prompts import BodyTimeout


class TextStream(StreamingResponse):
    """Text as it comes, plain UTF-8, whose source is closed however the stream ends.

    Starlette alone leaves the source to the garbage collector if the client goes away while a
    chunk is being sent, and until then the model would generate for nobody.
    """

    media_type = "text/plain"

    def __init__(self, first: str, rest: AsyncGenerator[str]) -> None:
        self.rest = rest

        async def body() -> AsyncGenerator[str]:
            yield first
            async for chunk in rest:
                yield chunk

        super().__init__(body())

    @classmethod
    async def start(cls, chunks: AsyncGenerator[str]) -> "TextStream":
        """Wait for the first chunk: a failure before it can still become a status code."""
        return cls(await anext(chunks, ""), chunks)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            await self.rest.aclose()


class NameTheModel:
    """ASGI middleware: `X-Model`, in ASCII, on every response and WebSocket handshake."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def send_named(message: Message) -> None:
            if message["type"] in (
                "http.response.start",
                "websocket.accept",
                "websocket.http.response.start",
            ):
                name = serve.get_replica_context().servable_object.model_name
                MutableHeaders(scope=message)["X-Model"] = quote(name, safe="/:@ ")
            await send(message)

        await self.app(scope, receive, send_named)


class CompletePath:
    """ASGI middleware: a bot's route prefix alone, `/chatbot`, is its `/`.

    Starlette would redirect to it, which clients of WebSockets need not follow.
    """

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "lifespan" and scope["path"] == scope.get("root_path", ""):
            scope["path"] += "/"
        await self.app(scope, receive, send)


class AnswerFailures:
    """ASGI middleware: a failure before the first byte is a 500 that tells no more than its kind.

    Inside of the others, so that it is an answer like any, also for web pages of other hosts. The
    exception goes on to Serve, which logs its traceback.
    """

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        started = False

        async def send_watched(message: Message) -> None:
            nonlocal started
            started = True
            await send(message)

        try:
            await self.app(scope, receive, send_watched)
        except CLIENT_LEFT:
            raise
        except Exception as error:
            if scope["type"] == "http" and not started:
                detail = f"the reply failed: {type(error).__name__}"
                await JSONResponse({"detail": detail}, status_code=500)(scope, receive, send)
            raise


async def too_long(request: Request, error: Exception) -> JSONResponse:
    return JSONResponse({"detail": str(error)}, status_code=413)


async def too_slow(request: Request, error: Exception) -> JSONResponse:
    return JSONResponse({"detail": str(error)}, status_code=408, headers={"Connection": "close"})


async def unreadable(request: Request, error: Exception) -> JSONResponse:
    kind = "no_token" if isinstance(error, NoToken) else "unknown_token"
    detail = [{"type": kind, "loc": ["body", "prompt"], "msg": str(error)}]
    return JSONResponse({"detail": detail}, status_code=422)


async def refuse_handshake(ws: WebSocket, error: Exception) -> None:
    """The answer to a WebSocket's handshake whose query is wrong; `error` says how."""
    assert isinstance(error, WebSocketRequestValidationError)
    await ws.send_denial_response(JSONResponse({"detail": error.errors()}, status_code=422))


def traceback_once(record: logging.LogRecord) -> bool:
    """A filter for the log of Serve, which reports a failure once for each request that it meets.

    The traceback of an exception that they share is written with the first of them.
    """
    error = record.exc_info[1] if record.exc_info else None
    if error is not None:
        if getattr(error, "was_logged", False):
            record.exc_info = None
            record.msg = f"{record.msg} {type(error).__name__}, see above."
        error.was_logged = True  # type: ignore[attr-defined]
    return True


logging.getLogger("ray.serve").addFilter(traceback_once)

# For FastAPI: what is the same in all bots.
HTTP: dict[str, Any] = {
    "middleware": [
        Middleware(CountOutcomes),
        Middleware(GuardAccess),
        Middleware(NameTheModel),  # to those who may use it
        Middleware(CompletePath),
        Middleware(AnswerFailures),
    ],
    "exception_handlers": {
        PromptTooLong: too_long,
        BodyTimeout: too_slow,
        NoToken: unreadable,
        UnknownToken: unreadable,
        WebSocketRequestValidationError: refuse_handshake,
    },
}
