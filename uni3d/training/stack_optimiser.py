"""One optimiser for the parameters of several scenes: a few launches move them all, and each moves alone.

A scene whose loss or gradient is not finite, or that is not part of the step, stays exactly where it is, its
moments included. State is read and written scene by scene, in the form that an optimiser of that scene alone
has, so that a run may be taken out of a batch and go on by itself.
Legend: S scenes.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from uni3d.parameter_stack import ParameterStack


class StackOptimiser:
    """Adam or AdamW over stacks of parameters.

    Args:
        groups: stacks by name, in the order of a single scene's parameter groups.
        kind: `torch.optim.Adam` or `AdamW`; fused.
        options: its other arguments.
    """

    def __init__(
        self,
        groups: Mapping[str, Sequence[ParameterStack]],
        kind: type[torch.optim.Adam],
        **options: Any,
    ) -> None:
        self._groups = {name: list(stacks) for name, stacks in groups.items()}
        self._stacks = [stack for stacks in self._groups.values() for stack in stacks]
        self.num_scenes = self._stacks[0].num_scenes
        members = [
            {"params": [member for stack in stacks for member in stack.members], "name": name}
            for name, stacks in self._groups.items()
        ]
        self._optimiser = kind(members, fused=True, **options)

    def set_learning_rates(self, rates: Mapping[str, float]) -> None:
        """Learning rates by group name, for the steps to come."""
        for group in self._optimiser.param_groups:
            group["lr"] = rates[group["name"]]

    def descend(self, losses: Tensor, max_norm: float, *, only: Collection[int] | None = None) -> list[bool]:
        """One step on `losses` [S], each scene's gradient norm bounded by `max_norm` (0: not at all).

        Returns for each scene whether its loss and gradient were finite; a scene where they were not, or that
        is not among `only`, does not move. Losses without a gradient move nothing. Waits for the device once.
        """
        for stack in self._stacks:
            stack.tensor.grad = None
        is_finite = torch.isfinite(losses.detach())
        if not losses.requires_grad:
            return is_finite.tolist()
        losses.sum().backward()
        gradients = [stack.tensor.grad for stack in self._stacks if stack.tensor.grad is not None]
        norms = [torch.linalg.vector_norm(gradient.flatten(1), dim=1) for gradient in gradients]
        norm = torch.linalg.vector_norm(torch.stack(norms), dim=0)
        if max_norm > 0:
            scale = (max_norm / (norm + 1e-6)).clamp(max=1.0)
            for gradient in gradients:
                gradient.mul_(scale.view(-1, *[1] * (gradient.ndim - 1)))
        verdicts: list[bool] = (is_finite & torch.isfinite(norm)).tolist()
        self._hand_out_gradients(
            [is_good and (only is None or scene in only) for scene, is_good in enumerate(verdicts)]
        )
        self._optimiser.step()
        for stack in self._stacks:
            stack.tensor.grad = None
        return verdicts

    def _hand_out_gradients(self, moves: Sequence[bool]) -> None:
        for stack in self._stacks:
            gradient = stack.tensor.grad
            for scene, member in enumerate(stack.members):
                member.grad = gradient[scene] if gradient is not None and moves[scene] else None

    # ------------------------------------------------------------------ state

    def state_dict(self, scene: int) -> dict[str, Any]:
        """What `state_dict` of an optimiser of this scene alone would give."""
        whole = self._optimiser.state_dict()
        states: dict[int, dict[str, Any]] = {}
        groups: list[dict[str, Any]] = []
        index = 0
        for group, stacks in zip(whole["param_groups"], self._groups.values(), strict=True):
            first = index
            for stack in stacks:
                state = self._optimiser.state.get(stack.members[scene], {})
                parts = {name: _parts(stack, value) for name, value in state.items()}
                num_parts = len(stack.split(stack.members[scene].detach()))
                for part in range(num_parts):
                    if parts:
                        states[index + part] = {name: values[part] for name, values in parts.items()}
                index += num_parts
            groups.append({**group, "params": list(range(first, index))})
        return {"state": states, "param_groups": groups}

    def load_state_dict(self, scene: int, state: Mapping[str, Any]) -> None:
        """Restore one scene from the state of an optimiser of this scene alone."""
        saved = {int(index): values for index, values in state["state"].items()}
        index = 0
        for stacks in self._groups.values():
            for stack in stacks:
                member = stack.members[scene]
                num_parts = len(stack.split(member.detach()))
                parts = [saved[index + part] for part in range(num_parts) if index + part in saved]
                if parts:
                    self._optimiser.state[member] = _joined(stack, parts, member)
                else:
                    self._optimiser.state.pop(member, None)
                index += num_parts


def _parts(stack: ParameterStack, value: Tensor) -> list[Tensor]:
    """A state tensor of one scene's row for each single parameter; the step count is the same for all."""
    num_parts = len(stack.split(stack.members[0].detach()))
    return [value.clone() for _ in range(num_parts)] if value.ndim == 0 else stack.split(value)


def _joined(
    stack: ParameterStack, parts: Sequence[Mapping[str, Tensor]], member: Tensor
) -> dict[str, Tensor]:
    joined: dict[str, Tensor] = {}
    for name, first in parts[0].items():
        if first.ndim == 0:
            joined[name] = first.detach().clone().to(member.device)
        else:
            values = stack.join([part[name].to(member.device) for part in parts])
            joined[name] = values.detach().clone()
    return joined
