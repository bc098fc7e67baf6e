"""How long a Uni-Instruct training step takes: this project's build beside the released program's.

    python -m uni3d.distillation.benchmark_step --device cuda --output step.json

Both builds (`training_steps`) are timed in one run, after a warm-up, with the device drained after each
step; the table also says what each recipe of the family costs, in network passes and in milliseconds, how
much of the card's measured matrix rate the step uses, and how long the host takes to issue it. `--build
MODULE:FUNCTION` times another `StepBuilder`; --output is written again after every row.
Legend: F one forward pass of the network, E one of its encoder.
"""

from __future__ import annotations

import dataclasses
import gc
import importlib
import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch
from torch.utils.flop_counter import FlopCounterMode

from uni3d.device_clock import count_host_waits, cpu_clock, cuda_clock
from uni3d.diffusion.edm import PRESETS, EDMConfig, preset, skeleton
from uni3d.distillation.training_steps import BUILDS, StepBuilder, StepSetup
from uni3d.errors import UsageError
from uni3d.losses.recipe import Recipe
from uni3d.timing_program import argument_parser, keep_figures, say

TOY = "toy"
RECIPES: dict[str, tuple[str, str | None]] = {
    "diff_instruct": ("diff_instruct", None),
    "dmd": ("dmd", None),
    "dmd2": ("dmd2", None),
    "sim": ("sim", None),
    "sid": ("sid", None),
    "sida": ("sida", None),
    "f_distill": ("f_distill", "forward_kl"),
    "uni_instruct": ("uni_instruct", "forward_kl"),
    "uni_instruct_reverse_kl": ("uni_instruct", "reverse_kl"),
    "uni_instruct_integral": ("uni_instruct_integral", "forward_kl"),
    "uni_instruct_four_term": ("uni_instruct_four_term", "forward_kl"),
    "uni_instruct_detached": ("uni_instruct_detached", "forward_kl"),
    "uni_instruct_released": ("uni_instruct_released", "forward_kl"),
}
"""What is costed: names of the table, and what `recipes.get` is asked for."""


def recipe_called(name: str) -> tuple[str, str | None]:
    """(method, divergence) of a name of `RECIPES`; UsageError for an unknown one."""
    if name not in RECIPES:
        raise UsageError(f"unknown recipe {name[:80]!r}; expected one of {', '.join(RECIPES)}")
    return RECIPES[name]


# ---- the work of a step


@dataclass(frozen=True)
class Passes:
    """Network work per image of the batch, a backward pass to the input counted as one forward pass and one
    to the parameters as another."""

    full: float
    """Of the whole network, F."""
    encoder: float
    """Of its encoder alone, E."""

    def flops(self, of_full: float, of_encoder: float) -> float:
        return self.full * of_full + self.encoder * of_encoder

    def __str__(self) -> str:
        return f"{self.full:g}F" + (f" + {self.encoder:g}E" if self.encoder else "")


def step_passes(recipe: Recipe) -> Passes:
    """What one step of `recipe` needs; the discriminator lies in the fake score's encoder."""
    full, encoder = 3.0, 0.0  # the student, forwards and backwards
    if recipe.score_weight > 0:
        full += 2 if recipe.needs_teacher_jacobian else 1
    reads_gradient = recipe.adversarial_weight > 0 or recipe.needs_ratio_gradient
    if recipe.needs_fake_score:
        full += 2 if recipe.needs_fake_jacobian else 1
        if reads_gradient and not recipe.needs_fake_jacobian:
            encoder += 1  # backwards; the decoder runs without a graph
    if recipe.regression_weight > 0:
        full += 3  # the student once more, on the teacher's pairs
    if recipe.needs_fake_score or recipe.needs_discriminator:
        # A fake image, the fake score on it, and the encoder on a real one.
        full += recipe.fake_steps * 4
        encoder += recipe.fake_steps * (3 if recipe.needs_discriminator else 0)
    return Passes(full, encoder)


