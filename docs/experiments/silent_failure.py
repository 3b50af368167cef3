"""A stream that fails and looks whole: `python -m docs.experiments.silent_failure`."""

import asyncio
from collections.abc import AsyncGenerator

import requests
from transformers import AsyncTextIteratorStreamer

from docs.experiments.side_by_side import instrumented, served
from docs.smallest_bot import SmallestBot
from streaming_bots.models.source import BUNDLED, BUNDLED_FOLDER
from textbot import Textbot

FAILING_STEP = 10


class Forgetful(SmallestBot.func_or_class):
    """Starts the model and forgets it, so that nobody asks how it ended."""

    async def consume_streamer(
        self, streamer: AsyncTextIteratorStreamer, run: asyncio.Task[None]
    ) -> AsyncGenerator[str]:
        async for text in streamer:
            yield text


def ask(address: str) -> str:
    """Return how the response to a prompt looks to its client."""
    params = {"prompt": "Tell me a story about dogs."}
    try:
        response = requests.post(f"http://{address}", params=params)
    except requests.exceptions.ChunkedEncodingError:
        return "the response breaks off, and the client raises ChunkedEncodingError"
    return f"a whole response with the status {response.status_code}: {response.text}"


def main() -> None:
    forgetful = SmallestBot.options(func_or_class=Forgetful)
    bots = {
        "without `await run`": (forgetful, str(BUNDLED_FOLDER)),
        "smallest_bot.py": (SmallestBot, str(BUNDLED_FOLDER)),
        "textbot.py": (Textbot, BUNDLED),
    }
    apps = [
        instrumented(bot, failing_step=FAILING_STEP).bind(model) for bot, model in bots.values()
    ]
    print(f"The model fails at token {FAILING_STEP}.", flush=True)
    with served(*apps) as addresses:
        for name, address in zip(bots, addresses, strict=True):
            print(f"{name}: {ask(address)}", flush=True)


if __name__ == "__main__":
    main()
