"""How long a text-to-3D step takes on networks of Stable Diffusion's shapes, rendering included.

    python -m uni3d.text_to_3d.step_benchmark --device cuda --output step.json

Times the steps of SDS, VSD and both forms of Uni-Instruct as `uni3d generate` takes them, at random weights
(time and memory do not depend on them), a VSD step of the geometry and of the texture stage on a mesh of
about 100,000 triangles, and the field's VSD step structured as threestudio structures it. Says how much of
the card's measured matrix rate each uses, what its parts take alone, and the peak memory.
--long-run 500 then takes so many steps of VSD, compares their last tenth with their first in speed and in
memory, and says what the 25,000 steps of ProlificDreamer's first stage would take.
"""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from uni3d.config.text_to_3d import (
    DiscriminatorConfig,
    FakeScoreConfig,
    FieldConfig,
    GuidanceConfig,
    RegularisersConfig,
    RendererConfig,
    TextTo3DConfig,
)
from uni3d.device_clock import host_waits
from uni3d.diffusion.acceleration import accelerate
from uni3d.diffusion.latent_teacher import LatentDiffusionTeacher
from uni3d.distillation.benchmark_step import matrix_rate
from uni3d.text_to_3d.memory import free_memory
from uni3d.text_to_3d.mesh_step import MeshStage, build_mesh_step
from uni3d.text_to_3d.random_teacher import random_teacher
from uni3d.text_to_3d.scene_optimiser import SceneOptimiser
from uni3d.text_to_3d.threestudio_step import ThreestudioStep
from uni3d.timing_program import argument_parser, keep_figures, say

Step = Callable[[], object]
Keep = Callable[[dict[str, Any]], object]


@dataclass(frozen=True)
class StepKind:
    """One row of the table: a method, and its network work in forward passes of the UNet and the encoder."""

    method: str
    divergence: str | None
    guidance: GuidanceConfig
    unet_passes: float
    encoder_passes: float = 2.0


# A backward pass to the input, or to the adapters through frozen weights, counts as one forward pass; half a
# pass is the first half of the network, on the discriminator's real sample.
KINDS = {
    "SDS": StepKind("sds", None, GuidanceConfig(guidance_scale=((0.0, 100.0),)), 2),
    "VSD": StepKind("vsd", None, GuidanceConfig(), 4),
    "Uni-Instruct, score difference": StepKind("uni-instruct", "forward_kl", GuidanceConfig(), 4.5),
    "Uni-Instruct, exact": StepKind("uni-instruct", "forward_kl", GuidanceConfig(variant="exact"), 7.5),
}
MESH_STAGES: dict[str, MeshStage] = {"geometry stage, VSD": "geometry", "texture stage, VSD": "texture"}
THREESTUDIO = "VSD as threestudio structures it"
THREESTUDIO_PASSES = 6.0  # teacher 2, LoRA 2, training 1 + 1
LONG_RUN = "VSD, a long run"
PROLIFICDREAMER_STEPS = 25_000  # of its first stage (arXiv 2305.16213)


@dataclass(frozen=True)
class BenchmarkSettings:
    """What is timed."""

    shapes: str = "sd21"
    device: str = "cuda"
    resolution: int = 512
    samples_per_ray: int = 64
    compile: str = "auto"
    num_warmup: int = 10
    num_repeats: int = 30
    matrix_size: int = 8192
    only: tuple[str, ...] = ()
    long_run: int = 0  # steps; 0 for none
    num_triangles: int = 100_000  # of the mesh stages


def build_teacher(settings: BenchmarkSettings) -> LatentDiffusionTeacher:
    """The networks of all rows: what was compiled for one row serves the next."""
    device = torch.device(settings.device)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    teacher = random_teacher(settings.shapes, device=device, dtype=dtype)
    accelerate(teacher, settings.compile)
    return teacher


def build_step(
    kind: StepKind, settings: BenchmarkSettings, teacher: LatentDiffusionTeacher
) -> SceneOptimiser:
    """The optimiser of `uni3d generate` for this row, ready to step."""
    optimiser = SceneOptimiser(step_config(kind, settings), teacher)
    optimiser.prepare()
    return optimiser


def step_config(kind: StepKind, settings: BenchmarkSettings) -> TextTo3DConfig:
    """The settings of `uni3d generate` for this row."""
    return TextTo3DConfig(
        prompt="a random prompt",
        method=kind.method,
        divergence=kind.divergence,
        steps=100_000,
        guidance=kind.guidance,
        # A hash grid of full size would take a tiny run's time.
        field=FieldConfig(encoding="hash" if settings.shapes == "sd21" else "dense"),
        regularisers=RegularisersConfig(smoothness=((0.0, 0.0),), colour_smoothness=((0.0, 0.0),)),
        renderer=RendererConfig(
            resolution=((0.0, float(settings.resolution)),), samples_per_ray=settings.samples_per_ray
        ),
        fake_score=FakeScoreConfig(lora_rank=4, warmup_steps=0),
        discriminator=DiscriminatorConfig(num_real_samples=4, sampling_steps=2),
    )


