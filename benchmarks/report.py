"""Writes measurements as a table, a plot and JSON."""

import json
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

GENERATE = "`generate` in process"
CONTINUOUS = "continuous batching in process"
LENGTHS = (8, 256)  # shortest and longest reply in the arrival test, in tokens


def write_report(result: dict[str, Any], folder: Path) -> None:
    """Write results.json, results.md and results.png."""
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
        f"{options['cpus']} threads, {options['gpus']:g} GPUs; {result['machine']}; "
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
                    f"{measured.get(f'{kind}_ms_{percent}', float('nan')):.0f} ms"
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
