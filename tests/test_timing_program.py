"""What the programs that measure something say of bad input."""

from __future__ import annotations

import pytest
import torch

from uni3d.timing_program import argument_parser


@pytest.mark.parametrize("device", ["cuda", "cuda:1", "warp9"])
def test_a_device_that_is_not_there_is_named(
    device: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    parser = argument_parser("uni3d.something", "About it.")
    assert parser.parse_args([]).device == "cpu"
    with pytest.raises(SystemExit) as stop:
        parser.parse_args(["--device", device])
    assert stop.value.code == 2
    assert repr(device) in capsys.readouterr().err
