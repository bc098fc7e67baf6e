"""A pass of a network as captured CUDA graphs, its backward pass included.

Torch's own `make_graphed_callables` takes every parameter of a network for an input, and leaves nodes of its
warm-up alive that belong to another stream. Here only what is trained is an input, and gradients are taken
at aliases of it that the capture makes itself: the parameters' own gradient nodes may belong to a pass that
is still waiting for its backward pass, on the default stream, which no capture may touch.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

MAX_RELATIVE_ERROR = 0.05  # of a replayed pass in bfloat16 against the plain one
WARM_UP_PASSES = 3
Pass = Callable[..., Any]
Replay = Callable[[], object]
Tensors = Sequence[Tensor]


class Recorder(Protocol):
    """Records work on tensors that stay where they are."""

    def warm_up(self, work: Callable[[], object]) -> None:
        """Run `work` as often as it takes libraries to choose their kernels."""
        ...

    def record(self, work: Callable[[], Tensors]) -> tuple[Tensors, Replay]:
        """What `work` returned, and what computes it anew into the same memory."""
        ...


class CUDAGraphRecorder:
    """Graphs that share one memory pool and are replayed in the order of their capture."""

    def __init__(self) -> None:
        self.stream = torch.cuda.Stream()
        self.pool: Any = torch.cuda.graph_pool_handle()

    def warm_up(self, work: Callable[[], object]) -> None:
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):
            for _ in range(WARM_UP_PASSES):
                work()
        torch.cuda.current_stream().wait_stream(self.stream)

    def record(self, work: Callable[[], Tensors]) -> tuple[Tensors, Replay]:
        graph = torch.cuda.CUDAGraph()
        try:
            # Another thread, such as a web server's, may go on using the device.
            with torch.cuda.graph(
                graph, pool=self.pool, stream=self.stream, capture_error_mode="thread_local"
            ):
                results = work()
        except Exception:
            recover_from_failed_capture(self.pool)
            raise
        return results, graph.replay


def recover_from_failed_capture(pool: Any) -> None:
    """Undo what torch leaves behind when a capture breaks off: the default generator believes that it goes
    on, and memory is still taken from its pool."""
    device = torch.cuda.current_device()
    generator = torch.cuda.default_generators[device]
    fresh = torch.Generator(f"cuda:{device}").manual_seed(generator.initial_seed())
    with contextlib.suppress(Exception):
        generator.graphsafe_set_state(fresh)
    with contextlib.suppress(Exception):  # it is not taking from the pool any more
        torch._C._cuda_endAllocateToPool(device, pool)  # pyright: ignore[reportAttributeAccessIssue]


class GraphedPass:
    """A pass captured once for each combination of shapes, arguments left out, and what is differentiated.

    A fake score on the same network always passes an addition to the time embedding and the teacher never
    does, so that their passes are told apart. Results are copied out of the graph's own memory. A backward
    pass, or several, must come before the next call of the same combination; RuntimeError if it comes later.

    Args:
        run: the pass; tensors or None in, a tensor or several out.
        network: whose parameters it may differentiate.
        recorder: makes what records one combination.
    """

    def __init__(
        self, run: Pass, network: nn.Module, recorder: Callable[[], Recorder] = CUDAGraphRecorder
    ) -> None:
        self._run = run
        self._network = network
        self._recorder = recorder
        self._is_paused = False
        self._captured: dict[tuple[Any, ...], Pass] = {}

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Within the block the pass runs as it is: shapes soon done with are not worth a graph, which
        keeps its memory."""
        self._is_paused = True
        try:
            yield
        finally:
            self._is_paused = False

    def __call__(self, *args: Tensor | None) -> Any:
        if self._is_paused:
            return self._run(*args)
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
        return self._captured[key](*tensors)

    def forget(self) -> None:
        """Capture anew from the next call on: the network has other parameters now."""
        self._captured.clear()

    def _capture(self, is_given: tuple[bool, ...], tensors: list[Tensor], has_gradient: bool) -> Pass:
        call = _Call(self._run, self._network, is_given)
        captured = _Captured(call, tensors, self._recorder(), has_gradient)
        with torch.no_grad():
            _check_same(captured(*tensors), call(*tensors))
        return captured


class _Call(nn.Module):
    """A pass over the tensors among its arguments, as a module that `functional_call` can lend parameters."""

    def __init__(self, run: Pass, network: nn.Module, is_given: tuple[bool, ...]) -> None:
        super().__init__()
        self.network = network
        self._run = run
        self._is_given = is_given

    def forward(self, *tensors: Tensor) -> Any:
        remaining = iter(tensors)
        return self._run(*(next(remaining) if given else None for given in self._is_given))


