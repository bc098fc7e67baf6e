"""The fake score: low-rank adapters on a denoising network, told the camera.

The student's score is estimated by the teacher's network plus LoRA (Hu et al. 2021) and a camera embedding
added to the time embedding, as variational score distillation does (Wang et al. 2023, ProlificDreamer,
section 4). One copy of the base weights serves both: while the fake score predicts, the adapters and the
embedding are on, at all other times the network is the teacher, bit for bit. Both start as the identity, so
before training fake and teacher agree exactly. The base may also be another model of the same latents and
text, as in ProlificDreamer, where it predicts v and the teacher eps.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from uni3d.diffusion.camera_token import CONDITIONING_DIM
from uni3d.diffusion.latent_teacher import LatentDiffusionTeacher
from uni3d.errors import UsageError

ADAPTER_NAME = "fake_score"
POSE_DIM = 16
CameraInput = Literal["conditioning", "pose"]


class CameraEmbedding(nn.Module):
    """Camera [B, K] -> an addition to the time embedding [B, T]; zero before training."""

    def __init__(self, conditioning_dim: int, embedding_dim: int, hidden_dim: int = 256) -> None:
        super().__init__()
        self.expand = nn.Linear(conditioning_dim, hidden_dim)
        self.project = nn.Linear(hidden_dim, embedding_dim)
        nn.init.zeros_(self.project.weight)
        nn.init.zeros_(self.project.bias)

    def forward(self, conditioning: Tensor) -> Tensor:
        """Map a camera, float [B, K], to [B, T]."""
        return self.project(nn.functional.silu(self.expand(conditioning)))


class LoRAFakeScore:
    """D_fake(x, sigma, context, camera) -> x0 on the base weights of `teacher`.

    Args:
        teacher: whose network carries the adapters.
        rank: of the low-rank update of every attention projection.
        camera_input: "conditioning" is `Cameras.conditioning()` through 256 units; "pose" the 4 x 4
            camera-to-world matrix through as many units as the time embedding has, as in ProlificDreamer.
        generator: draws the adapters' initial weights, so that a seed fixes the run.
    """

    def __init__(
        self,
        teacher: LatentDiffusionTeacher,
        *,
        rank: int = 4,
        camera_input: CameraInput = "conditioning",
        generator: torch.Generator | None = None,
    ) -> None:
        from peft import LoraConfig
        from peft.tuners.tuners_utils import BaseTunerLayer

        self.teacher = teacher
        self.camera_input = camera_input
        config = LoraConfig(
            r=rank,
            lora_alpha=rank,
            target_modules=list(teacher.attention_projections),
            init_lora_weights=True,
        )
        network = teacher.network
        if ADAPTER_NAME in getattr(network, "peft_config", {}):
            network.delete_adapters(ADAPTER_NAME)
        network.add_adapter(config, adapter_name=ADAPTER_NAME)
        self._layers: list[Any] = [part for part in network.modules() if isinstance(part, BaseTunerLayer)]
        if teacher.dtype != torch.float32:
            for layer in self._layers:
                layer.forward = partial(_half_precision_forward, layer)
        self._adapters = {
            name: parameter for name, parameter in network.named_parameters() if f".{ADAPTER_NAME}." in name
        }
        for name, parameter in self._adapters.items():
            # In half precision the steps of an optimiser would be rounded away.
            parameter.data = parameter.data.float()
            if "lora_A" in name:
                bound = 1 / parameter.shape[1] ** 0.5
                drawn = torch.rand(parameter.shape, generator=generator) * 2 - 1
                parameter.data.copy_(drawn * bound)
            parameter.requires_grad_(True)
        self.camera_embedding = self._build_camera_embedding(generator).to(teacher.device)
        self._switch(False)
        teacher.network_changed()

    def _build_camera_embedding(self, generator: torch.Generator | None) -> CameraEmbedding:
        width = self.teacher.time_embedding_width
        is_pose = self.camera_input == "pose"
        input_dim, hidden_dim = (POSE_DIM, width) if is_pose else (CONDITIONING_DIM, 256)
        embedding = CameraEmbedding(input_dim, width, hidden_dim)
        for parameter in embedding.expand.parameters():
            bound = 1 / input_dim**0.5
            parameter.data.copy_((torch.rand(parameter.shape, generator=generator) * 2 - 1) * bound)
        return embedding

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
        """Take the adapters off the network again."""
        self.teacher.network.delete_adapters(ADAPTER_NAME)
        self.teacher.network_changed()

    def predict_x0(
        self,
        x: Tensor,
        sigma: Tensor,
        context: Tensor,
        conditioning: Tensor,
        *,
        knows_camera: Tensor | None = None,
    ) -> Tensor:
        """The student's x0-prediction, float32 [B, C, H, W]; arguments as `LatentDiffusionTeacher.denoise`.

        Args:
            conditioning: `Cameras.conditioning()`, float [B, 5].
            knows_camera: bool [B], False hides the camera of a sample; None: all are known.
        """
        camera = conditioning.to(self.teacher.device)
        if self.camera_input == "pose":
            camera = pose_matrix(camera).flatten(1)
        if knows_camera is not None:
            camera = camera * knows_camera.to(camera)[:, None]
        with self._active():
            return self.teacher.denoise(x, sigma, context, self.camera_embedding(camera)).x0

    @contextmanager
    def _active(self) -> Iterator[None]:
        self._switch(True)
        try:
            yield
        finally:
            self._switch(False)

    def _switch(self, enabled: bool) -> None:
        # Not by peft's enable_adapters, which goes through all modules, milliseconds at every step, and
        # clears requires_grad of the optimiser's parameters.
        for layer in self._layers:
            layer._disable_adapters = not enabled


def _half_precision_forward(layer: Any, x: Tensor) -> Tensor:
    """What a layer of peft computes of x [..., I], in the network's precision: the weights are rounded for
    the pass, where peft would carry the activations to float32 and back, in three times as many kernels."""
    result = layer.base_layer(x)
    if layer.disable_adapters:
        return result
    down, up = layer.lora_A[ADAPTER_NAME].weight.to(x.dtype), layer.lora_B[ADAPTER_NAME].weight.to(x.dtype)
    rows = x.flatten(0, -2) @ down.t()
    return torch.addmm(result.flatten(0, -2), rows, up.t()).view_as(result)


def check_fake_base(teacher: LatentDiffusionTeacher, base: LatentDiffusionTeacher) -> None:
    """Raise UsageError unless `base` can carry the fake score of `teacher`: same latents, same text."""
    reasons = []
    if base.latent_shape[0] != teacher.latent_shape[0]:
        reasons.append(f"{base.latent_shape[0]} latent channels instead of {teacher.latent_shape[0]}")
    if base.context_width != teacher.context_width:
        reasons.append(f"text of {base.context_width} channels instead of {teacher.context_width}")
    if base.vae.config.scaling_factor != teacher.vae.config.scaling_factor:
        reasons.append("another scale of its latents")
    if type(base) is not type(teacher):
        reasons.append("another class of network")
    if reasons:
        raise UsageError(
            f"'{base.name}' cannot carry the fake score of teacher '{teacher.name}': it has "
            f"{' and '.join(reasons)}; choose a model of the same family, or leave fake_score.base out"
        )


def pose_matrix(conditioning: Tensor) -> Tensor:
    """The camera-to-world matrix [B, 4, 4] of `Cameras.conditioning()` [B, 5].

    Lengths are in half frame heights at the object: a network sees apparent size, not distance.
    """
    sin_azimuth, cos_azimuth, sin_elevation, cos_elevation, size = conditioning.unbind(dim=-1)
    zero, one = torch.zeros_like(size), torch.ones_like(size)
    right = torch.stack([cos_azimuth, zero, -sin_azimuth], dim=-1)
    backward = torch.stack([cos_elevation * sin_azimuth, sin_elevation, cos_elevation * cos_azimuth], dim=-1)
    up = torch.linalg.cross(backward, right)
    position = backward * torch.exp(-size)[:, None]
    upper = torch.stack([right, up, backward, position], dim=-1)
    return torch.cat([upper, torch.stack([zero, zero, zero, one], dim=-1)[:, None]], dim=1)
