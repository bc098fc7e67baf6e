"""Networks in a fast number format with float32 master weights, their optimiser and their running average.

Convolutions, norms and activations all run in the compute format. Autocast would instead lift every norm
to float32 and move twice the bytes, and these networks are bound by memory, not arithmetic.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn
from torch import _foreach_add_ as add_each_  # pyright: ignore[reportPrivateImportUsage]
from torch import _foreach_copy_ as copy_each_  # pyright: ignore[reportPrivateImportUsage]
from torch import _foreach_lerp_ as lerp_each_  # pyright: ignore[reportPrivateImportUsage]

from uni3d.errors import UsageError


def cast_network(network: nn.Module, *, device: torch.device, dtype: torch.dtype) -> None:
    """Move `network` in place by Module.to itself: diffusers' own warns of modules that want float32."""
    nn.Module.to(network, device=device, dtype=dtype)


def parameter_names(network: nn.Module, prefix: str) -> list[str]:
    """Names of the parameters in checkpoints, in their order: "unet.conv_in.weight" for the prefix "unet"."""
    # CLIPTextModel lost this level in some releases of transformers; a checkpoint may cross them.
    names = [name.removeprefix("text_model.") for name, _ in network.named_parameters()]
    return [f"{prefix}.{name}" for name in names]


