"""The text-to-3D program on a tiny random teacher of the real classes: the loop, its state, its results."""

from __future__ import annotations

import copy
import dataclasses
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from uni3d.config.text_to_3d import (
    CheckpointsConfig,
    DiscriminatorConfig,
    FakeScoreConfig,
    FieldConfig,
    GuidanceConfig,
    MeshConfig,
    RendererConfig,
    TextTo3DConfig,
)
from uni3d.diffusion.latent_teacher import LatentDiffusionTeacher
from uni3d.errors import ConfigError, TrainingDiverged, UsageError
from uni3d.mesh.report import mesh_report, read_extras
from uni3d.text_to_3d.pipeline import (
    TextTo3DPipeline,
    _fingerprint,
    choose_device,
    generate,
    load_run_teacher,
    provenance,
)
from uni3d.text_to_3d.scene_optimiser import (
    DEFAULT_DIVERGENCE,
    SceneOptimiser,
    choose_backends,
    resolve_recipe,
)
from uni3d.text_to_3d.step_loop import MemoryStore


@pytest.fixture
def teacher(tiny_teacher_folder: Path) -> LatentDiffusionTeacher:
    return LatentDiffusionTeacher.from_pretrained(tiny_teacher_folder)


def _config(**changes: Any) -> TextTo3DConfig:
    config = TextTo3DConfig(
        prompt="a red chair",
        steps=6,
        field=FieldConfig(resolutions=(8, 16)),
        guidance=GuidanceConfig(views_per_step=2),
        renderer=RendererConfig(resolution=((0.0, 16.0),), samples_per_ray=16, occupancy_interval=2),
        fake_score=FakeScoreConfig(lora_rank=2, warmup_steps=1),
        discriminator=DiscriminatorConfig(num_real_samples=4, sampling_steps=2),
        mesh=MeshConfig(resolution=24, max_triangles=400, texture_size=64, turntable_frames=0),
        quiet=True,
    )
    return dataclasses.replace(config, **changes)


def _assert_same(left: Any, right: Any, place: str = "") -> None:
    if isinstance(left, torch.Tensor):
        assert torch.equal(left, right), place
    elif isinstance(left, Mapping):
        assert left.keys() == right.keys(), place
        for key in left:
            _assert_same(left[key], right[key], f"{place}/{key}")
    elif isinstance(left, (list, tuple)):
        for index, pair in enumerate(zip(left, right, strict=True)):
            _assert_same(*pair, f"{place}/{index}")
    else:
        assert left == right, place


def _run(config: TextTo3DConfig, folder: Path, *, stop_at: int | None = None) -> dict[str, Any]:
    """The state after all steps; `stop_at` saves it there and goes on from the file."""
    from uni3d.training.checkpoint import CheckpointStore

    optimiser = SceneOptimiser(config, LatentDiffusionTeacher.from_pretrained(folder))
    optimiser.prepare()
    while optimiser.step_index < config.steps:
        if optimiser.step_index == stop_at:
            store = CheckpointStore(folder.parent / f"checkpoints-{config.method}-{stop_at}")
            store.save(stop_at, optimiser.state_dict())
            checkpoint = store.load_latest()
            assert checkpoint is not None
            optimiser = SceneOptimiser(config, LatentDiffusionTeacher.from_pretrained(folder))
            optimiser.load_state_dict(checkpoint.state)
            stop_at = None
        assert optimiser.step().finite
    return optimiser.state_dict()


@pytest.mark.parametrize("method", ["uni-instruct", "sds"])
def test_a_resumed_run_ends_in_the_same_state(method: str, tiny_teacher_folder: Path) -> None:
    config = _config(method=method, steps=4)
    _assert_same(_run(config, tiny_teacher_folder), _run(config, tiny_teacher_folder, stop_at=2))


def test_the_field_waits_a_tenth_of_a_run_at_most(teacher: LatentDiffusionTeacher) -> None:
    config = _config(steps=20, fake_score=FakeScoreConfig(lora_rank=2, warmup_steps=1000))
    optimiser = SceneOptimiser(config, teacher)
    optimiser.prepare()
    grid = optimiser.field.density_grids[0]
    before = grid.detach().clone()
    has_moved = []
    for _ in range(3):
        optimiser.step()
        has_moved.append(not torch.equal(grid, before))
    assert has_moved == [False, False, True]
    optimiser.close()


