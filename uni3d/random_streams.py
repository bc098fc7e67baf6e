"""Random numbers for a batch whose rows belong to different scenes: every scene draws from its own generator.

What a scene draws then does not depend on who else is in the batch: `normal((6, 4), [a, b, c])` gives rows 0
and 1 from `a` exactly as `normal((2, 4), a)` does.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

# One generator for all rows, or one for each scene; the rows are then dealt out evenly, in order.
Streams = torch.Generator | Sequence[torch.Generator]


def uniform(shape: Sequence[int], streams: Streams | None) -> Tensor:
    """Uniform in [0, 1), float32 of `shape`, on the generators' device; None draws from torch's own."""
    return _rows(torch.rand, shape, streams)


def normal(shape: Sequence[int], streams: Streams | None) -> Tensor:
    """Standard normal, float32 of `shape`, on the generators' device; None draws from torch's own."""
    return _rows(torch.randn, shape, streams)


def _rows(draw: Callable[..., Tensor], shape: Sequence[int], streams: Streams | None) -> Tensor:
    if streams is None:
        return draw(tuple(shape))
    if isinstance(streams, torch.Generator):
        return draw(tuple(shape), generator=streams, device=streams.device)
    num, rest = divmod(shape[0], len(streams))
    if rest:
        raise ValueError(f"{shape[0]} rows cannot be dealt out evenly to {len(streams)} generators")
    return torch.cat([draw((num, *shape[1:]), generator=one, device=one.device) for one in streams])
