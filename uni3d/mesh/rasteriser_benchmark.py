"""How long one image of a mesh takes, forwards and backwards, and how much memory.

    python -m uni3d.mesh.rasteriser_benchmark --device cuda --output rasteriser.json

A step rasterises a bumpy sphere, interpolates normals and colours, antialiases both with the opacity and
runs a loss backwards to vertices and colours; the line splits it by part. The edges of the mesh are made
once, as while a mesh keeps its faces, and timed apart. On a busy CPU use one thread (OMP_NUM_THREADS=1) and
read the least of many repeats.
"""

from __future__ import annotations

import math
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from uni3d.mesh.normals import vertex_normals
from uni3d.mesh.rasteriser import BACKENDS, antialias, choose_backend, interpolate, mesh_edges, rasterise
from uni3d.scene.camera import ring_cameras
from uni3d.timing_program import argument_parser, keep_figures, say

Mark = Callable[[], None]
PARTS = ("rasterise", "interpolate", "antialias", "backward")


@dataclass(frozen=True)
class BenchmarkSettings:
    """What is timed."""

    device: str = "cpu"
    size: int = 128
    num_triangles: int = 20_000
    """About; a grid of quads on the sphere."""
    num_cameras: int = 1
    backend: str = "auto"
    num_warmup: int = 3
    num_repeats: int = 20


def bumpy_sphere(num_triangles: int) -> tuple[Tensor, Tensor]:
    """Vertices float32 [V, 3] and faces int64 [F, 3], a closed surface of about `num_triangles`."""
    rings = max(3, round(math.sqrt(num_triangles / 4)))
    sectors = 2 * rings
    latitude = (torch.arange(rings) + 0.5) * math.pi / rings - math.pi / 2
    longitude = torch.arange(sectors) * 2 * math.pi / sectors
    radius = 0.7 + 0.05 * torch.sin(9 * longitude)[None, :] * torch.cos(7 * latitude)[:, None]
    flat = radius * latitude.cos()[:, None]
    grid = torch.stack(
        [flat * longitude.sin(), radius * latitude.sin()[:, None], flat * longitude.cos()], dim=-1
    )
    poles = torch.tensor([[0.0, -0.7, 0.0], [0.0, 0.7, 0.0]])
    index = torch.arange(rings * sectors).view(rings, sectors)
    after = index.roll(-1, dims=1)
    low, low_after, high, high_after = (
        part.reshape(-1) for part in (index[:-1], after[:-1], index[1:], after[1:])
    )
    south = torch.full((sectors,), rings * sectors)
    corners = [
        (low, low_after, high_after),
        (low, high_after, high),
        (south, after[0], index[0]),
        (south + 1, index[-1], after[-1]),
    ]
    faces = torch.cat([torch.stack(corner, dim=1) for corner in corners])
    return torch.cat([grid.reshape(-1, 3), poles]), faces


def run_benchmark(settings: BenchmarkSettings) -> dict[str, Any]:
    """Time everything; plain data for JSON."""
    device = torch.device(settings.device)
    is_cuda = device.type == "cuda"
    backend, reason = choose_backend(settings.backend, device)
    vertices, faces = (part.to(device) for part in bumpy_sphere(settings.num_triangles))
    step = _step(vertices, faces, settings, backend)
    for _ in range(settings.num_warmup):
        step(lambda: None)
    if is_cuda:
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
    clock = _cuda_times if is_cuda else _cpu_times
    repeats = [clock(step) for _ in range(settings.num_repeats)]
    totals = [sum(times) for times in repeats]
    edges = [clock(lambda mark: (mesh_edges(faces), mark()))[0] for _ in range(settings.num_repeats)]
    peak = torch.cuda.max_memory_allocated(device) if is_cuda else _peak_resident_bytes()
    return {
        "settings": asdict(settings),
        "device": torch.cuda.get_device_name(device) if is_cuda else "cpu",
        "num_threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "backend": {"name": backend, "reason": reason},
        "num_triangles": len(faces),
        "min_ms": min(totals),
        "median_ms": statistics.median(totals),
        "parts_min_ms": {part: min(times[k] for times in repeats) for k, part in enumerate(PARTS)},
        "edges_ms": min(edges),
        "peak_memory_mib": peak / 2**20,
    }


