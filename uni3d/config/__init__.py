"""Settings of the text-to-3D programs: dataclasses, their YAML files, checks of values."""
