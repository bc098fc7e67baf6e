"""A recorded pass gives the results and gradients of the plain one, however often its backward pass comes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from uni3d.diffusion.graphed_pass import GraphedPass
from uni3d.diffusion.latent_teacher import LatentDiffusionTeacher
from uni3d.diffusion.lora_score import LoRAFakeScore
from uni3d.diffusion.lora_stack import LoRAFakeScoreStack
from uni3d.diffusion.prompt import PromptContexts
from uni3d.training.guidance import RealLatents


class RepeatingRecorder:
    """Stands for CUDA graphs on a CPU: a replay does the work again, into the same memory."""

    def warm_up(self, work: Callable[[], object]) -> None:
        work()

    def record(self, work: Callable[[], Sequence[Tensor]]) -> tuple[Sequence[Tensor], Callable[[], object]]:
        results = [result.clone() for result in work()]

        def replay() -> None:
            for place, result in zip(results, work(), strict=True):
                place.copy_(result)

        return results, replay


def build(folder: Path) -> tuple[LatentDiffusionTeacher, LoRAFakeScore, list[GraphedPass]]:
    teacher = LatentDiffusionTeacher.from_pretrained(folder)
    fake = LoRAFakeScore(teacher, rank=2, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        for parameter in fake.parameters():
            parameter.add_(0.05)
    passes = [
        GraphedPass(teacher.eager_pass, teacher.network, RepeatingRecorder),
        GraphedPass(teacher.eager_encode, teacher.vae, RepeatingRecorder),
    ]
    return teacher, fake, passes


def both_scores(
    teacher: LatentDiffusionTeacher, fake: LoRAFakeScore, seed: int
) -> tuple[list[Tensor], list[Tensor]]:
    """What the exact form asks: both differentiated down to one x, and the fake score's adapters after it."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(1, *teacher.latent_shape, generator=generator).requires_grad_()
    sigma = torch.rand(1, generator=generator) + 0.5
    context = teacher.encode_text(["a red chair"])
    camera = torch.randn(1, 5, generator=generator)
    asked = teacher.denoise(x, sigma, context)
    made = fake.predict_x0(x, sigma, context, camera)
    student = (asked.x0 - made).square().sum() + asked.middle.sum()
    (of_x,) = torch.autograd.grad(student, x, retain_graph=True)
    trained = torch.autograd.grad(made.square().sum(), fake.parameters())
    return [asked.x0.detach(), made.detach()], [of_x, *trained]


def test_scores_and_gradients_are_those_of_the_plain_pass(tiny_teacher_folder: Path) -> None:
    teacher, fake, (network, _) = build(tiny_teacher_folder)
    for seed in (1, 2):
        teacher.network_pass = teacher.eager_pass
        expected = both_scores(teacher, fake, seed)
        teacher.network_pass = network
        for _ in range(2):
            torch.testing.assert_close(both_scores(teacher, fake, seed), expected, rtol=1e-4, atol=1e-5)
    assert len(network._captured) == 2


