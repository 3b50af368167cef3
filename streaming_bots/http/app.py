"""The FastAPI app of a bot, with the middleware and error handlers around its routes."""

from typing import Any

from fastapi import FastAPI, Request, WebSocket
from fastapi.exceptions import WebSocketRequestValidationError
from fastapi.responses import JSONResponse
from starlette.middleware import Middleware

from streaming_bots.errors import BodyTimeout, Refusal
from streaming_bots.http.access import AccessMiddleware
from streaming_bots.http.middleware import BotMiddleware, OutcomeMiddleware
from streaming_bots.http.openai.errors import OpenAIErrorMiddleware
from streaming_bots.http.openai.routes import router
from streaming_bots.settings import RETRY_AFTER_S


def create_app(title: str) -> FastAPI:
    """Return an app with OpenAI's routes for `serve.ingress`. The bot adds its own routes."""
    handlers: dict[Any, Any] = {
        Refusal: answer_refusal,
        WebSocketRequestValidationError: refuse_handshake,
    }
    api = FastAPI(
        title=title,
        middleware=[
            Middleware(OutcomeMiddleware),
            Middleware(OpenAIErrorMiddleware),
            Middleware(AccessMiddleware),
            Middleware(BotMiddleware),
        ],
        exception_handlers=handlers,
    )
    api.include_router(router)
    return api


async def answer_refusal(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, Refusal)
    headers = {"Retry-After": str(RETRY_AFTER_S)} if error.status == 503 else {}
    if isinstance(error, BodyTimeout):  # the rest of the body would be taken for a request
        headers["Connection"] = "close"
    return JSONResponse({"detail": error.detail}, error.status, headers)


async def refuse_handshake(ws: WebSocket, error: Exception) -> None:
    """Refuse a WebSocket handshake with an invalid query."""
    assert isinstance(error, WebSocketRequestValidationError)
    await ws.send_denial_response(JSONResponse({"detail": error.errors()}, status_code=422))
