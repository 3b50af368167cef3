"""A chat client's connection, which asks another replica if its own ends before replying."""

import argparse
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack

from connection import wait_until_ready
from websockets.exceptions import ConnectionClosed
from websockets.sync.client import ClientConnection, connect
from websockets.typing import Subprotocol

CHAT_V1 = Subprotocol("chat.v1")
RESTARTING = 1012  # the close code of a replica that shuts down; another will reply
TRIES, RETRY_S = 10, 0.5  # replicas may end one after another


class ChatConnection(ExitStack):
    """A context manager that closes its WebSockets."""

    def __init__(self, options: argparse.Namespace, headers: dict[str, str]) -> None:
        super().__init__()
        self.options = options
        self.headers = headers
        self.open()

    def open(self) -> None:
        self.websocket: ClientConnection = self.enter_context(
            connect(
                self.options.url,
                subprotocols=[CHAT_V1],
                additional_headers=self.headers,
                max_queue=None,  # so that pings are answered even if nobody reads our output
            )
        )

    def reset(self) -> None:
        """Begin a new conversation, which needs a new connection."""
        self.websocket.close()
        wait_until_ready(self.options, self.headers)
        self.open()

    def ask(self, exchange: Callable[[ClientConnection], Iterator[str]]) -> Iterator[str]:
        """Yield an exchange's text. If the replica closes before the first text, ask another.

        Raises ConnectionClosed if the reply has begun, or after TRIES.
        """
        for tries_left in reversed(range(TRIES)):
            if self.websocket.close_code is not None:
                self.reset()
                print("(connected again: a new conversation)", file=sys.stderr)
            answered = False
            try:
                for text in exchange(self.websocket):
                    answered = answered or bool(text)
                    yield text
                return
            except ConnectionClosed as closed:
                code = closed.rcvd.code if closed.rcvd else None
                if answered or code != RESTARTING or not tries_left:
                    raise
                time.sleep(RETRY_S)
