"""Chooses the tier of tests, and Serve's ingress, which must be set before Ray is imported."""

import gc
import os
import signal

import pytest


def pytest_configure(config: pytest.Config) -> None:
    haproxy = "haproxy" in config.getoption("markexpr").replace("not haproxy", "")
    os.environ |= {
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_SERVE_ENABLE_HA_PROXY": str(int(haproxy)),
        "RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S": "60",  # a busy machine needs more than 5 s
    }
    if haproxy:  # as in the README; the tests' own handles need a router with a loop
        os.environ |= {
            "RAY_SERVE_THROUGHPUT_OPTIMIZED": "1",
            "RAY_SERVE_RUN_ROUTER_IN_SEPARATE_LOOP": "1",
            "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S": "3",  # else ending takes 30 s
        }
    # If a shell starts pytest in the background, pytest and all that it starts ignore Ctrl-C.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    config.pluginmanager.import_plugin("bot_fixtures")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Run the tests on a real Serve last, since even an idle one takes a fifth of a core.

    Leave out the exhaustive tests under `-m haproxy` and `-m cluster`, as `pytest` does.
    """
    items.sort(key=lambda item: "port" in item.fixturenames)
    if "exhaustive" not in config.getoption("markexpr"):
        left_out = [item for item in items if item.get_closest_marker("exhaustive")]
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if item not in left_out]


def pytest_collection_finish() -> None:
    """Spare the garbage collector the libraries, which it would else search in half a second."""
    gc.freeze()