class Trainable:
    """Named networks, AdamW on their float32 master weights, and (if asked) an average of those weights.

    On a device where the compute format is float32 the masters are the parameters themselves.

    Args:
        networks: by name; moved to `device` and `compute_dtype` in place.
        channels_last: memory format of the convolution weights.
        averaged: keep an exponential moving average.
    """

    def __init__(
        self,
        networks: Mapping[str, nn.Module],
        *,
        device: torch.device,
        compute_dtype: torch.dtype,
        weight_decay: float,
        betas: tuple[float, float] = (0.9, 0.99),
        channels_last: bool = False,
        averaged: bool = False,
    ) -> None:
        self.networks = dict(networks)
        layout = torch.channels_last if channels_last else torch.preserve_format
        self.names: list[str] = []
        self.parameters: list[nn.Parameter] = []
        self.masters: list[Tensor] = []
        for prefix, network in self.networks.items():
            cast_network(network, device=device, dtype=torch.float32)
            network.to(memory_format=layout)  # type: ignore[call-overload]
            masters = [parameter.detach().clone() for parameter in network.parameters()]
            cast_network(network, device=device, dtype=compute_dtype)
            self.names += parameter_names(network, prefix)
            self.parameters += list(network.parameters())
            self.masters += masters
        self.is_mixed = compute_dtype != torch.float32
        if not self.is_mixed:
            self.masters = list(self.parameters)
        self.average = [master.detach().clone() for master in self.masters] if averaged else None
        groups = [
            {"params": [m for m in self.masters if m.ndim >= 2], "weight_decay": weight_decay},
            {"params": [m for m in self.masters if m.ndim < 2], "weight_decay": 0.0},
        ]
        self.optimizer = torch.optim.AdamW(groups, lr=0.0, betas=betas, fused=device.type == "cuda")

    @property
    def num_parameters(self) -> int:
        return sum(master.numel() for master in self.masters)

    def collect_gradients(self) -> None:
        """Add the gradients of the last backward pass to the masters' (needed after each part of a batch)."""
        if not self.is_mixed:
            return
        gradients = [p.grad if p.grad is not None else torch.zeros_like(p) for p in self.parameters]
        collected = [master.grad for master in self.masters if master.grad is not None]
        if collected:
            add_each_(collected, [gradient.float() for gradient in gradients])
        else:
            collected = [torch.empty_like(master) for master in self.masters]
            copy_each_(collected, gradients)
            for master, gradient in zip(self.masters, collected, strict=True):
                master.grad = gradient
        for parameter in self.parameters:
            parameter.grad = None

    def step(self, *, learning_rate: float, gradient_clip: float) -> Tensor:
        """One AdamW step on the collected gradients; returns their norm before clipping, a scalar tensor."""
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        norm = nn.utils.clip_grad_norm_(self.masters, gradient_clip, foreach=True)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self._publish_masters()
        return norm

    @torch.no_grad()
    def update_average(self, decay: float) -> None:
        """Move the average towards the masters: average = decay * average + (1 - decay) * master."""
        if self.average is not None:
            lerp_each_(self.average, [master.detach() for master in self.masters], 1.0 - decay)

    @contextlib.contextmanager
    def averaged_weights(self) -> Iterator[None]:
        """Within the block the networks hold the averaged weights."""
        if self.average is None:
            yield
            return
        kept = None if self.is_mixed else [master.detach().clone() for master in self.masters]
        with torch.no_grad():
            copy_each_([p.detach() for p in self.parameters], self.average)
        try:
            yield
        finally:
            if kept is None:
                self._publish_masters()
            else:
                with torch.no_grad():
                    copy_each_([p.detach() for p in self.parameters], kept)

    @torch.no_grad()
    def _publish_masters(self) -> None:
        if self.is_mixed:
            copy_each_([p.detach() for p in self.parameters], [m.detach() for m in self.masters])

    # ------------------------------------------------------------------ state

    def weights(self, *, averaged: bool) -> dict[str, Tensor]:
        """Float32 weights by name ("network.parameter"): the average if asked for and kept, or masters."""
        source = self.average if averaged and self.average is not None else self.masters
        return {name: tensor.detach() for name, tensor in zip(self.names, source, strict=True)}

    def full_state(self) -> dict[str, Tensor]:
        """Everything an exact continuation needs: masters, average, both moments, all float32."""
        state = {f"weights/{name}": tensor for name, tensor in self.weights(averaged=False).items()}
        if self.average is not None:
            state.update({f"average/{name}": t for name, t in self.weights(averaged=True).items()})
        for name, master in zip(self.names, self.masters, strict=True):
            moments = self.optimizer.state.get(master)
            if moments:
                state[f"moment1/{name}"] = moments["exp_avg"]
                state[f"moment2/{name}"] = moments["exp_avg_sq"]
                state[f"count/{name}"] = moments["step"].reshape(1)
        return state

    def load_full_state(self, state: Mapping[str, Tensor]) -> None:
        """Continue from `full_state`. Raises UsageError when a tensor is missing or has another shape."""
        self._fill(self.masters, state, "weights/")
        if self.average is not None:
            self._fill(self.average, state, "average/")
        for name, master in zip(self.names, self.masters, strict=True):
            if f"moment1/{name}" not in state:
                continue
            first = torch.empty_like(master, requires_grad=False)
            second = torch.empty_like(first)
            self.optimizer.state[master] = {
                "step": state[f"count/{name}"].reshape(()).to(first.device if self._is_fused else "cpu"),
                "exp_avg": first.copy_(state[f"moment1/{name}"]),
                "exp_avg_sq": second.copy_(state[f"moment2/{name}"]),
            }
        self._publish_masters()

    def load_weights(self, weights: Mapping[str, Tensor]) -> None:
        """Start from weights alone (any float format): masters and average take them, moments stay empty."""
        self._fill(self.masters, weights, "")
        if self.average is not None:
            self._fill(self.average, weights, "")
        self._publish_masters()

    @property
    def _is_fused(self) -> bool:
        return bool(self.optimizer.defaults["fused"])

    @torch.no_grad()
    def _fill(self, targets: list[Tensor], state: Mapping[str, Tensor], prefix: str) -> None:
        for name, target in zip(self.names, targets, strict=True):
            tensor = state.get(prefix + name)
            if tensor is None or tensor.shape != target.shape:
                got = "nothing" if tensor is None else f"shape {tuple(tensor.shape)}"
                raise UsageError(
                    f"checkpoint does not fit this configuration: {prefix + name} should have shape "
                    f"{tuple(target.shape)}, got {got}; resume with the configuration it was trained with"
                )
            target.detach().copy_(tensor)
