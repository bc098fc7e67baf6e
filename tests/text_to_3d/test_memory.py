"""Memory presets, and what happens when memory runs out: smaller, said aloud, and on."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from uni3d import cli
from uni3d.commands.generate import read_generate_options
from uni3d.config.loader import config_to_yaml
from uni3d.config.text_to_3d import (
    VRAM_PRESETS,
    CheckpointsConfig,
    FakeScoreConfig,
    FieldConfig,
    GuidanceConfig,
    MeshConfig,
    RendererConfig,
    TextTo3DConfig,
)
from uni3d.config.values import value_at
from uni3d.diffusion.latent_teacher import LatentDiffusionTeacher
from uni3d.errors import ConfigError, OutOfMemory
from uni3d.text_to_3d import memory_benchmark
from uni3d.text_to_3d.memory import RUNGS, MemoryLadder, fitted, rung_for
from uni3d.text_to_3d.pipeline import _fingerprint
from uni3d.text_to_3d.random_teacher import random_teacher
from uni3d.text_to_3d.scene_optimiser import SceneOptimiser
from uni3d.text_to_3d.step_loop import MemoryStore, take_steps
from uni3d.training.checkpoint import CheckpointStore


@pytest.fixture
def config(tiny_teacher_folder: Path, tmp_path: Path) -> TextTo3DConfig:
    return TextTo3DConfig(
        prompt="a red chair",
        teacher=str(tiny_teacher_folder),
        runs_folder=tmp_path,
        device="cpu",
        quiet=True,
        steps=4,
        method="sds",
        field=FieldConfig(resolutions=(8, 16)),
        guidance=GuidanceConfig(views_per_step=3),
        renderer=RendererConfig(resolution=((0.0, 16.0), (0.5, 600.0)), samples_per_ray=16),
        mesh=MeshConfig(resolution=24, max_triangles=400, texture_size=64, turntable_frames=0),
        checkpoints=CheckpointsConfig(interval_s=0.0),
    )


def run_out_of_memory(
    monkeypatch: pytest.MonkeyPatch, is_now: Callable[[SceneOptimiser], bool]
) -> list[tuple[int, int, int]]:
    """Steps fail while `is_now`; returns the (step, resolution, views) of all that were begun."""
    step = SceneOptimiser.step
    begun: list[tuple[int, int, int]] = []

    def limited(self: SceneOptimiser) -> Any:
        size = round(value_at(self.config.renderer.resolution, self.progress))
        begun.append((self.step_index, size, self.config.guidance.views_per_step))
        if is_now(self):
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return step(self)

    monkeypatch.setattr(SceneOptimiser, "step", limited)
    return begun


def started(config: TextTo3DConfig) -> tuple[SceneOptimiser, MemoryStore]:
    optimiser = SceneOptimiser(config, LatentDiffusionTeacher.from_pretrained(config.teacher))
    optimiser.prepare()
    store = MemoryStore()
    store.save(0, optimiser.state_dict())
    return optimiser, store


def test_every_preset_has_its_rung() -> None:
    assert sorted(VRAM_PRESETS) == sorted(int(rung.name) for rung in RUNGS if rung.name.isdigit())


def test_presets_bound_a_run_and_smaller_ones_bound_more(config: TextTo3DConfig) -> None:
    large = dataclasses.replace(
        config,
        guidance=GuidanceConfig(views_per_step=64),
        renderer=RendererConfig(resolution=((0.0, 2048.0),), samples_per_ray=4096),
    )
    costs = []
    for rung in RUNGS:
        bounded = rung.bounded(large)
        size, samples = bounded.renderer.resolution[0][1], bounded.renderer.samples_per_ray
        costs.append(bounded.guidance.views_per_step * size**2 * samples)
        assert rung.bounded(bounded) == bounded
    assert costs == sorted(costs, reverse=True) and costs[-1] < costs[0] / 100
    small = dataclasses.replace(config, renderer=RendererConfig(resolution=((0.0, 32.0),)))
    assert rung_for(8).bounded(small).renderer.resolution == ((0.0, 32.0),)


def test_out_of_memory_steps_down_and_goes_on_from_the_last_state(
    config: TextTo3DConfig, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Where the resolution jumps, a card that carries 64 pixels and no more."""
    begun = run_out_of_memory(
        monkeypatch, lambda one: value_at(one.config.renderer.resolution, one.progress) > 64
    )
    optimiser, store = started(config)
    take_steps(optimiser, store)
    assert optimiser.step_index == 4
    sizes = [(step, size) for step, size, _ in begun]
    failed = [(1, size) for size in (308, 264, 264, 264, 200, 136, 72)]
    assert sizes == [(0, 16), *failed, (1, 40), (2, 64), (3, 64)]
    assert [views for _, _, views in begun] == [3, 3, 3, 2, *[1] * 7]
    said = [message for message in caplog.messages if message.startswith("out of memory; going on with")]
    assert len(said) == len(failed) and "renders of at most 64 pixels" in said[-1]
    assert optimiser.teacher.vae.is_gradient_checkpointing


