"""OpenAI's routes, which all bots have."""

from typing import Annotated, Any

from fastapi import APIRouter, Depends
from fastapi.responses import JSONResponse, Response

from streaming_bots.bot import Bot, current_bot
from streaming_bots.errors import ModelNotFound
from streaming_bots.http.openai.completion import Completion
from streaming_bots.http.openai.completion_request import (
    CompletionRequest,
    read_completion_request,
)
from streaming_bots.http.prompt_route import ERRORS, described
from streaming_bots.http.request import shorten
from streaming_bots.http.response import EventStream

ERROR = {
    "type": "object",
    "properties": {"error": {"type": "object", "required": ["message", "type", "param", "code"]}},
    "required": ["error"],
}
RESPONSES: dict[int | str, dict[str, Any]] = {
    status: described(description, "application/json", ERROR)
    for status, description in {
        **ERRORS,
        400: "A parameter is wrong, or the messages do not fit the model's context",
        404: "There is no such model here",
        413: "The body is too long",
        503: "Too many requests wait already",
    }.items()
}


def inlined(schema: dict[str, Any]) -> dict[str, Any]:
    """Return a JSON schema without references, since OpenAPI would look them up elsewhere."""
    definitions = schema.pop("$defs", {})

    def resolve(part: Any) -> Any:
        if isinstance(part, list):
            return [resolve(item) for item in part]
        if not isinstance(part, dict):
            return part
        if "$ref" in part:
            return resolve(definitions[part["$ref"].rpartition("/")[2]])
        return {key: resolve(value) for key, value in part.items()}

    return resolve(schema)


router = APIRouter(prefix="/v1", responses=RESPONSES)


@router.post(
    "/chat/completions",
    status_code=200,
    response_class=EventStream,
    responses={
        200: {
            "description": "The reply, whole or as server-sent events",
            "content": {
                "application/json": {"schema": {"type": "object"}},
                "text/event-stream": {"schema": {"type": "object", "required": ["data"]}},
            },
        }
    },
    openapi_extra={
        "requestBody": described(
            "", "application/json", inlined(CompletionRequest.model_json_schema())
        )
    },
)
async def create_completion(
    request: Annotated[CompletionRequest, Depends(read_completion_request)],
) -> Response:
    """Reply to the last message of a conversation, streamed or not."""
    bot = current_bot()
    if request.model is not None:
        check_model(request.model, bot)
    conversation = request.conversation(bot.system_messages())
    completion = Completion(bot.model_name, await bot.start_reply(conversation, request))
    if request.stream:
        return await EventStream.start(
            completion.events(bool(request.stream_options.include_usage))
        )
    return JSONResponse(await completion.read())


@router.get("/models")
async def list_models() -> dict[str, Any]:
    """List the model that answers."""
    return {"object": "list", "data": [describe_model(current_bot())]}


@router.get("/models/{model:path}")
async def show_model(model: str) -> dict[str, Any]:
    """Describe a model, if it is the one that answers."""
    bot = current_bot()
    check_model(model, bot)
    return describe_model(bot)


def check_model(name: str, bot: Bot) -> None:
    """Raise ModelNotFound unless `name` is that of the bot's model, or its last part."""
    if name not in (bot.model_name, bot.model_name.rpartition("/")[2]):
        raise ModelNotFound(f"there is no model {shorten(name)!r}; {bot.model_name!r} answers here")


def describe_model(bot: Bot) -> dict[str, Any]:
    return {"id": bot.model_name, "object": "model", "created": bot.created, "owned_by": "bot"}
