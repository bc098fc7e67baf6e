"""The whole benchmark in two dimensions on a tiny teacher: shared, resumed, failing, summarised, drawn."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from plain_evaluator import PlainEvaluator

from uni3d.benchmark import program
from uni3d.benchmark.backends import FieldBackend, PictureBackend, Product, read_views
from uni3d.benchmark.pages import summary_markdown
from uni3d.benchmark.plan import chosen_variants
from uni3d.benchmark.scores import Judges, judge_product, read_embeddings, run_figures
from uni3d.benchmark.settings import BenchmarkConfig, BudgetConfig, TuningConfig, ViewsConfig
from uni3d.config.loader import load_variants
from uni3d.config.text_to_3d import (
    DiscriminatorConfig,
    FieldConfig,
    MeshConfig,
    NetworksConfig,
    RendererConfig,
    TextTo3DConfig,
)
from uni3d.diffusion.latent_teacher import LatentDiffusionTeacher
from uni3d.errors import ConfigError, MissingWeightsError
from uni3d.evaluation.settings import MeshQualitySettings
from uni3d.resources import resource_path
from uni3d.scene.camera import Cameras

PROMPTS = ("a red chair", "a blue vase")
FAILING = "sds"


def config(folder: Path, teacher: Path, **changes: Any) -> BenchmarkConfig:
    prompts = folder / "prompts.txt"
    prompts.write_text("\n".join([*PROMPTS, "a green cactus"]) + "\n")
    settings: dict[str, Any] = {
        "output": folder / "out",
        "scene": "images",
        "methods": ("sds", "vsd-prolific", "ui-js"),
        "prompts": prompts,
        "limit_prompts": 2,
        "seeds": (0, 1),
        "num_bootstrap": 20,
        "quiet": True,
        "budget": BudgetConfig(kinds=("passes",), passes=20),
        "views": ViewsConfig(
            azimuths_deg=(0.0, 90.0), elevations_deg=(15.0,), teacher_samples_per_view=2, sampling_steps=1
        ),
        "run": TextTo3DConfig(
            teacher=str(teacher),
            device="cpu",
            discriminator=DiscriminatorConfig(num_real_samples=2, sampling_steps=2),
        ),
    }
    return BenchmarkConfig(**(settings | changes))


@pytest.fixture(autouse=True, scope="module")
def _plain_evaluator() -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(program, "Evaluator", PlainEvaluator)
        yield


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, tiny_teacher_folder: Path) -> Any:
    """A benchmark in which every picture by one method fails."""
    folder = tmp_path_factory.mktemp("benchmark")
    settings = config(folder, tiny_teacher_folder)
    make = PictureBackend._make

    def failing(self: PictureBackend, run: TextTo3DConfig, place: Path) -> Product:
        if run.method == FAILING and run.seed == 1:
            raise RuntimeError("out of luck")
        return make(self, run, place)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(PictureBackend, "_make", failing)
        summary = program.benchmark(settings)
    assert summary is not None
    return settings, summary


def test_the_teacher_is_run_as_the_settings_say(tmp_path: Path, tiny_teacher_folder: Path) -> None:
    settings = config(tmp_path, tiny_teacher_folder)
    networks = NetworksConfig(dtype="bfloat16", image_size=32, vae_slicing=True)
    settings = dataclasses.replace(settings, run=dataclasses.replace(settings.run, networks=networks))
    teacher = program._Session(settings, settings.output, chosen_variants(settings)).backend.teacher
    assert teacher.dtype == torch.bfloat16 and teacher.image_size == 32 and teacher.vae.use_slicing
    lora = dataclasses.replace(settings.run, teacher_lora=tmp_path / "lost.safetensors")
    with pytest.raises(MissingWeightsError, match="lost.safetensors"):
        program.benchmark(dataclasses.replace(settings, run=lora))


def row(summary: dict[str, Any], method: str) -> dict[str, Any]:
    return next(entry for entry in summary["rows"] if entry["method"] == method)


def test_every_run_is_counted_and_failures_are_the_worst(finished: Any) -> None:
    _, summary = finished
    assert [entry["num_runs"] for entry in summary["rows"]] == [4, 4, 4]
    failed = row(summary, FAILING)
    assert failed["num_failed"] == 2 and failed["figures"]["failed"]["mean"] == 0.5
    assert {entry["seed"] for entry in summary["failures"]} == {1}
    assert all("RuntimeError: out of luck" in entry["error"] for entry in summary["failures"])
    # A copy of its neighbour: no diversity is won by failing.
    assert failed["figures"]["vendi"]["mean"] == pytest.approx(1)
    assert failed["figures"]["right_object"]["num"] == len(PROMPTS)


def test_methods_get_equal_passes(finished: Any) -> None:
    settings, summary = finished
    limit = settings.budget.passes
    for method, steps in (("sds", 10), ("vsd-prolific", 5)):
        figures = row(summary, method)["figures"]
        assert figures["steps"]["mean"] == steps and limit / 2 < figures["passes"]["mean"] <= limit
    # Its two teacher samples of two guided steps are paid for.
    with_samples = row(summary, "ui-js")["figures"]
    assert with_samples["steps"]["mean"] == 2 and limit / 2 < with_samples["passes"]["mean"] <= limit


def test_a_finished_benchmark_is_read_not_made_again(finished: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    settings, summary = finished
    monkeypatch.setattr(PictureBackend, "make", lambda *_: pytest.fail("made again"))
    fewer = program.benchmark(dataclasses.replace(settings, seeds=(0,)))
    assert fewer is not None and fewer["seeds"] == [0] and not fewer["failures"]
    assert program.benchmark(settings) == summary
    other = dataclasses.replace(settings, budget=BudgetConfig(kinds=("steps",)))
    with pytest.raises(ConfigError, match="other settings of budget; choose another"):
        program.benchmark(other)


def test_the_summary_follows_its_schema(finished: Any) -> None:
    settings, _ = finished
    schema = json.loads(resource_path("assets/benchmark_summary.schema.json").read_text())
    summary = json.loads((settings.output / "summary.json").read_text())
    assert violations(summary, schema, schema) == []
    del summary["rows"][0]["figures"]["vendi"]["low"]
    assert violations(summary, schema, schema) == ["$.rows[0].figures.vendi lacks low"]
    assert summary["machines"][0]["packages"]["torch"] == importlib.metadata.version("torch")
    assert summary["variants"]["passes"]["sds"]["method"] == "sds"


_TYPES: dict[str, Any] = {
    "object": dict, "array": list, "string": str, "integer": int, "number": (int, float), "null": type(None),
}  # fmt: skip


def violations(value: Any, schema: dict[str, Any], root: dict[str, Any], path: str = "$") -> list[str]:
    """What of the JSON Schema's words used in our file `value` breaks."""
    if "$ref" in schema:
        return violations(value, root["$defs"][schema["$ref"].rpartition("/")[2]], root, path)
    if "anyOf" in schema:
        tries = [violations(value, choice, root, path) for choice in schema["anyOf"]]
        return [] if [] in tries else tries[-1]
    if "const" in schema or "enum" in schema:
        return [] if value in schema.get("enum", [schema.get("const")]) else [f"{path} is {value!r}"]
    if "type" in schema and (
        not isinstance(value, _TYPES[schema["type"]])
        or (isinstance(value, bool) and schema["type"] != "boolean")
    ):
        return [f"{path} is no {schema['type']}"]
    found = [f"{path} lacks {key}" for key in schema.get("required", ()) if key not in value]
    if isinstance(value, dict):
        known = schema.get("properties", {})
        others = schema.get("additionalProperties", True)
        for key, item in value.items():
            if key in known or isinstance(others, dict):
                found += violations(item, known.get(key, others), root, f"{path}.{key}")
            elif others is False:
                found.append(f"{path} has {key}")
    if isinstance(value, list) and "items" in schema:
        for index, item in enumerate(value):
            found += violations(item, schema["items"], root, f"{path}[{index}]")
    return found


