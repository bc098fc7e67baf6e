"""The students of a comparison of image methods: what is to be made, and the commands that make it.

A run (a student with a seed, or the teacher with a number of steps) leaves trained/NAME.json when its
training is over and figures/NAME.json when it is measured; what is there is not made again.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from uni3d.benchmark.image_jobs import CommandStopped, Crew
from uni3d.config.loader import config_to_yaml, load_config
from uni3d.config.values import check_ranges
from uni3d.data.image_dataset import ImageDataset
from uni3d.distillation.benchmark_step import step_passes
from uni3d.distillation.image_batches import check_images, facts_of, open_source
from uni3d.distillation.session import file_digest, fingerprint, read_network
from uni3d.distillation.settings import DistillConfig
from uni3d.distillation.stages import recipe_of
from uni3d.errors import Uni3DError, UsageError
from uni3d.evaluation.fidelity import metric_name
from uni3d.losses.recipe import Recipe
from uni3d.outputs import check_output_folder
from uni3d.training.checkpoint import atomic_write, atomic_write_json, atomic_write_text
from uni3d.training.stop import StopFlag

# A session of a student that would be shorter is not begun: starting and saving would be all of it.
_SHORTEST_SESSION_S = 20.0
_HEARTBEAT_S = 30.0

FRECHET, KERNEL = "frechet_distance", "kernel_distance"
PRECISION, RECALL = "precision", "recall"


@dataclass(frozen=True)
class Student:
    """A method with what it was published with; every other setting is the same for all."""

    method: str
    divergence: str | None = None
    """None is the method's own."""
    alpha: float | None = None
    """SiD's; None is the method's own."""


STUDENTS: dict[str, Student] = {
    "diff_instruct": Student("diff-instruct"),
    "dmd2": Student("dmd2"),
    "sid": Student("sid", alpha=1.2),
    "sida": Student("sida"),
    "f_distill": Student("f-distill", "forward_kl"),
    **{
        f"uni_instruct_{divergence}": Student("uni-instruct", divergence)
        for divergence in ("forward_kl", "reverse_kl", "jeffreys", "js", "pearson_chi2")
    },
}


@dataclass(frozen=True)
class ComparisonSettings:
    """What is compared, how, and where it goes."""

    teacher: Path
    data: str
    """Images of the teacher: what `data.source` of a distillation may be."""
    config: Path
    """YAML file of `uni3d distill` for all students."""
    output: Path
    net: str
    """Network of features that the figures are of."""
    weights: Path
    """Its weights file."""
    students: tuple[str, ...] = tuple(STUDENTS)
    num_images: int | None = None
    """That each student makes in training; None is the config's run.total_images."""
    at_once: int = 1
    """Students that train at a time, over all GPUs together."""
    first_seeds: int = 1
    """Runs of every student."""
    extra_seeds: int = 0
    """Further runs of the best."""
    best: int = 4
    """Students, by Frechet distance, that get further runs."""
    teacher_steps: tuple[int, ...] = (10, 18)
    """Heun steps with which the teacher is measured; N of them are 2 N - 1 evaluations."""
    num_samples: int = 50_000
    """Images that are measured of each network."""
    batch_size: int = 500
    """Images sampled at once."""
    deadline_s: float | None = None
    """By time.monotonic: nothing begins after it, and students that train save and stop; None is never."""
    device: str = "cpu"

    def __post_init__(self) -> None:
        ranges = {
            "at_once": (1, 256),
            "first_seeds": (1, 1000),
            "extra_seeds": (0, 1000),
            "best": (1, len(STUDENTS)),
            "num_samples": (2, 10_000_000),
            "batch_size": (1, 100_000),
        }
        if self.teacher_steps:
            ranges["teacher_steps"] = (1, 1000)
        check_ranges("", self, ranges)
        if self.num_images is not None and self.num_images < 1:
            raise UsageError(f"--images is {self.num_images}; expected 1 or more")


