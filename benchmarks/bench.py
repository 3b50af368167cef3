"""Measures the bots beside their limit and their peers: `python benchmarks/bench.py compare`.

    bench.py load http://localhost:8000/ --streams 16        any of our bots
    bench.py load http://localhost:8001/v1 --openai NAME     any server that speaks OpenAI's API
    bench.py compare --model gpt2-shape --dtype bfloat16     a set, interleaved, in one run

`compare` starts one server after the other, alone on the machine. Before each measurement the
server is stopped for a moment, and `generate` measured in its place, so that a machine that grows
slower does so for both. Needs port 8000 and the extra `bench`.
"""

import argparse
import asyncio
import json
import os
import platform
import shlex
import signal
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import date
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any

import psutil
from load import Ask, Reply, bot, closed_loop, mean_length, open_loop, openai, summarize

REPOSITORY = Path(__file__).parent.parent
LENGTHS = (8, 256)  # tokens of a reply in the arrival test
SETTINGS = {
    "haproxy": {"RAY_SERVE_ENABLE_HA_PROXY": "1", "RAY_SERVE_THROUGHPUT_OPTIMIZED": "1"},
    # Ray's workers at the priority of its daemons, and a controller that looks around less often.
    "calm": {"RAY_worker_niceness": "0", "RAY_SERVE_CONTROL_LOOP_INTERVAL_S": "2"},
}
START_S = 300  # a server may take to start
GENERATE = "`generate` in process"
CONTINUOUS = "continuous batching in process"
SETTLE_S = 1  # until a server that was stopped has noticed what it missed


@dataclass
class Server:
    """Something that answers at a URL once its command has run for a while."""

    name: str
    command: list[str]
    ask: Ask
    ready: str  # a URL that answers then
    environment: dict[str, str] = field(default_factory=dict)

    @contextmanager
    def running(self, log: Path) -> Iterator[psutil.Process]:
        if answers(self.ready):
            raise SystemExit(f"something else answers at {self.ready} already")
        environment = os.environ | {"RAY_USAGE_STATS_ENABLED": "0"} | self.environment
        with log.open("a") as output:
            process = subprocess.Popen(
                self.command, cwd=REPOSITORY, env=environment, stdout=output, stderr=output
            )
        try:
            deadline = time.monotonic() + START_S
            while not answers(self.ready):
                if process.poll() is not None or time.monotonic() > deadline:
                    lines = log.read_text(errors="replace").splitlines()[-20:]
                    raise SystemExit("\n".join([*lines, f"{self.name} does not start"]))
                time.sleep(0.5)
            yield psutil.Process(process.pid)
        finally:
            process.send_signal(signal.SIGINT)
            try:
                process.wait(60)
            except subprocess.TimeoutExpired:
                process.kill()
            while answers(self.ready):  # HAProxy takes half a minute more
                time.sleep(0.5)


@contextmanager
def stopped(server: psutil.Process) -> Iterator[None]:
    """Keep a server and all that it has started from running meanwhile."""
    family = [server, *server.children(recursive=True)]
    signal_all(family, signal.SIGSTOP)
    try:
        yield
    finally:
        signal_all(family, signal.SIGCONT)
        time.sleep(SETTLE_S)


def signal_all(processes: list[psutil.Process], number: int) -> None:
    for process in processes:
        with suppress(psutil.NoSuchProcess):
            process.send_signal(number)


class InProcess:
    """`generate`, or continuous batching, in a process that waits to be asked."""

    def __init__(self, way: str, model: Path, options: argparse.Namespace) -> None:
        command = [sys.executable, "benchmarks/in_process.py", way, "--model", str(model)]
        command += ["--dtype", options.dtype, "--threads", str(options.cpus)]
        command += ["--tokens", str(options.tokens)]
        self.process = subprocess.Popen(
            command,
            cwd=REPOSITORY,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )

    def measure(self, streams: int) -> float:
        """Tokens a second of all streams together."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(f"{streams}\n")
        self.process.stdin.flush()
        return float(self.process.stdout.readline())

    def end(self) -> None:
        self.process.kill()
        self.process.wait()


def answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=5):
            return True
    except urllib.error.HTTPError as error:
        return error.code == 405  # it takes POST only
    except OSError:
        return False


def our_bot(name: str, model: Path, dtype: str, cpus: int) -> Server:
    """`textbot`, or with some of the SETTINGS, as `textbot+haproxy+calm`."""
    module, *settings = name.split("+")
    environment = {key: value for name in settings for key, value in SETTINGS[name].items()}
    options = [f"model={model}", f"dtype={dtype}", f"num_cpus={cpus}"]
    return Server(
        name,
        ["serve", "run", f"{module}:build", *options],
        bot("http://127.0.0.1:8000/"),
        "http://127.0.0.1:8000/",
        environment,
    )


def peer(definition: str, model: Path) -> Server:
    """From `NAME=URL=COMMAND`; {model} in the command is the model's folder."""
    name, url, command = definition.split("=", 2)
    words = shlex.split(command.replace("{model}", str(model)))
    return Server(name, words, openai(url, str(model)), f"{url}/models")


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
    for count in options.streams:
        most, speed = limit.measure(count), batch.measure(count)
        results[count] = {"limit": most, "tokens_per_s": speed, "failures": 0}
        progress(f"  {CONTINUOUS}, {count} streams: {speed:.1f} tokens/s of {most:.1f}")
    return results


