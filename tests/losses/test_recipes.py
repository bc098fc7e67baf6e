"""The recipes: identities between methods, work that is not done, names and the table."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from uni3d.losses import divergence as divergences
from uni3d.losses import generator, noise_schedule, recipes

PAPER_TABLE = (
    "diff_instruct di_plus_plus di_star sds dds vsd dmd dmd2 red_diff swift_brush sim sid sida sid_lsg "
    "f_distill uni_instruct"
).split()
BATCH, SHAPE = 4, (3, 2, 2)
NO_EXTRAS = {
    "adversarial_weight": 0.0,
    "regression_weight": 0.0,
    "data_fidelity_weight": 0.0,
    "reward_weight": 0.0,
}


class Setting:
    """One batch with small networks that are differentiable in x_t, made anew for each use."""

    def __init__(self) -> None:
        noise = torch.Generator().manual_seed(1)

        def randn(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=noise, dtype=torch.float64)

        self.x0 = randn(BATCH, *SHAPE).requires_grad_()
        self.sigma = torch.rand(BATCH, generator=noise, dtype=torch.float64) + 0.3
        self.eps = randn(BATCH, *SHAPE)
        self.x_t = self.x0 + self.sigma[:, None, None, None] * self.eps
        self.teacher_x0 = (0.8 * self.x_t).tanh()
        self.fake_x0 = 0.6 * self.x_t + 0.1 * self.x_t.sin()
        self.logits = self.x_t.mean(dim=1, keepdim=True) - 0.2
        self.log_ratio = self.logits.mean(dim=(1, 2, 3))

    def loss(self, recipe: recipes.Recipe, **changes: object) -> Tensor:
        arguments: dict[str, object] = {
            "x0": self.x0,
            "sigma": self.sigma,
            "teacher_x0": self.teacher_x0,
            "fake_x0": self.fake_x0,
            "log_ratio": self.log_ratio,
            "adversarial_logits": self.logits,
        }
        return recipes.generator_loss(recipe, **(arguments | changes))  # type: ignore[arg-type]

    def gradient(self, loss: Tensor) -> Tensor:
        return torch.autograd.grad(loss.sum(), self.x0, retain_graph=True)[0]


@pytest.fixture
def setting() -> Setting:
    return Setting()


def assert_same(setting: Setting, one: Tensor, other: Tensor) -> None:
    assert one.shape == (BATCH,)
    torch.testing.assert_close(one, other)
    torch.testing.assert_close(setting.gradient(one), setting.gradient(other))


def bare(name: str, divergence: str | None = None, **overrides: object) -> recipes.Recipe:
    """The recipe without its adversarial, regression, data and reward terms."""
    return recipes.get(name, divergence, **(NO_EXTRAS | overrides))


# ---- identities


def test_vsd_is_diff_instruct_with_its_weight(setting: Setting) -> None:
    weight = setting.sigma / (1 + setting.sigma.square())
    assert_same(
        setting,
        setting.loss(recipes.get("vsd")),
        setting.loss(recipes.get("diff_instruct"), time_weight=weight),
    )
    assert_same(setting, setting.loss(recipes.get("vsd")), setting.loss(recipes.get("swift_brush")))


def test_vsd_gradient_is_the_weighted_difference_of_noises(setting: Setting) -> None:
    """(1 - abar)(eps_q - eps_p) in latent space."""
    sigma = setting.sigma[:, None, None, None]
    alpha_bar = 1 / (1 + sigma.square())
    eps_q = noise_schedule.eps_from_x0(setting.x_t, setting.teacher_x0, setting.sigma)
    eps_p = noise_schedule.eps_from_x0(setting.x_t, setting.fake_x0, setting.sigma)
    gradient = setting.gradient(setting.loss(recipes.get("vsd")))
    torch.testing.assert_close(gradient, (1 - alpha_bar) * (eps_q - eps_p))


def test_sds_is_vsd_with_a_dirac_student(setting: Setting) -> None:
    sds = setting.loss(recipes.get("sds"), fake_x0=None)
    assert_same(setting, sds, setting.loss(recipes.get("vsd"), fake_x0=setting.x0.detach()))
    sigma = setting.sigma[:, None, None, None]
    eps_q = noise_schedule.eps_from_x0(setting.x_t, setting.teacher_x0, setting.sigma)
    alpha_bar = 1 / (1 + sigma.square())
    torch.testing.assert_close(setting.gradient(sds), (1 - alpha_bar) * (eps_q - setting.eps))


def test_csd_is_what_guidance_alone_adds(setting: Setting) -> None:
    """SDS at scale s less SDS without guidance: w (s - 1)(eps_cond - eps_uncond), so s - 1 is CSD's scale."""
    conditional, unconditional = setting.teacher_x0, 0.5 * setting.x_t.detach()
    guided = unconditional + 7.5 * (conditional - unconditional)
    csd = setting.loss(recipes.get("csd"), teacher_x0=guided, fake_x0=unconditional)
    sds = recipes.get("sds")
    difference = setting.gradient(setting.loss(sds, teacher_x0=guided)) - setting.gradient(
        setting.loss(sds, teacher_x0=unconditional)
    )
    torch.testing.assert_close(setting.gradient(csd), difference)
    assert not recipes.get("csd").needs_fake_score and recipes.get("csd").needs_negative
    assert recipes.get("csd", guidance_scale=1.0).network_passes == (2, 0, 0, 0)


