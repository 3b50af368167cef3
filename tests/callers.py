"""Callers of the bots, which see how a reply ends, and can leave it in three ways."""

import http.client
import json
import os
import socket
import struct
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from urllib.parse import urlsplit

from bot_fixtures import HANG_S, Bot, reference
from websockets.exceptions import ConnectionClosed
from websockets.sync.client import ClientConnection, connect

from streaming_bots.models.loaded_model import LoadedModel

REFUSED = (1003, 1007, 1009, 1013)  # WebSocket close codes


class HttpCaller:
    """Sends a prompt to a Textbot, a Batchbot or a Continuousbot."""

    path = ""

    def __init__(
        self, bot: Bot, prompt: str, limit: int | None = None, headers: dict[str, str] | None = None
    ) -> None:
        url = urlsplit(bot.http)
        self.connection = http.client.HTTPConnection(url.hostname, url.port, timeout=HANG_S)
        body = json.dumps(self.body(prompt, limit))
        self.connection.request("POST", url.path + self.path, body, headers or {})
        self.socket = self.connection.sock
        self.received = b""
        self.response: http.client.HTTPResponse | None = None

    def body(self, prompt: str, limit: int | None) -> dict[str, Any]:
        return {"prompt": prompt} | ({} if limit is None else {"max_new_tokens": limit})

    @property
    def text(self) -> str:
        return self.received.decode()

    def first(self) -> None:
        """Wait for some text."""
        self.response = self.connection.getresponse()
        self.received += self.response.read1()
        assert self.text

    def outcome(self) -> str:
        """Read to the end of the stream; return "finished", "failed" or "refused"."""
        try:
            self.response = self.response or self.connection.getresponse()
            while chunk := self.response.read1():
                self.received += chunk
        except (http.client.HTTPException, ConnectionError):
            return "failed"
        finally:
            self.connection.close()
        return {200: "finished", 500: "failed"}.get(self.response.status, "refused")

    def leave(self, way: str) -> None:
        leave(self.socket, way)


class CompletionCaller(HttpCaller):
    """Sends a prompt to OpenAI's route of any bot, for a stream of events."""

    path = "v1/chat/completions"

    def body(self, prompt: str, limit: int | None) -> dict[str, Any]:
        messages = [{"role": "user", "content": prompt}]
        return {"messages": messages, "stream": True, "max_tokens": limit}

    @property
    def events(self) -> list[dict[str, Any]]:
        events = self.received.decode().split("\n\n")
        return [json.loads(event.removeprefix("data: ")) for event in events if "{" in event]

    @property
    def text(self) -> str:
        choices = [choice for event in self.events for choice in event.get("choices", [])]
        return "".join(choice["delta"].get("content", "") for choice in choices)

    def outcome(self) -> str:
        outcome = super().outcome()
        assert self.received.endswith(b"data: [DONE]\n\n") == (outcome == "finished")
        return outcome


class ChatCaller:
    """Sends a prompt to a Chatbot, over its own socket."""

    def __init__(
        self, bot: Bot, prompt: str, limit: int | None = None, headers: dict[str, str] | None = None
    ) -> None:
        self.version = ["chat.v1"] if limit else None  # the plain protocol has no limit
        # Entered by hand, since the tests decide how the caller leaves the socket.
        self.websocket = connect(
            bot.ws,
            subprotocols=self.version,
            additional_headers=headers,
            max_queue=None,  # else, no pong is read until the test reads the messages before it
            close_timeout=0,
        ).__enter__()
        message: dict[str, Any] = {"type": "prompt", "prompt": prompt, "max_new_tokens": limit}
        self.websocket.send(json.dumps(message) if limit else prompt)
        self.socket = self.websocket.socket
        self.text = ""

    def first(self) -> None:
        self._receive()
        assert self.text

    def outcome(self) -> str:
        try:
            while not (end := self._receive()):
                pass
        except ConnectionClosed as closed:
            return "refused" if closed.rcvd and closed.rcvd.code in REFUSED else "failed"
        self.websocket.close()
        return end

    def leave(self, way: str) -> None:
        if way == "close":
            self.websocket.close()
        else:
            leave(self.socket, way)

    def _receive(self) -> str:
        """Receive a message; return the outcome if it is the last one, else an empty string."""
        frame = self.websocket.recv(timeout=HANG_S)
        if not self.version:
            self.text += frame if frame != "<>" else ""
            return "finished" if frame == "<>" else ""
        message = json.loads(frame)
        self.text += message.get("text", "")
        return {"done": "finished", "error": "failed"}.get(message["type"], "")


def receive(websocket: ClientConnection) -> list[str]:
    """Return the messages of one reply in the plain protocol, without the marker."""
    frames = []
    while (frame := websocket.recv(timeout=HANG_S)) != "<>":
        frames.append(frame)
    return frames


def ask(websocket: ClientConnection, prompt: str) -> str:
    websocket.send(prompt)
    return "".join(receive(websocket))


def leave(sock: socket.socket, way: str) -> None:
    if way == "half-close":  # says "I send no more"; some clients leave this way
        sock.shutdown(socket.SHUT_WR)
        return
    if way == "reset":
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    os.close(sock.detach())  # even if a file of the socket is still open


def check_replies(
    bot: Bot, caller: type[HttpCaller] | type[ChatCaller], loaded: LoadedModel
) -> None:
    """Ask for four replies at once, each of which must be what `generate` writes alone."""
    prompts = ["Hello!", "How are you today?", "I am tired.", "Tell me about your dog."]
    callers = [caller(bot, prompt, 40) for prompt in prompts]
    with ThreadPoolExecutor(len(prompts)) as pool:
        assert [*pool.map(lambda each: each.outcome(), callers)] == ["finished"] * 4
    for prompt, each in zip(prompts, callers, strict=True):
        assert each.text == reference(loaded, [prompt], 40)
