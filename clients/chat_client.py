"""Chat with a Chatbot: type prompts, or pipe them in, one a line. Ctrl-D or Ctrl-C leaves.

printf 'Space the final\n These are the voyages\n' | python clients/chat_client.py
"""

import argparse
import os
import sys
from collections.abc import Iterator

from websockets.exceptions import ConnectionClosed, WebSocketException
from websockets.sync.client import connect


def prompts() -> Iterator[str]:
    """The lines of standard input; "> " asks for them if somebody is there to type."""
    question = "> " if sys.stdin.isatty() else ""
    try:
        while True:
            yield input(question)
    except EOFError:
        print(end="\n" if question else "")


def main() -> None:
    parser = argparse.ArgumentParser(description="Chat with a Chatbot.")
    parser.add_argument("--url", default="ws://localhost:8000/")
    parser.add_argument("--end-of-response", default="<>", help="the marker after each reply")
    parser.add_argument(
        "--api-key-file", type=argparse.FileType(), help="a file with the key that the bot asks for"
    )
    options = parser.parse_args()

    headers = {}
    if options.api_key_file:
        headers["Authorization"] = f"Bearer {options.api_key_file.read().strip()}"
    try:
        with connect(options.url, additional_headers=headers) as websocket:
            for prompt in prompts():
                websocket.send(prompt)
                while (text := websocket.recv()) != options.end_of_response:
                    print(text, end="", flush=True)
                print(flush=True)
    except BrokenPipeError:  # whoever read our output, such as `head`, has had enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except ConnectionClosed as closed:
        print()
        code, reason = (closed.rcvd.code, closed.rcvd.reason) if closed.rcvd else (1006, "")
        sys.exit(f"{options.url} closed the connection: {code} {reason}".rstrip())
    except OSError:
        sys.exit(f"nothing answers at {options.url}: is a bot running? (serve run chatbot:app)")
    except WebSocketException as error:
        sys.exit(f"cannot chat with {options.url}: {error}")
    except KeyboardInterrupt:
        print()


if __name__ == "__main__":
    main()
