"""Clients of OpenAI's API on a real Serve, with both of its ingresses."""

import openai
import pytest
from bot_fixtures import EMOJI_PROMPT, INGRESS, reference
from openai_clients import CLIENTS, PROMPT, client_of, complete, text_of, user
from products import cases
from test_faults import overlooked, subject

from streaming_bots.models.source import BUNDLED

if INGRESS == "haproxy":
    pytestmark = pytest.mark.haproxy

__all__ = ["subject"]  # the fixture
BOTS = ("textbot", "chatbot", "batchbot", "continuousbot")


@pytest.mark.parametrize(
    ("served", "ask"),
    cases(BOTS, CLIENTS, chosen=lambda bot, ask: bot == "textbot"),
    indirect=["served"],
)
def test_third_party_clients_get_the_reply(served, loaded, ask):
    assert ask(served) == reference(loaded, [PROMPT], 5)


@pytest.mark.parametrize(
    "served", cases(["textbot/v1", "chatbot/v1"], chosen=lambda bot: True), indirect=True
)
@pytest.mark.parametrize("stream", [True, False])
def test_an_sdk_that_leaves_stops_the_model_within_one_token(subject, loaded, stream):
    """The SDK leaves in mid-stream. If the reply is not streamed, it leaves after its timeout."""
    subject.gate.hold_after(3)
    if stream:
        with client_of(subject.bot).chat.completions.create(
            model=BUNDLED, messages=[user(PROMPT)], stream=True
        ) as chunks:
            assert next(chunks).choices[0].delta.role == "assistant"
            subject.gate.wait("step", 4)
    else:
        with pytest.raises(openai.APITimeoutError):
            complete(subject.bot, PROMPT, 40, client=client_of(subject.bot, timeout=2))
        subject.gate.wait("step", 4)
    if overlooked(subject, requests=1):
        return
    subject.wait_for(cancelled=1)
    subject.gate.release()
    assert text_of(complete(subject.bot, "Hello!", 2)) == reference(loaded, ["Hello!"], 2)
    assert subject.gate.count("step") == 4 + 2


@pytest.mark.parametrize("served", ["emoji_textbot"], indirect=True)
def test_each_error_is_the_sdks_own(served):
    raised = {
        openai.AuthenticationError: lambda: client_of(served, api_key="wrong").models.list(),
        openai.NotFoundError: lambda: client_of(served).models.retrieve("gpt-9"),
        openai.BadRequestError: lambda: complete(served, EMOJI_PROMPT * 1000, model=None),
        openai.PermissionDeniedError: lambda: client_of(
            served, default_headers={"Origin": "https://evil.example"}
        ).models.list(),
    }
    for error, ask in raised.items():
        with pytest.raises(error):
            ask()
