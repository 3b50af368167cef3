"""Middleware around every bot's routes. It counts outcomes, and names the model in responses."""

from urllib.parse import quote

from ray.exceptions import ActorDiedError, TaskCancelledError
from starlette.datastructures import MutableHeaders
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from streaming_bots.bot import current_bot

STARTS = ("http.response.start", "websocket.accept", "websocket.http.response.start")
# What `receive` raises after a disconnect, or if Serve's proxy has ended, as it does on Ctrl-C
CLIENT_LEFT = (ClientDisconnect, TaskCancelledError, ActorDiedError)


class OutcomeMiddleware:
    """Counts the outcome of each POST, and of each WebSocket handshake that is refused.

    A Chatbot itself counts the prompts that arrive over a WebSocket.
    """

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        status, started, complete = 0, False, False

        async def send_watched(message: Message) -> None:
            nonlocal status, started, complete
            if message["type"] in STARTS:
                status, started = message.get("status", 0), True
            elif message["type"] == "websocket.close" and not started:
                status = 403  # which the server sends in its place
            elif message["type"] == "http.response.body":
                complete = not message.get("more_body", False)
            await send(message)

        async def receive_watched() -> Message:
            try:
                return await receive()
            except CLIENT_LEFT:  # the same error, raised by the bot itself, is a failure
                raise ClientDisconnect from None

        outcome = "cancelled"  # unless the response is complete, or fails
        try:
            await self.app(scope, receive_watched, send_watched)
            if status >= 300:
                outcome = "refused"
            elif complete:
                outcome = "finished"
        except ClientDisconnect:
            pass  # raised, it would only fill Serve's log with tracebacks
        except Exception:
            outcome = "failed"
            raise
        finally:
            if scope.get("method") == "POST" or (scope["type"] == "websocket" and status >= 400):
                current_bot().metrics.count(outcome)


class BotMiddleware:
    """Names the model in `X-Model`. Only clients with access get this far.

    A route prefix alone, `/chatbot`, is the bot's `/`: Starlette would redirect, but WebSocket
    clients need not follow.
    """

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def send_named(message: Message) -> None:
            if message["type"] in STARTS:
                name = quote(current_bot().model_name, safe="/:@ ")
                MutableHeaders(scope=message)["X-Model"] = name
            await send(message)

        if scope["type"] != "lifespan" and scope["path"] == scope.get("root_path", ""):
            scope["path"] += "/"
        await self.app(scope, receive, send_named)