def ignore(reply: Reply) -> None:
    pass


def memory_mb() -> float | None:
    """Anonymous memory of the replica that runs (RssAnon)."""
    for process in psutil.process_iter():
        try:
            if "ServeReplica" in "".join(process.cmdline()):
                lines = Path(f"/proc/{process.pid}/status").read_text().splitlines()
                used = next(line for line in lines if line.startswith("RssAnon"))
                return int(used.split()[1]) / 1024
        except (psutil.Error, OSError):  # it has ended meanwhile
            continue
    return None


def compare(options: argparse.Namespace) -> None:
    with tempfile.TemporaryDirectory() as folder:
        model, log = Path(folder) / "model", Path(folder) / "log"
        progress(f"making {options.model}")
        saved = [sys.executable, "-c", SAVE, options.model, str(model)]
        subprocess.run(saved, cwd=REPOSITORY / "benchmarks", check=True, capture_output=True)
        servers = [our_bot(name, model, options.dtype, options.cpus) for name in options.bots]
        servers += [peer(definition, model) for definition in options.peer]
        rounds: dict[str, list[dict[int, Any]]] = {}
        memory: dict[str, float | None] = {}
        limit = InProcess("generate", model, options)
        for number in range(options.rounds):
            progress(f"round {number + 1} of {options.rounds}")
            batch = InProcess("continuous", model, options)
            measured = measure_in_process(batch, limit, options)
            rounds.setdefault(CONTINUOUS, []).append(measured)
            batch.end()
            for server in servers:
                with server.running(log) as process:
                    measured = measure_streams(server, process, limit, options)
                    memory[server.name] = memory_mb()
                rounds.setdefault(server.name, []).append(measured)
        limit.end()
        arrivals = measure_arrivals(servers, rounds, log, options) if options.arrivals else {}
        weights = sum(file.stat().st_size for file in model.glob("*.safetensors")) / 2**20
    result = {
        "date": date.today().isoformat(),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "versions": {name: version(name) for name in ("ray", "transformers", "torch")},
        "options": {
            name: str(value) if name == "output" else value
            for name, value in vars(options).items()
            if name != "run"
        },
        "float32_weights_mb": weights,
        "replica_rss_anon_mb": memory,
        "rounds": rounds,
        "arrivals": arrivals,
    }
    write_report(result, options.output)


SAVE = "import sys; from in_process import *; save_endless(sys.argv[1], Path(sys.argv[2]))"


def measure_arrivals(
    servers: list[Server], rounds: dict[str, list[Any]], log: Path, options: argparse.Namespace
) -> dict[str, Any]:
    """Poisson arrivals at 70 % of the best throughput of the first bot that batches."""
    batching = [server for server in servers if server.name in ("batchbot", "continuousbot")]
    if not batching:
        return {}
    capacity = max(
        median(measured[count]["tokens_per_s"] for measured in rounds[batching[0].name])
        for count in options.streams
    )
    rate = 0.7 * capacity / mean_length(LENGTHS)
    results: dict[str, Any] = {"requests_per_s": rate, "of": batching[0].name}
    for server in batching:
        progress(f"{rate:.2f} requests/s for {options.arrivals} s to {server.name}")
        with server.running(log):
            asyncio.run(closed_loop(server.ask, 2, 1, 8, ignore))
            replies = asyncio.run(open_loop(server.ask, rate, options.arrivals, LENGTHS, ignore))
        results[server.name] = summarize(replies)
    return results


