"""The commands `evaluate`, `teacher evaluate` and `evaluator train`: figures about meshes and teachers.

`evaluate` hands over to `image_evaluation_commands` where it is asked about images.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import tyro

from uni3d.cli import results_only
from uni3d.commands.parsing import option_value, parse_flags
from uni3d.config.loader import load_config
from uni3d.config.values import check_range
from uni3d.errors import UsageError
from uni3d.evaluation.settings import EvaluatorSettings, MeshQualitySettings, TeacherQualitySettings
from uni3d.outputs import MESH_SUFFIXES, check_output_folder
from uni3d.prompts import check_prompt
from uni3d.resources import weights_folder

EMBEDDED = "embedded"
_MeshSettings = Annotated[MeshQualitySettings, tyro.conf.arg(name="")]
_TeacherSettings = Annotated[TeacherQualitySettings, tyro.conf.arg(name="")]
_EvaluatorSettings = Annotated[EvaluatorSettings, tyro.conf.arg(name="")]


@dataclass(frozen=True)
class EvaluateOptions:
    """Score meshes against their prompts: right object, right colour, one front, nothing empty.

    The prompt and the seed are read from the mesh file, where `uni3d generate` puts them.
    """

    meshes: tyro.conf.Positional[tuple[Path, ...]]
    """Mesh files, or directories of runs."""
    prompt: str | None = None
    """What the meshes show, for files that do not say so themselves."""
    output: Path | None = None
    """Folder for report, table and contact sheet."""
    evaluator: str = EMBEDDED
    """embedded, or the folder of an evaluator that `uni3d evaluator train` wrote."""
    device: str = "cpu"
    """Where the evaluator runs: cpu, cuda or cuda:N."""
    json: bool = False
    """Print the whole report as JSON."""
    settings: _MeshSettings = field(default_factory=MeshQualitySettings)
    """Views and thresholds."""


def evaluate(arguments: Sequence[str]) -> int:
    """`uni3d evaluate`, of meshes or of images; exit code 1 if a mesh could not be read."""
    from uni3d.commands.image_evaluation import evaluate_images, wants_images

    if {"-h", "--help"} & set(arguments):
        return _evaluate_help()
    if wants_images(arguments):
        return evaluate_images(arguments)
    options = parse_flags(EvaluateOptions, arguments, command="evaluate")
    if not options.meshes:
        raise UsageError("no meshes were given; pass mesh files or directories of runs")
    prompt = None if options.prompt is None else check_prompt(options.prompt)
    files = [mesh_file(path) for path in options.meshes]
    if options.output is not None:
        check_output_folder(options.output)
    folder = evaluator_folder(options.evaluator)
    from uni3d.evaluation.evaluator import Evaluator
    from uni3d.evaluation.mesh_quality import MeshItem, evaluate_meshes, mesh_markdown

    with results_only() as stdout:
        report = evaluate_meshes(
            [
                MeshItem(file, *asked_of(file, prompt), fog=recorded_fog(path))
                for path, file in zip(options.meshes, files, strict=True)
            ],
            Evaluator.load(folder, device=checked_device(options.device)),
            settings=options.settings,
            output_dir=options.output,
            ceiling=ceiling_of(folder),
        )
        stdout.write(f"{json.dumps(report) if options.json else mesh_markdown(report).rstrip()}\n")
    return 1 if report["num_failed"] else 0


def _evaluate_help() -> int:
    """The flags for meshes, then those for images: what is scored decides which ones there are."""
    from uni3d.commands.image_evaluation import EvaluateImagesOptions

    for kind in (EvaluateOptions, EvaluateImagesOptions):
        with contextlib.suppress(SystemExit):
            parse_flags(kind, ["--help"], command="evaluate")
    return 0


def mesh_file(path: Path) -> Path:
    """A mesh file itself, or the mesh of a run's directory."""
    if path.is_dir():
        found = next(
            (path / f"mesh{suffix}" for suffix in MESH_SUFFIXES if (path / f"mesh{suffix}").is_file()), None
        )
        if found is None:
            raise UsageError(f"'{path}' holds no mesh.glb, mesh.obj or mesh.ply; pass a mesh file or a run")
        return found
    if not path.is_file():
        raise UsageError(f"'{path}' does not exist; pass a mesh file or the directory of a run")
    return path


def recorded_fog(path: Path) -> float | None:
    """The fog that a run's directory recorded, a share in [0, 1]; None where there is none."""
    try:
        fog = json.loads((path / "metrics.json").read_text(encoding="utf-8"))["fog"]
        return float(fog) if 0 <= fog <= 1 else None
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None


def asked_of(file: Path, prompt: str | None) -> tuple[str, int | None]:
    """The prompt and the seed that a mesh was made from; what the file says wins over the given prompt."""
    from uni3d.mesh.report import read_extras

    extras = read_extras(file)
    asked = extras.get("prompt") or prompt
    if not isinstance(asked, str):
        raise UsageError(f"'{file}' does not say what it shows; pass --prompt")
    seed = extras.get("seed")
    return asked, seed if isinstance(seed, int) else None


