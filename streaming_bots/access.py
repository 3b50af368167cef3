"""Who may use a bot: the hosts it answers for, the web pages that may call it, and the key.

Without checks of host and origin, any web page could use a model on its visitor's machine: the
browser sends `POST http://localhost:8000/?prompt=...` without asking the visitor.
"""

import re
from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, BeforeValidator

DEFAULT_PORTS = {"http": 80, "https": 443, "ws": 80, "wss": 443}


def _split(value: Any) -> Any:
    """Split a string at its commas, since the command line passes a list as one string."""
    return [part.strip() for part in value.split(",")] if isinstance(value, str) else value


def _check_host(host: str) -> str:
    if not re.fullmatch(r"\*|(\*\.)?[\w.-]+|\[[\da-fA-F:.]+\]", host, re.ASCII):
        raise ValueError(
            f"{host!r} is no host: a name (xn--... if not ASCII) or address without a port, "
            "*.name, or *"
        )
    return host


def _check_origin(origin: str) -> str:
    origin = origin.lower()  # browsers send it in lowercase
    if not (origin.isascii() and re.fullmatch(r"\*|[a-z][a-z\d+.-]*://[^/?#@\s*]+", origin)):
        raise ValueError(
            f"{origin!r} is no origin, such as https://chat.example.org (xn--... if not ASCII), "
            "nor *"
        )
    scheme, _, _ = origin.partition(":")
    return origin.removesuffix(f":{DEFAULT_PORTS.get(scheme)}")


Hosts = Annotated[list[Annotated[str, AfterValidator(_check_host)]], BeforeValidator(_split)]
Origins = Annotated[list[Annotated[str, AfterValidator(_check_origin)]], BeforeValidator(_split)]


class AccessSettings(BaseModel, extra="forbid", use_attribute_docstrings=True):
    """The settings that decide who may use a bot."""

    allowed_hosts: Hosts = ["localhost", "127.0.0.1", "[::1]"]
    """Host names that requests may address, without a port; *.example.org for all names below it,
    * for any. By default, this machine's own."""

    allowed_origins: Origins = []
    """Origins of other web pages that may use the bot, as https://chat.example.org; * for all.
    Pages of the bot's own host and port always may."""

    api_key_file: Path | None = None
    """File with the key that every request must carry. Each machine that runs a replica needs it.
    By default, no key is needed."""

    def read_api_key(self) -> bytes | None:
        """Return the key without surrounding whitespace. Raises ValueError if it is unusable."""
        if self.api_key_file is None:
            return None
        try:
            key = self.api_key_file.expanduser().read_bytes().strip()
        except OSError as error:
            raise ValueError(f"api_key_file: cannot be read: {error}") from None
        if not key or len(key.split()) > 1:
            raise ValueError(f"api_key_file: {self.api_key_file} must hold one key on one line")
        if not key.isascii():  # clients encode other characters differently
            raise ValueError(f"api_key_file: the key in {self.api_key_file} must be ASCII")
        return key
