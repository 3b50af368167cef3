"""The FastAPI app of a bot, with the middleware and error handlers around its routes."""

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse
from starlette.middleware import Middleware
from starlette.middleware.errors import ServerErrorMiddleware

from streaming_bots.errors import BodyTimeout, Refusal, describe
from streaming_bots.http.access import AccessMiddleware
from streaming_bots.http.middleware import BotMiddleware, OutcomeMiddleware
from streaming_bots.http.openai.errors import OpenAIErrorMiddleware
from streaming_bots.http.openai.routes import router
from streaming_bots.settings import RETRY_AFTER_S


def create_app(title: str) -> FastAPI:
    """Return an app with OpenAI's routes for `serve.ingress`. The bot adds its own routes."""
    api = FastAPI(
        title=title,
        redirect_slashes=False,  # behind TLS, a redirect would lead to http://
        middleware=[
            Middleware(OutcomeMiddleware),
            Middleware(OpenAIErrorMiddleware),
            Middleware(AccessMiddleware),
            Middleware(BotMiddleware),
            # FastAPI's own is outermost, so the others would not see its 500.
            Middleware(ServerErrorMiddleware, handler=answer_failure),
        ],
        exception_handlers={Refusal: answer_refusal},
    )
    api.include_router(router)
    return api


async def answer_refusal(request: Request, error: Refusal) -> JSONResponse:
    headers = {"Retry-After": str(RETRY_AFTER_S)} if error.status == 503 else {}
    if isinstance(error, BodyTimeout):  # the rest of the body would be taken for a request
        headers["Connection"] = "close"
    return JSONResponse({"detail": error.detail}, error.status, headers)


async def answer_failure(request: Request, error: Exception) -> JSONResponse:
    """Answer a failure before the first byte by its type. Serve logs the traceback."""
    return JSONResponse({"detail": describe(error)}, 500)
