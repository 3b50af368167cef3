"""A reply as OpenAI's chat completion: whole, or as server-sent events."""

import asyncio
import json
import time
import uuid
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

from streaming_bots.bot import Reply
from streaming_bots.errors import describe
from streaming_bots.http.openai.errors import describe_error

SILENCE_S = 15.0  # then a comment keeps proxies from closing the connection
COMMENT = ": nothing new yet\n\n"


class Completion:
    """Writes one reply as in https://platform.openai.com/docs/api-reference/chat, and closes it."""

    def __init__(self, model: str, reply: Reply) -> None:
        self.id = f"chatcmpl-{uuid.uuid4().hex}"
        self.created = int(time.time())
        self.model = model
        self.reply = reply

    async def read(self) -> dict[str, Any]:
        """Return the whole reply as one object."""
        async with aclosing(self.reply):
            text = "".join([chunk async for chunk in self.reply])
        message = {"role": "assistant", "content": text}
        return {**self._object("chat.completion", message=message, end=True), "usage": self.usage}

    async def events(self, include_usage: bool) -> AsyncGenerator[str]:
        """Yield server-sent events, and a comment for each SILENCE_S without any.

        Raises a failure of the reply, after an event that describes it if something was sent.
        """
        began = False
        unsent = self._event({"role": "assistant", "content": ""})
        try:
            async with aclosing(with_silences(self.reply)) as chunks:
                async for text in chunks:
                    if text is None:
                        yield COMMENT
                    else:
                        yield unsent + self._event({"content": text})
                        unsent = ""
                    began = True
            unsent += self._event({}, end=True)
            if include_usage:
                unsent += _data({**self._object("chat.completion.chunk"), "usage": self.usage})
        except Exception as error:
            if began:
                yield _data(describe_error(500, describe(error)))
            raise
        yield unsent + "data: [DONE]\n\n"

    @property
    def usage(self) -> dict[str, Any]:
        prompt, reply = len(self.reply.state.input_ids), self.reply.state.reply_tokens
        return {
            "prompt_tokens": prompt,
            "completion_tokens": reply,
            "total_tokens": prompt + reply,
            "prompt_tokens_details": {"cached_tokens": self.reply.state.cached_tokens},
        }

    def _event(self, delta: dict[str, str], end: bool = False) -> str:
        return _data(self._object("chat.completion.chunk", delta=delta, end=end))

    def _object(self, kind: str, end: bool = False, **content: Any) -> dict[str, Any]:
        reason = self.reply.state.finish_reason if end else None
        choice = {"index": 0, **content, "logprobs": None, "finish_reason": reason}
        return {
            "id": self.id,
            "object": kind,
            "created": self.created,
            "model": self.model,
            "choices": [choice] if content else [],
        }


def _data(content: dict[str, Any]) -> str:
    return f"data: {json.dumps(content)}\n\n"


async def with_silences(reply: Reply) -> AsyncGenerator[str | None]:
    """Yield the text of a reply, and None for each SILENCE_S without any. Closes the reply."""
    async with aclosing(reply):
        chunks = aiter(reply)
        while True:
            pending = asyncio.ensure_future(anext(chunks, None))
            try:
                while not (await asyncio.wait([pending], timeout=SILENCE_S))[0]:
                    yield None
            finally:
                pending.cancel()
                await asyncio.wait([pending])
            if (text := pending.result()) is None:
                return
            yield text