class _Captured:
    """One combination: its arguments, results and gradients in fixed places, and what computes them."""

    def __init__(self, call: _Call, tensors: Tensors, recorder: Recorder, has_gradient: bool) -> None:
        self.serial = 0
        self.arguments = [
            tensor.detach().clone().requires_grad_(has_gradient and tensor.requires_grad)
            for tensor in tensors
        ]
        trained = {name: value for name, value in call.named_parameters() if value.requires_grad}
        aliases: dict[str, Tensor] = {
            name: value.detach().requires_grad_(has_gradient) for name, value in trained.items()
        }
        self._is_single = False
        self._has_gradient = has_gradient
        self._live: Tensors = ()

        def forward() -> Tensors:
            with torch.set_grad_enabled(has_gradient):
                results = (
                    torch.func.functional_call(call, aliases, tuple(self.arguments))
                    if aliases
                    else call(*self.arguments)
                )
            self._is_single = isinstance(results, Tensor)
            self._live = _as_tuple(results)  # with the graph that a recorded backward pass goes through
            return [result.detach() for result in self._live]

        if not has_gradient:
            recorder.warm_up(forward)
            self.results, self._replay_forward = recorder.record(forward)
            self._live = ()
            return
        sources = [argument for argument in self.arguments if argument.requires_grad] + [*aliases.values()]
        targets = [value for value, own in zip(tensors, self.arguments, strict=True) if own.requires_grad]
        self._record_gradient(forward, recorder, sources, [*targets, *trained.values()], len(targets))
        self.parameters = [value for value in trained.values() if id(value) in self._reached]

    def _record_gradient(
        self,
        forward: Callable[[], Tensors],
        recorder: Recorder,
        sources: Tensors,
        originals: Tensors,
        num_arguments: int,
    ) -> None:
        """Record both passes; which of `sources` the results depend on is found on the way."""
        self.result_gradients: list[Tensor] = []
        reached: list[int] = []

        def backward() -> Tensors:
            # The graph is kept: its tensors must stay in place for another replay.
            live = [result for result in self._live if result.requires_grad]
            gradients = torch.autograd.grad(
                live,
                [sources[place] for place in reached] or sources,
                self.result_gradients,
                retain_graph=True,
                allow_unused=not reached,
            )
            if not reached:
                reached.extend(place for place, found in enumerate(gradients) if found is not None)
            return [gradient for gradient in gradients if gradient is not None]

        def both() -> None:
            forward()
            if not self.result_gradients:
                self.result_gradients = [
                    torch.zeros_like(result) for result in self._live if result.requires_grad
                ]
            backward()
            self._live = ()

        recorder.warm_up(both)
        self.results, self._replay_forward = recorder.record(forward)
        self.is_differentiable = [result.requires_grad for result in self._live]
        self.gradients, self._replay_backward = recorder.record(backward)
        self._reached = {id(originals[place]) for place in reached}
        self.reached_arguments = [place in reached for place in range(num_arguments)]

    def __call__(self, *tensors: Tensor) -> Any:
        results = (
            _ReplayedPass.apply(self, *tensors, *self.parameters)
            if self._has_gradient
            else self.replay(tensors)
        )
        return results[0] if self._is_single else tuple(results)

    def replay(self, tensors: Tensors) -> tuple[Tensor, ...]:
        """The results for `tensors`, in memory of their own."""
        self.serial += 1
        with torch.no_grad():
            for argument, tensor in zip(self.arguments, tensors, strict=True):
                argument.copy_(tensor)
            self._replay_forward()
            return tuple(result.clone() for result in self.results)

    def replay_gradients(self, result_gradients: Sequence[Tensor | None]) -> list[Tensor | None]:
        """Gradients of the arguments and parameters of the last replay, in memory of their own."""
        wanted = [
            gradient
            for gradient, is_one in zip(result_gradients, self.is_differentiable, strict=True)
            if is_one
        ]
        with torch.no_grad():
            for place, gradient in zip(self.result_gradients, wanted, strict=True):
                place.zero_() if gradient is None else place.copy_(gradient)
            self._replay_backward()
            num = sum(self.reached_arguments)
            found = iter([gradient.clone() for gradient in self.gradients[:num]])
            of_parameters = list(self.gradients[num:])
            if of_parameters:  # all float32: copied in a few launches
                of_parameters = torch._foreach_mul(of_parameters, 1.0)  # pyright: ignore[reportPrivateImportUsage]
        reached = iter(self.reached_arguments)
        of_arguments = [
            next(found) if argument.requires_grad and next(reached) else None for argument in self.arguments
        ]
        return [*of_arguments, *of_parameters]


class _ReplayedPass(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, captured: _Captured, *inputs: Tensor) -> tuple[Tensor, ...]:
        results = captured.replay(inputs[: len(captured.arguments)])
        ctx.captured, ctx.serial = captured, captured.serial
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(
            *(
                result
                for result, is_one in zip(results, captured.is_differentiable, strict=True)
                if not is_one
            )
        )
        return results

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor | None) -> tuple[Tensor | None, ...]:
        if ctx.serial != ctx.captured.serial:
            raise RuntimeError(
                "a captured pass was called again before its backward pass, whose tensors are gone; take "
                "the backward pass first, or run the networks plainly (--networks.compile off)"
            )
        return None, *ctx.captured.replay_gradients(grad_outputs)


def _check_same(results: Any, expected: Any) -> None:
    """Raise RuntimeError if a captured pass computes something else than the plain one."""
    pairs = zip(_as_tuple(results), _as_tuple(expected), strict=True)
    for result, wanted in pairs:
        error = (result.float() - wanted.float()).norm() / wanted.float().norm().clamp(min=1e-12)
        if not float(error) <= MAX_RELATIVE_ERROR:
            raise RuntimeError(f"a captured pass is off by {float(error):.3g} of its norm")


def _as_tuple(results: Any) -> tuple[Tensor, ...]:
    return (results,) if isinstance(results, Tensor) else tuple(results)
