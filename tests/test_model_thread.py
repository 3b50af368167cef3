"""model_thread.py: runs follow one another, and every streamer ends."""

import asyncio
import threading
import time
import weakref
from collections.abc import Callable, Coroutine
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from bot_fixtures import HANG_S
from engines import new_streamer, new_thread
from scripted_model import byte_tokenizer

from streaming_bots.errors import ModelStalled, TooManyWaiting
from streaming_bots.generation import model_thread
from streaming_bots.generation.model_thread import ModelThread
from streaming_bots.generation.streamer import ReplyStreamer

TOKENIZER = byte_tokenizer(512)


def say(text: str, streamer: ReplyStreamer) -> None:
    streamer.text.put(text)
    streamer.end()


def die(error: BaseException, streamer: ReplyStreamer) -> None:
    raise error


async def read(streamer: ReplyStreamer) -> str:
    return "".join([text async for text in streamer])


def run(test: Callable[[], Coroutine[Any, Any, None]]) -> None:
    asyncio.run(asyncio.wait_for(test(), HANG_S))


async def until_free(thread: ModelThread) -> None:
    while thread.running:
        await thread.moved.wait()


class Held:
    """A run of the model that lasts until a test lets it go."""

    def __init__(self) -> None:
        self.begun, self.go = threading.Event(), threading.Event()

    def __call__(self, streamer: ReplyStreamer) -> None:
        self.begun.set()
        self.go.wait(HANG_S)
        streamer.end()

    async def submit_to(self, thread: ModelThread) -> ReplyStreamer:
        streamer = new_streamer(TOKENIZER)
        thread.submit(streamer, self)
        await asyncio.to_thread(self.begun.wait, HANG_S)
        return streamer


def test_streamers_run_one_after_another_and_each_knows_how_many_are_ahead():
    async def test() -> None:
        thread, held, last = new_thread(), Held(), Held()
        streamers = [await held.submit_to(thread)]
        assert [ahead async for ahead in thread.line(streamers[0])] == []  # it already has its turn
        for job in ((say, "1"), (say, "2"), (last,)):
            streamers.append(new_streamer(TOKENIZER))
            thread.submit(streamers[-1], *job)
        line = thread.line(streamers[3])
        assert await anext(line) == 3
        thread.cancel(streamers[1])  # those behind it move up
        assert await anext(line) == 2
        held.go.set()
        assert [await read(streamer) for streamer in streamers[:3]] == ["", "", "2"]
        assert [ahead async for ahead in line][-1] == 0
        last.go.set()
        assert await read(streamers[3]) == ""

    run(test)


def test_a_reply_that_begins_and_ends_quickly_has_had_its_turn():
    async def test() -> None:
        thread, held, quick = new_thread(), Held(), new_streamer(TOKENIZER)
        await held.submit_to(thread)
        thread.submit(quick, say, "hello")
        line = thread.line(quick)
        assert await anext(line) == 1
        held.go.set()
        while thread.submitted:
            await thread.moved.wait()
        assert [ahead async for ahead in line] == [0]

    run(test)


def test_a_streamer_cancelled_in_the_line_does_not_stay_in_it():
    async def test() -> None:
        thread, held = new_thread(), Held()
        await held.submit_to(thread)
        leaving = new_streamer(TOKENIZER)
        thread.submit(leaving, say, "never")
        line = thread.line(leaving)
        assert await anext(line) == 1
        asyncio.get_running_loop().call_soon(thread.cancel, leaving)
        assert [ahead async for ahead in line] == []
        held.go.set()

    run(test)


def test_a_streamer_cancelled_while_it_waits_never_begins_and_frees_its_place():
    async def test() -> None:
        metrics = Mock()
        thread, held = new_thread(max_waiting=1, metrics=metrics), Held()
        await held.submit_to(thread)
        leaving, staying = new_streamer(TOKENIZER), new_streamer(TOKENIZER)
        thread.submit(leaving, die, SystemExit())
        with pytest.raises(TooManyWaiting, match="1 prompts already wait"):
            thread.submit(staying, say, "hello")
        thread.cancel(leaving)
        assert await read(leaving) == ""
        thread.submit(staying, say, "hello")
        assert await anext(thread.line(staying)) == 1
        held.go.set()
        assert await read(staying) == "hello"
        thread.check()
        counts = [told.args[0] for told in metrics.waiting.set.call_args_list]
        assert (max(counts), counts[-1]) == (1, 0)

    run(test)


def test_an_exception_concerns_its_own_streamer_alone():
    async def test() -> None:
        thread, streamers = new_thread(), [new_streamer(TOKENIZER) for _ in range(2)]
        thread.submit(streamers[0], die, MemoryError("too much"))
        thread.submit(streamers[1], say, "hello")
        with pytest.raises(MemoryError, match="too much"):
            await read(streamers[0])
        assert await read(streamers[1]) == "hello"
        thread.check()

    run(test)


def test_a_streamer_whose_run_failed_keeps_nothing_of_the_run():
    """The Chatbot keeps the last streamer of an idle chat, and a run's KV cache may be large."""
    held: list[weakref.ref[torch.Tensor]] = []

    def fail(streamer: ReplyStreamer) -> None:
        cache = torch.zeros(1)
        held.append(weakref.ref(cache))
        raise ValueError("no memory")

    async def test() -> None:
        thread, streamer = new_thread(), new_streamer(TOKENIZER)
        thread.submit(streamer, fail)
        with pytest.raises(ValueError, match="no memory"):
            await read(streamer)
        assert held[0]() is None
        with pytest.raises(ValueError, match="no memory"):  # the streamer still has the error
            await read(streamer)

    run(test)


