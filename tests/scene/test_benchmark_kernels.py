"""The benchmark of look-ups and renderers says what it should, at toy size on the CPU."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from uni3d.scene import tinycudann_encoding
from uni3d.scene.benchmark_kernels import BUDGET_IN_TORCH, main


def test_the_report_is_complete(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("triton")
    monkeypatch.setattr(tinycudann_encoding, "problem", lambda device: "tinycudann is not installed")
    file = tmp_path / "kernels.json"
    words = ["--device", "cpu", "--points", "30", "--levels", "2", "--table-size", "256", "--samples", "8"]
    assert main([*words, "--sizes", "5", "--warmup", "0", "--repeats", "1", "--output", str(file)]) == 0
    result = json.loads(file.read_text())
    scenes = ["soft ball, 5 px", "solid ball, 5 px"]
    for title in ("hash grid", "voxel grids", *scenes):
        rows = result[title]
        for name in ("torch", "triton"):
            assert rows[name]["median_ms"] > 0 and rows[name]["host_waits"] is None
            assert rows[name]["value_error"] < 1e-4 and rows[name]["gradient_error"] < 1e-3, (title, name)
        assert rows["torch"]["times_as_fast"] == 1
    assert "not installed" in result["hash grid"]["tinycudann"]["unavailable"]
    for scene in scenes:
        assert "needs a CUDA device" in result[scene]["nerfacc"]["unavailable"]
        assert result[scene][BUDGET_IN_TORCH]["value_error"] < 1e-4
    table = capsys.readouterr().out
    assert "x torch" in table and all(scene in table for scene in scenes)