@pytest.mark.parametrize("name", ["uni_instruct", "sim", "sid"])
def test_each_jacobian_can_be_left_out(setting: Setting, name: str) -> None:
    """The gradient is then that of the same loss with the network's prediction held fixed."""
    whole = bare(name)
    for switch, held in (("jac_teacher", "teacher_x0"), ("jac_fake", "fake_x0")):
        recipe = bare(name, **{switch: False})
        assert recipe.needs_teacher_jacobian == (switch != "jac_teacher")
        assert recipe.needs_fake_jacobian == (switch != "jac_fake")
        fixed = {held: getattr(setting, held).detach()}
        expected = setting.gradient(setting.loss(whole, **fixed))
        # The loss runs what it need not differentiate without a graph.
        lazy = {held: lambda held=held: getattr(setting, held) * torch.ones(())}
        torch.testing.assert_close(setting.gradient(setting.loss(recipe, **lazy)), expected)
        assert not torch.allclose(expected, setting.gradient(setting.loss(whole)))
    assert bare(name, jac_teacher=False, jac_fake=False).network_passes.student_backward <= 1


def test_dds_is_sds_less_that_of_the_source(setting: Setting) -> None:
    dds = recipes.get("dds")
    source = torch.randn_like(setting.x0).detach()
    source_teacher = torch.randn_like(source)
    loss = setting.loss(dds, source_x0=source, source_teacher_x0=source_teacher)
    weight = (setting.sigma / (1 + setting.sigma.square()))[:, None, None, None]
    sds_of_source = -weight * (source_teacher - source)
    sds = setting.gradient(setting.loss(recipes.get("sds")))
    torch.testing.assert_close(setting.gradient(loss), sds - sds_of_source)
    # The source itself under its own prompt does not move.
    still = setting.loss(dds, source_x0=setting.x0, source_teacher_x0=setting.teacher_x0)
    assert setting.gradient(still).abs().max() < 1e-12


def test_red_diff_is_uniform_sds_and_a_data_term(setting: Setting) -> None:
    def fidelity(x0: Tensor) -> Tensor:
        return 0.5 * (x0 - 1).square().sum(dim=(1, 2, 3))

    loss = setting.loss(recipes.get("red_diff"), data_fidelity=fidelity)
    sds = setting.loss(recipes.get("sds", time_weighting="uniform"))
    assert_same(setting, loss, sds + fidelity(setting.x0))
    # Its weight on the noise difference is SNR^(-1/2) = sigma.
    eps_q = noise_schedule.eps_from_x0(setting.x_t, setting.teacher_x0, setting.sigma)
    expected = setting.sigma[:, None, None, None] * (eps_q - setting.eps)
    torch.testing.assert_close(setting.gradient(sds), expected)


def test_dmd_is_diff_instruct_over_l1_plus_regression(setting: Setting) -> None:
    l1 = generator.l1_normaliser(setting.x0, setting.teacher_x0)
    base = setting.loss(recipes.get("diff_instruct"), time_weight=l1)
    assert_same(setting, setting.loss(bare("dmd")), base)
    assert_same(setting, setting.loss(bare("dmd2")), base)
    regression = setting.x0.square().mean(dim=(1, 2, 3))
    with_regression = setting.loss(recipes.get("dmd"), regression=regression)
    assert_same(setting, with_regression, base + 0.25 * 12 * regression)


