"""The web page: `python app.py`, then open the address that it prints."""

from __future__ import annotations

import sys

from uni3d.web.server import main

if __name__ == "__main__":
    sys.exit(main())
