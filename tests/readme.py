"""The commands of README.md and docs/using.md, and checks that they print what is shown."""

import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import requests
from bot_fixtures import HANG_S, REPOSITORY
from serve_command import ENVIRONMENT

README = (REPOSITORY / "README.md").read_text()
USING = (REPOSITORY / "docs" / "using.md").read_text()
TRANSCRIPTS = {  # the sections that show a bot's replies
    "textbot": ["Try it", "Textbot: one prompt, one reply", "See the difference"],
    "chatbot": ["Chatbot: a conversation"],
    "batchbot": ["Batchbot: many prompts, one run", "See the difference"],
    "continuousbot": ["Continuousbot: prompts join a running batch", "See the difference"],
}


class Command(NamedTuple):
    line: str
    output: str


def commands(text: str) -> list[Command]:
    """Return the commands in a text's console blocks: lines after "$ ", and what they print."""
    found = []
    for block in re.findall(r"```console\n(.*?)```", text, re.DOTALL):
        for part in ("\n" + block).split("\n$ ")[1:]:
            line, _, output = part.partition("\n")
            found.append(Command(line, output.rstrip("\n")))
    return found


def prose(text: str) -> str:
    """Return a document without its code blocks, where a `#` makes no heading."""
    return re.sub(r"^```.*?^```$", "", text, flags=re.DOTALL | re.MULTILINE)


def changed(code: str, guide: str) -> str:
    """Return the code after applying all diffs in a guide."""
    for block in re.findall(r"```diff\n(.*?)```", guide, re.DOTALL):
        lines = block.splitlines(keepends=True)
        before, after = (
            "".join(line[1:] for line in lines if line[0] in kept) for kept in (" -", " +")
        )
        assert code.count(before) == 1, before
        code = code.replace(before, after)
    return code


def section(title: str) -> str:
    """Return the text below a heading, which is in README.md or docs/using.md."""
    _, *parts = re.split(r"^##+ (.*)", README + "\n" + USING, flags=re.MULTILINE)
    return dict(zip(parts[::2], parts[1::2], strict=True))[title]


def check_output(command: Command, folder: Path) -> None:
    """Run a command that asks a bot, and check that it prints what is shown."""
    # The command finds this test's python, as in an activated environment.
    path = f"{Path(sys.executable).parent}:{ENVIRONMENT['PATH']}"
    if command.line.startswith("curl") and not shutil.which("curl"):
        printed = requests.post(command.line.split("'")[1]).text
    else:
        printed = subprocess.run(
            command.line,
            shell=True,
            cwd=folder,
            env=ENVIRONMENT | {"PATH": path},
            capture_output=True,
            text=True,
            timeout=HANG_S,
        ).stdout
    if "load_client" in command.line:
        assert printed.count("finished") == 4
    else:
        assert printed.rstrip("\n") == command.output, command.line


def check_transcripts(name: str, folder: Path) -> None:
    """Run the commands for a bot, except `serve run`: the bot runs already."""
    shown = [command for title in TRANSCRIPTS[name] for command in commands(section(title))]
    assert shown[0].line.endswith(f"serve run {name}:app")
    check_commands(shown, folder)
    assert requests.get("http://localhost:8000/").headers["X-Model"] == "tiny-dialog"


def check_commands(shown: list[Command], folder: Path) -> None:
    """Run commands, except `serve run`, and check that they print what is shown."""
    for command in shown:
        if "serve run" not in command.line:
            check_output(command, folder)


def check_log(printed: list[str]) -> None:
    """Check that `serve run` says that the bundled model answers, and why."""
    assert any("loading tiny-dialog" in line for line in printed)
    (warning,) = [line for line in printed if "WARNING" in line and "tiny-dialog" in line]
    assert "microsoft/DialoGPT-small" in warning