def test_reward_methods_are_their_base_without_reward(setting: Setting) -> None:
    assert_same(setting, setting.loss(bare("di_plus_plus")), setting.loss(recipes.get("diff_instruct")))
    assert_same(setting, setting.loss(bare("di_star")), setting.loss(recipes.get("sim")))
    rewarded = setting.loss(
        recipes.get("di_star", reward_weight=2.0), reward=lambda x0: x0.sum(dim=(1, 2, 3))
    )
    assert_same(setting, rewarded, setting.loss(recipes.get("sim")) - 2 * setting.x0.sum(dim=(1, 2, 3)))


def test_f_distill_of_reverse_kl_is_dmd2(setting: Setting) -> None:
    f_distill = recipes.get("f_distill", "reverse_kl")
    assert_same(setting, setting.loss(f_distill), setting.loss(recipes.get("dmd2")))


def test_f_distill_normalises_psi_over_the_batch(setting: Setting) -> None:
    psi = divergences.get("forward_kl").score_weight(setting.log_ratio.detach())
    weight = psi / psi.mean() * generator.l1_normaliser(setting.x0, setting.teacher_x0)
    expected = -weight[:, None, None, None] * (setting.teacher_x0 - setting.fake_x0)
    gradient = setting.gradient(setting.loss(bare("f_distill", "forward_kl")))
    torch.testing.assert_close(gradient, expected.detach())


def test_sid_with_alpha_one_half_is_exact_reverse_kl(setting: Setting) -> None:
    sid = setting.loss(recipes.get("sid", alpha=0.5, normalisation="none"))
    exact = setting.loss(bare("uni_instruct", "reverse_kl", time_weighting="uniform"))
    assert_same(setting, 2 * sid, exact)


def test_sid_family(setting: Setting) -> None:
    """SiDA is SiD with a GAN term, SiD-LSG SiD on guided predictions, SIM with |.|^2 twice SiD."""
    sid = setting.loss(recipes.get("sid"))
    assert_same(setting, setting.loss(bare("sida")), sid)
    assert_same(setting, setting.loss(recipes.get("sid_lsg")), sid)
    l1 = generator.l1_normaliser(setting.x0, setting.teacher_x0)
    gan = torch.nn.functional.softplus(-setting.logits).mean(dim=(1, 2, 3))
    assert_same(setting, setting.loss(recipes.get("sida")), sid + 1e-4 * 12 * l1 * gan)
    # A pseudo-Huber distance with a large c is |.|^2 / (2 c).
    c = 1e5
    wide = setting.loss(recipes.get("sim", huber_constant=c / 12**0.5, normalisation="l1"))
    assert_same(setting, wide * c, sid)


def test_released_uni_instruct_is_sida(setting: Setting) -> None:
    """Its ratio is one, so forward KL and the KL mixture are both SiD with alpha 1 and a GAN term."""
    sida = setting.loss(recipes.get("sida"))
    for divergence in ("forward_kl", "0.4*forward_kl + 0.6*reverse_kl"):
        released = recipes.get("uni_instruct", divergence, variant="released")
        assert not released.needs_ratio
        assert_same(setting, setting.loss(released, log_ratio=None), sida)


def test_published_uni_instruct_is_released_where_the_ratio_is_one(setting: Setting) -> None:
    published = recipes.get("uni_instruct-detached")
    released = recipes.get("uni_instruct-released")
    at_one = setting.loss(published, log_ratio=torch.zeros(BATCH))
    assert_same(setting, at_one, setting.loss(released))


def test_published_reverse_kl_is_sid_with_alpha_one(setting: Setting) -> None:
    assert_same(
        setting,
        setting.loss(bare("uni_instruct_detached", "reverse_kl")),
        setting.loss(recipes.get("sid", alpha=1.0)),
    )


def test_integral_form_of_reverse_kl_is_vsd(setting: Setting) -> None:
    assert_same(
        setting, setting.loss(bare("uni_instruct_integral", "reverse_kl")), setting.loss(recipes.get("vsd"))
    )


