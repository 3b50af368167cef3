"""deploy/: the bots and Serve accept what its files say, and its commands work."""

import os
import re
import shutil
import signal
import subprocess
import sys
import tomllib
import venv
from collections.abc import Iterator
from copy import deepcopy
from importlib import import_module
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import kubernetes_validate
import pytest
import requests
import yaml
from bot_fixtures import HANG_S, REPOSITORY, Bot, reference, wait_until
from callers import ChatCaller, HttpCaller
from products import cases
from ray.serve.schema import ServeDeploySchema
from readme import commands
from serve_command import ENVIRONMENT, add_libraries, serve_run

DEPLOY = REPOSITORY / "deploy"
CONFIG = yaml.safe_load((DEPLOY / "serve_config.yaml").read_text())
SERVICE = yaml.safe_load((DEPLOY / "rayservice.yaml").read_text())
CLUSTER = SERVICE["spec"]["rayClusterConfig"]
EMBEDDED_CONFIG = yaml.safe_load(SERVICE["spec"]["serveConfigV2"])
PODS = {
    "head": CLUSTER["headGroupSpec"]["template"],
    **{group["groupName"]: group["template"] for group in CLUSTER["workerGroupSpecs"]},
}
CONTAINERS = {name: pod["spec"]["containers"][0] for name, pod in PODS.items()}
DOCKERFILE = (DEPLOY / "Dockerfile").read_text()
PROJECT = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
GUIDE = (DEPLOY / "README.md").read_text()
RUN, START, DEPLOY_IT, SHUT_DOWN, *KUBERNETES = (
    each.line for each in commands(GUIDE.split("\n## ")[1])
)
BOTS = ("textbot", "chatbot", "batchbot", "continuousbot")
STARTED_S = 300  # only bounds a hang


# What the files say


@pytest.mark.parametrize("config", [CONFIG, EMBEDDED_CONFIG], ids=["file", "manifest"])
def test_serve_takes_the_config_and_the_bots_their_arguments(config):
    schema = ServeDeploySchema.model_validate(config)
    assert [application.name for application in schema.applications] == list(BOTS)
    for application in config["applications"]:
        module, function = application["import_path"].split(":")
        build = getattr(import_module(module), function)
        arguments = build.__annotations__["settings"].model_validate(application["args"])
        original = getattr(import_module(module), application["deployments"][0]["name"])
        for options in application["deployments"]:
            # Serve ignores unknown options here. A Deployment does not.
            original.options(**arguments.deployment_options()).options(**options)


def test_the_bots_fit_two_cores():
    cpus = [application["args"]["num_cpus"] for application in CONFIG["applications"]]
    assert max(cpus) <= 0.4 and sum(cpus) <= 2


def test_the_manifest_has_the_config_of_the_file_but_for_any_host_and_with_a_key():
    config = deepcopy(CONFIG)
    config["http_options"]["host"] = "0.0.0.0"
    (key,) = mounted("key")
    for application in config["applications"]:
        application["args"] |= {"api_key_file": f"{key}/key", "allowed_hosts": ["*"]}
    assert config == EMBEDDED_CONFIG


def mounted(name: str) -> set[str]:
    """Return the paths at which the pods mount a volume."""
    mounts = [mount for each in CONTAINERS.values() for mount in each["volumeMounts"]]
    return {mount["mountPath"] for mount in mounts if mount["name"] == name}


def test_kubernetes_takes_the_pods():
    version = kubernetes_validate.latest_version()
    for name, template in PODS.items():
        pod = {"apiVersion": "v1", "kind": "Pod", **template}
        pod["metadata"] = {"name": name, **template["metadata"]}
        kubernetes_validate.validate(pod, version, strict=True)


def test_kuberay_knows_the_fields_around_the_pods():
    """The names come from the CRD API reference in Ray's documentation, for KubeRay v1.7."""
    assert (SERVICE["apiVersion"], SERVICE["kind"]) == ("ray.io/v1", "RayService")
    assert set(SERVICE["spec"]) == {
        "rayClusterDeletionDelaySeconds",
        "serveConfigV2",
        "rayClusterConfig",
    }
    assert set(CLUSTER) == {
        "rayVersion",
        "authOptions",
        "enableInTreeAutoscaling",
        "autoscalerOptions",
        "headGroupSpec",
        "workerGroupSpecs",
    }
    assert CLUSTER["authOptions"] == {"mode": "token"}
    assert set(CLUSTER["autoscalerOptions"]) == {"idleTimeoutSeconds", "resources"}
    assert set(CLUSTER["headGroupSpec"]) == {"rayStartParams", "template"}
    for group in CLUSTER["workerGroupSpecs"]:
        assert set(group) == {
            "groupName",
            "replicas",
            "minReplicas",
            "maxReplicas",
            "rayStartParams",
            "template",
        }
        assert group["minReplicas"] <= group["replicas"] <= group["maxReplicas"]
    for parameters in (CLUSTER["headGroupSpec"], *CLUSTER["workerGroupSpecs"]):
        assert all(isinstance(value, str) for value in parameters["rayStartParams"].values())


