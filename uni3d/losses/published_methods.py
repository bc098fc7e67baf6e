"""The published methods as recipes, one paragraph each.

Values marked (from memory) in a note could not be checked against the paper's text.
"""

from __future__ import annotations

from dataclasses import replace

from uni3d.losses import divergence as divergences
from uni3d.losses.recipe import Recipe


def published_methods() -> tuple[Recipe, ...]:
    """All of them, in the order of `uni3d methods`."""
    reverse_kl = divergences.get("reverse_kl")
    diff_instruct = Recipe(
        name="diff_instruct",
        title="Diff-Instruct",
        divergence=reverse_kl,
        form="score_difference",
        time_weighting="integral",
    )
    di_plus_plus = replace(
        diff_instruct,
        name="di_plus_plus",
        title="Diff-Instruct++",
        note="the teacher is guided; how much the reward weighs is the user's",
        reward_weight=1.0,
    )
    sim = Recipe(
        name="sim",
        title="Score implicit matching",
        divergence=reverse_kl,
        form="sim",
        time_weighting="uniform",
    )
    di_star = replace(
        sim,
        name="di_star",
        title="Diff-Instruct*",
        note="the teacher is guided; reward as in Diff-Instruct++",
        reward_weight=1.0,
    )
    vsd = replace(
        diff_instruct,
        name="vsd",
        title="Variational score distillation (ProlificDreamer)",
        time_weighting="vsd",
    )
    swift_brush = replace(vsd, name="swift_brush", title="SwiftBrush", note="VSD of an amortised generator")
    sds = replace(
        vsd,
        name="sds",
        title="Score distillation sampling (DreamFusion)",
        student="dirac",
        guidance_scale=100.0,
    )
    dds = replace(sds, name="dds", title="Delta denoising score", student="source", guidance_scale=7.5)
    csd = replace(
        sds,
        name="csd",
        title="Classifier score distillation",
        note="the guidance scale multiplies the whole; a negative prompt takes the place of the empty one",
        student="classifier",
        guidance_scale=7.5,
    )
    red_diff = replace(
        sds,
        name="red_diff",
        title="RED-diff",
        note="weight SNR^-1/2 on eps (from memory), uniform in x0 units",
        time_weighting="uniform",
        data_fidelity_weight=1.0,
        guidance_scale=1.0,
    )
    return (
        diff_instruct,
        di_plus_plus,
        di_star,
        sds,
        dds,
        csd,
        *_inversion_recipes(sds),
        vsd,
        *_dmd_recipes(diff_instruct),
        red_diff,
        swift_brush,
        sim,
        *_sid_recipes(),
        *_discriminator_recipes(diff_instruct),
        *_uni_instruct_recipes(),
    )


def _inversion_recipes(sds: Recipe) -> tuple[Recipe, ...]:
    """Methods whose noise is the render's own, found by running DDIM backwards."""
    # LucidDreamer (Liang et al. 2024): eps_q(x_t; prompt) - eps_q(x_s; no prompt), s one step before t.
    # DDIM keeps the noise, so eps_q(x_s) = (x_t - D_q(x_s)) / sigma_t and Delta = D_q(x_t) - D_q(x_s).
    ism = replace(
        sds,
        name="ism",
        title="Interval score matching (LucidDreamer)",
        note="four steps without the prompt lead to t; guidance 7.5 (both from memory)",
        student="interval",
        noise="inverted",
        inversion_steps=4,
        guidance_scale=7.5,
    )
    # Lukoianov et al. 2024: SDS whose noise is inverted, with the guidance of the denoising turned round.
    sdi = replace(
        sds,
        name="sdi",
        title="Score distillation via reparametrised DDIM",
        note="ten steps of guidance -7.5, the loss's own turned round (from memory)",
        noise="inverted",
        inversion_steps=10,
        inversion_guidance_scale=-7.5,
        guidance_scale=7.5,
    )
    return ism, sdi


