"""Draws what the load client saw at several bots as one SVG, which replays it in a loop."""

from dataclasses import dataclass
from html import escape
from typing import NamedTuple

from matplotlib import font_manager
from PIL import ImageFont

PAUSE_S = 3.0  # the complete picture stands this long, then the replay begins
SIZE, LINE = 13, 18  # of the text, and from one line to the next
FONT = "system-ui, -apple-system, 'Segoe UI', Helvetica, Arial, sans-serif"
# Lines are broken for DejaVu Sans, the widest of the fonts that systems have, so they fit in all.
WIDEST_FONT = font_manager.findfont("DejaVu Sans")

TITLE = "The same four prompts at three bots"
DESCRIPTION = (
    "A replay. Textbot writes one reply after the other, so the last prompt waits for all others. "
    "Batchbot writes the replies to the first two prompts together. The other two prompts wait "
    "for the next batch. Continuousbot adds each prompt to the running batch, so no prompt waits "
    "for another reply."
)
LESSONS = {
    "Textbot": "writes one reply after the other",
    "Batchbot": "writes a batch, then the next one",
    "Continuousbot": "adds prompts to a running batch",
}

STYLE = f"""
text {{ font: {SIZE}px {FONT}; fill: var(--ink); }}
svg {{
  color-scheme: light dark;
  --paper: #ffffff; --ink: #1c2024; --faint: #5c646d; --line: #d5dae0; --wait: #c3cad2;
  --write: #1d5fc2;
}}
@media (prefers-color-scheme: dark) {{
  svg {{
    --paper: #15181c; --ink: #e6e9ed; --faint: #9aa4af; --line: #363d46; --wait: #4a535e;
    --write: #8ab4f8;
  }}
}}
.paper {{ fill: var(--paper); stroke: var(--line); }}
.title, .bot {{ font-size: 16px; font-weight: 600; }}
.prompt {{ font-weight: 600; }}
.faint {{ fill: var(--faint); }}
.end {{ text-anchor: end; }}
.line {{ stroke: var(--line); fill: none; }}
.wait {{ fill: var(--wait); }}
.write {{ fill: var(--write); }}
.wait, .write {{ transform-box: fill-box; transform-origin: left; }}
.past {{ visibility: hidden; }}
"""


class Piece(NamedTuple):
    """A piece of a reply, and when the client received it."""

    at: float
    text: str


@dataclass
class Reply:
    """A prompt and its reply; times are in seconds from the first prompt of its run."""

    prompt: str
    asked: float
    pieces: list[Piece]
    ended: float

    @property
    def text(self) -> str:
        return "".join(piece.text for piece in self.pieces)

    @property
    def first(self) -> float:
        return self.pieces[0].at


class Animation:
    """The style rules of the replay: which class appears, disappears or grows at which moment."""

    def __init__(self, seconds: float, slowdown: float) -> None:
        self.slowdown = slowdown
        self.duration = PAUSE_S + seconds * slowdown
        self.rules: dict[str, str] = {}

    def percent(self, at: float) -> str:
        share = (PAUSE_S + at * self.slowdown) / self.duration
        return f"{min(share, 1) * 100:.2f}%"

    def appears(self, at: float) -> str:
        """Return the class of what is hidden from the beginning of the replay until `at`."""
        frames = (
            "0% { visibility: visible } "
            f"{self.percent(0)} {{ visibility: hidden }} "
            f"{self.percent(at)} {{ visibility: visible }}"
        )
        return self.rule(f"a{at * 1000:.0f}", frames, "step-end")

    def passes(self, start: float, end: float) -> str:
        """Return the class of what is seen only from `start` to `end`."""
        frames = (
            "0% { visibility: hidden } "
            f"{self.percent(start)} {{ visibility: visible }} "
            f"{self.percent(end)} {{ visibility: hidden }}"
        )
        return self.rule(f"p{start * 1000:.0f}-{end * 1000:.0f}", frames, "step-end")

    def grows(self, start: float, end: float) -> str:
        """Return the class of what grows to its width from `start` to `end`."""
        begin = (PAUSE_S - 0.01) / self.duration
        frames = (
            f"0%, {begin * 100:.2f}% {{ transform: scaleX(1) }} "
            f"{self.percent(0)}, {self.percent(start)} {{ transform: scaleX(0) }} "
            f"{self.percent(end)} {{ transform: scaleX(1) }}"
        )
        return self.rule(f"g{start * 1000:.0f}-{end * 1000:.0f}", frames, "linear")

    def rule(self, name: str, frames: str, timing: str) -> str:
        self.rules[name] = (
            f".{name} {{ animation: {name} {self.duration:.2f}s {timing} infinite }}\n"
            f"@keyframes {name} {{ {frames} }}"
        )
        return name

    def style(self) -> str:
        rules = "\n".join(self.rules.values())
        return f"@media (prefers-reduced-motion: no-preference) {{\n{rules}\n}}"


