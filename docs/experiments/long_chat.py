"""A chat that outgrows the model's context: `python -m docs.experiments.long_chat`."""

import asyncio
import json

from fastapi import FastAPI, WebSocket
from ray import serve
from transformers import AsyncTextIteratorStreamer
from websockets.exceptions import ConnectionClosed
from websockets.sync.client import connect
from websockets.typing import Subprotocol

from chatbot import Chatbot
from docs.experiments.side_by_side import served
from docs.smallest_bot import SmallestBot
from streaming_bots.models.source import BUNDLED, BUNDLED_FOLDER

PROMPT = "Tell me a story about dogs."
EXCHANGES = 8
api = FastAPI()


@serve.deployment
@serve.ingress(api)
class EndlessChatbot(SmallestBot.func_or_class):
    """Keeps the conversation as one string, which only grows."""

    @api.websocket("/chat")
    async def chat(self, ws: WebSocket) -> None:
        await ws.accept()
        conversation = ""
        while True:
            conversation += await ws.receive_text()
            streamer = AsyncTextIteratorStreamer(self.tokenizer, True, skip_special_tokens=True)
            run = asyncio.create_task(asyncio.to_thread(self.generate_text, conversation, streamer))
            conversation += self.tokenizer.eos_token
            async for text in self.consume_streamer(streamer, run):
                conversation += text
                await ws.send_text(text)
            conversation += self.tokenizer.eos_token
            await ws.send_text("<>")


def chat_with_endless(address: str) -> str:
    with connect(f"ws://{address}chat") as websocket:
        for exchange in range(1, EXCHANGES + 1):
            try:
                websocket.send(PROMPT)
                while websocket.recv() != "<>":
                    pass
            except ConnectionClosed as closed:
                code = closed.rcvd.code if closed.rcvd else None
                return f"the socket closes with {code} in reply {exchange}"
    return f"{EXCHANGES} replies"


def chat_with_ours(address: str) -> str:
    with connect(f"ws://{address}", subprotocols=[Subprotocol("chat.v1")]) as websocket:
        for _ in range(EXCHANGES):
            websocket.send(json.dumps({"type": "prompt", "prompt": PROMPT}))
            while (message := json.loads(websocket.recv()))["type"] != "done":
                pass
    seen, dropped = message["messages"], message["dropped"]
    return f"{EXCHANGES} replies; the model still sees {seen} messages, and no longer {dropped}"


def main() -> None:
    endless = EndlessChatbot.bind(str(BUNDLED_FOLDER))
    with served(endless, Chatbot.bind(BUNDLED)) as (its_address, our_address):
        print(f"one growing string: {chat_with_endless(its_address)}")
        print(f"chatbot.py: {chat_with_ours(our_address)}")


if __name__ == "__main__":
    main()
