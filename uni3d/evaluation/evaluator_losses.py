"""The evaluator's training losses: classification by comparing an image with texts, and the view head.

Legend: B batch, T texts, E embedding.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from uni3d.evaluation.network import VIEW_WORDS

_MASKED = -1e4
OVERHEAD = VIEW_WORDS.index("overhead")


def soft_cross_entropy(logits: Tensor, target: Tensor, *, smoothing: float = 0.0) -> Tensor:
    """Mean cross entropy of logits [B, T] against soft targets [B, T]; rows of zero target do not count."""
    weight = (target.sum(dim=1) > 0).float()
    smoothed = (1 - smoothing) * target + smoothing / target.shape[1]
    losses = -(smoothed * functional.log_softmax(logits, dim=1)).sum(dim=1)
    return (losses * weight).sum() / weight.sum().clamp_min(1)


def noun_loss(logits: Tensor, noun: Tensor, is_compatible: Tensor, *, smoothing: float) -> Tensor:
    """Cross entropy over all nouns; other nouns that also fit the object (bool [T, T]) are left out."""
    open_logits = logits.masked_fill(is_compatible[noun], _MASKED)
    log_probabilities = functional.log_softmax(open_logits, dim=1)
    right = -log_probabilities.gather(1, noun[:, None])[:, 0]
    keep = ~is_compatible[noun]
    spread = -(log_probabilities * keep).sum(dim=1) / keep.sum(dim=1)
    return ((1 - smoothing) * right + smoothing * spread).mean()


def benchmark_loss(logits: Tensor, label: Tensor, *, smoothing: float) -> Tensor:
    """Cross entropy over the benchmark's nouns; images of other objects (label -1) do not count."""
    total = functional.cross_entropy(
        logits, label, ignore_index=-1, label_smoothing=smoothing, reduction="sum"
    )
    return total / (label >= 0).sum().clamp_min(1)


def view_loss(logits: Tensor, view: Tensor, front: Tensor, *, smoothing: float) -> Tensor:
    """Cross entropy of the view word, as far as the object lets one tell.

    front [B] is 1 for objects with a front: all four words count, and twice, as such objects are few. It is 0
    for objects without one, where only overhead against the rest counts, and -1 where that is not known: all
    four words at half weight.
    """
    full = functional.cross_entropy(logits, view, reduction="none", label_smoothing=smoothing)
    log_probabilities = functional.log_softmax(logits, dim=1)
    level = torch.cat(
        [log_probabilities[:, :OVERHEAD], log_probabilities[:, OVERHEAD + 1 :]], dim=1
    ).logsumexp(1)
    coarse = -torch.where(view == OVERHEAD, log_probabilities[:, OVERHEAD], level)
    return torch.where(front == 0, coarse, torch.where(front == 1, 2.0 * full, 0.5 * full)).mean()


def caption_loss(logits: Tensor, key: Tensor) -> Tensor:
    """Symmetric contrastive loss of logits [B, B]; pairs whose captions share a key [B] are no negatives."""
    same = (key[:, None] == key[None, :]) & ~torch.eye(len(key), dtype=torch.bool, device=key.device)
    masked = logits.masked_fill(same, _MASKED)
    diagonal = torch.arange(len(key), device=key.device)
    return (functional.cross_entropy(masked, diagonal) + functional.cross_entropy(masked.T, diagonal)) / 2


def feature_loss(features: Tensor, target: Tensor) -> Tensor:
    """Mean cosine distance (0 to 2) of float32 features [B, F] to `target` [B, F], which gets no gradient.

    Both are taken from the mean of `target` over the batch: what all images share says nothing of any.
    """
    target = target.detach()
    centre = target.mean(dim=0)
    return (1 - functional.cosine_similarity(features - centre, target - centre)).mean()
