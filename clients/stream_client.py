"""Print a reply as it streams in, from any bot but the Chatbot.

python clients/stream_client.py "Tell me a joke." --max-new-tokens 30
"""

import argparse
import os
import sys
from collections.abc import Iterator
from typing import Any

import requests
from reaching import add_options, authorization, keep, printable, show, wait_until_ready
from urllib3.exceptions import ProtocolError


class Refused(Exception):
    """The bot's answer, of an HTTP status, to what it does not reply to."""

    def __init__(self, problem: str, status: int) -> None:
        super().__init__(problem)
        self.status = status


def ask(url: str, body: dict[str, Any], headers: dict[str, str]) -> Iterator[str]:
    """Send a prompt, and yield its reply piece by piece."""
    with requests.post(url, json=body, headers=headers, auth=keep, stream=True) as response:
        if not response.ok:
            status = response.status_code
            raise Refused(f"{url} answered {status}: {response.text}", status)
        for text in response.iter_content(chunk_size=None, decode_unicode=True):
            assert isinstance(text, str)  # since it is decoded
            yield text


def main() -> None:
    parser = argparse.ArgumentParser(description="Print a reply as it streams in.")
    parser.add_argument("prompt", nargs="?", default="Tell me a story about dogs.")
    parser.add_argument("--max-new-tokens", type=int, help="the most that the reply may have")
    add_options(parser, "http://localhost:8000/")
    options = parser.parse_args()

    body = {"prompt": options.prompt}
    if options.max_new_tokens is not None:
        body["max_new_tokens"] = options.max_new_tokens
    headers = authorization(options)
    try:
        wait_until_ready(options, headers)
        for text in ask(options.url, body, headers):
            show(text)
        print()
    except Refused as error:
        sys.exit(printable(str(error)))
    except BrokenPipeError:  # whoever read our output, such as `head`, has had enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except requests.exceptions.ChunkedEncodingError:
        print()
        sys.exit(f"{options.url} failed in the middle of the reply")
    except requests.exceptions.SSLError as error:
        sys.exit(f"cannot ask {options.url}: {error}")
    except requests.ConnectionError as error:
        if isinstance(error.args[0], ProtocolError):
            sys.exit(f"{options.url} closed the connection before it answered")
        sys.exit(f"nothing answers at {options.url}: is a bot running? (serve run textbot:app)")
    except requests.RequestException as error:
        sys.exit(f"cannot ask {options.url}: {error}")
    except KeyboardInterrupt:
        print(file=sys.stderr)  # after the terminal's ^C
        sys.exit(130)


if __name__ == "__main__":
    main()
