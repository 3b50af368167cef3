"""A client that leaves keeps the model busy: `python -m docs.experiments.left_client`."""

import requests

from docs.experiments.side_by_side import instrumented, served, steps_in_all
from docs.smallest_bot import SmallestBot
from streaming_bots.models.source import BUNDLED, BUNDLED_FOLDER
from textbot import Textbot

PROMPT = {"prompt": "Tell me a story about dogs."}
MOMENT = 20  # tokens: a second, in which Serve notices the disconnect even on a busy machine


def leave_early(address: str) -> int:
    """Read the first text and leave. Return how many steps the model took in all."""
    with requests.post(f"http://{address}", params=PROMPT, stream=True) as response:
        next(response.iter_content(chunk_size=None))
    return steps_in_all(address)


def main() -> None:
    print("A client reads the first word of a story, and leaves.", flush=True)
    smallest = instrumented(SmallestBot, step_s=0.05).bind(str(BUNDLED_FOLDER))
    ours = instrumented(Textbot, step_s=0.05).bind(BUNDLED)
    with served(smallest, ours) as (its_address, our_address):
        requests.post(f"http://{its_address}", params=PROMPT)
        story = steps_in_all(its_address)
        print(f"The story has {story} tokens.", flush=True)
        wasted = leave_early(its_address) - story
        print(f"smallest_bot.py: the model wrote {wasted} tokens.", flush=True)
        few = leave_early(our_address) < MOMENT
        print(f"textbot.py: the model wrote {'fewer' if few else 'no fewer'} than {MOMENT} tokens.")


if __name__ == "__main__":
    main()
