"""The chat page, as a browser gets it: one file, and a policy that lets nothing else run."""

import base64
import hashlib
import re
from functools import cache
from pathlib import Path

from fastapi.responses import HTMLResponse

PAGE = Path(__file__).parent.parent / "clients" / "chat.html"


def content_security_policy(html: str) -> str:
    """Allow the page's own script and style, by their hashes, and its own server to be asked."""
    hashes = {}
    for tag in ("script", "style"):
        (inline,) = re.findall(rf"<{tag}>(.*?)</{tag}>", html, re.DOTALL)
        digest = hashlib.sha256(inline.encode()).digest()
        hashes[tag] = f"{tag}-src 'sha256-{base64.b64encode(digest).decode()}'"
    return (
        f"default-src 'none'; {hashes['script']}; {hashes['style']}; connect-src 'self'; "
        "img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )


@cache
def read_page() -> tuple[str, dict[str, str]]:
    """The page and its headers, which are the same for every browser."""
    html = PAGE.read_text(encoding="utf-8")
    return html, {
        "Content-Security-Policy": content_security_policy(html),
        "Cache-Control": "no-cache",
        "Referrer-Policy": "no-referrer",
        "X-Content-Type-Options": "nosniff",
    }


class ChatPage(HTMLResponse):
    """`clients/chat.html`."""

    def __init__(self) -> None:
        html, headers = read_page()
        super().__init__(html, headers=headers)
