"""A conversation to token ids that fit the model's context.

A conversation is a list of turns in the form of chat templates,
`{"role": "system" | "user" | "assistant", "content": text}`: perhaps a system prompt, then
prompts and replies by turns, a prompt last.
"""

from bisect import bisect_left

from transformers import PreTrainedTokenizerBase

Turn = dict[str, str]

# Text of more bytes is not worth tokenizing: real text has 3 to 6 bytes a token.
MAX_BYTES_PER_TOKEN = 64
MAX_BYTES = 1_000_000  # 250,000 tokens of English


class PromptTooLong(ValueError):
    """A prompt that does not fit the context, even with all earlier exchanges dropped."""


class UnknownToken(ValueError):
    """A prompt with a token that was added to the tokenizer, but not to the model."""


class NoToken(ValueError):
    """A prompt of which the tokenizer leaves nothing."""


def begin(system_prompt: str | None) -> list[Turn]:
    """A conversation in which nobody has spoken yet."""
    return [{"role": "system", "content": system_prompt}] if system_prompt else []


def encode(conversation: list[Turn], tokenizer: PreTrainedTokenizerBase, room: int) -> list[int]:
    """Token ids of the conversation, ready for the reply: at most `room` of them.

    Drops from `conversation` the oldest exchanges (a prompt and its reply), no more than it must;
    the system prompt stays. What is dropped never fits again, so it is dropped for good.
    Raises PromptTooLong if the last prompt does not fit alone, NoToken if there is nothing to read,
    UnknownToken if a token of it is at or above the tokenizer's `model_vocab_size`, which
    load_model and check_model set.
    """
    check_size(conversation[-1]["content"], room)
    first = 1 if conversation[0]["role"] == "system" else 0
    exchanges = (len(conversation) - first) // 2

    def without(dropped: int) -> list[int]:
        return tokenize(conversation[:first] + conversation[first + 2 * dropped :], tokenizer)

    # The last prompt alone comes first, so that a refusal costs nothing for what was said before.
    if len(alone := without(exchanges)) > room:
        raise PromptTooLong(f"the prompt has {len(alone)} tokens, {room} fit")
    ids = without(0) if exchanges else alone
    if len(ids) > room:
        fits = bisect_left(range(1, exchanges), True, key=lambda n: len(without(n)) <= room)
        ids = without(1 + fits)
        del conversation[first : first + 2 * (1 + fits)]
    if not ids:
        raise NoToken("the prompt has no token: the model's tokenizer leaves nothing of it")
    # One such token would fail the model, and with it all replies of a batch.
    known = getattr(tokenizer, "model_vocab_size", None)
    if known is not None and (last := max(ids)) >= known:
        token = tokenizer.convert_ids_to_tokens(last)
        raise UnknownToken(f"the prompt has a token that the model does not know: {token}")
    return ids


def check_size(prompt: str, room: int) -> None:
    """Raise PromptTooLong for what cannot fit, without the work of tokenizing it."""
    size, allowed = len(prompt.encode()), bytes_allowed(room)
    if size > allowed:
        raise PromptTooLong(f"the prompt has {size} bytes, {allowed} are allowed")


def bytes_allowed(tokens: int) -> int:
    """The most bytes of UTF-8 that are worth tokenizing for so many tokens."""
    return min(tokens * MAX_BYTES_PER_TOKEN, MAX_BYTES)


def tokenize(conversation: list[Turn], tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Token ids by the tokenizer's chat template where it has one.

    Else by DialoGPT's convention, in which every turn ends with the end-of-sequence token
    (https://huggingface.co/microsoft/DialoGPT-small).
    """
    if tokenizer.chat_template is not None:
        encoded = tokenizer.apply_chat_template(
            conversation,
            add_generation_prompt=True,
            return_dict=True,
            tokenizer_kwargs={"verbose": False},  # what is too long is said by PromptTooLong
        )
    else:
        eos = tokenizer.eos_token or ""
        text = "".join(turn["content"] + eos for turn in conversation)
        encoded = tokenizer(text, verbose=False)
    return list(encoded["input_ids"])


def reply_limit(max_new_tokens: int | None, context: int) -> int:
    """The most tokens that a reply may have, such that a prompt still fits beside it.

    By default 256, or half the context of a model that has no more than that.
    """
    if max_new_tokens is None:
        return min(256, context // 2)
    return check_limit("max_new_tokens", max_new_tokens, context)


def prompt_limit(max_prompt_tokens: int | None, context: int) -> int:
    """The most tokens that a prompt may have, with the conversation before it.

    By default all that the context leaves to a reply of one token.
    """
    if max_prompt_tokens is None:
        return context - 1
    return check_limit("max_prompt_tokens", max_prompt_tokens, context)


def check_limit(name: str, tokens: int, context: int) -> int:
    """The tokens of a limit. Raises ValueError if prompt and reply cannot both have one then."""
    if not 0 < tokens < context:
        raise ValueError(
            f"{name} is {tokens}: from 1 to {context - 1} are possible, since prompt and reply "
            f"share the model's context of {context} tokens"
        )
    return tokens