def test_related_fields_of_the_manifest_agree():
    for name, pod in PODS.items():
        assert pod["spec"]["volumes"] == [
            {"name": "key", "secret": {"secretName": "streaming-bots-key"}},
            {"name": "models", "emptyDir": {}},
        ]
        (container,) = pod["spec"]["containers"]
        assert container["resources"]["requests"] == container["resources"]["limits"]
        ports = {port["name"]: port["containerPort"] for port in container["ports"]}
        assert ports["serve"] == EMBEDDED_CONFIG["http_options"]["port"]
        assert pod["metadata"]["annotations"]["prometheus.io/port"] == str(ports["metrics"])
        probes = [str(container[probe]) for probe in ("readinessProbe", "livenessProbe")]
        # Only a worker's readiness depends on its proxy. A node without replicas has no proxy.
        assert [f":{ports['serve']}/" in probe for probe in probes] == [name != "head", False]
    assert mounted("models") == {re.search(r"HF_HOME=(\S+)", DOCKERFILE)[1]}
    needed = sum(application["args"]["num_cpus"] for application in CONFIG["applications"])
    assert needed <= int(CONTAINERS["cpu"]["resources"]["limits"]["cpu"])
    graceful = [
        deployment["graceful_shutdown_timeout_s"]
        for application in CONFIG["applications"]
        for deployment in application["deployments"]
    ]
    for pod in PODS.values():
        (container,) = pod["spec"]["containers"]
        draining = {each["name"]: each["value"] for each in container["env"]}
        draining_s = float(draining["RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S"])
        assert max(graceful) < draining_s < pod["spec"]["terminationGracePeriodSeconds"]
    assert max(graceful) < SERVICE["spec"]["rayClusterDeletionDelaySeconds"]


def test_the_commands_for_kubernetes_match_the_dockerfile_and_the_manifest():
    build, secret, apply = KUBERNETES
    assert f"#   {build}\n" in DOCKERFILE
    manifest = (DEPLOY / "rayservice.yaml").read_text()
    assert f"#   {secret}\n#   {apply}\n" in manifest
    (image,) = {container["image"] for container in CONTAINERS.values()}
    assert f" --tag {image} " in build
    assert " streaming-bots-key --from-file=key=" in secret  # mounted as the file `key`


def test_versions_agree():
    required = dict(
        re.match(r"([\w-]+)(?:\[\w+\])?~=(.+)", each).groups() for each in PROJECT["dependencies"]
    )
    assert CLUSTER["rayVersion"] == required["ray"]
    images = {container["image"] for container in CONTAINERS.values()}
    assert images == {f"streaming-bots:{PROJECT['version']}"}
    python = re.search(r"^FROM python:(\S+)-slim$", DOCKERFILE, re.MULTILINE)[1]
    assert PROJECT["requires-python"] == f">={python}"
    # The Dockerfile takes the image's packages from pyproject.toml, so these agree.
    assert "p['dependencies']" in DOCKERFILE


# What the commands do


def ask_all(loaded: Any) -> None:
    for name in BOTS:
        bot = Bot(f"127.0.0.1:8000/{name}/")
        caller = (ChatCaller if name == "chatbot" else HttpCaller)(bot, "Hello!")
        assert caller.outcome() == "finished"
        assert caller.text == reference(loaded, ["Hello!"], 256)


def run_all() -> bool:
    """Return whether Serve's proxy knows all bots, which means that they run."""
    try:
        routes = requests.get("http://127.0.0.1:8000/-/routes", timeout=HANG_S).json()
    except (requests.ConnectionError, ValueError):
        return False
    return set(routes) == {f"/{name}" for name in BOTS}


@pytest.mark.cluster
@pytest.mark.usefixtures("port_8000")
@pytest.mark.exhaustive
def test_serve_run_takes_the_config(checkout, loaded):
    arguments = RUN.removeprefix("serve run ").split()
    with serve_run(checkout, *arguments, ready_line="Submitted deploy config"):
        wait_until(run_all, STARTED_S, "the bots do not start")
        ask_all(loaded)


@pytest.fixture
def environment(tmp_path: Path) -> Iterator[dict[str, str]]:
    """The environment of a user who has no Ray token yet."""
    # Ray notes in its temporary folder which cluster runs. Its sockets need a short path.
    with TemporaryDirectory() as folder:
        yield {
            **{name: value for name, value in ENVIRONMENT.items() if name != "RAY_ADDRESS"},
            "PATH": f"{Path(sys.executable).parent}:{ENVIRONMENT['PATH']}",
            "HOME": str(tmp_path),
            "RAY_TMPDIR": folder,
        }


