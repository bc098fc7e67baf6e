"""Lets the benchmark's tests import their stand-in (pytest's importlib mode adds no folder)."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
