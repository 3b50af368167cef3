"""Measures the bots against their limit and their peers: `python benchmarks/bench.py compare`.

    bench.py load http://localhost:8000/v1 --streams 16       any of our bots
    bench.py load http://localhost:8001/v1 --model NAME       any server that speaks OpenAI's API
    bench.py compare --model gpt2-shape --cpus 1              several servers in one run
    bench.py compare --model llama-1b-shape --gpus 1          the same on a GPU

`compare` starts one server at a time. Before each measurement, it suspends the server and measures
`generate` alone. So a machine that slows down affects both. Needs port 8000 and the extra `bench`.
"""

import argparse
import asyncio
import os
import platform
import signal
import subprocess
import sys
import tempfile
import time
from datetime import date
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any, Self

import psutil
from load import Reply, closed_loop, mean_length, open_loop, openai, summarize
from report import CONTINUOUS, LENGTHS, write_report
from servers import REPOSITORY, Server, our_bot, peer, stopped


class InProcess:
    """A process that measures `generate`, or continuous batching, on request."""

    def __init__(self, way: str, model: Path, options: argparse.Namespace) -> None:
        command = [sys.executable, "benchmarks/in_process.py", way, "--model", str(model)]
        command += ["--dtype", options.dtype, "--threads", str(options.cpus)]
        command += ["--tokens", str(options.tokens), "--device", "cuda" if options.gpus else "cpu"]
        if options.max_batch_size:
            command += ["--max-batch-size", str(options.max_batch_size)]
        self.process = subprocess.Popen(
            command,
            cwd=REPOSITORY,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )

    def measure(self, streams: int) -> float:
        """Return the tokens per second of all streams together."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(f"{streams}\n")
        self.process.stdin.flush()
        return float(self.process.stdout.readline())

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.communicate()


def progress(text: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {text}", file=sys.stderr, flush=True)


def measure_streams(
    server: Server, process: psutil.Process, limit: InProcess, options: argparse.Namespace
) -> dict[int, Any]:
    results = {}
    asyncio.run(closed_loop(server.ask, 2, 1, 8, ignore))  # warm up
    for count in options.streams:
        with stopped(process):
            most = limit.measure(count)
        replies = asyncio.run(closed_loop(server.ask, count, 1, options.tokens, ignore))
        results[count] = {"limit": most, **summarize(replies)}
        speed = results[count].get("tokens_per_s", 0.0)
        progress(f"  {server.name}, {count} streams: {speed:.1f} tokens/s of {most:.1f}")
    return results


def measure_in_process(
    batch: InProcess, limit: InProcess, options: argparse.Namespace
) -> dict[int, Any]:
    results = {}
    batch.measure(1)  # until it is ready and idle
    for count in options.streams:
        most, speed = limit.measure(count), batch.measure(count)
        results[count] = {"limit": most, "tokens_per_s": speed, "failures": 0}
        progress(f"  {CONTINUOUS}, {count} streams: {speed:.1f} tokens/s of {most:.1f}")
    return results


def ignore(reply: Reply) -> None:
    pass


def memory_mb() -> float | None:
    """Return the anonymous memory (RssAnon) of the running replica, in MiB."""
    for process in psutil.process_iter():
        try:
            if "ServeReplica" in "".join(process.cmdline()):
                lines = Path(f"/proc/{process.pid}/status").read_text().splitlines()
                used = next(line for line in lines if line.startswith("RssAnon"))
                return int(used.split()[1]) / 1024
        except (psutil.Error, OSError):  # the process has just ended
            continue
    return None


def measure_rounds(
    servers: list[Server], model: Path, log: Path, options: argparse.Namespace
) -> tuple[dict[str, list[dict[int, Any]]], dict[str, float | None]]:
    """Return, by server, the results of each round by streams, and the replica's memory in MiB."""
    rounds: dict[str, list[dict[int, Any]]] = {}
    memory: dict[str, float | None] = {}
    with InProcess("generate", model, options) as limit:
        for number in range(options.rounds):
            progress(f"round {number + 1} of {options.rounds}")
            with InProcess("continuous", model, options) as batch:
                measured = measure_in_process(batch, limit, options)
            rounds.setdefault(CONTINUOUS, []).append(measured)
            for server in servers:
                with server.running(log) as process:
                    measured = measure_streams(server, process, limit, options)
                    memory[server.name] = memory_mb()
                rounds.setdefault(server.name, []).append(measured)
    return rounds, memory


