"""The client scripts as people run them: subprocesses, pipes and terminals."""

import json
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import TextIO

import pytest
from bot_fixtures import (
    CHAT_MAX_NEW_TOKENS,
    EMOJI_PROMPT,
    EMOJI_REPLY,
    KEY,
    MAX_NEW_TOKENS,
    REPOSITORY,
    Bot,
    Bots,
    free_port,
    reference,
)
from connection import printable, probe
from load_client import Row, outcome_of
from load_client import parser as load_client_parser
from products import cases
from terminal import HELP
from terminals import Terminal
from websockets.http11 import Request, Response
from websockets.sync.client import connect
from websockets.sync.server import ServerConnection, serve

HANG_S = 60
STREAM, CHAT, LOAD = (f"clients/{name}_client.py" for name in ("stream", "chat", "load"))
STORY = "Tell me a story about dogs."


def run(
    script: str, *arguments: str, stdin: str = "", stdout: TextIO | int = subprocess.PIPE
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, script, *arguments],
        cwd=REPOSITORY,
        input=stdin,
        stdout=stdout,
        stderr=subprocess.PIPE,
        text=True,
        timeout=HANG_S,
    )


@pytest.fixture(autouse=True)
def open_gates(bots: Bots):
    for bot in bots.started.values():
        bot.gate.open()


HTTP_BOTS = cases(["textbot", "batchbot", "continuousbot"], chosen=lambda bot: bot == "textbot")


@pytest.mark.parametrize("name", HTTP_BOTS)
def test_the_stream_client_asks_for_a_story_about_dogs(bots: Bots, loaded, name):
    ran = run(STREAM, "--url", getattr(bots, name).http)
    story = reference(loaded, ["Tell me a story about dogs."], MAX_NEW_TOKENS)
    assert (ran.stdout, ran.stderr, ran.returncode) == (story + "\n", "", 0)


@pytest.mark.parametrize("script", [STREAM, CHAT])
def test_the_clients_give_the_key_that_a_bot_asks_for(bots: Bots, tmp_path, script):
    if script == STREAM:
        arguments = [EMOJI_PROMPT, "--url", bots.emoji_textbot.http]
    else:
        arguments = ["--url", bots.emoji_chatbot.ws]
    (tmp_path / "key").write_text(KEY + "\n")
    ran = run(script, *arguments, "--api-key-file", str(tmp_path / "key"), stdin=EMOJI_PROMPT)
    assert (ran.stdout, ran.stderr, ran.returncode) == (EMOJI_REPLY + "\n", "", 0)
    ran = run(script, *arguments, stdin=EMOJI_PROMPT)
    assert (ran.stdout, ran.returncode) == ("", 1)
    assert "401" in ran.stderr


@pytest.mark.parametrize("name", HTTP_BOTS)
def test_the_stream_client_takes_a_prompt_and_a_limit(bots: Bots, loaded, name):
    ran = run(STREAM, "Hello!", "--max-new-tokens", "3", "--url", getattr(bots, name).http)
    assert ran.stdout == reference(loaded, ["Hello!"], 3) + "\n"


def test_the_stream_client_prints_text_as_it_arrives(bots: Bots):
    bots.textbot.gate.hold_after(1)
    command = [sys.executable, STREAM, "--url", bots.textbot.http]
    with subprocess.Popen(command, cwd=REPOSITORY, stdout=subprocess.PIPE) as client:
        assert client.stdout.read(1)  # the model now waits before its second token
        bots.textbot.gate.release()
        assert client.stdout.read()


def test_the_chat_client_prints_a_reply_for_each_line(bots: Bots, loaded):
    prompts, turns = ["Space the final", " These are the voyages"], []
    ran = run(CHAT, "--url", bots.chatbot.ws, stdin="\n".join(prompts))
    for prompt in prompts:
        turns.append(prompt)
        turns.append(reference(loaded, turns, CHAT_MAX_NEW_TOKENS))
    assert (ran.stdout, ran.stderr, ran.returncode) == (f"{turns[1]}\n{turns[3]}\n", "", 0)


