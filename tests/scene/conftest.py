"""Where the Triton kernels are compared with their torch twins."""

from __future__ import annotations

import os

import pytest
import torch


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def kernel_device(request: pytest.FixtureRequest) -> torch.device:
    """The GPU, marked `gpu`, or the CPU, on which Triton interprets its kernels where there is no GPU."""
    pytest.importorskip("triton", reason="comes with torch's CUDA builds, and with the extra 'test' on Linux")
    if request.param == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
        pytest.skip("the kernels are compiled for the GPU of this machine")
    return torch.device(request.param)
