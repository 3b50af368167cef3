"""The animated pictures are small, complete as still images, and true."""

import base64
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest
from bot_fixtures import HANG_S, REPOSITORY, needs_chromium, reference, wait_until
from PIL import Image, ImageChops
from playwright.sync_api import Browser, Page

PICTURES = REPOSITORY / "pictures"
LOADS = ["load.svg", "load-narrow.svg"]
BOTS = ["Textbot", "Batchbot", "Continuousbot"]
PROMPTS = ["Tell me a story.", "Write a poem.", "Why is the sky blue?", "Tell me a joke."]
SVG = "{http://www.w3.org/2000/svg}"
MAKE_S = 900  # only bounds a hang

# For each of 200 moments of the loop: the visible text of each reply, in the picture's order.
REPLAY = """
() => {
  const animations = document.getAnimations();
  const {duration} = animations[0].effect.getTiming();
  const replies = [...document.querySelectorAll("[data-bot]")].map((group) =>
    [...group.querySelectorAll("tspan")]);
  return [...Array(200).keys()].map((moment) => {
    for (const animation of animations) {
      animation.pause();
      animation.currentTime = moment / 200 * duration;
    }
    return replies.map((spans) => spans.filter((span) =>
      getComputedStyle(span).visibility === "visible").map((span) => span.textContent).join(""));
  });
}
"""
# The texts that are too close to the picture's edges or to the next column.
TOO_WIDE = """
() => {
  const svg = document.querySelector("svg");
  const {width} = svg.viewBox.baseVal;
  const starts = [...new Set([...document.querySelectorAll("[data-bot] .prompt")].map(
    (prompt) => prompt.x.baseVal[0].value)), width];
  return [...document.querySelectorAll("[data-bot] text:not(.past), .title, .bot, svg > .faint")]
    .filter((text) => {
      const {x, width: length} = text.getBBox();
      const next = text.closest("[data-bot]") ? starts.find((start) => start > x + 1) : width;
      return x < 10 || x + length > next - 10;
    }).map((text) => text.textContent);
}
"""


def open_picture(browser: Browser, name: str, **options: object) -> Page:
    """Open an SVG inside a page, where scripts see its parts."""
    page = browser.new_page(**options)
    page.set_content((PICTURES / name).read_text(encoding="utf-8"))
    return page


def test_the_pictures_are_small():
    sizes = [path.stat().st_size for path in PICTURES.iterdir() if path.suffix != ".py"]
    assert max(sizes) <= 1_000_000
    assert sum(sizes) <= 2_500_000


@pytest.mark.parametrize("name", LOADS)
def test_the_load_picture_shows_all_prompts_and_whole_replies_of_three_bots(name, loaded):
    svg = ElementTree.fromstring((PICTURES / name).read_bytes())
    assert svg.findtext(f"{SVG}title")
    description = svg.findtext(f"{SVG}desc")
    assert all(bot in description for bot in BOTS)
    assert [text.text for text in svg.findall(f"{SVG}text[@class='bot']")] == BOTS
    expected = {prompt: reference(loaded, [prompt], 128) for prompt in PROMPTS}
    replies = svg.findall(f"{SVG}g[@data-bot]")
    assert [reply.get("data-bot") for reply in replies] == [bot for bot in BOTS for _ in PROMPTS]
    for reply, prompt in zip(replies, PROMPTS * len(BOTS), strict=True):
        first, *others = reply.findall(f"{SVG}text")
        assert first.text == prompt
        lines = [
            "".join(line.itertext()) for line in others if line.find(f"{SVG}tspan") is not None
        ]
        assert " ".join(lines) == expected[prompt]


@pytest.mark.parametrize("name", LOADS)
def test_the_load_picture_needs_nothing_that_an_image_may_not_have(name):
    text = (PICTURES / name).read_text(encoding="utf-8")
    elements = {element.tag.removeprefix(SVG) for element in ElementTree.fromstring(text).iter()}
    assert elements == {"svg", "title", "desc", "style", "rect", "path", "g", "text", "tspan"}
    assert "@keyframes" in text
    for reference_to_a_file in ("url(", "@import", "href"):
        assert reference_to_a_file not in text


