"""The hash encoding looked up by tiny-cuda-nn (Mueller 2021), where it is installed and passes the twin test.

tiny-cuda-nn lays its lattice half a cell off and chooses resolutions by a formula of its own, so that its
encoding of all levels is another function than ours. One encoding a level, on points moved by that half cell,
is the same function of the same table, hashed alike: runs and their checkpoints do not depend on it.

It has crashed on a machine that it was built for. Nothing here imports it into a process before a process of
its own has looked up and differentiated with it:

    python -m uni3d.scene.tinycudann_encoding cuda
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import subprocess
import sys
from typing import Any

import torch
from torch import Tensor

from uni3d.scene.encoding import HashGridEncoding, Level

CHECK_TIMEOUT_S = 300


def hash_look_up(points: Tensor, table: Tensor, levels: tuple[Level, ...]) -> Tensor:
    """Features [P, L F] of points [P, 3] in [0, 1]^3; twin of `encoding.hash_look_up`."""
    num_features = table.shape[1]
    features = []
    for level, rows in zip(levels, table.split([level.num_slots for level in levels]), strict=True):
        encoding = _encoding(
            level.resolution, (level.num_slots - 1).bit_length(), num_features, str(table.device)
        )
        missing = encoding.params.numel() // num_features - level.num_slots  # dense levels are rounded up
        params = torch.nn.functional.pad(rows, (0, 0, 0, missing)).flatten()
        shifted = points.detach() - 0.5 / (level.resolution - 1)
        values = torch.func.functional_call(encoding, {"params": params}, (shifted,))
        features.append(values[:, :num_features].float())
    return torch.cat(features, dim=1)


@functools.cache
def _encoding(resolution: int, log2_slots: int, num_features: int, device: str) -> Any:
    """tiny-cuda-nn's encoding of one level; its own parameters are never used."""
    tinycudann = importlib.import_module("tinycudann")
    config = {
        "otype": "HashGrid",
        "n_levels": 1,
        "n_features_per_level": num_features,
        "log2_hashmap_size": log2_slots,
        "base_resolution": resolution,
        "per_level_scale": 1.0,
    }
    return tinycudann.Encoding(3, config, dtype=torch.float32).to(device)


@functools.cache
def problem(device: str) -> str | None:
    """Why tiny-cuda-nn cannot be used on `device`, or None; found out once, by a process of its own."""
    if importlib.util.find_spec("tinycudann") is None:
        return "tinycudann is not installed"
    command = [sys.executable, "-m", "uni3d.scene.tinycudann_encoding", device]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=CHECK_TIMEOUT_S, check=False)
    except subprocess.TimeoutExpired:
        return f"tinycudann did not finish its check in {CHECK_TIMEOUT_S} s"
    if done.returncode < 0:
        return f"tinycudann crashed in its check (signal {-done.returncode})"
    if done.returncode > 0:
        lines = done.stderr.strip().splitlines() or ["no message"]
        return f"tinycudann failed its check ({lines[-1][:200]})"
    return None


def check(device: str) -> None:
    """Compare look-ups and gradients with the torch twin on dense and hashed levels; AssertionError if they
    differ."""
    generator = torch.Generator().manual_seed(0)
    encoding = HashGridEncoding(
        num_levels=4, table_size=2**12, base_resolution=5, max_resolution=90, generator=generator
    )
    points = torch.rand(3000, 3, generator=generator).to(device)
    cotangent = torch.randn(3000, encoding.num_features, generator=generator).to(device)
    with torch.no_grad():
        encoding.table.normal_(generator=generator)
    encoding.to(device)
    found = []
    for backend in ("torch", "tinycudann"):
        encoding.backend = backend
        features = encoding(points)
        found.append((features.detach(), *torch.autograd.grad(features, encoding.table, cotangent)))
    for theirs, ours in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-3, rtol=1e-3)


if __name__ == "__main__":
    check(sys.argv[1])
