"""docs/tutorial.md: its code is the sources' own, and its commands print what it shows."""

import subprocess
import sys
from importlib import import_module

import pytest
from bot_fixtures import REPOSITORY
from readme import check_commands, commands, prose
from serve_command import ENVIRONMENT, serve_run
from tutorial import SOURCES, TUTORIAL, python_blocks, quotes

EXPERIMENT = "python -m docs.experiments."
EXPERIMENT_S = 300  # only bounds a hang

SHOWN = commands(TUTORIAL)
EXPERIMENTS = [command for command in SHOWN if command.line.startswith(EXPERIMENT)]
# For the arguments of each `serve run`, the commands that ask its bot
ASKED = {}
for command in SHOWN:
    if command.line.startswith("serve run "):
        clients = ASKED.setdefault(command.line.removeprefix("serve run "), [])
    elif command not in EXPERIMENTS:
        clients.append(command)


@pytest.mark.parametrize("block", python_blocks(), ids=lambda block: block.strip().split("\n")[0])
def test_a_python_block_is_a_sources_own_lines(block):
    assert any(quotes(block, source.read_text()) for source in SOURCES), block


def test_a_quotation_has_all_lines_in_their_order():
    source = "def f():\n    a = 1\n    b = 2\n    c = 3\n"
    assert quotes("a = 1\nb = 2\n", source)
    assert quotes("    a = 1\n    ...\n    c = 3\n", source)
    assert not quotes("a = 1\nc = 3\n", source)
    assert not quotes("c = 3\n...\na = 1\n", source)
    assert not quotes("a = 2\n", source)
    assert not quotes("def f():\na = 1\n", source)


def test_the_tutorial_has_2000_to_3000_words_beside_its_code():
    assert 2000 <= len(prose(TUTORIAL).split()) <= 3000


def test_the_tutorial_shows_each_bot_and_each_experiment():
    smallest, *bots = ASKED
    assert smallest.startswith("docs.smallest_bot:build ")
    names = ["textbot", "chatbot", "batchbot", "continuousbot"]
    assert bots == [f"{name}:build model=tiny-dialog" for name in names]
    assert all(ASKED.values())
    folder = REPOSITORY / "docs" / "experiments"
    files = {path.stem for path in folder.glob("*.py") if "def main" in path.read_text()}
    assert {command.line.removeprefix(EXPERIMENT) for command in EXPERIMENTS} == files


@pytest.mark.parametrize("target", ASKED)
def test_a_bots_clients_print_what_the_tutorial_shows(local_8000, checkout, target):
    place, *arguments = target.split()
    module, name = place.split(":")
    app = getattr(import_module(module), name)
    if name == "build":
        settings, _ = app.__annotations__.values()  # of the argument, and of the result
        app = app(settings(**dict(argument.split("=") for argument in arguments)))
    local_8000.run(app, "")
    check_commands(ASKED[target], checkout)


@pytest.mark.exhaustive
@pytest.mark.usefixtures("port_8000")
@pytest.mark.parametrize("target", ASKED)
def test_serve_run_and_the_clients_print_what_the_tutorial_shows(checkout, target):
    with serve_run(checkout, *target.split()):
        check_commands(ASKED[target], checkout)


@pytest.mark.exhaustive
@pytest.mark.parametrize("command", EXPERIMENTS, ids=lambda command: command.line.split(".")[-1])
def test_an_experiment_prints_what_the_tutorial_shows(checkout, command):
    assert command.output
    ran = subprocess.run(
        [sys.executable, *command.line.split()[1:]],
        cwd=checkout,
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        timeout=EXPERIMENT_S,
    )
    assert ran.stdout.rstrip("\n") == command.output, ran.stderr
