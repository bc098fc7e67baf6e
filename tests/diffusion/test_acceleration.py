"""Networks run plainly whenever something faster cannot be had, and say so."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch

from uni3d.diffusion import acceleration
from uni3d.diffusion.acceleration import WithFallback, accelerate
from uni3d.diffusion.graphed_pass import GraphedPass
from uni3d.diffusion.latent_teacher import LatentDiffusionTeacher
from uni3d.diffusion.lora_score import LoRAFakeScore


def predict(teacher: LatentDiffusionTeacher) -> torch.Tensor:
    x = torch.randn(2, *teacher.latent_shape, generator=torch.Generator().manual_seed(1)).to(teacher.device)
    context = teacher.encode_text(["a red chair", "a blue vase"])
    return teacher.predict_x0(x, torch.tensor([0.4, 3.0], device=teacher.device), context)


def test_a_cpu_runs_plainly(tiny_teacher_folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    teacher = LatentDiffusionTeacher.from_pretrained(tiny_teacher_folder)
    before = predict(teacher)
    with caplog.at_level(logging.WARNING):
        assert "chosen" in accelerate(teacher, "off") and "no CUDA device" in accelerate(teacher, "auto")
        assert not caplog.records
        accelerate(teacher, "graphs")
    assert "CUDA graphs need a CUDA device" in caplog.text
    assert torch.equal(predict(teacher), before)


def test_blocks_are_plain_again_when_that_is_chosen(tiny_teacher_folder: Path) -> None:
    pytest.importorskip("triton")
    teacher = LatentDiffusionTeacher.from_pretrained(tiny_teacher_folder)
    before = predict(teacher)
    types = [type(part) for part in teacher.network.modules()]
    assert "fast blocks" in acceleration._with_fast_blocks(teacher)
    assert [type(part) for part in teacher.network.modules()] != types
    accelerate(teacher, "off")
    assert [type(part) for part in teacher.network.modules()] == types
    assert torch.equal(predict(teacher), before)


def test_without_triton_the_blocks_stay_as_they_are(
    tiny_teacher_folder: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(network: object) -> None:
        raise ImportError("No module named 'triton'")

    monkeypatch.setattr(acceleration, "fast_blocks", fail)
    teacher = LatentDiffusionTeacher.from_pretrained(tiny_teacher_folder)
    with caplog.at_level(logging.WARNING):
        assert acceleration._with_fast_blocks(teacher) == ""
    assert "keep their plain blocks (No module named 'triton')" in caplog.text


def test_a_compiler_that_fails_is_left_alone(
    tiny_teacher_folder: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []

    def compile_badly(function: Any) -> Any:
        def fail(*args: Any) -> Any:
            calls.append(function)
            raise RuntimeError("no compiler\nand a long story")

        return fail

    monkeypatch.setattr(torch, "compile", compile_badly)
    teacher = LatentDiffusionTeacher.from_pretrained(tiny_teacher_folder)
    before = predict(teacher)
    accelerate(teacher, "compile")
    with caplog.at_level(logging.WARNING):
        assert torch.equal(predict(teacher), before) and torch.equal(predict(teacher), before)
    assert len(calls) == 1 and len(caplog.records) == 1
    assert "compile of the network failed" in caplog.text and "long story" not in caplog.text


def test_running_out_of_memory_is_passed_on() -> None:
    def exhaust() -> None:
        raise torch.OutOfMemoryError

    with pytest.raises(torch.OutOfMemoryError):
        WithFallback(exhaust, lambda: None, "a pass")()


def test_no_capture_outlives_its_adapters(tiny_teacher_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A graph replays the parameters it was captured with, so a new fake score needs a new capture."""
    teacher = LatentDiffusionTeacher.from_pretrained(tiny_teacher_folder)
    captures = []

    def capture(self: GraphedPass, *_: Any) -> Any:
        captures.append({name for name, value in teacher.network.named_parameters() if value.requires_grad})
        return lambda *tensors: teacher.eager_pass(*tensors, None)

    monkeypatch.setattr(GraphedPass, "_capture", capture)
    graphed = GraphedPass(teacher.eager_pass, teacher.network)
    teacher.network_pass, teacher.network_changed = graphed, graphed.forget
    for num_captures in (1, 2):
        fake = LoRAFakeScore(teacher, rank=2)
        before = predict(teacher), predict(teacher)
        assert torch.equal(*before) and len(captures) == num_captures and captures[-1]
    fake.remove()
    predict(teacher)
    assert captures[-1] == set()


@pytest.mark.gpu
@pytest.mark.parametrize("mode", ["graphs", "auto", "compile"])
def test_a_gpu_computes_the_same_faster(tiny_teacher_folder: Path, mode: str) -> None:
    """Predictions and all gradients of teacher and fake score are those of plain execution."""
    results = []
    for chosen in ("off", mode):
        teacher = LatentDiffusionTeacher.from_pretrained(tiny_teacher_folder, device="cuda")
        fake = LoRAFakeScore(teacher, rank=2, generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            for parameter in fake.parameters():
                parameter.add_(0.05)
        accelerate(teacher, chosen)
        generator = torch.Generator().manual_seed(1)
        x = torch.randn(2, *teacher.latent_shape, generator=generator).cuda().requires_grad_()
        sigma = torch.tensor([0.4, 3.0], device="cuda")
        context = teacher.encode_text(["a red chair", "a blue vase"])
        camera = torch.randn(2, 5, generator=generator).cuda()
        for _ in range(2):  # the second is a replay
            plain = predict(teacher)
            attached = teacher.predict_x0(x, sigma, context)
            (of_teacher,) = torch.autograd.grad(attached.square().sum(), x)
            made = fake.predict_x0(x.detach(), sigma, context, camera)
            of_fake = torch.autograd.grad(made.square().sum(), fake.parameters())
        for network_pass in (teacher.network_pass, teacher.encode_pass):
            assert not isinstance(network_pass, WithFallback) or network_pass.fast is not None
            if isinstance(network_pass, WithFallback):
                assert isinstance(network_pass.fast, GraphedPass)
        results.append([plain, attached.detach(), of_teacher, made.detach(), *of_fake])
    for got, expected in zip(results[1], results[0], strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-2, atol=1e-3)
