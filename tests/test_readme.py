"""README.md and docs/using.md: their commands print what is shown, and the README is short."""

import re
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest
import yaml
from bot_fixtures import HANG_S, REPOSITORY
from ray.serve.schema import ServeDeploySchema
from readme import (
    README,
    TRANSCRIPTS,
    USING,
    check_log,
    check_transcripts,
    commands,
    section,
)
from serve_command import serve_run

import textbot
from streaming_bots.settings import ContinuousbotSettings

CONTRIBUTING = (REPOSITORY / "CONTRIBUTING.md").read_text()


# `serve run textbot:app` itself is in test_serve_run.py.
@pytest.mark.parametrize("name", ["chatbot", "batchbot", "continuousbot"])
def test_a_bots_app_and_its_clients_print_what_the_readme_shows(local_8000, checkout, name):
    local_8000.run(import_module(name).app, "")
    check_transcripts(name, checkout)


def test_the_block_that_uses_openais_sdk_prints_the_reply(local_8000):
    local_8000.run(textbot.app, "")
    (block,) = re.findall(r"```python\n(.*?)```", USING, re.DOTALL)
    printed = subprocess.run([sys.executable, "-c", block], capture_output=True, timeout=HANG_S)
    assert printed.stdout.decode() == commands(section("Try it"))[1].output


def test_the_config_for_clients_in_a_container_is_valid():
    text = (REPOSITORY / "docs" / "protocol.md").read_text()
    (block,) = re.findall(r"```yaml\n(.*?)```", text, re.DOTALL)
    config = ServeDeploySchema.model_validate(yaml.safe_load(block))
    arguments = ContinuousbotSettings(**config.applications[0].args)
    assert "host.docker.internal" in arguments.allowed_hosts


@pytest.mark.exhaustive
@pytest.mark.usefixtures("port_8000")
@pytest.mark.parametrize("name", TRANSCRIPTS)
def test_serve_run_and_the_clients_print_what_the_readme_shows(checkout, name):
    with serve_run(checkout, f"{name}:app") as printed:
        check_transcripts(name, checkout)
    check_log(printed)


def test_the_readme_is_short_and_its_pictures_are_small():
    assert README.count("\n") <= 150
    assert len(README) <= 8_000
    pictures = re.findall(r'(?:src|srcset)="(.+?)"|!\[.*?\]\((.+?)\)', README)
    assert len(pictures) == 6  # two of them stand still, for readers who prefer that
    for picture in map("".join, pictures):
        assert (REPOSITORY / picture).stat().st_size <= 1_000_000


def test_the_readme_shows_the_smallest_bot():
    (block,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert (REPOSITORY / "docs" / "smallest_bot.py").read_text().endswith("\n" + block)


def test_the_file_tree_matches_the_repository():
    (tree,) = re.findall(r"```\n(textbot\.py .*?)```", CONTRIBUTING, re.DOTALL)
    folder, paths = "", set()
    for line in tree.splitlines():
        name = line.split()[0]
        path = (folder if line.startswith("  ") else "") + name
        if name.endswith("/") and not line.startswith("  "):
            folder = name
        assert (REPOSITORY / path).exists(), path
        paths.add(path.rstrip("/"))
    named_by_itself = {"README.md", "CHANGELOG.md", "CONTRIBUTING.md", "LICENSE", "__init__.py"}
    named_by_itself |= {".gitignore", ".github/workflows/ci.yml"}
    leaves = {path for path in paths if not any(other.startswith(path + "/") for other in paths)}
    list_files = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    files = subprocess.check_output(list_files, cwd=REPOSITORY, text=True).splitlines()
    for file in files:
        parents = {str(parent) for parent in Path(file).parents}
        known = file in paths or file in named_by_itself or parents & leaves
        assert known or not (REPOSITORY / file).exists(), f"{file} is not in the tree"


def test_the_continuous_integration_runs_the_readmes_commands():
    (test,) = commands(section("Develop"))
    assert test.line.endswith("pip install -e '.[test]' && pytest")
    ci = (REPOSITORY / ".ci" / "run").read_text()
    assert "pip install -e '.\\[test\\]'" in ci
