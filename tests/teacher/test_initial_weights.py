"""A teacher that starts from another one: it computes the same at first, and grows where it is asked to."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import pytest
import torch
from teacher_fixtures import SIZE, tiny_config, toy_views

from uni3d.errors import ConfigError, MissingWeightsError, UsageError
from uni3d.teacher.autoencoder import build_autoencoder
from uni3d.teacher.checkpoint_files import read_tensors
from uni3d.teacher.initial_weights import fit_weights, grow, read_initial_teacher
from uni3d.teacher.sampling import load_teacher
from uni3d.teacher.settings import TeacherConfig
from uni3d.teacher.trainable import parameter_names
from uni3d.teacher.training import train_teacher


@pytest.fixture(scope="module")
def earlier(tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("earlier")
    result = train_teacher(tiny_config(), None, output, views=toy_views())
    assert result.teacher_folder is not None
    return result.teacher_folder


def more_channels(config: TeacherConfig, num: int) -> TeacherConfig:
    larger = dataclasses.replace(config.autoencoder, latent_channels=num)
    return dataclasses.replace(config, autoencoder=larger)


def fitted(network: torch.nn.Module, prefix: str, earlier: Path) -> torch.nn.Module:
    """`network` with the weights it gets from the teacher in `earlier`."""
    names = parameter_names(network, prefix)
    own = dict(zip(names, (p.detach() for p in network.parameters()), strict=True))
    weights = fit_weights(own, read_initial_teacher(earlier), load_teacher(earlier).tokenizer)
    with torch.no_grad():
        for name, parameter in zip(names, network.parameters(), strict=True):
            parameter.copy_(weights[name])
    return network.eval()


def test_a_grown_autoencoder_first_decodes_as_the_old_one(earlier: Path) -> None:
    old = load_teacher(earlier).autoencoder
    num_old = old.config["latent_channels"]
    config = more_channels(tiny_config(), num_old + 3).autoencoder
    new = fitted(build_autoencoder(config), "vae", earlier)
    images = torch.rand(2, 3, SIZE, SIZE) * 2 - 1
    with torch.no_grad():
        before, after = old.encode(images).latent_dist, new.encode(images).latent_dist
        torch.testing.assert_close(after.mean[:, :num_old], before.mean, rtol=0, atol=1e-5)
        torch.testing.assert_close(after.logvar[:, :num_old], before.logvar, rtol=0, atol=1e-5)
        torch.testing.assert_close(
            new.decode(after.mean).sample, old.decode(before.mean).sample, rtol=0, atol=1e-5
        )
        # What is new carries something, so that there is a gradient to learn to use it.
        assert after.mean[:, num_old:].abs().mean() > 1e-3


def test_a_grown_denoiser_first_predicts_as_the_old_one(earlier: Path) -> None:
    from uni3d.teacher.denoiser import build_unet

    old = load_teacher(earlier).unet
    num_old = old.config["in_channels"]
    config = more_channels(tiny_config(), num_old + 2)
    new = fitted(build_unet(config.denoiser, config.autoencoder), "unet", earlier)
    latents = torch.randn(2, num_old + 2, 8, 8)
    context = torch.randn(2, 5, config.denoiser.context_dim)
    times = torch.tensor([10, 800])
    with torch.no_grad():
        before = old(latents[:, :num_old], times, context).sample
        after = new(latents, times, context).sample
    assert after.shape == latents.shape
    torch.testing.assert_close(after[:, :num_old], before, rtol=0, atol=1e-5)


def test_training_starts_from_a_teacher_and_its_card_says_so(earlier: Path, tmp_path: Path) -> None:
    config = tiny_config(initial_teacher=str(earlier))
    still = dataclasses.replace(
        config,
        autoencoder=dataclasses.replace(config.autoencoder, learning_rate=0.0),
        denoiser=dataclasses.replace(config.denoiser, learning_rate=0.0),
    )
    result = train_teacher(still, None, tmp_path, views=toy_views())
    assert result.teacher_folder is not None
    weights = read_tensors(tmp_path / "compact")
    source = read_initial_teacher(earlier).weights
    for name in ("unet.conv_in.weight", "text_encoder.embeddings.token_embedding.weight"):
        torch.testing.assert_close(weights[name].float(), source[name], rtol=0, atol=1e-3)
    training = json.loads((result.teacher_folder / "training.json").read_text())
    assert training["initial_teacher"]["training"]["denoiser"]["steps"] == 6
    assert (
        "It started from a teacher that had seen 48 images"
        in (result.teacher_folder / "README.md").read_text()
    )


def test_an_autoencoder_can_be_kept(earlier: Path, tmp_path: Path) -> None:
    """Without a single step of its training: what the denoiser knows of its latents stays true."""
    config = tiny_config(initial_teacher=str(earlier))
    kept = dataclasses.replace(config.autoencoder, planned_minutes=0.0)
    result = train_teacher(
        dataclasses.replace(config, autoencoder=kept), None, tmp_path / "out", views=toy_views()
    )
    assert result.teacher_folder is not None
    old, new = (load_teacher(folder).autoencoder for folder in (earlier, result.teacher_folder))
    pixels = torch.from_numpy(toy_views().images[:4, ..., :3])
    images = pixels.permute(0, 3, 1, 2) / 127.5 - 1
    with torch.no_grad():
        before, after = (vae.encode(images).latent_dist.mean for vae in (old, new))
        torch.testing.assert_close(new.decode(after).sample, old.decode(before).sample, rtol=0, atol=0.02)
    assert (after - before).abs().mean() < 0.2 * before.std(), "but for whitening, the latents are the same"
    with pytest.raises(ConfigError, match="set initial_teacher or train longer"):
        tiny_config(autoencoder=kept)


def test_known_words_keep_their_embedding_and_new_ones_get_one(earlier: Path) -> None:
    teacher = read_initial_teacher(earlier)
    tokenizer = load_teacher(earlier).tokenizer
    name = "text_encoder.embeddings.token_embedding.weight"
    rows, width = teacher.weights[name].shape
    own = {name: torch.full((rows + 2, width), 7.0)}
    got = fit_weights(own, dataclasses.replace(teacher, tokens={"chair</w>": 3}), tokenizer)[name]
    row = tokenizer.get_vocab()["chair</w>"]
    assert torch.equal(got[row], teacher.weights[name][3])
    assert (got[torch.arange(rows + 2) != row] == 7).all()


def test_growing_keeps_old_outputs_blind_to_new_inputs() -> None:
    grown = grow(torch.full((4, 3), 9.0), torch.ones(2, 2))
    assert grown.tolist() == [[1, 1, 0], [1, 1, 0], [9, 9, 9], [9, 9, 9]]
    halves = grow(torch.full((6,), 9.0), torch.tensor([1.0, 2.0, 3.0, 4.0]), halved_axes=(0,))
    assert halves.tolist() == [1, 2, 9, 3, 4, 9]


def test_bad_initial_teachers_are_refused(earlier: Path, tmp_path: Path) -> None:
    with pytest.raises(MissingWeightsError, match="nowhere"):
        train_teacher(
            tiny_config(initial_teacher=str(tmp_path / "nowhere")), None, tmp_path / "a", views=toy_views()
        )
    config = tiny_config(initial_teacher=str(earlier))
    deeper = dataclasses.replace(config.denoiser, layers_per_block=3, block_out_channels=(32, 64))
    with pytest.raises(UsageError, match="has other networks than the settings ask for"):
        train_teacher(dataclasses.replace(config, denoiser=deeper), None, tmp_path / "b", views=toy_views())
    damaged = shutil.copytree(earlier, tmp_path / "damaged")
    (damaged / "training.json").write_text("{")
    with pytest.raises(UsageError, match="training.json' is damaged"):
        read_initial_teacher(damaged)
