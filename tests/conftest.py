"""Chooses Serve's ingress, which must be done before Ray is imported: `pytest -m haproxy`."""

import os

import pytest


def pytest_configure(config: pytest.Config) -> None:
    haproxy = config.getoption("markexpr") == "haproxy"
    os.environ |= {"RAY_USAGE_STATS_ENABLED": "0", "RAY_SERVE_ENABLE_HA_PROXY": str(int(haproxy))}
    if haproxy:  # as the README sets it up; the tests' own handles need a router with a loop
        os.environ |= {
            "RAY_SERVE_THROUGHPUT_OPTIMIZED": "1",
            "RAY_SERVE_RUN_ROUTER_IN_SEPARATE_LOOP": "1",
        }
    config.pluginmanager.import_plugin("running_bots")
