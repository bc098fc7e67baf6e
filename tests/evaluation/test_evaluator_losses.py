"""The evaluator's losses on logits made by hand."""

from __future__ import annotations

import math

import pytest
import torch

from uni3d.evaluation.evaluator_data import basic_colours, colour_targets, compatible_nouns
from uni3d.evaluation.evaluator_losses import (
    caption_loss,
    feature_loss,
    noun_loss,
    soft_cross_entropy,
    view_loss,
)


def test_compatible_nouns_do_not_compete() -> None:
    nouns = ["armchair", "chair", "rock", "alien tree", "tree"]
    compatible = torch.from_numpy(compatible_nouns(nouns))
    assert compatible[0, 1] and compatible[3, 4] and not compatible[0, 2] and not compatible.diagonal().any()
    logits = torch.tensor([[0.0, 50.0, 0.0, -1e9, -1e9]])
    # "chair" is certain, yet the label "armchair" only competes with "rock".
    assert float(noun_loss(logits, torch.tensor([0]), compatible, smoothing=0.0)) == pytest.approx(
        math.log(2)
    )


def test_objects_without_a_front_only_learn_overhead_or_not() -> None:
    logits = torch.tensor([[5.0, 0.0, 0.0, -30.0]])
    back = torch.tensor([2])
    with_front = view_loss(logits, back, torch.tensor([1]), smoothing=0.0)
    without = view_loss(logits, back, torch.tensor([0]), smoothing=0.0)
    unknown = view_loss(logits, back, torch.tensor([-1]), smoothing=0.0)
    assert float(without) == pytest.approx(0.0, abs=1e-6)
    assert float(with_front) > 10 and float(unknown) == pytest.approx(float(with_front) / 4)
    wrong = view_loss(logits, torch.tensor([3]), torch.tensor([0]), smoothing=0.0)
    assert float(wrong) > 30


def test_unknown_colours_do_not_count_and_shades_share_the_target() -> None:
    logits = torch.tensor([[2.0, 0.0], [0.0, 9.0]])
    target = torch.tensor([[1.0, 0.0], [0.0, 0.0]])
    expected = math.log(1 + math.exp(-2))
    assert float(soft_cross_entropy(logits, target)) == pytest.approx(expected)
    assert colour_targets(("green", "red"), ("red", "green", "blue")) == pytest.approx([0.25, 0.75, 0.0])
    assert colour_targets(("beige",), ("red",)) == [0.0]
    assert basic_colours(("light blue", "beige", "red")) == ["blue", "red"]
    assert basic_colours(("beige", "red")) == []


def test_captions_of_the_same_thing_are_no_negatives() -> None:
    logits = torch.tensor([[0.0, 40.0], [40.0, 0.0]])
    assert float(caption_loss(logits, torch.tensor([7, 7]))) == pytest.approx(0.0, abs=1e-6)
    assert float(caption_loss(logits, torch.tensor([7, 8]))) == pytest.approx(40.0, rel=1e-3)


def test_the_feature_loss_compares_directions_from_the_common_mean() -> None:
    target = torch.randn(6, 5, generator=torch.Generator().manual_seed(0), requires_grad=True)
    centre = target.detach().mean(dim=0)
    assert float(feature_loss(target.detach(), target)) == pytest.approx(0, abs=1e-6)
    assert float(feature_loss(centre + 3 * (target.detach() - centre), target)) == pytest.approx(0, abs=1e-6)
    mirrored = (2 * centre - target.detach()).requires_grad_()
    loss = feature_loss(mirrored, target)
    assert float(loss.detach()) == pytest.approx(2, abs=1e-6)
    shared = (target.detach() + 5).requires_grad_()
    feature_loss(shared, target).backward()
    assert target.grad is None and shared.grad is not None and shared.grad.abs().max() > 0
