"""deploy/serve_config.yaml on a cluster of two nodes, whose only code is in a zip.

The nodes' Python finds the libraries, but not this checkout. Their working folder is empty. They
share this machine, and therefore one proxy.
"""

import json
import re
import subprocess
import time
import venv
import zipfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import requests
import yaml
from bot_fixtures import HANG_S, REPOSITORY, Bot, free_port, reference, wait_until
from callers import ChatCaller, HttpCaller
from scripted_model import save_scripted_model
from serve_command import ENVIRONMENT, SERVE, add_libraries

pytestmark = pytest.mark.cluster
STARTED_S = 300  # eight replicas on two cores; only bounds a hang
BOTS = ("batchbot", "continuousbot")  # the others run under `-m exhaustive`
STREAMS = 16
PROMPT = "Count."
COUNT = " ".join(map(str, range(1000)))[:700]  # the reply of the scripted model


class Cluster:
    """A running cluster, and the config that `serve deploy` gets for it."""

    def __init__(self, process: subprocess.Popen[str], dashboard: str, port: int, code: Path):
        self.process = process
        self.dashboard = dashboard
        self.metrics_ports: dict[str, int] = json.loads(process.stdout.readline())
        self.config = yaml.safe_load((REPOSITORY / "deploy" / "serve_config.yaml").read_text())
        self.config["proxy_location"] = "HeadOnly"
        self.config["http_options"]["port"] = port
        self.port = port
        for application in self.config["applications"]:
            application["runtime_env"] = {"working_dir": code.as_uri()}
            application["args"]["num_replicas"] = 2
            del application["deployments"][0]["autoscaling_config"]
        self.all = self.config["applications"]
        self.config["applications"] = [each for each in self.all if each["name"] in BOTS]

    def application(self, name: str) -> dict[str, Any]:
        """Return this application's part of the config."""
        (found,) = (app for app in self.all if app["name"] == name)
        return found

    def bot(self, name: str) -> Bot:
        return Bot(f"127.0.0.1:{self.port}/{name}/")

    def deploy(self, folder: Path) -> subprocess.CompletedProcess[str]:
        file = folder / "config.yaml"
        file.write_text(yaml.safe_dump(self.config))
        return subprocess.run(
            [SERVE, "deploy", "--address", self.dashboard, str(file)],
            env=ENVIRONMENT,
            capture_output=True,
            text=True,
            timeout=STARTED_S,
        )

    def status(self, name: str) -> dict[str, Any]:
        details = requests.get(f"{self.dashboard}/api/serve/applications/", timeout=HANG_S).json()
        return details["applications"].get(name, {"status": "MISSING"})

    def replicas(self, name: str) -> dict[str, str]:
        """Return the nodes of the running replicas, by the replicas' ids."""
        (deployment,) = self.status(name)["deployments"].values()
        return {
            replica["replica_id"]: replica["node_id"]
            for replica in deployment["replicas"]
            if replica["state"] == "RUNNING"
        }

    def wait_for_status(self, name: str, status: str) -> dict[str, Any]:
        """Wait until an application has this status; return its details, such as the message."""
        wait_until(
            lambda: self.status(name)["status"] == status, STARTED_S, f"{name} is not {status}"
        )
        return self.status(name)

    def wait_for_user_config(self, name: str, user_config: dict[str, Any]) -> None:
        """Wait until the replicas of an application's one deployment have this user_config."""

        def has_come() -> bool:
            (deployment,) = self.status(name)["deployments"].values()
            return deployment["deployment_config"]["user_config"] == user_config

        wait_until(has_come, STARTED_S, f"the user_config of {name} does not come")
        self.wait_for_status(name, "RUNNING")

    def rows(self, node: str) -> int:
        """Return how many replies a node's replicas are writing in batches, by their metrics."""
        url = f"http://127.0.0.1:{self.metrics_ports[node]}/metrics"
        page = requests.get(url, timeout=HANG_S).text
        found = re.findall(r"^ray_bot_requests_running\{.*\} (\S+)$", page, re.MULTILINE)
        return int(sum(map(float, found)))

    def kill(self, node: str) -> None:
        self.process.stdin.write(f"{node}\n")
        self.process.stdin.flush()


