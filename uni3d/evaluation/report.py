"""Markdown pieces of the quality reports."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
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


def stress_note(ceiling: Mapping[str, Any]) -> list[str]:
    """Lines that say what the evaluator's ceiling is on smooth images; none where it was not measured."""
    if ceiling.get("noun_stress_macro") is None:
        return []
    return [
        "",
        f"The evaluator's ceiling falls on smooth images: right object {format_rate(ceiling['noun_stress'])} "
        f"of views, all nouns alike {format_rate(ceiling['noun_stress_macro'])}, after a fixed loss of "
        f"detail (crisp: {format_rate(ceiling['noun'])} and {format_rate(ceiling['noun_macro'])}).",
    ]
