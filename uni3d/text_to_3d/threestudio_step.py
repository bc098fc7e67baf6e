"""A VSD step structured as threestudio structures it, to measure this project's step against.

Written anew from a description of that structure: float16 networks run operation by operation, one for the
teacher and another for the LoRA score, asked one after the other; the LoRA score evaluated for [camera, no
camera] though its guidance is 1; a separate forward pass to train it; softmax attention written out in the
LoRA network; float32 networks in the field; an occupancy grid of 32^3 cells; rays made on the CPU; one AdamW.
Not re-created: the kernels of tiny-cuda-nn and nerfacc, for which uni3d's hash grid and renderer stand.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from uni3d.scene.backends import choose_encoding_backend
from uni3d.scene.camera import Cameras, sample_orbit_cameras
from uni3d.scene.occupancy import OccupancyGrid
from uni3d.scene.radiance_field import RadianceField
from uni3d.scene.renderer import render
from uni3d.text_to_3d.random_teacher import random_teacher

LORA_RANK = 4
OCCUPANCY_CELLS = 32
OCCUPANCY_INTERVAL = 16
GUIDANCE_SCALE = 7.5
ADAPTER = "lora"


class ThreestudioStep:
    """One scene, two networks, one optimiser. Calling it takes a step.

    Args:
        shapes: of the networks, see `random_teacher`.
        resolution: side of the render in pixels.
        samples_per_ray: across the field's cube.
    """

    def __init__(
        self, *, shapes: str, device: torch.device, resolution: int, samples_per_ray: int = 512
    ) -> None:
        from diffusers.models.attention_processor import AttnProcessor
        from peft import LoraConfig

        half = torch.float16 if device.type == "cuda" else torch.float32
        self.device, self.dtype, self.resolution = device, half, resolution
        self.samples_per_ray = samples_per_ray
        self.teacher = random_teacher(shapes, device=device, dtype=half)
        self.lora = random_teacher(shapes, device=device, dtype=half, prediction_type="v_prediction")
        network: Any = self.lora.network
        network.set_attn_processor(AttnProcessor())  # softmax(q k) v written out
        targets = list(self.lora.attention_projections)
        network.add_adapter(LoraConfig(r=LORA_RANK, target_modules=targets), adapter_name=ADAPTER)
        self._adapters = [p for name, p in network.named_parameters() if ".lora_" in name]
        for parameter in self._adapters:
            parameter.data = parameter.data.float()
        width = self.lora.time_embedding_width
        self.camera_embedding = nn.Sequential(nn.Linear(16, width), nn.SiLU(), nn.Linear(width, width))
        self.camera_embedding.to(device)
        encoding = "hash" if shapes == "sd21" else "dense"
        look_up = choose_encoding_backend("auto", device, is_hashed=encoding == "hash").name
        self.field = RadianceField(encoding=encoding, resolutions=(24, 48), encoding_backend=look_up).to(
            device
        )
        self.occupancy = OccupancyGrid(resolution=OCCUPANCY_CELLS).to(device)
        trained = [*self.field.parameters(), *self._adapters, *self.camera_embedding.parameters()]
        self.optimiser = torch.optim.AdamW(trained, lr=1e-3, betas=(0.9, 0.99), eps=1e-15)
        self.alphas = 1 / (1 + self.teacher.schedule.sigma(torch.arange(1000.0)).square()).to(device)
        self.contexts = self.teacher.encode_text(["conditional", "unconditional"])
        self.step_index = 0

    def __call__(self) -> None:
        """Render, distil, train the LoRA, move everything."""
        if self.step_index % OCCUPANCY_INTERVAL == 0:
            self.occupancy.update(self.field)
        cameras = sample_orbit_cameras(1)
        image = self._render(cameras)
        pose = torch.eye(4, device=self.device).flatten()[None]
        latents = self.teacher.encode_images(image)
        loss = self._student_loss(latents, pose) + self._lora_loss(latents.detach(), pose)
        self.optimiser.zero_grad()
        loss.backward()
        self.optimiser.step()
        self.step_index += 1

    def _render(self, cameras: Cameras) -> Tensor:
        rays = [part.to(self.device) for part in cameras.rays(self.resolution, self.resolution)]
        del rays  # made on the CPU and copied, as there; the renderer makes its own beside them
        return render(
            self.field,
            cameras.to(self.device),
            self.resolution,
            self.resolution,
            0.5,
            num_samples=self.samples_per_ray,
            occupancy=self.occupancy,
        ).image

    def _student_loss(self, latents: Tensor, pose: Tensor) -> Tensor:
        with torch.no_grad():
            timestep = torch.randint(20, 981, (1,), device=self.device)
            noise = torch.randn_like(latents)
            alpha = self.alphas[timestep].sqrt()[:, None, None, None]
            std = (1 - alpha.square()).sqrt()
            noisy = alpha * latents + std * noise
            twice = torch.cat([noisy] * 2).to(self.dtype)
            conditional, unconditional = self.teacher.network(
                twice, torch.cat([timestep] * 2), encoder_hidden_states=self.contexts
            ).sample.float().chunk(2)  # fmt: skip
            teacher = unconditional + GUIDANCE_SCALE * (conditional - unconditional)
            poses = torch.cat([pose, torch.zeros_like(pose)])
            velocity = self._lora_pass(twice, torch.cat([timestep] * 2), poses)
            scores = std * torch.cat([noisy] * 2) + alpha * velocity
            with_camera, without = scores.chunk(2)
            student = without + 1.0 * (with_camera - without)
            gradient = torch.nan_to_num(std.square() * (teacher - student))
            target = latents - gradient
        return 0.5 * nn.functional.mse_loss(latents, target, reduction="sum")

    def _lora_loss(self, latents: Tensor, pose: Tensor) -> Tensor:
        timestep = torch.randint(0, 1000, (1,), device=self.device)
        noise = torch.randn_like(latents)
        alpha = self.alphas[timestep].sqrt()[:, None, None, None]
        std = (1 - alpha.square()).sqrt()
        noisy = (alpha * latents + std * noise).to(self.dtype)
        if bool(torch.rand(()) < 0.1):
            pose = torch.zeros_like(pose)
        velocity = self._lora_pass(noisy, timestep, pose)
        return nn.functional.mse_loss(velocity, alpha * noise - std * latents)

    def _lora_pass(self, noisy: Tensor, timestep: Tensor, pose: Tensor) -> Tensor:
        context = self.contexts[:1].expand(noisy.shape[0], -1, -1)
        addition = self.camera_embedding(pose).to(self.dtype)
        return self.lora.eager_pass(noisy, timestep, context, addition)[0].float()
