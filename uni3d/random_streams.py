"""Random numbers for a batch whose rows belong to different scenes: every scene draws from its own generator.

What a scene draws then does not depend on who else is in the batch: `normal((6, 4), [a, b, c])` gives rows 0
and 1 from `a` exactly as `normal((2, 4), a)` does.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class SharedStream:
    """A generator of which `num` processes hold equal copies: each draws for all and takes its own rows.

    What the processes draw together is what one draws for the whole batch, on a CPU number for number.
    """

    generator: torch.Generator
    rank: int
    num: int


# One generator for all rows; or one for each scene, to which the rows are dealt out evenly, in order.
Streams = torch.Generator | SharedStream | Sequence[torch.Generator]


def uniform(shape: Sequence[int], streams: Streams | None) -> Tensor:
    """Uniform in [0, 1), float32 of `shape`, on the generators' device; None draws from torch's own."""
    return _rows(torch.rand, shape, streams)


def normal(shape: Sequence[int], streams: Streams | None) -> Tensor:
    """Standard normal, float32 of `shape`, on the generators' device; None draws from torch's own."""
    return _rows(torch.randn, shape, streams)


def integers(limits: Sequence[int], streams: torch.Generator | SharedStream) -> list[int]:
    """For each of `limits` a whole number from 0 to below it."""
    if isinstance(streams, torch.Generator):
        return [int(torch.randint(limit, (1,), generator=streams, device=streams.device)) for limit in limits]
    # Whatever its limit, a number takes as much from the generator.
    before, after = streams.rank * len(limits), (streams.num - 1 - streams.rank) * len(limits)
    whole = integers([*[1] * before, *limits, *[1] * after], streams.generator)
    return whole[before : before + len(limits)]


def _rows(draw: Callable[..., Tensor], shape: Sequence[int], streams: Streams | None) -> Tensor:
    if streams is None:
        return draw(tuple(shape))
    if isinstance(streams, torch.Generator):
        return draw(tuple(shape), generator=streams, device=streams.device)
    if isinstance(streams, SharedStream):
        num = shape[0]
        whole = _rows(draw, (num * streams.num, *shape[1:]), streams.generator)
        return whole[streams.rank * num : (streams.rank + 1) * num]
    num, rest = divmod(shape[0], len(streams))
    if rest:
        raise ValueError(f"{shape[0]} rows cannot be dealt out evenly to {len(streams)} generators")
    return torch.cat([draw((num, *shape[1:]), generator=one, device=one.device) for one in streams])
