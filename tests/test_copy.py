"""docs/copy.md: its steps turn a copied bot and the wheel into a service in an empty folder."""

import re
import shlex
import shutil
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest
import requests
from bot_fixtures import HANG_S, REPOSITORY, reference
from products import cases
from readme import Command, changed, check_output, commands
from serve_command import ENVIRONMENT, add_libraries, serve_run

pytestmark = [pytest.mark.cluster, pytest.mark.usefixtures("port_8000")]
GUIDE = (REPOSITORY / "docs" / "copy.md").read_text()
COMMANDS = [command for command in commands(GUIDE) if not command.line.startswith("serve run ")]
RUNS = [command.line for command in commands(GUIDE) if command.line.startswith("serve run ")]
PREPARE, (ASK, *ASK_CHANGED) = COMMANDS[:7], COMMANDS[7:11]
TEST, PACKAGE = COMMANDS[11:13], COMMANDS[13:]
INSTALL = PREPARE[-1]


def run(shown: list[Command], folder: Path, path: Path, **variables: str) -> str:
    """Run commands in one shell, in which they find the programs in `path` first."""
    ran = subprocess.run(
        ["bash", "-c", "set -e\n" + "\n".join(command.line for command in shown)],
        cwd=folder,
        env=ENVIRONMENT | {"PATH": f"{path}:{ENVIRONMENT['PATH']}"} | variables,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert ran.returncode == 0, ran.stdout
    return ran.stdout


@pytest.fixture(scope="module", params=cases([False, True], chosen=lambda fresh: not fresh))
def service(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that the first section makes.

    Unless the parameter is true (`fresh`), its environment has the packages of this one.
    """
    fresh = request.param
    folder = tmp_path_factory.mktemp("copy")
    ignored = shutil.ignore_patterns(".*", "build", "__pycache__")
    source = shutil.copytree(REPOSITORY, folder / "source", ignore=ignored)
    assert INSTALL.line.startswith("pip install ")
    run(PREPARE, source, Path(sys.executable).parent, PIP_NO_DEPS=str(int(not fresh)))
    made = folder / "helpdesk"
    if not fresh:
        add_libraries(made / ".venv")
    return made


def start(service: Path, line: str):
    """Start the bot that a `serve run` command names."""
    arguments = shlex.split(line.removeprefix("serve run "))
    return serve_run(service, *arguments, python=service / ".venv" / "bin" / "python")


def test_the_wheel_has_all_that_the_bots_need(service, tmp_path, loaded):
    with start(service, "serve run textbot:app"):
        reply = requests.post("http://127.0.0.1:8000/?prompt=Hello!", timeout=HANG_S)
        assert reply.text == reference(loaded, ["Hello!"], 256)
    with start(service, "serve run chatbot:app"):
        assert "<textarea" in requests.get("http://127.0.0.1:8000/", timeout=HANG_S).text


def test_the_copied_bot_runs_and_can_be_changed_as_the_guide_shows(service):
    first, second = RUNS
    with start(service, first):
        check_output(ASK, service)
    bot = service / "helpbot.py"
    bot.write_text(changed(bot.read_text(), GUIDE))
    with start(service, second):
        for command in ASK_CHANGED:
            check_output(command, service)
    (test,) = re.findall(r"```python\n(.*?)```", GUIDE, re.DOTALL)
    (service / "test_helpbot.py").write_text(test)
    programs = service / ".venv" / "bin"
    assert "7 passed" in run(TEST, service, programs)
    (project,) = re.findall(r"```toml\n(.*?)```", GUIDE, re.DOTALL)
    (service / "pyproject.toml").write_text(project)
    assert version("ray-serve-streaming-bots") in project
    assert "Successfully installed helpdesk" in run(PACKAGE, service, programs, PIP_NO_DEPS="1")
