"""The README: its commands are run and its transcripts compared, its file tree is true."""

import re
import shutil
import subprocess
import sys
from fnmatch import fnmatch
from pathlib import Path
from typing import NamedTuple

import pytest
import requests
from running_bots import REPOSITORY
from serve_run import ENVIRONMENT, serve_run

from serving.arguments import BatchbotArguments, ChatbotArguments

README = (REPOSITORY / "README.md").read_text()
HANG_S = 60


class Command(NamedTuple):
    line: str
    output: str


def commands(text: str) -> list[Command]:
    """What the console blocks of a text show: lines after "$ ", and what they print."""
    found = []
    for block in re.findall(r"```console\n(.*?)```", text, re.DOTALL):
        for part in ("\n" + block).split("\n$ ")[1:]:
            line, _, output = part.partition("\n")
            found.append(Command(line, output.rstrip("\n")))
    return found


def section(title: str) -> str:
    return re.split(r"^##+ .*", README, flags=re.MULTILINE)[
        re.findall(r"^##+ (.*)", README, flags=re.MULTILINE).index(title) + 1
    ]


@pytest.mark.parametrize(
    ("name", "titles"),
    [
        ("textbot", ["Try it", "Textbot: one prompt in, text out", "See it"]),
        ("chatbot", ["Chatbot: a conversation"]),
        ("batchbot", ["Batchbot: many prompts, one run", "See it"]),
        ("continuousbot", ["Continuousbot: prompts join a run", "See it"]),
    ],
)
def test_the_bots_and_their_clients_print_what_the_readme_shows(checkout, name, titles):
    shown = [command for title in titles for command in commands(section(title))]
    assert shown[0].line.endswith(f"serve run {name}:app")
    # The commands find this test's python and serve, as they would in an active environment.
    path = f"{Path(sys.executable).parent}:{ENVIRONMENT['PATH']}"
    with serve_run(checkout, f"{name}:app") as printed:
        for command in shown:
            if "serve run" in command.line:
                continue
            if command.line.startswith("curl") and not shutil.which("curl"):
                printed_by_it = requests.post(command.line.split("'")[1]).text
            else:
                printed_by_it = subprocess.run(
                    command.line,
                    shell=True,
                    cwd=checkout,
                    env=ENVIRONMENT | {"PATH": path},
                    capture_output=True,
                    text=True,
                    timeout=HANG_S,
                ).stdout
            if "load_client" in command.line:
                assert printed_by_it.count("finished") == 4
            else:
                assert printed_by_it.rstrip("\n") == command.output, command.line
        assert requests.get("http://localhost:8000/").headers["X-Model"] == "tiny-dialog"
    assert any("loading tiny-dialog" in line for line in printed)
    warnings = [line for line in printed if "WARNING" in line and "tiny-dialog" in line]
    assert len(warnings) == 1
    assert "microsoft/DialoGPT-small" in warnings[0]


def test_it_is_short_and_its_pictures_are_small():
    assert README.count("\n") <= 350
    assert section("Deploy").count("\n") <= 40
    pictures = re.findall(r'(?:src|srcset)="(.+?)"|!\[.*?\]\((.+?)\)', README)
    assert len(pictures) == 6
    for picture in map("".join, pictures):
        assert (REPOSITORY / picture).stat().st_size < 150_000


def test_the_arguments_that_it_shows_are_valid():
    shown = [command.line for command in commands(section("Use another model"))]
    assert len(shown) == 3
    for line in shown:
        name, *arguments = re.findall(r'(?:[^\s"]|"[^"]*")+', line)[2:]
        given = dict(argument.split("=", 1) for argument in arguments)
        (BatchbotArguments if name == "batchbot:build" else ChatbotArguments)(**given)


def made_here(file: Path) -> bool:
    """Whether something made the file that is not part of the repository."""
    patterns = [".git/*", *(REPOSITORY / ".gitignore").read_text().replace("/\n", "/*\n").split()]
    return any(fnmatch(f"/{file}", f"*/{pattern}") for pattern in patterns)


def test_the_file_tree_is_true():
    (tree,) = re.findall(r"```\n(textbot\.py .*?)```", README, re.DOTALL)
    folder, paths = "", set()
    for line in tree.splitlines():
        name = line.split()[0]
        path = (folder if line.startswith("  ") else "") + name
        if name.endswith("/") and not line.startswith("  "):
            folder = name
        assert (REPOSITORY / path).exists(), path
        paths.add(path.rstrip("/"))
    named_by_itself = {"README.md", "LICENSE", "serving/__init__.py", ".gitignore"}
    leaves = {path for path in paths if not any(other.startswith(path + "/") for other in paths)}
    for path in REPOSITORY.rglob("*"):
        file = path.relative_to(REPOSITORY)
        if path.is_dir() or made_here(file) or str(file) in named_by_itself:
            continue
        parents = {str(parent) for parent in file.parents}
        assert str(file) in paths or parents & leaves, f"{file} is not in the README's tree"


def test_the_continuous_integration_runs_the_readmes_commands():
    test, haproxy, cluster, soak = commands(section("Develop"))
    assert test.line.endswith("pip install -e '.[test]' && pytest")
    ci = (REPOSITORY / ".ci" / "run").read_text()
    assert "pip install -e '.\\[test\\]'" in ci
    assert f"\n{haproxy.line}\n{cluster.line}\n" in ci
    assert soak.line == "pytest -m slow"
