"""Tokenizer, batches, autoencoder arithmetic, camera token, mixed precision: each against a known answer."""

from __future__ import annotations

import dataclasses
import math
import re
from pathlib import Path

import pytest
import torch
from teacher_fixtures import SIZE, tiny_config, toy_views
from torch import nn

from uni3d.data.colours import nearest_colour_word
from uni3d.diffusion.camera_token import CameraToken, insert_camera_token
from uni3d.errors import MissingWeightsError, UsageError
from uni3d.scene.camera import Cameras
from uni3d.teacher.autoencoder import (
    autoencoder_loss,
    build_autoencoder,
    reconstruction_metrics,
    whiten_latents,
)
from uni3d.teacher.denoiser import build_scheduler, build_text_encoder, learning_rate
from uni3d.teacher.settings import DenoiserConfig
from uni3d.teacher.tokenizer import is_known, token_ids, train_tokenizer, words_of
from uni3d.teacher.trainable import Trainable
from uni3d.teacher.view_batches import (
    ViewBatch,
    ViewPool,
    ViewSampler,
    balanced_weights,
    build_view_pool,
    collect_captions,
    tokenizer_for,
)

WORDS = words_of(["a red wooden chair, front view", "an armchair", "chairs", "side back overhead"])


def test_known_words_are_one_token_and_others_fall_back(tmp_path: Path) -> None:
    from transformers import CLIPTokenizer

    tokenizer = train_tokenizer(WORDS)
    assert all(is_known(tokenizer, word) for word in WORDS)
    assert not is_known(tokenizer, "zebra")
    tokenizer.save_pretrained(tmp_path)
    loaded = CLIPTokenizer.from_pretrained(tmp_path)
    texts = ["a red wooden chair, front view", "Zebra 3 \u00e9\u732b", "", "chair " * 50]
    for text, row in zip(texts, token_ids(loaded, texts), strict=True):
        expected = tokenizer(text, padding="max_length", truncation=True, max_length=32)["input_ids"]
        assert row.tolist() == expected
    assert loaded.unk_token_id not in loaded(texts[1])["input_ids"][1:-1]


def test_pooled_output_sits_at_the_first_end_token() -> None:
    tokenizer = train_tokenizer(WORDS)
    config = DenoiserConfig(context_dim=16, text_layers=1, text_heads=2)
    encoder = build_text_encoder(config, tokenizer)
    ids = torch.from_numpy(token_ids(tokenizer, ["a red chair", "chair"])).long()
    output = encoder(input_ids=ids)
    for row, stop in enumerate((4, 2)):
        assert torch.equal(output.pooler_output[row], output.last_hidden_state[row, stop])


@pytest.fixture(scope="module")
def pool() -> ViewPool:
    views, config = toy_views(), tiny_config().data
    texts = collect_captions(views.records, config, seed=0)
    tokenizer = tokenizer_for(texts, extra_words=["zebra"], context_length=32)
    pool = build_view_pool(views, texts, tokenizer, config, device=torch.device("cpu"))
    POOL_TOKENIZERS[id(pool)] = tokenizer
    return pool


POOL_TOKENIZERS: dict[int, object] = {}


def captions_of(pool: ViewPool, batch: ViewBatch) -> list[str]:
    tokenizer = POOL_TOKENIZERS[id(pool)]
    return tokenizer.batch_decode(batch.token_ids, skip_special_tokens=True)  # type: ignore[attr-defined]


