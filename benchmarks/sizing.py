"""Measures a chat's cost to a replica and to Serve's proxy: `python benchmarks/sizing.py`.

Opens sockets to a Chatbot with tiny-dialog, sends prompts on some of them, and prints the memory
and processor time per socket as JSON, for the estimates in deploy/SCALING.md. Needs port 8000.
"""

import argparse
import json
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path

import psutil
from servers import our_bot
from websockets.sync.client import ClientConnection, connect

from streaming_bots.models.source import BUNDLED_FOLDER

URL = "ws://127.0.0.1:8000/"
SETTLE_S = 3  # until the processes are idle again


def processes(server: psutil.Process) -> dict[str, psutil.Process]:
    """Return Serve's proxy and the Chatbot's replica."""
    found = {}
    for process in server.children(recursive=True):
        title = "".join(process.cmdline()[:1])
        for name, beginning in (("proxy", "ray::ProxyActor"), ("replica", "ray::ServeReplica")):
            if title.startswith(beginning):
                found[name] = process
    return found


def memory_mb(process: psutil.Process) -> float:
    """Return the memory that only this process uses, in MB."""
    return process.memory_full_info().uss / 1e6


def seconds(process: psutil.Process) -> float:
    """Return the processor time that a process has used so far."""
    times = process.cpu_times()
    return times.user + times.system


def speak(websocket: ClientConnection) -> int:
    """Ask for one reply, and return how many messages it has."""
    websocket.send("Tell me a story about dogs.")
    frames = 1
    while websocket.recv() != "<>":
        frames += 1
    return frames


def measure(server: psutil.Process, count: int, turns: int) -> dict[str, dict[str, float]]:
    found = processes(server)
    results: dict[str, dict[str, float]] = {name: {} for name in found}
    with ExitStack() as stack:
        # The first sockets cost more, so they open before the measurement.
        sockets = [stack.enter_context(connect(URL)) for _ in range(count // 5)]
        speak(sockets[0])
        time.sleep(SETTLE_S)
        before = {name: memory_mb(process) for name, process in found.items()}
        sockets += [stack.enter_context(connect(URL)) for _ in range(count)]
        time.sleep(SETTLE_S)
        for name, process in found.items():
            results[name]["MB per socket"] = (memory_mb(process) - before[name]) / count

        started = {name: seconds(process) for name, process in found.items()}
        time.sleep(10 * SETTLE_S)
        idle = {name: seconds(process) - started[name] for name, process in found.items()}
        frames = sum(speak(sockets[turn]) for turn in range(turns))
        for name, process in found.items():
            spent = seconds(process) - started[name] - idle[name]
            results[name]["ms per frame"] = spent / frames * 1000
            results[name]["ms per second and idle socket"] = (
                idle[name] / (10 * SETTLE_S) / len(sockets) * 1000
            )
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sockets", type=int, default=400, help="sockets to measure; at most 416")
    parser.add_argument("--turns", type=int, default=50, help="total number of replies")
    options = parser.parse_args()
    model = BUNDLED_FOLDER
    with tempfile.TemporaryDirectory() as folder:
        server = our_bot("chatbot", model, [])
        with server.running(Path(folder) / "log") as process:
            results = measure(process, options.sockets, options.turns)
    print(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
