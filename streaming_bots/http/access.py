"""Middleware that admits only the clients that a bot's settings allow."""

import base64
import binascii
import math
from collections.abc import Callable, Iterable, Sequence
from hmac import compare_digest
from itertools import chain
from urllib.parse import urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.middleware.cors import CORSMiddleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.responses import JSONResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from streaming_bots.access import DEFAULT_PORTS
from streaming_bots.bot import Bot, current_bot
from streaming_bots.http.request import shorten

BEARER_PROTOCOL = "bearer."  # followed by the key in base64url, without padding
CHALLENGE = {"WWW-Authenticate": "Bearer"}
# With these headers, a client would decide for the operator whether an abandoned request continues,
# and which requests may share a batch with it. Serve treats `_` as `-`.
STEERING = {"x-request-disconnect-disabled", "serve-multiplexed-model-id"}
TIMEOUT = "x-request-timeout-seconds"  # a client may set its own, but 0 would mean none
MAX_PARAMETERS = 50  # of a query
MAX_HEADERS, MAX_HEADER_BYTES = 100, 32_768  # uvicorn itself sets no limit


class AccessMiddleware:
    def __init__(self, app: ASGIApp) -> None:
        self.app = app
        self.guarded: ASGIApp | None = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":  # comes before the first request, when there is no bot yet
            await self.app(scope, receive, send)
            return
        if self.guarded is None:
            self.guarded = guard(self.app, current_bot())
        await self.guarded(scope, receive, send)


def guard(app: ASGIApp, bot: Bot) -> ASGIApp:
    """Return the app behind all checks: host, origin, the key if there is one, and headers."""
    app = CheckMiddleware(app, check_head)
    app = KeyMiddleware(app, bot.api_key) if bot.api_key else app
    # CORS is inside the origin check, since CORS alone lets every request through, and only hides
    # the answer. It is outside the key check, since a browser's preflight has no key.
    app = CORSMiddleware(
        app,
        allow_origins=bot.settings.allowed_origins,
        allow_methods=["GET", "POST"],
        allow_headers=["*"],  # SDKs send some of their own; check_head refuses bad ones
        allow_private_network=True,  # a page of an allowed origin may ask a bot on localhost
        expose_headers=["X-Model", "Retry-After"],
    )
    origins = bot.settings.allowed_origins
    app = CheckMiddleware(app, lambda scope: check_origin(scope, origins))
    app = TrustedHostMiddleware(app, bot.settings.allowed_hosts, www_redirect=False)
    return CheckMiddleware(app, check_size)


class CheckMiddleware:
    """Answers a request with the response of `check`, or lets it through if that is None."""

    def __init__(self, app: ASGIApp, check: Callable[[Scope], Response | None]) -> None:
        self.app = app
        self.check = check

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await (self.check(scope) or self.app)(scope, receive, send)


def check_size(scope: Scope) -> Response | None:
    """Return a 431 for so many headers that the other checks would hold the event loop."""
    headers = scope["headers"]
    if len(headers) <= MAX_HEADERS and sum(map(len, chain(*headers))) <= MAX_HEADER_BYTES:
        return None
    problem = f"more than {MAX_HEADERS} headers, or {MAX_HEADER_BYTES} bytes of them"
    return JSONResponse({"detail": problem}, 431)


def check_origin(scope: Scope, allowed_origins: Sequence[str]) -> Response | None:
    """Return a 403 for a web page that is neither the bot's own nor allowed."""
    headers = Headers(scope=scope)
    for origin in headers.getlist("origin"):
        if not ({"*", origin} & set(allowed_origins) or is_own(origin, headers.get("host", ""))):
            return JSONResponse({"detail": f"origin {shorten(origin)} is not allowed"}, 403)
    return None


def is_own(origin: str, host: str) -> bool:
    """Whether a web page comes from the bot's own host and port."""
    # Behind a proxy that speaks https, the bot sees http. So the scheme only gives default ports.
    try:
        page = urlsplit(origin)
        own = urlsplit(f"//{host}")
        port = DEFAULT_PORTS[page.scheme]
        return page.hostname is not None and (page.hostname, page.port or port) == (
            own.hostname,
            own.port or port,
        )
    except (ValueError, KeyError):  # "null", a port that is not a number, or another scheme
        return False


def check_head(scope: Scope) -> Response | None:
    """Return a 400 for a header that would steer Serve, or a 422 for too long a query."""
    for name, value in Headers(scope=scope).items():
        known = name.replace("_", "-")
        if known in STEERING or (known == TIMEOUT and not is_positive(value)):
            return JSONResponse({"detail": f"the header {name} is not a client's to set"}, 400)
    if scope["query_string"].count(b"&") >= MAX_PARAMETERS:
        problem = {"type": "too_long", "loc": ["query"], "msg": "it has too many parameters"}
        return JSONResponse({"detail": [problem]}, 422)
    return None


def is_positive(seconds: str) -> bool:
    try:
        return 0 < float(seconds) < math.inf
    except ValueError:
        return False


class KeyMiddleware:
    """Answers 401 without the key, except to `GET /`, the page on which a person types the key.

    The page's response has the header WWW-Authenticate, which tells the page to ask for a key.

    HTTP and WebSocket clients send `Authorization: Bearer <key>`. A browser cannot do that on a
    WebSocket, so it offers the subprotocols `chat.v1` and `bearer.<key in base64url>` instead.
    """

    def __init__(self, app: ASGIApp, key: bytes) -> None:
        self.app = app
        self.key = key

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        # Every key is compared, in constant time, so that timing reveals nothing about ours.
        if any([compare_digest(key, self.key) for key in _keys(scope)]):
            await self.app(scope, receive, send)
        elif _asks_for_page(scope):

            async def send_challenge(message: Message) -> None:
                if message["type"] == "http.response.start":
                    headers = MutableHeaders(scope=message)
                    headers.update(CHALLENGE)
                    del headers["X-Model"]
                await send(message)

            await self.app(scope, receive, send_challenge)
        else:
            problem = {"detail": "a key is needed: Authorization: Bearer <key>"}
            await JSONResponse(problem, 401, headers=CHALLENGE)(scope, receive, send)


def _asks_for_page(scope: Scope) -> bool:
    """Whether somebody opens a bot's address in a browser."""
    path = scope["path"].removeprefix(scope.get("root_path", ""))
    return scope["type"] == "http" and scope["method"] in ("GET", "HEAD") and path in ("", "/")


def _keys(scope: Scope) -> Iterable[bytes]:
    """Yield the keys that a request carries."""
    for value in Headers(scope=scope).getlist("authorization"):
        scheme, _, key = value.partition(" ")
        if scheme.lower() == "bearer":
            yield key.strip().encode("latin-1")
    for protocol in scope.get("subprotocols", []):
        if protocol.startswith(BEARER_PROTOCOL):
            encoded = protocol.removeprefix(BEARER_PROTOCOL)
            try:
                yield base64.b64decode(encoded + "=" * (-len(encoded) % 4), b"-_", validate=True)
            except (binascii.Error, ValueError):
                continue
