"""The client scripts as people run them: subprocesses, pipes and terminals."""

import subprocess
import sys

import pexpect
import pytest
from running_bots import (
    CHAT_MAX_NEW_TOKENS,
    EMOJI_PROMPT,
    EMOJI_REPLY,
    KEY,
    MAX_NEW_TOKENS,
    REPOSITORY,
    Bots,
    free_port,
    reference,
)

HANG_S = 60
STREAM, CHAT = "clients/stream_client.py", "clients/chat_client.py"


def run(script: str, *arguments: str, stdin: str = "") -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, script, *arguments],
        cwd=REPOSITORY,
        input=stdin,
        capture_output=True,
        text=True,
        timeout=HANG_S,
    )


def on_a_terminal(script: str, *arguments: str) -> pexpect.spawn:
    return pexpect.spawn(
        sys.executable,
        [script, *arguments],
        cwd=REPOSITORY,
        timeout=HANG_S,
        encoding="utf-8",
    )


@pytest.fixture(autouse=True)
def open_gates(bots: Bots):
    for bot in bots:
        bot.gate.open()


@pytest.mark.parametrize("name", ["textbot", "batchbot", "continuousbot"])
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


@pytest.mark.parametrize("name", ["textbot", "batchbot"])
def test_the_stream_client_takes_a_prompt_and_a_limit(bots: Bots, loaded, name):
    ran = run(STREAM, "Hello!", "--max-new-tokens", "3", "--url", getattr(bots, name).http)
    assert ran.stdout == reference(loaded, ["Hello!"], 3) + "\n"


def test_the_stream_client_prints_text_as_it_arrives(bots: Bots):
    bots.textbot.gate.hold_after(1)
    command = [sys.executable, STREAM, "--url", bots.textbot.http]
    with subprocess.Popen(command, cwd=REPOSITORY, stdout=subprocess.PIPE) as client:
        assert client.stdout.read(1)  # the model now stands before its second token
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


@pytest.mark.parametrize("key", ["c", "d"])
def test_ctrl_c_and_ctrl_d_leave_the_chat_client_cleanly(bots: Bots, loaded, key):
    """On a terminal, after one reply."""
    client = on_a_terminal(CHAT, "--url", bots.chatbot.ws)
    client.expect_exact("> ")
    client.sendline("Hello!")
    reply = reference(loaded, ["Hello!"], CHAT_MAX_NEW_TOKENS)
    client.expect_exact(f"Hello!\r\n{reply}\r\n> ")
    client.sendcontrol(key)
    client.expect(pexpect.EOF)
    client.close()
    assert "Traceback" not in client.before
    assert client.before.endswith("\r\n")
    assert client.exitstatus == 0


def test_ctrl_c_leaves_in_the_middle_of_a_reply(bots: Bots):
    bots.chatbot.gate.hold_after(1)
    client = on_a_terminal(CHAT, "--url", bots.chatbot.ws)
    client.expect_exact("> ")
    client.sendline("Hello!")
    client.expect("Hello!\r\n[A-Z]")
    client.sendcontrol("c")
    client.expect(pexpect.EOF)
    client.close()
    assert "Traceback" not in client.before
    assert client.exitstatus == 0
    bots.chatbot.gate.wait("left", 1)


@pytest.mark.parametrize(("script", "scheme"), [(STREAM, "http"), (CHAT, "ws")])
def test_a_server_that_is_not_there_is_one_line_and_status_1(script, scheme):
    url = f"{scheme}://127.0.0.1:{free_port()}/"
    ran = run(script, "--url", url, stdin="Hello!\n")
    assert ran.returncode == 1
    assert ran.stderr.startswith(f"nothing answers at {url}: is a bot running?")
    assert ran.stderr.count("\n") == 1


@pytest.mark.parametrize("name", ["textbot", "batchbot"])
def test_a_server_that_fails_in_mid_stream_is_one_line_and_status_1(bots: Bots, name):
    bot = getattr(bots, name)
    bot.gate.fail_at(3)
    ran = run(STREAM, "--url", bot.http)
    assert ran.returncode == 1
    assert ran.stdout.strip()
    assert ran.stderr == f"{bot.http} failed in the middle of the reply\n"


def test_a_chat_that_fails_in_mid_stream_is_one_line_and_status_1(bots: Bots):
    bots.chatbot.gate.fail_at(3)
    ran = run(CHAT, "--url", bots.chatbot.ws, stdin="Hello!\n")
    assert ran.returncode == 1
    assert ran.stderr == (
        f"{bots.chatbot.ws} closed the connection: 1011 the reply failed: RuntimeError\n"
    )


@pytest.mark.parametrize("script", [STREAM, CHAT])
def test_a_reader_who_has_had_enough_is_no_error(bots: Bots, script):
    url = bots.textbot.http if script == STREAM else bots.chatbot.ws
    ask = f"echo Tell me a story about dogs. | {sys.executable} {script} --url {url}"
    ran = subprocess.run(
        f"{ask} | head -c 4", shell=True, cwd=REPOSITORY, capture_output=True, timeout=HANG_S
    )
    assert (len(ran.stdout), ran.stderr) == (4, b"")


def test_a_refusal_is_one_line_and_status_1(bots: Bots):
    ran = run(STREAM, " ", "--url", bots.textbot.http)
    assert ran.returncode == 1
    assert ran.stderr.startswith(f"{bots.textbot.http} answered 422: ")
    assert "prompt" in ran.stderr
    assert ran.stderr.count("\n") == 1