def draw(runs: dict[str, list[Reply]], slowdown: float, note: str, narrow: bool) -> str:
    """Return an SVG: the bots beside each other, or, if `narrow`, one below another."""
    width, margin, gap = (390, 16, 0) if narrow else (900, 24, 28)
    columns = 1 if narrow else len(runs)
    column = (width - 2 * margin - (columns - 1) * gap) / columns
    seconds = max(reply.ended for replies in runs.values() for reply in replies)
    animation = Animation(seconds, slowdown)

    parts = [text(margin, 34, TITLE, "title")]
    y = 56.0
    for line in wrapped(note, width - 2 * margin):
        parts.append(text(margin, y, note[line], "faint"))
        y += LINE
    parts += legend(margin, y + 4) if narrow else legend(width - margin - 163, 34)
    y += 24 if narrow else 0
    top = bottom = y
    for number, (bot, replies) in enumerate(runs.items()):
        x = margin + (0 if narrow else number * (column + gap))
        y = bottom if narrow else top
        if narrow or number == 0:
            parts.append(f'<path class="line" d="M{margin} {y:g}H{width - margin}"/>')
        parts += [text(x, y + 26, bot, "bot"), text(x, y + 45, LESSONS[bot], "faint")]
        y += 74
        for reply in replies:
            parts.append(f'<g data-bot="{bot}" data-prompt="{escape(reply.prompt)}">')
            y = draw_reply(parts, animation, reply, x, y, column, column / seconds)
            parts.append("</g>")
        bottom = max(bottom, y)
    height, content = bottom - 8, "\n".join(parts)
    return f"""\
<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height:g}" \
viewBox="0 0 {width} {height:g}" role="img" aria-labelledby="title description">
<title id="title">{TITLE}</title>
<desc id="description">{DESCRIPTION}</desc>
<style>{STYLE}{animation.style()}
</style>
<rect class="paper" x="0.5" y="0.5" width="{width - 1}" height="{height - 1:g}" rx="10"/>
{content}
</svg>
"""


def legend(x: float, y: float) -> list[str]:
    return [
        box(x, y - 8, 22, "wait"),
        text(x + 28, y, "waiting", "faint"),
        box(x + 88, y - 8, 22, "write"),
        text(x + 116, y, "writing", "faint"),
    ]


def draw_reply(
    parts: list[str],
    animation: Animation,
    reply: Reply,
    x: float,
    y: float,
    width: float,
    scale: float,
) -> float:
    """Add a prompt, its bar and its reply to the parts, and return where the next ones go."""
    asked, first = animation.appears(reply.asked), animation.appears(reply.first)
    waiting = animation.passes(reply.asked, reply.first)
    bars = [("wait", reply.asked, reply.first), ("write", reply.first, reply.ended)]
    parts += [
        text(x, y, reply.prompt, f"prompt {asked}"),
        text(x + width, y, "waiting", f"faint end past {waiting}"),
        text(x + width, y, f"waited {reply.first - reply.asked:.2f} s", f"faint end {first}"),
    ]
    for kind, start, end in bars:
        grows = animation.grows(start, end)
        parts.append(box(x + start * scale, y + 8, (end - start) * scale, f"{kind} {grows}"))
    y += 31
    for line in wrapped(reply.text, width):
        spans = "".join(
            f'<tspan class="{animation.appears(at)}">{escape(piece)}</tspan>'
            for at, piece in pieces_of(reply.pieces, line)
        )
        parts.append(f'<text x="{x:g}" y="{y:g}">{spans}</text>')
        y += LINE
    return y + 16


def text(x: float, y: float, content: str, kind: str) -> str:
    return f'<text x="{x:g}" y="{y:g}" class="{kind}">{escape(content)}</text>'


def box(x: float, y: float, width: float, kind: str) -> str:
    return f'<rect x="{x:.1f}" y="{y:g}" width="{width:.1f}" height="6" class="{kind}"/>'


def wrapped(content: str, width: float) -> list[slice]:
    """Break a text of the usual size into lines, at spaces."""
    length = ImageFont.truetype(WIDEST_FONT, SIZE).getlength
    lines, start, end = [], 0, 0
    for stop in [index for index, char in enumerate(content) if char == " "] + [len(content)]:
        if end > start and length(content[start:stop]) > width:
            lines.append(slice(start, end))
            start = end + 1
        end = stop
    return [*lines, slice(start, end)]


def pieces_of(pieces: list[Piece], line: slice) -> list[Piece]:
    """Return the pieces, or their parts, that are in a line of a reply."""
    inside, start = [], 0
    for at, content in pieces:
        shown = content[max(line.start - start, 0) : max(line.stop - start, 0)]
        if shown:
            inside.append(Piece(at, shown))
        start += len(content)
    return inside