@pytest.mark.parametrize("name", divergences.names())
def test_uni_instruct_forms_reach_the_generator_loss(setting: Setting, name: str) -> None:
    weight = noise_schedule.time_weight("vsd_expansion", setting.sigma)
    inputs = (setting.x0, setting.sigma, setting.teacher_x0, setting.fake_x0, setting.log_ratio, name, weight)
    for overrides, options in (
        ({}, {}),
        ({"ratio": "detached"}, {"ratio": "detached"}),
        ({"variant": "four_term"}, {"form": "four_term"}),
        ({"ui_form": "published"}, {"form": "published"}),
    ):
        recipe = bare("uni_instruct", name, **overrides)
        assert_same(setting, setting.loss(recipe), generator.uni_instruct_loss(*inputs, **options))


# ---- work that is not done


def never() -> Tensor:
    raise AssertionError("called, though its weight is zero")


def never_of(x0: Tensor) -> Tensor:
    raise AssertionError("called, though its weight is zero")


@pytest.mark.parametrize("name", recipes.names())
def test_work_of_weight_zero_is_not_done(setting: Setting, name: str) -> None:
    recipe = bare(name)
    reads_fake = recipe.needs_fake_score or recipe.needs_negative or recipe.student == "interval"
    needed = {"log_ratio": recipe.needs_ratio, "fake_x0": reads_fake}
    source = {"source_x0": setting.x0, "source_teacher_x0": setting.teacher_x0} if name == "dds" else {}
    for nothing, nothing_of in ((None, None), (never, never_of)):
        unused: dict[str, object] = {key: nothing for key, is_needed in needed.items() if not is_needed}
        loss = setting.loss(
            recipe,
            adversarial_logits=nothing,
            reward=nothing_of,
            regression=nothing_of,
            data_fidelity=nothing_of,
            **source,
            **unused,
        )
        assert loss.shape == (BATCH,) and loss.isfinite().all()


def test_without_a_score_term_no_network_is_asked(setting: Setting) -> None:
    """A GAN alone, the first row of the paper's ablation."""
    recipe = recipes.get("uni_instruct", score_weight=0.0)
    assert not (recipe.needs_fake_score or recipe.needs_ratio or recipe.needs_teacher_jacobian)
    loss = setting.loss(recipe, teacher_x0=never, fake_x0=never, log_ratio=never)
    gan = torch.nn.functional.softplus(-setting.logits).mean(dim=(1, 2, 3))
    assert_same(setting, loss, 1e-4 * 12 * gan)


def test_predictions_may_be_functions_and_run_without_gradients_where_possible(setting: Setting) -> None:
    calls: list[tuple[str, bool]] = []

    def lazily(name: str, value: Tensor) -> Callable[[], Tensor]:
        def make() -> Tensor:
            calls.append((name, torch.is_grad_enabled()))
            return value

        return make

    functions = {
        name: lazily(name, getattr(setting, name)) for name in ("teacher_x0", "fake_x0", "log_ratio")
    }
    for name, with_gradients in (("uni_instruct_integral", False), ("uni_instruct", True)):
        calls.clear()
        recipe = bare(name, "js")
        assert_same(setting, setting.loss(recipe, **functions), setting.loss(recipe))
        assert calls == [(part, with_gradients) for part in ("teacher_x0", "fake_x0", "log_ratio")]
        assert recipe.needs_ratio_gradient == with_gradients


@pytest.mark.parametrize(
    ("name", "argument"),
    [
        ("vsd", "fake_x0"),
        ("vsd", "teacher_x0"),
        ("uni_instruct", "log_ratio"),
        ("uni_instruct", "adversarial_logits"),
        ("dmd", "regression"),
        ("red_diff", "data_fidelity"),
        ("di_star", "reward"),
        ("dds", "source_x0"),
    ],
)
def test_missing_input_is_named(setting: Setting, name: str, argument: str) -> None:
    recipe = recipes.get(name)
    with pytest.raises(ValueError, match=argument):
        setting.loss(recipe, **{argument: None})
    if argument in ("regression", "data_fidelity", "reward", "source_x0"):
        assert argument in recipe.required_terms


# ---- what a recipe says about itself


