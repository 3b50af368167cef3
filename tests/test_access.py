"""access.py: which requests pass, over HTTP and WebSocket alike."""

import asyncio
import base64
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from pydantic import ValidationError
from starlette.responses import PlainTextResponse
from starlette.types import Message, Receive, Scope, Send

from streaming_bots.access import AccessSettings
from streaming_bots.http.access import guard
from streaming_bots.settings import BotSettings

HOST, KEY = "localhost:8000", "correct-horse/battery+staple="


async def bot(scope: Scope, receive: Receive, send: Send) -> None:
    await PlainTextResponse("passed")(scope, receive, send)


def answer(
    access: AccessSettings,
    headers: dict[str, str] | list[tuple[str, str]],
    kind: str = "http",
    subprotocols: tuple[str, ...] = (),
    method: str = "POST",
    query: str = "",
) -> tuple[int, dict[str, str], bytes]:
    """Status, headers and body of the guarded bot's answer."""
    sent: list[Message] = []
    if isinstance(headers, dict):
        given = [*({"Host": HOST} | headers).items()]
    else:
        given = [*headers, ("Host", HOST)]  # last, where it is the slowest to find
    scope: dict[str, Any] = {
        "type": kind,
        "method": method,
        "path": "/",
        "query_string": query.encode(),
        "headers": [
            (name.lower().encode(), value.encode("utf-8" if name == "Authorization" else "latin-1"))
            for name, value in given
        ],
    }
    if kind == "websocket":
        scope |= {"subprotocols": list(subprotocols), "extensions": {"websocket.http.response": {}}}

    async def send(message: Message) -> None:
        sent.append(message)

    async def receive() -> Message:
        raise AssertionError("nothing is to be read")

    guarded = guard(bot, SimpleNamespace(settings=access, api_key=access.read_api_key()))
    asyncio.run(guarded(scope, receive, send))
    found = {name.decode(): value.decode() for name, value in sent[0]["headers"]}
    return sent[0]["status"], found, sent[1]["body"]


OWN = ("Origin", f"http://{HOST}")


@pytest.mark.parametrize("kind", ["http", "websocket"])
@pytest.mark.parametrize(
    ("headers", "status"),
    [
        (99 * [OWN], 200),
        (100 * [OWN], 431),  # and the host
        (100_000 * [OWN], 431),
        ([("X-Long", 32_000 * "a")], 200),
        ([("X-Long", 32_768 * "a")], 431),
        ([("Origin", "http://" + 4_000_000 * "½")], 431),
    ],
    ids=["some", "many", "very many", "long", "too long", "very long"],
)
def test_no_number_and_length_of_headers_holds_the_event_loop(kind, headers, status):
    began = time.thread_time()
    assert answer(AccessSettings(), headers, kind)[0] == status
    assert time.thread_time() - began < 1  # without the limit, 10 s and more


@pytest.mark.parametrize("kind", ["http", "websocket"])
@pytest.mark.parametrize(
    ("allowed", "host", "status"),
    [
        (None, "localhost:8000", 200),
        (None, "LOCALHOST", 200),
        (None, "127.0.0.1:8000", 200),
        (None, "[::1]:8000", 200),
        (None, "evil.example", 400),
        (None, "localhost.evil.example", 400),
        (None, "", 400),
        (["*.example.org"], "chat.example.org", 200),
        (["*.example.org"], "example.org", 400),
        (["example.org"], "www.example.org", 400),
        (["www.example.org"], "example.org", 400),
        (["*"], "anything.at:80", 200),
    ],
)
def test_only_requests_for_allowed_hosts_are_answered(kind, allowed, host, status):
    access = AccessSettings() if allowed is None else AccessSettings(allowed_hosts=allowed)
    assert answer(access, {"Host": host}, kind)[0] == status


