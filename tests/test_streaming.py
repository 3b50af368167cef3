"""streamer.py and text_decoder.py: whole characters, no polling, failures, cancellation."""

import asyncio
import random
import threading
from collections.abc import AsyncGenerator
from pathlib import Path

import pytest
import torch
from bot_fixtures import EMOJI_PROMPT, EMOJI_REPLY
from engines import new_streamer, new_thread, reply_options
from scripted_model import byte_tokenizer
from tokenizers import Tokenizer, decoders, models
from transformers import ByT5Tokenizer, PreTrainedModel, PreTrainedTokenizerFast

from streaming_bots.generation.streamer import ReplyStreamer, TokenQueue
from streaming_bots.generation.text_decoder import TextDecoder
from streaming_bots.models.loaded_model import LoadedModel, load_model

HANG_S = 60


@pytest.fixture
def emoji(emoji_model: Path) -> LoadedModel:
    return load_model(str(emoji_model))


def generate(
    model: PreTrainedModel, input_ids: list[int], max_new_tokens: int, streamer: ReplyStreamer
) -> None:
    model.generate(
        torch.tensor([input_ids]),
        attention_mask=torch.ones(1, len(input_ids)),
        max_new_tokens=max_new_tokens,
        streamer=streamer,
        stopping_criteria=[streamer],
    )


@pytest.mark.parametrize(
    "tokenizer", [byte_tokenizer(512), ByT5Tokenizer()], ids=["rust", "python"]
)
def test_pieces_are_whole_characters_and_join_to_the_text(tokenizer):
    decoder = TextDecoder(tokenizer)
    ids = tokenizer(EMOJI_REPLY, add_special_tokens=False)["input_ids"]
    pieces = [decoder.step(token) for token in ids]
    assert "".join(pieces) == EMOJI_REPLY
    assert [piece for piece in pieces if piece] == list(EMOJI_REPLY)
    assert decoder.flush() == ""


def test_pieces_of_any_tokens_join_to_what_decode_says():
    tokenizer, rng = byte_tokenizer(512), random.Random(0)
    for _ in range(300):
        ids = [rng.randrange(len(tokenizer)) for _ in range(rng.randrange(40))]
        decoder = TextDecoder(tokenizer)
        text = "".join(decoder.step(token) for token in ids) + decoder.flush()
        assert text == tokenizer.decode(ids, skip_special_tokens=True)


class AwaitedStreamer(ReplyStreamer):
    """Holds the model until a reader has taken its text."""

    def add(self, token: int) -> None:
        before = self.decoder.decoded
        super().add(token)
        if self.decoder.decoded > before:
            assert self.taken.acquire(timeout=HANG_S)

    async def __aiter__(self) -> AsyncGenerator[str]:
        self.taken = threading.Semaphore(0)
        async for text in super().__aiter__():
            yield text
            self.taken.release()


def test_each_token_that_completes_a_character_is_text_at_once(emoji):
    async def read() -> list[str]:
        streamer = AwaitedStreamer(emoji.tokenizer, (), reply_options(), ())
        ids = emoji.tokenizer(EMOJI_PROMPT + "<|endoftext|>")["input_ids"]
        texts = aiter(streamer)
        first = asyncio.ensure_future(anext(texts))
        await asyncio.sleep(0)  # it starts reading
        new_thread().submit(streamer, generate, emoji.model, ids, 200)
        return [await first, *[text async for text in texts]]

    assert asyncio.run(read()) == list(EMOJI_REPLY)


def test_items_queued_before_the_reader_comes_travel_together_and_the_end_alone():
    async def read() -> list[list[int]]:
        numbers: TokenQueue[int] = TokenQueue()
        await asyncio.to_thread(lambda: [numbers.put(1), numbers.put(2), numbers.end()])
        return [some async for some in numbers]

    assert asyncio.run(read()) == [[1, 2]]


def test_a_reply_is_cancelled_once_however_often_cancel_is_called(emoji):
    async def cancel() -> None:
        streamer = new_streamer(emoji.tokenizer)
        for _ in range(3):
            streamer.cancel()
        assert len(streamer.text.items) == 1

    asyncio.run(cancel())


