"""The chat page in a real Chromium."""

import os
import re
import signal
from collections.abc import Iterator

import pytest
import requests
from bot_fixtures import (
    CHAT_MAX_NEW_TOKENS,
    EMOJI_PROMPT,
    EMOJI_REPLY,
    HANG_S,
    KEY,
    WITH_KEY,
    Bot,
    Bots,
    needs_chromium,
    reference,
)
from playwright.sync_api import Browser, Page, WebSocketRoute, expect
from websockets.sync.client import connect

HELLO, STORY = "Hello!", "Tell me a story about dogs."
PING_MS = 15_000
# Until Stop works: right after Send, a click counts as the second half of a double click.
PAUSE = "new Promise(r => setTimeout(r, swapped + DOUBLE_CLICK_MS - performance.now()))"
RECORD_STATES = """
states = [];
new MutationObserver(() => states.push(document.all.state.dataset.is))
  .observe(document.all.state, {attributes: true});
"""
pytestmark = needs_chromium


@pytest.fixture
def page(browser: Browser) -> Iterator[Page]:
    """A new tab. No problem may appear in its console."""
    page = new_page(browser)
    yield page
    page.context.close()
    assert page.problems == []


def new_page(browser: Browser, **options: object) -> Page:
    page = browser.new_context(**options).new_page()
    page.set_default_timeout(HANG_S * 1000)
    expect.set_options(timeout=HANG_S * 1000)
    page.problems = []
    page.on("pageerror", lambda error: page.problems.append(str(error)))
    page.on("console", lambda line: note_problem(page, line))
    return page


def note_problem(page: Page, line: object) -> None:
    if line.type in ("error", "warning"):
        page.problems.append(line.text)


@pytest.fixture
def chatbot(bots: Bots) -> Bot:
    bots.chatbot.gate.open()
    return bots.chatbot


def visit(page: Page, bot: Bot) -> None:
    page.goto(bot.http)
    expect(page.get_by_role("status")).to_have_text("ready")


def say(page: Page, prompt: str) -> None:
    page.get_by_label("Your message").fill(prompt)
    page.get_by_role("button", name="Send").click()


def last_reply(page: Page):
    return page.locator(".reply").last


def last_note(page: Page):
    return page.locator(".note").last


def test_a_reply_appears_word_by_word_with_its_speed_and_the_models_name(page, chatbot, loaded):
    chatbot.gate.hold_after(3)
    visit(page, chatbot)
    expect(page.get_by_role("heading")).to_have_text("tiny-dialog")
    say(page, STORY)
    expect(last_reply(page)).to_have_text(reference(loaded, [STORY], 3))
    expect(page.get_by_role("status")).to_have_text("replying")
    chatbot.gate.wait("step", 4)
    assert chatbot.gate.count("step") == 4  # the model waits before its fourth token
    expect(page.locator("#spoken")).to_be_empty()
    chatbot.gate.release()
    expect(page.get_by_role("status")).to_have_text("ready")
    story = reference(loaded, [STORY], CHAT_MAX_NEW_TOKENS)
    expect(page.get_by_role("log")).to_contain_text(story)
    expect(page.locator("#spoken")).to_have_text(story)  # a screen reader gets the whole reply
    expect(page.get_by_role("group", name="tiny-dialog")).to_have_text(story)
    tokens = len(loaded.tokenizer(story + loaded.tokenizer.eos_token)["input_ids"])
    assert last_note(page).inner_text().startswith(f"{tokens} tokens, ")
    assert last_note(page).inner_text().endswith(" tokens/s")


def test_no_other_page_may_embed_the_chat_page(browser, chatbot):
    page = new_page(browser)  # its console reports the refusal
    page.set_content(f'<iframe src="{chatbot.http}"></iframe>')
    expect(page.frame_locator("iframe").get_by_role("status")).to_have_count(0)
    assert any("frame-ancestors" in problem for problem in page.problems)
    page.context.close()