@pytest.mark.parametrize(("num_fake", "num_discriminator"), [(3, 2), (0, 1), (1, 0)])
def test_each_critic_takes_its_own_number_of_updates(
    num_fake: int, num_discriminator: int, teacher: LatentDiffusionTeacher
) -> None:
    config = _config(
        fake_score=FakeScoreConfig(lora_rank=2, warmup_steps=0, updates_per_step=num_fake),
        discriminator=DiscriminatorConfig(
            num_real_samples=2, sampling_steps=1, updates_per_step=num_discriminator
        ),
    )
    optimiser = SceneOptimiser(config, teacher)
    optimiser.prepare()
    for _ in range(2):
        assert optimiser.step().finite
    for name, wanted in (("fake_optimiser", num_fake), ("discriminator_optimiser", num_discriminator)):
        counts = {int(state["step"]) for state in optimiser.state_dict()[name]["state"].values()}
        assert counts == ({2 * wanted} if wanted else set())
    optimiser.close()


def test_a_hash_field_goes_without_the_terms_of_voxels(
    teacher: LatentDiffusionTeacher, caplog: pytest.LogCaptureFixture
) -> None:
    optimiser = SceneOptimiser(_config(method="sds", field=FieldConfig(encoding="hash")), teacher)
    optimiser.prepare()
    report = optimiser.step()
    assert report.finite and "smoothness" not in report.values
    assert "a hash field has none" in caplog.text


@pytest.mark.parametrize("variant", ["integral", "exact", "four_term", "detached"])
def test_every_variant_moves_the_field(variant: Any, teacher: LatentDiffusionTeacher) -> None:
    guidance = GuidanceConfig(views_per_step=2, variant=variant, adversarial_weight=1e-4)
    optimiser = SceneOptimiser(_config(guidance=guidance), teacher)
    before = [parameter.detach().clone() for parameter in optimiser.field.parameters()]
    optimiser.prepare()
    for _ in range(3):
        report = optimiser.step()
        assert report.finite and "discriminator_loss" in report.values
    after = list(optimiser.field.parameters())
    assert any(not torch.equal(old, new) for old, new in zip(before, after, strict=True))
    optimiser.close()


def test_the_field_waits_for_the_fake_score(teacher: LatentDiffusionTeacher) -> None:
    optimiser = SceneOptimiser(_config(method="vsd", steps=10), teacher)
    optimiser.prepare()
    before = [parameter.detach().clone() for parameter in optimiser.field.parameters()]
    optimiser.step()
    assert all(torch.equal(*pair) for pair in zip(before, optimiser.field.parameters(), strict=True))
    optimiser.step()
    assert not all(torch.equal(*pair) for pair in zip(before, optimiser.field.parameters(), strict=True))


def test_a_non_finite_gradient_moves_nothing(teacher: LatentDiffusionTeacher) -> None:
    optimiser = SceneOptimiser(_config(method="sds"), teacher)
    optimiser.prepare()
    encode = teacher.encode_images
    teacher.encode_images = lambda images: encode(images) * float("nan")  # type: ignore[method-assign]
    before = [parameter.detach().clone() for parameter in optimiser.field.parameters()]
    assert not optimiser.step().finite
    assert all(torch.equal(*pair) for pair in zip(before, optimiser.field.parameters(), strict=True))


def _poison(monkeypatch: pytest.MonkeyPatch, is_bad: Callable[[int], bool]) -> list[int]:
    """Gradients are NaN in the calls of `step` that `is_bad` picks, from 0; returns the steps begun."""
    step, encode = SceneOptimiser.step, LatentDiffusionTeacher.encode_images
    begun: list[int] = []

    def counted(self: SceneOptimiser) -> Any:
        begun.append(self.step_index)
        return step(self)

    def poisoned(self: LatentDiffusionTeacher, images: torch.Tensor) -> torch.Tensor:
        return encode(self, images) * (torch.nan if is_bad(len(begun) - 1) else 1.0)

    monkeypatch.setattr(SceneOptimiser, "step", counted)
    monkeypatch.setattr(LatentDiffusionTeacher, "encode_images", poisoned)
    return begun


