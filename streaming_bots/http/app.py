"""The FastAPI app of a bot, with everything that stands around its routes."""

from typing import Any

from fastapi import FastAPI, Request, WebSocket
from fastapi.exceptions import WebSocketRequestValidationError
from fastapi.responses import JSONResponse
from starlette.middleware import Middleware

from streaming_bots.errors import BodyTimeout, Refusal
from streaming_bots.http.access import AccessMiddleware
from streaming_bots.http.middleware import BotMiddleware, OutcomeMiddleware


def create_app(title: str) -> FastAPI:
    """An app whose routes a bot adds, for `serve.ingress`."""
    handlers: dict[Any, Any] = {
        Refusal: answer_refusal,
        WebSocketRequestValidationError: refuse_handshake,
    }
    return FastAPI(
        title=title,
        middleware=[
            Middleware(OutcomeMiddleware),
            Middleware(AccessMiddleware),
            Middleware(BotMiddleware),
        ],
        exception_handlers=handlers,
    )


async def answer_refusal(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, Refusal)
    # The rest of a body that did not arrive in time would be taken for the next request.
    headers = {"Connection": "close"} if isinstance(error, BodyTimeout) else None
    return JSONResponse({"detail": error.detail}, error.status, headers)


async def refuse_handshake(ws: WebSocket, error: Exception) -> None:
    """Answer a WebSocket's handshake whose query is wrong; `error` says how."""
    assert isinstance(error, WebSocketRequestValidationError)
    await ws.send_denial_response(JSONResponse({"detail": error.errors()}, status_code=422))
