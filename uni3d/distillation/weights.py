"""Weights in training: their optimiser, their running average, and steps that are skipped whole.

A gradient that is not finite skips the step without the host knowing: the fused optimiser reads the flag on
the device. All arithmetic over parameters is in fused or foreach kernels.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch import _foreach_lerp_ as lerp_each_  # pyright: ignore[reportPrivateImportUsage]
from torch import _foreach_mul_ as multiply_each_  # pyright: ignore[reportPrivateImportUsage]

from uni3d.errors import UsageError
from uni3d.training.processes import Processes


@dataclass(frozen=True)
class AdamSettings:
    """Of all groups of parameters; the learning rates are given with them."""

    betas: tuple[float, float]
    epsilon: float
    gradient_clip: float


class TrainedWeights:
    """The parameters of `networks` (by name), Adam on them, and an average of those of one network.

    Args:
        networks: float32, on their device, in their final memory format.
        learning_rates: peak learning rate of each.
        averaged: name of the network whose running average is kept.
    """

    def __init__(
        self,
        networks: Mapping[str, nn.Module],
        learning_rates: Mapping[str, float],
        settings: AdamSettings,
        *,
        averaged: str | None = None,
    ) -> None:
        self.networks = dict(networks)
        self.settings = settings
        self._rates = [learning_rates[name] for name in self.networks]
        groups = [
            {"params": [p for p in network.parameters() if p.requires_grad], "lr": rate}
            for network, rate in zip(self.networks.values(), self._rates, strict=True)
        ]
        self.parameters: list[nn.Parameter] = [p for group in groups for p in group["params"]]  # type: ignore[union-attr]
        self.optimiser = torch.optim.Adam(groups, betas=settings.betas, eps=settings.epsilon, fused=True)
        self.average: dict[str, Tensor] = {}
        self._average_of: list[Tensor] = []
        if averaged is not None:
            named = list(self.networks[averaged].named_parameters())
            self.average = {name: p.detach().clone(memory_format=torch.preserve_format) for name, p in named}
            self._average_of = [p.detach() for _, p in named]

    @property
    def num_parameters(self) -> int:
        return sum(parameter.numel() for parameter in self.parameters)

    def step(self, *, rate_factor: float, processes: Processes) -> Tensor:
        """One step on the gradients summed over all processes; 1 if it was skipped, else 0, a scalar."""
        gradients = [p.grad for p in self.parameters if p.grad is not None]
        processes.add_up_(gradients)
        norm = nn.utils.get_total_norm(gradients, foreach=True)
        is_bad = (~norm.isfinite()).to(torch.float32)
        if self.settings.gradient_clip > 0:
            multiply_each_(gradients, (self.settings.gradient_clip / (norm + 1e-6)).clamp(max=1.0))
        for group, rate in zip(self.optimiser.param_groups, self._rates, strict=True):
            group["lr"] = rate * rate_factor
        # What GradScaler hands a fused optimiser: at 1 it leaves weights, moments and counts alone.
        self.optimiser.found_inf = is_bad  # type: ignore[attr-defined]
        self.optimiser.step()
        self.optimiser.zero_grad(set_to_none=True)
        return is_bad

    @torch.no_grad()
    def update_average(self, decay: float) -> None:
        """average = decay * average + (1 - decay) * weights."""
        if self.average:
            lerp_each_(list(self.average.values()), self._average_of, 1.0 - decay)

    def state(self) -> dict[str, Any]:
        """Everything an exact continuation needs."""
        return {
            "weights": {name: network.state_dict() for name, network in self.networks.items()},
            "average": dict(self.average),
            "optimiser": self.optimiser.state_dict(),
        }

    @torch.no_grad()
    def load_state(self, state: Mapping[str, Any]) -> None:
        """Continue from `state()`, in place. Raises UsageError for the state of other networks."""
        pairs: list[tuple[str, Tensor, Tensor | None]] = []
        for name, network in self.networks.items():
            saved = state["weights"].get(name, {})
            pairs += [(f"{name}.{key}", t, saved.get(key)) for key, t in network.state_dict().items()]
        pairs += [(f"average.{key}", t, state["average"].get(key)) for key, t in self.average.items()]
        for name, target, tensor in pairs:
            if tensor is None or tensor.shape != target.shape:
                got = "nothing" if tensor is None else f"shape {list(tensor.shape)}"
                raise UsageError(
                    f"the checkpoint is of another architecture: {name} should have shape "
                    f"{list(target.shape)}, got {got}; resume with the settings it was made with"
                )
        for _, target, tensor in pairs:
            assert tensor is not None
            target.copy_(tensor)
        try:
            self.optimiser.load_state_dict(state["optimiser"])
        except ValueError as error:
            raise UsageError(f"the checkpoint's optimiser does not fit ({error}); start a new run") from error


def average_decay(batch: int, images: int, *, half_life_images: float, ramp_up: float) -> float:
    """Decay of the average in the step after which `images` have been seen, as in EDM's training loop."""
    half_life = min(half_life_images, ramp_up * images) if ramp_up > 0 else half_life_images
    return 0.5 ** (batch / max(half_life, 1e-8))


def rate_factor(images: int, *, total_images: int, ramp_images: int, final_fraction: float) -> float:
    """Share of the peak learning rate in a step before which `images` were seen."""
    ramp = min(1.0, images / ramp_images) if ramp_images else 1.0
    progress = min(1.0, images / total_images)
    return ramp * (final_fraction + (1 - final_fraction) * 0.5 * (1 + math.cos(math.pi * progress)))
