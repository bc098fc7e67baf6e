"""The teacher wrapper against the diffusers classes it wraps, on a tiny random model of the same classes."""

from __future__ import annotations

import shutil
import time
from pathlib import Path

import pytest
import torch
from huggingface_hub import constants

from uni3d.diffusion import teacher_files
from uni3d.diffusion.latent_teacher import LatentDiffusionTeacher
from uni3d.diffusion.lora_score import LoRAFakeScore
from uni3d.diffusion.prompt import PromptContexts
from uni3d.errors import MissingWeightsError, UsageError
from uni3d.scene.camera import Cameras


@pytest.fixture
def teacher(tiny_teacher_folder: Path) -> LatentDiffusionTeacher:
    return LatentDiffusionTeacher.from_pretrained(tiny_teacher_folder)


def _noisy(teacher: LatentDiffusionTeacher, num: int = 2) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    sigma = torch.tensor([0.4, 3.0])[:num]
    return torch.randn(num, *teacher.latent_shape, generator=generator) * 2, sigma


def test_x0_prediction_matches_the_scheduler(
    teacher: LatentDiffusionTeacher, tiny_teacher_folder: Path
) -> None:
    from diffusers import DDIMScheduler

    scheduler = DDIMScheduler.from_pretrained(tiny_teacher_folder, subfolder="scheduler")
    scheduler.set_timesteps(scheduler.config.num_train_timesteps)
    timestep = 431
    sigma = teacher.schedule.sigma(torch.tensor([float(timestep)]))
    x, _ = _noisy(teacher, 1)
    context = teacher.encode_text(["a red chair"])
    x0 = teacher.predict_x0(x, sigma, context)
    x_vp = x / torch.sqrt(1 + sigma**2)
    with torch.no_grad():
        output = teacher.network(x_vp, timestep, encoder_hidden_states=context).sample
    expected = scheduler.step(output, timestep, x_vp).pred_original_sample
    torch.testing.assert_close(x0, expected, rtol=1e-4, atol=1e-4)


