"""The whole training on toy views: it runs, resumes exactly, publishes, loads in diffusers and samples."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from teacher_fixtures import SIZE, tiny_config, toy_views

from uni3d.errors import Interrupted, MissingWeightsError, UsageError
from uni3d.scene.camera import Cameras
from uni3d.teacher import denoiser_training
from uni3d.teacher.checkpoint_files import STATE_NAME, read_state, read_tensors, write_checkpoint
from uni3d.teacher.denoiser_training import compile_ahead
from uni3d.teacher.progress import PhaseClock
from uni3d.teacher.sampling import load_teacher, reconstruct_views, sample_grid, sample_views
from uni3d.teacher.session import Session
from uni3d.teacher.training import train_teacher


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("teacher-run")
    result = train_teacher(tiny_config(), None, output, views=toy_views())
    assert result.is_finished and result.step == 6 and result.teacher_folder == output / "teacher"
    return output


def test_a_run_leaves_its_files(finished: Path) -> None:
    lines = [json.loads(line) for line in (finished / "metrics.jsonl").read_text().splitlines()]
    assert [line["phase"] for line in lines] == ["autoencoder", "denoiser"]
    assert all(np.isfinite(line["loss"]) and line["images_per_s"] > 0 for line in lines)
    assert (finished / "grids" / "step_0000006.png").is_file()
    for file in (finished / "compact").glob("*.safetensors"):
        assert file.stat().st_size <= 0.25 * 2**20
    vocabulary = json.loads((finished / "teacher" / "vocabulary.json").read_text())
    assert set(vocabulary["nouns"]) == {"chair", "vase"} and "overhead" in vocabulary["words"]
    assert "chair" in (finished / "teacher" / "README.md").read_text()


def test_diffusers_loads_and_samples_it(finished: Path) -> None:
    from diffusers import StableDiffusionPipeline

    pipeline = StableDiffusionPipeline.from_pretrained(finished / "teacher", local_files_only=True)
    pipeline.set_progress_bar_config(disable=True)
    tokens = pipeline.tokenizer.tokenize("a red chair, front view")
    assert tokens == [f"{word}</w>" for word in ("a", "red", "chair", ",", "front", "view")]
    images = pipeline("a red chair, front view", num_inference_steps=2, output_type="np").images
    assert images.shape == (1, SIZE, SIZE, 3) and np.isfinite(images).all()
    # The same weights as our own loader's, so nothing was left at its random start.
    ours = load_teacher(finished / "teacher")
    ids = torch.tensor([pipeline.tokenizer("a vase", padding="max_length").input_ids])
    torch.testing.assert_close(
        pipeline.text_encoder(ids).last_hidden_state, ours.text_encoder(ids).last_hidden_state
    )
    weights = read_tensors(finished / "compact")
    torch.testing.assert_close(
        ours.unet.state_dict()["conv_in.weight"], weights["unet.conv_in.weight"].float(), rtol=0, atol=0
    )
    name = "text_encoder.embeddings.token_embedding.weight"
    embeddings = ours.text_encoder.get_input_embeddings().weight
    torch.testing.assert_close(embeddings, weights[name].float(), rtol=0, atol=0)


def test_samples_depend_on_seed_and_camera_but_not_on_batching(finished: Path) -> None:
    teacher = load_teacher(finished / "teacher")
    prompts = ["a red chair, front view", "a blue vase, side view", "a vase"]
    cameras = Cameras.from_lists([0.0, 90.0, 180.0], [10.0, 10.0, 10.0])
    images = sample_views(teacher, prompts, cameras, num_steps=2, seed=3)
    assert images.shape == (3, 3, SIZE, SIZE) and images.min() >= 0 and images.max() <= 1
    split = sample_views(teacher, prompts, cameras, num_steps=2, seed=3, batch_size=2)
    torch.testing.assert_close(images, split, rtol=0, atol=1e-4)
    assert (images - sample_views(teacher, prompts, cameras, num_steps=2, seed=4)).abs().max() > 0.01
    assert (images - sample_views(teacher, prompts, None, num_steps=2, seed=3)).abs().max() > 1e-5
    ddim = sample_views(teacher, prompts, cameras, num_steps=2, seed=3, scheduler="ddim", guidance_scale=1.0)
    assert torch.isfinite(ddim).all()
    # Guidance sharpens the view as well, since its unguided half, all that is left at 0, knows no camera.
    blind = sample_views(teacher, prompts, cameras, num_steps=2, seed=3, guidance_scale=0.0)
    unseen = sample_views(teacher, prompts, None, num_steps=2, seed=3, guidance_scale=0.0)
    torch.testing.assert_close(blind, unseen, rtol=0, atol=0)
    told = sample_views(
        teacher, prompts, cameras, num_steps=2, seed=3, guidance_scale=0.0, camera_in_negative=True
    )
    assert (told - unseen).abs().max() > 1e-5


def test_renders_go_through_the_autoencoder_at_its_size(finished: Path) -> None:
    teacher = load_teacher(finished / "teacher")
    images = torch.rand(2, 3, SIZE, SIZE)
    rebuilt = reconstruct_views(teacher, images)
    with torch.no_grad():
        latents = teacher.autoencoder.encode(2 * images - 1).latent_dist.mean
        expected = teacher.autoencoder.decode(latents).sample / 2 + 0.5
    torch.testing.assert_close(rebuilt, expected.clamp(0, 1))
    plain = torch.full((1, 3, 3 * SIZE, 2 * SIZE), 0.4)
    same = reconstruct_views(teacher, torch.full((1, 3, SIZE, SIZE), 0.4))
    torch.testing.assert_close(reconstruct_views(teacher, plain), same)


def test_grid_from_a_folder(finished: Path, tmp_path: Path) -> None:
    from PIL import Image

    path = sample_grid(finished / "teacher", ["a red chair", "a vase"], tmp_path / "grid.png", num_steps=1)
    picture = Image.open(path)
    assert picture.width == 8 * SIZE and picture.height > 2 * SIZE


def test_a_folder_that_is_no_teacher_is_named(tmp_path: Path) -> None:
    with pytest.raises(MissingWeightsError, match="there is no folder '.*camera_token'"):
        load_teacher(tmp_path)


def test_damaged_weights_are_named_before_they_are_loaded(finished: Path, tmp_path: Path) -> None:
    teacher = shutil.copytree(finished / "teacher", tmp_path / "teacher")
    weights = next((teacher / "unet").glob("*.safetensors"))
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(UsageError, match=f"'{weights}' is cut off"):
        load_teacher(teacher)


def test_publishing_and_loading_say_nothing(finished: Path, tmp_path: Path) -> None:
    """In a process of its own: the libraries write to the stderr that they found when they were imported."""
    program = (
        "import sys; from uni3d.teacher.publish import publish_teacher; "
        "from uni3d.teacher.sampling import load_teacher; load_teacher(publish_teacher(*sys.argv[1:]))"
    )
    words = [sys.executable, "-c", program, str(finished / "compact"), str(tmp_path / "teacher")]
    result = subprocess.run(words, capture_output=True, text=True, check=True)
    assert (result.stdout, result.stderr) == ("", "")


def test_a_signal_saves_and_the_resumed_run_equals_the_unbroken_one(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stop_at_step(monkeypatch, 3)
    with pytest.raises(Interrupted, match="step 3") as stopped:
        train_teacher(tiny_config(), None, tmp_path, views=toy_views())
    assert stopped.value.exit_code == 143
    monkeypatch.undo()
    result = train_teacher(tiny_config(), None, tmp_path, views=toy_views(), resume="full")
    assert result.is_finished
    unbroken = read_tensors(finished / "checkpoints" / "denoiser")
    resumed = read_tensors(tmp_path / "checkpoints" / "denoiser")
    assert unbroken.keys() == resumed.keys()
    for name, tensor in unbroken.items():
        assert torch.equal(tensor, resumed[name]), name


def test_autoencoder_resumes_exactly(finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []

    def is_out_of_time(clock: PhaseClock) -> bool:
        asked.append(1)
        return len(asked) == 2

    monkeypatch.setattr(PhaseClock, "is_out_of_time", property(is_out_of_time))
    result = train_teacher(tiny_config(), None, tmp_path, views=toy_views())
    assert not result.is_finished and result.teacher_folder is None
    state = read_state(tmp_path / "checkpoints" / "autoencoder")
    assert state is not None and state["step"] == 2
    train_teacher(tiny_config(), None, tmp_path, views=toy_views(), resume="auto", publish=False)
    expected, got = read_tensors(finished / "autoencoder"), read_tensors(tmp_path / "autoencoder")
    assert all(torch.equal(expected[name], got[name]) for name in expected)


def test_compact_files_alone_go_on_elsewhere(finished: Path, tmp_path: Path) -> None:
    shutil.copytree(finished / "compact", tmp_path / "compact")
    config = tiny_config()
    longer = dataclasses.replace(config, denoiser=dataclasses.replace(config.denoiser, planned_steps=8))
    result = train_teacher(longer, None, tmp_path, views=toy_views(), resume="compact")
    state = read_state(tmp_path / "compact")
    assert result.is_finished and result.step == 8 and state is not None and state["restarted_at"] == 6
    before, after = read_tensors(finished / "compact"), read_tensors(tmp_path / "compact")
    for name in before:
        if name.startswith("vae."):
            assert torch.equal(before[name], after[name]), name
    change = (before["unet.conv_out.weight"] - after["unet.conv_out.weight"]).float().abs().max()
    assert 0 < change < 0.01


def test_a_second_run_into_the_same_folder_is_refused(finished: Path) -> None:
    with pytest.raises(UsageError, match="already holds a training run"):
        train_teacher(tiny_config(), None, finished, views=toy_views())


def test_a_checkpoint_of_another_size_is_refused(finished: Path, tmp_path: Path) -> None:
    config = tiny_config()
    wider = dataclasses.replace(config.denoiser, block_out_channels=(32, 32))
    with pytest.raises(UsageError, match="does not fit this configuration"):
        other = dataclasses.replace(config, denoiser=wider)
        train_teacher(other, None, finished, views=toy_views(), resume="full")


def test_damaged_checkpoints_are_named(tmp_path: Path) -> None:
    folder = tmp_path / "state"
    files = write_checkpoint(
        folder, {"a": torch.ones(4), "b": torch.zeros(9)}, {"step": 1}, max_file_mib=1e-4
    )
    assert [file.name for file in files] == ["part-00001.safetensors", "part-00002.safetensors", STATE_NAME]
    assert torch.equal(read_tensors(folder)["b"], torch.zeros(9))
    content = files[0].read_bytes()
    files[0].write_bytes(content[:-1] + b"!")
    with pytest.raises(UsageError, match=f"'{files[0]}' is damaged: .* checksum; replace it, or delete"):
        read_tensors(folder)
    files[0].write_bytes(content[:20])
    with pytest.raises(UsageError, match="part-00001"):
        read_tensors(folder)
    (folder / STATE_NAME).write_text("{")
    with pytest.raises(UsageError, match="damaged"):
        read_state(folder)


def test_a_crash_between_the_renames_loses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "state"
    write_checkpoint(folder, {"a": torch.zeros(2)}, {"step": 1})
    replace = os.replace

    def crash(source: Path, target: Path) -> None:
        if target == folder:
            raise OSError("the power went")
        replace(source, target)

    for step in (2, 3):
        with monkeypatch.context() as patch, pytest.raises(OSError, match="power"):
            patch.setattr(os, "replace", crash)
            write_checkpoint(folder, {"a": torch.full((2,), float(step))}, {"step": step})
        state = read_state(folder)
        assert (
            state is not None
            and state["step"] == 2
            and torch.equal(read_tensors(folder)["a"], torch.full((2,), 2.0))
        )
    write_checkpoint(folder, {"a": torch.ones(2)}, {"step": 4})
    assert os.listdir(tmp_path) == ["state"] and torch.equal(read_tensors(folder)["a"], torch.ones(2))


def test_compile_ahead_runs_without_a_gpu() -> None:
    assert compile_ahead(tiny_config(), vocabulary_size=50) > 0


def stop_at_step(monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    """Behave as if SIGTERM arrived while the denoiser's step number `step` ran."""
    original = denoiser_training.DenoiserGradients.collect
    sessions: list[Session] = []
    phase = denoiser_training._train_denoiser

    def remember(session: Session, *args: Any, **options: Any) -> Any:
        sessions.append(session)
        return phase(session, *args, **options)

    def accumulate(*args: Any, **options: Any) -> Any:
        if options["step"] == step - 1:
            sessions[0].stop.request(15)
        return original(*args, **options)

    monkeypatch.setattr(denoiser_training, "_train_denoiser", remember)
    monkeypatch.setattr(denoiser_training.DenoiserGradients, "collect", accumulate)
