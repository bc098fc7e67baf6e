"""Run a teacher's networks faster than operation by operation: captured as CUDA graphs, compiled, or both.

Shapes are static during a run, so a pass can be recorded once and replayed, which takes the host out of it.
`graphs`, which is what `auto` takes on a GPU, does that with `fast_blocks` in place of the slowest of
diffusers' own, and needs nothing but torch and Triton, which comes with it. Compiling fuses everything and
wants a C compiler at run time and minutes at the start; what was compiled is recorded too.
Whatever goes wrong, the networks run in the next slower way and a warning says why: no result changes beyond
rounding.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch

from uni3d.diffusion.fast_blocks import fast_blocks, plain_blocks
from uni3d.diffusion.graphed_pass import GraphedPass, Pass
from uni3d.diffusion.latent_teacher import LatentDiffusionTeacher

logger = logging.getLogger(__name__)


def accelerate(teacher: LatentDiffusionTeacher, mode: str) -> str:
    """Let `teacher` run its network and its autoencoder by `mode`: auto, off, compile or graphs.

    Returns what was chosen and why, for the log. Fake scores on the teacher's network are included.
    """
    teacher.run_plainly()
    is_cuda = teacher.device.type == "cuda"
    for network in (teacher.network, teacher.vae):
        plain_blocks(network)
    if mode == "off":
        return "plain execution (chosen)"
    if mode == "auto" and not is_cuda:
        return "plain execution (auto: no CUDA device)"
    if mode == "graphs" and not is_cuda:
        logger.warning("CUDA graphs need a CUDA device; the networks run plainly")
        return "plain execution (no CUDA device for graphs)"
    if mode == "compile" and not is_cuda:
        call, encode = _compiled(teacher.eager_pass), _compiled(teacher.eager_encode)
        teacher.network_pass = WithFallback(call, teacher.eager_pass, "compile of the network")
        teacher.encode_pass = WithFallback(encode, teacher.eager_encode, "compile of the autoencoder")
        return "torch.compile"
    blocks = "" if mode == "compile" else _with_fast_blocks(teacher)
    graphed = GraphedPass(teacher.eager_pass, teacher.network)
    half = GraphedPass(teacher.eager_middle, teacher.network)
    captured = [graphed, half]
    teacher.accelerated = lambda run, what: WithFallback(
        GraphedPass(run, teacher.network), run, f"graphs of {what}"
    )
    teacher.middle_pass = WithFallback(half, teacher.eager_middle, "graphs of half the network")
    teacher.network_pass = WithFallback(graphed, teacher.eager_pass, "graphs of the network")
    teacher.encode_pass = WithFallback(
        GraphedPass(teacher.eager_encode, teacher.vae), teacher.eager_encode, "graphs of the autoencoder"
    )
    if mode == "compile":
        compiled = GraphedPass(_compiled(teacher.eager_pass), teacher.network)
        captured.append(compiled)
        teacher.network_pass = WithFallback(compiled, teacher.network_pass, "compile of the network")
        encode = GraphedPass(_compiled(teacher.eager_encode), teacher.vae)
        teacher.encode_pass = WithFallback(encode, teacher.encode_pass, "compile of the autoencoder")
    teacher.network_changed = lambda: [each.forget() for each in captured]
    teacher.uncaptured = lambda: _all_paused(captured)
    return "torch.compile in captured CUDA graphs" if mode == "compile" else f"captured CUDA graphs{blocks}"


@contextmanager
def _all_paused(captured: Sequence[GraphedPass]) -> Iterator[None]:
    with ExitStack() as stack:
        for each in captured:
            stack.enter_context(each.paused())
        yield


def _with_fast_blocks(teacher: LatentDiffusionTeacher) -> str:
    """Change the blocks of the teacher's networks; what to add to the log."""
    try:
        for network in (teacher.network, teacher.vae):
            fast_blocks(network)
    except ImportError as error:
        logger.warning("the networks keep their plain blocks (%s); triton comes with torch on Linux", error)
        return ""
    return " of fast blocks"


class WithFallback:
    """Calls `fast` until it raises once, then `plain`; out of memory is not its business."""

    def __init__(self, fast: Pass, plain: Pass, what: str) -> None:
        self.fast: Pass | None = fast
        self.plain = plain
        self.what = what

    def __call__(self, *args: Any) -> Any:
        if self.fast is not None:
            try:
                return self.fast(*args)
            except torch.OutOfMemoryError:
                raise
            except Exception as error:  # compilers and drivers raise what they like
                line = (str(error).strip().splitlines() or [""])[0][:200]
                slower = "in captured graphs" if isinstance(self.plain, WithFallback) else "plainly"
                logger.warning(
                    "%s failed, running %s from now on (%s: %s)",
                    self.what,
                    slower,
                    type(error).__name__,
                    line,
                )
                self.fast = None
        return self.plain(*args)


def _compiled(run: Pass) -> Pass:
    from torch._functorch import config

    config.donated_buffer = False  # a backward pass that is recorded keeps its graph, which this forbids
    return torch.compile(run)
