"""The mathematics of uni3d: tensors in, tensors out (torch only; no I/O, no optimiser, no device placement).

`divergence` holds the f-divergences, `generator` the losses that move the student, `fake_score` and
`discriminator` those of its two companions, `noise_schedule` the conversions every room shares, and `recipes`
the published methods as configurations of these blocks.

Notation, used in all of them: q is the teacher's density, p the student's, both diffused to
x_t = x0 + sigma * eps; r = q_t / p_t; D_q (`teacher_x0`) and D_p (`fake_x0`) predict x0 from x_t;
Delta = D_q - D_p = sigma^2 grad log r.
"""

from uni3d.losses import discriminator, divergence, fake_score, generator, noise_schedule, recipes

__all__ = ["discriminator", "divergence", "fake_score", "generator", "noise_schedule", "recipes"]