def _step(
    first_vertices: Tensor, faces: Tensor, settings: BenchmarkSettings, backend: str
) -> Callable[[Mark], None]:
    """A step that calls its argument after each of `PARTS`."""
    cameras = ring_cameras(settings.num_cameras).to(first_vertices.device)
    edges, size = mesh_edges(faces), settings.size
    vertices = first_vertices.clone().requires_grad_()
    colours = torch.rand_like(first_vertices).requires_grad_()

    def step(mark: Mark) -> None:
        vertices.grad = colours.grad = None
        fragments = rasterise(vertices, faces, cameras, size, size, backend=backend)
        mark()
        attributes = torch.cat([vertex_normals(vertices, faces), colours], dim=1)
        maps = torch.cat([interpolate(attributes, faces, fragments), fragments.coverage], dim=1)
        mark()
        image = antialias(maps, fragments, faces, edges=edges)
        mark()
        (image.square().mean() + fragments.depth.mean()).backward()
        mark()

    return step


def _cpu_times(step: Callable[[Mark], object]) -> list[float]:
    """Milliseconds between marks."""
    clock = [time.perf_counter()]
    step(lambda: clock.append(time.perf_counter()))
    return [(second - first) * 1e3 for first, second in zip(clock, clock[1:], strict=False)]


def _cuda_times(step: Callable[[Mark], object]) -> list[float]:
    """Milliseconds between marks by the device's clock; the host waits only at the end."""
    events: list[torch.cuda.Event] = []

    def mark() -> None:
        events.append(torch.cuda.Event(enable_timing=True))
        events[-1].record()

    mark()
    step(mark)
    torch.cuda.synchronize()
    return [first.elapsed_time(second) for first, second in zip(events, events[1:], strict=False)]


def _peak_resident_bytes() -> int:
    """Highest memory of the whole process, torch itself included."""
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def main(arguments: Sequence[str] | None = None) -> int:
    """`python -m uni3d.mesh.rasteriser_benchmark`."""
    parser = argument_parser("uni3d.mesh.rasteriser_benchmark", __doc__)
    parser.add_argument("--size", type=int, help="pixels a side; 512 on a GPU, 128 on a CPU")
    parser.add_argument("--triangles", type=int, help="about; 100000 on a GPU, 20000 on a CPU")
    parser.add_argument("--cameras", type=int, default=1)
    parser.add_argument("--backend", default="auto", choices=BACKENDS)
    parser.add_argument("--warmup", type=int, default=BenchmarkSettings.num_warmup)
    parser.add_argument("--repeats", type=int, default=BenchmarkSettings.num_repeats)
    given = parser.parse_args(arguments)
    on_gpu = given.device.startswith("cuda")
    result = run_benchmark(
        BenchmarkSettings(
            device=given.device,
            size=given.size or (512 if on_gpu else 128),
            num_triangles=given.triangles or (100_000 if on_gpu else 20_000),
            num_cameras=given.cameras,
            backend=given.backend,
            num_warmup=given.warmup,
            num_repeats=given.repeats,
        )
    )
    parts = ", ".join(f"{part} {value:.1f}" for part, value in result["parts_min_ms"].items())
    say(
        f"{result['device']}, {result['backend']['name']}, {result['settings']['size']} px, "
        f"{result['num_triangles']} triangles, {given.cameras} cameras: least {result['min_ms']:.1f} ms, "
        f"median {result['median_ms']:.1f} ms ({parts}); edges {result['edges_ms']:.1f} ms; "
        f"{result['peak_memory_mib']:.0f} MiB"
    )
    keep_figures(result, given.output)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
