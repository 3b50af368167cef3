"""The code and the reason with which a bot closes a chat."""

import asyncio
from types import SimpleNamespace
from typing import Any

import pytest
from starlette.websockets import WebSocketState

from streaming_bots.chat.connection import MAX_REASON_BYTES, ChatConnection
from streaming_bots.errors import BadMessage, NoToken, PromptTooLong, TooManyWaiting, UnknownToken


class Socket:
    """Keeps the code and the reason with which a bot closes it."""

    application_state = WebSocketState.CONNECTED

    async def close(self, code: int, reason: str) -> None:
        self.code, self.reason = code, reason


@pytest.mark.parametrize(
    ("error", "code", "reason"),
    [
        (BadMessage("not text"), 1003, "not text"),
        (PromptTooLong("too long"), 1009, "too long"),
        (NoToken("nothing"), 1007, "nothing"),
        (UnknownToken("[PAD]"), 1007, "[PAD]"),
        (TooManyWaiting("busy"), 1013, "busy"),
        (MemoryError("0x1234 bytes of the prompt"), 1011, "the reply failed: MemoryError"),
        (BadMessage("🐢" * 100), 1003, "🐢" * (MAX_REASON_BYTES // 4)),
    ],
)
def test_a_socket_closes_with_the_code_of_the_error_and_a_reason_that_fits(error, code, reason):
    socket: Any = Socket()
    connection = SimpleNamespace(ws=socket)
    asyncio.run(ChatConnection.close(connection, error))
    assert (socket.code, socket.reason) == (code, reason)
