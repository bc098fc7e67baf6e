"""How fast fields are looked up and rendered, by every backend that this machine has, in one run.

    python -m uni3d.scene.benchmark_kernels --device cuda --output kernels.json

Look-ups: a hash grid of 16 levels and the default voxel grids, forwards and backwards, on 2^18 points.
Renderers: one view of a hash field, image and gradient, of the soft ball that runs start from and of a solid
one. Each row says how many times as fast as torch it is, how far its result lies from torch's, its peak
memory and how often it made the host wait. What cannot be had here is listed with the reason.
"""

from __future__ import annotations

import functools
import gc
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from uni3d.device_clock import count_host_waits, cpu_clock, cuda_clock
from uni3d.errors import Uni3DError
from uni3d.scene.backends import RendererName, choose_encoding_backend, choose_renderer
from uni3d.scene.budget_renderer import render_within_budget
from uni3d.scene.camera import ring_cameras
from uni3d.scene.encoding import EncodingBackend, HashGridEncoding
from uni3d.scene.occupancy import OccupancyGrid
from uni3d.scene.radiance_field import RadianceField
from uni3d.scene.renderer import Renderer
from uni3d.timing_program import argument_parser, keep_figures, say

ENCODINGS: tuple[EncodingBackend, ...] = ("torch", "triton", "tinycudann")
RENDERERS: tuple[RendererName, ...] = ("torch", "triton", "nerfacc")
BUDGET_IN_TORCH = "budget in torch"
DENSITY_SHARPNESS = {"soft ball": 1.0, "solid ball": 4.0}
"""Scenes that are rendered, by the contrast of the starting density."""


@dataclass(frozen=True)
class KernelBenchmark:
    """What is timed."""

    device: str = "cuda"
    num_points: int = 2**18
    num_levels: int = 16
    features_per_level: int = 2
    table_size: int = 2**19
    max_resolution: int = 2048
    sizes: tuple[int, ...] = (64, 256, 512)
    """Sides of the images in pixels."""
    num_samples: int = 96
    """Lattice places along an edge of the cube."""
    num_warmup: int = 3
    num_repeats: int = 20


@dataclass(frozen=True)
class Outcome:
    """What a timed piece of work returns for comparison: an image or features, and a gradient."""

    value: Tensor
    gradient: Tensor


Work = Callable[[], Outcome]


# ---- clocks


def measure(work: Work, settings: KernelBenchmark) -> dict[str, Any]:
    """Milliseconds of `work`, each time on its own, peak memory in MiB, and waits of the host in one go."""
    device = torch.device(settings.device)
    is_cuda = device.type == "cuda"
    gc.collect()
    for _ in range(settings.num_warmup):
        work()
    waits = count_host_waits(work) if is_cuda else None
    before = 0
    if is_cuda:
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
    clock = cuda_clock if is_cuda else cpu_clock
    times = clock(work, settings.num_repeats)
    peak = torch.cuda.max_memory_allocated(device) - before if is_cuda else 0
    return {
        "median_ms": statistics.median(times),
        "min_ms": min(times),
        "peak_memory_mib": peak / 2**20,
        "host_waits": waits,
    }


# ---- what is timed


def hash_grid_work(settings: KernelBenchmark, backend: EncodingBackend) -> Work:
    """Look up all levels of a hash grid and differentiate it."""
    encoding = HashGridEncoding(
        num_levels=settings.num_levels,
        features_per_level=settings.features_per_level,
        table_size=settings.table_size,
        max_resolution=settings.max_resolution,
        backend=backend,
        generator=_generator(),
    ).to(settings.device)
    points = torch.rand(settings.num_points, 3, generator=_generator()).to(settings.device)
    cotangent = torch.randn(settings.num_points, encoding.num_features, generator=_generator())
    cotangent = cotangent.to(settings.device)

    def work() -> Outcome:
        features = encoding(points)
        return Outcome(features.detach(), torch.autograd.grad(features, encoding.table, cotangent)[0])

    return work


def voxel_grid_work(settings: KernelBenchmark, backend: EncodingBackend) -> Work:
    """Density and colour of the default field, and their gradient."""
    field = RadianceField(encoding_backend=backend).to(settings.device)
    points = torch.rand(settings.num_points, 3, generator=_generator()).to(settings.device) - 0.5
    finest = field.colour_grids[-1]

    def work() -> Outcome:
        density, colour = field(points)
        parts = torch.autograd.grad(density.sum() + colour.square().sum(), list(field.parameters()))
        assert parts[-1].shape == finest.shape
        return Outcome(colour.detach(), parts[-1])

    return work


def rendering_work(
    settings: KernelBenchmark, render: Renderer, backend: EncodingBackend, size: int, sharpness: float
) -> Work:
    """One view of a hash field, and the gradient of its table."""
    field = RadianceField(
        encoding="hash",
        hash_options={
            "num_levels": settings.num_levels,
            "features_per_level": settings.features_per_level,
            "table_size": settings.table_size,
            "max_resolution": settings.max_resolution,
        },
        encoding_backend=backend,
        generator=_generator(),
    ).to(settings.device)
    field.set_density_sharpness(sharpness)
    occupancy = OccupancyGrid().to(settings.device)
    occupancy.update(field)
    cameras = ring_cameras(1).to(settings.device)

    def work() -> Outcome:
        output = render(field, cameras, size, size, num_samples=settings.num_samples, occupancy=occupancy)
        loss = output.image.square().sum()
        return Outcome(output.image.detach(), torch.autograd.grad(loss, field.hash_grid.table)[0])

    return work


