"""Who may use a bot: which hosts it answers for, which web pages may ask, and who has the key.

Without the first two, any web page that somebody visits could spend the model on that person's
own machine: a browser sends `POST http://localhost:8000/?prompt=...` for it without asking.
"""

import base64
import binascii
import math
import re
from collections.abc import Iterable
from hmac import compare_digest
from pathlib import Path
from typing import Annotated, Any
from urllib.parse import urlsplit

from pydantic import AfterValidator, BaseModel, BeforeValidator, Field
from ray import serve
from starlette.datastructures import Headers, MutableHeaders
from starlette.middleware.cors import CORSMiddleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

BEARER_PROTOCOL = "bearer."  # followed by the key in base64url, without padding
CHALLENGE = {"WWW-Authenticate": "Bearer"}
# By these headers Serve lets a client decide what is the operator's: whether an abandoned request
# goes on, and with which requests it may share a batch. `_` and `-` are the same to it.
STEERING = {"x-request-disconnect-disabled", "serve-multiplexed-model-id"}
TIMEOUT = "x-request-timeout-seconds"  # a client may have its own, but 0 would be none
MAX_PARAMETERS = 50  # of a query
DEFAULT_PORTS = {"http": 80, "https": 443, "ws": 80, "wss": 443}


def _split(value: Any) -> Any:
    """Names from the command line come as one string, with commas between them."""
    return [part.strip() for part in value.split(",")] if isinstance(value, str) else value


def _check_host(host: str) -> str:
    if not re.fullmatch(r"\*|(\*\.)?[\w.-]+|\[[\da-fA-F:.]+\]", host, re.ASCII):
        raise ValueError(
            f"{host!r} is no host: a name (xn--... if not ASCII) or address without a port, "
            "*.name, or *"
        )
    return host


def _check_origin(origin: str) -> str:
    origin = origin.lower()  # as browsers send it
    if not (origin.isascii() and re.fullmatch(r"\*|[a-z][a-z\d+.-]*://[^/?#@\s*]+", origin)):
        raise ValueError(
            f"{origin!r} is no origin, such as https://chat.example.org (xn--... if not ASCII), "
            "nor *"
        )
    scheme, _, _ = origin.partition(":")
    return origin.removesuffix(f":{DEFAULT_PORTS.get(scheme)}")


class Access(BaseModel, extra="forbid"):
    """Who may use a bot."""

    allowed_hosts: Annotated[
        list[Annotated[str, AfterValidator(_check_host)]], BeforeValidator(_split)
    ] = Field(
        default=["localhost", "127.0.0.1", "[::1]"],
        description="Host names that requests may be made to, without a port; *.example.org for "
        "all names below it, * for any. By default this machine's own.",
    )
    allowed_origins: Annotated[
        list[Annotated[str, AfterValidator(_check_origin)]], BeforeValidator(_split)
    ] = Field(
        default=[],
        description="Web pages of other hosts that may ask, as https://chat.example.org; * for "
        "all. Those of the bot's own host and port always may.",
    )
    api_key_file: Path | None = Field(
        default=None,
        description="File with the key that every request must carry, on each machine that runs a "
        "replica. By default nobody is asked.",
    )

    def read_api_key(self) -> bytes | None:
        """The key, without the white space around it. Raises ValueError if there is none."""
        if self.api_key_file is None:
            return None
        try:
            key = self.api_key_file.expanduser().read_bytes().strip()
        except OSError as error:
            raise ValueError(f"api_key_file: cannot be read: {error}") from None
        if not key or len(key.split()) > 1:
            raise ValueError(f"api_key_file: {self.api_key_file} must hold one key on one line")
        if not key.isascii():  # clients do not agree on how others are sent in a header
            raise ValueError(f"api_key_file: the key in {self.api_key_file} must be ASCII")
        return key

    def guard(self, app: ASGIApp, key: bytes | None) -> ASGIApp:
        """The app behind all checks: host, origin, the key if there is one, headers."""
        app = CheckHead(app)
        app = RequireKey(app, key) if key else app
        # Inside the check of the origin, since CORS alone lets every request through: it only
        # keeps the page from reading the answer. Outside that of the key: a browser asks first
        # whether it may send one.
        app = CORSMiddleware(
            app,
            allow_origins=self.allowed_origins,
            allow_methods=["GET", "POST"],
            allow_headers=["Authorization", "Content-Type"],
            expose_headers=["X-Model"],
        )
        app = CheckOrigin(app, self.allowed_origins)
        return TrustedHostMiddleware(app, self.allowed_hosts, www_redirect=False)


class GuardAccess:
    """ASGI middleware that keeps out whom this replica's `access` does not let in."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app
        self.guarded: ASGIApp | None = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":  # before the first request, also before the bot is there
            await self.app(scope, receive, send)
            return
        if self.guarded is None:
            bot = serve.get_replica_context().servable_object
            self.guarded = bot.access.guard(self.app, bot.api_key)
        await self.guarded(scope, receive, send)


class CheckOrigin:
    """ASGI middleware: 403 for a web page that is neither the bot's own nor allowed."""

    def __init__(self, app: ASGIApp, allowed_origins: Iterable[str]) -> None:
        self.app = app
        self.allowed_origins = set(allowed_origins)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        app, headers = self.app, Headers(scope=scope)
        host = headers.get("host", "")
        for origin in headers.getlist("origin"):
            if not self._is_allowed(origin, host):
                app = JSONResponse({"detail": f"origin {origin} is not allowed"}, 403)
                break
        await app(scope, receive, send)

    def _is_allowed(self, origin: str, host: str) -> bool:
        if not self.allowed_origins.isdisjoint(("*", origin)):
            return True
        # The bot sees http also where a proxy before it speaks https, so the scheme only says
        # which port is meant by none.
        try:
            page = urlsplit(origin)
            own = urlsplit(f"//{host}")
            port = DEFAULT_PORTS[page.scheme]
            return page.hostname is not None and (page.hostname, page.port or port) == (
                own.hostname,
                own.port or port,
            )
        except (ValueError, KeyError):  # "null", a port that is no number, another scheme
            return False


class CheckHead:
    """ASGI middleware: 400 for a header by which a client would steer Serve, 422 for a query that
    would take long to read.
    """

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        app = self.app
        if steering := next(filter(_steers, Headers(scope=scope).items()), None):
            app = JSONResponse(
                {"detail": f"the header {steering[0]} is not a client's to set"}, 400
            )
        elif scope["query_string"].count(b"&") >= MAX_PARAMETERS:
            problem = {"type": "too_long", "loc": ["query"], "msg": "it has too many parameters"}
            app = JSONResponse({"detail": [problem]}, 422)
        await app(scope, receive, send)


def _steers(header: tuple[str, str]) -> bool:
    name, value = header[0].replace("_", "-"), header[1]
    return name in STEERING or (name == TIMEOUT and not _is_positive(value))


def _is_positive(seconds: str) -> bool:
    try:
        return 0 < float(seconds) < math.inf
    except ValueError:
        return False


class RequireKey:
    """ASGI middleware: 401 without the key.

    Except for the page on which a person types it, `GET /`, which says so in WWW-Authenticate.

    HTTP and WebSocket clients send `Authorization: Bearer <key>`. A browser cannot do that on a
    WebSocket; it offers the subprotocols `chat.v1` and `bearer.<key in base64url>` instead.
    """

    def __init__(self, app: ASGIApp, key: bytes) -> None:
        self.app = app
        self.key = key

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        # Every key is compared, in constant time: how long it takes tells nothing about ours.
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
    """The keys that a request carries."""
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