@dataclass(frozen=True)
class Run:
    """A student with a seed, or the teacher with a number of steps."""

    student: str | None
    """Its name among `STUDENTS`; None is the teacher."""
    number: int
    """The seed, or the teacher's steps."""

    @property
    def name(self) -> str:
        """Of its files."""
        return f"teacher_{self.number}_steps" if self.student is None else f"{self.student}_{self.number}"


@dataclass
class Comparison:
    """Makes what a comparison lacks and knows what it has.

    Raises UsageError for a teacher, images or a folder that do not work, before anything is written.
    """

    settings: ComparisonSettings
    report: Callable[[str], object]
    failures: dict[str, str] = field(default_factory=dict)
    """What failed since the program started and why, by name of the run."""

    def __post_init__(self) -> None:
        settings = self.settings
        check_output_folder(settings.output)
        if not settings.weights.is_file():
            raise UsageError(
                f"--weights '{settings.weights}' is not a file; pass the weights of {settings.net}"
            )
        base = load_config(settings.config, DistillConfig())
        num_images = settings.num_images or base.run.total_images
        self.base = replace(
            base,
            teacher=str(settings.teacher),
            data=replace(base.data, source=settings.data),
            run=replace(base.run, total_images=num_images, device=settings.device),
        )
        self.recipes = {name: self._recipe(name) for name in settings.students}
        network, _, digest = read_network(settings.teacher, title="teacher")
        images = open_source(self.base.data)
        check_images(images, network, title="teacher")
        self._check_same(digest, images)
        self._unpack(images)
        self._crew = Crew(settings.at_once, device=settings.device)
        self._begun_s = time.monotonic()
        self._training: dict[str, float] = {}
        self._lock = threading.Lock()

    # ------------------------------------------------------------------ what there is

    @cached_property
    def teacher_runs(self) -> list[Run]:
        return [Run(None, steps) for steps in self.settings.teacher_steps]

    @property
    def first_runs(self) -> list[Run]:
        """Of all students, the most costly first, so that no long run is left for the end."""
        names = sorted(self.recipes, key=lambda name: -step_passes(self.recipes[name]).full)
        return [Run(name, seed) for seed in range(self.settings.first_seeds) for name in names]

    @property
    def extra_runs(self) -> list[Run]:
        """Of the best students so far; none before every first run is measured or has failed."""
        settings, measured = self.settings, [run for run in self.first_runs if self.figures(run)]
        if len(measured) + len(self.failures.keys() & {run.name for run in self.first_runs}) < len(
            self.first_runs
        ):
            return []
        means = {
            name: float(np.mean([self.distance(run) for run in measured if run.student == name]))
            for name in {run.student for run in measured}
            if name is not None
        }
        best = sorted(means, key=lambda name: means[name])[: settings.best]
        seeds = range(settings.first_seeds, settings.first_seeds + settings.extra_seeds)
        return [Run(name, seed) for seed in seeds for name in best]

    def distance(self, run: Run) -> float:
        """Frechet distance of a measured run."""
        return (self.figures(run) or {})["metrics"][metric_name(FRECHET, self.settings.net)]

    def trained(self, run: Run) -> dict[str, Any] | None:
        """What is known of a training that is over."""
        return _read_json(self._file("trained", run))

    def figures(self, run: Run) -> dict[str, Any] | None:
        """What `uni3d evaluate` said of as many images as are asked for now."""
        found = _read_json(self._file("figures", run))
        return found if found and found["num_images"] == self.settings.num_samples else None

    def progress(self, run: Run) -> tuple[int, list[float]]:
        """Images that a student has made so far, and images/s over each stretch of its training."""
        file = self._folder(run) / "metrics.jsonl"
        if not file.is_file():
            return 0, []
        rows = [json.loads(line) for line in file.read_text().splitlines() if line.endswith("}")]
        return (rows[-1]["images"] if rows else 0), [row["images_per_s"] for row in rows]

    def network(self, run: Run) -> Path:
        return self.settings.teacher if run.student is None else self._folder(run) / "student"

    def _file(self, kind: str, run: Run) -> Path:
        return self.settings.output / kind / f"{run.name}.json"

    def _folder(self, run: Run) -> Path:
        return self.settings.output / "runs" / run.name

    # ------------------------------------------------------------------ before any run

    def config_of(self, run: Run) -> DistillConfig:
        """The settings of a student's run."""
        assert run.student is not None
        return replace(
            self.base,
            method=_method_of(self.base, run.student),
            data=replace(self.base.data, source=str(self._images)),
            run=replace(self.base.run, seed=run.number, max_minutes=self._minutes_left()),
        )

    def _recipe(self, name: str) -> Recipe:
        method = _method_of(self.base, name)
        return recipe_of(method, method.divergence)

    def _check_same(self, teacher_digest: str, images: ImageDataset) -> None:
        """Refuse a folder that holds the runs of another comparison; note what this one compares."""
        facts = {
            "teacher_sha256": teacher_digest,
            "images": facts_of(images),
            "images_of_each_student": self.base.run.total_images,
            "feature_net": self.settings.net,
            "weights_sha256": file_digest(self.settings.weights),
        }
        # As JSON gives it back, without the settings that differ from run to run.
        current = json.loads(json.dumps(fingerprint(self.base, facts)))
        file = self.settings.output / "settings.json"
        earlier = _read_json(file)
        if earlier is None:
            self.settings.output.mkdir(parents=True, exist_ok=True)
            atomic_write_json(file, current)
            return
        changed = [key for key in current if earlier.get(key) != current[key]]
        if changed:
            raise UsageError(
                f"'{self.settings.output}' holds a comparison with other {', '.join(changed)}; pass the same "
                f"settings, or another --output"
            )

    def _unpack(self, images: ImageDataset) -> None:
        """Decode the images once, for all processes, if they are not too many to be held in memory."""
        self._images: Path | str = self.settings.output / "images.npz"
        num_bytes = len(images) * images.num_channels * images.resolution**2
        if num_bytes > self.base.data.max_resident_mib * 2**20:
            self._images = self.settings.data
        elif not self._images.is_file():
            pixels = np.concatenate(list(images.batches(num_workers=self.base.data.num_workers)))
            arrays = {"images": pixels.transpose(0, 2, 3, 1)}
            if images.labels is not None:
                arrays["labels"] = images.labels
            atomic_write(self._images, lambda file: _save_arrays(file, arrays))

    # ------------------------------------------------------------------ what is made

    def make(self, stop: StopFlag) -> None:
        """Make what is missing until it is there, the time is up, or `stop` is set.

        Failures are noted and reported, and stop nothing else.
        """
        with ThreadPoolExecutor(self.settings.at_once) as pool:
            # The first of the pool's jobs, so that those that wait for it never hold up all threads.
            reference = pool.submit(self._reference)
            first = [*self.first_runs, *self.teacher_runs]
            self._wait([pool.submit(self._make, run, reference) for run in first], stop)
            self._wait([pool.submit(self._make, run, reference) for run in self.extra_runs], stop)

    def _wait(self, jobs: Sequence[Future[None]], stop: StopFlag) -> None:
        """Until the jobs are over, saying now and then how far they are."""
        said_s = time.monotonic()
        left: Iterable[Future[None]] = jobs
        while left:
            done, left = wait(left, timeout=0.5)
            for job in done:
                job.result()  # what is no error of a command's
            if stop.is_set:
                self._crew.stop()
            if time.monotonic() - said_s > _HEARTBEAT_S:
                said_s = time.monotonic()
                self._say_progress()

    def _reference(self) -> Path:
        """The figures of the real images, measured once."""
        file = self.settings.output / "reference.npz"
        if not file.is_file():
            self._say("measuring the real images")
            words = ["reference", self._images, "--net", self.settings.net, "--split", self.base.data.split]
            self._run([*words, *self._net_words(), "--output", file], "reference")
        return file

    def _make(self, run: Run, reference: Future[Path]) -> None:
        if self.figures(run) is not None:
            return
        try:
            if run.student is not None and self.trained(run) is None and not self._train(run):
                return
            if run.student is not None or not self._is_late():
                self._measure(run, reference.result())
        except CommandStopped:
            return
        except Uni3DError as error:
            self.failures[run.name] = str(error)
            self._say(f"{run.name} failed: {error}")

    def _train(self, run: Run) -> bool:
        """Train a student, from where it was; False if the time was up first."""
        if self._is_late():
            return False
        file = self.settings.output / "configs" / f"{run.name}.yaml"
        file.parent.mkdir(parents=True, exist_ok=True)
        atomic_write_text(file, config_to_yaml(self.config_of(run)))
        folder = self._folder(run)
        is_resumed = (folder / "config.yaml").is_file()
        images, _ = self.progress(run)
        self._say(f"{run.name} {f'goes on after {images} images' if is_resumed else 'begins'}")
        words = ["distill", "--config", file, "--output", folder, "--quiet", "--json"]
        with self._lock:
            self._training[run.name] = time.monotonic()
        try:
            result = json.loads(self._run([*words, *(["--resume"] if is_resumed else [])], run.name))
        finally:
            with self._lock:
                self._training.pop(run.name, None)
        if not result["is_finished"]:
            self._say(f"{run.name}: the time was up after {result['images']} images; all is saved")
            return False
        _, speeds = self.progress(run)
        record = {"images": result["images"], "images_per_s": median(speeds) if speeds else None}
        record["at_once"] = self.settings.at_once
        file = self._file("trained", run)
        file.parent.mkdir(parents=True, exist_ok=True)
        atomic_write_json(file, record)
        self._say(f"{run.name} is trained ({record['images_per_s'] or 0:.0f} images/s)")
        return True

    def _measure(self, run: Run, reference: Path) -> None:
        file = self._file("figures", run)
        file.parent.mkdir(parents=True, exist_ok=True)
        words: list[object] = ["evaluate", self.network(run), "--reference", reference, *self._net_words()]
        words += ["--seeds", f"0-{self.settings.num_samples - 1}", "--output", file, "--overwrite"]
        if run.student is None:
            words += ["--steps", run.number]
        self._run(words, run.name)
        name = metric_name(FRECHET, self.settings.net)
        self._say(f"{run.name}: {name} {self.distance(run):.4g}")

    def _net_words(self) -> list[object]:
        """Flags that `reference` and `evaluate` share."""
        settings = self.settings
        words: list[object] = ["--weights", settings.weights, "--batch-size", settings.batch_size]
        return [*words, "--device", settings.device, "--quiet"]

    def _run(self, words: Sequence[object], name: str) -> str:
        return self._crew.run(words, log=self.settings.output / "logs" / f"{name}.txt")

    # ------------------------------------------------------------------ time

    def _minutes_left(self) -> float | None:
        if self.settings.deadline_s is None:
            return None
        return max(0.01, (self.settings.deadline_s - time.monotonic()) / 60)

    def _is_late(self) -> bool:
        deadline_s = self.settings.deadline_s
        return deadline_s is not None and time.monotonic() > deadline_s - _SHORTEST_SESSION_S

    def _say(self, line: str) -> None:
        self.report(f"{time.monotonic() - self._begun_s:7.0f} s  {line}")

    def _say_progress(self) -> None:
        with self._lock:
            names = list(self._training)
        for name in names:
            student, _, seed = name.rpartition("_")
            images, speeds = self.progress(Run(student, int(seed)))
            share = images / self.base.run.total_images
            self._say(f"{name}: {share:.0%}" + (f", {speeds[-1]:.0f} images/s" if speeds else ""))


def _method_of(base: DistillConfig, name: str) -> Any:
    """The `MethodConfig` of a student: its own method, all else as in `base`."""
    student = STUDENTS[name]
    return replace(
        base.method, method=student.method, divergence=student.divergence, alpha=student.alpha, ratio=None
    )


def _read_json(file: Path) -> dict[str, Any] | None:
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else None


def _save_arrays(file: Path, arrays: dict[str, np.ndarray]) -> None:
    with file.open("wb") as stream:
        np.savez(stream, **arrays)  # type: ignore[arg-type]
