"""Chooses Serve's ingress, which must be done before Ray is imported: `pytest -m haproxy`."""

import os

import pytest


def pytest_configure(config: pytest.Config) -> None:
    haproxy = config.getoption("markexpr") == "haproxy"
    os.environ |= {"RAY_USAGE_STATS_ENABLED": "0", "RAY_SERVE_ENABLE_HA_PROXY": str(int(haproxy))}
    config.pluginmanager.import_plugin("running_bots")