def forward_flops(config: EDMConfig) -> tuple[float, float]:
    """Floating-point operations of one image through (the network, its encoder), counted without running."""
    net = skeleton(config)
    x = torch.empty(1, config.image_channels, config.resolution, config.resolution, device="meta")
    labels = torch.empty(1, config.label_dim, device="meta") if config.label_dim else None
    counts = []
    for output in ("x0", "features"):
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            net(x, torch.empty(1, device="meta"), labels, output=output)
        counts.append(float(counter.get_total_flops()))
    return counts[0], counts[1]


# ---- clocks


@dataclass(frozen=True)
class Timing:
    """Of one build and recipe."""

    median_ms: float
    mean_ms: float
    std_ms: float
    min_ms: float
    images_per_s: float
    """By the median."""
    peak_memory_gib: float
    """Highest allocation during the timed steps; 0 on a CPU."""
    host_ms: float
    """Mean time in which the host issues a step; near `median_ms` when the host is what limits it."""
    host_waits: int | None
    """Synchronisations with the host in one step; None on a CPU."""
    warmup_s: float
    """Building, compiling and warming up."""
    num_repeats: int


def time_build(
    build: StepBuilder,
    setup: StepSetup,
    *,
    num_warmup: int,
    num_repeats: int,
    seconds: float = math.inf,
    report: Callable[[str], object] = lambda line: None,
) -> Timing:
    """Build a step, warm it up, and time it, each go on its own.

    Warm-up and timing each end after `seconds`, with two and three goes done at least: a step of the released
    build takes seconds. `report` is told when the first step, with all compilation, is done.
    """
    is_cuda = setup.device.type == "cuda"
    _start_afresh(setup.device)
    started = time.monotonic()
    step = build(setup)
    for index in range(num_warmup):
        if index >= 2 and time.monotonic() - started > seconds:
            break
        step()
        if is_cuda:
            torch.cuda.synchronize(setup.device)
        if index == 0:
            report(f"  built, first step done after {time.monotonic() - started:.1f} s")
    host_waits = count_host_waits(step) if is_cuda else None
    if is_cuda:
        torch.cuda.synchronize(setup.device)
        torch.cuda.reset_peak_memory_stats(setup.device)
    warmup_s = time.monotonic() - started
    times, issued = _step_times(step, num_repeats, seconds, is_cuda=is_cuda)
    peak = torch.cuda.max_memory_allocated(setup.device) / 2**30 if is_cuda else 0.0
    median = statistics.median(times)
    return Timing(
        median_ms=median,
        mean_ms=statistics.fmean(times),
        std_ms=statistics.stdev(times) if len(times) > 1 else 0.0,
        min_ms=min(times),
        images_per_s=setup.batch_size / median * 1e3,
        peak_memory_gib=peak,
        host_ms=statistics.fmean(issued),
        host_waits=host_waits,
        warmup_s=warmup_s,
        num_repeats=len(times),
    )


def _step_times(
    step: Callable[[], object], num: int, seconds: float, *, is_cuda: bool
) -> tuple[list[float], list[float]]:
    """Milliseconds of each go, the device drained after it, and of the host's part until it has issued it."""
    times, issued = [], []
    started = time.perf_counter()
    while len(times) < num and (len(times) < 3 or time.perf_counter() - started < seconds):
        begun = time.perf_counter()
        step()
        issued.append((time.perf_counter() - begun) * 1e3)
        if is_cuda:
            torch.cuda.synchronize()
        times.append((time.perf_counter() - begun) * 1e3)
    return times, issued


def matrix_rate(device: torch.device, dtype: torch.dtype = torch.bfloat16, *, size: int = 8192) -> float:
    """Operations per second of a product of square matrices: the best of several."""
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    clock = cuda_clock if device.type == "cuda" else cpu_clock

    def multiply() -> None:
        torch.mm(a, b)

    multiply()
    return 2 * size**3 / (min(clock(multiply, 20)) / 1e3)


def _start_afresh(device: torch.device) -> None:
    """Drop what the last build left: memory, and compiled code, of which torch keeps only a few versions of
    one function before it runs it uncompiled."""
    torch.compiler.reset()
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


