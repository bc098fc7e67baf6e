"""Views sampled from an embedded teacher, and grids of them to look at.

Legend: B images, H W pixels.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from PIL import Image, ImageDraw
from torch import Tensor
from torch.nn import functional

from uni3d.diffusion.camera_token import CameraToken, insert_camera_token
from uni3d.diffusion.latent_teacher import LatentDiffusionTeacher
from uni3d.errors import MissingWeightsError
from uni3d.scene.camera import Cameras
from uni3d.teacher.denoiser import build_scheduler
from uni3d.teacher.tokenizer import token_ids
from uni3d.training.checkpoint import atomic_write

if TYPE_CHECKING:
    from diffusers import (
        AutoencoderKL,  # pyright: ignore[reportPrivateImportUsage]
        UNet2DConditionModel,  # pyright: ignore[reportPrivateImportUsage]
    )
    from transformers import CLIPTextModel, CLIPTokenizer


@dataclass(frozen=True)
class TeacherModules:
    """The parts of an embedded teacher. Networks may be in any float format, all on one device."""

    autoencoder: AutoencoderKL
    unet: UNet2DConditionModel
    text_encoder: CLIPTextModel
    camera_token: CameraToken
    tokenizer: CLIPTokenizer


@dataclass(frozen=True)
class GridView:
    """One column of a sample grid; without angles the camera token is left out."""

    label: str
    word: str
    azimuth_deg: float | None = None
    elevation_deg: float = 15.0


GRID_VIEWS = (
    GridView("front 0", "front", 0.0),
    GridView("side 90", "side", 90.0),
    GridView("back 180", "back", 180.0),
    GridView("side -90", "side", -90.0),
    GridView("front -40", "front", -40.0, 30.0),
    GridView("overhead", "overhead", 0.0, 75.0),
    GridView("words: front", "front"),
    GridView("words: side", "side"),
)


def load_teacher(
    folder: str | os.PathLike[str],
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> TeacherModules:
    """Read a published teacher folder. Raises MissingWeightsError when a part of it is missing, and what
    `LatentDiffusionTeacher.from_pretrained` raises."""
    source = Path(folder)
    for path in (source, source / "camera_token"):
        if not path.is_dir():
            raise MissingWeightsError(
                f"there is no folder '{path}'; pass a teacher written by `uni3d teacher train`"
            )
    teacher = LatentDiffusionTeacher.from_pretrained(source, device=device, dtype=dtype)
    assert teacher.camera_token is not None
    return TeacherModules(
        autoencoder=teacher.vae,
        unet=teacher.network,
        text_encoder=teacher.text_encoders[0],
        camera_token=teacher.camera_token,
        tokenizer=teacher.tokenizers[0],
    )


@torch.no_grad()
def sample_views(
    teacher: TeacherModules | str | os.PathLike[str],
    prompts: Sequence[str],
    cameras: Cameras | None = None,
    *,
    negative_prompt: str = "",
    guidance_scale: float = 5.0,
    num_steps: int = 25,
    seed: int = 0,
    batch_size: int = 128,
    scheduler: Literal["dpm", "ddim"] = "dpm",
    camera_in_negative: bool = False,
) -> Tensor:
    """Sample one image per prompt, float32 [B, 3, H, W] in [0, 1] on the CPU.

    Args:
        teacher: its modules, or the folder of a published one.
        prompts: B captions, view words included ("a red chair, front view").
        cameras: B cameras, or None to leave the camera token out.
        guidance_scale: classifier-free guidance; 1 samples without.
        num_steps: denoising steps.
        seed: image i starts from noise of (seed, i), whatever the batch size.
        scheduler: "dpm" is DPM-Solver++ of second order, "ddim" is DDIM.
        camera_in_negative: give the unguided half the camera too, so that guidance amplifies the text alone;
            without it guidance sharpens the view as well, as it does in text to 3D (`PromptContexts`).
    """
    modules = teacher if isinstance(teacher, TeacherModules) else load_teacher(teacher)
    images = []
    for start in range(0, len(prompts), batch_size):
        stop = min(start + batch_size, len(prompts))
        noise = torch.stack([_start_noise(modules, seed, index) for index in range(start, stop)])
        images.append(
            _sample_batch(
                modules,
                list(prompts[start:stop]),
                None if cameras is None else cameras[slice(start, stop)],
                noise=noise,
                negative_prompt=negative_prompt,
                guidance_scale=guidance_scale,
                num_steps=num_steps,
                scheduler=scheduler,
                camera_in_negative=camera_in_negative,
            )
        )
    return torch.cat(images)


def _start_noise(modules: TeacherModules, seed: int, index: int) -> Tensor:
    size = int(modules.unet.config["sample_size"])
    shape = (int(modules.unet.config["in_channels"]), size, size)
    generator = torch.Generator().manual_seed(seed * 1_000_003 + index)
    return torch.randn(shape, generator=generator)


def _sample_batch(
    modules: TeacherModules,
    prompts: list[str],
    cameras: Cameras | None,
    *,
    noise: Tensor,
    negative_prompt: str,
    guidance_scale: float,
    num_steps: int,
    scheduler: Literal["dpm", "ddim"],
    camera_in_negative: bool,
) -> Tensor:
    weight = next(modules.unet.parameters())
    context = _context(modules, prompts, cameras)
    is_guided = guidance_scale != 1.0
    if is_guided:
        negative_cameras = cameras if camera_in_negative else None
        negative = _context(modules, [negative_prompt] * len(prompts), negative_cameras)
        context = torch.cat([negative, context])
    stepper = _stepper(scheduler)
    stepper.set_timesteps(num_steps, device=weight.device)
    latents = noise.to(weight.device) * stepper.init_noise_sigma
    for timestep in stepper.timesteps:
        inputs = torch.cat([latents, latents]) if is_guided else latents
        inputs = stepper.scale_model_input(inputs, timestep).to(weight.dtype)
        output = modules.unet(inputs, timestep, context, return_dict=False)[0].float()
        if is_guided:
            without, with_text = output.chunk(2)
            output = without + guidance_scale * (with_text - without)
        latents = stepper.step(output, timestep, latents, return_dict=False)[0]
    return _decode(modules, latents / float(modules.autoencoder.config["scaling_factor"]))


@torch.no_grad()
def reconstruct_views(teacher: TeacherModules, images: Tensor) -> Tensor:
    """`images` [B, 3, H, W] in [0, 1] to latents and back: float32 [B, 3, S, S] in [0, 1] on the CPU, at the
    teacher's own size S."""
    side = int(teacher.autoencoder.config["sample_size"])
    if images.shape[-2:] != (side, side):
        images = functional.interpolate(images, (side, side), mode="bilinear", antialias=True)
    weight = next(teacher.autoencoder.parameters())
    posterior = teacher.autoencoder.encode((2 * images - 1).to(weight), return_dict=False)[0]
    return _decode(teacher, posterior.mode())


