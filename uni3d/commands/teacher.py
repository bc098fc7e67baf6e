"""The commands `teacher render`, `train`, `sample` and `vocabulary`: a teacher of your own assets."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import tyro

from uni3d.cli import results_only
from uni3d.commands.parsing import option_value, parse_flags
from uni3d.config.loader import load_config
from uni3d.config.values import MAX_SEED, check_range
from uni3d.errors import MissingWeightsError, UsageError
from uni3d.outputs import check_output_file, check_output_folder
from uni3d.prompts import check_prompt
from uni3d.resources import weights_folder
from uni3d.teacher.settings import TeacherConfig

EMBEDDED = "embedded"
_Flat = Annotated[TeacherConfig, tyro.conf.arg(name="")]


@dataclass(frozen=True)
class RenderOptions:
    """Render 3D assets from many views, with captions, cameras and masks, as shards for training.

    A second run into the same folder renders only what is missing.
    """

    assets: tyro.conf.Positional[tuple[str, ...]]
    """Folders, .glb/.obj/.ply files, .zip and .sh3f archives, or procedural:vases[:NUMBER]."""
    output: Path
    """Folder for the shards."""
    metadata: Path | None = None
    """CSV or JSON table with names, categories, tags, creators and licences."""
    views: Literal["teacher", "evaluator"] = "teacher"
    """Light, cameras and number of views: as a teacher is trained on, or as the evaluator is."""
    roles: tuple[Literal["teacher", "evaluator", "neither", "both"], ...] = ()
    """Render only assets with these roles; all of them by default."""
    num_views: int | None = None
    """Views of each asset; none takes the number that belongs to --views."""
    size: int = 128
    """Side of the square images, pixels."""
    workers: int | None = None
    """Processes; none takes one per core."""
    limit: int | None = None
    """Only so many assets, for a quick look."""
    seed: int = 1
    """Seed of cameras and light."""
    quiet: bool = False
    """No progress on stderr."""
    json: bool = False
    """Print the result as one JSON object."""


def render(arguments: Sequence[str]) -> int:
    """`uni3d teacher render`; exit code 1 if not a single asset could be rendered."""
    options = parse_flags(RenderOptions, arguments, command="teacher render")
    if not options.assets:
        raise UsageError("no assets were given; pass a folder with .glb, .obj or .ply files")
    for name in ("num_views", "size", "workers", "limit"):
        value = getattr(options, name)
        if value is not None and value < 1:
            raise UsageError(f"--{name.replace('_', '-')} is {value}; expected at least 1")
    check_range("--seed", options.seed, 0, MAX_SEED)
    check_range("--size", options.size, 8, 4096)
    if options.metadata is not None and not options.metadata.is_file():
        raise UsageError(f"--metadata '{options.metadata}' is not a file; pass a CSV or JSON table")
    check_output_folder(options.output)
    from uni3d.data.view_rendering import EVALUATOR_VIEWS, TEACHER_VIEWS, render_library
    from uni3d.training.run_log import Progress

    settings = TEACHER_VIEWS if options.views == "teacher" else EVALUATOR_VIEWS
    settings = dataclasses.replace(
        settings, size=options.size, num_views=options.num_views or settings.num_views
    )
    with results_only() as stdout:
        bars: list[Progress] = []

        def show(done: int, total: int) -> None:
            if not bars:
                bars.append(Progress(total, label="render", quiet=options.quiet))
            bars[0].update(done - bars[0].done)

        try:
            report = render_library(
                options.assets,
                options.output,
                metadata=options.metadata,
                roles=options.roles or None,
                settings=settings,
                seed=options.seed,
                num_workers=options.workers,
                limit=options.limit,
                progress=show,
            )
        finally:
            for bar in bars:
                bar.close()
        if options.json:
            stdout.write(f"{json.dumps(dataclasses.asdict(report))}\n")
        else:
            stdout.write(
                f"{options.output}: {len(report.rendered)} assets rendered ({report.num_views} views in "
                f"{report.seconds:.0f} s), {len(report.already_done)} were there, "
                f"{len(report.failed)} failed, {len(report.skipped)} left out; reasons in failures.json\n"
            )
    return 0 if report.rendered or report.already_done else 1


@dataclass(frozen=True)
class TrainOptions:
    """Train a teacher: first the autoencoder, then the denoiser with its text encoder and camera token.

    The folder of --output gets checkpoints, sample grids and, at the end, the teacher itself.
    """

    views: tyro.conf.Positional[Path]
    """Folder that `uni3d teacher render` wrote."""
    output: Path
    """Folder of the training run."""
    config: Path | None = None
    """YAML file of settings, such as configs/teacher.yaml."""
    resume: Literal["no", "auto", "full", "compact"] = "no"
    """full goes on exactly, compact with fresh optimisers, auto with what there is or from the start."""
    max_minutes: float | None = None
    """Save and stop after so many minutes; go on later with --resume."""
    settings: _Flat = field(default_factory=TeacherConfig)
    """Everything else."""


def train(arguments: Sequence[str]) -> int:
    """`uni3d teacher train`."""
    file = option_value(arguments, "config")
    settings = load_config(file, TeacherConfig()) if file else TeacherConfig()
    # tyro asks for every field of a default instance; the two without one stay required.
    default = TrainOptions(views=tyro.MISSING, output=tyro.MISSING, settings=settings)
    options = parse_flags(TrainOptions, arguments, command="teacher train", default=default)
    if not options.views.is_dir():
        raise UsageError(f"'{options.views}' is not a folder; pass one that `uni3d teacher render` wrote")
    if options.max_minutes is not None:
        check_range("--max-minutes", options.max_minutes, 0, 1e6)
    if not any(options.views.glob("views_*.npz")):
        raise UsageError(
            f"'{options.views}' holds no view shards (views_*.npz); make some with: uni3d teacher render"
        )
    check_output_folder(options.output)
    from uni3d.teacher.training import train_teacher

    with results_only() as stdout:
        result = train_teacher(
            options.settings,
            options.views,
            options.output,
            resume=options.resume,
            max_minutes=options.max_minutes,
        )
        state = "finished" if result.is_finished else "not finished, go on with --resume full"
        stdout.write(f"{result.teacher_folder or options.output} ({state}, step {result.step})\n")
    return 0


@dataclass(frozen=True)
class SampleOptions:
    """Draw a grid of samples: a row for each prompt, a column for each view."""

    prompts: tyro.conf.Positional[tuple[str, ...]]
    """Captions without view words, for example "a red wooden chair"."""
    output: Path
    """Where the PNG goes."""
    teacher: str = EMBEDDED
    """embedded, or the folder of a teacher that `uni3d teacher train` wrote."""
    guidance_scale: float = 5.0
    """Classifier-free guidance; 1 means none."""
    steps: int = 25
    """Denoising steps."""
    seed: int = 0
    """Seed of the start noise."""
    overwrite: bool = False
    """Replace a file that exists."""


def sample(arguments: Sequence[str]) -> int:
    """`uni3d teacher sample`."""
    options = parse_flags(SampleOptions, arguments, command="teacher sample")
    prompts = [check_prompt(prompt) for prompt in options.prompts]
    if not prompts:
        raise UsageError('no prompts were given; for example "a red wooden chair" "a blue vase"')
    check_range("--steps", options.steps, 1, 1000)
    check_range("--guidance-scale", options.guidance_scale, 0, 1000)
    check_range("--seed", options.seed, 0, MAX_SEED)
    check_output_file(options.output, overwrite=options.overwrite, suffixes=(".png",))
    folder = teacher_folder(options.teacher)
    from uni3d.teacher.sampling import sample_grid

    with results_only() as stdout:
        path = sample_grid(
            folder,
            prompts,
            options.output,
            guidance_scale=options.guidance_scale,
            num_steps=options.steps,
            seed=options.seed,
        )
        stdout.write(f"{path}\n")
    return 0


@dataclass(frozen=True)
class VocabularyOptions:
    """List the things, colours and materials that a teacher knows, most frequent first."""

    words: tyro.conf.Positional[tuple[str, ...]] = ()
    """Only nouns that begin with or contain one of these."""
    teacher: str = EMBEDDED
    """embedded, or the folder of a teacher that `uni3d teacher train` wrote."""
    json: bool = False
    """Print the whole vocabulary as JSON."""


def vocabulary(arguments: Sequence[str]) -> int:
    """`uni3d teacher vocabulary`."""
    options = parse_flags(VocabularyOptions, arguments, command="teacher vocabulary")
    file = teacher_folder(options.teacher) / "vocabulary.json"
    if not file.is_file():
        raise UsageError(
            f"'{file.parent}' holds no vocabulary.json; pass a teacher that `uni3d teacher train` wrote"
        )
    from uni3d.data.captions import read_vocabulary

    with results_only() as stdout:
        known = read_vocabulary(file)
        if options.json:
            stdout.write(f"{json.dumps(known, indent=1)}\n")
            return 0
        wanted = [word.lower() for word in options.words]
        nouns = [noun for noun in known["nouns"] if not wanted or any(word in noun for word in wanted)]
        stdout.write(f"nouns ({len(nouns)}): {', '.join(nouns) or 'none that fits'}\n")
        for kind in ("colours", "materials"):
            if not wanted and known.get(kind):
                stdout.write(f"{kind} ({len(known[kind])}): {', '.join(known[kind])}\n")
    return 0


def teacher_folder(name: str) -> Path:
    """The folder of the embedded teacher or of one of the user's; MissingWeightsError if there is none."""
    if name == EMBEDDED:
        return weights_folder("teacher")
    folder = Path(name)
    if not folder.is_dir():
        raise MissingWeightsError(
            f"'{name}' is not a folder; pass one that `uni3d teacher train` wrote, or {EMBEDDED}"
        )
    return folder
