"""The text-to-3D programs, which put the rooms together."""
