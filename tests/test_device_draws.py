"""What travels to a device by way of pinned memory."""

from __future__ import annotations

import pytest
import torch

from uni3d.device_draws import to_device
from uni3d.scene.backgrounds import random_greys


def test_an_expanded_tensor_can_be_pinned(monkeypatch: pytest.MonkeyPatch) -> None:
    def pin_memory(tensor: torch.Tensor) -> torch.Tensor:
        # As CUDA builds do it: memory of the same strides, filled by a copy, which expanded strides refuse.
        storage = torch.empty(tensor.untyped_storage().nbytes() // tensor.element_size(), dtype=tensor.dtype)
        return storage.as_strided(tensor.shape, tensor.stride()).copy_(tensor)

    monkeypatch.setattr(torch.Tensor, "pin_memory", pin_memory)
    greys = random_greys(4)
    with pytest.raises(RuntimeError, match="single memory location"):
        greys.pin_memory()
    assert to_device(greys, "meta").shape == greys.shape
