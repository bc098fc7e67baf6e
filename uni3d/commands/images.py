"""The commands `train-teacher` and `distill`: one-step image generators from EDM teachers."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, TypeVar

import tyro

from uni3d.cli import be_quiet, results_only
from uni3d.commands.parsing import option_value, parse_flags
from uni3d.config.loader import load_config
from uni3d.distillation.settings import DistillConfig, TeacherTrainingConfig
from uni3d.errors import UsageError
from uni3d.outputs import check_output_folder

_FlatTeacher = Annotated[TeacherTrainingConfig, tyro.conf.arg(name="")]
_FlatStudent = Annotated[DistillConfig, tyro.conf.arg(name="")]
Settings = TypeVar("Settings")


@dataclass(frozen=True)
class TrainTeacherOptions:
    """Train an EDM teacher on images; the network is OUTPUT/teacher, what `uni3d distill` starts from.

    Several GPUs: torchrun --nproc-per-node 2 -m uni3d train-teacher ...
    """

    output: Path
    """Folder of the run: checkpoints, metrics, sample grids and the teacher."""
    config: Path | None = None
    """YAML file of settings, such as configs/train_teacher_cifar10.yaml."""
    resume: bool = False
    """Go on with the run in --output, with its settings unless --config is given."""
    accept_changes: bool = False
    """Go on although settings or data are not those of the run."""
    quiet: bool = False
    """Nothing but warnings on stderr."""
    json: bool = False
    """Print the result as one JSON object."""
    settings: _FlatTeacher = field(default_factory=TeacherTrainingConfig)
    """Everything else."""


def train_teacher(arguments: Sequence[str]) -> int:
    """`uni3d train-teacher`."""
    settings = _base_settings(arguments, TeacherTrainingConfig())
    default = TrainTeacherOptions(output=tyro.MISSING, settings=settings)
    options = parse_flags(TrainTeacherOptions, arguments, command="train-teacher", default=default)
    _check(options)
    from uni3d.distillation.teacher_training import train_teacher as program

    return _run(program, options, "train-teacher")


@dataclass(frozen=True)
class DistillOptions:
    """Distil an EDM teacher into a generator that makes an image in one step; it is OUTPUT/student.

    Several GPUs: torchrun --nproc-per-node 2 -m uni3d distill ...
    """

    output: Path
    """Folder of the run: checkpoints, metrics, sample grids and the student."""
    config: Path | None = None
    """YAML file of settings, such as configs/distill_cifar10_cond.yaml."""
    resume: bool = False
    """Go on with the run in --output, with its settings unless --config is given."""
    accept_changes: bool = False
    """Go on although settings, teacher or data are not those of the run."""
    quiet: bool = False
    """Nothing but warnings on stderr."""
    json: bool = False
    """Print the result as one JSON object."""
    settings: _FlatStudent = field(default_factory=DistillConfig)
    """Everything else."""


def distill(arguments: Sequence[str]) -> int:
    """`uni3d distill`."""
    settings = _base_settings(arguments, DistillConfig())
    default = DistillOptions(output=tyro.MISSING, settings=settings)
    options = parse_flags(DistillOptions, arguments, command="distill", default=default)
    _check(options)
    if options.settings.teacher is None:
        raise UsageError(
            "no teacher was given; pass --teacher with RUN/teacher of train-teacher, or what import-edm wrote"
        )
    from uni3d.distillation.student_training import distill as program

    return _run(program, options, "distill")


def _run(program: Callable[..., Any], options: TrainTeacherOptions | DistillOptions, command: str) -> int:
    """Run a training program as the options say and print where it ended."""
    with results_only() as stdout:
        result = program(
            options.settings,
            options.output,
            resume=options.resume,
            accept_changes=options.accept_changes,
            quiet=options.quiet,
        )
        if _is_main():
            stdout.write(_result_text(result, command, options))
    return 0


def _base_settings(arguments: Sequence[str], default: Settings) -> Settings:
    """What flags are laid over: the file of --config, or the settings of the run that goes on."""
    file = option_value(arguments, "config")
    if file is not None:
        return load_config(file, default)
    output = option_value(arguments, "output")
    if output is not None and "--resume" in arguments:
        saved = Path(output) / "config.yaml"
        if not saved.is_file():
            raise UsageError(f"'{output}' is not the folder of a run (it has no config.yaml); check --output")
        return load_config(saved, default)
    return default


def _check(options: TrainTeacherOptions | DistillOptions) -> None:
    if options.quiet or not _is_main():
        be_quiet()
    check_output_folder(options.output)


def _is_main() -> bool:
    """Whether this is the process that speaks, among those that torchrun started."""
    return os.environ.get("RANK", "0") == "0"


def _result_text(result: Any, command: str, options: TrainTeacherOptions | DistillOptions) -> str:
    """A `distillation.loop.TrainingResult` for stdout."""
    if options.json:
        values: dict[str, Any] = {**dataclasses.asdict(result), "network": str(result.network)}
        return f"{json.dumps(values)}\n"
    from uni3d.distillation.loop import resume_line

    state = "finished" if result.is_finished else f"go on with: {resume_line(command, options.output)}"
    return f"{result.network} ({state}; {result.images} images)\n"
