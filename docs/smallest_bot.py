"""The smallest bot that streams, without our library: `serve run docs.smallest_bot:app`.

Run it from the root of the repository. If the Hugging Face hub is unreachable, serve tiny-dialog:
`serve run docs.smallest_bot:build model=streaming_bots/models/tiny_dialog`.

It reports a failure, but a client that leaves keeps the model busy, requests compete for the cores,
and a prompt beyond the model's context fails.
"""

import asyncio
from collections.abc import AsyncGenerator

from fastapi import FastAPI
from fastapi.responses import StreamingResponse
from ray import serve
from transformers import AsyncTextIteratorStreamer, AutoModelForCausalLM, AutoTokenizer

api = FastAPI()


@serve.deployment
@serve.ingress(api)
class SmallestBot:
    def __init__(self, model: str) -> None:
        self.tokenizer = AutoTokenizer.from_pretrained(model)
        self.model = AutoModelForCausalLM.from_pretrained(model)

    @api.post("/")
    async def handle_request(self, prompt: str) -> StreamingResponse:
        streamer = AsyncTextIteratorStreamer(
            self.tokenizer, skip_prompt=True, skip_special_tokens=True
        )
        run = asyncio.create_task(asyncio.to_thread(self.generate_text, prompt, streamer))
        return StreamingResponse(self.consume_streamer(streamer, run), media_type="text/plain")

    def generate_text(self, prompt: str, streamer: AsyncTextIteratorStreamer) -> None:
        inputs = self.tokenizer(prompt + self.tokenizer.eos_token, return_tensors="pt")
        try:
            self.model.generate(**inputs, max_new_tokens=256, streamer=streamer)
        finally:
            streamer.end()  # even if the model failed, so that nobody waits for ever

    async def consume_streamer(
        self, streamer: AsyncTextIteratorStreamer, run: asyncio.Task[None]
    ) -> AsyncGenerator[str]:
        async for text in streamer:
            yield text
        await run  # raises what generate_text raised, which breaks off the response


def build(args: dict[str, str]) -> serve.Application:
    return SmallestBot.bind(args["model"])


app = SmallestBot.bind("microsoft/DialoGPT-small")
