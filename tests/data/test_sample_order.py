"""The order of training images: the same for any number of ranks, whole passes, nothing replayed."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from uni3d.data.image_dataset import dataset_of_array
from uni3d.data.sample_order import Draws, SampleOrder, counter_hash, read_draws
from uni3d.errors import UsageError


def joined(order: SampleOrder, step: int, batch: int, world_size: int) -> Draws:
    parts = [order.draws(step, batch=batch, rank=rank, world_size=world_size) for rank in range(world_size)]
    return Draws(
        np.concatenate([part.indices for part in parts]), np.concatenate([part.is_mirrored for part in parts])
    )


@settings(max_examples=40, deadline=None)
@given(
    num=st.integers(1, 40),
    seed=st.integers(-(2**70), 2**70),
    world_size=st.integers(1, 5),
    share=st.integers(1, 9),
    step=st.integers(0, 10**9),
)
def test_ranks_together_read_what_one_rank_reads(
    num: int, seed: int, world_size: int, share: int, step: int
) -> None:
    batch = world_size * share
    alone = SampleOrder(num, seed, is_mirroring=True).draws(step, batch=batch)
    shared = joined(SampleOrder(num, seed, is_mirroring=True), step, batch, world_size)
    assert np.array_equal(alone.indices, shared.indices)
    assert np.array_equal(alone.is_mirrored, shared.is_mirrored)


@pytest.mark.parametrize(("num", "batch"), [(12, 5), (7, 16), (1, 3)])
def test_every_pass_is_a_permutation_and_no_two_are_alike(num: int, batch: int) -> None:
    order = SampleOrder(num, seed=3)
    passes = 6
    steps = -(-num * passes // batch)
    read = np.concatenate([order.draws(step, batch=batch).indices for step in range(steps)])
    rows = read[: num * passes].reshape(passes, num)
    assert all(np.array_equal(np.sort(row), np.arange(num)) for row in rows)
    if num > 5:
        assert len({tuple(row) for row in rows}) == passes


def test_resuming_needs_no_replay_and_seeds_matter() -> None:
    order = SampleOrder(100, seed=1, is_mirroring=True)
    whole = [order.draws(step, batch=16) for step in range(30)]
    fresh = SampleOrder(100, seed=1, is_mirroring=True).draws(29, batch=16)
    assert np.array_equal(whole[29].indices, fresh.indices)
    assert np.array_equal(whole[29].is_mirrored, fresh.is_mirrored)
    assert not np.array_equal(SampleOrder(100, seed=2).draws(0, batch=16).indices, whole[0].indices)
    # Reading backwards gives the same again.
    assert np.array_equal(order.draws(3, batch=16).indices, whole[3].indices)


def test_the_order_never_changes() -> None:
    """Frozen values: another order would change every run that is resumed with a newer version."""
    assert counter_hash(0, 1, np.arange(2)).tolist() == [2558736989570252433, 17913671590881668180]
    draws = SampleOrder(10, seed=5, is_mirroring=True).draws(0, batch=10)
    assert draws.indices.tolist() == [9, 7, 2, 4, 5, 0, 6, 1, 8, 3]
    assert draws.is_mirrored.astype(int).tolist() == [0, 1, 1, 0, 1, 0, 1, 1, 1, 1]


def test_without_shuffling_images_come_in_their_own_order() -> None:
    order = SampleOrder(4, is_shuffled=False)
    assert order.draws(1, batch=3).indices.tolist() == [3, 0, 1]
    assert not order.draws(1, batch=3).is_mirrored.any()


def test_half_of_the_draws_are_mirrored_whatever_the_pass() -> None:
    order = SampleOrder(10, seed=0, is_mirroring=True)
    draws = order.draws(0, batch=20_000)
    assert abs(draws.is_mirrored.mean() - 0.5) < 0.02
    by_image = [draws.is_mirrored[draws.indices == image].mean() for image in range(10)]
    assert max(abs(share - 0.5) for share in by_image) < 0.05


def test_images_are_spread_evenly_over_a_pass() -> None:
    """Each image's place in a pass is uniform: chi-square of 200 passes over 10 places."""
    order = SampleOrder(10, seed=11)
    rows = order.draws(0, batch=10 * 200).indices.reshape(200, 10)
    for image in range(10):
        counts = np.bincount(np.argwhere(rows == image)[:, 1], minlength=10)
        assert ((counts - 20) ** 2 / 20).sum() < 40


def test_reading_draws_mirrors_the_images_it_says() -> None:
    pixels = np.arange(3 * 3 * 4 * 4, dtype=np.uint8).reshape(3, 3, 4, 4)
    dataset = dataset_of_array(pixels, np.array([2, 0, 1]), name="x", where="x")
    batch = read_draws(dataset, Draws(np.array([2, 0]), np.array([True, False])))
    assert np.array_equal(batch.images[0], pixels[2][..., ::-1]) and batch.images.dtype == np.uint8
    assert np.array_equal(batch.images[1], pixels[0])
    assert batch.labels is not None and batch.labels.tolist() == [1, 2]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"step": -1, "batch": 4}, "got step -1 and batch 4; expected"),
        ({"step": 0, "batch": 5, "world_size": 2}, "cannot be shared by 2 ranks; choose a multiple of 2"),
        ({"step": 0, "batch": 4, "rank": 2, "world_size": 2}, "rank 2 of 2"),
    ],
)
def test_refusals(arguments: dict[str, int], message: str) -> None:
    step = arguments.pop("step")
    with pytest.raises(UsageError, match=message):
        SampleOrder(10).draws(step, **arguments)  # pyright: ignore[reportArgumentType]
    with pytest.raises(UsageError, match="at least one"):
        SampleOrder(0)
