"""Third-party clients of OpenAI's API, each of which requests a reply of five tokens."""

import asyncio
from typing import Any

import openai
from bot_fixtures import HANG_S, KEY, Bot
from langchain_openai import ChatOpenAI
from openai.types.chat import ChatCompletion

from streaming_bots.models.source import BUNDLED

PROMPT = "Tell me a story about dogs."


def user(content: Any) -> dict[str, Any]:
    return {"role": "user", "content": content}


def client_of(bot: Bot, **options: Any) -> openai.OpenAI:
    return openai.OpenAI(
        **{"base_url": f"{bot.http}v1", "api_key": KEY, "max_retries": 0, "timeout": HANG_S}
        | options
    )


def complete(
    bot: Bot,
    prompt: Any = "Hello!",
    limit: int | None = 5,
    client: openai.OpenAI | None = None,
    **options: Any,
) -> ChatCompletion:
    """Return the whole reply to a prompt, or to the messages of a conversation."""
    messages = prompt if isinstance(prompt, list) else [user(prompt)]
    with client or client_of(bot) as client:
        return client.chat.completions.create(
            **{"model": BUNDLED, "messages": messages, "max_tokens": limit} | options
        )


def text_of(answer: ChatCompletion) -> str:
    return answer.choices[0].message.content


def asynchronously(bot: Bot) -> str:
    async def ask() -> str:
        async with openai.AsyncOpenAI(base_url=f"{bot.http}v1", api_key=KEY) as client:
            whole = await client.chat.completions.create(
                model=BUNDLED, messages=[user(PROMPT)], max_tokens=5
            )
            stream = await client.chat.completions.create(
                model=BUNDLED, messages=[user(PROMPT)], max_tokens=5, stream=True
            )
            pieces = [chunk.choices[0].delta.content or "" async for chunk in stream]
            assert "".join(pieces) == whole.choices[0].message.content
            return "".join(pieces)

    return asyncio.run(ask())


def by_langchain(bot: Bot) -> str:
    model = ChatOpenAI(base_url=f"{bot.http}v1", api_key=KEY, model=BUNDLED, max_tokens=5)
    whole = model.invoke(PROMPT)
    assert whole.usage_metadata["output_tokens"] == 5
    pieces = [chunk.text for chunk in model.stream(PROMPT)]
    assert len(pieces) > 2
    assert "".join(pieces) == whole.text
    first, second = model.batch([PROMPT, "Hello!"])
    assert first.text == whole.text != second.text
    return whole.text


def synchronously(bot: Bot) -> str:
    with (
        client_of(bot) as client,
        client.chat.completions.create(
            model=BUNDLED, messages=[user(PROMPT)], max_tokens=5, stream=True
        ) as stream,
    ):
        pieces = [chunk.choices[0].delta.content or "" for chunk in stream]
    assert len(pieces) > 3  # including the role and the end
    assert "".join(pieces) == text_of(complete(bot, PROMPT))
    return "".join(pieces)


CLIENTS = [synchronously, asynchronously, by_langchain]
