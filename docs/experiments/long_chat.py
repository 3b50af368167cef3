"""A chat that outgrows the model's context: `python -m docs.experiments.long_chat`."""

import asyncio
import json

from fastapi import FastAPI, WebSocket
from ray import serve
from transformers import AsyncTextIteratorStreamer, AutoModelForCausalLM, AutoTokenizer
from websockets.exceptions import ConnectionClosed
from websockets.sync.client import connect
from websockets.typing import Subprotocol

from chatbot import Chatbot
from docs.experiments.side_by_side import served
from streaming_bots.models.source import BUNDLED, BUNDLED_FOLDER

PROMPT = "Tell me a story about dogs."
EXCHANGES = 8
api = FastAPI()


@serve.deployment
@serve.ingress(api)
class EndlessChatbot:
    """Keeps the conversation as one string, which only grows."""

    def __init__(self, model: str) -> None:
        self.tokenizer = AutoTokenizer.from_pretrained(model)
        self.model = AutoModelForCausalLM.from_pretrained(model)

    @api.websocket("/")
    async def handle_request(self, ws: WebSocket) -> None:
        await ws.accept()
        conversation = ""
        while True:
            conversation += await ws.receive_text() + self.tokenizer.eos_token
            streamer = AsyncTextIteratorStreamer(self.tokenizer, True, skip_special_tokens=True)
            run = asyncio.create_task(asyncio.to_thread(self.generate_text, conversation, streamer))
            async for text in streamer:
                conversation += text
                await ws.send_text(text)
            await run
            conversation += self.tokenizer.eos_token
            await ws.send_text("<>")

    def generate_text(self, conversation: str, streamer: AsyncTextIteratorStreamer) -> None:
        inputs = self.tokenizer(conversation, return_tensors="pt")
        try:
            self.model.generate(**inputs, max_new_tokens=256, streamer=streamer)
        finally:
            streamer.end()


def chat_with_endless(address: str) -> str:
    with connect(f"ws://{address}") as websocket:
        for exchange in range(1, EXCHANGES + 1):
            try:
                websocket.send(PROMPT)
                while websocket.recv() != "<>":
                    pass
            except ConnectionClosed:
                return f"the socket breaks off in reply {exchange}"
    return f"{EXCHANGES} replies"


def chat_with_ours(address: str) -> str:
    with connect(f"ws://{address}", subprotocols=[Subprotocol("chat.v1")]) as websocket:
        for _ in range(EXCHANGES):
            websocket.send(json.dumps({"type": "prompt", "prompt": PROMPT}))
            while (message := json.loads(websocket.recv()))["type"] != "done":
                pass
    seen, dropped = message["messages"], message["dropped"]
    return f"{EXCHANGES} replies; the model still sees {seen} messages, and {dropped} were dropped"


def main() -> None:
    print(f"A client sends the same prompt up to {EXCHANGES} times.", flush=True)
    endless = EndlessChatbot.bind(str(BUNDLED_FOLDER))
    with served(endless, Chatbot.bind(BUNDLED)) as (its_address, our_address):
        print(f"one growing string: {chat_with_endless(its_address)}", flush=True)
        print(f"chatbot.py: {chat_with_ours(our_address)}")


if __name__ == "__main__":
    main()
