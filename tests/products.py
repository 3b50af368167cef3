"""Whole products of parameters, of which `pytest` runs what differs in code."""

from collections.abc import Callable, Iterable
from itertools import product
from typing import Any

import pytest


def cases(*axes: Iterable[Any], chosen: Callable[..., bool]) -> list[Any]:
    """All combinations, for parametrize; those that are not chosen run under `-m exhaustive`."""
    return [
        pytest.param(*each, marks=[] if chosen(*each) else [pytest.mark.exhaustive])
        for each in product(*axes)
    ]