def timed_steps(step: Step, num: int, *, is_cuda: bool) -> Iterator[tuple[float, float]]:
    """Milliseconds that the host takes to issue each of `num` steps, and from one drained device to the next:
    it is drained after each."""
    started = time.perf_counter()
    for _ in range(num):
        begun = time.perf_counter()
        step()
        issued = time.perf_counter() - begun
        if is_cuda:
            torch.cuda.synchronize()
        now = time.perf_counter()
        yield issued * 1e3, (now - started) * 1e3
        started = now


def time_step(step: Step, settings: BenchmarkSettings) -> dict[str, Any]:
    """Milliseconds of whole steps by the host's clock, the device drained before and after all of them."""
    is_cuda = settings.device.startswith("cuda")
    for _ in range(settings.num_warmup):
        step()
    waits = host_waits(step) if is_cuda else None
    if is_cuda:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    issued, times = zip(*timed_steps(step, settings.num_repeats, is_cuda=is_cuda), strict=True)
    return {
        "median_ms": statistics.median(times),
        "min_ms": min(times),
        "max_ms": max(times),
        "host_ms": statistics.mean(issued),
        "host_waits": None if waits is None else len(waits),
        "waits_at": waits or [],
        "peak_memory_gib": torch.cuda.max_memory_allocated() / 2**30 if is_cuda else 0.0,
    }