@pytest.mark.parametrize("when", ["it is read", "the loop hears of the end", "before that"])
def test_a_reply_that_is_complete_is_not_cancelled_any_more(emoji, when):
    async def test() -> str:
        streamer = new_streamer(emoji.tokenizer)
        for token in emoji.tokenizer("Hi")["input_ids"]:
            streamer.add(token)
        streamer.end()
        if when == "it is read":
            assert [text async for text in streamer] == ["Hi"]
            streamer.cancel()
        else:
            if when == "the loop hears of the end":
                await asyncio.sleep(0)
            streamer.cancel()
            assert [text async for text in streamer] == ["Hi"]
        return streamer.finish_reason

    assert asyncio.run(test()) == "length"


def test_items_queued_before_a_failure_are_read_before_it():
    async def read() -> None:
        numbers: TokenQueue[int] = TokenQueue()
        numbers.put(1)
        numbers.end(MemoryError("too much"))
        assert await anext(numbers) == [1]
        await anext(numbers)

    with pytest.raises(MemoryError, match="too much"):
        asyncio.run(read())


def test_a_queue_with_an_interval_gives_its_first_items_and_its_end_at_once():
    async def read() -> None:
        numbers: TokenQueue[int] = TokenQueue(min_interval=1000 * HANG_S)
        numbers.put(1)
        assert await anext(numbers) == [1]
        numbers.put(2)
        following = asyncio.ensure_future(anext(numbers))
        await asyncio.sleep(0)  # it starts reading
        await asyncio.to_thread(numbers.put, 3)
        await asyncio.to_thread(numbers.end)
        assert await following == [2, 3]
        assert await anext(numbers, None) is None

    asyncio.run(asyncio.wait_for(read(), HANG_S))


def test_a_reply_cut_inside_a_character_says_what_decode_says(emoji):
    async def read(max_new_tokens: int) -> str:
        streamer = new_streamer(emoji.tokenizer)
        ids = emoji.tokenizer(EMOJI_PROMPT + "<|endoftext|>")["input_ids"]
        new_thread().submit(streamer, generate, emoji.model, ids, max_new_tokens)
        return "".join([text async for text in streamer])

    ids = emoji.tokenizer(EMOJI_REPLY)["input_ids"]
    for length in range(1, 9):
        assert asyncio.run(read(length)) == emoji.tokenizer.decode(ids[:length])


def test_a_failure_of_generate_is_raised_where_the_stream_is_read(emoji):
    def fail(*_: object) -> None:
        raise RuntimeError("out of memory")

    async def read() -> list[str]:
        streamer, texts = new_streamer(emoji.tokenizer), []
        new_thread().submit(streamer, generate, emoji.model, [0], 200)
        async for text in streamer:
            texts.append(text)
        return texts

    hook = emoji.model.register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        asyncio.run(read())
    hook.remove()


def test_a_reader_who_leaves_stops_the_model_within_one_token(emoji):
    steps = 0

    async def read() -> None:
        streamer = new_streamer(emoji.tokenizer)

        def before_step(*_: object) -> None:
            nonlocal steps
            steps += 1
            if steps == 3:
                streamer.cancel()

        hook = emoji.model.register_forward_pre_hook(before_step)
        thread, following = new_thread(), new_streamer(emoji.tokenizer)
        thread.submit(streamer, generate, emoji.model, [0], 200)
        thread.submit(following, ReplyStreamer.end)
        async for _ in following:
            pass
        hook.remove()

    asyncio.run(read())
    assert steps == 3


def byte_fallback_tokenizer() -> PreTrainedTokenizerFast:
    """Return a tokenizer like Llama 2's: words, and a token for each byte of everything else."""
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁Hi", "!"]
    vocabulary = {token: number for number, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocabulary, [], unk_token="<unk>", byte_fallback=True))
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>")


def test_bytes_of_a_byte_fallback_tokenizer_become_whole_characters():
    tokenizer, text = byte_fallback_tokenizer(), "\n你好 🐢!"
    ids = tokenizer.convert_tokens_to_ids([f"<0x{byte:02X}>" for byte in text.encode()])
    decoder = TextDecoder(tokenizer)
    assert [piece for token in ids if (piece := decoder.step(token))] == list(text)


def test_bytes_that_become_no_character_do_not_end_the_reply():
    tokenizer = byte_fallback_tokenizer()
    tokens = ["<0x0A>", "<0xF0>", "<0x9F>", "!", "▁Hi", "<0xC3>", "<0xA9>"]
    decoder = TextDecoder(tokenizer)
    text = "".join(decoder.step(i) for i in tokenizer.convert_tokens_to_ids(tokens))
    assert text.startswith("\n")
    assert text.endswith("! Hié")