# ---- the benchmark


@dataclass(frozen=True)
class BenchmarkSettings:
    """What is timed."""

    network: str = "cifar10-32x32-uncond-vp"
    """A preset of EDM, or toy."""
    batch_size: int = 256
    micro_batch: int = 128
    """Of the released build."""
    builds: tuple[str, ...] = ("released", "project")
    """Names of `BUILDS`, or module:function."""
    recipe: str = "uni_instruct"
    """Of the comparison of builds."""
    recipes: tuple[str, ...] = ()
    """To be timed in the project's build if that is one of `builds`, else in the first; all are costed in
    passes."""
    compile: bool = True
    """torch.compile in the project's build, on a GPU."""
    precision: Literal["bf16", "fp32"] = "bf16"
    device: str = "cuda"
    num_warmup: int = 5
    num_repeats: int = 20
    seconds: float = 30.0
    """After which a row's warm-up, and then its timing, ends early."""
    matrix_size: int = 8192


def network_config(name: str) -> EDMConfig:
    """The configuration of a preset, or the smallest network with every kind of layer."""
    if name != TOY:
        return preset(name)
    return dataclasses.replace(
        PRESETS["cifar10-32x32-cond-vp"],
        model_channels=16,
        channel_mult=(1, 2),
        resolution=8,
        num_blocks=1,
        attention_resolutions=(4,),
    )


def builder_called(name: str) -> StepBuilder:
    """A build of `BUILDS`, or the function of `module:function`; UsageError for anything else."""
    if name in BUILDS:
        return BUILDS[name]
    module, _, function = name.partition(":")
    try:
        return getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError, ValueError) as error:
        raise UsageError(
            f"unknown build {name[:80]!r} ({error}); expected {', '.join(BUILDS)} or module:function"
        ) from None


def run_benchmark(
    settings: BenchmarkSettings,
    *,
    report: Callable[[str], object] = lambda line: None,
    keep: Callable[[dict[str, Any]], object] = lambda result: None,
) -> dict[str, Any]:
    """Time everything; plain data for JSON. `report` is told each line of the table, `keep` is given what
    there is so far after each row, and a row that fails is left out with its error in the place of it."""
    device = torch.device(settings.device)
    config = network_config(settings.network)
    torch.backends.cudnn.benchmark = True
    full, encoder = forward_flops(config)
    rate = matrix_rate(device, size=settings.matrix_size)
    method, divergence = recipe_called(settings.recipe)
    builders = {name: builder_called(name) for name in settings.builds}
    setup = StepSetup(
        config=config,
        method=method,
        divergence=divergence,
        batch_size=settings.batch_size,
        device=device,
        precision=settings.precision,
        compile=settings.compile,
        micro_batch=min(settings.micro_batch, settings.batch_size),
    )
    result: dict[str, Any] = {
        "settings": asdict(settings),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "torch": torch.__version__,
        "num_parameters": sum(parameter.numel() for parameter in skeleton(config).parameters()),
        "forward_gflop": {"network": full / 1e9, "encoder": encoder / 1e9},
        "matrix_tflops_per_s": rate / 1e12,
        "builds": {},
        "recipes": {},
    }
    report(
        f"{result['device']}, {settings.network}, batch {settings.batch_size}: "
        f"F {full / 1e9:.2f} GFLOP, E {encoder / 1e9:.2f}, bfloat16 products {rate / 1e12:.3g} TFLOP/s"
    )
    report(HEADER)

    def timed(builder: StepBuilder, setup: StepSetup, title: str) -> dict[str, Any]:
        passes = step_passes(setup.recipe)
        report(f"{title} ...")
        try:
            timing = time_build(
                builder,
                setup,
                num_warmup=settings.num_warmup,
                num_repeats=settings.num_repeats,
                seconds=settings.seconds,
                report=report,
            )
        except (RuntimeError, torch.OutOfMemoryError) as error:
            note = " ".join(str(error).split())[:200]
            report(f"{title}: left out ({type(error).__name__}: {note})")
            return {**_cost(setup.recipe, full, encoder), "error": note}
        work = passes.flops(full, encoder) * timing.images_per_s
        row = {**_cost(setup.recipe, full, encoder), **asdict(timing), "share_of_matrix_rate": work / rate}
        report(row_text(title, row))
        return row

    for build, builder in builders.items():
        result["builds"][build] = timed(builder, setup, build)
        keep(result)
    speeds = {name: row["images_per_s"] for name, row in result["builds"].items() if "error" not in row}
    if {"project", "released"} <= speeds.keys():
        result["speedup"] = speeds["project"] / speeds["released"]
        report(f"project against released: {result['speedup']:.2f} times the images/s")
    recipes_build = builders.get("project", next(iter(builders.values())))
    for name in RECIPES:
        method, divergence = recipe_called(name)
        named = dataclasses.replace(setup, method=method, divergence=divergence)
        is_timed = name in settings.recipes
        result["recipes"][name] = (
            timed(recipes_build, named, name) if is_timed else _cost(named.recipe, full, encoder)
        )
        keep(result)
    return result


