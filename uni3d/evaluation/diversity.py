"""How different the results of several seeds, or of several particles, are: looked at from the same cameras.

Noise, Janus faces and wrong colours make results differ too, so these figures mean something only beside
those of quality. Legend: G results, V views, E features of unit length.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from uni3d.errors import UsageError


@dataclass(frozen=True)
class Diversity:
    """`vendi`: the effective number of different results, from 1 (all alike) to `num`; `distance`: mean of
    1 - cosine over pairs of results, from 0 (all alike) to 2."""

    vendi: float
    distance: float
    num: int


def vendi_score(similarity: Tensor) -> float:
    """exp of the entropy of the eigenvalues of `similarity` / G: the effective number of different members.

    `similarity` [G, G] is symmetric and positive semi-definite with ones on its diagonal (Friedman and Dieng
    2023, equation 2). Raises UsageError for another shape or no members.
    """
    if similarity.ndim != 2 or similarity.shape[0] != similarity.shape[1] or len(similarity) == 0:
        raise UsageError(
            f"got similarities of shape {tuple(similarity.shape)}; expected [G, G] with G of 1 or more"
        )
    share = torch.linalg.eigvalsh(similarity.double() / len(similarity)).clamp(min=0)
    share = share / share.sum()
    return float(torch.special.entr(share).sum().exp())


def matched_diversity(embeddings: Tensor) -> Diversity | None:
    """Diversity of G results by their unit embeddings [G, V, E], where view v is the same camera for all.

    Two results are as similar as their views are on average. None for fewer than two results.
    """
    if embeddings.ndim != 3:
        raise UsageError(f"got embeddings of shape {tuple(embeddings.shape)}; expected [G, V, E]")
    num = len(embeddings)
    if num < 2:
        return None
    rows = embeddings.double().flatten(1)
    similarity = rows @ rows.T / embeddings.shape[1]
    off_diagonal = similarity.sum() - similarity.diagonal().sum()
    distance = 1 - float(off_diagonal) / (num * (num - 1))
    return Diversity(vendi_score(similarity), max(distance, 0.0), num)
