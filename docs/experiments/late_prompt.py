"""A prompt that arrives during a batch: `python -m docs.experiments.late_prompt`."""

import threading

import requests

from batchbot import Batchbot
from continuousbot import Continuousbot
from docs.experiments.side_by_side import instrumented, served
from streaming_bots.models.source import BUNDLED


def ask(address: str, prompt: str, begun: threading.Event, ended: list[str]) -> None:
    with requests.post(f"http://{address}", params={"prompt": prompt}, stream=True) as response:
        for _ in response.iter_content(chunk_size=None):
            begun.set()
    ended.append(prompt)


def order_of_ends(address: str) -> str:
    """Ask for a story and, once it has begun, say hello. Return the order in which replies end."""
    begun, ended = threading.Event(), list[str]()
    story = threading.Thread(target=ask, args=(address, "Tell me a story.", begun, ended))
    story.start()
    begun.wait()
    ask(address, "Hello!", threading.Event(), ended)
    story.join()
    return ", then ".join(ended)


def main() -> None:
    # A step takes 50 ms, as with a larger model.
    static, continuous = (
        instrumented(bot, step_s=0.05).bind(BUNDLED) for bot in (Batchbot, Continuousbot)
    )
    with served(static, continuous) as (static_address, continuous_address):
        print("The client asks for a story. Once it has begun, another client says Hello!")
        print("batchbot.py ends:     ", order_of_ends(static_address))
        print("continuousbot.py ends:", order_of_ends(continuous_address))


if __name__ == "__main__":
    main()