def _discriminator_recipes(diff_instruct: Recipe) -> tuple[Recipe, ...]:
    """Text-to-3D methods that lean on the discriminator."""
    # Adversarial score distillation (Wei et al. 2024) reads SDS as a Wasserstein GAN; here the discriminator
    # alone moves the scene, by the linear loss: with an optimal logit the reverse KL without any score.
    adversarial = replace(
        diff_instruct,
        name="adv_sd",
        title="Adversarial distillation, discriminator alone",
        note="after adversarial score distillation (Wei et al. 2024), without its score term",
        score_weight=0.0,
        adversarial_weight=1.0,
        adversarial_kind="linear",
        time_weighting="vsd",
    )
    # Jensen-Shannon distillation: bounded weight r / (1 + r) of the score difference, r from the logit.
    jensen_shannon = replace(
        diff_instruct,
        name="jsd",
        title="Jensen-Shannon distillation",
        note="the log-odds of a discriminator weigh VSD's difference of scores",
        divergence=divergences.get("js"),
        time_weighting="vsd",
    )
    return adversarial, jensen_shannon


def _dmd_recipes(diff_instruct: Recipe) -> tuple[Recipe, ...]:
    dmd = replace(
        diff_instruct,
        name="dmd",
        title="Distribution matching distillation",
        note="regression: 0.25 LPIPS on the teacher's noise-image pairs (from memory)",
        time_weighting="uniform",
        normalisation="l1",
        regression_weight=0.25,
    )
    dmd2 = replace(
        dmd,
        name="dmd2",
        title="DMD2",
        note="GAN weight and five fake score steps from memory",
        regression_weight=0.0,
        adversarial_weight=3e-3,
        fake_steps=5,
    )
    f_distill = replace(
        dmd2,
        name="f_distill",
        title="f-distill",
        note="GAN weight as in DMD2",
        divergence=divergences.get("js"),
        accepts_divergence=True,
        self_normalise=True,
        fake_steps=1,
    )
    return dmd, dmd2, f_distill


def _sid_recipes() -> tuple[Recipe, ...]:
    sid = Recipe(
        name="sid",
        title="Score identity distillation",
        note="alpha 1.0; 1.2 for some data sets; 0.5 is the exact gradient",
        divergence=divergences.get("reverse_kl"),
        form="sid",
        time_weighting="uniform",
        normalisation="l1",
    )
    sida = replace(
        sid,
        name="sida",
        title="SiD with adversarial loss",
        adversarial_weight=1e-4,
        normalise_adversarial=True,
    )
    sid_lsg = replace(
        sid,
        name="sid_lsg",
        title="SiD with long-short guidance",
        note="the fake score is guided in training and use (from memory)",
        guidance_scale=1.5,
        fake_guidance_scale=1.5,
    )
    return sid, sida, sid_lsg


def _uni_instruct_recipes() -> tuple[Recipe, ...]:
    exact = Recipe(
        name="uni_instruct",
        title="Uni-Instruct, exact gradient",
        divergence=divergences.get("forward_kl"),
        accepts_divergence=True,
        form="uni_instruct",
        time_weighting="vsd_expansion",
        adversarial_weight=1e-4,
    )
    integral = replace(
        exact,
        name="uni_instruct_integral",
        title="Uni-Instruct, integral form without Jacobians",
        note="the same objectives by another weight over time; the cheapest exact estimator",
        form="score_difference",
        time_weighting="vsd",
    )
    four_term = replace(
        exact,
        name="uni_instruct_four_term",
        title="Uni-Instruct, exact with detached ratio",
        ui_form="four_term",
    )
    detached = replace(
        exact,
        name="uni_instruct_detached",
        title="Uni-Instruct, as published",
        note="what the authors' program intends, with a true ratio; biased",
        ui_form="published",
        time_weighting="uniform",
        normalisation="l1",
        normalise_adversarial=True,
    )
    released = replace(
        detached,
        name="uni_instruct_released",
        title="Uni-Instruct, as the released program evaluates",
        note="its ratio is 1 to three digits: SiDA with alpha 1, times psi(1)",
        ratio="one",
    )
    return exact, integral, four_term, detached, released
