"""`serve run` in a subprocess, as people type it, on a machine without a model hub."""

import os
import signal
import socket
import subprocess
import sys
import sysconfig
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from pathlib import Path

import psutil
import pytest

READY_S = 240  # only bounds a hang; half a minute is usual
# Ray itself waits 15 s for its agent to start, which a busy machine may need longer for.
RAY_GAVE_UP = "timed out during startup"
SERVE = Path(sys.executable).with_name("serve")
# Commands neither use the Ray of other tests nor reach the hub.
ENVIRONMENT = os.environ | {
    "RAY_ADDRESS": "local",
    "RAY_USAGE_STATS_ENABLED": "0",
    "HF_ENDPOINT": "http://127.0.0.1:9",
    "HF_HUB_CACHE": "/nonexistent",
}


@contextmanager
def serve_run(
    folder: Path,
    *arguments: str,
    python: Path = Path(sys.executable),
    ready_line: str = "is ready at",
    **environment: str,
) -> Iterator[list[str]]:
    """Start `serve run`; once the bot is ready, yield the lines that it prints. Ctrl-C ends it."""
    # Two Serves can share a port, and each then gets some of the requests.
    with socket.socket() as probe:
        assert probe.connect_ex(("127.0.0.1", 8000)) != 0, "port 8000 is in use"
    command = [str(python), str(SERVE), "run", *arguments]
    with ExitStack() as stack:
        start = partial(running, command, folder, environment, ready_line)
        process, printed = stack.enter_context(start())
        if any(RAY_GAVE_UP in line for line in printed):
            stack.close()
            process, printed = stack.enter_context(start())
        if process.poll() is not None or not any(ready_line in line for line in printed):
            pytest.fail(f"`serve run` is not ready: {''.join(printed)}")
        yield printed


@contextmanager
def running(
    command: list[str], folder: Path, environment: dict[str, str], ready_line: str
) -> Iterator[tuple[subprocess.Popen[str], list[str]]]:
    """Run a command; once it prints `ready_line`, or ends, yield it and the lines it prints."""
    process = subprocess.Popen(
        command,
        cwd=folder,
        env=ENVIRONMENT | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    printed: list[str] = []
    ready = threading.Event()

    def read() -> None:
        assert process.stdout is not None
        with process.stdout as lines:
            for line in lines:
                printed.append(line)
                if ready_line in line:
                    ready.set()
        ready.set()  # even if the process has ended before

    reader = threading.Thread(target=read)
    reader.start()
    try:
        ready.wait(READY_S)
        yield process, printed
    finally:
        family = []
        with suppress(psutil.NoSuchProcess):
            family = psutil.Process(process.pid).children(recursive=True)
        process.send_signal(signal.SIGINT)
        try:
            process.wait(60)
            _, left = psutil.wait_procs(family, 60)  # HAProxy takes half a minute more
            assert not left
        finally:
            for each in [process, *family]:  # so that they do not hold the port
                with suppress(psutil.NoSuchProcess):
                    each.kill()
            reader.join()


def add_libraries(environment: Path) -> None:
    """Let a virtual environment find this one's packages, except those installed as editable."""
    paths = {"base": str(environment), "platbase": str(environment)}
    folder = Path(sysconfig.get_path("purelib", "venv", paths))
    (folder / "libraries.pth").write_text(sysconfig.get_path("purelib"))
