"""Which code renders and looks up: chosen by name, or by what this machine can do, with the reason.

A name that cannot be had is an error; `auto` never fails. Nothing optional is imported before it is chosen.
"""

from __future__ import annotations

import functools
import importlib.metadata
import importlib.util
import os
from dataclasses import dataclass
from typing import Literal

import torch

from uni3d.errors import MissingPackageError, UsageError
from uni3d.scene import renderer
from uni3d.scene.encoding import EncodingBackend

RendererName = Literal["auto", "torch", "triton", "nerfacc"]
EncodingBackendName = Literal["auto", "torch", "triton", "tinycudann"]
AS_ASKED = "as asked"


@dataclass(frozen=True)
class ChosenRenderer:
    """A renderer, its name, and why it was chosen."""

    render: renderer.Renderer
    name: RendererName
    reason: str

    def __str__(self) -> str:
        return f"renderer: {self.name} ({self.reason})"


@dataclass(frozen=True)
class ChosenEncoding:
    """Who looks up grids and tables, and why."""

    name: EncodingBackend
    reason: str

    def __str__(self) -> str:
        return f"encoding: {self.name} ({self.reason})"


def choose_renderer(name: RendererName, device: torch.device) -> ChosenRenderer:
    """The renderer called `name` for `device`.

    `auto` takes torch on a CPU and triton on a GPU, or torch where Triton does not work; never nerfacc, which
    needs a compiler. Raises MissingPackageError or UsageError if the one called for cannot be had.
    """
    if name == "auto":
        if device.type != "cuda":
            return ChosenRenderer(renderer.render, "torch", f"auto: {device.type.upper()} device")
        problem = triton_problem(str(device))
        if problem is not None:
            return ChosenRenderer(renderer.render, "torch", f"auto: CUDA device, but {problem}")
        reason = f"auto: CUDA device, {_triton_version()}"
        return ChosenRenderer(_within_budget(), "triton", reason)
    if name == "triton":
        _require_triton("renderer", device)
        return ChosenRenderer(_within_budget(), "triton", AS_ASKED)
    if name == "nerfacc":
        from uni3d.scene.nerfacc_renderer import render_with_nerfacc, require_nerfacc

        require_nerfacc(device)
        return ChosenRenderer(render_with_nerfacc, "nerfacc", AS_ASKED)
    if name == "torch":
        return ChosenRenderer(renderer.render, "torch", AS_ASKED)
    raise UsageError(f"unknown renderer '{name}'; choose auto, torch, triton or nerfacc")


def choose_encoding_backend(
    name: EncodingBackendName, device: torch.device, *, is_hashed: bool
) -> ChosenEncoding:
    """Who looks up the field's grids (`is_hashed`: its hash tables) on `device`.

    `auto` takes torch on a CPU, triton on a GPU, and where Triton does not work tinycudann for hash tables,
    if it is installed and passes its check. Raises as `choose_renderer` does.
    """
    from uni3d.scene import tinycudann_encoding

    if name == "auto":
        if device.type != "cuda":
            return ChosenEncoding("torch", f"auto: {device.type.upper()} device")
        problem = triton_problem(str(device))
        if problem is None:
            return ChosenEncoding("triton", f"auto: CUDA device, {_triton_version()}")
        if is_hashed and tinycudann_encoding.problem(str(device)) is None:
            return ChosenEncoding("tinycudann", f"auto: CUDA device, {problem}")
        return ChosenEncoding("torch", f"auto: CUDA device, but {problem}")
    if name == "triton":
        _require_triton("encoding backend", device)
    elif name == "tinycudann":
        if not is_hashed:
            raise UsageError(
                "encoding backend 'tinycudann' looks up hash tables only; set the encoding to hash"
            )
        problem = tinycudann_encoding.problem(str(device))
        if problem is not None:
            raise MissingPackageError(
                f"{problem}; see github.com/NVlabs/tiny-cuda-nn, or choose encoding backend triton or torch"
            )
    elif name != "torch":
        raise UsageError(f"unknown encoding backend '{name}'; choose auto, torch, triton or tinycudann")
    return ChosenEncoding(name, AS_ASKED)


@functools.cache
def triton_problem(device: str) -> str | None:
    """Why Triton's kernels cannot run on `device`, or None; found out once, by running one."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    try:
        from uni3d.scene import grid_kernels

        grid = torch.ones(1, 2, 2, 2, device=device)
        value = float(grid_kernels.dense_look_up(torch.full((1, 3), 0.5, device=device), grid))
    except Exception as error:  # a missing C compiler, an old card or driver: each fails in its own way
        lines = str(error).strip().splitlines() or [type(error).__name__]
        return f"triton does not work here ({lines[0][:200]})"
    return None if abs(value - 1) < 1e-6 else f"triton computes wrongly here ({value:g} instead of 1)"


def _require_triton(what: str, device: torch.device) -> None:
    is_interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    if device.type != "cuda" and not is_interpreted:
        raise UsageError(f"{what} 'triton' needs a CUDA device, not '{device}'; choose torch or auto")
    problem = triton_problem(str(device))
    if problem is not None:
        raise MissingPackageError(
            f"{what} 'triton' was chosen, but {problem}; it comes with torch's CUDA builds for Linux: "
            "reinstall torch as pytorch.org says, or choose torch"
        )


def _triton_version() -> str:
    return f"triton {importlib.metadata.version('triton')}"


def _within_budget() -> renderer.Renderer:
    from uni3d.scene.budget_renderer import render_within_budget

    return render_within_budget
