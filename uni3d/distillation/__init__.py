"""One-step image generators distilled from EDM teachers, with the losses that text to 3D uses."""