def _generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


# ---- the benchmark


def run_benchmark(
    settings: KernelBenchmark, *, report: Callable[[str], object] = lambda line: None
) -> dict[str, Any]:
    """Time everything; plain data for JSON. `report` is told each line of the table."""
    device = torch.device(settings.device)
    result: dict[str, Any] = {
        "settings": asdict(settings),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "torch": torch.__version__,
    }
    report(f"{result['device']}, torch {result['torch']}, {settings.num_points} points")
    report(HEADER)
    tables: list[tuple[str, Iterator[tuple[str, Work | Uni3DError]]]] = [
        ("hash grid", _look_ups(settings, hash_grid_work, is_hashed=True)),
        ("voxel grids", _look_ups(settings, voxel_grid_work, is_hashed=False)),
    ]
    for size in settings.sizes:
        for scene, sharpness in DENSITY_SHARPNESS.items():
            tables.append((f"{scene}, {size} px", _renderings(settings, size, sharpness)))
    for title, works in tables:
        result[title] = _compare(title, works, settings, report)
    return result


def _look_ups(
    settings: KernelBenchmark, build: Callable[[KernelBenchmark, EncodingBackend], Work], *, is_hashed: bool
) -> Iterator[tuple[str, Work | Uni3DError]]:
    for name in ENCODINGS if is_hashed else ENCODINGS[:2]:
        try:
            choose_encoding_backend(name, torch.device(settings.device), is_hashed=is_hashed)
        except Uni3DError as error:
            yield name, error
        else:
            yield name, build(settings, name)


def _renderings(
    settings: KernelBenchmark, size: int, sharpness: float
) -> Iterator[tuple[str, Work | Uni3DError]]:
    """Renderers over the same look-up, the fastest of this machine, so that they alone are compared."""
    device = torch.device(settings.device)
    look_up = choose_encoding_backend("auto", device, is_hashed=True).name
    in_torch: Renderer = functools.partial(render_within_budget, kernels="torch")
    for name in RENDERERS:
        try:
            chosen = choose_renderer(name, device)
        except Uni3DError as error:
            yield name, error
        else:
            yield name, rendering_work(settings, chosen.render, look_up, size, sharpness)
    yield BUDGET_IN_TORCH, rendering_work(settings, in_torch, look_up, size, sharpness)


def _compare(
    title: str,
    works: Iterator[tuple[str, Work | Uni3DError]],
    settings: KernelBenchmark,
    report: Callable[[str], object],
) -> dict[str, Any]:
    """Rows by name; the first, torch, is the reference of the others."""
    rows: dict[str, Any] = {}
    reference: Outcome | None = None
    for name, work in works:
        if isinstance(work, Uni3DError):
            rows[name] = {"unavailable": str(work)}
            report(f"{title:<20}{name:<17}{work}")
            continue
        outcome = work()
        reference = reference or outcome
        row = measure(work, settings)
        row["times_as_fast"] = rows.get("torch", row)["median_ms"] / row["median_ms"]
        row["value_error"] = float((outcome.value - reference.value).abs().max())
        norm = reference.gradient.norm().clamp(min=1e-30)
        row["gradient_error"] = float((outcome.gradient - reference.gradient).norm() / norm)
        rows[name] = row
        report(_row_text(title, name, row))
    return rows


HEADER = (
    f"{'':<20}{'backend':<17}{'ms':>9}{'x torch':>9}{'MiB':>9}{'waits':>7}{'max diff':>10}{'grad diff':>10}"
)


def _row_text(title: str, name: str, row: dict[str, Any]) -> str:
    waits = "-" if row["host_waits"] is None else str(row["host_waits"])
    return (
        f"{title:<20}{name:<17}{row['median_ms']:>9.3f}{row['times_as_fast']:>9.2f}"
        f"{row['peak_memory_mib']:>9.0f}{waits:>7}{row['value_error']:>10.1e}{row['gradient_error']:>10.1e}"
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """`python -m uni3d.scene.benchmark_kernels`."""
    defaults = KernelBenchmark()
    parser = argument_parser("uni3d.scene.benchmark_kernels", __doc__)
    parser.add_argument("--points", type=int, default=defaults.num_points)
    parser.add_argument("--levels", type=int, default=defaults.num_levels)
    parser.add_argument("--table-size", type=int, default=defaults.table_size)
    parser.add_argument("--sizes", type=int, nargs="*", default=list(defaults.sizes), help="image sides, px")
    parser.add_argument("--samples", type=int, default=defaults.num_samples, help="along an edge of the cube")
    parser.add_argument("--warmup", type=int, default=defaults.num_warmup)
    parser.add_argument("--repeats", type=int, default=defaults.num_repeats)
    given = parser.parse_args(arguments)
    settings = KernelBenchmark(
        device=given.device,
        num_points=given.points,
        num_levels=given.levels,
        table_size=given.table_size,
        sizes=tuple(given.sizes),
        num_samples=given.samples,
        num_warmup=given.warmup,
        num_repeats=given.repeats,
    )
    result = run_benchmark(settings, report=say)
    keep_figures(result, given.output)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
