"""Documents: their links lead somewhere, messages that they quote exist, and commands are valid."""

import ast
import re
import subprocess
from collections.abc import Iterator
from importlib import import_module

import pytest
import yaml
from bot_fixtures import REPOSITORY
from readme import changed, commands, prose

LIST_FILES = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
FILES = [
    REPOSITORY / name
    for name in subprocess.check_output(LIST_FILES, cwd=REPOSITORY, text=True).splitlines()
]
BOTS = ("textbot.py", "chatbot.py", "batchbot.py", "continuousbot.py")
DOCUMENTS = [file for file in FILES if file.suffix == ".md" and file.exists()]
TROUBLES = (REPOSITORY / "docs" / "troubleshooting.md").read_text()
CONTRIBUTING = (REPOSITORY / "CONTRIBUTING.md").read_text()
WORKFLOW = yaml.safe_load((REPOSITORY / ".github" / "workflows" / "ci.yml").read_text())
CI = (REPOSITORY / ".ci" / "run").read_text()


def anchors(text: str) -> list[str]:
    """Return the anchors of a document's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)", prose(text), re.MULTILINE)
    return [re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings]


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda file: str(file.relative_to(REPOSITORY)))
def test_links_within_the_repository_lead_somewhere(document):
    text = document.read_text()
    found = re.findall(r"\]\(([^)\s]+)\)|(?:src|srcset|href)=\"(.+?)\"", prose(text))
    for link in map("".join, found):
        if re.match(r"[a-z]+:", link):
            continue
        path, _, anchor = link.partition("#")
        target = (document.parent / path).resolve() if path else document
        assert target.exists(), link
        if anchor:
            assert anchor in anchors(target.read_text()), link


def test_the_index_of_the_troubles_names_every_trouble():
    listed = re.findall(r"\]\(#(.+?)\)", TROUBLES.partition("\n## ")[0])
    troubles = re.findall(r"^### (.*)", TROUBLES, re.MULTILINE)
    assert listed == anchors("\n".join(f"# {trouble}" for trouble in troubles))


def messages() -> Iterator[str]:
    """Yield the strings in our code, with "…" for each value that is formatted into one."""
    for file in FILES:
        place = file.relative_to(REPOSITORY).parts[0]
        if file.suffix == ".py" and place in ("streaming_bots", "clients", *BOTS):
            for node in ast.walk(ast.parse(file.read_text())):
                if isinstance(node, ast.JoinedStr):
                    parts = (
                        part.value if isinstance(part, ast.Constant) else "…"
                        for part in node.values
                    )
                    yield "".join(parts)
                elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                    yield node.value


def test_the_messages_of_ours_that_are_quoted_exist():
    """Blocks marked `text` quote our own messages. Those of other programs are marked `log`."""
    quoted = "".join(re.findall(r"```text\n(.*?)```", TROUBLES, re.DOTALL)).splitlines()
    printed = list(messages())
    assert len(quoted) > 30
    assert [line for line in quoted if not any(line in message for message in printed)] == []


def test_the_diffs_in_the_guide_to_copying_fit_the_textbot():
    source = (REPOSITORY / "textbot.py").read_text()
    guide = (REPOSITORY / "docs" / "copy.md").read_text()
    assert changed(source, guide) != source


SHOWN_ARGUMENTS = [
    found.groups()
    for document in DOCUMENTS
    for command in commands(document.read_text())
    if (found := re.search(r"serve run (\w+bot):build (.*)", command.line))
    and f"{found[1]}.py" in BOTS  # the bot of copy.md runs in test_copy.py
]


@pytest.mark.parametrize(("bot", "arguments"), SHOWN_ARGUMENTS)
def test_arguments_of_serve_run_that_are_shown_are_valid(bot, arguments):
    pairs = re.findall(r'(\w+)=("[^"]*"|\S+)', arguments)
    settings = import_module(bot).build.__annotations__["settings"]
    settings(**{name: value.strip('"') for name, value in pairs})


def test_the_tiers_in_contributing_are_those_that_pytest_and_ci_know():
    tiers = re.findall(r"^\| `(pytest.*?)` \|", CONTRIBUTING, re.MULTILINE)
    beside, first = (
        re.findall(rf'^{indent}part ".*" (pytest.*?){end}$', CI, re.MULTILINE)
        for indent, end in ((" +", ""), ("", r" \|\| failed=1"))
    )
    parts = [*first, *reversed(beside)]
    assert tiers[: len(parts)] == parts == ["pytest", "pytest -m haproxy", "pytest -m cluster"]
    pyproject = (REPOSITORY / "pyproject.toml").read_text()
    for tier in tiers[1:]:
        for marker in re.findall(r"\b(?!and\b)(\w+)\b", tier.partition("-m ")[2]):
            assert f'    "{marker}: ' in pyproject, marker


def test_the_set_up_in_contributing_is_the_readmes_that_ci_runs():
    readme = (REPOSITORY / "README.md").read_text()
    (line,) = (each.line for each in commands(readme) if "pip install -e '.[test]'" in each.line)
    assert line == commands(CONTRIBUTING)[0].line + " && pytest"


def test_the_workflow_runs_ci_with_pythons_that_the_package_supports():
    (job,) = WORKFLOW["jobs"].values()
    assert {"run": ".ci/run"}.items() <= job["steps"][-1].items()
    pyproject = (REPOSITORY / "pyproject.toml").read_text()
    for version in job["strategy"]["matrix"]["python-version"]:
        assert f'"Programming Language :: Python :: {version}",' in pyproject
    assert WORKFLOW["permissions"] == {"contents": "read"}
