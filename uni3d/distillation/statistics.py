"""Means of what a training counts, summed on the device and read only when they are reported."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor


class RunningMeans:
    """Means by name since the last `take`; values that are not finite are left out."""

    def __init__(self) -> None:
        self._totals: dict[str, Tensor] = {}
        self._num_updates = 0
        self._skipped: Tensor | None = None

    def add(self, values: Mapping[str, Tensor]) -> None:
        """Count values of any shape, by name."""
        for name, value in values.items():
            value = value.detach().float()
            finite = value.isfinite()
            new = torch.stack([torch.where(finite, value, 0.0).sum(), finite.sum()])
            old = self._totals.get(name)
            self._totals[name] = new if old is None else old + new

    def count_update(self, is_skipped: Tensor) -> None:
        """Count one update of weights, 1 for one without effect."""
        self._num_updates += 1
        self._skipped = is_skipped if self._skipped is None else self._skipped + is_skipped

    def take(self) -> dict[str, float]:
        """The means, "updates" and "skipped"; waits for the device and begins anew."""
        means: dict[str, float] = {}
        if self._totals:
            table = torch.stack(list(self._totals.values())).cpu()
            for name, (total, count) in zip(self._totals, table.tolist(), strict=True):
                means[name] = total / count if count else float("nan")
        means["updates"] = float(self._num_updates)
        means["skipped"] = 0.0 if self._skipped is None else float(self._skipped)
        self._totals, self._num_updates, self._skipped = {}, 0, None
        return means
