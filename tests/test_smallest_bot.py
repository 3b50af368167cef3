"""docs/smallest_bot.py: it streams, and a failure of its model reaches the client."""

import ast
from collections.abc import Iterator
from typing import NamedTuple

import pytest
import requests
from bot_fixtures import HANG_S, REPOSITORY, reference
from gates import RemoteGate
from ray import serve
from stepped_bots import SteppedSmallestBot

from docs.smallest_bot import SmallestBot
from streaming_bots.models.source import BUNDLED_FOLDER

HELLO = {"prompt": "Hello!"}


class Served(NamedTuple):
    url: str
    gate: RemoteGate


@pytest.fixture(scope="module")
def smallest_bot(port: int, new_gate) -> Iterator[Served]:
    gate = new_gate()
    stepped = SmallestBot.options(func_or_class=SteppedSmallestBot)
    serve.run(stepped.bind(gate, str(BUNDLED_FOLDER)), name="smallest", route_prefix="/smallest")
    yield Served(f"http://127.0.0.1:{port}/smallest/", gate)
    serve.delete("smallest")


def test_text_arrives_while_the_model_still_generates(smallest_bot, loaded):
    smallest_bot.gate.hold_after(4)
    with requests.post(smallest_bot.url, params=HELLO, stream=True, timeout=HANG_S) as response:
        chunks = response.iter_content(chunk_size=None)
        first = next(chunks)
        smallest_bot.gate.wait("step", 5)  # the model now waits before its fifth token
        smallest_bot.gate.release()
        rest = b"".join(chunks)
    assert first and rest
    assert (first + rest).decode() == reference(loaded, ["Hello!"], 256)


def test_a_failure_breaks_the_stream_off(smallest_bot):
    smallest_bot.gate.fail_at(5)
    with pytest.raises(requests.exceptions.ChunkedEncodingError):
        requests.post(smallest_bot.url, params=HELLO, timeout=HANG_S)


def test_a_failure_before_the_first_text_comes_after_the_status(smallest_bot):
    smallest_bot.gate.fail_at(1)
    with requests.post(smallest_bot.url, params=HELLO, stream=True, timeout=HANG_S) as response:
        assert response.status_code == 200
        with pytest.raises(requests.exceptions.ChunkedEncodingError):
            _ = response.content


def test_it_is_small_and_needs_no_library_of_ours():
    source = (REPOSITORY / "docs" / "smallest_bot.py").read_text()
    module = ast.parse(source)
    docstring = module.body[0].end_lineno
    code = [line for line in source.splitlines()[docstring:] if line.strip()]
    assert 25 <= len(code) <= 35
    imported = [node for node in module.body if isinstance(node, ast.Import | ast.ImportFrom)]
    names = {getattr(node, "module", None) or node.names[0].name for node in imported}
    ours = {"asyncio", "collections.abc", "fastapi", "fastapi.responses", "ray", "transformers"}
    assert names == ours
