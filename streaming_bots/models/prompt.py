"""Turns a conversation into token ids that fit the model's context."""

from bisect import bisect_left

from transformers import PreTrainedTokenizerBase

from streaming_bots.errors import (
    ContextExceeded,
    NoToken,
    PromptTooLong,
    TemplateRefusal,
    UnknownToken,
)

# As in chat templates: {"role": "system" | "user" | "assistant", "content": text}.
# A conversation is a list of messages: perhaps a system prompt, then prompts and replies in turn.
Message = dict[str, str]

# Longer text is not worth tokenizing: real text has 3 to 6 bytes per token.
MAX_BYTES_PER_TOKEN = 64
MAX_BYTES = 1_000_000  # 250,000 tokens of English
DEFAULT_PROMPT_TOKENS = 8192  # longer ones may take minutes and gigabytes, so operators decide


def system_messages(system_prompt: str | None) -> list[Message]:
    """Return the beginning of each conversation: its system prompt, or nothing."""
    return [{"role": "system", "content": system_prompt}] if system_prompt else []


def encode(
    conversation: list[Message],
    tokenizer: PreTrainedTokenizerBase,
    prompt_budget: int,
    whole: bool = False,
) -> list[int]:
    """Return the token ids of a conversation, ready for the reply: at most `prompt_budget` of them.

    Drops as few of the oldest exchanges (a prompt and its reply) from `conversation` as possible,
    and never the system prompt. If `whole`, drops nothing, but raises ContextExceeded. Raises
    PromptTooLong if the last prompt alone does not fit, TemplateRefusal, NoToken, or UnknownToken
    for an id at or above the tokenizer's `model_vocab_size`, which load_model sets.
    """
    if whole:
        return check_tokens(encode_whole(conversation, tokenizer, prompt_budget), tokenizer)
    check_size(conversation[-1]["content"], prompt_budget)
    first = 1 if conversation[0]["role"] == "system" else 0
    # Otherwise, long text with few tokens would be tokenized again in each turn.
    sizes = byte_sizes(conversation[first:])
    while sum(sizes) > bytes_allowed(prompt_budget):
        del sizes[:2], conversation[first : first + 2]
    exchanges = (len(conversation) - first) // 2

    def without(dropped: int) -> list[int]:
        return tokenize(conversation[:first] + conversation[first + 2 * dropped :], tokenizer)

    # The last prompt is tokenized first. If it is refused, the rest costs nothing.
    if len(alone := without(exchanges)) > prompt_budget:
        raise PromptTooLong(f"the prompt has {len(alone)} tokens, {prompt_budget} fit")
    ids = without(0) if exchanges else alone
    if len(ids) > prompt_budget:
        fits = bisect_left(
            range(1, exchanges), True, key=lambda n: len(without(n)) <= prompt_budget
        )
        ids = without(1 + fits)
        del conversation[first : first + 2 * (1 + fits)]
    return check_tokens(ids, tokenizer)


def encode_whole(
    messages: list[Message], tokenizer: PreTrainedTokenizerBase, prompt_budget: int
) -> list[int]:
    """Return the token ids of all messages. Raises ContextExceeded in words that clients expect."""
    limit = f"this model's maximum context length is {prompt_budget} tokens of messages"
    # Even an empty message has a token.
    size = sum(byte_sizes(messages)) + MAX_BYTES_PER_TOKEN * len(messages)
    if size > bytes_allowed(prompt_budget):
        raise ContextExceeded(f"{limit}; {len(messages)} messages with {size} bytes are too many")
    ids = tokenize(messages, tokenizer)
    if len(ids) > prompt_budget:
        raise ContextExceeded(f"{limit}, which have {len(ids)}")
    return ids


def check_tokens(ids: list[int], tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return `ids`. Raises NoToken or UnknownToken if the model cannot read them."""
    if not ids:
        raise NoToken("the prompt has no token: the model's tokenizer leaves nothing of it")
    # One such token would make the model fail, and with it all replies of a batch.
    known = getattr(tokenizer, "model_vocab_size", None)
    if known is not None and (last := max(ids)) >= known:
        token = tokenizer.convert_ids_to_tokens(last)
        raise UnknownToken(f"the prompt has a token that the model does not know: {token}")
    return ids


def check_size(prompt: str, prompt_budget: int) -> None:
    """Raise PromptTooLong for a prompt that cannot fit, without tokenizing it."""
    size, allowed = len(prompt.encode()), bytes_allowed(prompt_budget)
    if size > allowed:
        raise PromptTooLong(f"the prompt has {size} bytes, {allowed} are allowed")


def byte_sizes(messages: list[Message]) -> list[int]:
    return [len(message["content"].encode()) for message in messages]


def bytes_allowed(tokens: int) -> int:
    """Return the most bytes of UTF-8 that are worth tokenizing for `tokens` tokens."""
    return min(tokens * MAX_BYTES_PER_TOKEN, MAX_BYTES)


def tokenize(conversation: list[Message], tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Tokenize by the tokenizer's chat template, if it has one. Raises TemplateRefusal.

    Otherwise, DialoGPT's convention applies: the end-of-sequence token follows every message
    (https://huggingface.co/microsoft/DialoGPT-small).
    """
    if tokenizer.chat_template is not None:
        try:
            encoded = tokenizer.apply_chat_template(
                conversation,
                add_generation_prompt=True,
                return_dict=True,
                tokenizer_kwargs={"verbose": False},  # PromptTooLong says what is too long
            )
        except Exception as error:  # any, since a template computes with what a client sent
            raise TemplateRefusal(f"the model's chat template refuses it: {error}") from None
    else:
        eos = tokenizer.eos_token or ""
        text = "".join(message["content"] + eos for message in conversation)
        encoded = tokenizer(text, verbose=False)
    return list(encoded["input_ids"])


def token_limits(
    max_new_tokens: int | None, max_prompt_tokens: int | None, context: int
) -> tuple[int, int]:
    """Return the maximum tokens of a reply, and of a prompt with the conversation before it.

    By default, a reply has up to 256, or half the context if less, and a prompt the context less
    one token, but at most DEFAULT_PROMPT_TOKENS. Raises ValueError for a limit that does not fit.
    """
    limits = {"max_new_tokens": max_new_tokens, "max_prompt_tokens": max_prompt_tokens}
    for name, tokens in limits.items():
        if tokens is not None and not 0 < tokens < context:
            raise ValueError(
                f"{name} is {tokens}: from 1 to {context - 1} are possible, since prompt and reply "
                f"share the model's context of {context} tokens"
            )
    reply = max_new_tokens or min(256, context // 2)
    prompt = max_prompt_tokens or min(context - 1, DEFAULT_PROMPT_TOKENS)
    return reply, prompt
