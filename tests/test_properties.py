"""Bots encode, decode, stream and send any text, tokens and JSON without loss."""

import asyncio
import json
from typing import Any

import pytest
import torch
from engines import limits_of, new_streamer, reply_options
from hypothesis import example, given, settings
from hypothesis import strategies as st
from scripted_model import EOS, byte_tokenizer
from test_prompt import TEMPLATE, assistant, user
from test_streaming import byte_fallback_tokenizer
from transformers import ByT5Tokenizer, PreTrainedTokenizerBase

from batchbot import Batchbot, RawStreamer, Row
from streaming_bots.chat.protocol import JsonProtocol, PlainProtocol
from streaming_bots.errors import BadMessage, Refusal
from streaming_bots.generation.text_decoder import TextDecoder
from streaming_bots.http.request import (
    MAX_BYTES_OUTSIDE_STRINGS,
    ReplyOptions,
    TextRequest,
    parse_object,
)
from streaming_bots.models.loaded_model import check_model
from streaming_bots.models.prompt import (
    MAX_BYTES_PER_TOKEN,
    Message,
    PromptTooLong,
    encode,
    system_messages,
    tokenize,
)
from streaming_bots.models.source import BUNDLED

HANG_S = 60
MARKER = "<>"
MARKER_LETTERS = "<>🐢"  # few, so that a chunk is often the marker

property_test = settings(deadline=None, derandomize=True)

tricky = st.sampled_from(
    [EOS, "<>", "\ufffd", "👩‍👩‍👧", "żółw", "\0", "\r\n", " \u2581", "{{ 1 }}"]
)
texts = st.lists(st.text() | tricky, max_size=4).map("".join)
conversations = st.builds(
    lambda system_prompt, exchanges, prompt: [
        *system_messages(system_prompt),
        *(turn for said, reply in exchanges for turn in (user(said), assistant(reply))),
        user(prompt),
    ],
    st.none() | texts,
    st.lists(st.tuples(texts, texts), max_size=5),
    texts,
)

any_text = st.text(st.characters())  # includes lone surrogates, which JSON can escape
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | any_text,
    lambda values: st.lists(values, max_size=4) | st.dictionaries(any_text, values, max_size=4),
    max_leaves=10,
)
nested = st.builds(
    lambda depth, bracket: f'{{"prompt": {bracket[0] * depth}1{bracket[1] * depth}}}',
    st.integers(0, 20_000) | st.integers(900, 1100),
    st.sampled_from([("[", "]"), ('{"a":', "}")]),
)
messages = st.fixed_dictionaries(
    {},
    optional={
        "type": st.sampled_from(["prompt", "stop"]) | json_values,
        "prompt": any_text | json_values,
        "max_new_tokens": st.integers(-1, 101) | json_values,
        "more": json_values,
    },
)
json_texts = st.one_of(messages.map(json.dumps), json_values.map(json.dumps), nested, texts)


@pytest.fixture(scope="module", params=["bytes", "bytes with a template", BUNDLED])
def tokenizer(request: pytest.FixtureRequest) -> PreTrainedTokenizerBase:
    if request.param == BUNDLED:
        return check_model(BUNDLED)[1]
    tokenizer = byte_tokenizer(512)
    tokenizer.chat_template = None if request.param == "bytes" else TEMPLATE
    return tokenizer


@property_test
@given(whole=conversations, room=st.integers(-1, 300))
def test_any_conversation_fits_or_is_too_long_and_loses_only_its_oldest_exchanges(
    tokenizer, whole, room
):
    first = int(whole[0]["role"] == "system")

    def left_after(dropped: int) -> list[Message]:
        return whole[:first] + whole[first + dropped :]

    conversation = list(whole)
    try:
        ids = encode(conversation, tokenizer, room)
    except PromptTooLong:
        size = len(whole[-1]["content"].encode())
        alone = [*whole[:first], whole[-1]]
        assert size > room * MAX_BYTES_PER_TOKEN or len(tokenize(alone, tokenizer)) > room
    else:
        assert len(ids) <= room
        dropped = len(whole) - len(conversation)
        assert ids == tokenize(conversation, tokenizer)
        assert dropped % 2 == 0
        assert conversation == left_after(dropped)
        assert not dropped or len(tokenize(left_after(dropped - 2), tokenizer)) > room


