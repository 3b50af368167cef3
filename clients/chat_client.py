"""Chat with a Chatbot: type prompts, or pipe them in, one per line.

printf 'Space the final\n These are the voyages\n' | python clients/chat_client.py
"""

import argparse
import json
import sys
from collections.abc import Callable, Iterator
from typing import Any

from chat_connection import CHAT_V1, ChatConnection
from connection import (
    add_options,
    authorization,
    exit_on_error,
    printable,
    show,
    wait_until_ready,
)
from terminal import HELP, Notes, is_typed, prompts, stop_on_ctrl_c
from websockets.sync.client import ClientConnection


class ReplyError(Exception):
    """The bot sent an error in place of a reply. The conversation continues."""


def ask(
    websocket: ClientConnection,
    prompt: str,
    marker: str,
    tell: Callable[[dict[str, Any]], object] = lambda message: None,
) -> Iterator[str]:
    """Send a prompt, and yield its reply in pieces. `tell` gets chat.v1's messages."""
    if websocket.subprotocol != CHAT_V1:  # the plain protocol: text, then the marker
        websocket.send(prompt)
        while (text := websocket.recv(decode=True)) != marker:
            yield text
        return
    websocket.send(json.dumps({"type": "prompt", "prompt": prompt}))
    message = {"type": "prompt"}
    while message["type"] != "done":
        message = json.loads(websocket.recv())
        if message["type"] == "error":
            raise ReplyError(message["detail"])
        tell(message)
        yield message.get("text", "")


def print_reply(connection: ChatConnection, prompt: str, marker: str) -> bool:
    """Print a reply as it arrives, and return whether it is complete."""
    notes = Notes()
    try:
        with stop_on_ctrl_c(connection):
            if prompt.strip():
                for text in connection.ask(lambda ws: ask(ws, prompt, marker, notes.tell)):
                    show(text)
        notes.print()
    except ReplyError as error:
        print(flush=True)
        print(printable(str(error)), file=sys.stderr)
        return False
    return True


def main() -> None:
    parser = argparse.ArgumentParser(
        description="Chat with a Chatbot.", epilog=f"At a terminal, not from a pipe: {HELP}"
    )
    parser.add_argument("--end-of-response", default="<>", help="the marker after each reply")
    add_options(parser, "ws://localhost:8000/")
    options = parser.parse_args()
    headers = authorization(options)
    well = True
    with exit_on_error(options):
        model = wait_until_ready(options, headers)
        if is_typed():
            print(f"{model or options.url}.\n{HELP}", file=sys.stderr)
        with ChatConnection(options, headers) as connection:
            for prompt in prompts():
                if prompt is None:
                    connection.reset()
                else:
                    well &= print_reply(connection, prompt, options.end_of_response)
    sys.exit(not well)


if __name__ == "__main__":
    main()
