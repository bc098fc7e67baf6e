"""Sharing a budget of samples among rays, and the walks along rays, each against a loop."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from uni3d.scene import marching, packed
from uni3d.scene.camera import ring_cameras
from uni3d.scene.marching import Allotment, Lattice, allot, middle, run_bounds
from uni3d.scene.occupancy import OccupancyGrid
from uni3d.scene.packed import Segments


@settings(max_examples=200, deadline=None)
@given(
    wanted=st.lists(st.integers(0, 150), min_size=1, max_size=30),
    room=st.floats(0, 1.2),
)
def test_a_budget_is_kept_and_forgets_no_ray(wanted: list[int], room: float) -> None:
    budget = max(len(wanted), int(room * sum(wanted)))
    allotment = allot(torch.tensor(wanted), budget)
    kept = allotment.kept.tolist()
    assert sum(kept) <= budget
    assert all(min(1, w) <= k <= w for w, k in zip(wanted, kept, strict=True))
    assert allotment.end.tolist()[-1] == sum(kept)
    if sum(wanted) <= budget:
        assert kept == wanted
    else:  # most of it is used, and one factor thins all rays
        rays = [(w, k) for w, k in zip(wanted, kept, strict=True) if w > 0]
        assert sum(kept) >= budget - len(rays)
        assert max((k - 1) / w for w, k in rays) <= min(k / w for w, k in rays)


def test_runs_cover_all_entries_once() -> None:
    allotment = allot(torch.tensor([7, 0, 1, 30, 3]), 20)
    segments = allotment.segments()
    begin, end = run_bounds(allotment, segments)
    centre = middle(begin, end)
    for ray, wanted in enumerate(allotment.wanted.tolist()):
        slots = slice(int(segments.start[ray]), int(segments.end[ray]))
        covered = [e for b, f in zip(begin[slots], end[slots], strict=True) for e in range(int(b), int(f))]
        assert covered == list(range(wanted))
        assert ((begin[slots] <= centre[slots]) & (centre[slots] < end[slots])).all()
    assert (segments.ray_index[: int(allotment.end[-1])].diff() >= 0).all()


def _scene(device: torch.device | str = "cpu") -> tuple[Lattice, OccupancyGrid]:
    """A random occupancy and rays through it, some of which miss."""
    occupancy = OccupancyGrid(resolution=6)
    generator = torch.Generator().manual_seed(1)
    occupancy.is_occupied.copy_(torch.rand(6, 6, 6, generator=generator) < 0.4)
    occupancy.bounds[1, 1] = 0.1  # some rays pass above
    origins, directions = (
        rays.reshape(-1, 3) for rays in ring_cameras(2, radius=2.0).rays(8, 8)
    )  # none along the faces of cells
    step = 0.05
    shift = torch.rand(origins.shape[0], generator=generator)
    first, count = marching.places_inside(origins, directions, occupancy.bounds, shift, step)
    assert 0 in count
    rays = [origins, directions, (first + shift) * step, count.to(torch.int32)]
    lattice = Lattice(*[tensor.to(device) for tensor in rays], step, marching.max_places(24))
    assert count.max() <= lattice.max_count
    return lattice, occupancy.to(device)


def _occupied_by_loop(lattice: Lattice, occupancy: OccupancyGrid) -> list[list[int]]:
    found: list[list[int]] = []
    for ray in range(lattice.start.shape[0]):
        found.append([])
        for place in range(int(lattice.count[ray])):
            point = (
                lattice.origins[ray] + (lattice.start[ray] + place * lattice.step) * lattice.directions[ray]
            )
            if (point < occupancy.bounds[0] - 1e-6).any() or (point > occupancy.bounds[1] + 1e-6).any():
                continue
            x, y, z = ((point + 0.6) / 0.2).int().clamp(0, 5).tolist()
            if occupancy.is_occupied[z, y, x]:
                found[-1].append(place)
    return found


def test_walks_find_what_a_loop_finds(monkeypatch: pytest.MonkeyPatch) -> None:
    lattice, occupancy = _scene()
    expected = _occupied_by_loop(lattice, occupancy)
    monkeypatch.setattr(marching, "PLACES_PER_CHUNK", 10 * lattice.max_count)
    wanted = marching.count_occupied(lattice, occupancy)
    assert wanted.tolist() == [len(places) for places in expected]
    for budget in (int(wanted.sum()), int(wanted.sum()) // 2 + len(expected)):
        allotment = allot(wanted, budget)
        places = marching.occupied_places(lattice, occupancy, allotment)
        begin, end = run_bounds(allotment, allotment.segments())
        for ray, entries in enumerate(expected):
            kept, last = int(allotment.kept[ray]), int(allotment.end[ray])
            of_ray = middle(begin, end)[last - kept : last]
            assert places[last - kept : last].tolist() == [entries[entry] for entry in of_ray.tolist()]


def test_walks_are_the_same_as_kernels(kernel_device: torch.device) -> None:
    from uni3d.scene import ray_kernels

    lattice, occupancy = _scene(kernel_device)
    wanted = ray_kernels.count_occupied(lattice, occupancy)
    reference = marching.count_occupied(lattice, occupancy)
    # A compiled kernel rounds once where torch rounds twice: a place on the face of a cell may change sides.
    assert (wanted != reference).sum() <= 2 and (wanted - reference).abs().max() <= 1
    for budget in (int(reference.sum()), int(reference.sum()) // 2 + reference.shape[0]):
        allotment = allot(reference, budget)
        ours = ray_kernels.occupied_places(lattice, occupancy, allotment)
        theirs = marching.occupied_places(lattice, occupancy, allotment)
        assert (ours != theirs).sum() <= 0.01 * int(allotment.end[-1])


def _ragged(device: torch.device) -> tuple[Segments, Allotment]:
    wanted = torch.tensor([3, 0, 1, 5, 0, 12, 2], device=device)
    allotment = allot(wanted, 30)
    return allotment.segments(), allotment


def test_absorption_is_the_same_as_the_kernel(kernel_device: torch.device) -> None:
    from uni3d.scene import ray_kernels

    segments, allotment = _ragged(kernel_device)
    depth = torch.rand(allotment.budget, generator=torch.Generator().manual_seed(0)).to(kernel_device)
    num_used = int(allotment.end[-1])
    for limit in (0.1, 0.4, 0.0):
        lit, opacity = marching.absorb(depth, segments, limit)
        ours_lit, ours_opacity = ray_kernels.absorb(depth, segments, limit)
        assert lit.tolist() == ours_lit.tolist()
        assert bool((lit <= allotment.wanted).all()) and (limit > 0) == bool((lit < allotment.wanted).any())
        torch.testing.assert_close(ours_opacity[:num_used], opacity[:num_used], atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("num_features", [3, 6])
def test_compositing_is_the_same_as_the_kernel(num_features: int, kernel_device: torch.device) -> None:
    from uni3d.scene import ray_kernels

    segments, allotment = _ragged(kernel_device)
    generator = torch.Generator().manual_seed(3)

    def uniform(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=generator).to(kernel_device)

    is_used = torch.arange(allotment.budget, device=kernel_device) < allotment.end[-1]
    depth = (10 ** (6 * uniform(allotment.budget) - 5) * is_used).requires_grad_()  # 1e-5 to 10
    features = uniform(allotment.budget, num_features).requires_grad_()
    distances = uniform(allotment.budget).sort().values
    cotangents = (uniform(allotment.budget) - 0.5, uniform(segments.num_rays, num_features + 2) - 0.5)
    found = []
    for composite in (packed.composite, ray_kernels.composite):
        outputs = composite(depth, features, distances, segments)
        found.append([*outputs, *torch.autograd.grad(outputs, (depth, features), cotangents)])
    for name, theirs, ours in zip(("weights", "sums", "depth", "features"), *found, strict=True):
        if name == "depth":  # of slots that nobody uses the twin has a gradient, which meets length zero
            theirs, ours = theirs * is_used, ours * is_used
        torch.testing.assert_close(
            ours, theirs, atol=2e-6, rtol=2e-5, msg=lambda text, n=name: f"{n}: {text}"
        )