def _cost(recipe: Recipe, full: float, encoder: float) -> dict[str, Any]:
    passes = step_passes(recipe)
    return {"passes": str(passes), "gflop_per_image": passes.flops(full, encoder) / 1e9}


HEADER = (
    f"{'build or recipe':<26}{'passes':>12}{'ms/step':>10}{'+-':>8}{'images/s':>10}{'GiB':>7}"
    f"{'of rate':>9}{'host ms':>10}{'waits':>7}"
)


def row_text(title: str, row: dict[str, Any]) -> str:
    """One line under `HEADER`."""
    waits = "-" if row["host_waits"] is None else str(row["host_waits"])
    return (
        f"{title:<26}{row['passes']:>12}{row['median_ms']:>10.2f}{row['std_ms']:>8.2f}"
        f"{row['images_per_s']:>10.1f}{row['peak_memory_gib']:>7.1f}{row['share_of_matrix_rate']:>9.1%}"
        f"{row['host_ms']:>10.2f}{waits:>7}"
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """`python -m uni3d.distillation.benchmark_step`."""
    defaults = BenchmarkSettings()
    parser = argument_parser("uni3d.distillation.benchmark_step", __doc__)
    parser.add_argument("--network", default=defaults.network, choices=[TOY, *PRESETS])
    parser.add_argument("--batch", type=int, default=defaults.batch_size)
    parser.add_argument("--released-batch", type=int, default=defaults.micro_batch)
    parser.add_argument("--build", nargs="+", default=list(defaults.builds), help="what is timed")
    parser.add_argument("--recipe", default=defaults.recipe, choices=list(RECIPES))
    parser.add_argument("--recipes", nargs="*", default=[], choices=[*RECIPES, "all"], help="timed as well")
    parser.add_argument("--no-compile", action="store_true", help="do without torch.compile")
    parser.add_argument("--precision", default=defaults.precision, choices=["bf16", "fp32"])
    parser.add_argument("--warmup", type=int, default=defaults.num_warmup)
    parser.add_argument("--repeats", type=int, default=defaults.num_repeats)
    parser.add_argument(
        "--seconds", type=float, default=defaults.seconds, help="of a row's warm-up, and of its timing"
    )
    parser.add_argument("--matrix-size", type=int, default=defaults.matrix_size)
    given = parser.parse_args(arguments)
    settings = BenchmarkSettings(
        network=given.network,
        batch_size=given.batch,
        micro_batch=given.released_batch,
        builds=tuple(given.build),
        recipe=given.recipe,
        recipes=tuple(RECIPES) if "all" in given.recipes else tuple(given.recipes),
        compile=not given.no_compile,
        precision=given.precision,
        device=given.device,
        num_warmup=given.warmup,
        num_repeats=given.repeats,
        seconds=given.seconds,
        matrix_size=given.matrix_size,
    )
    run_benchmark(settings, report=say, keep=lambda result: keep_figures(result, given.output))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
