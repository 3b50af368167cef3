"""Shared by all clients: a bot's URL and key, the wait until it is ready, and one-line errors."""

import argparse
import os
import socket
import ssl
import sys
import time
import unicodedata
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from urllib.parse import unquote, urlsplit

import requests
from urllib3.exceptions import ProtocolError
from websockets.exceptions import ConnectionClosed, InvalidStatus, WebSocketException

PROBE_TIMEOUT_S = 5  # while a bot loads its model, it may not answer a request
PROBE_EVERY_S = 0.5
BIDIRECTIONAL = "\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069"


class Refused(Exception):
    """The bot answered a request with an error; `status` is the HTTP status."""

    def __init__(self, problem: str, status: int) -> None:
        super().__init__(problem)
        self.status = status


def add_options(parser: argparse.ArgumentParser, url: str) -> None:
    parser.add_argument(
        "--url", type=bot_url, default=url, help="URL of the bot; by default, %(default)s"
    )
    parser.add_argument("--api-key-file", type=Path, help="file with the key that the bot requires")
    parser.add_argument(
        "--wait",
        type=float,
        default=60,
        metavar="SECONDS",
        help="how long to wait until the bot is ready; by default, %(default)s",
    )


def bot_url(text: str) -> str:
    """Return a URL as it is. Raises ArgumentTypeError if its host or port is invalid."""
    with suppress(ValueError):
        if urlsplit(text).hostname and urlsplit(text).port != 0:
            return text
    raise argparse.ArgumentTypeError(f"{text!r} is not like http://localhost:8000/")


def authorization(options: argparse.Namespace) -> dict[str, str]:
    """Return the header with the key, if there is one. Exits if its file is unreadable."""
    if options.api_key_file is None:
        return {}
    try:
        key = options.api_key_file.read_bytes().strip().decode("ascii")
    except (OSError, UnicodeDecodeError) as error:
        sys.exit(f"--api-key-file: {error}")
    return {"Authorization": f"Bearer {key}"}


def keep_key(request: requests.PreparedRequest) -> requests.PreparedRequest:
    """Pass this to requests as `auth`. Otherwise, ~/.netrc would replace the key."""
    return request


def wait_until_ready(options: argparse.Namespace, headers: dict[str, str]) -> str:
    """Wait up to `--wait` seconds until a bot answers, and return its model's name, or "".

    Does not raise if nothing answers: the caller's own request then fails.
    """
    asked = urlsplit(options.url)  # every bot answers /v1/models, but not always "/"
    url = asked._replace(
        scheme=asked.scheme.replace("ws", "http", 1), path=f"{asked.path.rstrip('/')}/v1/models"
    ).geturl()
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


def probe(url: str, headers: dict[str, str]) -> requests.Response | None:
    """Return the answer to a GET, even an error, or None while the bot starts."""
    try:
        response = requests.get(url, headers=headers, auth=keep_key, timeout=PROBE_TIMEOUT_S)
    except requests.exceptions.SSLError:
        return requests.Response()
    except (requests.ConnectionError, requests.Timeout):
        return None
    except requests.RequestException:  # such as an invalid URL
        return requests.Response()
    # Serve itself answers before it knows the bot, and while no replica is ready.
    unknown = response.status_code == 404 and "/-/routes" in response.text
    starting = response.status_code == 503 and "Retry-After" not in response.headers
    return None if unknown or starting else response


def show(text: str) -> None:
    """Print a piece of a reply. On a terminal, leave out characters that could control it."""
    print(printable(text) if sys.stdout.isatty() else text, end="", flush=True)


def printable(text: str) -> str:
    """Remove characters that could control a terminal, or make it show text in another order."""
    return "".join(
        char
        for char in text
        if char in "\n\t" or (unicodedata.category(char) != "Cc" and char not in BIDIRECTIONAL)
    )


def discard_output() -> None:
    """Drop what could not be printed, so that Python does not try again when it ends."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


@contextmanager
def exit_on_error(options: argparse.Namespace) -> Iterator[None]:
    """On an error, end the program with status 1 and one line that says what is wrong."""
    url = options.url
    sys.stdout.reconfigure(errors="replace")  # type: ignore[union-attr]  # not all show emoji
    try:
        yield
    except Refused as error:
        hint = " (the Chatbot? ask it with clients/chat_client.py)" if error.status == 405 else ""
        sys.exit(printable(f"{error}{hint}"))
    except BrokenPipeError:  # the reader of our output, such as `head`, has ended
        discard_output()
    except requests.exceptions.ChunkedEncodingError:
        print()
        sys.exit(f"{url} failed in the middle of the reply")
    except ConnectionClosed as closed:
        print()
        code, reason = (closed.rcvd.code, closed.rcvd.reason) if closed.rcvd else (1006, "")
        sys.exit(printable(f"{url} closed the connection: {code} {reason}").rstrip())
    except requests.ConnectionError as error:
        if isinstance(error, requests.exceptions.SSLError):
            sys.exit(f"cannot talk to {url}: {error}")
        if isinstance(error.args[0], ProtocolError):
            sys.exit(f"{url} closed the connection before it answered")
        sys.exit(f"nothing answers at {url}: is a bot running? (serve run textbot:app)")
    except (requests.RequestException, WebSocketException, ssl.SSLError) as error:
        refused = isinstance(error, InvalidStatus) and error.response.status_code == 403
        hint = " (not the Chatbot? ask it with clients/stream_client.py)" if refused else ""
        sys.exit(f"cannot talk to {url}: {error}{hint}")
    except (ConnectionError, TimeoutError, socket.gaierror):
        sys.exit(f"nothing answers at {url}: is a bot running? (serve run chatbot:app)")
    except OSError as error:  # such as a full disk
        discard_output()
        sys.exit(str(error))
    except KeyboardInterrupt:
        print(file=sys.stderr)  # after the terminal's ^C
        sys.exit(130)