def test_captions_name_the_colour_that_is_seen(pool: ViewPool) -> None:
    config = dataclasses.replace(tiny_config().data, recolour_probability=1.0, recolour_jitter=0.0)
    batch = ViewSampler(pool, config, seed=1).batch(0, 256)
    words = set()
    for caption, image in zip(captions_of(pool, batch), batch.images, strict=True):
        spoken = [word for word in ("red", "blue", "green", "yellow", "pink", "black") if word in caption]
        if not spoken or "light" in caption or "sky" in caption:
            continue
        seen = nearest_colour_word(((image[:, SIZE // 2, SIZE // 2] + 1) / 2).numpy())
        assert seen == spoken[0], caption
        words.add(seen)
    assert len(words) == 6


def test_without_recolouring_the_records_colours_are_spoken(pool: ViewPool) -> None:
    config = dataclasses.replace(tiny_config().data, recolour_probability=0.0, view_word_probability=1.0)
    batch = ViewSampler(pool, config, seed=2).batch(0, 64)
    for caption, image in zip(captions_of(pool, batch), batch.images, strict=True):
        assert nearest_colour_word(((image[:, 8, 8] + 1) / 2).numpy()) in ("red", "blue")
        assert "green" not in caption and caption.rstrip().endswith("view")


def test_view_words_and_cameras_agree_and_mirroring_only_negates_the_azimuth(pool: ViewPool) -> None:
    base = dataclasses.replace(tiny_config().data, recolour_probability=0.0, view_word_probability=1.0)
    plain = ViewSampler(pool, dataclasses.replace(base, flip_probability=0.0), seed=5).batch(3, 64)
    mirrored = ViewSampler(pool, dataclasses.replace(base, flip_probability=1.0), seed=5).batch(3, 64)
    assert torch.equal(plain.token_ids, mirrored.token_ids)
    assert torch.equal(plain.images.flip(-1), mirrored.images)
    assert torch.equal(plain.conditioning[:, 0], -mirrored.conditioning[:, 0])
    assert torch.equal(plain.conditioning[:, 1:], mirrored.conditioning[:, 1:])
    for caption, camera in zip(captions_of(pool, plain), plain.conditioning, strict=True):
        word = "front" if camera[1] > math.cos(math.radians(45.1)) else "back" if camera[1] < -0.7 else "side"
        assert f"{word} view" in caption.replace("</w>", " ")


def test_batches_are_repeatable_and_backgrounds_show_behind_the_object(pool: ViewPool) -> None:
    sampler = ViewSampler(pool, tiny_config().data, seed=9)
    first, second, again = sampler.batch(0, 32), sampler.batch(1, 32), sampler.batch(0, 32)
    assert torch.equal(first.images, again.images) and torch.equal(first.token_ids, again.token_ids)
    assert not torch.equal(first.images, second.images)
    assert first.images.min() >= -1 and first.images.max() <= 1
    corners = first.images[:, :, 0, 0]
    assert corners.std(dim=0).min() > 0.1 and set(first.alpha.unique().tolist()) == {0.0, 1.0}


def test_rare_nouns_are_drawn_more_often_than_their_share() -> None:
    weights = balanced_weights(["chair"] * 99 + ["vase"], 0.5)
    assert weights.sum().item() == pytest.approx(1.0)
    assert weights[-1] / weights[0] == pytest.approx(99**0.5)


def test_heldout_assets_are_never_drawn_for_the_autoencoder(pool: ViewPool) -> None:
    assert 0 < int(pool.is_heldout.sum()) < len(pool)
    sampler = ViewSampler(pool, tiny_config().data, seed=1, is_allowed=pool.is_heldout)
    conditionings = sampler.batch(0, 64).conditioning.abs()
    allowed = pool.conditioning[pool.is_heldout].abs()
    assert all((row - allowed).abs().sum(dim=1).min() < 1e-6 for row in conditionings)


def test_whitening_keeps_images_and_normalises_latents() -> None:
    torch.manual_seed(3)
    network = build_autoencoder(tiny_config().autoencoder).eval()
    images = torch.rand(6, 3, SIZE, SIZE) * 2 - 1
    with torch.no_grad():
        posterior = network.encode(images).latent_dist
        before, decoded = posterior.mode(), network.decode(posterior.mode()).sample
        std = before.std(dim=(0, 2, 3))
        whiten_latents(network, before.mean(dim=(0, 2, 3)), std)
        after = network.encode(images).latent_dist
        num = after.mode().shape[1]
        torch.testing.assert_close(after.mode().mean(dim=(0, 2, 3)), torch.zeros(num), atol=1e-4, rtol=0)
        torch.testing.assert_close(after.mode().std(dim=(0, 2, 3)), torch.ones(num), atol=1e-4, rtol=0)
        torch.testing.assert_close(after.std, posterior.std / std[None, :, None, None], atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(network.decode(after.mode()).sample, decoded, atol=1e-4, rtol=1e-4)


def test_autoencoder_loss_punishes_lost_colour_more_than_lost_light() -> None:
    config = tiny_config().autoencoder
    images = torch.zeros(2, 3, SIZE, SIZE)
    whole = torch.ones(2, 1, SIZE, SIZE)
    light = images + 0.1
    colour = images + torch.tensor([0.15, -0.15, 0.0])[:, None, None]
    zero = torch.zeros(2)

    def loss_of(reconstruction: torch.Tensor) -> torch.Tensor:
        return autoencoder_loss(reconstruction, images, whole, zero, config)

    assert loss_of(images) == 0
    assert loss_of(colour) > 1.5 * loss_of(light)
    left_half = torch.zeros(2, 1, SIZE, SIZE)
    left_half[..., : SIZE // 2] = 1.0
    metrics = reconstruction_metrics(light, images, torch.ones(2, 1, SIZE, SIZE))
    assert metrics["psnr_db"] == pytest.approx(-20 * math.log10(0.05), abs=1e-3)
    assert metrics["object_psnr_db"] == pytest.approx(metrics["psnr_db"], abs=1e-3)
    wrong = reconstruction_metrics(light * left_half, images, left_half)
    assert wrong["psnr_db"] == pytest.approx(wrong["object_psnr_db"] + 10 * math.log10(2), abs=1e-3)
    assert metrics["chroma_error_levels"] == pytest.approx(0.0, abs=1e-4)


def test_camera_token_replaces_the_last_position_and_survives_its_file(tmp_path: Path) -> None:
    token = CameraToken(8, 16)
    cameras = Cameras.from_lists([0.0, 90.0], [10.0, 10.0])
    out = token(cameras.conditioning())
    assert out.shape == (2, 1, 8)
    context = torch.randn(2, 5, 8)
    joined = insert_camera_token(context, out, is_kept=torch.tensor([True, False]))
    assert torch.equal(joined[:, :-1], context[:, :-1])
    assert torch.equal(joined[0, -1], out[0, 0]) and torch.equal(joined[1, -1], context[1, -1])
    token.half().save_pretrained(tmp_path)
    loaded = CameraToken.from_pretrained(tmp_path)
    torch.testing.assert_close(loaded(cameras.conditioning()), out, atol=1e-2, rtol=1e-2)
    with pytest.raises(MissingWeightsError, match="has no config.json"):
        CameraToken.from_pretrained(tmp_path / "elsewhere")
    (tmp_path / "model.safetensors").write_bytes(b"nothing")
    with pytest.raises(UsageError, match="damaged"):
        CameraToken.from_pretrained(tmp_path)


def test_noise_schedule_is_stable_diffusions() -> None:
    scheduler = build_scheduler()
    assert scheduler.config["prediction_type"] == "v_prediction" and not scheduler.config["clip_sample"]
    assert float(scheduler.alphas_cumprod[0]) == pytest.approx(1 - 0.00085, abs=1e-6)
    assert float(scheduler.alphas_cumprod[-1]) == pytest.approx(0.00466, abs=1e-4)


def test_learning_rate_warms_up_falls_and_warms_up_again_after_a_compact_resume() -> None:
    config = DenoiserConfig(learning_rate=1.0, warmup_steps=10, resume_warmup_steps=4)

    def rate(progress: float, step: int, since: int | None = None) -> float:
        return learning_rate(config, progress=progress, step=step, steps_since_restart=since)

    assert rate(0.0, 0) == pytest.approx(0.1) and rate(0.0, 50) == pytest.approx(1.0)
    assert rate(0.5, 50) == pytest.approx(0.505) and rate(1.0, 50) == pytest.approx(0.01)
    assert rate(0.0, 50, 0) == pytest.approx(0.25) and rate(0.0, 50, 9) == pytest.approx(1.0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_mixed_precision_keeps_small_steps_that_bf16_alone_would_lose(dtype: torch.dtype) -> None:
    network = nn.Linear(1, 1, bias=False)
    nn.init.constant_(network.weight, 1.0)
    trainable = Trainable(
        {"line": network}, device=torch.device("cpu"), compute_dtype=dtype, weight_decay=0.0, averaged=True
    )
    for _ in range(20):
        network(torch.ones(1, 1, dtype=dtype)).sum().backward()
        trainable.collect_gradients()
        trainable.step(learning_rate=1e-4, gradient_clip=1.0)
        trainable.update_average(0.5)
    # Twenty Adam steps of 1e-4; one alone is below bf16's resolution at 1 (2^-8).
    weights = trainable.weights(averaged=False)["line.weight"]
    assert weights.item() == pytest.approx(1 - 20e-4, abs=1e-5)
    assert network.weight.dtype == dtype
    assert trainable.weights(averaged=True)["line.weight"].item() == pytest.approx(1 - 19e-4, abs=2e-5)
    with trainable.averaged_weights():
        assert network.weight.item() == pytest.approx(1 - 19e-4, abs=4e-3)
    assert network.weight.item() == pytest.approx(weights.item(), abs=4e-3)


def test_gradients_of_parts_add_up() -> None:
    network = nn.Linear(2, 1)
    trainable = Trainable(
        {"line": network}, device=torch.device("cpu"), compute_dtype=torch.bfloat16, weight_decay=0.0
    )
    for value in (1.0, 2.0):
        network(torch.full((1, 2), value, dtype=torch.bfloat16)).sum().backward()
        trainable.collect_gradients()
    gradient = trainable.masters[0].grad
    assert gradient is not None and gradient.dtype == torch.float32
    assert gradient.tolist() == [[3.0, 3.0]]


def test_the_shipped_settings_are_the_defaults() -> None:
    from uni3d.config.loader import load_config
    from uni3d.resources import resource_path
    from uni3d.teacher.settings import TeacherConfig

    file = resource_path("configs") / "teacher.yaml"
    assert load_config(file, TeacherConfig()) == TeacherConfig()
    written = set(re.findall(r"^\s*([a-z_]+):", file.read_text(encoding="utf-8"), flags=re.MULTILINE))
    groups = {f.name for group in ("data", "autoencoder", "denoiser") for f in _fields_of(group)}
    assert written == groups | {field.name for field in dataclasses.fields(TeacherConfig)}


def _fields_of(group: str) -> tuple[dataclasses.Field[object], ...]:
    from uni3d.teacher.settings import TeacherConfig

    return dataclasses.fields(getattr(TeacherConfig(), group))


def test_crops_lie_around_the_object_and_come_from_their_image() -> None:
    num, size, side = 6, 32, 8
    rows, columns = torch.meshgrid(torch.arange(size), torch.arange(size), indexing="ij")
    place = torch.stack([rows, columns, torch.zeros_like(rows)]).float() / size
    images = place.expand(num, -1, -1, -1).clone()
    images[:, 2] = torch.arange(num)[:, None, None] / num
    alpha = torch.zeros(num, 1, size, size)
    alpha[:, :, 20:26, 3:9] = 1
    ids, cameras = torch.arange(num)[:, None], torch.arange(num).float()[:, None].expand(-1, 5)
    crops = ViewBatch(images, alpha, ids, cameras).crops(side, torch.Generator().manual_seed(0))
    assert crops.images.shape == (num * 16, 3, side, side) and crops.alpha.shape == (num * 16, 1, side, side)
    corner = (crops.images[:, :2, 0, 0] * size).round().long()
    for crop, (top, left), which in zip(crops.images, corner.tolist(), crops.token_ids[:, 0], strict=True):
        assert torch.equal(crop, images[which, :, top : top + side, left : left + side])
    assert crops.alpha.mean(dim=(1, 2, 3)).min() > 0  # every one shows some of the object
    assert crops.alpha.mean() > 3 * alpha.mean()
    assert len({tuple(place) for place in corner.tolist()}) > 10
