"""Print a reply as it streams in, from any bot but the Chatbot.

python clients/stream_client.py "Tell me a joke." --max-new-tokens 30
"""

import argparse
from collections.abc import Iterator
from typing import Any

import requests
from connection import (
    Refused,
    add_options,
    authorization,
    exit_on_error,
    keep_key,
    show,
    wait_until_ready,
)


def ask(url: str, body: dict[str, Any], headers: dict[str, str]) -> Iterator[str]:
    """Send a prompt, and yield its reply piece by piece. Raises Refused."""
    with requests.post(url, json=body, headers=headers, auth=keep_key, stream=True) as response:
        if not response.ok:
            status = response.status_code
            raise Refused(f"{url} answered {status}: {response.text}", status)
        for text in response.iter_content(chunk_size=None, decode_unicode=True):
            yield str(text)


def main() -> None:
    parser = argparse.ArgumentParser(description="Print a reply as it streams in.")
    story = "Tell me a story about dogs."
    parser.add_argument("prompt", nargs="?", default=story, help=f"by default, {story!r}")
    parser.add_argument("--max-new-tokens", type=int, help="maximum length of the reply")
    add_options(parser, "http://localhost:8000/")
    options = parser.parse_args()
    body = {"prompt": options.prompt}
    if options.max_new_tokens is not None:
        body["max_new_tokens"] = options.max_new_tokens
    headers = authorization(options)
    with exit_on_error(options):
        wait_until_ready(options, headers)
        for text in ask(options.url, body, headers):
            show(text)
        print()


if __name__ == "__main__":
    main()