def compare(options: argparse.Namespace) -> None:
    with tempfile.TemporaryDirectory() as folder:
        model, log = Path(folder) / "model", Path(folder) / "log"
        progress(f"making {options.model}")
        saved = [sys.executable, "-c", SAVE, options.model, str(model)]
        subprocess.run(saved, cwd=REPOSITORY / "benchmarks", check=True, capture_output=True)
        servers = [our_bot(name, model, bot_arguments(name, options)) for name in options.bots]
        servers += [peer(definition, model) for definition in options.peer]
        rounds, memory = measure_rounds(servers, model, log, options)
        arrivals = measure_arrivals(servers, rounds, log, options) if options.arrivals else {}
        weights = sum(file.stat().st_size for file in model.glob("*.safetensors")) / 2**20
    result = {
        "date": date.today().isoformat(),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "versions": {name: version(name) for name in ("ray", "transformers", "torch")},
        "options": {
            name: value
            for name, value in vars(options).items()
            if name not in ("run", "output", "peer")  # not paths of this machine
        },
        "float32_weights_mb": weights,
        "replica_rss_anon_mb": memory,
        "rounds": rounds,
        "arrivals": arrivals,
    }
    write_report(result, options.output)


def bot_arguments(name: str, options: argparse.Namespace) -> list[str]:
    arguments = [f"dtype={options.dtype}", f"num_cpus={options.cpus}", f"num_gpus={options.gpus}"]
    if options.max_batch_size and name.startswith(("batchbot", "continuousbot")):
        arguments.append(f"max_batch_size={options.max_batch_size}")
    return arguments


SAVE = "import sys; from in_process import *; save_endless(sys.argv[1], Path(sys.argv[2]))"


def measure_arrivals(
    servers: list[Server], rounds: dict[str, list[Any]], log: Path, options: argparse.Namespace
) -> dict[str, Any]:
    """Measure Poisson arrivals at 70 % of the best throughput of the first bot that batches."""
    batching = [server for server in servers if server.name in ("batchbot", "continuousbot")]
    if not batching:
        return {}
    capacity = max(
        median(measured[count].get("tokens_per_s", 0) for measured in rounds[batching[0].name])
        for count in options.streams
    )
    if not capacity:
        return {}
    rate = 0.7 * capacity / mean_length(LENGTHS)
    results: dict[str, Any] = {"requests_per_s": rate, "of": batching[0].name}
    for server in batching:
        progress(f"{rate:.2f} requests/s for {options.arrivals} s to {server.name}")
        with server.running(log):
            asyncio.run(closed_loop(server.ask, 2, 1, 8, ignore))
            replies = asyncio.run(open_loop(server.ask, rate, options.arrivals, LENGTHS, ignore))
        results[server.name] = summarize(replies)
    return results


def load(options: argparse.Namespace) -> None:
    ask = openai(options.url, options.model)
    done = 0

    def count(reply: Reply) -> None:
        nonlocal done
        done += 1
        progress(f"{done} replies, the last with {reply.error or f'{len(reply.arrivals)} chunks'}")

    if options.rate:
        run = open_loop(ask, options.rate, options.seconds, LENGTHS, count)
    else:
        run = closed_loop(ask, options.streams, options.requests, options.tokens, count)
    for name, number in summarize(asyncio.run(run)).items():
        print(f"{name:14} {number:10.1f}")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(required=True)

    one = commands.add_parser("load", help="load a running server")
    one.set_defaults(run=load)
    one.add_argument("url", help="base URL, including /v1")
    one.add_argument("--model", help="the model's name there; bots need none")
    one.add_argument("--streams", type=int, default=4, help="number of concurrent clients")
    one.add_argument("--requests", type=int, default=4, help="requests per client")
    one.add_argument("--tokens", type=int, default=48, help="tokens per reply")
    one.add_argument("--rate", type=float, help="Poisson arrivals per second, instead of --streams")
    one.add_argument("--seconds", type=float, default=60, help="duration with --rate")

    many = commands.add_parser("compare", help="compare bots, peers and `generate` in one run")
    many.set_defaults(run=compare)
    many.add_argument(
        "--model", default="gpt2-shape", help="gpt2-shape, llama-1b-shape, or a model's name"
    )
    many.add_argument("--dtype", default="float32")
    many.add_argument("--cpus", type=int, default=os.cpu_count(), help="per bot and `generate`")
    many.add_argument("--gpus", type=float, default=0, help="per bot; `generate` uses the first")
    many.add_argument("--max-batch-size", type=int, help="of bots that batch; by default, theirs")
    many.add_argument("--streams", type=int, nargs="+", default=[1, 2, 4, 8, 16, 32])
    many.add_argument("--tokens", type=int, default=48)
    many.add_argument("--rounds", type=int, default=3)
    many.add_argument(
        "--arrivals", type=float, default=60, help="seconds of the arrival test; 0 skips it"
    )
    many.add_argument("--bots", nargs="*", default=["batchbot", "continuousbot", "textbot"])
    many.add_argument("--peer", action="append", default=[], metavar="NAME=URL=COMMAND")
    many.add_argument("--output", type=Path, default=REPOSITORY / "benchmarks" / "results")

    options = parser.parse_args()
    # Background jobs of a shell ignore Ctrl-C, and so would their servers, which must end by it.
    # Each of these signals ends this program and what it has started.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.default_int_handler)
    options.run(options)


if __name__ == "__main__":
    main()