@contextmanager
def running_cluster(folder: Path, *cpus: int) -> Iterator[Cluster]:
    code = folder / "streaming-bots.zip"
    listed = subprocess.check_output(["git", "ls-files", "-z"], cwd=REPOSITORY, text=True)
    with zipfile.ZipFile(code, "w") as archive:
        for name in filter(None, listed.split("\0")):
            if not name.startswith("tests/"):
                archive.write(REPOSITORY / name, f"streaming-bots/{name}")
    venv.create(folder / "venv")
    add_libraries(folder / "venv")
    python, empty, port = folder / "venv" / "bin" / "python", folder / "empty", free_port()
    empty.mkdir()
    absent = [python, "-c", "import streaming_bots"]
    assert subprocess.run(absent, cwd=empty, capture_output=True).returncode == 1
    environment = {name: value for name, value in ENVIRONMENT.items() if name != "PYTHONPATH"}
    with (
        # Ray notes in its temporary folder which cluster runs. Its sockets need a short path.
        TemporaryDirectory() as temporary,
        subprocess.Popen(
            [python, REPOSITORY / "tests" / "local_cluster.py", str(port), *map(str, cpus)],
            cwd=empty,
            env=environment | {"RAY_TMPDIR": temporary},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,
        ) as process,
    ):
        try:
            yield Cluster(process, f"http://127.0.0.1:{port}", free_port(), code)
        finally:
            process.stdin.close()
            process.wait(HANG_S)


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """Two bots, each with one replica on each node. The Continuousbot writes a long reply."""
    folder = tmp_path_factory.mktemp("cluster")
    save_scripted_model(folder / "counting", len(PROMPT), COUNT, 768)
    with running_cluster(folder, 4, 4) as cluster:  # each node has room for all replicas
        counting = {"model": str(folder / "counting"), "max_new_tokens": 740}
        cluster.application("continuousbot")["args"] |= counting
        ran = cluster.deploy(folder)
        assert ran.returncode == 0, ran.stderr
        for name in BOTS:
            cluster.wait_for_status(name, "RUNNING")
        yield cluster


def check_replicas(cluster: Cluster, name: str, expected: str) -> None:
    """Check that there is one replica on each node, and that both reply."""
    assert set(cluster.replicas(name).values()) == set(cluster.metrics_ports)
    call = ChatCaller if name == "chatbot" else HttpCaller
    callers = [call(cluster.bot(name), "Hello!") for _ in range(8)]  # enough to reach both replicas
    assert {caller.outcome() for caller in callers} == {"finished"}
    assert {caller.text for caller in callers} == {expected}


def test_replicas_are_on_both_nodes_and_have_code_and_model_from_the_zip(cluster, loaded):
    check_replicas(cluster, "batchbot", reference(loaded, ["Hello!"], 256))


def test_a_changed_user_config_reaches_the_running_replicas(cluster, loaded, tmp_path):
    before, bot = cluster.replicas("batchbot"), cluster.bot("batchbot")
    (deployment,) = cluster.application("batchbot")["deployments"]

    def first_text_after(**settings: float) -> float:
        deployment["user_config"] |= settings
        ran = cluster.deploy(tmp_path)
        assert ran.returncode == 0, ran.stderr
        cluster.wait_for_user_config("batchbot", deployment["user_config"])
        asked = time.monotonic()
        caller = HttpCaller(bot, "Hello!", 1)
        caller.first()
        assert caller.outcome() == "finished"
        return time.monotonic() - asked

    assert first_text_after(batch_wait_timeout_s=4) >= 4  # the bot waits for other requests
    assert first_text_after(batch_wait_timeout_s=30, max_batch_size=1) < 30  # one is a full batch
    first_text_after(batch_wait_timeout_s=0.1, max_batch_size=16)
    assert cluster.replicas("batchbot") == before