@pytest.mark.parametrize("kind", ["http", "websocket"])
@pytest.mark.parametrize(
    ("origin", "host", "status"),
    [
        (None, "localhost:8000", 200),
        ("http://localhost:8000", "localhost:8000", 200),
        ("HTTP://LOCALHOST:8000", "localhost:8000", 200),
        ("http://[::1]:8000", "[::1]:8000", 200),
        ("https://localhost", "localhost", 200),
        ("https://localhost", "localhost:443", 200),
        ("http://localhost", "localhost:80", 200),
        ("https://chat.example.org", "localhost:8000", 200),
        ("http://chat.example.org", "localhost:8000", 403),
        ("https://chat.example.org:8443", "localhost:8000", 403),
        ("http://localhost:3000", "localhost:8000", 403),
        ("http://localhost", "localhost:8000", 403),
        ("http://127.0.0.1:8000", "localhost:8000", 403),
        ("http://evil.example", "localhost:8000", 403),
        ("null", "localhost:8000", 403),
        ("", "localhost:8000", 403),
        ("http://localhost:x", "localhost:8000", 403),
        ("http://[", "localhost:8000", 403),
        ("file://localhost:8000", "localhost:8000", 403),
        ("http://localhost:8000@evil.example", "localhost:8000", 403),
    ],
)
def test_web_pages_of_other_origins_are_refused(kind, origin, host, status):
    access = AccessSettings(allowed_origins=["https://chat.example.org"])
    headers = {"Host": host} | ({} if origin is None else {"Origin": origin})
    found, _, body = answer(access, headers, kind)
    assert found == status
    if status == 403:
        assert b'"detail"' in body


def test_any_origin_may_be_allowed():
    for origin in ("https://anything.example", "null"):
        assert answer(AccessSettings(allowed_origins=["*"]), {"Origin": origin})[0] == 200


def test_an_allowed_origin_may_send_a_preflight_without_a_key_and_read_the_answer(tmp_path):
    (tmp_path / "key").write_text(KEY)
    origin = "https://chat.example.org"
    access = AccessSettings(allowed_origins=[origin], api_key_file=tmp_path / "key")
    preflight = {
        "Origin": origin,
        "Access-Control-Request-Method": "POST",
        "Access-Control-Request-Headers": "authorization,content-type",
        "Access-Control-Request-Private-Network": "true",
    }
    status, headers, _ = answer(access, preflight, method="OPTIONS")
    assert (status, headers["access-control-allow-origin"]) == (200, origin)
    assert answer(access, preflight | {"Origin": "null"}, method="OPTIONS")[0] == 403
    status, headers, _ = answer(access, {"Origin": origin})
    assert (status, headers["access-control-allow-origin"]) == (401, origin)
    status, headers, _ = answer(access, {"Origin": origin, "Authorization": f"Bearer {KEY}"})
    assert (status, headers["access-control-allow-origin"]) == (200, origin)
    assert headers["access-control-expose-headers"] == "X-Model, Retry-After"


@pytest.mark.parametrize("origin", ["https://chat.example.org", "http://chat.example.org"])
def test_an_allowed_origin_may_name_the_default_port_of_its_scheme(origin):
    port = ":443" if origin.startswith("https") else ":80"
    assert answer(AccessSettings(allowed_origins=[origin + port]), {"Origin": origin})[0] == 200
    assert answer(AccessSettings(allowed_origins=[origin + ":81"]), {"Origin": origin})[0] == 403


def test_without_allowed_origins_no_page_may_read_an_answer():
    _, headers, _ = answer(AccessSettings(), {"Origin": f"http://{HOST}"})
    assert "access-control-allow-origin" not in headers


@pytest.mark.parametrize("kind", ["http", "websocket"])
@pytest.mark.parametrize(
    ("name", "value", "status"),
    [
        ("x-request-timeout-seconds", "30", 200),
        ("x-request-timeout-seconds", "0", 400),
        ("x-request-timeout-seconds", "-1", 400),
        ("x-request-timeout-seconds", "nan", 400),
        ("x-request-timeout-seconds", "inf", 400),
        ("x-request-timeout-seconds", "soon", 400),
        ("X-Request-Disconnect-Disabled", "?1", 400),
        ("serve_multiplexed_model_id", "mine", 400),
        ("serve-multiplexed-model-id", "mine", 400),
        ("x-request-id", "mine", 200),
    ],
)
def test_a_client_cannot_override_the_operators_settings(kind, name, value, status):
    found, _, body = answer(AccessSettings(), {name: value}, kind)
    assert found == status
    assert status == 200 or name.lower() in body.decode()