def test_pages_show_every_method_and_the_teacher(finished: Any) -> None:
    settings, summary = finished
    text = (settings.output / "summary.md").read_text()
    assert text == summary_markdown(summary)
    for name in (*settings.methods, "teacher's own samples", "Vendi", "R-precision", "2 runs failed"):
        assert name in text
    sheet = Image.open(settings.output / "sheet-passes-0.png")
    assert sheet.width >= 3 * 96
    for name in ("quality_time.png", "quality_diversity.png"):
        colours = Image.open(settings.output / name).getcolors(1 << 16)
        assert colours is not None and len(colours) > 3


def test_tuning_tries_the_same_number_of_settings_for_each_method(
    tmp_path: Path, tiny_teacher_folder: Path
) -> None:
    settings = config(
        tmp_path,
        tiny_teacher_folder,
        methods=("sds", "vsd-prolific"),
        seeds=(0,),
        limit_prompts=1,
        tune=True,
    )
    settings = dataclasses.replace(
        settings,
        tuning_prompts=settings.prompts,
        tuning=TuningConfig(guidance_factors=(0.5, 1.0), rate_factors=(1.0,)),
        budget=BudgetConfig(kinds=("passes",), passes=9),
        views=dataclasses.replace(settings.views, teacher_samples_per_view=0),
    )
    summary = program.benchmark(settings)
    assert summary is not None
    methods = [entry["method"] for entry in summary["rows"]]
    assert methods == ["sds.g0.5.r1", "sds.g1.r1", "vsd-prolific.g0.5.r1", "vsd-prolific.g1.r1"]
    tuned = settings.output / "tuned.yaml"
    base = load_variants(resource_path("configs/variants/methods.yaml"), settings.run)
    chosen = load_variants(tuned, settings.run, over=base)
    merit = {entry["method"]: entry["figures"]["alignment"]["mean"] for entry in summary["rows"]}
    best = max((name for name in merit if name.startswith("sds")), key=lambda name: merit[name])
    factor = 0.5 if "g0.5" in best else 1.0
    assert chosen["sds"].guidance.guidance_scale == ((0.0, 100.0 * factor),)
    assert chosen["sds"].method == "sds"
    # The chosen settings are what a report is then made with.
    report = dataclasses.replace(settings, tune=False, tuned=tuned, output=tmp_path / "report")
    made = program.benchmark(report)
    assert made is not None
    used = made["variants"]["passes"]["sds"]["guidance"]["guidance_scale"]
    assert used == [[0.0, 100.0 * factor]]


