"""Where colours start: a field in the colour that the teacher's samples show
(`sampled_colour`), a new texture in its own pictures of the mesh, painted on before the first step.

    views of the mesh -> noise -> the teacher denoises them towards the prompt -> colours fitted to them

Twice: from much noise for the one colour that the object as a whole takes (`typical_colour`), whatever shape
the pictures have, and then from less for what is where on this shape (`fit_colours`). In one go a teacher
would leave grey what it was shown grey, each view in other places. Views that still disagree meet in the
middle: good enough to begin with, whatever recipe goes on from there.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from uni3d.diffusion.prompt import PromptContexts
from uni3d.mesh.source_colour import COLOUR_MARGIN
from uni3d.mesh.surface_renderer import SurfaceColour, SurfaceRenderer
from uni3d.random_streams import Streams
from uni3d.scene.camera import Cameras
from uni3d.training.guidance import RealLatents

# Grey behind the object, as in the pictures that are judged.
BACKGROUND = 0.7
# A picture's pixels that differ more from its rim, in any channel, show the object.
BACKGROUND_TOLERANCE = 0.08
# Teacher passes in one batch.
BATCH_SIZE = 4
NUM_DENOISING_STEPS = 8
NUM_LOOKED_AT = 8
NUM_FIT_STEPS = 80
# Sets the error against the smoothness of the colours.
FIT_WEIGHT = 3.0
FIT_LEARNING_RATE = 0.05


@torch.no_grad()
def teacher_pictures(
    contexts: PromptContexts,
    images: Tensor,
    cameras: Cameras,
    *,
    noise_level: float,
    guidance_scale: float,
    generator: Streams,
    before_step: Callable[[], object] | None = None,
) -> Tensor:
    """What the teacher makes of `images` [B, 3, H, W] in [0, 1] once they are drowned in noise up to the
    fraction `noise_level` of its timesteps: pictures [B, 3, h, w] in [0, 1] for the prompt."""
    teacher = contexts.teacher
    conditioning, words = cameras.conditioning(), cameras.view_words()
    pictures = []
    for first in range(0, len(images), BATCH_SIZE):
        part = slice(first, first + BATCH_SIZE)
        context = contexts.conditional(words[part], conditioning[part])
        latents = teacher.sample(
            context,
            contexts.unconditional(len(context)),
            guidance_scale=guidance_scale,
            num_steps=NUM_DENOISING_STEPS,
            start=teacher.encode_images(images[part]),
            noise_level=noise_level,
            generator=generator,
            before_step=before_step,
        )
        pictures.append(teacher.decode_latents(latents))
    return torch.cat(pictures)


def object_pixels(pictures: Tensor) -> Tensor:
    """Where `pictures` [B, 3, H, W] in [0, 1] show something before the plain colour of their rims: bool
    [B, 1, H, W]. Teachers choose the lightness of a background themselves."""
    sides = [pictures[:, :, 0], pictures[:, :, -1], pictures[:, :, :, 0], pictures[:, :, :, -1]]
    background = torch.cat(sides, dim=2).median(dim=2).values[:, :, None, None]
    return (pictures - background).abs().amax(dim=1, keepdim=True) > BACKGROUND_TOLERANCE


def typical_colour(images: Tensor, shown: Tensor) -> Tensor | None:
    """The middle colour, channel by channel, of the pixels `shown` [B, 1, H, W] of `images` [B, 3, H, W] in
    [0, 1], as logits float32 [3]; None where nothing is shown."""
    pixels = images.movedim(1, -1)[shown[:, 0]]
    return torch.logit(pixels.median(dim=0).values, eps=COLOUR_MARGIN) if len(pixels) else None


def sampled_colour(
    contexts: PromptContexts,
    samples: RealLatents | None,
    *,
    cameras: Callable[[int, torch.Generator], Cameras],
    guidance_scale: float,
    seed: int,
    before_step: Callable[[], object] | None = None,
) -> Tensor | None:
    """`typical_colour` of the object in the teacher's samples for a prompt; none if they show no object.

    Args:
        samples: those that there are; a few are drawn where there are none.
        cameras: draws so many cameras for them.
        seed: of what is drawn, which takes nothing from other streams.
        before_step: see `teacher_pictures`.
    """
    teacher = contexts.teacher
    if samples is None:
        generator = torch.Generator().manual_seed(seed)
        drawn = cameras(max(BATCH_SIZE, teacher.views_per_group), generator)
        samples = RealLatents.draw(
            contexts,
            drawn.conditioning(),
            drawn.view_words(),
            guidance_scale=guidance_scale,
            num_steps=NUM_DENOISING_STEPS,
            generator=generator,
            before_step=before_step,
        )
    pictures = teacher.decode_latents(samples.latents[:NUM_LOOKED_AT])
    return typical_colour(pictures, object_pixels(pictures))


def fit_colours(
    parameters: list[nn.Parameter],
    renderer: SurfaceRenderer,
    colour: SurfaceColour,
    cameras: Cameras,
    pictures: Tensor,
    smoothness: Callable[[], Tensor],
) -> None:
    """Move `parameters` so that the mesh in `colour` looks from `cameras` as in `pictures` [B, 3, H, W], one
    view after the other.

    What a picture shows beside the mesh, and its background on the mesh, count for nothing. The error is
    absolute, so that where pictures disagree, most of them win.
    """
    shown = object_pixels(pictures)
    optimiser = torch.optim.Adam(parameters, lr=FIT_LEARNING_RATE, betas=(0.9, 0.99), eps=1e-15, fused=True)
    for step in range(NUM_FIT_STEPS):
        index = step % len(cameras)
        view = slice(index, index + 1)
        seen = renderer.render(cameras[view], pictures.shape[-1], BACKGROUND, colour=colour)
        opacity = seen.opacity.detach()
        error = (opacity * shown[view] * (seen.image - pictures[view])).abs().sum()
        loss = FIT_WEIGHT * error / opacity.sum().clamp(min=1.0) + smoothness()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