@pytest.fixture(params=["generate", "pipeline"])
def run_to_the_end(
    request: pytest.FixtureRequest, tiny_teacher_folder: Path, tmp_path: Path
) -> Callable[[], dict[str, Any]]:
    """Both ways to run a prompt, six steps of SDS and a state kept after every one: the mesh's figures."""
    config = _config(
        method="sds",
        teacher=str(tiny_teacher_folder),
        runs_folder=tmp_path,
        device="cpu",
        checkpoints=CheckpointsConfig(interval_s=1e-9),
    )
    if request.param == "generate":
        return lambda: generate(config).report
    pipeline = TextTo3DPipeline(LatentDiffusionTeacher.from_pretrained(tiny_teacher_folder))
    return lambda: pipeline("a red chair", config=config).report


def test_one_bad_step_is_skipped(
    run_to_the_end: Callable[[], dict[str, Any]],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    begun = _poison(monkeypatch, lambda call: call == 2)
    assert run_to_the_end()["surface"]["closed"]
    assert begun == [0, 1, 2, 3, 4, 5]
    assert "step 3 skipped: a gradient is not finite" in caplog.text


def test_three_bad_steps_go_back(
    run_to_the_end: Callable[[], dict[str, Any]],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """To the state after step 2, the last good one, although one was kept after every step."""
    begun = _poison(monkeypatch, lambda call: call in (2, 3, 4))
    assert run_to_the_end()["surface"]["closed"]
    assert begun == [0, 1, 2, 3, 4, 2, 3, 4, 5]
    assert "rolling back" in caplog.text


def test_bad_steps_for_ever_end_in_one_sentence(
    run_to_the_end: Callable[[], dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    begun = _poison(monkeypatch, lambda call: call >= 2)
    with pytest.raises(TrainingDiverged, match="lower the learning rates or the guidance scale") as caught:
        run_to_the_end()
    assert "\n" not in str(caught.value)
    assert begun == [0, 1] + 4 * [2, 3, 4]


def test_memory_gives_back_what_was_kept(teacher: LatentDiffusionTeacher) -> None:
    """Also the second time: optimisers go on writing into the tensors that they load."""
    optimiser = SceneOptimiser(_config(), teacher)
    optimiser.prepare()
    for _ in range(2):
        optimiser.step()
    store = MemoryStore()
    store.save(2, optimiser.state_dict())
    wanted = copy.deepcopy(optimiser.state_dict())
    for _ in range(2):
        optimiser.step()
        optimiser.load_state_dict(store.load_latest().state)
        _assert_same(wanted, optimiser.state_dict())


def test_a_rollback_leaves_each_step_once_in_the_metrics(
    tiny_teacher_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _poison(monkeypatch, lambda call: call in (2, 3, 4))
    config = _config(method="sds", teacher=str(tiny_teacher_folder), runs_folder=tmp_path, device="cpu")
    rows = (generate(config).run_directory / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(row)["step"] for row in rows] == [1, 2, 3, 4, 5, 6]


def test_generate_leaves_a_complete_run_directory(tiny_teacher_folder: Path, tmp_path: Path) -> None:
    import trimesh

    output = tmp_path / "chair.glb"
    config = _config(
        teacher=str(tiny_teacher_folder), output=output, runs_folder=tmp_path / "runs", device="cpu"
    )
    result = generate(config)
    assert result.output == output
    names = {path.name for path in result.run_directory.iterdir()}
    wanted = {"mesh.glb", "preview.png", "config.yaml", "metrics.jsonl", "metrics.json", "checkpoints"}
    assert wanted <= names
    assert len((result.run_directory / "metrics.jsonl").read_text().splitlines()) == config.steps
    mesh = trimesh.load(output, force="mesh")
    assert 0 < len(mesh.faces) <= 400 and mesh.volume > 0
    with pytest.raises(UsageError, match="--overwrite"):
        generate(config)


def test_every_format_is_sound_and_says_where_it_came_from(tiny_teacher_folder: Path, tmp_path: Path) -> None:
    formats = ("glb", "obj", "ply")
    config = _config(
        method="sds",
        seed=5,
        teacher=str(tiny_teacher_folder),
        runs_folder=tmp_path,
        device="cpu",
        mesh=MeshConfig(
            resolution=24, max_triangles=400, texture_size=64, turntable_frames=0, formats=formats
        ),
    )
    run = generate(config).run_directory
    extras = read_extras(run / "mesh.glb")
    wanted = {"prompt": "a red chair", "seed": 5, "method": "sds", "divergence": "reverse_kl", "steps": 6}
    assert extras.items() >= wanted.items()
    assert json.loads((run / "metrics.json").read_text())["divergence"] == "reverse_kl"
    assert provenance(TextTo3DConfig())["divergence"] == DEFAULT_DIVERGENCE
    assert extras["generator"].startswith("uni3d ") and extras["torch"] == torch.__version__
    for suffix in formats:
        report = mesh_report(run / f"mesh.{suffix}")
        assert report["closed"] and report["outward"] and report["in_unit_box"], suffix
        assert report["triangles"] <= 400
    assert (run / "mesh.mtl").is_file() and (run / "mesh.png").is_file()
    assert b"property uchar red" in (run / "mesh.ply").read_bytes()[:2000]


def test_a_prompt_beyond_the_vocabulary_of_any_teacher_draws_a_warning(tiny_teacher_folder: Path) -> None:
    config = _config(teacher=str(tiny_teacher_folder))
    assert load_run_teacher(config, "cpu")[1] is None
    _, warning = load_run_teacher(dataclasses.replace(config, prompt="a corgi"), "cpu")
    assert warning is not None and warning.startswith("the teacher knows no object named in 'a corgi'")


def test_methods_that_need_more_than_a_prompt_and_bad_devices_are_refused() -> None:
    with pytest.raises(ConfigError, match="reward"):
        resolve_recipe(_config(method="di-star"))
    with pytest.raises(ConfigError, match="reverse_kl"):
        resolve_recipe(_config(method="vsd", divergence="js"))
    with pytest.raises(UsageError, match="auto, cpu, cuda"):
        choose_device("abacus")


def test_a_renderer_that_cannot_be_had_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    runs = tmp_path / "runs"
    config = _config(runs_folder=runs, device="cpu")
    for renderer, message in (
        (RendererConfig(backend="nerfacc"), "renderer 'nerfacc' needs a CUDA device, not 'cpu'"),
        (RendererConfig(backend="triton", max_samples=9), "triton"),
    ):
        with pytest.raises(UsageError, match=message):
            generate(dataclasses.replace(config, renderer=renderer))
    assert not runs.exists()


def test_who_computes_a_run_may_change_on_the_way() -> None:
    config = _config()
    other = dataclasses.replace(
        config,
        device="cuda",
        renderer=dataclasses.replace(config.renderer, backend="triton", max_samples=10_000),
        field=dataclasses.replace(config.field, encoding_backend="triton"),
    )
    assert _fingerprint(other) == _fingerprint(config)
    finer = dataclasses.replace(config.renderer, samples_per_ray=17)
    assert _fingerprint(dataclasses.replace(config, renderer=finer)) != _fingerprint(config)


def test_too_few_samples_for_the_rays_of_a_step(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    monkeypatch.setattr("uni3d.scene.backends.triton_problem", lambda device: None)
    renderer = RendererConfig(backend="auto", resolution=((0.0, 16.0), (1.0, 32.0)), max_samples=2047)
    config = _config(renderer=renderer)  # two views a step
    with pytest.raises(ConfigError, match="max_samples is 2047, but a step renders up to 2048 rays"):
        choose_backends(config, torch.device("cuda"))
    choose_backends(config, torch.device("cpu"))  # where it limits gradients only
