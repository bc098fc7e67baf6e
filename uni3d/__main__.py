"""`python -m uni3d` is the same as `uni3d`."""

from __future__ import annotations

import sys

from uni3d.cli import main

if __name__ == "__main__":
    sys.exit(main())