class _Unreachable(PictureBackend):
    def make(self, runs: Sequence[tuple[TextTo3DConfig, Path]]) -> list[Product | Exception]:
        raise AssertionError("no run should be made")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"methods": ("vsd-prolifik",)}, "did you mean 'vsd-prolific'"),
        ({"methods": ("sds",)}, "baseline 'vsd-prolific' is not among the methods"),
        ({"budget": BudgetConfig(kinds=("passes",), passes=1)}, "do not cover one step"),
    ],
)
def test_mistakes_are_found_before_any_run(
    tmp_path: Path,
    tiny_teacher_folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    changes: dict[str, Any],
    message: str,
) -> None:
    monkeypatch.setattr(program, "PictureBackend", _Unreachable)
    with pytest.raises(ValueError, match=message):
        program.benchmark(config(tmp_path, tiny_teacher_folder, **changes))


def test_a_field_becomes_a_mesh_that_is_judged_and_shown(tmp_path: Path, tiny_teacher_folder: Path) -> None:
    run = TextTo3DConfig(
        prompt="a red chair",
        teacher=str(tiny_teacher_folder),
        device="cpu",
        method="sds",
        steps=2,
        field=FieldConfig(resolutions=(8,), initial_colour="grey"),  # no passes but those of the steps
        renderer=RendererConfig(resolution=((0.0, 16.0),), samples_per_ray=16),
        mesh=MeshConfig(resolution=24, texture_size=64, max_triangles=300, turntable_frames=2),
    )
    backend = FieldBackend(LatentDiffusionTeacher.from_pretrained(tiny_teacher_folder))
    lost = dataclasses.replace(run, mesh=dataclasses.replace(run.mesh, iso_level=1e8))
    for name in ("made", "lost"):
        (tmp_path / name).mkdir()
    made, failed = backend.make([(run, tmp_path / "made"), (lost, tmp_path / "lost")])
    assert isinstance(failed, Exception) and isinstance(made, Product)
    assert made.costs["passes"]["total"] == 4 and made.costs["peak_memory_bytes"] > 2**20
    assert made.figures["mesh"]["triangles"] > 10 and (tmp_path / "made" / "turntable.mp4").is_file()

    evaluator: Any = PlainEvaluator()
    cameras = Cameras.from_lists([0.0, 90.0, 180.0, 270.0], [15.0] * 4)
    judges = Judges(evaluator, [], cameras, MeshQualitySettings(), shows_meshes=True)
    record = {
        "error": None,
        "costs": made.costs,
        "figures": made.figures,
        "verdict": judge_product(made, run.prompt, 0, judges, backend, tmp_path / "made"),
    }
    figures = run_figures(record, shows_meshes=True)
    assert {"closed", "one_piece", "as_field", "janus", "right_object", "seconds"} <= set(figures)
    assert read_views(tmp_path / "made" / "views.npz").shape == (4, 3, 16, 16)
    assert read_embeddings(tmp_path / "made")["evaluator"].shape == (
        4,
        evaluator.text_features(["a"]).shape[1],
    )

    nothing = Product(tmp_path / "lost" / "nothing.glb", {}, {})
    verdict = judge_product(nothing, run.prompt, 0, judges, backend, tmp_path / "lost")
    worst = run_figures(
        {"error": "no surface", "costs": {}, "figures": {}, "verdict": verdict}, shows_meshes=True
    )
    assert worst["failed"] == 1 and worst["janus"] == 1
    assert worst["closed"] == worst["right_object"] == worst["right_colour"] == worst["as_field"] == 0
    assert read_embeddings(tmp_path / "lost") == {}
