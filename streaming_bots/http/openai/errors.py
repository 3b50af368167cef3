"""Errors in OpenAI's format."""

import json
from typing import Any

from starlette.datastructures import MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

PREFIX = "/v1/"
CODES = {401: "invalid_api_key", 404: "unknown_url"}


def describe_error(
    status: int, message: str, param: str | None = None, code: str | None = None
) -> dict[str, Any]:
    """Return an error as in https://platform.openai.com/docs/guides/error-codes."""
    kind = "invalid_request_error" if status < 500 else "server_error"
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


class OpenAIErrorMiddleware:
    """Rewrites all errors on OpenAI's routes, also those of other middleware."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        start: Message | None = None  # of a response that is rewritten

        async def send_rewritten(message: Message) -> None:
            nonlocal start
            if message["type"] == "http.response.start" and message["status"] >= 400:
                start = message
            elif start is None:
                await send(message)
            else:  # the whole body, since no error is streamed
                status, error = rewrite(start["status"], message["body"])
                content = json.dumps(error).encode()
                headers = MutableHeaders(raw=list(start["headers"]))
                headers["Content-Type"] = "application/json"
                headers["Content-Length"] = str(len(content))
                await send({**start, "status": status, "headers": headers.raw})
                await send({"type": "http.response.body", "body": content})

        path = scope.get("path", "").removeprefix(scope.get("root_path", ""))
        is_ours = scope["type"] == "http" and path.startswith(PREFIX)
        await self.app(scope, receive, send_rewritten if is_ours else send)


def rewrite(status: int, body: bytes) -> tuple[int, dict[str, Any]]:
    """Turn an error response, ours or plain text, into the status and body of OpenAI's API."""
    try:
        detail = json.loads(body)["detail"]
    except (ValueError, TypeError, KeyError):
        detail = body.decode(errors="replace")
    if not isinstance(detail, list):
        return status, describe_error(status, detail, code=CODES.get(status))
    problem = detail[0]
    param = ".".join(str(part) for part in problem["loc"][1:]) or None
    param = "messages" if param == "prompt" else param
    message = f"{param}: {problem['msg']}" if param else problem["msg"]
    status = 400 if status == 422 else status
    return status, describe_error(status, message, param, problem["type"])
