"""What every test shares: few threads, no network, no GPU unless asked for, and the GPU marker."""

from __future__ import annotations

import os
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
if "PYTEST_XDIST_WORKER" in os.environ:
    # The processes share the cores; those that a test starts inherit it. torch reads it when it is imported.
    os.environ["OMP_NUM_THREADS"] = "1"

import pytest
import torch

if not torch.cuda.is_available():
    # Triton reads it when it is imported, and then interprets kernels on the CPU.
    os.environ.setdefault("TRITON_INTERPRET", "1")


@pytest.fixture(autouse=True, scope="session")
def _two_threads() -> None:
    """More threads than cores make small tensors slower; OMP_NUM_THREADS still wins where it is lower."""
    torch.set_num_threads(min(2, torch.get_num_threads()))


@pytest.fixture(autouse=True)
def _fixed_seed() -> None:
    """Global generators start the same in every test, in whatever order they run."""
    torch.manual_seed(0)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip tests marked `gpu` where there is no CUDA device."""
    if torch.cuda.is_available():
        return
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def kernel_device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> torch.device:
    """Where Triton kernels meet their twins: the GPU, marked `gpu`, or the CPU, on which they are interpreted
    where there is no GPU. Convolutions are computed in float32, not in the GPU's shorter TF32."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    pytest.importorskip("triton", reason="comes with torch's CUDA builds, and with the extra 'test' on Linux")
    if request.param == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
        pytest.skip("the kernels are compiled for the GPU of this machine")
    return torch.device(request.param)


@pytest.fixture(scope="session")
def tiny_teacher_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A randomly initialised teacher of the real classes in the diffusers layout: 16 px images, 4 px
    latents."""
    from diffusers import StableDiffusionPipeline

    from uni3d.diffusion.camera_token import CameraToken
    from uni3d.teacher.autoencoder import build_autoencoder
    from uni3d.teacher.denoiser import build_scheduler, build_text_encoder, build_unet
    from uni3d.teacher.settings import AutoencoderConfig, DenoiserConfig
    from uni3d.teacher.tokenizer import train_tokenizer

    torch.manual_seed(7)
    image = AutoencoderConfig(image_size=16, block_out_channels=(8, 8, 8), norm_num_groups=4)
    network = DenoiserConfig(
        block_out_channels=(16, 32), attention_heads=(1, 1), layers_per_block=1, norm_num_groups=4,
        context_dim=16, text_layers=1, text_heads=2, context_length=16,
    )  # fmt: skip
    words = ["a", "red", "blue", "chair", "vase", "front", "side", "back", "overhead", "view", ","]
    tokenizer = train_tokenizer(words, context_length=16)
    folder = tmp_path_factory.mktemp("tiny-teacher")
    pipeline = StableDiffusionPipeline(
        vae=build_autoencoder(image),
        text_encoder=build_text_encoder(network, tokenizer),
        tokenizer=tokenizer,
        unet=build_unet(network, image),
        scheduler=build_scheduler(),
        safety_checker=None,  # pyright: ignore[reportArgumentType]
        feature_extractor=None,  # pyright: ignore[reportArgumentType]
        requires_safety_checker=False,
    )
    pipeline.save_pretrained(folder, safe_serialization=True)
    CameraToken(16, 16).save_pretrained(folder / "camera_token")
    (folder / "vocabulary.json").write_text('{"nouns": {"chair": 2, "vase": 1}, "colours": {"red": 1}}')
    return folder