def ids_of(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False)["input_ids"]


@pytest.mark.parametrize(
    "tokenizer",
    [byte_tokenizer(512), check_model(BUNDLED)[1], ByT5Tokenizer(), byte_fallback_tokenizer()],
    ids=["bytes", BUNDLED, "python", "byte fallback"],
)
@property_test
@given(text=texts)
def test_the_pieces_of_any_text_are_whole_characters_and_join_to_it(tokenizer, text):
    ids, decoder = ids_of(tokenizer, text), TextDecoder(tokenizer)
    joined = "".join([*map(decoder.step, ids), decoder.flush()])
    assert joined == tokenizer.decode(ids, skip_special_tokens=True)
    assert joined == text or "<" in text  # which a special token begins with


async def stream_reply(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> list[str]:
    streamer = new_streamer(tokenizer)

    def write() -> None:
        streamer.put(torch.tensor([[0, 0, 0]]))
        for token in ids:
            streamer.put(torch.tensor([token]))
        streamer.end()

    async with asyncio.timeout(HANG_S), asyncio.TaskGroup() as tasks:
        tasks.create_task(asyncio.to_thread(write))
        return [text async for text in streamer]


@property_test
@given(data=st.data())
def test_the_pieces_of_any_tokens_join_to_what_decode_says(tokenizer, data):
    ids = data.draw(st.lists(st.integers(0, len(tokenizer) - 1)))
    pieces = asyncio.run(stream_reply(tokenizer, ids))
    assert "".join(pieces) == tokenizer.decode(ids, skip_special_tokens=True)
    assert "" not in pieces


@property_test
@given(data=st.data())
def test_the_pieces_end_before_the_first_stop_string_and_show_no_part_of_it(tokenizer, data):
    text = data.draw(st.text("ab 🐢", max_size=30))
    stop = data.draw(st.lists(st.text("ab 🐢", min_size=1, max_size=4), max_size=3))
    ids = ids_of(tokenizer, text)
    whole = tokenizer.decode(ids, skip_special_tokens=True)
    found = [(whole.index(s) + len(s), whole.index(s)) for s in stop if s in whole]
    expected = whole[: min(found)[1]] if found else whole
    decoder = TextDecoder(tokenizer, stop)
    pieces = []
    for token in ids:
        pieces.append(decoder.step(token))
        assert expected.startswith("".join(pieces))
    pieces.append(decoder.flush())
    assert "".join(pieces) == expected
    assert decoder.stopped == (expected != whole)


async def stream_batch(
    tokenizer: PreTrainedTokenizerBase, replies: list[list[int]], limits: list[int]
) -> list[str]:
    """Write replies that end with EOS, as `generate` does; return what the batch's readers get."""
    ends = [tokenizer.eos_token_id]
    rows = [Row(tokenizer, [0] * 3, reply_options(limit), ends) for limit in limits]
    streamer = RawStreamer(rows)

    def write() -> None:
        running, input_ids = range(len(rows)), torch.zeros(len(rows), 3, dtype=torch.long)
        while True:
            streamer.put(input_ids)
            stop = torch.zeros(len(running), dtype=torch.bool)
            while not stop.all():
                step = input_ids.shape[1] - 3
                tokens = torch.tensor([replies[row][step] for row in running])
                input_ids = torch.cat([input_ids, tokens[:, None]], dim=1)
                stop |= streamer(input_ids, None)
                streamer.put(tokens)
            streamer.end()
            if not (kept := list(streamer.kept)):
                return
            running, input_ids = [running[index] for index in kept], input_ids[kept]
            streamer.rows = [streamer.rows[index] for index in kept]
            streamer.stopped = False

    read, ended = [""] * len(rows), [False] * len(rows)
    async with asyncio.timeout(HANG_S), asyncio.TaskGroup() as tasks:
        tasks.create_task(asyncio.to_thread(write))
        async for items in Batchbot.func_or_class.consume_streamer(None, rows, streamer):
            for number, item in enumerate(items):
                if item is StopIteration:
                    ended[number] = True
                elif not ended[number]:  # else Serve has closed its stream
                    assert isinstance(item, str)
                    read[number] += item
    assert all(ended)
    lengths = [reply.index(tokenizer.eos_token_id) + 1 for reply in replies]
    assert [len(row.token_times) for row in rows] == list(map(min, lengths, limits))
    return read


@property_test
@given(rows=st.lists(st.tuples(texts, st.integers(1, 80)), min_size=1, max_size=5))
def test_each_row_of_a_batch_gets_its_own_text_up_to_its_own_limit(tokenizer, rows):
    eos = tokenizer.eos_token_id
    replies = [[*ids_of(tokenizer, text), eos] for text, _ in rows]
    limits = [limit for _, limit in rows]
    expected = [
        tokenizer.decode(reply[: reply.index(eos)][:limit], skip_special_tokens=True)
        for reply, limit in zip(replies, limits, strict=True)
    ]
    assert asyncio.run(stream_batch(tokenizer, replies, limits)) == expected


LIMITS = limits_of(prompt_budget=100, max_new_tokens=100)
OPTIONS = ReplyOptions.model_construct(max_new_tokens=100)


@property_test
@given(
    marker=st.text(MARKER_LETTERS, min_size=2, max_size=3),
    chunks=st.lists(st.text(MARKER_LETTERS, max_size=4) | texts),
)
def test_the_marker_never_appears_as_data_and_nothing_is_lost(marker, chunks):
    protocol = PlainProtocol(LIMITS, OPTIONS, marker)
    messages = [message for chunk in chunks for message in protocol.write("text", text=chunk)]
    assert marker not in messages
    assert "".join(messages) == "".join(chunks)


@property_test
@given(chunks=st.lists(texts))
def test_text_in_json_messages_is_the_text(chunks):
    protocol = JsonProtocol(LIMITS, OPTIONS, MARKER)
    messages = [message for chunk in chunks for message in protocol.write("text", text=chunk)]
    assert list(map(json.loads, messages)) == [{"type": "text", "text": chunk} for chunk in chunks]


@property_test
@given(text=json_texts)
@example('{"type": "prompt", "prompt": "Hello!"}')
@example('{"type": "stop"}')
@example('{"type": "ping"}')
def test_any_text_message_is_a_possible_prompt_or_a_stop_or_a_ping_or_refused(text):
    try:
        request = JsonProtocol(LIMITS, OPTIONS, MARKER).read({"text": text})
    except Refusal as error:
        assert str(error)
        return
    if isinstance(request, str):
        assert json.loads(text) == {"type": request}
        assert request in ("stop", "ping")
    else:
        assert isinstance(request, TextRequest)
        assert request.prompt.strip()
        assert request.prompt.encode()
        assert 0 < request.max_new_tokens <= LIMITS.max_new_tokens


@property_test
@given(data=st.binary())
def test_any_binary_message_is_refused(data):
    for kind in JsonProtocol, PlainProtocol:
        with pytest.raises(BadMessage):
            kind(LIMITS, OPTIONS, MARKER).read({"bytes": data})


@property_test
@given(
    body=st.one_of(
        json_texts,
        st.binary(),
        json_values.map(lambda value: json.dumps({"prompt": value}).encode("utf-16")),
    )
)
def test_any_body_is_an_object_or_a_value_error(body):
    try:
        fields = parse_object(body)
    except ValueError as error:
        assert str(error) in {
            "is not a JSON object",
            "is not a JSON object, which is UTF-8",
            f"has more than {MAX_BYTES_OUTSIDE_STRINGS} bytes outside of strings",
            "has a lone surrogate, which is no character",
        }
    else:
        assert isinstance(fields, dict)
        assert isinstance(body, str) or body.decode()


def has_surrogate(value: Any) -> bool:
    return any(
        "\ud800" <= character <= "\udfff" for character in json.dumps(value, ensure_ascii=False)
    )


@property_test
@given(fields=st.dictionaries(any_text, json_values, max_size=4))
def test_an_object_is_read_without_its_nulls_unless_it_has_lone_surrogates(fields):
    written = json.dumps(fields)
    if has_surrogate(json.loads(written)):
        with pytest.raises(ValueError, match="lone surrogate"):
            parse_object(written)
    else:
        read = {name: value for name, value in fields.items() if value is not None}
        assert repr(parse_object(written)) == repr(read)  # NaN does not equal itself
