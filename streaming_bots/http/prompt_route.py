"""Describes `POST /` for OpenAPI, since FastAPI cannot see what `TextRequest.read` reads."""

from typing import Annotated, Any

from fastapi import Depends
from fastapi.openapi.utils import validation_error_definition

from streaming_bots.http.request import TextRequest
from streaming_bots.http.response import TextStream


def _property(schema: dict[str, Any]) -> dict[str, Any]:
    """Return the JSON schema of a parameter, without the null of an optional one."""
    given: dict[str, Any] = next(iter(schema.get("anyOf", [])), {})
    return {key: schema[key] for key in schema.keys() - {"anyOf", "default", "title"}} | given


def described(description: str, media_type: str, schema: dict[str, Any]) -> dict[str, Any]:
    """Return the description of a body or a response in OpenAPI."""
    return {"description": description, "content": {media_type: {"schema": schema}}}


def _detailed(detail: dict[str, Any]) -> dict[str, Any]:
    return {"type": "object", "properties": {"detail": detail}, "required": ["detail"]}


def _error(description: str, detail: dict[str, Any]) -> dict[str, Any]:
    return described(description, "application/json", _detailed(detail))


# By status, errors that all routes have.
ERRORS = {
    401: "The key is missing or wrong",
    403: "Web pages of this origin may not ask",
    408: "The body did not come in time",
    431: "The request has too many headers, or too long ones",
    500: "The reply failed before its first text",
}
TEXT = {"type": "string"}
PROBLEMS = {"type": "array", "items": validation_error_definition}
RESPONSES = {
    400: {
        "description": "The bot does not answer for this host, or a header is not a client's",
        "content": {
            "text/plain": {"schema": TEXT},
            "application/json": {"schema": _detailed(TEXT)},
        },
    },
    **{status: _error(description, TEXT) for status, description in ERRORS.items()},
    413: _error("The prompt or the body is too long", TEXT),
    422: _error("A parameter is missing or wrong", PROBLEMS),
    503: described("Too many requests wait already", "text/plain", TEXT),
}


def prompt_route(kind: type[TextRequest]) -> dict[str, Any]:
    """Return arguments for `@api.post`, for a route that takes requests of this kind."""
    schemas = kind.model_json_schema()["properties"]
    parameters = {name: _property(schema) for name, schema in schemas.items()}
    body = described(
        "The same parameters, for what is long or private; they go before those of the query",
        "application/json",
        {"type": "object", "properties": parameters, "additionalProperties": False},
    )
    query = [{"name": name, "in": "query", "schema": schema} for name, schema in parameters.items()]
    return {
        "status_code": 200,
        "response_class": TextStream,
        "response_description": "The reply, as the model writes it",
        "openapi_extra": {"parameters": query, "requestBody": body},
        "responses": RESPONSES,
    }


PromptRequest = Annotated[TextRequest, Depends(TextRequest.read)]
PROMPT_ROUTE = prompt_route(TextRequest)
