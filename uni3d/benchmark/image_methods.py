"""Which method makes the best one-step image generator: students of one teacher, at equal images each.

    python -m uni3d.benchmark.image_methods --teacher teacher/teacher --data cifar10.npz \
      --weights efficientnet_lite0.safetensors --output comparison

Every student starts from the teacher and makes the same number of images with the same optimisers; what
differs is the method, with its published settings (`STUDENTS`). Each is then measured against the real images
as the teacher is, which takes many evaluations an image. Students train several at a time, each a `uni3d
distill` of its own. Called again, the program goes on where it was: what is done is not done again, students
half trained are resumed, and those that failed are tried once more.

OUTPUT holds summary.json and summary.md (figures with mean and spread over seeds), sheet.png, and by name of
the run configs/, runs/, trained/, figures/ and logs/.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from uni3d.benchmark.image_pages import summary_lines, write_student_pages
from uni3d.benchmark.image_students import STUDENTS, Comparison, ComparisonSettings
from uni3d.errors import Interrupted, ScenesFailed, Uni3DError
from uni3d.resources import resource_path
from uni3d.timing_program import argument_parser, say
from uni3d.training.stop import StopFlag

CONFIG = "configs/distill_comparison.yaml"
NETS = ("efficientnet_lite0", "inception_v3")


def compare(settings: ComparisonSettings, stop: StopFlag) -> None:
    """Make what is missing, then write the pages; see the module for what is left in the folder.

    Raises UsageError before any work, Interrupted after a signal once the students that train are saved, and
    ScenesFailed, after the pages are written, where runs failed.
    """
    comparison = Comparison(settings, report=say)
    comparison.make(stop)
    summary = write_student_pages(comparison)
    for line in summary_lines(summary):
        say(line)
    if stop.is_set:
        raise stop.interruption("stopped; students half trained are saved. Go on with the same command")
    if summary["failed"]:
        raise ScenesFailed(
            f"{len(summary['failed'])} runs failed; '{settings.output}/logs' says why. The same command "
            f"tries them again"
        )


def main(arguments: Sequence[str] | None = None) -> int:
    """`python -m uni3d.benchmark.image_methods`."""
    try:
        settings = read_settings(arguments)
        with StopFlag() as stop:
            compare(settings, stop)
    except Uni3DError as error:
        sys.stderr.write(f"{'' if isinstance(error, Interrupted) else 'error: '}{error}\n")
        return error.exit_code
    return 0


def read_settings(arguments: Sequence[str] | None) -> ComparisonSettings:
    """The flags as settings; argparse leaves with exit code 2 where they cannot be read."""
    begun_s = time.monotonic()
    given = _parser().parse_args(arguments)
    return ComparisonSettings(
        teacher=given.teacher,
        data=given.data,
        config=given.config or resource_path(CONFIG),
        output=given.output,
        net=given.net,
        weights=given.weights,
        students=tuple(given.students),
        num_images=given.images,
        at_once=given.at_once,
        first_seeds=given.seeds,
        extra_seeds=given.extra_seeds,
        best=given.best,
        teacher_steps=tuple(given.teacher_steps),
        num_samples=given.samples,
        batch_size=given.batch_size,
        deadline_s=None if given.minutes is None else begun_s + 60 * given.minutes,
        device=given.device,
    )


def _parser() -> argparse.ArgumentParser:
    parser = argument_parser(
        "uni3d.benchmark.image_methods", __doc__, output="folder of all that is made", needs_output=True
    )
    parser.add_argument("--teacher", type=Path, required=True, help="folder of the network to distil")
    parser.add_argument("--data", required=True, help="its images: a path, or shapes:N[:SIZE]")
    parser.add_argument("--config", type=Path, help=f"settings of all students; by default {CONFIG}")
    parser.add_argument("--net", default=NETS[0], choices=NETS, help="network of features")
    parser.add_argument("--weights", type=Path, required=True, help="its weights file")
    parser.add_argument(
        "--students", nargs="+", default=list(STUDENTS), choices=list(STUDENTS), metavar="NAME"
    )
    parser.add_argument("--images", type=int, help="of each student; by default run.total_images")
    parser.add_argument("--at-once", type=int, default=1, help="students that train at a time, over all GPUs")
    parser.add_argument("--seeds", type=int, default=1, help="runs of every student")
    parser.add_argument("--extra-seeds", type=int, default=0, help="further runs of the best students")
    parser.add_argument("--best", type=int, default=4, help="students that get them")
    parser.add_argument(
        "--teacher-steps", nargs="*", type=int, default=[10, 18], help="Heun steps; N are 2 N - 1 evaluations"
    )
    parser.add_argument("--samples", type=int, default=50_000, help="images measured of each network")
    parser.add_argument("--batch-size", type=int, default=500, help="images sampled at once")
    parser.add_argument(
        "--minutes", type=float, help="begin nothing after so many, and save the students that train"
    )
    return parser


if __name__ == "__main__":
    raise SystemExit(main())
