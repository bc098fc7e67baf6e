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

from uni3d.diffusion.latent_teacher import LatentDiffusionTeacher
from uni3d.diffusion.lora_score import ADAPTER_NAME, CONDITIONING_DIM, CameraEmbedding
from uni3d.parameter_stack import ParameterStack


class LoRAFakeScoreStack:
    """D_fake(x, sigma, context, camera) -> x0 for S scenes, on the base weights of `teacher`.

    Args:
        rank: of the low-rank update of every attention projection.
        generators: one for each scene; each draws what the fake score of a single run would draw.
    """

    def __init__(
        self,
        teacher: LatentDiffusionTeacher,
        *,
        rank: int,
        generators: Sequence[torch.Generator],
    ) -> None:
        self.teacher = teacher
        self._projections = {
            name: module
            for name, module in teacher.network.named_modules()
            if name.endswith(tuple(f".{suffix}" for suffix in teacher.attention_projections))
        }
        self._embedding_like = CameraEmbedding(CONDITIONING_DIM, teacher.time_embedding_width)
        self._shapes: dict[str, tuple[int, ...]] = {}
        for name, module in self._projections.items():
            adapter = f"adapter.{name}"
            self._shapes[f"{adapter}.lora_A.{ADAPTER_NAME}.weight"] = (rank, module.in_features)
            self._shapes[f"{adapter}.lora_B.{ADAPTER_NAME}.weight"] = (module.out_features, rank)
        for name, parameter in self._embedding_like.named_parameters():
            self._shapes[f"camera.{name}"] = tuple(parameter.shape)
        rows = [self._draw(generator).to(teacher.device) for generator in generators]
        self.stack = ParameterStack(rows, list(self._shapes.values()))
        self._adapted_pass = teacher.accelerated(self._plain_adapted_pass, "the fake scores")

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

    def predict_x0(
        self,
        x: Tensor,
        sigma: Tensor,
        context: Tensor,
        conditioning: Tensor,
        *,
        knows_camera: Tensor | None = None,
    ) -> Tensor:
        """The students' x0-predictions, float32 [B, C, H, W]; arguments as `LoRAFakeScore.predict_x0`."""
        camera = conditioning.to(self.teacher.device)
        if knows_camera is not None:
            camera = camera * knows_camera.to(camera)[:, None]
        addition = self._camera_embedding(self._parts(self.stack.tensor), camera)
        with self._active():
            return self.teacher.denoise(x, sigma, context, addition).x0

    @contextmanager
    def _active(self) -> Iterator[None]:
        """Within the block the teacher's network is the fake score of each row's scene."""
        usual = self.teacher.network_pass

        def adapted(*args: Tensor | None) -> Any:
            return self._adapted_pass(*args, self.stack.tensor)

        self.teacher.network_pass = adapted
        try:
            yield
        finally:
            self.teacher.network_pass = usual

    def _plain_adapted_pass(self, *args: Tensor | None) -> Any:
        """`eager_pass` with the adapters that the last argument, the stacked tensor [S, N], holds.

        It is an argument, and the hooks come and go within, so that the pass can be captured."""
        *inputs, stacked = args
        assert stacked is not None
        parts = self._parts(stacked)
        with ExitStack() as stack:
            for name, module in self._projections.items():
                adapter = f"adapter.{name}"
                down = parts[f"{adapter}.lora_A.{ADAPTER_NAME}.weight"].transpose(1, 2)
                up = parts[f"{adapter}.lora_B.{ADAPTER_NAME}.weight"].transpose(1, 2)
                stack.callback(module.register_forward_hook(_low_rank(down, up)).remove)
            return self.teacher.eager_pass(*inputs)  # pyright: ignore[reportArgumentType]

    def _parts(self, stacked: Tensor) -> dict[str, Tensor]:
        return dict(zip(self._shapes, self.stack.parts(stacked), strict=True))

    def _camera_embedding(self, parts: Mapping[str, Tensor], conditioning: Tensor) -> Tensor:
        own = {name: parts[f"camera.{name}"] for name, _ in self._embedding_like.named_parameters()}
        cameras = conditioning.unflatten(0, (self.stack.num_scenes, -1))

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