@pytest.mark.parametrize("kind", ["http", "websocket"])
def test_a_query_with_too_many_parameters_is_refused(kind):
    assert answer(AccessSettings(), {}, kind, query="&".join(["stop=a"] * 50))[0] == 200
    status, _, body = answer(AccessSettings(), {}, kind, query="&".join(["stop=a"] * 51))
    assert status == 422
    assert b"too many parameters" in body


def in_base64(key: str) -> str:
    return "bearer." + base64.urlsafe_b64encode(key.encode()).decode().rstrip("=")


@pytest.mark.parametrize("kind", ["http", "websocket"])
@pytest.mark.parametrize(
    ("authorization", "status"),
    [
        (f"Bearer {KEY}", 200),
        (f"bearer  {KEY} ", 200),
        (None, 401),
        ("", 401),
        ("Bearer", 401),
        ("Bearer ", 401),
        (KEY, 401),
        (f"Basic {KEY}", 401),
        (f"Bearer {KEY}x", 401),
        (f"Bearer {KEY[:-1]}", 401),
        ("Bearer \xff\xfe", 401),
    ],
)
def test_requests_need_the_key_if_the_bot_has_one(tmp_path, kind, authorization, status):
    (tmp_path / "key").write_text(f"  {KEY}\n")
    headers = {} if authorization is None else {"Authorization": authorization}
    found, answered, body = answer(AccessSettings(api_key_file=tmp_path / "key"), headers, kind)
    assert found == status
    if status == 401:
        assert answered["www-authenticate"] == "Bearer"
        assert KEY.encode() not in body


@pytest.mark.parametrize(
    ("subprotocols", "status"),
    [
        (("chat.v1", in_base64(KEY)), 200),
        ((in_base64(KEY), "chat.v1"), 200),
        (("chat.v1",), 401),
        (("chat.v1", in_base64(KEY + "x")), 401),
        (("chat.v1", "bearer." + KEY), 401),
        (("chat.v1", "bearer."), 401),
        (("chat.v1", "bearer.!"), 401),
        (("chat.v1", "bearer.a"), 401),
    ],
)
def test_a_browser_offers_the_key_as_a_subprotocol(tmp_path, subprotocols, status):
    (tmp_path / "key").write_text(KEY)
    access = AccessSettings(api_key_file=tmp_path / "key")
    assert answer(access, {}, "websocket", subprotocols)[0] == status


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (None, "cannot be read"),
        (b"", "one key"),
        (b" \n", "one key"),
        (b"two keys", "one key"),
        ("käse".encode(), "must be ASCII"),
    ],
)
def test_build_refuses_a_file_without_a_key(tmp_path: Path, content, problem):
    file = tmp_path / "key"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(ValueError, match=f"api_key_file: .*{problem}"):
        BotSettings(api_key_file=str(file)).constructor_arguments()


def test_the_key_stays_in_its_file_until_a_replica_reads_it(tmp_path, monkeypatch):
    (tmp_path / "key").write_text(KEY)
    monkeypatch.chdir(tmp_path)
    arguments = BotSettings(model="tiny-dialog", api_key_file="key").constructor_arguments()
    assert arguments["api_key_file"] == tmp_path / "key"
    assert KEY not in repr(arguments)


@pytest.mark.parametrize(
    "wrong",
    [
        {"allowed_hosts": "http://localhost"},
        {"allowed_hosts": "localhost:8000"},
        {"allowed_hosts": ["*example.org"]},
        {"allowed_hosts": [""]},
        {"allowed_origins": "chat.example.org"},
        {"allowed_origins": "https://chat.example.org/"},
        {"allowed_origins": ["null"]},
        {"allowed_origins": ["https://bücher.example"]},
        {"allowed_hosts": ["bücher.example"]},
        {"allowed_origins": ["https://*.example.org"]},
    ],
)
def test_an_error_names_the_argument_with_an_invalid_host_or_origin(wrong):
    with pytest.raises(ValidationError) as error:
        BotSettings(**wrong)
    assert error.value.errors()[0]["loc"][0] == next(iter(wrong))


def test_names_on_the_command_line_have_commas_between_them():
    arguments = BotSettings(allowed_hosts="localhost, chat.example.org")
    assert arguments.allowed_hosts == ["localhost", "chat.example.org"]
