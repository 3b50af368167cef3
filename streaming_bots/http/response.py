"""The responses that stream a reply as text."""

from collections.abc import AsyncGenerator

from fastapi.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from streaming_bots.bot import Reply


class TextStream(StreamingResponse):
    """Streams a reply as plain UTF-8, and closes it however the stream ends.

    If the client disconnects while a chunk is being sent, Starlette leaves the reply to the garbage
    collector. Until then, the model would generate for nobody.
    """

    media_type = "text/plain"

    def __init__(self, first: str, chunks: AsyncGenerator[str]) -> None:
        self.chunks = chunks

        async def body() -> AsyncGenerator[str]:
            yield first
            async for chunk in chunks:
                yield chunk

        # Proxies such as nginx pass each chunk on at once.
        super().__init__(body(), headers={"X-Accel-Buffering": "no", "Cache-Control": "no-cache"})

    @classmethod
    async def start(cls, reply: Reply | AsyncGenerator[str]) -> "TextStream":
        """Wait for the first text, since a failure before it can still become a status code."""
        chunks = reply.chunks if isinstance(reply, Reply) else reply
        return cls(await anext(chunks, ""), chunks)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            await self.chunks.aclose()


class EventStream(TextStream):
    """Server-sent events."""

    media_type = "text/event-stream"
