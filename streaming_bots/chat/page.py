"""The chat page: one file, and a policy that lets the browser run nothing else."""

import base64
import hashlib
import re
from functools import cache
from pathlib import Path

from fastapi import FastAPI
from fastapi.responses import HTMLResponse

from streaming_bots.http.request import ConnectionOptions

PAGE = Path(__file__).parent / "page.html"


def add_chat_page(api: FastAPI) -> None:
    """Serve the page at `GET /`; it speaks chat.v1 over the WebSocket at the same address."""
    api.add_api_route("/", show_page, methods=["GET", "HEAD"], include_in_schema=False)


async def show_page(options: ConnectionOptions) -> HTMLResponse:
    """Return the page. Its query has the reply options, and is refused if it is wrong."""
    html, headers = read_page()
    return HTMLResponse(html, headers=headers)


@cache
def read_page() -> tuple[str, dict[str, str]]:
    html = PAGE.read_text(encoding="utf-8")
    return html, {
        "Content-Security-Policy": content_security_policy(html),
        "Cache-Control": "no-cache",
        "Referrer-Policy": "no-referrer",
        "X-Content-Type-Options": "nosniff",
    }


def content_security_policy(html: str) -> str:
    """Allow the page's own script and style, by their hashes, and requests to its own server."""
    hashes = {}
    for tag in ("script", "style"):
        (inline,) = re.findall(rf"<{tag}>(.*?)</{tag}>", html, re.DOTALL)
        digest = hashlib.sha256(inline.encode()).digest()
        hashes[tag] = f"{tag}-src 'sha256-{base64.b64encode(digest).decode()}'"
    return (
        f"default-src 'none'; {hashes['script']}; {hashes['style']}; connect-src 'self'; "
        "img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )
