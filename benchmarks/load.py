"""A load generator that records when each piece of a reply arrives."""

import asyncio
import json
import random
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field
from itertools import pairwise

import aiohttp

PROMPTS = [
    "Tell me a story about a dog.",
    "What should I cook tonight?",
    "Why is the sky blue?",
    "Write a letter to a friend who moved to another town last summer.",
]


@dataclass
class Reply:
    """The outcome of one request; times are by time.perf_counter, in seconds."""

    asked: float
    tokens: int  # requested; in `compare`, models never end a reply early
    arrivals: list[float] = field(default_factory=list)  # of each piece of text
    ended: float = 0.0
    error: str | None = None

    @property
    def first(self) -> float:
        return self.arrivals[0] - self.asked

    @property
    def gaps(self) -> list[float]:
        return [after - before for before, after in pairwise(self.arrivals)]


Ask = Callable[[aiohttp.ClientSession, str, int], AsyncIterator[str]]


def openai(url: str, model: str | None = None) -> Ask:
    """Return a function that asks OpenAI's route of the server at `url`, which includes /v1."""

    async def ask(session: aiohttp.ClientSession, prompt: str, tokens: int) -> AsyncIterator[str]:
        body = {
            "model": model,
            "messages": [{"role": "user", "content": prompt}],
            "max_tokens": tokens,
            "temperature": 0,
            "stream": True,
        }
        async with session.post(f"{url}/chat/completions", json=body) as response:
            response.raise_for_status()
            async for line in response.content:
                if line.startswith(b"data: {"):
                    event = json.loads(line[6:])
                    if "error" in event:
                        raise RuntimeError(event["error"])
                    for choice in event.get("choices", []):
                        if text := choice["delta"].get("content"):
                            yield text

    return ask


async def request(session: aiohttp.ClientSession, ask: Ask, prompt: str, tokens: int) -> Reply:
    reply = Reply(time.perf_counter(), tokens)
    try:
        async for text in ask(session, prompt, tokens):
            if text:
                reply.arrivals.append(time.perf_counter())
        if not reply.arrivals:
            reply.error = "no text came"
    except (aiohttp.ClientError, RuntimeError, TimeoutError) as error:
        reply.error = f"{type(error).__name__}: {error}"
    reply.ended = time.perf_counter()
    return reply


def _session() -> aiohttp.ClientSession:
    return aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(limit=0), timeout=aiohttp.ClientTimeout(total=600)
    )


async def closed_loop(
    ask: Ask, streams: int, requests_each: int, tokens: int, done: Callable[[Reply], None]
) -> list[Reply]:
    """Run `streams` clients at once. Each sends its next request when it has its reply."""

    async def client(session: aiohttp.ClientSession, number: int) -> list[Reply]:
        replies = []
        for turn in range(requests_each):
            prompt = PROMPTS[(number + turn) % len(PROMPTS)]
            replies.append(await request(session, ask, prompt, tokens))
            done(replies[-1])
        return replies

    async with _session() as session:
        clients = [client(session, number) for number in range(streams)]
        return [reply for replies in await asyncio.gather(*clients) for reply in replies]


async def open_loop(
    ask: Ask, rate: float, seconds: float, lengths: tuple[int, int], done: Callable[[Reply], None]
) -> list[Reply]:
    """Send Poisson arrivals, `rate` per second, whatever their outcome.

    Every call has the same arrivals and reply lengths, which are uniform on a logarithmic scale.
    """
    chance = random.Random(0)
    low, high = lengths
    pending: list[Awaitable[Reply]] = []
    async with _session() as session, asyncio.TaskGroup() as tasks:
        at = time.perf_counter()
        end = at + seconds
        while (at := at + chance.expovariate(rate)) < end:
            tokens = round(low * (high / low) ** chance.random())
            prompt = chance.choice(PROMPTS)
            await asyncio.sleep(max(0.0, at - time.perf_counter()))
            task = tasks.create_task(request(session, ask, prompt, tokens))
            task.add_done_callback(lambda task: done(task.result()))
            pending.append(task)
        return list(await asyncio.gather(*pending))


def mean_length(lengths: tuple[int, int]) -> float:
    """Return the mean of lengths that are uniform on a logarithmic scale."""
    low, high = lengths
    return sum(round(low * (high / low) ** (step / 999)) for step in range(1000)) / 1000


def percentile(values: list[float], percent: float) -> float:
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(len(ordered) * percent / 100))]


def summarize(replies: list[Reply]) -> dict[str, float]:
    """Return counts, throughput in tokens per second, and TTFT and ITL in milliseconds."""
    whole = [reply for reply in replies if reply.error is None]
    result: dict[str, float] = {"requests": len(replies), "failures": len(replies) - len(whole)}
    if whole:
        seconds = max(reply.ended for reply in whole) - min(reply.asked for reply in whole)
        result["tokens_per_s"] = sum(reply.tokens for reply in whole) / seconds
        times = {
            "ttft_ms": [reply.first for reply in whole],
            "itl_ms": [gap for reply in whole for gap in reply.gaps] or [0.0],
        }
        for name, values in times.items():
            for percent in (50, 95, 99, 100):
                label = "max" if percent == 100 else f"p{percent}"
                result[f"{name}_{label}"] = 1000 * percentile(values, percent)
    return result
