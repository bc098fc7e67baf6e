"""Every setting of a benchmark as plain dataclasses: the schema of `configs/benchmark*.yaml`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from uni3d.config.text_to_3d import TextTo3DConfig
from uni3d.config.values import check_range, check_ranges
from uni3d.errors import ConfigError

Scene = Literal["field", "images"]
BudgetKind = Literal["steps", "passes", "seconds"]


@dataclass(frozen=True, kw_only=True)
class BudgetConfig:
    """What every method may spend on one result, its teacher samples included."""

    kinds: tuple[BudgetKind, ...] = ("passes", "seconds")
    """Compare at equal network passes, at equal seconds of guidance, or at the steps of the settings."""
    passes: float = 2000.0
    """Network passes of one sample: forward 1, encoder half 1/2, backward as much again."""
    seconds: float = 120.0
    """Seconds of teacher samples and optimisation; extraction and export come on top."""
    reference: str | None = None
    """The variant whose run of the same prompt and seed, all its stages together, sets the seconds instead.
    The others are its field stage alone; where it failed they take the steps of their settings."""

    def __post_init__(self) -> None:
        if not self.kinds or len(set(self.kinds)) < len(self.kinds):
            raise ConfigError("budget.kinds must name one or more of steps, passes, seconds, each once")
        if self.reference is not None and "seconds" not in self.kinds:
            raise ConfigError(
                "budget.reference sets the seconds, and budget.kinds has none; add seconds to it"
            )
        check_ranges("budget.", self, {"passes": (1, 1e12), "seconds": (0.1, 1e9)})


@dataclass(frozen=True, kw_only=True)
class ViewsConfig:
    """From where results are looked at; the first azimuth is the front."""

    azimuths_deg: tuple[float, ...] = tuple(30.0 * index for index in range(12))
    """Azimuths of each ring of cameras."""
    elevations_deg: tuple[float, ...] = (10.0, 30.0)
    """One ring of cameras per elevation."""
    teacher_samples_per_view: int = 3
    """Samples of the teacher per prompt and camera, which results are compared with; 0 leaves them out."""
    sampling_steps: int = 25
    """Denoising steps of each of them."""
    sampling_guidance: float = 7.5
    """Classifier-free guidance of them."""

    def __post_init__(self) -> None:
        ranges = {
            "azimuths_deg": (-360.0, 360.0),
            "elevations_deg": (-90.0, 90.0),
            "teacher_samples_per_view": (0, 1000),
            "sampling_steps": (1, 1000),
            "sampling_guidance": (0.0, 1000.0),
        }
        check_ranges("views.", self, ranges)


@dataclass(frozen=True, kw_only=True)
class TuningConfig:
    """With `tune`: the settings that are tried for every method, the same number for each."""

    guidance_factors: tuple[float, ...] = (0.5, 1.0, 2.0)
    """Multiples of the method's own guidance scale."""
    rate_factors: tuple[float, ...] = (0.5, 1.0, 2.0)
    """Multiples of the learning rates of the scene."""

    def __post_init__(self) -> None:
        ranges = {"guidance_factors": (1e-3, 1e3), "rate_factors": (1e-3, 1e3)}
        check_ranges("tuning.", self, ranges)


@dataclass(frozen=True, kw_only=True)
class JudgesConfig:
    """Models that judge beside the evaluator, each used if it is named."""

    clip: str | None = None
    """Hub id or folder of a CLIP model."""
    hpsv2: str | None = None
    """Folder of HPSv2 in CLIP's layout of transformers."""
    image_reward: Path | None = None
    """Folder of ImageReward (see uni3d/evaluation/image_reward.py), for the quality half of T3Bench."""


@dataclass(frozen=True, kw_only=True)
class BenchmarkConfig:
    """Methods x prompts x seeds x budgets."""

    output: Path = Path("benchmark")
    """Folder of runs, summary, table and pictures; an unfinished benchmark there goes on."""
    scene: Scene = "field"
    """field makes meshes; images is the 2-D mode: one picture per view, no renderer."""
    variants: str = "methods"
    """Named settings to compare: methods, ablations or stages (of configs/variants/), or a YAML file."""
    methods: tuple[str, ...] = ()
    """Which of the variants; empty takes all."""
    baseline: str = "vsd-prolific"
    """The variant that all others are compared with, prompt by prompt."""
    prompts: Path | None = None
    """Text file, one prompt a line; none takes assets/prompts/benchmark_reporting.txt."""
    limit_prompts: int | None = None
    """Make only so many of them, evenly spread; all of them stay candidates of the retrieval."""
    tuning_prompts: Path | None = None
    """The prompts of `tune`; none takes assets/prompts/benchmark_tuning.txt."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Every prompt is made once per seed."""
    tune: bool = False
    """Try the settings of `tuning` on the tuning prompts and write the best of each method to tuned.yaml."""
    tuned: Path | None = None
    """Settings that a run with `tune` chose, laid over the variants."""
    only_summary: bool = False
    """Make nothing; summarise the prompts that are done with every method and seed."""
    retry_failed: bool = False
    """Make failed runs once more."""
    evaluator: str = "embedded"
    """embedded, or the folder of an evaluator that `uni3d evaluator train` wrote."""
    turntables: bool = True
    """Write a video of each mesh."""
    num_bootstrap: int = 1000
    """Resamples of the prompts behind each 95 % interval."""
    quiet: bool = False
    """No progress on stderr."""
    json: bool = False
    """Print the summary as JSON instead of the table."""

    budget: BudgetConfig = BudgetConfig()
    views: ViewsConfig = ViewsConfig()
    tuning: TuningConfig = TuningConfig()
    judges: JudgesConfig = JudgesConfig()
    run: TextTo3DConfig = TextTo3DConfig()

    def __post_init__(self) -> None:
        check_ranges("", self, {"seeds": (0, 2**31 - 1), "num_bootstrap": (1, 1e6)})
        if len(set(self.seeds)) < len(self.seeds) or len(set(self.methods)) < len(self.methods):
            raise ConfigError("seeds and methods must name each of theirs once")
        if self.tune and self.budget.reference is not None:
            raise ConfigError(
                "tuning tries variants under other names, so budget.reference names none; leave it out"
            )
        if self.limit_prompts is not None:
            check_range("limit_prompts", self.limit_prompts, 1, 1e6)
        if self.run.prompt or self.run.output is not None or self.run.resume is not None:
            raise ConfigError("run.prompt, run.output and run.resume are the benchmark's own; leave them out")
