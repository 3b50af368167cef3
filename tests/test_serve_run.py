"""`serve run` with arguments: what they change, and what a mistake costs."""

import subprocess

import pytest
import requests
from serve_run import ENVIRONMENT, SERVE, serve_run


def test_arguments_configure_a_bot(checkout, emoji_model):
    arguments = [f"model={emoji_model}", "max_new_tokens=3", "num_cpus=0.5"]
    with serve_run(checkout, "textbot:build", *arguments):
        response = requests.post("http://localhost:8000/?prompt=x")
        assert response.headers["X-Model"] == str(emoji_model)
        assert len(response.text) == 3
        response = requests.post("http://localhost:8000/?prompt=x&max_new_tokens=4")
        assert response.status_code == 422


@pytest.mark.parametrize(
    ("argument", "parts"),
    [
        ("max_new_tokens=0", ["max_new_tokens", "greater than 0"]),
        ("modell=x", ["modell", "Extra inputs are not permitted"]),
        ("model=./nowhere", ["'./nowhere'", "there is no folder", "give a hub id"]),
    ],
)
def test_a_mistake_is_named_and_ends_with_status_1(checkout, argument, parts):
    ran = subprocess.run(
        [SERVE, "run", "textbot:build", argument],
        cwd=checkout,
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert ran.returncode == 1
    end = ran.stderr.strip().splitlines()[-4:]
    for part in parts:
        assert any(part in line for line in end), ran.stderr