def test_every_method_of_the_table_has_a_recipe() -> None:
    assert set(PAPER_TABLE) <= set(recipes.names())
    for name in PAPER_TABLE:
        assert recipes.get(name.replace("_", "-")) == recipes.get(name)


@pytest.mark.parametrize("name", recipes.names())
def test_jacobians_that_are_not_needed_carry_no_gradient(setting: Setting, name: str) -> None:
    """The flags say where a trainer may drop graphs: the gradient must be the same without them."""
    recipe = recipes.get(name, **{key: 0.0 for key in NO_EXTRAS if key != "adversarial_weight"})
    source = {"source_x0": setting.x0, "source_teacher_x0": setting.teacher_x0} if name == "dds" else {}
    kept = {
        "teacher_x0": (setting.teacher_x0, recipe.needs_teacher_jacobian),
        "fake_x0": (setting.fake_x0, recipe.needs_fake_jacobian),
        "log_ratio": (setting.log_ratio, recipe.needs_ratio_gradient),
    }
    cut = {key: value if needed else value.detach() for key, (value, needed) in kept.items()}
    full = setting.gradient(setting.loss(recipe, **source))
    torch.testing.assert_close(setting.gradient(setting.loss(recipe, **source, **cut)), full)
    for key, (value, needed) in kept.items():
        if needed:
            without = setting.gradient(setting.loss(recipe, **source, **{key: value.detach()}))
            assert (without - full).abs().max() > 1e-6, key


def test_network_passes() -> None:
    expected = {  # student forward and backward, companions forward and backward
        "sds": (2, 0, 0, 0),
        "dds": (4, 0, 0, 0),
        "vsd": (3, 0, 1, 1),
        "sid": (3, 3, 1, 1),
        "dmd2": (4, 1, 15, 15),
        "uni_instruct": (4, 4, 3, 3),
    }
    for name, passes in expected.items():
        assert recipes.get(name).network_passes == passes, name
    assert recipes.get("vsd", guidance_scale=1.0).network_passes.total == 4


def test_ratio_is_normalised_only_where_psi_is_unbounded() -> None:
    for name, wanted in {"forward_kl": True, "jeffreys": True, "js": False, "reverse_kl": False}.items():
        assert recipes.get("uni_instruct", name).normalise_ratio == wanted


def test_method_table() -> None:
    rows = recipes.method_table()
    assert [row.method.replace("-", "_") for row in rows] == recipes.names()
    for row in rows:
        assert all(isinstance(cell, str) and cell and "\n" not in cell for cell in row)
    by_method = {row.method: row for row in rows}
    assert by_method["sds"].divergence == "reverse_kl" and "companions" not in by_method["sds"].cost
    assert "GAN" in by_method["dmd2"].terms and "reward" in by_method["di-star"].terms


def test_recipes_are_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        recipes.get("vsd").alpha = 2.0  # type: ignore[misc]


@pytest.mark.parametrize(
    ("arguments", "overrides", "message"),
    [
        (("vds",), {}, "did you mean 'vsd'"),
        (("vsd", "forward_kl"), {}, "minimises reverse_kl by definition"),
        (("uni_instruct", "fkl"), {}, "unknown divergence"),
        (("uni_instruct",), {"variant": "exakt"}, "unknown method"),
        (("sds",), {"reward_wieght": 1.0}, "did you mean 'reward_weight'"),
        (("sds",), {"reward_weight": -1.0}, "zero or more"),
        (("sds",), {"time_weighting": "vds"}, "did you mean 'vsd'"),
        (("uni_instruct",), {"student": "dirac"}, "single image"),
        (("uni_instruct",), {"form": "sid"}, "is defined for reverse_kl"),
        (("sid",), {"student": "dirac"}, "student='trained'"),
        (("uni_instruct",), {"ui_form": "four_term", "ratio": "attached"}, "as a constant"),
        (("uni_instruct",), {"form": "di"}, "unknown recipe form"),
        (("sid",), {"normalisation": "l2"}, "did you mean 'l1'"),
    ],
)
def test_bad_recipes(arguments: tuple[str, ...], overrides: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        recipes.get(*arguments, **overrides)


def test_a_fixed_method_accepts_its_own_divergence() -> None:
    assert recipes.get("vsd", "reverse-kl") == recipes.get("vsd")
