"""A prompt that arrives during a batch: `python -m docs.experiments.late_prompt`."""

import threading

import requests

from batchbot import Batchbot
from continuousbot import Continuousbot
from docs.experiments.side_by_side import instrumented, served
from streaming_bots.models.source import BUNDLED

STORY, GREETING = "Tell me a story about dogs.", "Hello!"


def ask(address: str, prompt: str, begun: threading.Event, ended: list[str]) -> None:
    with requests.post(f"http://{address}", params={"prompt": prompt}, stream=True) as response:
        for _ in response.iter_content(chunk_size=None):
            begun.set()
    ended.append(prompt)


def order_of_ends(address: str) -> str:
    """Ask for a story and, once it has begun, greet. Return the order in which the replies end."""
    begun, ended = threading.Event(), list[str]()
    story = threading.Thread(target=ask, args=(address, STORY, begun, ended))
    story.start()
    begun.wait()
    ask(address, GREETING, threading.Event(), ended)
    story.join()
    return " -> ".join({STORY: "the story", GREETING: "the greeting"}[prompt] for prompt in ended)


def main() -> None:
    print("A client asks for a story. Once it has begun, another client says hello.", flush=True)
    # A step takes 50 ms, as with a larger model.
    static, continuous = (
        instrumented(bot, step_s=0.05).bind(BUNDLED) for bot in (Batchbot, Continuousbot)
    )
    with served(static, continuous) as (static_address, continuous_address):
        print("batchbot.py:", order_of_ends(static_address), flush=True)
        print("continuousbot.py:", order_of_ends(continuous_address))


if __name__ == "__main__":
    main()