@dataclass(frozen=True)
class EvaluateTeacherOptions:
    """Measure a teacher's samples for captions it was not trained on."""

    views: tyro.conf.Positional[Path]
    """Folder of renders that the teacher's training used, held-out assets included."""
    output: Path
    """Folder for report, table and contact sheet."""
    teacher: str = EMBEDDED
    """embedded, or the folder of a teacher that `uni3d teacher train` wrote."""
    evaluator: str = EMBEDDED
    """embedded, or the folder of an evaluator that `uni3d evaluator train` wrote."""
    device: str = "cpu"
    """cpu, cuda or cuda:N."""
    cameras: bool = True
    """Tell the teacher the camera of each view; otherwise the view word alone says it."""
    guidance_scale: float = 5.0
    """Classifier-free guidance of the samples."""
    steps: int = 25
    """Denoising steps of the samples."""
    num_reference: int = 2000
    """Held-out renders behind the Frechet distance."""
    workers: int = 2
    """Processes that decode the view shards."""
    json: bool = False
    """Print the whole report as JSON."""
    settings: _TeacherSettings = field(default_factory=TeacherQualitySettings)
    """Captions and seeds."""


def evaluate_teacher(arguments: Sequence[str]) -> int:
    """`uni3d teacher evaluate`."""
    options = parse_flags(EvaluateTeacherOptions, arguments, command="teacher evaluate")
    if not options.views.is_dir():
        raise UsageError(f"'{options.views}' is not a folder; pass one that `uni3d teacher render` wrote")
    check_range("--steps", options.steps, 1, 1000)
    check_range("--guidance-scale", options.guidance_scale, 0, 1000)
    check_range("--num-reference", options.num_reference, 2, 10_000_000)
    check_range("--workers", options.workers, 0, 1024)
    check_output_folder(options.output)
    from uni3d.commands.teacher import teacher_folder

    sources = teacher_folder(options.teacher), evaluator_folder(options.evaluator)
    device = checked_device(options.device)
    with results_only() as stdout:
        report = _measure_teacher(options, *sources, device)
        from uni3d.evaluation.teacher_quality import teacher_markdown

        stdout.write(f"{json.dumps(report) if options.json else teacher_markdown(report).rstrip()}\n")
    return 0


def _measure_teacher(
    options: EvaluateTeacherOptions, teacher: Path, evaluator: Path, device: str
) -> dict[str, Any]:
    from torch import Tensor

    from uni3d.data.view_shards import load_views
    from uni3d.evaluation.evaluator import Evaluator
    from uni3d.evaluation.teacher_quality import (
        cameras_for_views,
        evaluate_teacher,
        held_out_captions,
        reference_renders,
    )
    from uni3d.teacher.sampling import load_teacher, reconstruct_views, sample_views

    judge = Evaluator.load(evaluator, device=device)
    modules = load_teacher(teacher, device=device)
    views = load_views(options.views, num_workers=options.workers)

    def sample(texts: Sequence[str], view_words: Sequence[str], seed: int) -> Tensor:
        return sample_views(
            modules,
            texts,
            cameras_for_views(view_words, seed=seed) if options.cameras else None,
            guidance_scale=options.guidance_scale,
            num_steps=options.steps,
            seed=seed,
        )

    captions = held_out_captions(
        judge.benchmark_nouns,
        views.records,
        num=options.settings.num_captions,
        seed=options.settings.caption_seed,
    )
    reference = reference_renders(views, judge.noun_names, num=options.num_reference)
    return evaluate_teacher(
        sample,
        judge,
        captions,
        settings=options.settings,
        reference=reference,
        reconstruct=partial(reconstruct_views, modules),
        ceiling=ceiling_of(evaluator),
        output_dir=options.output,
    )


@dataclass(frozen=True)
class TrainEvaluatorOptions:
    """Train the evaluator: a contrastive image-text model with a view classifier, used only for measuring."""

    views: tyro.conf.Positional[Path]
    """Folder that `uni3d teacher render --views evaluator` wrote."""
    output: Path
    """Folder for the evaluator."""
    config: Path | None = None
    """YAML file of settings, such as configs/evaluator.yaml."""
    resume: bool = False
    """Go on from the checkpoints in the output folder."""
    settings: _EvaluatorSettings = field(default_factory=EvaluatorSettings)
    """Everything else."""


def train_evaluator(arguments: Sequence[str]) -> int:
    """`uni3d evaluator train`."""
    file = option_value(arguments, "config")
    settings = load_config(file, EvaluatorSettings()) if file else EvaluatorSettings()
    # tyro asks for every field of a default instance; the two without one stay required.
    default = TrainEvaluatorOptions(views=tyro.MISSING, output=tyro.MISSING, settings=settings)
    options = parse_flags(TrainEvaluatorOptions, arguments, command="evaluator train", default=default)
    if not options.views.is_dir():
        raise UsageError(f"'{options.views}' is not a folder; pass one that `uni3d teacher render` wrote")
    check_output_folder(options.output)
    from uni3d.evaluation.evaluator_training import train_evaluator as run

    with results_only() as stdout:
        run(options.settings, options.views, options.output, resume=options.resume)
        stdout.write(f"{options.output}\n")
    return 0


def evaluator_folder(name: str) -> Path:
    """The folder of the embedded evaluator or of one of the user's; MissingWeightsError if there is none."""
    return weights_folder("evaluator") if name == EMBEDDED else Path(name)


def ceiling_of(folder: Path) -> dict[str, Any] | None:
    """The evaluator's own accuracy, which stands beside every figure; None if it was not measured."""
    file = folder / "metrics.json"
    return json.loads(file.read_text(encoding="utf-8")).get("ceiling") if file.is_file() else None


def checked_device(name: str) -> str:
    """`name` if torch can use it here; UsageError if not."""
    from uni3d.text_to_3d.pipeline import choose_device

    return choose_device(name)[0]
