"""One-step image generators: EDM teachers trained on images, and students distilled from them.

`settings` says what a run is (plain data), `teacher_training` and `student_training` are its two programs,
`objective` holds the losses of a distillation step, `loop` what both programs do around their steps.
"""