@pytest.fixture
def started_ray(tmp_path: Path, environment: dict[str, str]) -> Iterator[None]:
    log = tmp_path / "log"
    with log.open("w") as output:
        process = subprocess.Popen(
            ["bash", "-c", START],
            env=environment,
            cwd=tmp_path,
            stdout=output,
            stderr=output,
            start_new_session=True,
        )

    def has_started() -> bool:
        assert process.poll() is None, log.read_text()
        return "Ray runtime started" in log.read_text()

    try:
        wait_until(has_started, STARTED_S, "Ray does not start")
        yield
    finally:
        os.killpg(process.pid, signal.SIGINT)  # like Ctrl-C
        process.wait(HANG_S)


@pytest.mark.cluster
@pytest.mark.usefixtures("port_8000")
def test_serve_deploy_takes_the_config_and_kuberays_probes_succeed(
    started_ray, environment, checkout, loaded
):
    def run(command: str) -> str:
        ran = subprocess.run(
            ["bash", "-c", command],
            cwd=checkout,
            env=environment,
            capture_output=True,
            text=True,
            timeout=STARTED_S,
        )
        assert ran.returncode == 0, ran.stderr
        return ran.stdout

    assert "applications:" in run(DEPLOY_IT)
    wait_until(run_all, STARTED_S, "the bots do not start")
    ask_all(loaded)
    for container in CONTAINERS.values():
        for probe in ("readinessProbe", "livenessProbe"):
            command = container[probe]["exec"]["command"]
            subprocess.run(command, check=True, timeout=HANG_S)
    run(f"export RAY_AUTH_MODE=token; {SHUT_DOWN}")
    worker = CONTAINERS["cpu"]["readinessProbe"]["exec"]["command"]
    assert subprocess.run(worker, timeout=HANG_S).returncode != 0


@pytest.mark.cluster
@pytest.mark.usefixtures("port_8000")
@pytest.mark.parametrize("fresh", cases([False, True], chosen=lambda fresh: not fresh))
def test_the_dockerfiles_steps_make_an_environment_that_runs_the_bots(tmp_path, loaded, fresh):
    """Run all steps but those that need root, in a virtual environment, not the base image.

    Unless `fresh`, the environment has this one's packages, and pip finds nothing missing.
    """
    root, environment = tmp_path / "root", tmp_path / "venv"
    venv.create(environment, with_pip=True)
    if not fresh:
        add_libraries(environment)
    variables = {**ENVIRONMENT, "PATH": f"{environment / 'bin'}:/usr/bin:/bin"}
    del variables["RAY_SERVE_ENABLE_HA_PROXY"]
    folder = root
    for line in re.sub(r"\\\n\s*", "", DOCKERFILE).splitlines():
        step, _, rest = line.partition(" ")
        if step == "WORKDIR":
            folder = root / rest.lstrip("/")
            folder.mkdir(parents=True)
        elif step == "COPY":
            *sources, target = rest.split()
            for source in map(REPOSITORY.joinpath, sources):
                if source.is_dir():
                    shutil.copytree(source, folder / target)
                else:
                    to = folder / target
                    to = to / source.name if target.endswith("/") else to
                    to.parent.mkdir(parents=True, exist_ok=True)
                    shutil.copy(source, to)
        elif step == "RUN" and "useradd" not in rest:
            subprocess.run(["bash", "-c", rest], cwd=folder, env=variables, check=True)
        elif step == "ENV":
            for name, value in (each.split("=") for each in rest.split()):
                variables[name] = str(root / value[1:]) if value.startswith("/") else value
    script = """
import ray, requests
from ray import serve
import batchbot, chatbot, continuousbot, textbot
ray.init(num_cpus=4)
serve.start(http_options={"port": 8000})
serve.run_many([
    serve.RunTarget(bot.app, name=bot.__name__, route_prefix="/" + bot.__name__)
    for bot in (textbot, chatbot, batchbot, continuousbot)
])
assert "<textarea" in requests.get("http://127.0.0.1:8000/chatbot/").text
print(requests.post("http://127.0.0.1:8000/textbot/?prompt=Hello!").text)
serve.shutdown()
ray.shutdown()
"""
    empty = tmp_path / "empty"
    empty.mkdir()
    printed = subprocess.run(
        [environment / "bin" / "python", "-c", script],
        cwd=empty,
        env=variables,
        stdout=subprocess.PIPE,
        text=True,
        timeout=STARTED_S,
        check=True,
    ).stdout
    assert reference(loaded, ["Hello!"], 256) in printed.splitlines()  # among Ray's logs