def time_long_run(step: Step, settings: BenchmarkSettings) -> dict[str, Any]:
    """Milliseconds a step and bytes of GPU memory in the first and in the last tenth of many steps."""
    is_cuda = settings.device.startswith("cuda")
    times, allocated = [], []
    for _ in range(settings.num_warmup):
        step()
    if is_cuda:
        torch.cuda.synchronize()
    for _, milliseconds in timed_steps(step, settings.long_run, is_cuda=is_cuda):
        times.append(milliseconds)
        allocated.append(torch.cuda.memory_allocated() if is_cuda else 0)
    tenth = max(1, settings.long_run // 10)
    return {
        "steps": settings.long_run,
        "median_ms": statistics.median(times),
        "first_tenth_ms": statistics.median(times[:tenth]),
        "last_tenth_ms": statistics.median(times[-tenth:]),
        "first_tenth_gib": max(allocated[:tenth]) / 2**30,
        "last_tenth_gib": max(allocated[-tenth:]) / 2**30,
        "prolificdreamer_minutes": statistics.mean(times) / 6e4 * PROLIFICDREAMER_STEPS,
    }


def time_parts(
    optimiser: SceneOptimiser, teacher: LatentDiffusionTeacher, settings: BenchmarkSettings
) -> dict[str, float]:
    """Milliseconds of the parts of a step timed alone, each with its backward pass where it has one."""
    device = teacher.device
    image = torch.rand(1, 3, settings.resolution, settings.resolution, device=device, requires_grad=True)
    latent = torch.randn(1, *teacher.latent_shape, device=device)
    sigma = torch.ones(1, device=device)
    context = optimiser.distiller.contexts.negative
    camera = optimiser._sample_cameras(1)
    fake = optimiser.distiller.fake_score

    def rendering() -> None:
        optimiser.render(camera, settings.resolution, 0.5, training=True).image.sum().backward()

    def encoding() -> None:
        teacher.encode_images(image).sum().backward()

    def asking_the_teacher() -> None:
        with torch.no_grad():
            teacher.predict_guided_x0(latent, sigma, context, context, 7.5)

    def asking_the_fake_score() -> None:
        assert fake is not None
        with torch.no_grad():
            fake.predict_x0(latent, sigma, context, camera.conditioning())

    def training_the_fake_score() -> None:
        assert fake is not None
        fake.predict_x0(latent, sigma, context, camera.conditioning()).sum().backward()

    parts: dict[str, Step] = {
        "render": rendering,
        "encoder": encoding,
        "teacher, guided": asking_the_teacher,
        "field optimiser": optimiser.field_optimiser.step,
    }
    if fake is not None:
        parts["fake score, forward"] = asking_the_fake_score
        parts["fake score, forward and backward"] = training_the_fake_score
    if optimiser.distiller.fake_optimiser is not None:
        parts["fake score optimiser"] = optimiser.distiller.fake_optimiser.step
    trained = [*optimiser.field.parameters(), *(fake.parameters() if fake is not None else [])]
    short = dataclasses.replace(
        settings, num_warmup=min(3, settings.num_warmup), num_repeats=min(10, settings.num_repeats)
    )
    figures = {}
    for name, part in parts.items():

        def alone(part: Step = part, moves: bool = "optimiser" in name) -> None:
            for parameter in () if moves else trained:  # in a step gradients are new, not added to others
                parameter.grad = None
            part()

        figures[name] = time_step(alone, short)["median_ms"]
    return figures


def network_flops(shapes: str) -> tuple[float, float]:
    """Operations of one forward pass of (the UNet, the encoder) on one sample, counted without running."""
    teacher = random_teacher(shapes, device=torch.device("meta"), dtype=torch.float32)
    latent = torch.empty(1, *teacher.latent_shape, device="meta")
    context = torch.empty(1, 77, teacher.context_width, device="meta")
    image = torch.empty(1, 3, teacher.image_size, teacher.image_size, device="meta")
    counts = []
    for run in (
        lambda: teacher.call_network(latent, torch.empty(1, device="meta"), context),
        lambda: teacher.eager_encode(image),
    ):
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            run()
        counts.append(float(counter.get_total_flops()))
    return counts[0], counts[1]


class _Table:
    """The rows as they come, printed and kept; one that fails is said to and does not end the program."""

    def __init__(self, settings: BenchmarkSettings, report: Callable[[str], object], keep: Keep) -> None:
        self.settings = settings
        self.report = report
        self.keep = keep
        self.device = torch.device(settings.device)
        self.teacher: LatentDiffusionTeacher | None = None
        self.unet, self.encoder = network_flops(settings.shapes)
        self.rate = matrix_rate(self.device, size=settings.matrix_size)
        is_cuda = self.device.type == "cuda"
        self.result: dict[str, Any] = {
            "settings": dataclasses.asdict(settings),
            "device": torch.cuda.get_device_name(self.device) if is_cuda else "cpu",
            "torch": torch.__version__,
            "forward_tflop": {"unet": self.unet / 1e12, "encoder": self.encoder / 1e12},
            "matrix_tflops_per_s": self.rate / 1e12,
            "steps": {},
            "failed": {},
        }
        report(
            f"{self.result['device']}, {settings.shapes}, {settings.resolution} px: "
            f"UNet {self.unet / 1e12:.3g} TFLOP, encoder {self.encoder / 1e12:.3g}, "
            f"bfloat16 products {self.rate / 1e12:.3g} TFLOP/s"
        )
        report(f"{'step':<34}{'ms':>9}{'host ms':>9}{'waits':>7}{'TFLOP/s':>9}{'of rate':>9}{'GiB':>7}")

    def row(self, name: str, measure: Callable[[_Table, str], object]) -> None:
        """Let `measure` add the row `name`, if it was asked for."""
        if self.settings.only and not any(word in name for word in self.settings.only):
            return
        if self.device.type == "cuda":
            torch.cuda.manual_seed(0)
        try:
            measure(self, name)
        except Exception as error:  # the other rows are worth having
            line = (str(error).strip().splitlines() or [""])[0][:200]
            self.result["failed"][name] = f"{type(error).__name__}: {line}"
            self.report(f"{name:<34} failed: {self.result['failed'][name]}")
        free_memory()
        self.keep(self.result)

    def add(self, name: str, step: Step, passes: float, encoder_passes: float) -> dict[str, Any]:
        """Time `step`, whose work is that many passes of the UNet and of the encoder."""
        begun = time.perf_counter()
        figures = time_step(step, self.settings)
        work = passes * self.unet + encoder_passes * self.encoder
        speed = work / (figures["median_ms"] / 1e3)
        figures |= {
            "tflops_per_s": speed / 1e12,
            "share_of_matrix_rate": speed / self.rate,
            "wall_s": time.perf_counter() - begun,
        }
        waits = "-" if figures["host_waits"] is None else figures["host_waits"]
        self.report(
            f"{name:<34}{figures['median_ms']:>9.2f}{figures['host_ms']:>9.2f}{waits:>7}"
            f"{speed / 1e12:>9.2f}{speed / self.rate:>9.1%}{figures['peak_memory_gib']:>7.2f}"
        )
        if figures["waits_at"]:
            self.report(f"    waits at {', '.join(figures['waits_at'])}")
        self.result["steps"][name] = figures
        return figures


def _measure_kind(table: _Table, name: str) -> None:
    kind = KINDS[name]
    teacher = table.teacher or build_teacher(table.settings)
    table.teacher = None  # after a failure the next row starts afresh
    optimiser = build_step(kind, table.settings, teacher)
    try:
        figures = table.add(name, optimiser.step, kind.unet_passes, kind.encoder_passes)
        parts = time_parts(optimiser, teacher, table.settings)
        figures["parts_ms"] = parts
        table.report("    " + ", ".join(f"{part} {value:.2f}" for part, value in parts.items()))
    finally:
        optimiser.close()
    table.teacher = teacher


def _measure_mesh_stage(table: _Table, name: str) -> None:
    kind = KINDS["VSD"]
    teacher = table.teacher or build_teacher(table.settings)
    table.teacher = None
    optimiser, num_triangles = build_mesh_step(
        MESH_STAGES[name],
        step_config(kind, table.settings),
        teacher,
        num_triangles=table.settings.num_triangles,
    )
    try:
        figures = table.add(name, optimiser.step, kind.unet_passes, kind.encoder_passes)
        figures["triangles"] = num_triangles
    finally:
        optimiser.close()
    table.teacher = teacher


def _measure_long_run(table: _Table, name: str) -> None:
    teacher = table.teacher or build_teacher(table.settings)
    optimiser = build_step(KINDS["VSD"], table.settings, teacher)
    try:
        figures = time_long_run(optimiser.step, table.settings)
    finally:
        optimiser.close()
    table.result["long_run"] = figures
    table.report(
        f"{name}: {figures['steps']} steps of {figures['median_ms']:.2f} ms; last tenth against first "
        f"{figures['last_tenth_ms']:.2f} to {figures['first_tenth_ms']:.2f} ms, held between steps "
        f"{figures['last_tenth_gib']:.3f} to {figures['first_tenth_gib']:.3f} GiB; "
        f"{PROLIFICDREAMER_STEPS} steps would take {figures['prolificdreamer_minutes']:.0f} minutes"
    )


def _measure_threestudio(table: _Table, name: str) -> None:
    settings = table.settings
    table.teacher = None
    torch.backends.cudnn.benchmark = False  # torch's default, which it leaves alone
    other = ThreestudioStep(shapes=settings.shapes, device=table.device, resolution=settings.resolution)
    table.add(name, other, THREESTUDIO_PASSES, 2.0)


def run_benchmark(
    settings: BenchmarkSettings,
    *,
    report: Callable[[str], object] = lambda line: None,
    keep: Keep = lambda result: None,
) -> dict[str, Any]:
    """Time everything; plain data for JSON. `report` is told each line of the table, and `keep` handed all
    that is known after each row."""
    torch.backends.cudnn.benchmark = True
    table = _Table(settings, report, keep)
    for name in KINDS:
        table.row(name, _measure_kind)
    for name in MESH_STAGES:
        table.row(name, _measure_mesh_stage)
    if settings.long_run:
        table.row(LONG_RUN, _measure_long_run)
    table.row(THREESTUDIO, _measure_threestudio)
    steps = table.result["steps"]
    if THREESTUDIO in steps and "VSD" in steps:
        speedup = steps[THREESTUDIO]["median_ms"] / steps["VSD"]["median_ms"]
        table.result["speedup_of_vsd"] = speedup
        report(f"VSD against that structure: {speedup:.1f} times faster")
        keep(table.result)
    return table.result


def main(arguments: Sequence[str] | None = None) -> int:
    """`python -m uni3d.text_to_3d.step_benchmark`."""
    defaults = BenchmarkSettings()
    parser = argument_parser("uni3d.text_to_3d.step_benchmark", __doc__)
    parser.add_argument("--shapes", default=defaults.shapes, choices=["sd21", "tiny"])
    parser.add_argument("--resolution", type=int, default=defaults.resolution, help="of the render, pixels")
    parser.add_argument("--samples", type=int, default=defaults.samples_per_ray, help="across the cube")
    parser.add_argument("--compile", default="auto", choices=["auto", "off", "compile", "graphs"])
    parser.add_argument("--warmup", type=int, default=defaults.num_warmup)
    parser.add_argument("--repeats", type=int, default=defaults.num_repeats)
    parser.add_argument(
        "--only", nargs="+", default=[], metavar="WORD", help="rows whose name has one of these words"
    )
    parser.add_argument("--long-run", type=int, default=0, metavar="STEPS", help="look for drift over them")
    parser.add_argument(
        "--triangles", type=int, default=defaults.num_triangles, help="of the mesh stages, about"
    )
    parser.add_argument("--matrix-size", type=int, default=defaults.matrix_size)
    given = parser.parse_args(arguments)
    settings = BenchmarkSettings(
        shapes=given.shapes,
        device=given.device,
        resolution=given.resolution,
        samples_per_ray=given.samples,
        compile=given.compile,
        num_warmup=given.warmup,
        num_repeats=given.repeats,
        matrix_size=given.matrix_size,
        only=tuple(given.only),
        num_triangles=given.triangles,
        long_run=given.long_run,
    )
    result = run_benchmark(settings, report=say, keep=lambda result: keep_figures(result, given.output))
    return 1 if result["failed"] else 0


if __name__ == "__main__":
    raise SystemExit(main())
