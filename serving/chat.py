"""One client's WebSocket: prompts are read ahead, and each is answered once, in order."""

import asyncio
import logging
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass

from fastapi import WebSocketDisconnect
from ray.exceptions import TaskCancelledError
from starlette.websockets import WebSocketState

from serving.metrics import BotMetrics
from serving.model_thread import TooManyWaiting
from serving.prompts import TextRequest
from serving.streaming import ReplyStreamer
from serving.wire import REFUSALS, Restarting, Wire, close

MAX_PROMPTS_AHEAD = 100  # that one client may send before it has the replies
MAX_CHARACTERS_AHEAD = 1_000_000  # of all of these, before another one
NOTHING = TextRequest.model_construct(prompt="", max_new_tokens=0)  # asked by a bad frame

logger = logging.getLogger("ray.serve")


@dataclass(eq=False)
class Prompt:
    """A prompt, or what is wrong with it, and the reply that it will get."""

    request: TextRequest
    streamer: ReplyStreamer
    error: Exception | None = None


class Chat:
    """Iterate over it for the client's prompts, and answer each one inside `answer`."""

    def __init__(
        self,
        wire: Wire,
        new_streamer: Callable[[Sequence[str]], ReplyStreamer],  # from stop strings
        cancel: Callable[[ReplyStreamer], None],
        metrics: BotMetrics,
        draining: asyncio.Event,  # set when this replica is to be no longer
    ) -> None:
        self.wire = wire
        self.ws = wire.ws
        self.new_streamer = new_streamer
        self.cancel = cancel
        self.metrics = metrics
        self.draining = draining
        self.prompts: asyncio.Queue[Prompt | None] = asyncio.Queue()  # None: no more are answered
        self.unanswered: list[Prompt] = []
        self.spoken = 0  # prompts and replies so far
        self.messages = 0  # of these, that the model still sees

    def remember(self, messages: int) -> None:
        """Take note of one more exchange, after which the model sees so many messages."""
        self.spoken += 2
        self.messages = messages

    @asynccontextmanager
    async def open(self) -> AsyncIterator[None]:
        """Accept the socket and read it; when the client leaves, what is inside is cancelled.

        Reading on during a reply is how a client that leaves is noticed at once.
        """
        await self.wire.accept()
        try:
            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(self.read_prompts())
                tasks.create_task(self.end_when_draining())
                yield
        except* WebSocketDisconnect:
            pass
        except* Exception as errors:
            error = errors.exceptions[0]
            if isinstance(error, REFUSALS):
                self.metrics.count("refused")
            else:
                logger.exception("A chat failed")
            await close(self.ws, error)
        finally:
            for _ in self.unanswered:
                self.metrics.count("cancelled")

    async def refuse(self, reason: str) -> None:
        """Accept the socket, since a code can only be sent then, and close it with 1013."""
        self.metrics.count("refused")
        await self.wire.accept()
        await close(self.ws, TooManyWaiting(reason))

    async def read_prompts(self) -> None:
        """Queue the client's prompts, in order, until it leaves."""
        while True:
            await asyncio.sleep(0)  # others' turn, also while this client's frames keep coming
            try:
                frame = await self.ws.receive()
            except TaskCancelledError:  # Serve cancels the reading of a client that has left
                raise WebSocketDisconnect(1006) from None
            if frame["type"] == "websocket.disconnect":
                raise WebSocketDisconnect(frame["code"])
            problem = None
            try:
                request = self.wire.read(frame)
            except REFUSALS as error:
                request, problem = NOTHING, error
            if request == "ping":
                if self.ws.application_state is WebSocketState.CONNECTED:  # not being closed
                    await self.wire.send_pong()
                continue
            if request == "stop":
                for earlier in self.unanswered:
                    self.cancel(earlier.streamer)
                continue
            prompt = Prompt(request, self.new_streamer(request.stop), problem)
            if len(self.unanswered) > MAX_PROMPTS_AHEAD:
                raise TooManyWaiting(f"more than {MAX_PROMPTS_AHEAD} prompts wait for a reply")
            ahead = sum(len(earlier.request.prompt) for earlier in self.unanswered)
            if ahead > MAX_CHARACTERS_AHEAD:
                raise TooManyWaiting(f"{ahead} characters wait for a reply")
            self.unanswered.append(prompt)
            self.prompts.put_nowait(prompt)

    async def end_when_draining(self) -> None:
        """Have the prompts that are there answered, and then the socket closed."""
        await self.draining.wait()
        self.prompts.put_nowait(None)

    async def __aiter__(self) -> AsyncIterator[Prompt]:
        """The client's prompts, except for what needs no model: those are answered here."""
        while True:
            prompt = await self.prompts.get()
            if prompt is None:
                while self.unanswered:
                    self.unanswered.pop()
                    self.metrics.count("refused")
                await close(self.ws, Restarting("this replica ends; connect again for another"))
                raise WebSocketDisconnect(1012)
            if prompt.request.prompt.strip() and not prompt.streamer.cancelled:
                yield prompt
            else:
                async with self.answer(prompt):
                    if prompt.error is not None:
                        raise prompt.error

    @asynccontextmanager
    async def answer(self, prompt: Prompt) -> AsyncIterator[None]:
        """Send the end of the reply that is streamed inside, or the error that is raised there."""
        try:
            yield
            outcome = "cancelled" if prompt.streamer.cancelled else "finished"
            end = self.wire.send_done(prompt.streamer, self.messages, self.spoken)
        except WebSocketDisconnect:
            raise
        except REFUSALS as error:
            outcome, end = "refused", self.wire.send_error(error)
        except Exception as error:
            logger.exception("A reply failed")
            outcome, end = "failed", self.wire.send_error(error)
        finally:
            self.cancel(prompt.streamer)
        self.unanswered.remove(prompt)
        self.metrics.count(outcome)
        await end
