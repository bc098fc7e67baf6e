"""The fake scores of several scenes on one teacher: low-rank adapters [S, ...] that meet in one pass.

A batch comes scene by scene; within `active` every attention projection adds to its output what the adapters
of each row's scene make of its input, by two batched products. Scene s sees exactly the network that a
`LoRAFakeScore` of its own would give it, and state is exchanged with that class tensor by tensor.
Legend: S scenes, B views scene by scene, T tokens.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from uni3d.diffusion.lora_score import ADAPTER_NAME, ATTENTION_PROJECTIONS, CameraEmbedding
from uni3d.diffusion.stable_diffusion import LatentDiffusionTeacher
from uni3d.parameter_stack import ParameterStack


class LoRAFakeScoreStack:
    """D_fake(x, sigma, context, camera) -> x0 for S scenes, on the base weights of `teacher`.

    Args:
        rank: of the low-rank update of every attention projection.
        generators: one for each scene; each draws what the fake score of a single run would draw.
        conditioning_dim: length of the camera vector.
    """

    def __init__(
        self,
        teacher: LatentDiffusionTeacher,
        *,
        rank: int,
        generators: Sequence[torch.Generator],
        conditioning_dim: int = 5,
    ) -> None:
        self.teacher = teacher
        self._projections = {
            name: module
            for name, module in teacher.unet.named_modules()
            if name.endswith(tuple(f".{suffix}" for suffix in ATTENTION_PROJECTIONS))
        }
        embedding_dim = teacher.unet.config.block_out_channels[0] * 4
        self._embedding_like = CameraEmbedding(conditioning_dim, embedding_dim)
        self._shapes: dict[str, tuple[int, ...]] = {}
        for name, module in self._projections.items():
            adapter = f"adapter.{name}"
            self._shapes[f"{adapter}.lora_A.{ADAPTER_NAME}.weight"] = (rank, module.in_features)
            self._shapes[f"{adapter}.lora_B.{ADAPTER_NAME}.weight"] = (module.out_features, rank)
        for name, parameter in self._embedding_like.named_parameters():
            self._shapes[f"camera.{name}"] = tuple(parameter.shape)
        rows = [self._draw(generator).to(teacher.device) for generator in generators]
        self.stack = ParameterStack(rows, list(self._shapes.values()))

    def _draw(self, generator: torch.Generator) -> Tensor:
        """One scene's start: lora_A and the camera's first layer uniform, the rest zero."""
        parts = []
        for name, shape in self._shapes.items():
            if "lora_B" in name or name.startswith("camera.project"):
                parts.append(torch.zeros(shape))
                continue
            fan_in = shape[1] if "lora_A" in name else self._embedding_like.expand.in_features
            drawn = torch.rand(shape, generator=generator) * 2 - 1
            parts.append(drawn * (1 / fan_in**0.5))
        return torch.cat([part.reshape(-1) for part in parts])

    def state_dict(self, scene: int) -> dict[str, Tensor]:
        """What `LoRAFakeScore.state_dict` gives for one scene; views of the stack."""
        parts = self.stack.split(self.stack.tensor.detach()[scene])
        return dict(zip(self._shapes, parts, strict=True))

    def load_state_dict(self, scene: int, state: Mapping[str, Tensor]) -> None:
        """Restore one scene; raises KeyError when a tensor is missing."""
        device = self.stack.tensor.device
        self.stack.set_row(scene, [state[name].to(device) for name in self._shapes])

    def remove(self) -> None:
        """Nothing stays on the teacher's network between passes."""

    @contextmanager
    def active(self, conditioning: Tensor) -> Iterator[Any]:
        """Within the block the shared network is the fake score of each row's scene, for cameras [B, K]."""
        parts = dict(zip(self._shapes, self.stack.parts(), strict=True))
        added = self._camera_embedding(parts, conditioning).to(self.teacher.dtype)
        unet = self.teacher.unet
        with ExitStack() as stack:
            for name, module in self._projections.items():
                adapter = f"adapter.{name}"
                down = parts[f"{adapter}.lora_A.{ADAPTER_NAME}.weight"].transpose(1, 2)
                up = parts[f"{adapter}.lora_B.{ADAPTER_NAME}.weight"].transpose(1, 2)
                stack.callback(module.register_forward_hook(_low_rank(down, up)).remove)
            handle = unet.time_embedding.register_forward_hook(
                lambda _module, _inputs, output: output + added
            )
            stack.callback(handle.remove)
            yield unet

    def predict_x0(self, x: Tensor, sigma: Tensor, context: Tensor, conditioning: Tensor) -> Tensor:
        """The students' x0-predictions, float32 [B, C, H, W]; arguments as
        `LatentDiffusionTeacher.predict_x0`."""
        with self.active(conditioning):
            return self.teacher.predict_x0(x, sigma, context)

    def _camera_embedding(self, parts: Mapping[str, Tensor], conditioning: Tensor) -> Tensor:
        own = {name: parts[f"camera.{name}"] for name, _ in self._embedding_like.named_parameters()}
        cameras = conditioning.to(self.teacher.device).unflatten(0, (self.stack.num_scenes, -1))

        def embed(parameters: dict[str, Tensor], camera: Tensor) -> Tensor:
            return torch.func.functional_call(self._embedding_like, parameters, (camera,))

        return torch.func.vmap(embed)(own, cameras).flatten(0, 1)


def _low_rank(down: Tensor, up: Tensor) -> Any:
    """A forward hook that adds x down up, with down [S, in, r] and up [S, r, out] of each row's scene."""

    def hook(_module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        rows = inputs[0].reshape(down.shape[0], -1, inputs[0].shape[-1])
        update = torch.bmm(torch.bmm(rows, down.to(rows.dtype)), up.to(rows.dtype))
        return output + update.view_as(output)

    return hook