def _decode(modules: TeacherModules, latents: Tensor) -> Tensor:
    """Images [B, 3, H, W] in [0, 1] on the CPU of unscaled latents."""
    decode: Any = modules.autoencoder.decode
    images = decode(latents.to(next(modules.autoencoder.parameters()).dtype), return_dict=False)[0]
    return (images.float() / 2 + 0.5).clamp(0, 1).cpu()


def _stepper(kind: Literal["dpm", "ddim"]) -> Any:
    scheduler = build_scheduler()
    if kind == "ddim":
        return scheduler
    from diffusers import DPMSolverMultistepScheduler  # pyright: ignore[reportPrivateImportUsage]

    return DPMSolverMultistepScheduler.from_config(scheduler.config, algorithm_type="dpmsolver++")


def _context(modules: TeacherModules, prompts: list[str], cameras: Cameras | None) -> Tensor:
    """Text context [B, L, E] with the camera token in its last place when cameras are given."""
    device = next(modules.unet.parameters()).device
    ids = torch.from_numpy(token_ids(modules.tokenizer, prompts)).long().to(device)
    context = modules.text_encoder(input_ids=ids).last_hidden_state
    if cameras is not None:
        context = insert_camera_token(context, modules.camera_token(cameras.conditioning()))
    return context


def sample_grid(
    teacher: TeacherModules | str | os.PathLike[str],
    prompts: Sequence[str],
    path: str | os.PathLike[str],
    *,
    views: Sequence[GridView] = GRID_VIEWS,
    guidance_scale: float = 5.0,
    num_steps: int = 25,
    seed: int = 0,
    batch_size: int = 128,
) -> Path:
    """Write a labelled PNG with a row per prompt and a column per view; returns its path."""
    modules = teacher if isinstance(teacher, TeacherModules) else load_teacher(teacher)
    columns: list[list[Tensor]] = []
    for view in views:
        cameras = None
        if view.azimuth_deg is not None:
            num = len(prompts)
            cameras = Cameras.from_lists([view.azimuth_deg] * num, [view.elevation_deg] * num)
        images = sample_views(
            modules,
            [f"{prompt}, {view.word} view" for prompt in prompts],
            cameras,
            guidance_scale=guidance_scale,
            num_steps=num_steps,
            seed=seed,
            batch_size=batch_size,
        )
        columns.append(list(images))
    rows = [[column[row] for column in columns] for row in range(len(prompts))]
    picture = labelled_grid(rows, row_labels=list(prompts), column_labels=[view.label for view in views])
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    return atomic_write(path, lambda temporary: picture.save(temporary))


def labelled_grid(
    rows: Sequence[Sequence[Tensor]], *, row_labels: Sequence[str], column_labels: Sequence[str]
) -> Image.Image:
    """Images [3, H, W] in [0, 1] as one picture, row labels above each row and column labels on top."""
    height, width = rows[0][0].shape[-2:]
    header, caption = 14, 14
    canvas = Image.new("RGB", (width * len(column_labels), header + (height + caption) * len(rows)), "white")
    pen = ImageDraw.Draw(canvas)
    for column, label in enumerate(column_labels):
        pen.text((column * width + 3, 1), label, fill="black")
    for row, (images, label) in enumerate(zip(rows, row_labels, strict=True)):
        top = header + row * (height + caption)
        pen.text((3, top + 1), label, fill="black")
        for column, image in enumerate(images):
            pixels = (image.permute(1, 2, 0) * 255).round().to(torch.uint8).numpy()
            canvas.paste(Image.fromarray(pixels), (column * width, top + caption))
    return canvas
