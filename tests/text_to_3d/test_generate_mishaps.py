"""`generate` when it is refused or stopped: nothing half-made, and everything saved."""

from __future__ import annotations

import os
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from uni3d.config.text_to_3d import (
    DiscriminatorConfig,
    FakeScoreConfig,
    FieldConfig,
    MeshConfig,
    RendererConfig,
    TextTo3DConfig,
)
from uni3d.diffusion.latent_teacher import LatentDiffusionTeacher
from uni3d.errors import Interrupted, UsageError
from uni3d.text_to_3d import pipeline
from uni3d.text_to_3d.pipeline import choose_device, generate


def tiny_config(teacher: Path, runs_folder: Path, **changes: Any) -> TextTo3DConfig:
    return TextTo3DConfig(
        prompt="a red chair",
        teacher=str(teacher),
        runs_folder=runs_folder,
        device="cpu",
        quiet=True,
        **{"steps": 2, "method": "sds", **changes},
        field=FieldConfig(resolutions=(8, 16)),
        renderer=RendererConfig(resolution=((0.0, 16.0),), samples_per_ray=16),
        fake_score=FakeScoreConfig(lora_rank=2, warmup_steps=1),
        discriminator=DiscriminatorConfig(num_real_samples=4, sampling_steps=2),
        mesh=MeshConfig(resolution=24, max_triangles=400, texture_size=64, turntable_frames=0),
    )


def damage(folder: Path, how: str) -> None:
    weights = next((folder / "unet").glob("*.safetensors"))
    if how == "cut":
        weights.write_bytes(weights.read_bytes()[:-100])
    elif how == "pickled":
        weights.write_bytes(b"\x80\x02}q\x00." + bytes(100))
    elif how == "bin only":
        weights.rename(weights.with_suffix(".bin"))
    elif how == "one tensor gone":
        tensors = load_file(weights)
        tensors.pop("conv_in.bias")
        save_file(tensors, weights)
    elif how == "other network":
        shutil.copy(next((folder / "vae").glob("*.safetensors")), weights)
    elif how == "no tokenizer":
        shutil.rmtree(folder / "tokenizer")
    elif how == "wrong types":
        (folder / "unet" / "config.json").write_text('{"sample_size": "x", "block_out_channels": 5}')
    else:
        (folder / "unet" / "config.json").write_text('{"sample_size": "x"')


@pytest.mark.parametrize(
    "how",
    [
        "cut",
        "pickled",
        "bin only",
        "one tensor gone",
        "other network",
        "no tokenizer",
        "wrong types",
        "config",
    ],
)
def test_damaged_weights_leave_no_run(
    how: str, tiny_teacher_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    teacher = shutil.copytree(tiny_teacher_folder, tmp_path / "teacher")
    damage(teacher, how)
    with pytest.raises(UsageError) as caught:
        generate(tiny_config(teacher, tmp_path / "outputs"))
    assert "\n" not in str(caught.value)
    assert "teacher" in str(caught.value)
    assert not (tmp_path / "outputs").exists()
    assert capsys.readouterr() == ("", "")


def test_a_signal_while_the_mesh_is_made_saves_it(
    tiny_teacher_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    build = pipeline.build_mesh

    def build_and_be_stopped(*arguments: Any) -> Any:
        os.kill(os.getpid(), signal.SIGTERM)
        return build(*arguments)

    config = tiny_config(tiny_teacher_folder, tmp_path / "my outputs")
    with monkeypatch.context() as patch:
        patch.setattr(pipeline, "build_mesh", build_and_be_stopped)
        with pytest.raises(
            Interrupted, match=r"step 2 of 2.*--resume '.*my outputs/a-red-chair-0'"
        ) as caught:
            generate(config)
    assert caught.value.exit_code == 143
    run = tmp_path / "my outputs" / "a-red-chair-0"
    assert (run / "mesh.glb").is_file() and (run / "preview.png").is_file()
    assert not (run / "metrics.json").exists()
    resumed = tiny_config(tiny_teacher_folder, tmp_path / "my outputs", resume=run)
    assert generate(resumed).output == run / "mesh.glb"
    assert (run / "metrics.json").is_file()


def test_a_signal_while_the_teacher_samples_ends_the_run(
    tiny_teacher_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    predict = LatentDiffusionTeacher.predict_guided_x0
    passes: list[int] = []

    def predict_and_be_stopped(*arguments: Any) -> Any:
        passes.append(1)
        os.kill(os.getpid(), signal.SIGTERM)
        return predict(*arguments)

    config = tiny_config(tiny_teacher_folder, tmp_path, method="uni-instruct")
    with monkeypatch.context() as patch:
        patch.setattr(LatentDiffusionTeacher, "predict_guided_x0", predict_and_be_stopped)
        with pytest.raises(
            Interrupted, match=r"nothing had been made yet.*--resume .*a-red-chair-0"
        ) as caught:
            generate(config)
    assert caught.value.exit_code == 143 and len(passes) == 1
    run = tmp_path / "a-red-chair-0"
    assert not (run / "mesh.glb").exists()
    again = tiny_config(tiny_teacher_folder, tmp_path, method="uni-instruct", resume=run)
    assert generate(again).output == run / "mesh.glb"


@pytest.mark.parametrize("name", ["", "a gpu", "cpu:3", "cuda:99", "cuda:-1", "meta"])
def test_devices_that_are_not_here(name: str) -> None:
    with pytest.raises(UsageError, match="use auto, cpu|use --device cpu"):
        choose_device(name)
