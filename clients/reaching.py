"""What all clients need to reach a bot: its URL, its key, and patience while it starts."""

import argparse
import sys
import time
import unicodedata
from pathlib import Path
from urllib.parse import unquote

import requests

PROBE_TIMEOUT_S = 5  # a bot that loads its model may leave a request without an answer
PROBE_EVERY_S = 0.5


def add_options(parser: argparse.ArgumentParser, url: str) -> None:
    parser.add_argument("--url", default=url, help="of the bot; by default %(default)s")
    parser.add_argument("--api-key-file", type=Path, help="a file with the key that the bot wants")
    parser.add_argument(
        "--wait",
        type=float,
        default=60,
        metavar="SECONDS",
        help="how long to wait for a bot that is not there yet; by default %(default)s",
    )


def authorization(options: argparse.Namespace) -> dict[str, str]:
    """The header with the key, if there is one."""
    if options.api_key_file is None:
        return {}
    try:
        key = options.api_key_file.read_bytes().strip().decode("ascii")
    except (OSError, UnicodeDecodeError) as error:
        sys.exit(f"--api-key-file: {error}")
    return {"Authorization": f"Bearer {key}"}


def keep(request: requests.PreparedRequest) -> requests.PreparedRequest:
    """For requests' `auth`, or it would replace our key by what ~/.netrc has for the host."""
    return request


def wait_until_ready(options: argparse.Namespace, headers: dict[str, str]) -> str:
    """Wait until a bot answers, saying so, for at most `--wait`; return its model's name, if known.

    Whether something answers in the end is left to the caller's own request to find out.
    """
    url = options.url.replace("ws", "http", 1) if options.url.startswith("ws") else options.url
    deadline = time.monotonic() + options.wait
    said = False
    while (response := probe(url, headers)) is None and time.monotonic() < deadline:
        if not said:
            print(
                f"waiting up to {options.wait:.0f} s for {options.url} (Ctrl-C leaves)",
                file=sys.stderr,
            )
            said = True
        time.sleep(PROBE_EVERY_S)
    return printable(unquote(response.headers.get("X-Model", ""))) if response is not None else ""


def show(text: str) -> None:
    """Print a piece of a reply: as it is, but to a terminal nothing that could command it."""
    print(printable(text) if sys.stdout.isatty() else text, end="", flush=True)


def printable(text: str) -> str:
    return "".join(char for char in text if char in "\n\t" or unicodedata.category(char) != "Cc")


def probe(url: str, headers: dict[str, str]) -> requests.Response | None:
    """Any answer of a bot, whatever it says to a GET; None while it starts."""
    try:
        response = requests.get(url, headers=headers, auth=keep, timeout=PROBE_TIMEOUT_S)
    except requests.exceptions.SSLError:
        return requests.Response()
    except (requests.ConnectionError, requests.Timeout):
        return None
    except requests.RequestException:  # such as a URL that is none
        return requests.Response()
    # Ray Serve itself answers before it knows the bot, and while no replica is ready.
    unknown = response.status_code == 404 and "/-/routes" in response.text
    starting = response.status_code == 503 and "Retry-After" not in response.headers
    return None if unknown or starting else response
