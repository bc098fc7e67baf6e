"""Short versions of the load and fault tests of `soak.py`."""

from __future__ import annotations

from pathlib import Path

import pytest
from soak import faults, load

pytest.importorskip("gradio", reason="the demo extra is not installed")


@pytest.mark.slow
def test_a_little_load(tmp_path: Path) -> None:
    figures = load(tmp_path / "data", visitors=4, jobs=12, steps=10, stub=True, wait_s=120)
    assert figures["errors"] == [] and figures["done"] == 12
    assert figures["lost"] == figures["made_twice"] == figures["seen_by_others"] == 0


@pytest.mark.slow
def test_a_few_kills(tmp_path: Path) -> None:
    figures = faults(tmp_path / "data", kills=3, jobs=5, steps=15, stub=True, seed=1, wait_s=120)
    assert figures["done"] == figures["listed"] == 5 and sum(figures["killed"].values()) == 3
