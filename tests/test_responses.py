"""http/response.py, without a cluster."""

import asyncio
from collections.abc import AsyncGenerator

import pytest

from streaming_bots.http.response import TextStream

SCOPE = {"type": "http", "asgi": {"spec_version": "2.3"}}


async def never() -> dict[str, str]:
    await asyncio.Event().wait()
    return {}


class Source:
    """Chunks, and whether their generator has been closed."""

    def __init__(self, *chunks: str) -> None:
        self.chunks, self.closed = chunks, False

    async def read(self) -> AsyncGenerator[str]:
        try:
            for chunk in self.chunks:
                yield chunk
        finally:
            self.closed = True


def test_every_chunk_is_sent_and_the_source_is_closed():
    source, sent = Source("a", "é"), []

    async def send(message) -> None:
        sent.append(message)

    async def respond() -> None:
        response = await TextStream.start(source.read())
        await response(SCOPE, never, send)

    asyncio.run(respond())
    assert dict(sent[0]["headers"])[b"content-type"] == b"text/plain; charset=utf-8"
    assert b"".join(message["body"] for message in sent[1:]).decode() == "aé"
    assert source.closed


def test_a_client_that_leaves_while_a_chunk_is_sent_closes_the_source_at_once():
    source, sending = Source("a", "b"), asyncio.Event()

    async def send(message) -> None:
        if message["type"] == "http.response.body":
            sending.set()
            await asyncio.Event().wait()

    async def respond() -> TextStream:
        response = await TextStream.start(source.read())
        task = asyncio.create_task(response(SCOPE, never, send))
        await sending.wait()
        task.cancel()
        await asyncio.wait([task])
        assert source.closed
        return response  # kept until here, so that the garbage collector had no part in it

    asyncio.run(respond())


def test_a_failure_before_the_first_chunk_is_raised_before_the_response_begins():
    async def failing() -> AsyncGenerator[str]:
        raise ValueError("early")
        yield ""

    with pytest.raises(ValueError, match="early"):
        asyncio.run(TextStream.start(failing()))


def test_an_empty_reply_is_an_empty_body():
    sent = []

    async def send(message) -> None:
        sent.append(message)

    async def respond() -> None:
        response = await TextStream.start(Source().read())
        await response(SCOPE, never, send)

    asyncio.run(respond())
    assert sent[0]["status"] == 200
    assert b"".join(message["body"] for message in sent[1:]) == b""