def test_half_a_pass_is_that_of_the_whole(tiny_teacher_folder: Path) -> None:
    teacher, _, _ = build(tiny_teacher_folder)
    x = torch.randn(1, *teacher.latent_shape).requires_grad_()
    sigma, context = torch.ones(1), teacher.encode_text(["a red chair"])
    whole = teacher.denoise(x, sigma, context).middle
    (of_whole,) = torch.autograd.grad(whole.sum(), x)
    teacher.middle_pass = GraphedPass(teacher.eager_middle, teacher.network, RepeatingRecorder)
    for _ in range(2):
        half = teacher.middle_features(x, sigma, context)
        torch.testing.assert_close(half, whole, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(torch.autograd.grad(half.sum(), x)[0], of_whole, rtol=1e-4, atol=1e-5)


def test_a_step_of_the_optimiser_is_seen_by_the_next_replay(tiny_teacher_folder: Path) -> None:
    teacher, fake, (network, _) = build(tiny_teacher_folder)
    teacher.network_pass = network
    before = both_scores(teacher, fake, 1)[0][1]
    optimiser = torch.optim.AdamW(fake.parameters(), lr=1e-2, fused=True)
    for parameter in fake.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimiser.step()
    after = both_scores(teacher, fake, 1)[0][1]
    teacher.network_pass = teacher.eager_pass
    assert not torch.allclose(before, after)
    torch.testing.assert_close(after, both_scores(teacher, fake, 1)[0][1], rtol=1e-4, atol=1e-5)


def test_only_what_is_trained_and_reached_is_an_input(tiny_teacher_folder: Path) -> None:
    teacher, fake, (network, _) = build(tiny_teacher_folder)
    teacher.network_pass = network
    both_scores(teacher, fake, 1)
    of_teacher, of_fake = (captured.parameters for captured in network._captured.values())  # pyright: ignore
    assert of_teacher == [] and 0 < len(of_fake) <= len(fake._adapters)


def test_images_are_encoded_with_their_gradient(tiny_teacher_folder: Path) -> None:
    teacher, _, (_, encode) = build(tiny_teacher_folder)
    results: list[list[Tensor]] = []
    for run in (teacher.eager_encode, encode, encode):
        teacher.encode_pass = run
        size = teacher.image_size
        images = torch.rand(1, 3, size, size, generator=torch.Generator().manual_seed(3)).requires_grad_()
        latents = teacher.encode_images(images)
        results.append([latents.detach(), *torch.autograd.grad(latents.square().sum(), images)])
    for result in results[1:]:
        torch.testing.assert_close(result, results[0], rtol=1e-4, atol=1e-5)


def test_adapters_of_many_scenes_are_replayed_with_their_gradient(tiny_teacher_folder: Path) -> None:
    teacher = LatentDiffusionTeacher.from_pretrained(tiny_teacher_folder)
    generators = [torch.Generator().manual_seed(seed) for seed in (1, 2)]
    plain = LoRAFakeScoreStack(teacher, rank=2, generators=generators)
    graphs: list[GraphedPass] = []

    def recorded(run: Callable[..., Any], _what: str) -> GraphedPass:
        graphs.append(GraphedPass(run, teacher.network, RepeatingRecorder))
        return graphs[-1]

    teacher.accelerated = recorded
    captured = LoRAFakeScoreStack(teacher, rank=2, generators=generators)
    x, sigma = torch.randn(4, *teacher.latent_shape), torch.rand(4) + 0.5
    context, camera = teacher.encode_text(["a red chair"] * 4), torch.randn(4, 5)
    for step in range(2):  # the second replay has to see what a step changed
        found = []
        for fake in (plain, captured):
            with torch.no_grad():
                fake.stack.tensor.copy_(torch.linspace(-0.1, 0.1 + step, fake.stack.tensor.numel()).view_as(
                    fake.stack.tensor
                ))  # fmt: skip
            made = fake.predict_x0(x, sigma, context, camera)
            found.append([made.detach(), *torch.autograd.grad(made.square().sum(), fake.stack.tensor)])
        torch.testing.assert_close(found[1], found[0], rtol=1e-4, atol=1e-5)
        assert found[0][1].abs().max() > 0
    assert len(graphs) == 1 and len(graphs[0]._captured) == 1


def test_samples_that_are_drawn_once_are_not_captured(tiny_teacher_folder: Path) -> None:
    teacher, _, (network, _) = build(tiny_teacher_folder)
    teacher.network_pass, teacher.uncaptured = network, network.paused
    contexts = PromptContexts.encode(teacher, "a red chair")

    def draw(*, is_one_of_many: bool) -> Tensor:
        return RealLatents.draw(
            contexts, torch.zeros(2, 5), ["front", "back"], guidance_scale=3.0, num_steps=2,
            generator=torch.Generator().manual_seed(0), is_one_of_many=is_one_of_many,
        ).latents  # fmt: skip

    plain = draw(is_one_of_many=False)
    assert not network._captured
    torch.testing.assert_close(draw(is_one_of_many=True), plain, rtol=1e-4, atol=1e-5)
    assert network._captured


def test_a_backward_pass_that_comes_too_late_is_refused(tiny_teacher_folder: Path) -> None:
    teacher, _, (_, encode) = build(tiny_teacher_folder)
    images = torch.rand(1, 3, teacher.image_size, teacher.image_size).requires_grad_()
    first = encode(images)
    encode(images)
    with pytest.raises(RuntimeError, match="before its backward pass"):
        first.sum().backward()


def test_asking_for_the_type_of_a_network_does_not_go_through_it(
    tiny_teacher_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A GPU would wait for that at every step."""
    teacher, fake, _ = build(tiny_teacher_folder)
    visited: list[str] = []
    walk = torch.nn.Module.named_modules

    def counted(self: torch.nn.Module, *args: Any, **kwargs: Any) -> Iterator[tuple[str, torch.nn.Module]]:
        for name, module in walk(self, *args, **kwargs):
            visited.append(name)
            yield name, module

    monkeypatch.setattr(torch.nn.Module, "named_modules", counted)
    fake._switch(True)
    fake._switch(False)
    assert teacher.dtype == torch.float32 and teacher.device.type == "cpu"
    assert len(visited) < 10


def test_adapters_in_half_precision_compute_what_they_do_in_full(tiny_teacher_folder: Path) -> None:
    full, half = (
        LatentDiffusionTeacher.from_pretrained(tiny_teacher_folder, dtype=dtype)
        for dtype in (torch.float32, torch.bfloat16)
    )
    gradients = []
    for teacher in (full, half):
        fake = LoRAFakeScore(teacher, rank=2, generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            for parameter in fake.parameters():
                parameter.add_(0.05)
        asked, trained = both_scores(teacher, fake, 1)
        assert not torch.equal(*asked) and all(gradient.dtype == torch.float32 for gradient in trained)
        gradients.append(torch.cat([gradient.flatten() for gradient in (asked[1], *trained)]))
    error = (gradients[1] - gradients[0]).norm() / gradients[0].norm()
    assert 0 < float(error) < 0.1
