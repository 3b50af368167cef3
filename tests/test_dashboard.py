"""deploy/grafana.json and docs/operations.md name the metrics that a running bot exports."""

import json
import re
import time
from itertools import combinations
from typing import NamedTuple

import pytest
import ray
import requests
from bot_fixtures import HANG_S, REPOSITORY, Bot

DASHBOARD = json.loads((REPOSITORY / "deploy" / "grafana.json").read_text())
PANELS = [panel for panel in DASHBOARD["panels"] if panel["type"] != "row"]
VARIABLES = {variable["name"]: variable for variable in DASHBOARD["templating"]["list"]}
OPERATIONS = (REPOSITORY / "docs" / "operations.md").read_text()
COLUMNS = 24  # of Grafana's grid
REPORTED_S = 60  # only bounds a hang: Ray reports metrics every few seconds

pytestmark = pytest.mark.serves("textbot")


class Query(NamedTuple):
    """What a PromQL query of the dashboard names."""

    text: str
    metrics: set[str]
    labels: dict[str, set[str]]  # by metric: of its selector and of all that groups the result
    rates: set[str]  # the metrics inside of rate()

    @classmethod
    def parse(cls, text: str, legend: str = "") -> "Query":
        made = set(re.findall(r'"(\w+)", "\$1"', text))  # by label_replace
        grouped = set(re.findall(r"\w+", " ".join(re.findall(r"by \((.*?)\)", text))))
        assert set(re.findall(r"{{(\w+)}}", legend)) <= grouped
        grouped |= set(re.findall(r'"\$1", "(\w+)"', text))
        labels = {}
        for metric, selector in re.findall(r"\b(ray_\w+)(?:\{(.*?)\})?", text):
            labels[metric] = set(re.findall(r"(\w+)(?:=~|!~|!=|=)\"", selector)) | grouped - made
        return cls(text, set(labels), labels, set(re.findall(r"\brate\((ray_\w+)", text)))


QUERIES = {
    f"{panel['title']} {target['refId']}": Query.parse(target["expr"], target["legendFormat"])
    for panel in PANELS
    for target in panel["targets"]
}
NAMED = set.union(*(query.metrics for query in QUERIES.values()))


class Exported:
    """The metrics that have been on Ray's Prometheus endpoint, by name."""

    def __init__(self) -> None:
        self.kinds: dict[str, str] = {}  # counter, gauge or histogram
        self.labels: dict[str, set[str]] = {}  # that all of a metric's series have

    def scrape(self) -> None:
        """Add the metrics exported now. Ray drops a gauge that is not set for a while."""
        port = ray.nodes()[0]["MetricsExportPort"]
        page = requests.get(f"http://127.0.0.1:{port}/metrics", timeout=HANG_S).text
        self.kinds |= re.findall(r"^# TYPE (\w+) (\w+)$", page, re.MULTILINE)
        for name, series in re.findall(r"^(ray_\w+)\{(.*)\} \S+$", page, re.MULTILINE):
            found = set(re.findall(r'(\w+)="', series))
            if name.startswith("ray_bot_") and "replica" not in found:
                continue  # of a bot in the tests' own process
            self.labels[name] = self.labels.get(name, found) & found


@pytest.fixture(scope="module")
def exported(served_bots: dict[str, Bot]) -> Exported:
    """The metrics after a bot has replied to requests and refused one."""
    bot = served_bots["textbot"]
    bot.gate.open()
    for prompt in ("Hello!", "Hello!", ""):  # the second one's prompt is cached
        response = requests.post(bot.http, json={"prompt": prompt}, timeout=HANG_S)
        assert response.status_code == (200 if prompt else 422)
    found, deadline = Exported(), time.monotonic() + REPORTED_S
    while NAMED - set(found.labels) and time.monotonic() < deadline:
        found.scrape()
        time.sleep(0.5)
    return found


@pytest.mark.parametrize("name", QUERIES)
def test_a_query_names_metrics_and_labels_that_a_bot_exports(exported, name):
    query = QUERIES[name]
    assert query.metrics
    for metric in query.metrics:
        assert metric in exported.labels
        assert query.labels[metric] <= exported.labels[metric], metric
        # Counters need a rate, and gauges must not have one.
        counts = exported.kinds.get(metric) == "counter" or metric.endswith("_bucket")
        assert counts == (metric in query.rates), metric


def test_the_variables_are_those_that_the_queries_use(exported):
    used = set(re.findall(r"\$(\w+)", " ".join(query.text for query in QUERIES.values())))
    assert used - {"1"} == {"application", "__rate_interval"}
    metric, label = re.fullmatch(
        r"label_values\((\w+), (\w+)\)", VARIABLES["application"]["query"]
    ).groups()
    assert label == "application" and label in exported.labels[metric]
    assert VARIABLES["datasource"]["type"] == "datasource"
    sources = [target["datasource"]["uid"] for panel in PANELS for target in panel["targets"]]
    assert {*sources, VARIABLES["application"]["datasource"]["uid"]} == {"${datasource}"}


def test_each_panel_has_a_title_a_description_a_unit_and_a_place():
    for kind in ("id", "title"):
        values = [panel[kind] for panel in DASHBOARD["panels"]]
        assert len(set(values)) == len(values) and all(values)
    for panel in PANELS:
        assert panel["description"].endswith(".")
        unit = panel["fieldConfig"]["defaults"]["unit"]
        for query in (QUERIES[f"{panel['title']} {each['refId']}"] for each in panel["targets"]):
            assert unit in units_of(query), query.text
    for one, other in combinations((panel["gridPos"] for panel in DASHBOARD["panels"]), 2):
        assert not overlap(one, other), (one, other)
    assert all(each["gridPos"]["x"] + each["gridPos"]["w"] <= COLUMNS for each in PANELS)


def units_of(query: Query) -> set[str]:
    """Return the units of Grafana that suit a query, by the names of its metrics."""
    (metric,) = query.metrics
    if metric.endswith("_tokens_total"):
        return {"suffix: tokens/s"}
    for ending, unit in {
        "_seconds_bucket": "s",
        "_ms_bucket": "ms",
        "_mb": "decmbytes",
        "_percentage": "percent",
        "_total": "reqps",
    }.items():
        if metric.endswith(ending):
            return {unit}
    return {"short"}


def overlap(one: dict[str, int], other: dict[str, int]) -> bool:
    return all(
        one[start] < other[start] + other[size] and other[start] < one[start] + one[size]
        for start, size in (("x", "w"), ("y", "h"))
    )


def test_operations_lists_each_metric_of_the_bots(exported):
    listed = {}
    for row in re.findall(r"^\| (`ray_bot_.*) \|$", OPERATIONS, re.MULTILINE):
        name, kind, labels, unit, _ = (cell.strip(" `") for cell in row.split("|"))
        listed[name] = kind
        found = exported.labels[name + ("_count" if kind == "histogram" else "")]
        assert {"application", "deployment", "replica"} <= found
        assert set(labels.split()) == found - exported.labels["ray_bot_requests_waiting"]
        assert (unit == "seconds") == name.endswith("_seconds")
    kinds = exported.kinds
    assert listed == {name: kinds[name] for name in kinds if name.startswith("ray_bot_")}


def test_operations_explains_each_panel():
    explained = set(re.findall(r"\*\*(.*?)\*\*", OPERATIONS))
    assert {panel["title"] for panel in PANELS} <= explained
