"""Chat with a Chatbot: type prompts, or pipe them in, one a line.

printf 'Space the final\n These are the voyages\n' | python clients/chat_client.py
"""

import argparse
import json
import os
import ssl
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, nullcontext, suppress
from typing import Any

from reaching import add_options, authorization, printable, show, wait_until_ready
from terminal import HELP, is_typed, on_ctrl_c, prompts
from websockets.exceptions import ConnectionClosed, WebSocketException
from websockets.sync.client import ClientConnection, connect
from websockets.typing import Subprotocol

CHAT_V1 = Subprotocol("chat.v1")
RESTARTING = 1012  # a close code: this replica ends, and has not answered; another one will
TRIES, RETRY_S = 10, 0.5  # replicas may end one after the other
STOP = json.dumps({"type": "stop"})


class ReplyError(Exception):
    """What went wrong instead of a reply; the conversation goes on."""


class NotAnswered(Exception):
    """The replica has ended before it replied; another one can be asked."""

    def __init__(self, closed: ConnectionClosed) -> None:
        self.closed = closed


def ask(
    websocket: ClientConnection,
    prompt: str,
    marker: str,
    tell: Callable[[dict[str, Any]], object] = lambda message: None,
) -> Iterator[str]:
    """Send a prompt, and yield its reply piece by piece; tell what chat.v1 says beside it."""
    if websocket.subprotocol != CHAT_V1:  # the plain form: text, then the marker
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


def print_reply(websocket: ClientConnection, prompt: str, marker: str) -> bool:
    """Print it as it comes; return whether it came. Raises NotAnswered if nothing did."""
    ending, shown, dropped = "", False, 0

    def stop() -> None:
        with suppress(WebSocketException):  # who reads the reply learns of it, too
            websocket.send(STOP)

    def tell(message: dict[str, Any]) -> None:
        nonlocal dropped, ending
        dropped = message.get("dropped", 0)
        ending = " (stopped)" if message.get("finish_reason") == "cancelled" else ""
        if message.get("ahead") and is_typed():
            print(f"({message['ahead']} ahead)", file=sys.stderr)

    with on_ctrl_c(stop) if websocket.subprotocol and is_typed() else nullcontext():
        try:
            for text in ask(websocket, prompt, marker, tell) if prompt.strip() else ():
                show(text)
                shown = shown or bool(text)
            print(ending, flush=True)
            if dropped and is_typed():
                print(f"(the first {dropped} messages are forgotten)", file=sys.stderr)
            return True
        except ReplyError as error:
            print(flush=True)
            print(printable(str(error)), file=sys.stderr)
            return False
        except ConnectionClosed as closed:
            if shown or closed.rcvd is None or closed.rcvd.code != RESTARTING:
                raise
            raise NotAnswered(closed) from None


def chat(options: argparse.Namespace, headers: dict[str, str]) -> bool:
    """Reply to all prompts; return whether all went well."""
    well = True
    with ExitStack() as connections:

        def begin() -> ClientConnection:
            return connections.enter_context(
                connect(
                    options.url,
                    subprotocols=[CHAT_V1],
                    additional_headers=headers,
                    max_queue=None,  # also when nobody reads our output, pings are answered
                )
            )

        def begin_again() -> ClientConnection:
            wait_until_ready(options, headers)  # perhaps it was the only replica
            print("(connected again: a new conversation)", file=sys.stderr)
            return begin()

        websocket = begin()
        for prompt in prompts():
            if prompt is None:  # a new conversation is a new connection
                websocket.close()
                wait_until_ready(options, headers)
                websocket = begin()
                continue
            for more_tries in reversed(range(TRIES)):
                if websocket.close_code is not None:
                    websocket = begin_again()
                try:
                    well &= print_reply(websocket, prompt, options.end_of_response)
                    break
                except NotAnswered as error:
                    if not more_tries:
                        raise error.closed from None
                    time.sleep(RETRY_S)
    return well


def main() -> None:
    parser = argparse.ArgumentParser(description="Chat with a Chatbot.", epilog=HELP)
    parser.add_argument("--end-of-response", default="<>", help="the marker after each reply")
    add_options(parser, "ws://localhost:8000/")
    options = parser.parse_args()
    headers = authorization(options)
    try:
        model = wait_until_ready(options, headers)
        if is_typed():
            print(f"{model or options.url}. {HELP}", file=sys.stderr)
        sys.exit(not chat(options, headers))
    except BrokenPipeError:  # whoever read our output, such as `head`, has had enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except ConnectionClosed as closed:
        print()
        code, reason = (closed.rcvd.code, closed.rcvd.reason) if closed.rcvd else (1006, "")
        sys.exit(printable(f"{options.url} closed the connection: {code} {reason}").rstrip())
    except ssl.SSLError as error:
        sys.exit(f"cannot chat with {options.url}: {error}")
    except OSError:
        sys.exit(f"nothing answers at {options.url}: is a bot running? (serve run chatbot:app)")
    except WebSocketException as error:
        sys.exit(f"cannot chat with {options.url}: {error}")
    except KeyboardInterrupt:
        print(file=sys.stderr)
        sys.exit(0 if is_typed() else 130)  # to leave is no failure, to break off a script is


if __name__ == "__main__":
    main()