@needs_chromium
@pytest.mark.parametrize("name", LOADS)
def test_the_replay_shows_how_each_bot_takes_the_prompts(browser, name):
    moments = open_picture(browser, name).evaluate(REPLAY)
    complete = moments[0]  # a still image shows this
    assert all(complete)
    beginning = moments.index([""] * len(complete))
    for earlier, later in zip(moments[beginning:], moments[beginning + 1 :], strict=False):
        assert all(new.startswith(old) for old, new in zip(earlier, later, strict=True))

    def states(bot: str) -> list[list[str]]:
        """Return the progress of each of a bot's replies, by moment of the replay."""
        mine = slice(BOTS.index(bot) * len(PROMPTS), (BOTS.index(bot) + 1) * len(PROMPTS))
        return [
            [
                "waits" if not text else "done" if text == whole else "grows"
                for text, whole in zip(moment[mine], complete[mine], strict=True)
            ]
            for moment in moments[beginning:]
        ]

    assert max(state.count("grows") for state in states("Textbot")) == 1
    assert ["done", "grows", "waits", "waits"] in states("Textbot")
    assert ["grows", "grows", "waits", "waits"] in states("Batchbot")
    assert ["done", "done", "waits", "waits"] in states("Batchbot")
    assert ["done", "done", "grows", "grows"] in states("Batchbot")
    for one, two, *later in states("Batchbot"):
        assert later == ["waits", "waits"] or one == two == "done"
    assert any(state[0] == "grows" and "waits" not in state for state in states("Continuousbot"))


@needs_chromium
@pytest.mark.parametrize("name", LOADS)
def test_the_picture_stands_still_and_complete_if_less_motion_is_wanted(browser, name):
    page = open_picture(browser, name, reduced_motion="reduce")
    assert page.evaluate("document.getAnimations().length") == 0
    hidden = (
        "[...document.querySelectorAll('tspan')].filter("
        "(span) => getComputedStyle(span).visibility !== 'visible').length"
    )
    assert page.evaluate(hidden) == 0


@needs_chromium
@pytest.mark.parametrize("name", LOADS)
def test_the_picture_has_the_colors_of_its_surroundings_and_no_text_is_cut(browser, name):
    colors = set()
    for scheme in ("light", "dark"):
        page = open_picture(browser, name, color_scheme=scheme)
        look = "(selector) => getComputedStyle(document.querySelector(selector)).fill"
        colors.add((page.evaluate(look, ".paper"), page.evaluate(look, ".prompt")))
        assert page.evaluate(TOO_WIDE) == []
    assert len(colors) == 2


@needs_chromium
def test_the_picture_plays_inside_an_img(browser):
    page = browser.new_page(viewport={"width": 900, "height": 600})
    data = base64.b64encode((PICTURES / "load.svg").read_bytes()).decode()
    page.set_content(f'<img src="data:image/svg+xml;base64,{data}">')
    page.wait_for_function("document.images[0].complete")
    first = page.screenshot()
    wait_until(lambda: page.screenshot() != first, HANG_S, "the picture does not move")


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_film_of_the_chat_begins_and_ends_with_the_whole_conversation(scheme):
    with Image.open(PICTURES / f"chat-{scheme}.webp") as film:
        assert film.format == "WEBP" and film.info["loop"] == 0
        frames = []
        for number in (0, 1, film.n_frames // 2, film.n_frames - 1):
            film.seek(number)
            frames.append(film.convert("RGB"))
    with Image.open(PICTURES / f"chat-{scheme}.png") as still:
        frames.append(still.convert("RGB"))
    whole, *others = frames
    same = [ImageChops.difference(whole, frame).getbbox() is None for frame in others]
    assert same == [False, False, True, True]
    dark = sum(whole.getpixel((5, 5))) < 3 * 128
    assert dark == (scheme == "dark")


@pytest.mark.exhaustive
@needs_chromium
def test_the_pictures_can_be_made_again(tmp_path: Path):
    command = [sys.executable, "pictures/make.py", str(tmp_path)]
    made = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=MAKE_S)
    assert made.returncode == 0, made.stderr
    for path in tmp_path.iterdir():
        assert (PICTURES / path.name).is_file() and path.stat().st_size <= 1_000_000
    films = [f"chat-{scheme}.{kind}" for scheme in ("light", "dark") for kind in ("webp", "png")]
    assert {path.name for path in tmp_path.iterdir()} == {*LOADS, *films}
