"""Names that a user types: one spelling for dashes and underscores, and a suggestion for a slip."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


def canonical(name: str) -> str:
    """ "Reverse-KL" and "reverse_kl" are one name."""
    return name.strip().lower().replace("-", "_").replace(" ", "_")


def unknown_name(kind: str, name: object, known: Iterable[str]) -> ValueError:
    """The error for a name that is not among `known`: what was got, the nearest name, and all of them."""
    known = list(known)
    near = difflib.get_close_matches(canonical(str(name)), known, n=1, cutoff=0.5)
    guess = f"did you mean {near[0]!r}? " if near else ""
    return ValueError(f"unknown {kind} {name!r}: {guess}choose one of {', '.join(known)}")