def test_the_chat_client_prints_text_as_it_arrives(bots: Bots):
    bots.chatbot.gate.hold_after(1)
    command = [sys.executable, CHAT, "--url", bots.chatbot.ws]
    with subprocess.Popen(
        command, cwd=REPOSITORY, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as client:
        client.stdin.write(b"Hello!\n")
        client.stdin.close()
        assert client.stdout.read(1)
        bots.chatbot.gate.release()
        assert client.stdout.read()


def chat_on_a_terminal(bot: Bot) -> tuple[Terminal, str]:
    """Return a chat client that waits for a prompt, and the lines at the top of its screen."""
    terminal = Terminal(CHAT, "--url", bot.ws)
    top = f"tiny-dialog.\n{HELP}\n"
    terminal.expect(f"{top}>")
    return terminal, top


@pytest.mark.parametrize("keys", ["\x04", "/quit\r"], ids=["ctrl-d", "quit"])
def test_a_user_can_chat_on_a_terminal_and_leave(bots: Bots, loaded, keys):
    terminal, top = chat_on_a_terminal(bots.chatbot)
    reply = reference(loaded, ["Hello!"], CHAT_MAX_NEW_TOKENS)
    terminal.type("Hello!\r")
    terminal.expect(f"{top}> Hello!\n{reply}\n>")
    terminal.type(keys)
    assert terminal.end() == 0
    assert terminal.shown.startswith(f"{top}> Hello!\n{reply}\n>")
    assert "Traceback" not in terminal.shown


def test_ctrl_c_at_the_prompt_drops_the_line_and_keeps_the_conversation(bots: Bots, loaded):
    """It may have been meant for a reply that had just ended."""
    terminal, top = chat_on_a_terminal(bots.chatbot)
    terminal.type("Half a prom")
    terminal.expect(f"{top}> Half a prom")
    terminal.type("\x03")
    terminal.expect(f"{top}> Half a prom\n{HELP}\n>")
    reply = reference(loaded, ["Hello!"], CHAT_MAX_NEW_TOKENS)
    terminal.type("Hello!\r")
    terminal.expect(f"{top}> Half a prom\n{HELP}\n> Hello!\n{reply}\n>")
    terminal.type("\x04")
    assert terminal.end() == 0


def test_a_user_can_type_several_lines_and_recall_an_earlier_prompt(bots: Bots, loaded):
    terminal, top = chat_on_a_terminal(bots.chatbot)
    turns = ["Hello!\nTell me a joke."]
    turns.append(reference(loaded, turns, CHAT_MAX_NEW_TOKENS))
    terminal.type("Hello!\x1b\rTell me a joke.\r")
    once = f"{top}> Hello!\n  Tell me a joke.\n{turns[1]}\n>"
    terminal.expect(once)
    turns.append(turns[0])
    terminal.type("\x1b[A\r")  # the up arrow key, and Enter
    again = reference(loaded, turns, CHAT_MAX_NEW_TOKENS)
    terminal.expect(f"{once} Hello!\n  Tell me a joke.\n{again}\n>")
    terminal.type("\x04")
    assert terminal.end() == 0


def test_reset_begins_a_new_conversation(bots: Bots, loaded):
    terminal, top = chat_on_a_terminal(bots.chatbot)
    told, asked = "My name is Anna.", "What is my name?"
    answer = reference(loaded, [told], CHAT_MAX_NEW_TOKENS)
    forgotten = reference(loaded, [asked], CHAT_MAX_NEW_TOKENS)
    assert "Anna" not in forgotten
    terminal.type(f"{told}\r")
    terminal.expect(f"{top}> {told}\n{answer}\n>")
    terminal.type("/reset\r")
    again = f"{top}> {told}\n{answer}\n> /reset\n(a new conversation)\n>"
    terminal.expect(again)
    terminal.type(f"{asked}\r")
    terminal.expect(f"{again} {asked}\n{forgotten}\n>")
    terminal.type("/rest\r")
    terminal.expect(f"{again} {asked}\n{forgotten}\n> /rest\n{HELP}\n>")
    terminal.type("\x04")
    assert terminal.end() == 0


def test_ctrl_c_stops_a_reply_and_the_conversation_continues(bots: Bots, loaded):
    gate = bots.chatbot.gate
    gate.hold_after(3)
    terminal, top = chat_on_a_terminal(bots.chatbot)
    began = reference(loaded, [STORY], 3)
    terminal.type(f"{STORY}\r")
    terminal.expect(f"{top}> {STORY}\n{began}")
    gate.wait("step", 4)
    terminal.type("\x03")
    terminal.expect(f"{top}> {STORY}\n{began}^C (stopped)\n>")
    gate.release()
    gate.wait("cancelled", 1)
    terminal.type("Hello!\r")
    reply = reference(loaded, [STORY, began, "Hello!"], CHAT_MAX_NEW_TOKENS)
    terminal.expect(f"{top}> {STORY}\n{began}^C (stopped)\n> Hello!\n{reply}\n>")
    terminal.type("\x04")
    assert terminal.end() == 0


def test_a_waiting_user_is_told_on_a_terminal_how_many_prompts_are_ahead(bots: Bots, loaded):
    gate = bots.chatbot.gate
    gate.hold_after(0)
    with connect(bots.chatbot.ws) as other:
        other.send("Hello!")
        gate.wait("step", 1)
        terminal, top = chat_on_a_terminal(bots.chatbot)
        terminal.type("Hello!\r")
        terminal.expect(f"{top}> Hello!\n(1 ahead)")
        gate.release()
        reply = reference(loaded, ["Hello!"], CHAT_MAX_NEW_TOKENS)
        terminal.expect(f"{top}> Hello!\n(1 ahead)\n{reply}\n>")
        terminal.type("\x04")
        assert terminal.end() == 0


def test_a_user_is_told_on_a_terminal_how_many_messages_the_model_has_forgotten():
    def answer(websocket: ServerConnection) -> None:
        websocket.recv()
        for message in (
            {"type": "waiting", "ahead": 1},
            {"type": "waiting", "ahead": 0},
            {"type": "text", "text": "Hi!"},
            {"type": "done", "messages": 4, "dropped": 2},
        ):
            websocket.send(json.dumps(message))
        websocket.recv()

    with chat_server(answer) as url:
        terminal = Terminal(CHAT, "--url", url, "--wait", "0")
        top = f"{url}.\n{HELP}\n"
        terminal.expect(f"{top}>")
        terminal.type("Hello!\r")
        told = "(1 ahead)\nHi!\n(the first 2 messages are forgotten)"
        terminal.expect(f"{top}> Hello!\n{told}\n>")
        terminal.type("\x04")
        assert terminal.end() == 0


def test_ctrl_c_leaves_while_the_chat_client_connects_again():
    def answer(websocket: ServerConnection) -> None:
        websocket.recv()
        websocket.close(1012, "this replica ends")

    with chat_server(answer) as url:
        terminal = Terminal(CHAT, "--url", url)
        terminal.expect(f"{url}.\n{HELP}\n>")
    terminal.type("Hello!\r")
    waiting = f"waiting up to 60 s for {url} (Ctrl-C leaves)"
    terminal.wait_for(lambda shown: waiting in shown, waiting)
    terminal.type("\x03")
    assert terminal.end() == 130


def test_ctrl_c_leaves_the_stream_client_in_the_middle_of_a_reply(bots: Bots, loaded):
    bots.textbot.gate.hold_after(3)
    terminal = Terminal(STREAM, "--url", bots.textbot.http)
    began = reference(loaded, [STORY], 3)
    terminal.expect(began)
    terminal.type("\x03")
    assert terminal.end() == 130
    assert terminal.shown == f"{began}^C"
    bots.textbot.gate.wait("left", 1)


@pytest.mark.parametrize(
    ("name", "states"),
    [
        ("textbot", ["replying", "waiting", "waiting", "waiting"]),
        ("chatbot", ["replying", "waiting", "waiting", "waiting"]),
        ("continuousbot", ["replying"] * 4),
    ],
)
def test_the_load_client_shows_which_prompts_are_answered_and_which_wait(bots: Bots, name, states):
    bot = getattr(bots, name)
    bot.gate.hold_after(0)
    url = bot.ws if name == "chatbot" else bot.http
    terminal = Terminal(LOAD, "--url", url, "--num-prompts", "4", STORY)
    bot.gate.wait("submitted", 4)
    bot.gate.release(8)
    for state in set(states):
        terminal.wait_for(lambda shown, state=state: shown.count(state) == states.count(state))
    bot.gate.release()
    terminal.wait_for(lambda shown: shown.count("finished") == 4)
    assert terminal.end() == 0


@pytest.mark.parametrize("name", [*HTTP_BOTS, "chatbot"])
def test_the_load_client_prints_how_each_reply_ended(bots: Bots, loaded, name):
    bot = getattr(bots, name)
    url = bot.ws if name == "chatbot" else bot.http
    ran = run(LOAD, "--url", url, "--num-prompts", "3", "Hello!", "Tell me a joke.")
    lines = [line.split("│") for line in ran.stdout.splitlines() if "│" in line]
    replies = [
        reference(loaded, [prompt], CHAT_MAX_NEW_TOKENS)
        for prompt in ("Hello!", "Tell me a joke.", "Hello!")
    ]
    shown = [words for line in lines for words in line[2].split()]
    assert shown == [word for reply in replies for word in reply.split()]
    ended = [line for line in lines if line[5].strip()]
    assert [line[5].strip() for line in ended] == ["finished"] * 3
    for line in ended:
        assert line[3].strip().endswith(" ms")
        assert int(line[4]) > 0
    assert (ran.stderr, ran.returncode) == ("", 0)


def test_the_load_client_reports_refused_and_failed_prompts(bots: Bots):
    ran = run(LOAD, "--url", bots.textbot.http, " ", "Hello!")
    assert (ran.stdout.count("refused"), ran.stdout.count("finished")) == (1, 1)
    assert ran.returncode == 1
    for bot, url in ((bots.textbot, bots.textbot.http), (bots.chatbot, bots.chatbot.ws)):
        bot.gate.fail_at(3)
        ran = run(LOAD, "--url", url, "Hello!")
        assert ran.stdout.count("failed: ") == 1
        assert ran.returncode == 1


@pytest.mark.parametrize(("script", "scheme"), [(STREAM, "http"), (CHAT, "ws")])
def test_an_unreachable_server_is_a_one_line_error_with_status_1(script, scheme):
    url = f"{scheme}://127.0.0.1:{free_port()}/"
    ran = run(script, "--url", url, "--wait", "0", stdin="Hello!\n")
    assert ran.returncode == 1
    assert ran.stderr.startswith(f"nothing answers at {url}: is a bot running?")
    assert ran.stderr.count("\n") == 1
    ran = run(script, "--url", url, "--wait", "1", stdin="Hello!\n")
    assert ran.stderr.startswith(f"waiting up to 1 s for {url} (Ctrl-C leaves)\nnothing answers")


@pytest.mark.parametrize("script", [STREAM, CHAT, LOAD])
@pytest.mark.parametrize("url", ["localhost:8000", "http://localhost:80a/", "http://[::1/"])
def test_a_bad_url_is_named(script, url):
    ran = run(script, "--url", url, stdin="Hello!\n")
    assert ran.returncode == 2
    assert ran.stderr.endswith(f"--url: {url!r} is not like http://localhost:8000/\n")


@pytest.mark.parametrize("script", [STREAM, CHAT])
def test_a_full_disk_is_named(bots: Bots, script):
    bot = bots.textbot.http if script == STREAM else bots.chatbot.ws
    with open("/dev/full", "w") as full:
        ran = run(script, "--url", bot, stdin="Hello!\n", stdout=full)
    assert (ran.stderr, ran.returncode) == ("[Errno 28] No space left on device\n", 1)


def test_a_reply_is_printed_even_where_emoji_cannot_be(bots: Bots, tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONIOENCODING", "ascii")
    (tmp_path / "key").write_text(KEY)
    key = ["--api-key-file", str(tmp_path / "key")]
    ran = run(STREAM, EMOJI_PROMPT, "--url", bots.emoji_textbot.http, *key)
    ascii_reply = EMOJI_REPLY.encode("ascii", "replace").decode()
    assert (ran.stdout, ran.stderr, ran.returncode) == (ascii_reply + "\n", "", 0)


@pytest.mark.parametrize("name", HTTP_BOTS[:2])
def test_a_server_that_fails_in_mid_stream_is_a_one_line_error_with_status_1(bots: Bots, name):
    bot = getattr(bots, name)
    bot.gate.fail_at(3)
    ran = run(STREAM, "--url", bot.http)
    assert ran.returncode == 1
    assert ran.stdout.strip()
    assert ran.stderr == f"{bot.http} failed in the middle of the reply\n"


def test_a_failed_chat_reply_is_a_one_line_error_with_status_1_and_later_replies_come(
    bots: Bots, loaded
):
    bots.chatbot.gate.fail_at(3)
    ran = run(CHAT, "--url", bots.chatbot.ws, stdin="Hello!\nTell me a joke.\n")
    assert ran.returncode == 1
    assert ran.stderr == "the reply failed: RuntimeError\n"
    began = reference(loaded, ["Hello!"], 2)
    joke = reference(loaded, ["Tell me a joke."], CHAT_MAX_NEW_TOKENS)
    assert ran.stdout == f"{began}\n{joke}\n"


@contextmanager
def http_server(handler: type[BaseHTTPRequestHandler]) -> Iterator[str]:
    """Yield the URL of a server with this handler."""
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server, ThreadPoolExecutor(1) as thread:
        thread.submit(server.serve_forever)
        try:
            yield f"http://127.0.0.1:{server.server_port}/"
        finally:
            server.shutdown()


@contextmanager
def chat_server(answer: Callable[[ServerConnection], None]) -> Iterator[str]:
    """Yield the URL of a server that speaks chat.v1 and answers a probe."""

    def answer_probe(connection: ServerConnection, request: Request) -> Response | None:
        asks = "Upgrade" in request.headers
        return None if asks else connection.respond(200, "")

    with (
        serve(
            answer, "127.0.0.1", 0, subprotocols=["chat.v1"], process_request=answer_probe
        ) as server,
        ThreadPoolExecutor(1) as thread,
    ):
        thread.submit(server.serve_forever)
        try:
            yield f"ws://127.0.0.1:{server.socket.getsockname()[1]}/"
        finally:
            server.shutdown()


def test_the_chat_client_resends_a_prompt_that_an_ending_replica_did_not_answer():
    told: list[str] = []

    def answer(websocket: ServerConnection) -> None:
        told.append(websocket.recv())
        if len(told) <= 2:  # one after the other
            websocket.close(1012, "this replica ends")
        else:
            websocket.send('{"type": "text", "text": "Hi!"}')
            websocket.send('{"type": "done"}')
            websocket.recv()

    with chat_server(answer) as url:
        ran = run(CHAT, "--url", url, stdin="Hello!\n")
    assert (ran.stdout, ran.returncode) == ("Hi!\n", 0)
    assert ran.stderr == 2 * "(connected again: a new conversation)\n"
    assert [json.loads(message)["prompt"] for message in told] == ["Hello!"] * 3


def test_a_given_key_takes_precedence_over_one_in_netrc(bots: Bots, tmp_path, monkeypatch):
    (tmp_path / ".netrc").write_text("machine 127.0.0.1 login me password wrong\n")
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "key").write_text(KEY)
    bot = bots.emoji_chatbot
    options = ["--url", bot.http, "--api-key-file", str(tmp_path / "key"), "--wait", "0"]
    assert "405" in run(STREAM, *options).stderr  # not 401: the bot has a page here, but no POST


def test_a_client_for_other_bots_names_the_one_to_use(bots: Bots):
    refused = run(STREAM, "--url", bots.chatbot.http)
    assert refused.stderr.endswith("(the Chatbot? ask it with clients/chat_client.py)\n")
    url = bots.textbot.http.replace("http", "ws")
    refused = run(CHAT, "--url", url, stdin="Hello!\n")
    assert refused.stderr.endswith("(not the Chatbot? ask it with clients/stream_client.py)\n")
    assert refused.returncode == 1
    refused = run(LOAD, "--url", bots.chatbot.http, "Hello!")
    assert refused.stderr == "the Chatbot? add --url ws://localhost:8000/\n"
    refused = run(LOAD, "--url", url, "Hello!")
    assert refused.stderr == "not the Chatbot? add --url http://localhost:8000/\n"
    assert refused.returncode == 1


@pytest.mark.parametrize(("script", "scheme"), [(STREAM, "https"), (CHAT, "wss")])
def test_the_clients_report_a_server_without_tls(bots: Bots, script, scheme):
    url = f"{scheme}://{bots.textbot.address}"
    ran = run(script, "--url", url, "--wait", "0", stdin="Hello!\n")
    assert ran.stderr.startswith(f"cannot talk to {url}: ")
    assert ("SSL" in ran.stderr, ran.returncode) == (True, 1)


@pytest.mark.parametrize(
    ("status", "headers", "body", "starting"),
    [
        (404, {}, "Path '/' not found. Ping http://.../-/routes for available routes.", True),
        (404, {}, "Not Found", False),
        (503, {}, "No replica is ready.", True),
        (503, {"Retry-After": "10"}, "Too many requests wait.", False),
        (405, {}, "", False),
    ],
)
def test_a_serve_without_its_bot_yet_counts_as_not_answering(status, headers, body, starting):
    class Answering(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(body.encode())

    with http_server(Answering) as url:
        assert (probe(url, {}) is None) == starting


def test_the_stream_client_reports_a_server_that_closes_without_an_answer():
    class Closing(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(405)
            self.end_headers()

        def do_POST(self) -> None:
            self.close_connection = True

    with http_server(Closing) as url:
        assert (
            run(STREAM, "--url", url).stderr == f"{url} closed the connection before it answered\n"
        )


@pytest.mark.parametrize(
    ("code", "outcome"),
    [(1013, "refused 1013"), (1009, "refused 1009"), (1011, "failed: closed with 1011")],
)
def test_the_load_client_knows_a_refusal_by_its_code(code, outcome):
    def close(websocket: ServerConnection) -> None:
        websocket.close(code)

    row = Row("Hello!")
    with chat_server(close) as url:
        row.run(load_client_parser().parse_args(["--url", url]), {}, 0)
    assert row.outcome == outcome
    statuses = [outcome_of(status) for status in (422, 500, 503)]
    assert statuses == ["refused 422", "failed: 500", "refused 503"]


@pytest.mark.parametrize(
    "wrong", [["--num-prompts", "0"], ["--interval", "-1"], ["--interval", "nan"]]
)
def test_the_load_client_says_which_numbers_are_possible(wrong):
    ran = run(LOAD, *wrong)
    assert ran.stderr.startswith(f"{wrong[0]} must be ")
    assert (len(ran.stderr.splitlines()), ran.returncode) == (1, 1)


def test_a_servers_error_message_cannot_control_the_terminal():
    def answer(websocket: ServerConnection) -> None:
        websocket.recv()
        websocket.send(json.dumps({"type": "error", "detail": "\x1b[31mno"}))
        websocket.recv()
        websocket.close(1011, "\x1b[2Jgone")

    with chat_server(answer) as url:
        ran = run(CHAT, "--url", url, stdin="Hello!\nHello!\n")
    assert ran.stderr == f"[31mno\n{url} closed the connection: 1011 [2Jgone\n"


def test_a_servers_refusal_message_cannot_control_the_terminal():
    class Refusing(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            self.send_response(422)
            self.send_header("Content-Type", "text/plain; charset=utf-8")
            self.end_headers()
            self.wfile.write(b"\x1b[2Jno")

        do_GET = do_POST

    with http_server(Refusing) as url:
        ran = run(STREAM, "--url", url)
    assert ran.stderr == f"{url} answered 422: [2Jno\n"


def test_a_chat_with_unread_output_stays_connected():
    """In `less`, the pipe fills up. The client must still answer the server's pings."""
    answered = threading.Event()

    def answer(websocket: ServerConnection) -> None:
        websocket.recv()
        for _ in range(64):  # more than a pipe holds, in more messages than a client buffers
            websocket.send(json.dumps({"type": "text", "text": "x" * 10_000}))
        if websocket.ping().wait(HANG_S):
            answered.set()
        websocket.send('{"type": "done"}')
        websocket.recv()

    with chat_server(answer) as url:
        command = [sys.executable, CHAT, "--url", url]
        with subprocess.Popen(
            command, cwd=REPOSITORY, stdin=subprocess.PIPE, stdout=subprocess.PIPE
        ) as client:
            client.stdin.write(b"Hello!\n")
            client.stdin.close()
            was_answered = answered.wait(HANG_S)
            assert client.stdout.read() == b"x" * 640_000 + b"\n"
    assert was_answered


@pytest.mark.parametrize("script", [STREAM, CHAT])
def test_a_client_in_a_script_does_not_succeed_if_ctrl_c_interrupts_it(bots: Bots, script):
    bot = bots.textbot if script == STREAM else bots.chatbot
    bot.gate.hold_after(1)
    url = bot.http if script == STREAM else bot.ws
    with subprocess.Popen(
        [sys.executable, script, "--url", url],
        cwd=REPOSITORY,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    ) as client:
        client.stdin.write(b"Hello!\n")
        client.stdin.close()
        client.stdout.read(1)
        client.send_signal(signal.SIGINT)
        assert client.wait(HANG_S) == 130
    bot.gate.wait("left", 1)
    bot.gate.release()


@pytest.mark.parametrize("script", [STREAM, CHAT])
def test_a_reader_that_closes_the_pipe_early_causes_no_error(bots: Bots, script):
    url = bots.textbot.http if script == STREAM else bots.chatbot.ws
    ask = f"echo Tell me a story about dogs. | {sys.executable} {script} --url {url}"
    ran = subprocess.run(
        f"{ask} | head -c 4", shell=True, cwd=REPOSITORY, capture_output=True, timeout=HANG_S
    )
    assert (len(ran.stdout), ran.stderr) == (4, b"")


def test_the_text_of_a_model_cannot_control_the_terminal():
    assert printable("\x1b]0;title\x07żółw\n\t🐢\x9b2J") == "]0;titleżółw\n\t🐢2J"
    assert printable("ab\u202edc\u2069👩‍👧") == "abdc👩‍👧"


def test_a_refusal_is_a_one_line_error_with_status_1(bots: Bots):
    ran = run(STREAM, " ", "--url", bots.textbot.http)
    assert ran.returncode == 1
    assert ran.stderr.startswith(f"{bots.textbot.http} answered 422: ")
    assert "prompt" in ran.stderr
    assert ran.stderr.count("\n") == 1
