"""Draws deploy/grafana.json from a Prometheus that scrapes a bot, into pictures/dashboard.png.

    python pictures/dashboard.py http://localhost:9090 --minutes 7

Fails if a query of the dashboard returns no data. Needs the extra `bench`.
"""

import argparse
import io
import json
import math
import time
from datetime import datetime
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import requests
from matplotlib.axes import Axes
from matplotlib.dates import AutoDateLocator, DateFormatter
from PIL import Image

FOLDER = Path(__file__).parent
PANELS = [
    panel
    for panel in json.loads((FOLDER.parent / "deploy" / "grafana.json").read_text())["panels"]
    if panel["type"] != "row"
]
COLUMNS = 3
COLORS = 128  # keeps the file small
STEP_S = 5
VARIABLES = {"$__rate_interval": "1m", "$application": ".+"}  # as Grafana would fill them in
UNITS = {"reqps": "requests/s", "decmbytes": "MB", "percent": "%", "short": ""}


def ask(prometheus: str, query: str, minutes: float) -> list[dict[str, Any]]:
    """Return the series of a query. Raises LookupError if it has no number."""
    for name, value in VARIABLES.items():
        query = query.replace(name, value)
    now = time.time()
    span = {"start": now - 60 * minutes, "end": now, "step": STEP_S}
    parameters: dict[str, str | float] = {"query": query, **span}
    answer = requests.get(f"{prometheus}/api/v1/query_range", params=parameters)
    answer.raise_for_status()
    series: list[dict[str, Any]] = answer.json()["data"]["result"]
    if all(math.isnan(float(value)) for each in series for _, value in each["values"]):
        raise LookupError(f"no data: {query}")
    return series


def draw(axes: Axes, panel: dict[str, Any], prometheus: str, minutes: float) -> None:
    for target in panel["targets"]:
        for series in ask(prometheus, target["expr"], minutes):
            if not any(float(value) for _, value in series["values"]):
                continue  # Grafana would show it, too, as a line at zero
            label = target["legendFormat"]
            for name, value in series["metric"].items():
                label = label.replace(f"{{{{{name}}}}}", value)
            points = [(datetime.fromtimestamp(t), float(value)) for t, value in series["values"]]
            axes.plot(*zip(*points, strict=True), label=label, linewidth=1)
    defaults = panel["fieldConfig"]["defaults"]
    unit = UNITS.get(defaults["unit"], defaults["unit"].removeprefix("suffix:").strip())
    axes.set_title(f"{panel['title']} ({unit})" if unit else panel["title"], fontsize=10)
    axes.set_ylim(bottom=0)
    axes.tick_params(labelsize=8)
    axes.grid(alpha=0.3)
    axes.xaxis.set_major_locator(AutoDateLocator(minticks=4, maxticks=9))
    axes.xaxis.set_major_formatter(DateFormatter("%H:%M"))
    axes.legend(
        fontsize=7,
        loc="upper center",
        bbox_to_anchor=(0.5, -0.1),
        ncols=2 if len(panel["targets"]) == 2 else 3,
        frameon=False,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("prometheus", help="its address")
    parser.add_argument("--minutes", type=float, default=7, help="before now")
    options = parser.parse_args()
    rows = math.ceil(len(PANELS) / COLUMNS)
    figure, grid = plt.subplots(rows, COLUMNS, figsize=(12, 2.5 * rows), layout="constrained")
    for axes, panel in zip(grid.flat, PANELS, strict=True):
        draw(axes, panel, options.prometheus, options.minutes)
    picture = io.BytesIO()
    figure.savefig(picture, dpi=100)
    few_colors = Image.open(picture).convert("RGB").quantize(COLORS)
    few_colors.save(FOLDER / "dashboard.png", optimize=True)


if __name__ == "__main__":
    main()
