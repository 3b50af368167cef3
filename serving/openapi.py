"""What `POST /` takes and answers: FastAPI cannot see what `read_request` reads."""

from typing import Any

from serving.responses import TextStream


def _described(description: str, media_type: str, schema: dict[str, Any]) -> dict[str, Any]:
    return {"description": description, "content": {media_type: {"schema": schema}}}


def _detailed(detail: dict[str, Any]) -> dict[str, Any]:
    return {"type": "object", "properties": {"detail": detail}, "required": ["detail"]}


def _error(description: str, detail: dict[str, Any]) -> dict[str, Any]:
    return _described(description, "application/json", _detailed(detail))


TEXT = {"type": "string"}
PROBLEMS = {
    "type": "array",
    "items": {
        "type": "object",
        "properties": {"loc": {"type": "array"}, "msg": TEXT, "type": TEXT},
        "required": ["loc", "msg", "type"],
    },
}
PARAMETERS: dict[str, dict[str, Any]] = {
    "prompt": {
        "type": "string",
        "pattern": r"\S",
        "description": "What to reply to, not blank; needed in one of the two places.",
    },
    "max_new_tokens": {
        "type": "integer",
        "minimum": 1,
        "description": "The most tokens of the reply: at most the bot's own limit, the default.",
    },
    "temperature": {
        "type": "number",
        "minimum": 0,
        "maximum": 2,
        "description": "Divides the logits: the higher, the less likely the tokens that are drawn. "
        "0, and the default if nothing else asks for sampling: the most likely tokens.",
    },
    "top_p": {
        "type": "number",
        "exclusiveMinimum": 0,
        "maximum": 1,
        "description": "Draw from the fewest tokens whose probabilities add up to this.",
    },
    "top_k": {
        "type": "integer",
        "minimum": 0,
        "description": "Draw from this many of the most likely tokens; 0 is all.",
    },
    "seed": {
        "type": "integer",
        "minimum": 0,
        "maximum": 2**63 - 1,
        "description": "The same seed draws the same reply again.",
    },
    "stop": {
        "type": "array",
        "items": {"type": "string", "minLength": 1, "maxLength": 100},
        "maxItems": 4,
        "description": "Strings before which the reply ends; in the query, one parameter each.",
    },
}

# For `@fastapi_app.post`.
PROMPT_ROUTE: dict[str, Any] = {
    "status_code": 200,
    "response_class": TextStream,
    "response_description": "The reply, as the model writes it",
    "openapi_extra": {
        "parameters": [
            {"name": name, "in": "query", "schema": schema} for name, schema in PARAMETERS.items()
        ],
        "requestBody": _described(
            "The same parameters, for what is long or private; they go before those of the query",
            "application/json",
            {"type": "object", "properties": PARAMETERS, "additionalProperties": False},
        ),
    },
    "responses": {
        400: {
            "description": "The bot does not answer for this host, or a header is not a client's",
            "content": {
                "text/plain": {"schema": TEXT},
                "application/json": {"schema": _detailed(TEXT)},
            },
        },
        401: _error("The key is missing or wrong", TEXT),
        403: _error("Web pages of this origin may not ask", TEXT),
        408: _error("The body did not come in time", TEXT),
        413: _error("The prompt or the body is too long", TEXT),
        422: _error("A parameter is missing or wrong", PROBLEMS),
        500: _error("The reply failed before its first text", TEXT),
        503: _described("Too many requests wait already", "text/plain", TEXT),
    },
}