def test_stop_ends_the_reply_and_keeps_the_conversation(page, chatbot, loaded):
    chatbot.gate.hold_after(3)
    visit(page, chatbot)
    say(page, STORY)
    began = reference(loaded, [STORY], 3)
    expect(last_reply(page)).to_have_text(began)
    chatbot.gate.wait("step", 4)
    page.evaluate(PAUSE)
    page.get_by_role("button", name="Stop").click()
    expect(page.get_by_role("status")).to_have_text("ready")
    assert last_note(page).inner_text().endswith(", stopped")
    expect(page.locator("#spoken")).to_have_text(f"{began} stopped")
    chatbot.gate.release()
    chatbot.gate.wait("cancelled", 1)
    say(page, HELLO)
    turns = [STORY, began, HELLO]
    expect(last_reply(page)).to_have_text(reference(loaded, turns, CHAT_MAX_NEW_TOKENS))


def test_a_message_stopped_before_its_reply_is_said_to_be_forgotten(page, chatbot):
    chatbot.gate.hold_after(0)
    visit(page, chatbot)
    say(page, STORY)
    chatbot.gate.wait("step", 1)
    page.keyboard.press("Escape")
    expect(last_note(page)).to_have_text("0 tokens, stopped; this exchange is not remembered")


def test_a_double_click_sends_the_message_and_does_not_stop_its_reply(page, chatbot, loaded):
    chatbot.gate.hold_after(0)
    visit(page, chatbot)
    page.get_by_label("Your message").fill(STORY)
    page.get_by_role("button", name="Send").dblclick()
    chatbot.gate.wait("step", 1)
    chatbot.gate.open()
    expect(last_reply(page)).to_have_text(reference(loaded, [STORY], CHAT_MAX_NEW_TOKENS))
    expect(last_note(page)).not_to_contain_text("stopped")


def test_a_message_from_right_to_left_is_shown_so(page, chatbot):
    visit(page, chatbot)
    page.get_by_label("Your message").fill("שלום, 5 people?")
    direction = "element => getComputedStyle(element).direction"
    assert page.get_by_label("Your message").evaluate(direction) == "rtl"
    page.get_by_role("button", name="Send").click()
    assert page.locator(".mine").evaluate(direction) == "rtl"
    expect(page.get_by_role("status")).to_have_text("ready")
    assert last_note(page).evaluate(direction) == "ltr"


def test_a_waiting_user_sees_how_many_prompts_are_ahead(page, chatbot):
    chatbot.gate.hold_after(0)
    visit(page, chatbot)
    with connect(chatbot.ws) as other:
        other.send(HELLO)
        chatbot.gate.wait("step", 1)
        say(page, HELLO)
        expect(page.get_by_role("status")).to_have_text("waiting for its turn, 1 ahead")
        chatbot.gate.release()
        expect(page.get_by_role("status")).to_have_text("ready")


def test_two_tabs_have_two_conversations(page, browser, chatbot, loaded):
    other = new_page(browser)
    for tab, name in ((page, "Anna"), (other, "Ben")):
        visit(tab, chatbot)
        say(tab, f"My name is {name}.")
        expect(tab.get_by_role("status")).to_have_text("ready")
    for tab, name in ((page, "Anna"), (other, "Ben")):
        turns = [f"My name is {name}."]
        turns += [reference(loaded, turns, CHAT_MAX_NEW_TOKENS), "What is my name?"]
        say(tab, turns[-1])
        expect(last_reply(tab)).to_have_text(reference(loaded, turns, CHAT_MAX_NEW_TOKENS))
    other.context.close()
    assert other.problems == []


@pytest.mark.parametrize("served", ["chatbot"], indirect=True)
def test_the_page_reconnects_after_a_restart_and_says_that_the_conversation_is_new(
    browser, served, loaded
):
    page = new_page(browser)  # its console reports the connections that fail during the restart
    chatbot, process = served, served.call("process")
    chatbot.gate.hold_after(3)
    visit(page, chatbot)
    say(page, STORY)
    expect(last_reply(page)).to_have_text(reference(loaded, [STORY], 3))
    page.evaluate(RECORD_STATES)
    os.kill(process, signal.SIGKILL)
    expect(page.locator(".note", has_text="broken off")).to_have_count(1)
    chatbot.gate.wait("started", 1)
    chatbot.gate.open()
    expect(page.get_by_role("status")).to_have_text("ready")
    expect(last_note(page)).to_contain_text("The conversation begins anew")
    states = page.evaluate("states")
    assert "disconnected" in states
    assert states[-2:] == ["connecting", "ready"]
    say(page, HELLO)
    expect(last_reply(page)).to_have_text(reference(loaded, [HELLO], CHAT_MAX_NEW_TOKENS))
    page.context.close()