@pytest.mark.parametrize(
    ("mistake", "message"),
    [
        pytest.param(
            {"max_new_token": 5}, "Extra inputs are not permitted", marks=pytest.mark.exhaustive
        ),
        ({"model": "weights that are none"}, "the weights cannot be loaded"),
    ],
)
def test_a_bad_config_is_rejected_and_the_running_version_serves(
    cluster, loaded, tmp_path, mistake, message
):
    if mistake.get("model") == "weights that are none":  # only a replica finds this out
        loaded.tokenizer.save_pretrained(tmp_path)
        loaded.model.config.save_pretrained(tmp_path)
        (tmp_path / "model.safetensors").write_bytes(b"no weights")
        mistake = {"model": str(tmp_path)}
    before = cluster.replicas("batchbot")
    arguments = cluster.application("batchbot")["args"]
    good = dict(arguments)
    arguments |= mistake
    assert cluster.deploy(tmp_path).returncode == 0  # Serve accepts it before it tries it
    failed = cluster.wait_for_status("batchbot", "DEPLOY_FAILED")
    reasons = [failed["message"], *(each["message"] for each in failed["deployments"].values())]
    assert message in "".join(reasons)
    caller = HttpCaller(cluster.bot("batchbot"), "Hello!")
    assert caller.outcome() == "finished"
    assert caller.text == reference(loaded, ["Hello!"], 256)
    arguments.clear()
    arguments |= good
    assert cluster.deploy(tmp_path).returncode == 0
    cluster.wait_for_status("batchbot", "RUNNING")
    assert cluster.replicas("batchbot") == before


def test_a_bad_user_config_leaves_the_running_replicas_as_they_are(cluster, loaded, tmp_path):
    before = cluster.replicas("batchbot")
    (deployment,) = cluster.application("batchbot")["deployments"]
    good = dict(deployment["user_config"])
    for settings in ({"max_batch_size": 0}, good):
        deployment["user_config"] |= settings
        assert cluster.deploy(tmp_path).returncode == 0
        cluster.wait_for_user_config("batchbot", deployment["user_config"])
        caller = HttpCaller(cluster.bot("batchbot"), "Hello!")
        assert caller.outcome() == "finished"
        assert caller.text == reference(loaded, ["Hello!"], 256)
        assert cluster.replicas("batchbot") == before


def test_serve_deploy_rejects_a_config_that_does_not_fit_the_schema(cluster, tmp_path):
    before = cluster.replicas("batchbot")
    (deployment,) = cluster.application("batchbot")["deployments"]
    good = deployment["max_ongoing_requests"]
    deployment["max_ongoing_requests"] = -1
    ran = cluster.deploy(tmp_path)
    deployment["max_ongoing_requests"] = good
    assert ran.returncode != 0
    assert "max_ongoing_requests" in ran.stderr
    assert "greater than 0" in ran.stderr
    assert cluster.replicas("batchbot") == before
    assert HttpCaller(cluster.bot("batchbot"), "Hello!").outcome() == "finished"


@pytest.mark.exhaustive
def test_all_bots_have_code_and_model_from_the_zip(cluster, loaded, tmp_path):
    cluster.config["applications"] = cluster.all
    ran = cluster.deploy(tmp_path)
    assert ran.returncode == 0, ran.stderr
    for name in ("textbot", "chatbot"):
        cluster.wait_for_status(name, "RUNNING")
        check_replicas(cluster, name, reference(loaded, ["Hello!"], 256))
    assert requests.head(cluster.bot("chatbot").http).headers["X-Model"] == "tiny-dialog"


def test_a_killed_node_costs_only_the_streams_that_ran_on_it(cluster, capsys):
    def ask(limit: int | None) -> tuple[str, str]:
        caller = HttpCaller(cluster.bot("continuousbot"), PROMPT, limit)
        return caller.outcome(), caller.text

    doomed, spared = cluster.metrics_ports
    with ThreadPoolExecutor(STREAMS) as threads:
        streams = [threads.submit(ask, None) for _ in range(STREAMS)]
        wait_until(
            lambda: cluster.rows(doomed) + cluster.rows(spared) == STREAMS,
            STARTED_S,
            "not all streams run",
        )
        on_doomed = cluster.rows(doomed)
        cluster.kill(doomed)
        killed = time.monotonic()
        wait_until(lambda: ask(1)[0] == "finished", STARTED_S, "nobody answers")
        served = time.monotonic() - killed
        outcomes = [stream.result() for stream in streams]
    assert 0 < on_doomed < STREAMS
    assert [outcome for outcome, _ in outcomes].count("failed") == on_doomed
    assert {text for outcome, text in outcomes if outcome == "finished"} == {COUNT}

    wait_until(
        lambda: all(list(cluster.replicas(name).values()) == [spared] * 2 for name in BOTS),
        STARTED_S,
        "the replicas are not replaced",
    )
    full = time.monotonic() - killed
    with capsys.disabled():
        print(f"\n{on_doomed} of {STREAMS} streams lost, served {served:.1f}, full {full:.1f} s")
    for name in BOTS:
        assert requests.request("HEAD", cluster.bot(name).http, timeout=HANG_S).status_code < 500
