"""Logs the progress of loading a model, which can take minutes."""

import logging
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from huggingface_hub.constants import HF_HUB_CACHE

from streaming_bots.models.source import Source

EVERY_S = 5.0

logger = logging.getLogger("ray.serve")


@contextmanager
def report_progress(source: Source) -> Iterator[None]:
    """Log every few seconds how much of the model is downloaded, and how long the loading takes.

    The progress bars of the hub's library overwrite one line, but Ray shows only whole lines.
    """
    began, done = time.monotonic(), threading.Event()

    def report() -> None:
        while not done.wait(EVERY_S):
            size = f"{downloaded_mb(source):.0f} MB downloaded, " if source.is_remote else ""
            logger.info(f"loading {source.name}: {size}{time.monotonic() - began:.0f} s")

    logger.info(f"loading {source.name}")
    reporter = threading.Thread(target=report, name="loading")
    reporter.start()
    try:
        yield
    finally:
        done.set()
        reporter.join()


def downloaded_mb(source: Source) -> float:
    """Return how much of a model the Hugging Face cache holds, including incomplete files."""
    blobs = Path(HF_HUB_CACHE) / f"models--{source.place.replace('/', '--')}" / "blobs"
    size = 0
    for file in blobs.glob("*"):
        with suppress(FileNotFoundError):  # it has just been renamed
            size += file.stat().st_size
    return size / 1e6
