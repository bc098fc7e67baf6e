"""Markdown pieces of the quality reports."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


def format_rate(rate: dict[str, Any] | None) -> str:
    """A rate of a JSON report for a table cell: mean and 95 % interval; "-" for none."""
    if rate is None:
        return "-"
    return f"{100 * rate['mean']:.1f} % ({100 * rate['low']:.1f}-{100 * rate['high']:.1f})"


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines of a Markdown table; bars inside cells are escaped."""
    lines = [header, ["---"] * len(header), *rows]
    return ["| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines]