def write_report(result: dict[str, Any], folder: Path) -> None:
    """results.json, results.md and results.png."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "results.json").write_text(json.dumps(result, indent=1) + "\n")
    options, rounds = result["options"], result["rounds"]
    streams = options["streams"]

    def middle(name: str, count: int, key: str) -> float | None:
        values = [measured[count].get(key) for measured in rounds[name]]
        return None if None in values else median(values)

    limits = [
        median(measured[count]["limit"] for name in rounds for measured in rounds[name])
        for count in streams
    ]
    lines = [
        f"{options['model']}, {options['dtype']}, {options['tokens']} tokens a reply, "
        f"{options['cpus']} threads; {result['machine']}; "
        + ", ".join(f"{name} {number}" for name, number in result["versions"].items())
        + f"; {result['date']}; medians of {options['rounds']} rounds.",
        "",
        "| tokens/s (part of `generate`), TTFT p95 | "
        + " | ".join(f"{count} streams" for count in streams)
        + " |",
        "|---|" + "---|" * len(streams),
        f"| {GENERATE} | " + " | ".join(f"{limit:.0f}" for limit in limits) + " |",
    ]
    for name in rounds:
        cells = []
        for count in streams:
            cell = "-"
            if (speed := middle(name, count, "tokens_per_s")) is not None:
                parts = [m[count]["tokens_per_s"] / m[count]["limit"] for m in rounds[name]]
                cell = f"{speed:.0f} ({median(parts):.2f})"
            if (first := middle(name, count, "ttft_ms_p95")) is not None:
                cell += f", {first:.0f} ms"
            if failures := sum(measured[count]["failures"] for measured in rounds[name]):
                cell += f", {failures} failed"
            cells.append(cell)
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    if memory := [f"{name} {mb:.0f}" for name, mb in result["replica_rss_anon_mb"].items() if mb]:
        weights = result["float32_weights_mb"]
        lines += [
            "",
            f"Anonymous memory of the replica (RssAnon), in MB: {', '.join(memory)}; "
            f"the weights are {weights:.0f} in float32.",
        ]
    if result["arrivals"]:
        lines += [
            "",
            f"Poisson arrivals, {result['arrivals']['requests_per_s']:.2f} a second, 70 % of what "
            f"{result['arrivals']['of']} can do; replies of {LENGTHS[0]} to {LENGTHS[1]} tokens:",
            "",
            "| | requests | failed | TTFT p50 | p95 | p99 | ITL p50 | p95 | p99 |",
            "|---|---|---|---|---|---|---|---|---|",
        ]
        for name, measured in result["arrivals"].items():
            if isinstance(measured, dict):
                times = [
                    f"{measured[f'{kind}_ms_{percent}']:.0f} ms"
                    for kind in ("ttft", "itl")
                    for percent in ("p50", "p95", "p99")
                ]
                counts = [str(measured["requests"]), str(measured["failures"])]
                lines.append(f"| {name} | " + " | ".join(counts + times) + " |")
    (folder / "results.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))
    plot(list(rounds), streams, limits, middle, folder / "results.png")


def plot(
    names: list[str],
    streams: list[int],
    limits: list[float],
    middle: Callable[[str, int, str], float | None],
    file: Path,
) -> None:
    import matplotlib.pyplot as plt

    figure, panels = plt.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
    panels[0].plot(streams, limits, "k--", marker="o", label=GENERATE)
    for name in names:
        style = "--" if name == CONTINUOUS else "-"
        colour = f"C{names.index(name)}"
        for axes, key in zip(panels, ("tokens_per_s", "ttft_ms_p95"), strict=True):
            points = [middle(name, count, key) for count in streams]
            if None not in points:
                axes.plot(streams, points, style, color=colour, marker="o", label=name)
    panels[0].set(title="Throughput", ylabel="tokens/s, all streams", ylim=(0, None))
    panels[1].set(title="Time to first token, p95", ylabel="ms", yscale="log")
    for axes in panels:
        axes.set_xscale("log", base=2)
        axes.set(xticks=streams, xticklabels=streams, xlabel="streams")
        axes.grid(alpha=0.3)
    panels[0].legend()
    figure.savefig(file, dpi=110)


def load(options: argparse.Namespace) -> None:
    ask = openai(options.url, options.openai) if options.openai else bot(options.url)
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

    one = commands.add_parser("load", help="load on a server that runs")
    one.set_defaults(run=load)
    one.add_argument("url")
    one.add_argument("--openai", metavar="MODEL", help="it speaks OpenAI's API, for this model")
    one.add_argument("--streams", type=int, default=4, help="clients at once")
    one.add_argument("--requests", type=int, default=4, help="of each client")
    one.add_argument("--tokens", type=int, default=48, help="of each reply")
    one.add_argument("--rate", type=float, help="requests a second, instead of so many at once")
    one.add_argument("--seconds", type=float, default=60, help="with --rate")

    many = commands.add_parser("compare", help="servers, limits and peers in one run")
    many.set_defaults(run=compare)
    many.add_argument("--model", default="gpt2-shape", help="gpt2-shape, or a model's name")
    many.add_argument("--dtype", default="float32")
    many.add_argument("--cpus", type=int, default=os.cpu_count(), help="of a bot and of a limit")
    many.add_argument("--streams", type=int, nargs="+", default=[1, 2, 4, 8, 16, 32])
    many.add_argument("--tokens", type=int, default=48)
    many.add_argument("--rounds", type=int, default=3)
    many.add_argument(
        "--arrivals", type=float, default=60, help="seconds of the arrival test; 0: none"
    )
    many.add_argument("--bots", nargs="*", default=["batchbot", "continuousbot", "textbot"])
    many.add_argument("--peer", action="append", default=[], metavar="NAME=URL=COMMAND")
    many.add_argument("--output", type=Path, default=REPOSITORY / "benchmarks" / "results")

    options = parser.parse_args()
    # A shell has its background jobs ignore Ctrl-C, and so would the servers, which end by it.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    options.run(options)


if __name__ == "__main__":
    main()
