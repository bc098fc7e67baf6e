"""Which renderer and which look-up are chosen, why, and what is said when one cannot be had."""

from __future__ import annotations

import importlib.util
import logging
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch
from rendered_scene import bumpy_ball, gradients_of, maps_of, two_cameras
from torch import Tensor, nn

from uni3d.errors import MissingPackageError, UsageError
from uni3d.scene import backends, nerfacc_renderer, tinycudann_encoding
from uni3d.scene.backends import choose_encoding_backend, choose_renderer, triton_problem
from uni3d.scene.budget_renderer import render_within_budget
from uni3d.scene.nerfacc_renderer import render_with_nerfacc
from uni3d.scene.occupancy import OccupancyGrid
from uni3d.scene.renderer import render

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


@pytest.fixture(autouse=True)
def _fresh_probes() -> None:
    for probe in (triton_problem, tinycudann_encoding.problem, tinycudann_encoding._encoding):
        probe.cache_clear()
    nerfacc_renderer.require_nerfacc.cache_clear()


def _hide(monkeypatch: pytest.MonkeyPatch, *hidden: str) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name in hidden else found(name, *rest)
    )


def test_a_cpu_gets_torch_and_says_why() -> None:
    chosen = choose_renderer("auto", CPU)
    assert chosen.render is render and str(chosen) == "renderer: torch (auto: CPU device)"
    for is_hashed in (True, False):
        encoding = choose_encoding_backend("auto", CPU, is_hashed=is_hashed)
        assert str(encoding) == "encoding: torch (auto: CPU device)"
    assert str(choose_renderer("torch", CPU)) == "renderer: torch (as asked)"


