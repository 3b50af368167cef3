"""Films the chat page: notes what it shows at which moment, then renders each moment."""

import io
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image
from playwright.sync_api import Page, expect

STILL_S = 3.0  # the animation begins with the complete conversation, then it replays it
KEY_MS = 45  # from one typed character to the next
READ_MS = 900  # from a reply's end to the next prompt
SEND_MS = 300  # from the last character of a prompt to Enter
FRAME_S = 0.03  # moments that are closer together share a frame
REPLY_MS = 60_000  # the most that a reply may take

RECORD = """
const regions = [...document.querySelectorAll("header, #log, footer")];
window.moments = [];
window.noteMoment = () => moments.push({
  at: performance.now() / 1000,
  regions: regions.map((region) => region.innerHTML),
  typed: document.getElementById("prompt").value,
});
window.recorder = new MutationObserver(noteMoment);
recorder.observe(document.body,
  {subtree: true, childList: true, characterData: true, attributes: true});
document.addEventListener("input", noteMoment);
noteMoment();
"""
# The page's own observer keeps the log at its end.
SHOW = """
({regions, typed}) => {
  document.querySelectorAll("header, #log, footer").forEach(
    (region, number) => region.innerHTML = regions[number]);
  document.getElementById("prompt").value = typed;
  document.getElementById("prompt").focus();
  document.getElementById("log").scrollTop = document.getElementById("log").scrollHeight;
}
"""


@dataclass
class Frame:
    """An image and how long it stands."""

    image: Image.Image
    seconds: float


def record_chat(page: Page, url: str, prompts: list[str]) -> list[dict[str, Any]]:
    """Type the prompts at the page, and return what it showed at each moment."""
    page.goto(url)
    expect(page.get_by_role("status")).to_have_text("ready")
    page.evaluate(f"() => {{ {RECORD} }}")
    for number, prompt in enumerate(prompts, 1):
        page.get_by_label("Your message").press_sequentially(prompt, delay=KEY_MS)
        page.wait_for_timeout(SEND_MS)
        page.keyboard.press("Enter")
        expect(page.locator(".note")).to_have_count(number, timeout=REPLY_MS)
        page.wait_for_timeout(READ_MS)
    page.evaluate("() => { recorder.disconnect(); noteMoment(); }")
    moments: list[dict[str, Any]] = page.evaluate("moments")
    return moments


def render_frames(page: Page, moments: list[dict[str, Any]]) -> list[Frame]:
    """Show the moments again, and take a screenshot of the last one in each FRAME_S."""
    frames: list[Frame] = []
    shown = list({int(moment["at"] / FRAME_S): moment for moment in moments}.values())
    for moment, following in zip(shown, [*shown[1:], None], strict=True):
        page.evaluate(SHOW, moment)
        image = Image.open(io.BytesIO(page.screenshot())).convert("RGB")
        frames.append(Frame(image, following["at"] - moment["at"] if following else FRAME_S))
    return frames


def save_animation(frames: list[Frame], path: Path) -> None:
    """Save a WebP that loops, and begins with the last frame as a still image."""
    images = [frames[-1].image, *[frame.image for frame in frames]]
    seconds = [STILL_S, *[frame.seconds for frame in frames]]
    images[0].save(
        path,
        save_all=True,
        append_images=images[1:],
        duration=[round(duration * 1000) for duration in seconds],
        loop=0,
        lossless=True,
        quality=100,
        method=6,
        minimize_size=True,
    )
