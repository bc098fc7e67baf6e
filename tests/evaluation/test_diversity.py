"""Diversity and retrieval on cases whose figures are known."""

from __future__ import annotations

import pytest
import torch

from uni3d.errors import UsageError
from uni3d.evaluation.diversity import matched_diversity, vendi_score
from uni3d.evaluation.pooled_distance import pooled_frechet
from uni3d.evaluation.retrieval import retrieve
from uni3d.evaluation.statistics import frechet_distance, paired_difference


def unit(*shape: int, seed: int = 0) -> torch.Tensor:
    values = torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return torch.nn.functional.normalize(values, dim=-1)


def test_vendi_score_counts_different_members() -> None:
    assert vendi_score(torch.eye(5)) == pytest.approx(5)
    assert vendi_score(torch.ones(5, 5)) == pytest.approx(1)
    # Two groups of equal size, alike within and unlike between.
    assert vendi_score(torch.block_diag(torch.ones(3, 3), torch.ones(3, 3))) == pytest.approx(2)
    # Two members of similarity c: eigenvalues (1 + c) / 2 and (1 - c) / 2.
    c = torch.tensor(0.3, dtype=torch.float64)
    share = torch.stack([(1 + c) / 2, (1 - c) / 2])
    expected = float((-(share * share.log()).sum()).exp())
    assert vendi_score(torch.tensor([[1, c], [c, 1]])) == pytest.approx(expected)


def test_diversity_compares_the_same_view_of_each_result() -> None:
    views = unit(4, 8)
    same = matched_diversity(torch.stack([views, views, views]))
    assert (
        same is not None and same.vendi == pytest.approx(1) and same.distance == pytest.approx(0, abs=1e-12)
    )
    # The same views in another order are different results.
    turned = matched_diversity(torch.stack([views, views.roll(1, 0)]))
    assert turned is not None and turned.vendi > 1.1
    expected = 1 - float((views * views.roll(1, 0)).sum(-1).mean())
    assert turned.distance == pytest.approx(expected) and turned.num == 2
    assert matched_diversity(views[None]) is None


@pytest.mark.parametrize("similarity", [torch.ones(2, 3), torch.ones(0, 0), torch.ones(3)])
def test_vendi_score_refuses_what_is_no_similarity(similarity: torch.Tensor) -> None:
    with pytest.raises(UsageError):
        vendi_score(similarity)


def test_retrieval_by_the_mean_and_by_each_view() -> None:
    #                             own, others
    similarity = torch.tensor([[0.9, 0.1, 0.2], [0.2, 0.3, 0.1], [0.5, 0.1, 0.0]])
    found = retrieve(similarity, 0)
    assert found.is_first and found.views_first == pytest.approx(2 / 3)
    assert found.mean_similarity == pytest.approx(1.6 / 3) and found.worst_similarity == pytest.approx(0.2)
    assert not retrieve(similarity, 1).is_first


def test_a_blank_view_retrieves_nothing() -> None:
    blank = retrieve(torch.full((2, 4), 0.3), 2)
    assert not blank.is_first and blank.views_first == 0
    with pytest.raises(UsageError, match="at least two"):
        retrieve(torch.ones(2, 1), 0)


def test_paired_difference_sees_what_single_intervals_hide() -> None:
    hardness = torch.randn(30, generator=torch.Generator().manual_seed(0)).numpy()
    gain = 0.1 + 0.01 * torch.randn(30, generator=torch.Generator().manual_seed(1)).numpy()
    difference = paired_difference(hardness + gain, hardness)
    assert difference is not None and difference.excludes_zero and difference.p_value < 1e-4
    assert difference.mean == pytest.approx(gain.mean()) and difference.low < gain.mean() < difference.high
    same = paired_difference(hardness, hardness)
    assert same is not None and not same.excludes_zero and same.p_value == 1.0
    assert paired_difference([], []) is None
    with pytest.raises(UsageError, match="equal numbers"):
        paired_difference([1.0], [1.0, 2.0])


def test_pooled_distance_is_the_distance_of_all_pictures() -> None:
    made, references = [unit(6, 3, seed=i) for i in range(4)], [unit(5, 3, seed=9 + i) for i in range(4)]
    rate = pooled_frechet(made, references, num_resamples=20)
    assert rate is not None and rate.num == 4 and rate.low <= rate.high
    assert rate.mean == pytest.approx(frechet_distance(torch.cat(made), torch.cat(references)))
    assert pooled_frechet([], []) is None