class Relay:
    """A relay between a page and its bot. A test can stop all messages or close the WebSocket."""

    def __init__(self, page: Page) -> None:
        self.dead = False
        self.sent: list[str] = []  # by the bot
        self.routes: list[WebSocketRoute] = []
        page.route_web_socket(re.compile("^ws:"), self.connect)

    def connect(self, route: WebSocketRoute) -> None:
        self.routes.append(route)
        server = route.connect_to_server()
        route.on_message(lambda text: None if self.dead else server.send(text))

        def to_page(text: str) -> None:
            if not self.dead:
                self.sent.append(text)
                route.send(text)

        server.on_message(to_page)


def test_the_page_treats_a_silent_connection_as_lost(page, chatbot):
    relay = Relay(page)
    page.clock.install(time=0)
    page.clock.pause_at(1)  # from here on, it runs only when told to
    visit(page, chatbot)
    for number in range(3):  # while the bot is there, its pongs come
        page.clock.run_for(PING_MS)
        while len(relay.sent) < number + 2:  # including the pong before it was ready
            page.wait_for_timeout(1)
    expect(page.get_by_role("status")).to_have_text("ready")
    assert relay.sent == ['{"type": "pong"}'] * 4
    relay.dead = True
    page.clock.run_for(2 * PING_MS)
    expect(page.get_by_role("status")).to_have_text("disconnected: nothing comes any more")
    relay.dead = False
    page.clock.run_for(1000)
    expect(page.get_by_role("status")).to_have_text("ready")
    assert len(relay.routes) == 2


def test_the_page_does_not_wake_an_idle_bot_before_the_user_types(page, chatbot):
    relay = Relay(page)
    page.clock.install(time=0)
    page.clock.pause_at(1)  # from here on, it runs only when told to
    visit(page, chatbot)
    relay.routes[0].close(code=1012, reason="this replica ends")
    expect(page.get_by_role("status")).to_have_text("disconnected: type to connect again")
    asked = []
    page.on("request", lambda request: asked.append(request.url))
    page.clock.run_for(60_000)
    assert (asked, len(relay.routes)) == ([], 1)
    page.keyboard.type("Hi")
    expect(page.get_by_role("status")).to_have_text("ready")
    assert len(relay.routes) == 2


def test_an_unanswered_message_returns_to_the_input_to_be_sent_again(page, chatbot):
    chatbot.gate.hold_after(0)
    relay = Relay(page)
    visit(page, chatbot)
    say(page, HELLO)
    chatbot.gate.wait("step", 1)
    relay.routes[0].close(code=1012, reason="this replica ends")
    expect(page.get_by_label("Your message")).to_have_value(HELLO)
    expect(page.locator(".note", has_text="not answered")).to_have_count(1)
    chatbot.gate.open()
    expect(page.get_by_role("status")).to_have_text("ready")
    page.get_by_role("button", name="Send").click()
    expect(last_reply(page)).to_have_class("reply")
    expect(page.get_by_label("Your message")).to_have_value("")


def test_the_page_never_shows_a_full_bot_as_ready(page, chatbot):
    page.route_web_socket(re.compile("^ws:"), lambda route: route.close(code=1013, reason="full"))
    page.add_init_script(f"addEventListener('DOMContentLoaded', () => {{{RECORD_STATES}}})")
    page.goto(chatbot.http)
    expect(page.get_by_role("status")).to_have_text("disconnected: full")
    assert "ready" not in page.evaluate("states")


def test_the_page_says_how_many_messages_the_model_has_forgotten(page, chatbot):
    visit(page, chatbot)
    for number in range(3):
        say(page, f"{'word ' * 30}{number}")
        expect(page.get_by_role("status")).to_have_text("ready")
    expect(page.locator(".note").first).not_to_contain_text("forgotten")
    expect(last_note(page)).to_contain_text("the first 4 messages are forgotten")


