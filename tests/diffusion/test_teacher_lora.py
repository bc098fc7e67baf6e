"""A LoRA merged into a teacher does what the adapter does, in every layout, and a wrong one is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from tiny_pipelines import tiny_unet, write_tiny_pipeline

from uni3d.diffusion.latent_teacher import LatentDiffusionTeacher
from uni3d.diffusion.lora_score import LoRAFakeScore
from uni3d.errors import MissingWeightsError, UsageError

SCALE = 0.5
RANK, ALPHA = 2, 6


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("pipelines")
    return {kind: write_tiny_pipeline(kind, root / kind) for kind in ("sd", "sdxl", "sd3")}


def predict(teacher: LatentDiffusionTeacher) -> torch.Tensor:
    context = teacher.encode_text(["a red chair"])
    x = torch.randn(1, *teacher.latent_shape, generator=torch.Generator().manual_seed(2))
    return teacher.predict_x0(x, torch.tensor([0.7]), context)


def adapted(network: Any, targets: list[str]) -> dict[str, torch.Tensor]:
    """Put a random adapter of `SCALE` onto the network and return its weights."""
    from peft import LoraConfig
    from peft.utils import get_peft_model_state_dict

    config = LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=targets, init_lora_weights=False)
    network.add_adapter(config, adapter_name="default")
    weights = {name: value.clone() for name, value in get_peft_model_state_dict(network).items()}
    network.set_adapters(["default"], weights=[SCALE])
    return weights


@pytest.mark.parametrize("kind", ["sd", "sdxl", "sd3"])
def test_a_merged_lora_predicts_as_the_adapter_does(
    kind: str, folders: dict[str, Path], tmp_path: Path
) -> None:
    import diffusers

    reference = LatentDiffusionTeacher.from_pretrained(folders[kind])
    plain = predict(reference)
    weights = adapted(reference.network, ["to_q", "to_v"])
    expected = predict(reference)
    name = {"sd": "StableDiffusion", "sdxl": "StableDiffusionXL", "sd3": "StableDiffusion3"}[kind]
    part = "transformer" if kind == "sd3" else "unet"
    options = {
        f"{part}_lora_layers": weights,
        f"{part}_lora_adapter_metadata": {"r": RANK, "lora_alpha": ALPHA, "target_modules": ["to_q", "to_v"]},
    }
    getattr(diffusers, f"{name}Pipeline").save_lora_weights(tmp_path, **options)
    file = tmp_path / "pytorch_lora_weights.safetensors"
    teacher = LatentDiffusionTeacher.from_pretrained(folders[kind], lora=file, lora_scale=SCALE)
    assert not torch.allclose(plain, expected, atol=1e-3)
    torch.testing.assert_close(predict(teacher), expected, rtol=1e-3, atol=1e-4)
    # Nothing is left of it that a fake score's adapters would meet.
    fake = LoRAFakeScore(teacher, rank=1)
    fake.remove()
    torch.testing.assert_close(predict(teacher), expected, rtol=1e-3, atol=1e-4)


def test_the_layout_of_kohya(folders: dict[str, Path], tmp_path: Path) -> None:
    teacher = LatentDiffusionTeacher.from_pretrained(folders["sd"])
    layer = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
    encoder_layer = "text_model.encoder.layers.0.self_attn.out_proj"
    before = {
        layer: teacher.network.get_submodule(layer).weight.clone(),
        encoder_layer: _encoder_layer(teacher, encoder_layer).weight.clone(),
    }
    down, up = torch.randn(RANK, 16), torch.randn(16, RANK)
    state: dict[str, torch.Tensor] = {}
    for prefix, name in (("lora_unet", layer), ("lora_te", encoder_layer)):
        key = f"{prefix}_{name.replace('.', '_')}"
        state |= {f"{key}.lora_down.weight": down.clone(), f"{key}.lora_up.weight": up.clone()}
        state[f"{key}.alpha"] = torch.tensor(float(ALPHA))
    save_file(state, tmp_path / "style.safetensors")
    changed = LatentDiffusionTeacher.from_pretrained(
        folders["sd"], lora=tmp_path / "style.safetensors", lora_scale=SCALE
    )
    update = SCALE * ALPHA / RANK * up @ down
    torch.testing.assert_close(changed.network.get_submodule(layer).weight, before[layer] + update)
    got = _encoder_layer(changed, encoder_layer).weight
    torch.testing.assert_close(got, before[encoder_layer] + update)


def _encoder_layer(teacher: LatentDiffusionTeacher, name: str) -> Any:
    """A layer of the first text encoder, whether or not this version of transformers wraps its model."""
    modules = dict(teacher.text_encoders[0].named_modules())
    return modules.get(name) or modules[name.removeprefix("text_model.")]


def test_what_is_no_lora_of_this_teacher(folders: dict[str, Path], tmp_path: Path) -> None:
    from diffusers import StableDiffusionPipeline

    def refused(file: Path, kind: str = "sd") -> str:
        with pytest.raises(UsageError) as caught:
            LatentDiffusionTeacher.from_pretrained(folders[kind], lora=file)
        assert caught.value.exit_code == 2 and "\n" not in str(caught.value)
        return str(caught.value)

    other = tmp_path / "other"
    StableDiffusionPipeline.save_lora_weights(
        other, unet_lora_layers=adapted(tiny_unet(cross_attention_dim=24), ["to_k"])
    )
    message = refused(other / "pytorch_lora_weights.safetensors")
    assert "is no LoRA of teacher" in message and "its matrices have other sizes" in message
    assert "is no LoRA of teacher" in refused(other / "pytorch_lora_weights.safetensors", "sd3")
    deeper = tmp_path / "deeper"
    deep_unet = tiny_unet(layers_per_block=2)
    StableDiffusionPipeline.save_lora_weights(deeper, unet_lora_layers=adapted(deep_unet, ["to_q"]))
    assert "of its" in refused(deeper / "pytorch_lora_weights.safetensors")

    nothing = tmp_path / "nothing.safetensors"
    save_file({"weight": torch.zeros(2)}, nothing)
    assert "is no LoRA of teacher" in refused(nothing)
    cut = tmp_path / "cut.safetensors"
    cut.write_bytes(nothing.read_bytes()[:30])
    assert "cut off, damaged" in refused(cut)
    assert "does not end in .safetensors" in refused(folders["sd"] / "model_index.json")
    with pytest.raises(MissingWeightsError, match="there is no LoRA file"):
        LatentDiffusionTeacher.from_pretrained(folders["sd"], lora=tmp_path / "none.safetensors")
