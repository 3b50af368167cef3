"""Whole products of parameters. `pytest` runs only the cases that differ in code."""

from collections.abc import Callable, Iterable
from itertools import product
from typing import Any

import pytest


def cases(*axes: Iterable[Any], chosen: Callable[..., bool]) -> list[Any]:
    """Return all combinations for parametrize. Those not chosen run under `-m exhaustive`."""
    return [
        pytest.param(*each, marks=[] if chosen(*each) else [pytest.mark.exhaustive])
        for each in product(*axes)
    ]
