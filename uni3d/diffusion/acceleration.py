"""Run a teacher's networks faster than operation by operation: compiled, or as captured CUDA graphs.

Shapes are static during a run, so a pass can be recorded once and replayed, which takes the host out of it.
`graphs` needs nothing but torch and a GPU; `compile` fuses as well and wants a C compiler at run time.
Whatever goes wrong, the networks run plainly and a warning says why: no result changes beyond rounding.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from uni3d.diffusion.latent_teacher import LatentDiffusionTeacher

logger = logging.getLogger(__name__)

MAX_RELATIVE_ERROR = 0.05  # of a replayed pass in bfloat16 against the plain one
WARM_UP_PASSES = 3
Pass = Callable[..., Any]


def accelerate(teacher: LatentDiffusionTeacher, mode: str) -> str:
    """Let `teacher` run its network and its autoencoder by `mode`: auto, off, compile or graphs.

    Returns what was chosen and why, for the log. Fake scores on the teacher's network are included.
    """
    teacher.network_pass, teacher.encode_pass = teacher.eager_pass, teacher.eager_encode
    teacher.network_changed = lambda: None
    is_cuda = teacher.device.type == "cuda"
    if mode == "off":
        return "plain execution (chosen)"
    if mode == "auto":
        if not is_cuda:
            return "plain execution (auto: no CUDA device)"
        mode = "graphs"
    if mode == "graphs" and not is_cuda:
        logger.warning("CUDA graphs need a CUDA device; the networks run plainly")
        return "plain execution (no CUDA device for graphs)"
    if mode == "compile":
        call, encode = torch.compile(teacher.eager_pass), torch.compile(teacher.eager_encode)
    else:
        call = GraphedPass(teacher.eager_pass, teacher.network)
        teacher.network_changed = call.forget
        encode = GraphedPass(teacher.eager_encode, teacher.vae)
    teacher.network_pass = WithFallback(call, teacher.eager_pass, f"{mode} of the network")
    teacher.encode_pass = WithFallback(encode, teacher.eager_encode, f"{mode} of the autoencoder")
    return {"compile": "torch.compile", "graphs": "captured CUDA graphs"}[mode]


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
                logger.warning(
                    "%s failed, running plainly from now on (%s: %s)", self.what, type(error).__name__, line
                )
                self.fast = None
        return self.plain(*args)


class _Call(nn.Module):
    """A pass over the tensors among its arguments, as the module that `make_graphed_callables` wants: its
    parameters are those that a gradient may go to."""

    def __init__(self, run: Pass, network: nn.Module, is_given: tuple[bool, ...]) -> None:
        super().__init__()
        self.network = network
        self._run = run
        self._is_given = is_given

    def forward(self, *tensors: Tensor) -> Any:
        remaining = iter(tensors)
        return self._run(*(next(remaining) if given else None for given in self._is_given))


class GraphedPass:
    """A pass captured once for each combination of shapes, arguments left out, and what is differentiated.

    A fake score on the same network always passes an addition to the time embedding and the teacher never
    does, so that their passes are told apart. Results are copied out of the graph's own memory. A backward
    pass must come before the next call of the same combination.
    """

    def __init__(self, run: Pass, network: nn.Module) -> None:
        self._run = run
        self._network = network
        self._captured: dict[tuple[Any, ...], Pass] = {}

    def __call__(self, *args: Tensor | None) -> Any:
        is_given = tuple(arg is not None for arg in args)
        tensors = [arg for arg in args if arg is not None]
        has_gradient = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)
        key = (
            is_given,
            has_gradient,
            *((tuple(tensor.shape), tensor.requires_grad) for tensor in tensors),
        )
        if key not in self._captured:
            self._captured[key] = self._capture(is_given, tensors, has_gradient)
        return _copied(self._captured[key](*tensors))

    def forget(self) -> None:
        """Capture anew from the next call on: the network has other parameters now."""
        self._captured.clear()

    def _capture(self, is_given: tuple[bool, ...], tensors: list[Tensor], has_gradient: bool) -> Pass:
        call = _Call(self._run, self._network, is_given)
        samples = [tensor.detach().clone().requires_grad_(tensor.requires_grad) for tensor in tensors]
        if has_gradient:
            captured: Pass = torch.cuda.make_graphed_callables(
                call, tuple(samples), num_warmup_iters=WARM_UP_PASSES, allow_unused_input=True
            )  # pyright: ignore[reportAssignmentType]
        else:
            captured = _captured_forward(call, samples)
        with torch.no_grad():
            _check_same(captured(*tensors), call(*tensors))
        return captured


def _captured_forward(call: Pass, samples: list[Tensor]) -> Pass:
    """`call` without gradients as one graph over its own copies of the arguments."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.no_grad(), torch.cuda.stream(stream):
        for _ in range(WARM_UP_PASSES):
            call(*samples)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.no_grad(), torch.cuda.graph(graph):
        results = call(*samples)

    def replay(*tensors: Tensor) -> Any:
        with torch.no_grad():
            for sample, tensor in zip(samples, tensors, strict=True):
                sample.copy_(tensor)
        graph.replay()
        return results

    return replay


def _copied(results: Any) -> Any:
    if isinstance(results, Tensor):
        return results.clone()
    return tuple(result.clone() for result in results)


def _check_same(results: Any, expected: Any) -> None:
    """Raise RuntimeError if a captured pass computes something else than the plain one."""
    pairs = zip(_as_tuple(results), _as_tuple(expected), strict=True)
    for result, wanted in pairs:
        error = (result.float() - wanted.float()).norm() / wanted.float().norm().clamp(min=1e-12)
        if not float(error) <= MAX_RELATIVE_ERROR:
            raise RuntimeError(f"a captured pass is off by {float(error):.3g} of its norm")


def _as_tuple(results: Any) -> tuple[Tensor, ...]:
    return (results,) if isinstance(results, Tensor) else tuple(results)