def test_a_thread_that_dies_fails_all_streamers_and_makes_the_replica_unhealthy():
    async def test() -> None:
        thread, held = new_thread(), Held()
        await held.submit_to(thread)
        dying, waiting = new_streamer(TOKENIZER), new_streamer(TOKENIZER)
        thread.submit(dying, die, SystemExit(3))
        thread.submit(waiting, say, "never")
        held.go.set()
        for streamer in (dying, waiting):
            with pytest.raises(ModelStalled, match="thread died of SystemExit"):
                await read(streamer)
        thread.thread.join(HANG_S)
        for call in (thread.check, lambda: thread.submit(new_streamer(TOKENIZER), say, "hello")):
            with pytest.raises(ModelStalled):
                call()

    run(test)


def test_no_progress_fails_all_streams_and_a_model_that_was_only_slow_recovers():
    async def test() -> None:
        thread, held = new_thread(stall_timeout_s=0.2), Held()
        hanging = await held.submit_to(thread)
        waiting, following = new_streamer(TOKENIZER), new_streamer(TOKENIZER)
        thread.submit(waiting, say, "never")
        for streamer in (hanging, waiting):
            with pytest.raises(ModelStalled, match=r"no progress for 0.2 s"):
                await read(streamer)
        with pytest.raises(ModelStalled):
            thread.check()
        held.go.set()
        await until_free(thread)
        thread.submit(following, say, "hello")
        assert await read(following) == "hello"

    run(test)


def test_a_run_that_ends_just_as_it_is_given_up_leaves_the_replica_healthy():
    async def test() -> None:
        thread, held = new_thread(), Held()
        running, following = await held.submit_to(thread), new_streamer(TOKENIZER)
        held.go.set()
        while not running.complete:  # without awaiting, so that the loop does not notice
            time.sleep(0.001)  # noqa: ASYNC251
        thread.give_up(ModelStalled("no progress"))
        assert await read(running) == ""
        await until_free(thread)  # now the loop notices the end
        thread.submit(following, say, "hello")
        assert await read(following) == "hello"

    run(test)


def test_a_process_that_was_suspended_is_no_stall():
    async def test() -> None:
        thread, held = new_thread(stall_timeout_s=0.5), Held()
        streamer = await held.submit_to(thread)
        time.sleep(0.6)  # noqa: ASYNC251 - nothing moves, neither the model nor the loop
        await asyncio.sleep(0.001)  # the loop wakes first
        thread.note_progress()
        held.go.set()
        assert await read(streamer) == ""
        thread.check()

    run(test)


def test_a_long_reply_with_progress_is_no_stall():
    async def test() -> None:
        thread, streamer = new_thread(stall_timeout_s=0.3), new_streamer(TOKENIZER)
        stop = threading.Event()

        def slowly(streamer: ReplyStreamer) -> None:
            for _ in range(8):
                stop.wait(0.1)
                thread.note_progress()
            streamer.end()

        thread.submit(streamer, slowly)
        assert await read(streamer) == ""
        thread.check()

    run(test)


def test_a_stall_is_noticed_even_if_its_own_reader_has_left():
    async def test() -> None:
        thread, held = new_thread(stall_timeout_s=0.1), Held()
        (await held.submit_to(thread)).cancel()
        waiting = new_streamer(TOKENIZER)
        thread.submit(waiting, say, "never")
        with pytest.raises(ModelStalled):
            await read(waiting)
        held.go.set()

    run(test)


def test_streamers_cancelled_again_and_again_leave_nothing_in_the_line():
    async def test() -> None:
        thread, held = new_thread(max_waiting=1), Held()
        await held.submit_to(thread)
        for _ in range(100):
            leaving = new_streamer(TOKENIZER)
            thread.submit(leaving, say, "never")
            thread.cancel(leaving)
        assert len(thread.submitted) == 1
        following = new_streamer(TOKENIZER)
        thread.submit(following, say, "hello")
        held.go.set()
        assert await read(following) == "hello"

    run(test)


def test_a_failure_that_nobody_reads_is_logged(monkeypatch):
    async def test() -> None:
        thread, following = new_thread(), new_streamer(TOKENIZER)

        def leave_and_fail(streamer: ReplyStreamer) -> None:
            streamer.cancel()
            raise RuntimeError("out of memory")

        thread.submit(new_streamer(TOKENIZER), leave_and_fail)
        thread.submit(following, say, "hello")
        assert await read(following) == "hello"

    said: list[str] = []
    monkeypatch.setattr(model_thread.logger, "exception", said.append)
    run(test)
    assert said == ["The model failed for a reply that nobody reads any more"]


def test_a_lost_gpu_ends_the_thread_and_all_waiting_streamers(monkeypatch):
    def synchronize() -> None:
        raise RuntimeError("CUDA error: device-side assert triggered")

    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)

    async def test() -> None:
        thread, held = new_thread(), Held()
        streamer = new_streamer(TOKENIZER)
        thread.submit(streamer, die, RuntimeError("out of memory"))
        with pytest.raises(RuntimeError, match="out of memory"):
            await read(streamer)
        running = await held.submit_to(thread)  # the GPU is still there
        failing, waiting = new_streamer(TOKENIZER), new_streamer(TOKENIZER)
        thread.submit(failing, die, RuntimeError("device-side assert"))
        thread.submit(waiting, say, "Hi")
        monkeypatch.setattr(torch.cuda, "synchronize", synchronize)
        held.go.set()
        assert await read(running) == ""
        with pytest.raises(RuntimeError, match="device-side assert"):
            await read(failing)
        with pytest.raises(ModelStalled, match="the GPU has failed"):
            await read(waiting)
        with pytest.raises(ModelStalled, match="the GPU has failed"):
            thread.check()

    run(test)
