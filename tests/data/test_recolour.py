"""Recolouring keeps shading and texture and changes the hue of the mask only."""

from __future__ import annotations

import torch

from uni3d.data.recolour import can_recolour, luminance, recolour


def shaded_red(size: int = 16) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """A red field under a left-to-right light, its upper half masked; main colour."""
    main = torch.tensor([[0.8, 0.1, 0.1]])
    shade = torch.linspace(0.4, 1.0, size).expand(1, 1, size, size)
    mask = torch.zeros(1, 1, size, size)
    mask[:, :, : size // 2] = 1
    return main[:, :, None, None] * shade, mask, main


def test_hue_changes_shading_stays_and_the_rest_is_untouched() -> None:
    rgb, mask, main = shaded_red()
    target = torch.tensor([[0.1, 0.3, 0.9]])
    out = recolour(rgb, mask, main, target)
    torch.testing.assert_close(out[:, :, 8:], rgb[:, :, 8:])
    top = out[0, :, 0]
    torch.testing.assert_close(top[2] / top[0], torch.full((16,), 9.0), rtol=1e-4, atol=1e-4)
    before, after = luminance(rgb)[0, 0, 0], luminance(out)[0, 0, 0]
    torch.testing.assert_close(after / after[-1], before / before[-1], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(top[:, -1], target[0], rtol=1e-3, atol=1e-3)


def test_same_target_is_the_identity() -> None:
    rgb, mask, main = shaded_red()
    torch.testing.assert_close(recolour(rgb, mask, main, main), rgb, rtol=1e-4, atol=1e-5)


def test_dark_main_colours_are_left_alone_per_sample() -> None:
    rgb, mask, main = shaded_red()
    both = torch.cat([main, torch.tensor([[0.03, 0.03, 0.03]])])
    assert can_recolour(both).tolist() == [True, False]
    out = recolour(rgb.repeat(2, 1, 1, 1), mask.repeat(2, 1, 1, 1), both, torch.tensor([[0.1, 0.9, 0.1]] * 2))
    assert not torch.equal(out[0], rgb[0])
    assert torch.equal(out[1], rgb[0])


def test_values_stay_in_range() -> None:
    rgb = torch.rand(3, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    out = recolour(rgb, torch.ones(3, 1, 8, 8), torch.full((3, 3), 0.2), torch.ones(3, 3))
    assert out.min() >= 0
    assert out.max() <= 1