def test_at_the_bottom_there_is_one_sentence_with_flags(
    config: TextTo3DConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_out_of_memory(monkeypatch, lambda one: True)
    optimiser, store = started(config)
    with pytest.raises(OutOfMemory, match="--field.resolutions") as caught:
        take_steps(optimiser, store)
    assert "\n" not in str(caught.value) and caught.value.exit_code == 1


def test_the_ladder_begins_below_the_chosen_preset(config: TextTo3DConfig) -> None:
    small = rung_for(8).bounded(dataclasses.replace(config, vram=8))
    optimiser, _ = started(small)
    MemoryLadder(small).step_down(optimiser, torch.OutOfMemoryError())
    assert max(size for _, size in optimiser.config.renderer.resolution) == 128


def test_a_preset_holds_the_networks_and_still_teaches(config: TextTo3DConfig) -> None:
    """With checkpointing, slicing and the text encoder aside, the numbers are those of a plain run."""
    config = dataclasses.replace(
        config, method="vsd", fake_score=FakeScoreConfig(lora_rank=2, warmup_steps=0)
    )
    plain, _ = started(config)
    bound, _ = started(dataclasses.replace(config, vram=8))
    rung_for(8).apply_to(bound.teacher)
    assert plain.step().values == pytest.approx(bound.step().values, rel=1e-4)


def test_a_run_goes_on_in_less_memory(config: TextTo3DConfig, tmp_path: Path) -> None:
    """The bounds of --vram may be set anew with --resume; nothing else may change."""
    (tmp_path / "config.yaml").write_text(config_to_yaml(config))
    resumed = read_generate_options(["--resume", str(tmp_path), "--vram", "8"])
    assert fitted(resumed).guidance.views_per_step == 1 < config.guidance.views_per_step
    optimiser, _ = started(config)
    CheckpointStore(tmp_path, fingerprint=_fingerprint(config)).save(0, optimiser.state_dict())
    kept = CheckpointStore(tmp_path, fingerprint=_fingerprint(fitted(resumed))).load_latest()
    assert kept is not None
    smaller, _ = started(fitted(resumed))
    smaller.load_state_dict(kept.state)
    assert smaller.step().finite
    for changes in ({"seed": 1}, {"renderer": RendererConfig(samples_per_ray=16)}):
        other = CheckpointStore(tmp_path, fingerprint=_fingerprint(dataclasses.replace(config, **changes)))
        with pytest.raises(ConfigError, match="belongs to other settings"):
            other.load_latest()


def test_the_flag_is_kept_and_checked(
    config: TextTo3DConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = tmp_path / "settings.yaml"
    settings.write_text(config_to_yaml(dataclasses.replace(config, prompt="", vram=12)))
    assert cli.main(["generate", "a chair", "--config", str(settings), "--vram", "11"]) == 2
    assert "vram is 11; expected the next smaller of 8, 12" in capsys.readouterr().err


@pytest.mark.parametrize("method", memory_benchmark.METHODS)
def test_what_the_benchmark_measures_runs(method: str) -> None:
    """In small, in the precision of a GPU: four random steps with every saving turned on."""
    rung = dataclasses.replace(rung_for(8), max_resolution=16, max_samples_per_ray=8)
    teacher = random_teacher("tiny", device=torch.device("cpu"), dtype=torch.bfloat16)
    rung.apply_to(teacher)
    found = memory_benchmark.peak(memory_benchmark.settings(rung, method), teacher, num_steps=2)
    assert found == memory_benchmark.MemoryPeak(0, 0)


@pytest.mark.gpu
@pytest.mark.parametrize("rung", [rung for rung in RUNGS if rung.name.isdigit()], ids=lambda rung: rung.name)
def test_presets_stay_within_their_figure(rung: Any) -> None:
    teacher = random_teacher("sd21", device=torch.device("cuda"), dtype=torch.bfloat16)
    rung.apply_to(teacher)
    for method in memory_benchmark.METHODS:
        found = memory_benchmark.peak(memory_benchmark.settings(rung, method), teacher, num_steps=2)
        assert found.reserved < int(rung.name) * 1e9, method