def test_guidance_extrapolates_between_two_predictions(teacher: LatentDiffusionTeacher) -> None:
    x, sigma = _noisy(teacher)
    contexts = PromptContexts.encode(teacher, "a red chair", "blue")
    camera = Cameras.from_lists([0.0, 90.0], [10.0, 10.0]).conditioning()
    conditional = contexts.conditional(["front", "side"], camera)
    negative = contexts.unconditional(2)
    guided, plain, *_ = teacher.predict_guided_x0(x, sigma, conditional, negative, 3.0)
    unconditional = teacher.predict_x0(x, sigma, negative)
    torch.testing.assert_close(plain, teacher.predict_x0(x, sigma, conditional), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(guided, unconditional + 3 * (plain - unconditional), rtol=1e-4, atol=1e-4)


def test_camera_takes_the_last_slot_only(teacher: LatentDiffusionTeacher) -> None:
    contexts = PromptContexts.encode(teacher, "a red chair")
    camera = Cameras.from_lists([30.0], [10.0]).conditioning()
    with_camera = contexts.conditional(["front"], camera)
    assert with_camera.shape == contexts.by_view["front"].shape
    torch.testing.assert_close(with_camera[:, :-1], contexts.by_view["front"][:, :-1])
    assert not torch.allclose(with_camera[:, -1], contexts.by_view["front"][:, -1])


def test_middle_features_equal_the_full_pass(teacher: LatentDiffusionTeacher) -> None:
    x, sigma = _noisy(teacher)
    context = teacher.encode_text(["a red chair", "a blue vase"])
    whole = teacher.denoise(x, sigma, context).middle
    features = teacher.middle_features(x, sigma, context)
    assert features.shape[1] == teacher.feature_channels
    torch.testing.assert_close(features, whole)


def test_image_gradient_flows_through_the_encoder(teacher: LatentDiffusionTeacher) -> None:
    images = torch.rand(2, 3, 24, 24, requires_grad=True)
    latents = teacher.encode_images(images)
    assert latents.shape == (2, *teacher.latent_shape)
    latents.square().sum().backward()
    assert images.grad is not None and images.grad.abs().sum() > 0


def test_fake_score_starts_as_the_teacher_and_leaves_it_alone(teacher: LatentDiffusionTeacher) -> None:
    x, sigma = _noisy(teacher)
    context = teacher.encode_text(["a red chair", "a red chair"])
    camera = Cameras.from_lists([0.0, 90.0], [10.0, 10.0]).conditioning()
    before = teacher.predict_x0(x, sigma, context)
    fake = LoRAFakeScore(teacher, rank=2, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(fake.predict_x0(x, sigma, context, camera), before, rtol=0, atol=1e-6)
    optimiser = torch.optim.Adam(fake.parameters(), lr=0.05)
    for _ in range(3):
        loss = fake.predict_x0(x, sigma, context, camera).square().mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    assert not torch.allclose(fake.predict_x0(x, sigma, context, camera), before, atol=1e-3)
    torch.testing.assert_close(teacher.predict_x0(x, sigma, context), before, rtol=0, atol=0)
    assert all(
        parameter.grad is None for name, parameter in teacher.network.named_parameters() if "lora" not in name
    )


def test_fake_score_knows_the_camera_and_its_state_round_trips(teacher: LatentDiffusionTeacher) -> None:
    x, sigma = _noisy(teacher)
    context = teacher.encode_text(["a red chair", "a red chair"])
    front = Cameras.from_lists([0.0, 0.0], [10.0, 10.0]).conditioning()
    back = Cameras.from_lists([180.0, 180.0], [10.0, 10.0]).conditioning()
    fake = LoRAFakeScore(teacher, rank=2, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        for parameter in fake.parameters():
            parameter.add_(0.1)
    seen = fake.predict_x0(x, sigma, context, front)
    assert not torch.allclose(seen, fake.predict_x0(x, sigma, context, back), atol=1e-4)
    state = {name: tensor.clone() for name, tensor in fake.state_dict().items()}
    other = LoRAFakeScore(teacher, rank=2, generator=torch.Generator().manual_seed(9))
    other.load_state_dict(state)
    torch.testing.assert_close(other.predict_x0(x, sigma, context, front), seen, rtol=0, atol=0)


def test_samples_are_reproducible_and_finite(teacher: LatentDiffusionTeacher) -> None:
    contexts = PromptContexts.encode(teacher, "a red chair")
    camera = Cameras.from_lists([0.0, 120.0], [10.0, 10.0]).conditioning()
    context = contexts.conditional(["front", "side"], camera)

    def draw(seed: int) -> torch.Tensor:
        return teacher.sample(
            context,
            contexts.unconditional(2),
            guidance_scale=2.0,
            num_steps=4,
            generator=torch.Generator().manual_seed(seed),
        )

    assert torch.equal(draw(1), draw(1))
    assert not torch.equal(draw(1), draw(2))
    assert teacher.decode_latents(draw(1)).shape == (2, 3, teacher.image_size, teacher.image_size)


@pytest.mark.parametrize("name", ["nobody/no-such-model", "no such model", "/no/such/folder", "x" * 300])
def test_unknown_teacher_names_id_cache_and_ways_on(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a hub the answer comes at once, and not after every file was asked for six times."""
    monkeypatch.setattr(teacher_files, "_hub_answers", lambda: False)
    started = time.monotonic()
    with pytest.raises(MissingWeightsError) as caught:
        LatentDiffusionTeacher.from_pretrained(name)
    assert time.monotonic() - started < 10
    message = str(caught.value)
    assert name[:200] in message and constants.HF_HUB_CACHE in message and "\n" not in message
    assert "--teacher DIRECTORY" in message and "HF_TOKEN" in message and "embedded" in message


def test_an_empty_name_is_no_teacher() -> None:
    with pytest.raises(UsageError, match="the teacher's name is empty"):
        LatentDiffusionTeacher.from_pretrained(" ")


def test_a_hub_that_hangs_or_fails_does_not_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    assert not teacher_files._hub_answers()


def test_damaged_and_pickled_weights_are_refused(tiny_teacher_folder: Path, tmp_path: Path) -> None:
    cut = tmp_path / "cut"
    shutil.copytree(tiny_teacher_folder, cut)
    weights = next((cut / "unet").glob("*.safetensors"))
    weights.write_bytes(weights.read_bytes()[:200])
    with pytest.raises(UsageError, match="damaged|cannot be loaded"):
        LatentDiffusionTeacher.from_pretrained(cut)
    weights.rename(weights.with_suffix(".bin"))
    with pytest.raises(UsageError, match="pickled"):
        LatentDiffusionTeacher.from_pretrained(cut)
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(MissingWeightsError, match="model_index.json"):
        LatentDiffusionTeacher.from_pretrained(empty)
