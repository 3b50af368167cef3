"""`serve run` in a subprocess, as people type it, on a machine without a model hub."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

SERVE = Path(sys.executable).with_name("serve")
# Not the Ray of the other tests, and no hub, as on a machine without a network.
ENVIRONMENT = os.environ | {
    "RAY_ADDRESS": "local",
    "RAY_USAGE_STATS_ENABLED": "0",
    "HF_ENDPOINT": "http://127.0.0.1:9",
    "HF_HUB_CACHE": "/nonexistent",
}


@contextmanager
def serve_run(folder: Path, *arguments: str) -> Iterator[list[str]]:
    """`serve run` until the bot is ready, with what it printed so far; Ctrl-C ends it."""
    process = subprocess.Popen(
        [SERVE, "run", *arguments],
        cwd=folder,
        env=ENVIRONMENT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    printed = []
    try:
        for line in process.stdout:
            printed.append(line)
            if "is ready at" in line:
                break
        else:
            pytest.fail("".join(printed))
        yield printed
    finally:
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=60)