def test_the_page_shows_markup_in_prompts_as_text(page, chatbot):
    visit(page, chatbot)
    markup = "<img src=x onerror=\"document.title='hacked'\"><b>Hi</b>"
    say(page, markup)
    expect(page.locator(".mine")).to_have_text(markup)
    expect(page.get_by_role("status")).to_have_text("ready")
    assert page.locator("#log :is(img, b)").count() == 0
    assert page.title() == "tiny-dialog"


def test_the_page_asks_for_the_key_and_shows_markup_in_replies_as_text(browser, bots: Bots):
    bots.emoji_chatbot.gate.open()
    page = new_page(browser)  # its console reports the refused key
    page.goto(bots.emoji_chatbot.http)
    expect(page.get_by_role("status")).to_have_text("disconnected: it needs a key")
    expect(page.get_by_label("API key")).to_be_focused()
    for key, state in (("wrong 🔑", "disconnected: the key was refused"), (KEY, "ready")):
        page.keyboard.type(key)
        page.keyboard.press("Enter")
        expect(page.get_by_role("status")).to_have_text(state)
    say(page, EMOJI_PROMPT)
    expect(last_reply(page)).to_have_text(EMOJI_REPLY)
    assert page.locator("#log b").count() == 0
    assert page.evaluate("[localStorage.length, sessionStorage.length, document.cookie]") == [
        0,
        0,
        "",
    ]
    page.reload()  # the key was in memory only
    expect(page.get_by_role("status")).to_have_text("disconnected: it needs a key")
    page.context.close()


def test_the_page_works_with_a_keyboard_alone(page, chatbot, loaded):
    chatbot.gate.hold_after(2)
    visit(page, chatbot)
    expect(page.get_by_label("Your message")).to_be_focused()
    page.keyboard.type("Hello!")
    page.keyboard.press("Shift+Enter")
    page.keyboard.type("Are you there?")
    page.keyboard.press("Enter")
    expect(page.locator(".mine")).to_have_text("Hello!\nAre you there?")
    chatbot.gate.wait("step", 3)
    page.keyboard.press("Tab")
    expect(page.get_by_role("button", name="Stop")).to_be_focused()
    page.keyboard.press("Enter")
    expect(page.get_by_role("status")).to_have_text("ready")
    expect(page.get_by_label("Your message")).to_be_focused()
    page.keyboard.type("Hello!")
    page.keyboard.press("Enter")
    expect(page.get_by_role("status")).to_have_text("replying")
    page.keyboard.press("Escape")
    expect(page.get_by_role("status")).to_have_text("ready")
    page.keyboard.press("Shift+Tab")
    expect(page.get_by_role("log")).to_be_focused()  # so that the arrow keys scroll it


def test_a_message_written_during_a_reply_waits_in_the_input(page, chatbot, loaded):
    chatbot.gate.hold_after(2)
    visit(page, chatbot)
    say(page, STORY)
    chatbot.gate.wait("step", 3)
    page.get_by_label("Your message").fill("Hello!")
    page.keyboard.press("Enter")
    expect(page.get_by_role("status")).to_have_text("still replying: send it afterwards")
    chatbot.gate.release()
    expect(page.get_by_role("status")).to_have_text("ready")
    expect(page.locator(".mine")).to_have_text(STORY)
    expect(page.get_by_label("Your message")).to_have_value("Hello!")


def test_a_blank_message_is_not_sent_and_one_that_is_too_long_is_answered(page, chatbot, loaded):
    visit(page, chatbot)
    page.keyboard.type("  ")
    page.keyboard.press("Enter")
    expect(page.locator(".mine")).to_have_count(0)
    say(page, "word " * 400)
    expect(page.get_by_role("status")).to_have_text("ready")
    expect(last_note(page)).to_contain_text("the prompt has 403 tokens")
    expect(page.get_by_label("Your message")).to_have_value("word " * 400)  # to shorten it
    say(page, HELLO)
    expect(last_reply(page)).to_have_text(reference(loaded, [HELLO], CHAT_MAX_NEW_TOKENS))