def test_a_gpu_gets_triton_where_it_works(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    monkeypatch.setattr(backends, "triton_problem", lambda device: None)
    chosen = choose_renderer("auto", CUDA)
    assert chosen.render is render_within_budget
    assert str(chosen).startswith("renderer: triton (auto: CUDA device, triton 3.")
    assert choose_encoding_backend("auto", CUDA, is_hashed=False).name == "triton"


def test_a_gpu_without_triton_gets_what_works(monkeypatch: pytest.MonkeyPatch) -> None:
    _hide(monkeypatch, "triton", "tinycudann")
    assert str(choose_renderer("auto", CUDA)) == (
        "renderer: torch (auto: CUDA device, but triton is not installed)"
    )
    assert choose_encoding_backend("auto", CUDA, is_hashed=True).name == "torch"
    monkeypatch.setattr(tinycudann_encoding, "problem", lambda device: None)
    assert choose_encoding_backend("auto", CUDA, is_hashed=True).name == "tinycudann"
    assert choose_encoding_backend("auto", CUDA, is_hashed=False).name == "torch"
    with pytest.raises(
        MissingPackageError, match="'triton' was chosen, but triton is not installed"
    ) as caught:
        choose_renderer("triton", CUDA)
    assert caught.value.exit_code == 3


def test_names_that_cannot_be_had(monkeypatch: pytest.MonkeyPatch) -> None:
    _hide(monkeypatch, "nerfacc", "tinycudann")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(MissingPackageError, match=r'pip install "uni3d\[cuda\]"'):
        choose_renderer("nerfacc", CUDA)
    with pytest.raises(MissingPackageError, match="tinycudann is not installed; see github.com/NVlabs"):
        choose_encoding_backend("tinycudann", CPU, is_hashed=True)
    for choose in (
        lambda: choose_renderer("nerfacc", CPU),
        lambda: choose_renderer("triton", CPU),
        lambda: choose_encoding_backend("triton", CPU, is_hashed=True),
        lambda: choose_encoding_backend("tinycudann", CPU, is_hashed=False),
        lambda: choose_renderer("cuda", CPU),  # type: ignore[arg-type]
        lambda: choose_encoding_backend("cuda", CPU, is_hashed=True),  # type: ignore[arg-type]
    ):
        with pytest.raises(UsageError) as caught:
            choose()
        assert caught.value.exit_code == 2 and "\n" not in str(caught.value)


def test_nothing_optional_is_imported_at_start() -> None:
    code = (
        "import sys, uni3d.scene.backends, uni3d.scene.radiance_field, uni3d.scene.benchmark_kernels\n"
        "assert not {'triton', 'nerfacc', 'tinycudann'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


# ---- tiny-cuda-nn, played by a module that does what its source says


class GridOfOneLevel(nn.Module):
    """Encoding(3, config, dtype) for one level of a HashGrid: a lattice that is half a cell off, dense levels
    rounded up to eight slots."""

    def __init__(self, num_inputs: int, config: dict[str, Any], dtype: torch.dtype) -> None:
        super().__init__()
        assert num_inputs == 3 and dtype == torch.float32 and config["n_levels"] == 1
        self.resolution, self.num_features = config["base_resolution"], config["n_features_per_level"]
        self.num_slots = min(-(-(self.resolution**3) // 8) * 8, 2 ** config["log2_hashmap_size"])
        self.params = nn.Parameter(torch.zeros(self.num_slots * self.num_features))

    def forward(self, x: Tensor) -> Tensor:
        position = x * (self.resolution - 1) + 0.5
        low = position.floor()
        total = x.new_zeros(x.shape[0], self.num_features)
        for corner in torch.cartesian_prod(*[torch.tensor([0, 1])] * 3):
            vertex = low.long() + corner
            weight = torch.where(corner == 1, position - low, 1 - position + low).prod(dim=1)
            if self.resolution**3 <= self.num_slots:
                slot = vertex @ torch.tensor([1, self.resolution, self.resolution**2])
            else:
                keys = vertex * torch.tensor([1, 2_654_435_761, 805_459_861])
                slot = keys[:, 0] ^ keys[:, 1] ^ keys[:, 2]
            rows = self.params.view(-1, self.num_features)[slot % self.num_slots]
            total = total + weight[:, None] * rows
        return total


def test_tinycudann_is_the_same_function_of_the_same_table(monkeypatch: pytest.MonkeyPatch) -> None:
    played = types.ModuleType("tinycudann")
    played.Encoding = GridOfOneLevel  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "tinycudann", played)
    tinycudann_encoding.check("cpu")

    class Wrong(GridOfOneLevel):
        def forward(self, x: Tensor) -> Tensor:
            return 1.01 * super().forward(x)

    played.Encoding = Wrong  # type: ignore[attr-defined]
    tinycudann_encoding._encoding.cache_clear()
    with pytest.raises(AssertionError, match="not close"):
        tinycudann_encoding.check("cpu")


def test_a_crash_of_tinycudann_is_survived_and_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "tinycudann.py").write_text("import os, signal\nos.kill(os.getpid(), signal.SIGSEGV)\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("PYTHONPATH", ":".join([str(tmp_path), *sys.path]))
    with pytest.raises(MissingPackageError, match=r"tinycudann crashed in its check \(signal 11\)"):
        choose_encoding_backend("tinycudann", CPU, is_hashed=True)
    monkeypatch.setattr(subprocess, "run", lambda *args, **kwargs: pytest.fail("the check ran twice"))
    assert tinycudann_encoding.problem("cpu") == "tinycudann crashed in its check (signal 11)"


# ---- nerfacc, played by its functions in torch


class PlayedNerfacc:
    """What the renderer asks of nerfacc 0.5.3: samples in the middle of steps from the near planes."""

    @staticmethod
    def traverse_grids(
        rays_o: Tensor, rays_d: Tensor, binaries: Tensor, aabbs: Tensor, *,
        near_planes: Tensor, far_planes: Tensor, step_size: float,
    ) -> tuple[None, types.SimpleNamespace, None]:  # fmt: skip
        num_places = int(((far_planes - near_planes) / step_size).max().round())
        middles = near_planes[:, None] + (torch.arange(num_places) + 0.5) * step_size
        points = rays_o[:, None] + middles[..., None] * rays_d[:, None]
        low, high = aabbs[0, :3], aabbs[0, 3:]
        size = binaries.shape[1]
        x, y, z = ((points - low) / (high - low) * size).int().clamp(0, size - 1).unbind(-1)
        inside = ((points > low) & (points < high)).all(dim=-1) & (middles < far_planes[:, None])
        ray, place = torch.nonzero(binaries[0, x, y, z] & inside, as_tuple=True)
        return None, types.SimpleNamespace(ray_indices=ray, vals=middles[ray, place]), None

    @staticmethod
    def render_weight_from_density(
        t_starts: Tensor, t_ends: Tensor, sigmas: Tensor, *, ray_indices: Tensor, n_rays: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        depth = sigmas * (t_ends - t_starts)
        before = torch.cat(
            [part.cumsum(0) - part for part in depth.split(ray_indices.bincount(minlength=n_rays).tolist())]
        )
        passed, alpha = torch.exp(-before), -torch.expm1(-depth)
        return passed * alpha, passed, alpha

    @classmethod
    def render_visibility_from_density(cls, *intervals: Tensor, early_stop_eps: float, **rays: Any) -> Tensor:
        return cls.render_weight_from_density(*intervals, **rays)[1] >= early_stop_eps

    @staticmethod
    def accumulate_along_rays(weights: Tensor, values: Tensor, ray_indices: Tensor, n_rays: int) -> Tensor:
        return torch.zeros(n_rays, values.shape[1]).index_add(0, ray_indices, weights[:, None] * values)


@pytest.mark.parametrize("has_occupancy", [True, False])
def test_nerfacc_renders_the_same_samples(has_occupancy: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "nerfacc", PlayedNerfacc)  # type: ignore[arg-type]
    _compare_with_nerfacc(CPU, has_occupancy)


@pytest.mark.gpu
def test_nerfacc_itself_renders_the_same_samples() -> None:
    pytest.importorskip("nerfacc")
    _compare_with_nerfacc(CUDA, has_occupancy=True)


def _compare_with_nerfacc(device: torch.device, has_occupancy: bool) -> None:
    field, cameras = bumpy_ball().to(device), two_cameras().to(device)
    occupancy = None
    if has_occupancy:
        occupancy = OccupancyGrid(resolution=24).to(device)
        occupancy.update(field)
    options: dict[str, Any] = {"num_samples": 40, "occupancy": occupancy, "with_normals": True}
    reference = render(field, cameras, 20, 20, 0.3, generator=torch.Generator().manual_seed(2), **options)
    ours = render_with_nerfacc(
        field, cameras, 20, 20, 0.3, generator=torch.Generator().manual_seed(2), **options
    )
    # Places on the faces of cells and of the cube may fall to either side.
    assert abs(ours.samples.weights.shape[0] / reference.samples.weights.shape[0] - 1) < 0.005
    torch.testing.assert_close(maps_of(ours)[:, :4], maps_of(reference)[:, :4], atol=2e-3, rtol=0)
    pairs = zip(gradients_of(field, maps_of(ours)), gradients_of(field, maps_of(reference)), strict=True)
    for gradient, expected in pairs:
        assert (gradient - expected).norm() < 0.01 * expected.norm()


def test_a_long_compilation_is_announced_once(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    package = types.SimpleNamespace(submodule_search_locations=[str(tmp_path / "site" / "nerfacc")])
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: package)
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    monkeypatch.setattr("shutil.which", lambda name: None)
    with pytest.raises(MissingPackageError, match="compiles its CUDA code with nvcc, which was not found"):
        choose_renderer("nerfacc", CUDA)
    monkeypatch.setattr("shutil.which", lambda name: "/usr/local/cuda/bin/nvcc")
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            assert choose_renderer("nerfacc", CUDA).render is render_with_nerfacc
    assert [record.message for record in caplog.records] == [
        "nerfacc compiles its CUDA code at its first call on a machine: this takes a minute or two"
    ]
    nerfacc_renderer.require_nerfacc.cache_clear()
    caplog.clear()
    (tmp_path / "nerfacc_cuda").mkdir()
    (tmp_path / "nerfacc_cuda" / "nerfacc_cuda.so").touch()
    with caplog.at_level(logging.WARNING):
        choose_renderer("nerfacc", CUDA)
    assert not caplog.records
