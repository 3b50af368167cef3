"""The engine that writes one reply after another, in a thread."""

import asyncio
import logging
import threading
import traceback
from collections.abc import Callable
from contextlib import suppress
from queue import SimpleQueue
from typing import Any

import torch
from transformers import PreTrainedModel

from streaming_bots.errors import ModelStalled
from streaming_bots.generation.engine import Engine, Streamer, watch_layers
from streaming_bots.generation.prefix_cache import PrefixCache
from streaming_bots.operations.machine import free_memory
from streaming_bots.operations.metrics import BotMetrics
from streaming_bots.settings import BotSettings

logger = logging.getLogger("ray.serve")


class ModelThread(Engine):
    """Calls `generate_text(streamer)` in its thread, for one streamer at a time.

    A second thread would have its own OpenMP threads, and compete for the cores. The thread is a
    daemon, since it may hang, and the replica's process must not wait for it.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        generate_text: Callable[..., None],
        settings: BotSettings,
        metrics: BotMetrics | None = None,
    ) -> None:
        super().__init__(1, settings, metrics)
        self.generate_text = generate_text
        room = min(settings.prefix_cache_mb * 1_000_000, free_memory(model.device) // 4)
        self.prefixes = PrefixCache(model, room)
        self.loop = asyncio.get_running_loop()
        self.jobs: SimpleQueue[Streamer] = SimpleQueue()  # at most one
        watch_layers(model, self.note_progress)
        self.thread = threading.Thread(target=self._run, name="model", daemon=True)
        self.thread.start()

    # Called on the event loop

    def cancel(self, streamer: Streamer) -> None:
        streamer.cancel()
        if streamer not in self.running:
            self.submitted.pop(streamer, None)
        self._changed()

    def _start(self, streamer: Streamer) -> None:
        self._begin_next()

    def _begin_next(self) -> None:
        if self.submitted and not self.running:
            streamer = next(iter(self.submitted))
            self.running.add(streamer)
            self.jobs.put(streamer)

    def _ended(self, streamer: Streamer) -> None:
        self.error = None  # if the model seemed stalled, it was only slow
        self.submitted.pop(streamer)
        self.running.remove(streamer)
        self._begin_next()
        self._changed()

    # Called in the model's thread

    def _run(self) -> None:
        while True:
            streamer = self.jobs.get()
            self.note_progress()
            try:
                if streamer.done:  # its readers have just left
                    streamer.end()
                else:
                    with self.prefixes.used_by(streamer):
                        self.generate_text(streamer)
            except Exception as error:
                if streamer.done:
                    logger.exception("The model failed for a reply that nobody reads any more")
                # The streamer keeps the error, whose frames would keep a KV cache alive
                traceback.clear_frames(error.__traceback__)
                streamer.fail(error)
                if gpu_is_lost():
                    self._on_loop(self.give_up, ModelStalled("the GPU has failed"))
                    return
            except BaseException as error:  # such as SystemExit
                death = ModelStalled(f"the model's thread died of {type(error).__name__}")
                death.__cause__ = error
                self._on_loop(self.give_up, death)
                return
            self.note_progress()
            self._on_loop(self._ended, streamer)
            del streamer  # an idle thread would keep its prompt and its reply

    def _on_loop(self, function: Callable[..., None], *arguments: Any) -> None:
        with suppress(RuntimeError):  # the loop is closed: the process is ending
            self.loop.call_soon_threadsafe(function, *arguments)


def gpu_is_lost() -> bool:
    """Whether an error has made the GPU unusable for the rest of this process."""
    if not torch.cuda.is_initialized():
        return False
    try:
        torch.cuda.synchronize()
    except RuntimeError:
        return True
    return False
