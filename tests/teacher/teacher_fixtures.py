"""Views of coloured squares and discs, and settings small enough for one core."""

from __future__ import annotations

import numpy as np

from uni3d.data.colours import COLOUR_WORDS
from uni3d.data.view_shards import ViewRecord, Views
from uni3d.teacher.settings import AutoencoderConfig, DenoiserConfig, TeacherConfig, TeacherDataConfig

SIZE = 16


def toy_views(num_assets: int = 12, views_per_asset: int = 4) -> Views:
    """Squares ("chair") and discs ("vase") in the middle of the frame, half of them red, half blue."""
    rows, columns = np.mgrid[:SIZE, :SIZE]
    disc = (rows - 7.5) ** 2 + (columns - 7.5) ** 2 < 30
    square = (abs(rows - 7.5) < 5) & (abs(columns - 7.5) < 5)
    images, masks, records = [], [], []
    for asset in range(num_assets):
        noun, shape = ("chair", square) if asset % 3 else ("vase", disc)
        word = "red" if asset % 2 else "blue"
        colour = COLOUR_WORDS[word][0]
        rgba = np.zeros((SIZE, SIZE, 4), np.uint8)
        rgba[..., :3] = np.round(np.array(colour) * 255)
        rgba[..., 3] = shape * 255
        for view in range(views_per_asset):
            images.append(rgba)
            masks.append((shape * 255).astype(np.uint8))
            records.append(
                ViewRecord(
                    asset_id=f"asset{asset:02d}", name=noun, noun=noun, category="toy", colours=(word,),
                    materials=(), tags=(), main_colour=colour, role="teacher", source="test", creator="test",
                    licence="CC0", azimuth_deg=-180 + 360 * (view + 0.5) / views_per_asset,
                    elevation_deg=10.0, radius=2.4, fov_y_deg=40.0,
                )
            )  # fmt: skip
    return Views(np.stack(images), np.stack(masks), records)


def tiny_config(**changes: object) -> TeacherConfig:
    """A whole training in a few seconds, counted in steps so that it is repeatable."""
    denoiser = DenoiserConfig(
        block_out_channels=(16, 32), attention_heads=(1, 1), layers_per_block=1, norm_num_groups=4,
        context_dim=16, context_length=32, text_layers=1, text_heads=2, batch_size=8, planned_minutes=None,
        planned_steps=6, latent_reuse=2, latent_pool=16, warmup_steps=2, accumulate_steps=2,
    )  # fmt: skip
    autoencoder = AutoencoderConfig(
        image_size=SIZE, block_out_channels=(8, 16), norm_num_groups=4, batch_size=8, planned_minutes=None,
        planned_steps=4, crop_size=8,
    )  # fmt: skip
    settings: dict[str, object] = {
        "device": "cpu", "grid_prompts": ("a red chair",), "num_sampling_steps": 2, "max_file_mib": 0.25,
        "data": TeacherDataConfig(caption_variants=4, recolour_caption_variants=3, heldout_assets=1),
        "autoencoder": autoencoder, "denoiser": denoiser,
    }  # fmt: skip
    return TeacherConfig(**{**settings, **changes})  # type: ignore[arg-type]
