"""prompt.py: both conventions, and conversations that outgrow the context."""

import pytest
from scripted_model import EOS, byte_tokenizer
from tokenizers.normalizers import Replace

from streaming_bots.errors import TemplateRefusal
from streaming_bots.models import prompt
from streaming_bots.models.prompt import (
    NoToken,
    PromptTooLong,
    UnknownToken,
    encode,
    system_messages,
    token_limits,
)

TEMPLATE = (
    "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)


@pytest.fixture
def tokenizer():
    return byte_tokenizer(512)


def user(text):
    return {"role": "user", "content": text}


def assistant(text):
    return {"role": "assistant", "content": text}


def test_a_token_that_the_model_does_not_know_is_refused_by_name(tokenizer):
    tokenizer.model_vocab_size = len(tokenizer)
    tokenizer.add_tokens(["[PAD]"])
    assert encode([user("PAD")], tokenizer, 10)
    with pytest.raises(UnknownToken, match=r"does not know: \[PAD\]"):
        encode([user("a [PAD] b")], tokenizer, 10)


def test_without_a_template_every_turn_ends_with_eos(tokenizer):
    turns = [user("Hi"), assistant("Hello"), user(" Bye")]
    assert tokenizer.decode(encode(turns, tokenizer, 100)) == f"Hi{EOS}Hello{EOS} Bye{EOS}"


def test_a_chat_template_is_used_with_its_generation_prompt(tokenizer):
    tokenizer.chat_template = TEMPLATE
    turns = [*system_messages("Be kind"), user("Hi")]
    assert tokenizer.decode(encode(turns, tokenizer, 100)) == "[system]Be kind[user]Hi[assistant]"


@pytest.mark.parametrize("part", ["raise_exception('no')", "messages[1].content", "1 / 0"])
def test_whatever_a_chat_template_raises_is_its_refusal(tokenizer, part):
    tokenizer.chat_template = "{{ " + part + " }}"
    with pytest.raises(TemplateRefusal):
        encode([user("Hi")], tokenizer, 100)


@pytest.mark.parametrize("template", [None, TEMPLATE], ids=["plain", "template"])
def test_the_oldest_exchanges_are_dropped_whole_and_the_system_prompt_stays(tokenizer, template):
    tokenizer.chat_template = template
    turns = system_messages("Be kind")
    for n in range(5):
        turns += [user(f"prompt {n}"), assistant(f"reply {n}")]
    turns.append(user("the last"))
    kept = [turns[0], *turns[7:]]
    room = len(encode(list(kept), tokenizer, 10_000))
    ids = encode(turns, tokenizer, room)
    assert turns == kept
    assert len(ids) == room
    encode(turns, tokenizer, room - 1)
    assert turns == [kept[0], *kept[3:]]


def test_a_long_conversation_costs_few_tokenizations_and_a_refusal_one(tokenizer, monkeypatch):
    tokenize, tokenized = prompt.tokenize, []

    def count(turns, tokenizer):
        tokenized.append(len(turns))
        return tokenize(turns, tokenizer)

    monkeypatch.setattr(prompt, "tokenize", count)
    turns = [turn for n in range(190) for turn in (user(f"prompt {n}"), assistant(f"reply {n}"))]
    with pytest.raises(PromptTooLong, match="has 301 tokens, 300 fit"):
        encode([*turns, user("x" * 300)], tokenizer, 300)
    assert tokenized == [1]
    tokenized.clear()
    conversation = [*turns, user("the last")]
    assert len(encode(conversation, tokenizer, 300)) <= 300
    assert len(tokenized) < 12
    assert len(tokenize([*turns[-len(conversation) - 1 :], user("the last")], tokenizer)) > 300


def test_text_that_costs_no_token_is_dropped_with_its_exchange(tokenizer):
    """Many chat templates trim prompts."""
    tokenizer.chat_template = "{% for turn in messages %}{{ turn.content | trim }}{% endfor %}"
    turns = [user("Be kind") | {"role": "system"}]
    for _ in range(5):
        turns += [user("a" + " " * 3000), assistant("b")]
    turns.append(user("the last"))
    kept = [turns[0], *turns[-5:]]  # 6,400 bytes are allowed for 100 tokens
    encode(turns, tokenizer, 100)
    assert turns == kept


def test_a_prompt_is_refused_if_the_tokenizer_leaves_nothing_of_it(tokenizer):
    tokenizer.eos_token = None
    tokenizer.backend_tokenizer.normalizer = Replace("~", "")
    assert encode([user("~a~")], tokenizer, 10) == encode([user("a")], tokenizer, 10)
    with pytest.raises(NoToken, match="leaves nothing of it"):
        encode([user("~~")], tokenizer, 10)


def test_a_prompt_that_just_fits_is_accepted_and_one_token_more_is_not(tokenizer):
    assert len(encode([user("x" * 9)], tokenizer, 10)) == 10
    with pytest.raises(PromptTooLong, match="has 11 tokens, 10 fit"):
        encode([user("x" * 10)], tokenizer, 10)


def test_a_prompt_of_absurd_size_is_refused_before_it_is_tokenized(tokenizer):
    with pytest.raises(PromptTooLong, match="has 30000 bytes, 6400 are allowed"):
        encode([user("你" * 10_000)], tokenizer, 100)


def test_a_conversation_begins_with_the_system_prompt_if_there_is_one():
    assert system_messages(None) == system_messages("") == []
    assert system_messages("Be kind") == [{"role": "system", "content": "Be kind"}]


def test_the_limit_of_a_reply_leaves_room_for_a_prompt():
    assert [token_limits(None, None, context)[0] for context in (1024, 128)] == [256, 64]
    assert token_limits(127, 1, 128) == (127, 1)
    for impossible in (0, -1, 128, 1000):
        with pytest.raises(ValueError, match="from 1 to 127 are possible"):
            token_limits(impossible, None, 128)
