"""The same parameters of several scenes in one tensor: one kernel for all, yet each scene moves by itself.

The stacked tensor takes part in the losses. The optimiser sees its rows, one parameter for each scene in the
same memory; a row whose `grad` is None stays where it is, with its optimiser state, while the others move.
Legend: S scenes, N numbers of one scene.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn


class ParameterStack:
    """Parameters [S, ...] of S scenes.

    Args:
        rows: one contiguous tensor for each scene, all of one shape and on one device; copied.
        shapes: where a row holds several parameters end to end (then it is [N]), their shapes.
    """

    def __init__(self, rows: Sequence[Tensor], shapes: Sequence[Sequence[int]] | None = None) -> None:
        self.tensor = torch.stack([row.detach() for row in rows]).requires_grad_(True)
        self.members = [nn.Parameter(self.tensor.detach()[index]) for index in range(len(rows))]
        self._shapes = None if shapes is None else [tuple(shape) for shape in shapes]
        self._sizes = [] if shapes is None else [math.prod(shape) for shape in shapes]

    @property
    def num_scenes(self) -> int:
        return self.tensor.shape[0]

    def parts(self, tensor: Tensor | None = None) -> list[Tensor]:
        """The parameters of all scenes, each [S, *shape], with gradient to the stack; or those that another
        tensor of its shape holds."""
        whole = self.tensor if tensor is None else tensor
        if self._shapes is None:
            return [whole]
        pieces = whole.split(self._sizes, dim=1)
        return [
            piece.unflatten(1, shape) if len(shape) != 1 else piece
            for piece, shape in zip(pieces, self._shapes, strict=True)
        ]

    def split(self, row: Tensor) -> list[Tensor]:
        """One scene's row, or a tensor of its shape, as the single parameters that it holds."""
        if self._shapes is None:
            return [row]
        pieces = row.split(self._sizes)
        return [piece.view(shape) for piece, shape in zip(pieces, self._shapes, strict=True)]

    def join(self, parts: Sequence[Tensor]) -> Tensor:
        """The inverse of `split`."""
        return parts[0] if self._shapes is None else torch.cat([part.reshape(-1) for part in parts])

    @torch.no_grad()
    def set_row(self, scene: int, parts: Sequence[Tensor]) -> None:
        """Overwrite one scene's parameters."""
        self.tensor[scene].copy_(self.join(parts))
