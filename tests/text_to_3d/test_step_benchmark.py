"""The benchmark of a text-to-3D step runs at tiny sizes on the CPU and says what it should."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from uni3d.text_to_3d import step_benchmark
from uni3d.text_to_3d.step_benchmark import KINDS, MESH_STAGES, THREESTUDIO, main, network_flops
from uni3d.text_to_3d.threestudio_step import ThreestudioStep


def test_the_table_has_a_row_for_every_step(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "step.json"
    arguments = ["--shapes", "tiny", "--device", "cpu", "--resolution", "16", "--samples", "8"]
    assert (
        main(
            [*arguments, "--warmup", "0", "--repeats", "1", "--matrix-size", "32", "--triangles", "2000"]
            + ["--output", str(output)]
        )
        == 0
    )
    result = json.loads(output.read_text())
    assert list(result["steps"]) == [*KINDS, *MESH_STAGES, THREESTUDIO]
    for name, figures in result["steps"].items():
        assert figures["median_ms"] > 0 and figures["tflops_per_s"] > 0
        assert name not in KINDS or {"render", "encoder"} <= figures["parts_ms"].keys()
    assert all(1000 < result["steps"][name]["triangles"] < 4000 for name in MESH_STAGES)
    assert result["speedup_of_vsd"] > 0
    printed = capsys.readouterr().out
    assert all(name in printed for name in result["steps"])


def test_a_row_that_fails_leaves_the_others(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    build = step_benchmark.build_step

    def fail_at_first(kind: step_benchmark.StepKind, *others: Any) -> Any:
        if kind.method == "sds":
            raise RuntimeError("a driver is unhappy")
        return build(kind, *others)

    monkeypatch.setattr(step_benchmark, "build_step", fail_at_first)
    output = tmp_path / "step.json"
    arguments = ["--shapes", "tiny", "--device", "cpu", "--resolution", "16", "--samples", "8"]
    arguments += ["--warmup", "0", "--repeats", "1", "--matrix-size", "32", "--only", "SDS", "difference"]
    assert main([*arguments, "--output", str(output)]) == 1
    result = json.loads(output.read_text())
    assert (
        "a driver is unhappy" in result["failed"]["SDS"] and "a driver is unhappy" in capsys.readouterr().out
    )
    assert list(result["steps"]) == ["Uni-Instruct, score difference"]


def test_a_long_run_compares_its_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    """A step that grows slower shows; how long the published number of steps takes is their mean."""
    # Step n ends 10 + n ms after the one before it.
    ends = [sum(10 + n for n in range(steps)) for steps in range(21)]
    clock = iter(milliseconds / 1e3 for milliseconds in [0, *(end for end in ends[1:] for _ in range(3))])
    monkeypatch.setattr(step_benchmark.time, "perf_counter", lambda: next(clock))
    steps: list[int] = []
    settings = step_benchmark.BenchmarkSettings(device="cpu", num_warmup=3, long_run=20)
    figures = step_benchmark.time_long_run(lambda: steps.append(0), settings)
    assert len(steps) == 23
    assert figures["first_tenth_ms"] == pytest.approx(10.5) and figures["last_tenth_ms"] == pytest.approx(
        28.5
    )
    assert figures["prolificdreamer_minutes"] == pytest.approx(19.5e-3 / 60 * 25_000)


def test_a_long_run_has_a_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "step.json"
    arguments = ["--shapes", "tiny", "--device", "cpu", "--resolution", "16", "--samples", "8"]
    arguments += ["--warmup", "0", "--repeats", "1", "--matrix-size", "32", "--only", "long run"]
    assert main([*arguments, "--long-run", "3", "--output", str(output)]) == 0
    assert json.loads(output.read_text())["long_run"]["steps"] == 3
    assert "3 steps of" in capsys.readouterr().out


def test_stable_diffusions_work_is_the_published_one() -> None:
    """0.80 TFLOP a pass of the UNet at 64 x 64 latents and 1.12 of the encoder at 512 px."""
    unet, encoder = network_flops("sd21")
    assert unet / 1e12 == pytest.approx(0.80, abs=0.02)
    assert encoder / 1e12 == pytest.approx(1.12, abs=0.05)


def test_the_other_structure_trains_everything() -> None:
    step = ThreestudioStep(shapes="tiny", device=torch.device("cpu"), resolution=16, samples_per_ray=8)
    trained = {"field": step.field, "camera": step.camera_embedding}
    before = {name: [p.detach().clone() for p in module.parameters()] for name, module in trained.items()}
    adapters = [parameter.detach().clone() for parameter in step._adapters]
    step()
    for name, module in trained.items():
        assert any(not torch.equal(a, b) for a, b in zip(before[name], module.parameters(), strict=True)), (
            name
        )
    assert any(not torch.equal(a, b) for a, b in zip(adapters, step._adapters, strict=True))