def test_the_query_of_the_page_sets_the_options_of_replies(page, chatbot, loaded):
    page.goto(f"{chatbot.http}?max_new_tokens=4")
    say(page, STORY)
    expect(last_reply(page)).to_have_text(reference(loaded, [STORY], 4))
    expect(last_note(page)).to_contain_text("ended at the limit")
    refused = requests.get(f"{chatbot.http}?temperature=9", timeout=HANG_S)
    assert (refused.status_code, refused.json()["detail"][0]["loc"]) == (
        422,
        ["query", "temperature"],
    )


def test_the_pages_address_needs_no_trailing_slash(page, chatbot, loaded):
    page.goto(chatbot.http.rstrip("/"))
    expect(page.get_by_role("status")).to_have_text("ready")
    say(page, HELLO)
    expect(last_reply(page)).to_have_text(reference(loaded, [HELLO], CHAT_MAX_NEW_TOKENS))


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_page_fits_a_phone_and_suits_light_and_dark(browser, chatbot, scheme):
    page = new_page(browser, viewport={"width": 360, "height": 640}, color_scheme=scheme)
    visit(page, chatbot)
    say(page, "A" * 200)
    expect(page.get_by_role("status")).to_have_text("ready")
    assert page.evaluate("document.documentElement.scrollWidth") == 360
    assert page.evaluate("document.querySelector('#log').scrollWidth") <= 360
    paper = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (paper == "rgb(255, 255, 255)") == (scheme == "light")
    page.context.close()
    assert page.problems == []


def test_the_page_follows_a_reply_unless_the_user_scrolls_up(browser, chatbot):
    page = new_page(browser, viewport={"width": 360, "height": 400})
    visit(page, chatbot)
    for _ in range(3):
        say(page, STORY)
        expect(page.get_by_role("status")).to_have_text("ready")
    left = "(log => log.scrollHeight - log.scrollTop - log.clientHeight)(document.all.log)"
    assert page.evaluate(left) < 2
    chatbot.gate.hold_after(1)
    say(page, STORY)
    expect(last_reply(page)).not_to_be_empty()  # all text so far has arrived
    page.evaluate("document.all.log.scrollTop = 0")
    page.evaluate("new Promise(done => requestAnimationFrame(() => requestAnimationFrame(done)))")
    chatbot.gate.release()  # now that the page knows that the user has scrolled
    expect(page.get_by_role("status")).to_have_text("ready")
    assert page.evaluate("document.all.log.scrollTop") == 0
    page.context.close()
    assert page.problems == []


@pytest.mark.parametrize("method", ["GET", "HEAD"])
def test_the_page_is_there_without_the_key_and_nothing_else_is(bots: Bots, method):
    response = requests.request(method, bots.emoji_chatbot.http, timeout=HANG_S)
    assert (response.status_code, response.headers["WWW-Authenticate"]) == (200, "Bearer")
    assert "X-Model" not in response.headers
    policy = response.headers["Content-Security-Policy"]
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy
    for bot, headers in ((bots.chatbot, {}), (bots.emoji_chatbot, WITH_KEY)):
        response = requests.request(method, bot.http, headers=headers, timeout=HANG_S)
        assert "WWW-Authenticate" not in response.headers
        assert response.headers["X-Model"]
    for path in ("docs", "openapi.json"):
        refused = requests.request(method, bots.emoji_chatbot.http + path, timeout=HANG_S)
        assert refused.status_code == 401
    assert requests.post(bots.emoji_chatbot.http, timeout=HANG_S).status_code == 401


def test_the_page_retries_a_full_bot_less_often_and_shows_its_reason(browser, chatbot):
    page = new_page(browser)
    page.route_web_socket("**", lambda socket: socket.close(code=1013, reason="too many chats"))
    page.goto(chatbot.http)
    expect(page.get_by_role("status")).to_have_text("disconnected: too many chats")
    assert page.evaluate("tries") > page.evaluate("RETRY_MS.length")
    page.context.close()
    assert page.problems == []
