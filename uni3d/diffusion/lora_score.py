"""The fake score: low-rank adapters on the teacher's own network, told the camera.

The student's score is estimated by the teacher's UNet plus LoRA (Hu et al. 2021) and a camera embedding
added to
the time embedding, as variational score distillation does (Wang et al. 2023, ProlificDreamer, section 4).
One copy
of the base weights serves both: inside `active()` the adapters and the embedding are on, outside the
network is
the teacher, bit for bit. Both start as the identity, so before training fake and teacher agree exactly.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from uni3d.diffusion.stable_diffusion import LatentDiffusionTeacher

ADAPTER_NAME = "fake_score"
ATTENTION_PROJECTIONS = ("to_q", "to_k", "to_v", "to_out.0")


class CameraEmbedding(nn.Module):
    """Camera [B, K] -> an addition to the time embedding [B, E]; zero before training."""

    def __init__(self, conditioning_dim: int, embedding_dim: int, hidden_dim: int = 256) -> None:
        super().__init__()
        self.expand = nn.Linear(conditioning_dim, hidden_dim)
        self.project = nn.Linear(hidden_dim, embedding_dim)
        nn.init.zeros_(self.project.weight)
        nn.init.zeros_(self.project.bias)

    def forward(self, conditioning: Tensor) -> Tensor:
        """Map `Cameras.conditioning()` float [B, K] to [B, E]."""
        return self.project(nn.functional.silu(self.expand(conditioning)))


class LoRAFakeScore:
    """D_fake(x, sigma, context, camera) -> x0 on the base weights of `teacher`.

    Args:
        rank: of the low-rank update of every attention projection.
        conditioning_dim: length of the camera vector.
        generator: draws the adapters' initial weights, so that a seed fixes the run.
    """

    def __init__(
        self,
        teacher: LatentDiffusionTeacher,
        *,
        rank: int = 4,
        conditioning_dim: int = 5,
        generator: torch.Generator | None = None,
    ) -> None:
        from peft import LoraConfig

        self.teacher = teacher
        config = LoraConfig(
            r=rank, lora_alpha=rank, target_modules=list(ATTENTION_PROJECTIONS), init_lora_weights=True
        )
        if ADAPTER_NAME in getattr(teacher.unet, "peft_config", {}):
            teacher.unet.delete_adapters(ADAPTER_NAME)
        teacher.unet.add_adapter(config, adapter_name=ADAPTER_NAME)
        self._adapters = {
            name: parameter
            for name, parameter in teacher.unet.named_parameters()
            if f".{ADAPTER_NAME}." in name
        }
        for name, parameter in self._adapters.items():
            if "lora_A" in name:
                bound = 1 / parameter.shape[1] ** 0.5
                drawn = torch.rand(parameter.shape, generator=generator) * 2 - 1
                parameter.data.copy_(drawn * bound)
            parameter.requires_grad_(True)
        embedding_dim = teacher.unet.config.block_out_channels[0] * 4
        self.camera_embedding = CameraEmbedding(conditioning_dim, embedding_dim)
        for parameter in self.camera_embedding.expand.parameters():
            bound = 1 / conditioning_dim**0.5
            parameter.data.copy_((torch.rand(parameter.shape, generator=generator) * 2 - 1) * bound)
        self.camera_embedding.to(teacher.device)
        self._switch(False)

    def parameters(self) -> list[nn.Parameter]:
        """Everything the fake score trains: adapters and camera embedding."""
        return [*self._adapters.values(), *self.camera_embedding.parameters()]

    def state_dict(self) -> dict[str, Tensor]:
        """Adapter and camera-embedding tensors by name; a few MB for Stable Diffusion at rank 4."""
        state = {f"adapter.{name}": parameter.detach() for name, parameter in self._adapters.items()}
        state.update(
            {f"camera.{name}": tensor for name, tensor in self.camera_embedding.state_dict().items()}
        )
        return state

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Restore what `state_dict` gave; raises KeyError when a tensor is missing."""
        for name, parameter in self._adapters.items():
            parameter.copy_(state[f"adapter.{name}"])
        prefix = "camera."
        camera = {name[len(prefix) :]: tensor for name, tensor in state.items() if name.startswith(prefix)}
        self.camera_embedding.load_state_dict(camera)

    def remove(self) -> None:
        """Take the adapters off the teacher's network again."""
        self.teacher.unet.delete_adapters(ADAPTER_NAME)

    @contextmanager
    def active(self, conditioning: Tensor) -> Iterator[Any]:
        """Within the block the shared network is the fake score for these cameras, float [B, K]."""
        unet = self.teacher.unet
        added = self.camera_embedding(conditioning.to(self.teacher.device)).to(self.teacher.dtype)
        handle = unet.time_embedding.register_forward_hook(lambda _module, _inputs, output: output + added)
        self._switch(True)
        try:
            yield unet
        finally:
            handle.remove()
            self._switch(False)

    def predict_x0(self, x: Tensor, sigma: Tensor, context: Tensor, conditioning: Tensor) -> Tensor:
        """The student's x0-prediction, float32 [B, C, H, W]; arguments as
        `LatentDiffusionTeacher.predict_x0`."""
        with self.active(conditioning):
            return self.teacher.predict_x0(x, sigma, context)

    def _switch(self, enabled: bool) -> None:
        # peft clears requires_grad of adapters it disables; the optimiser's parameters must keep theirs.
        if enabled:
            self.teacher.unet.enable_adapters()
        else:
            self.teacher.unet.disable_adapters()
        for parameter in self._adapters.values():
            parameter.requires_grad_(True)
