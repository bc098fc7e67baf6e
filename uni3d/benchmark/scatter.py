"""A scatter plot with error bars as a PNG, drawn with Pillow: enough for two figures of a benchmark."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from uni3d.training.checkpoint import atomic_write

_SIZE = (760, 520)
_LEFT, _RIGHT, _TOP, _BOTTOM = 70, 180, 24, 56
_INK, _GRID = (40, 40, 40), (225, 225, 225)
_FONT_SIZE = 13
# Distinct for readers with any colour vision (Okabe and Ito 2008).
_COLOURS = (
    (0, 114, 178), (213, 94, 0), (0, 158, 115), (204, 121, 167), (230, 159, 0), (86, 180, 233), (90, 90, 90),
)  # fmt: skip


@dataclass(frozen=True)
class Value:
    """A mean and the ends of its interval."""

    mean: float
    low: float
    high: float


@dataclass(frozen=True)
class Point:
    """One method; `group` numbers its marker: a disc, a square, ... for each budget."""

    label: str
    x: Value
    y: Value
    group: int = 0


def write_scatter(points: Sequence[Point], path: Path, *, title: str, x_label: str, y_label: str) -> Path:
    """Draw the points with their intervals; labels that appear in several groups share a colour."""
    picture = Image.new("RGB", _SIZE, "white")
    pen = ImageDraw.Draw(picture)
    font = ImageFont.load_default(_FONT_SIZE)
    x_axis = _Axis.around([p.x for p in points], _LEFT, _SIZE[0] - _RIGHT)
    y_axis = _Axis.around([p.y for p in points], _SIZE[1] - _BOTTOM, _TOP)
    _draw_frame(pen, font, x_axis, y_axis)
    pen.text((_LEFT, 3), title, fill=_INK, font=font)
    pen.text(((_LEFT + _SIZE[0] - _RIGHT) / 2, _SIZE[1] - 22), x_label, fill=_INK, font=font, anchor="ma")
    _draw_sideways(picture, y_label, font)
    labels = list(dict.fromkeys(point.label for point in points))
    for point in points:
        colour = _COLOURS[labels.index(point.label) % len(_COLOURS)]
        _draw_point(pen, point, x_axis, y_axis, colour)
    for index, label in enumerate(labels):
        top = _TOP + 18 * index
        pen.rectangle(
            (_SIZE[0] - _RIGHT + 14, top + 3, _SIZE[0] - _RIGHT + 24, top + 13),
            _COLOURS[index % len(_COLOURS)],
        )
        pen.text((_SIZE[0] - _RIGHT + 30, top), label, fill=_INK, font=font)
    return atomic_write(path, lambda temporary: picture.save(temporary, format="PNG"))


@dataclass(frozen=True)
class _Axis:
    low: float
    high: float
    start: float
    end: float
    ticks: tuple[float, ...]

    @staticmethod
    def around(values: Sequence[Value], start: float, end: float) -> _Axis:
        """From pixel `start` to `end`, with room for all intervals and ticks at round numbers."""
        low, high = min((v.low for v in values), default=0.0), max((v.high for v in values), default=1.0)
        margin = 0.06 * (high - low) or max(abs(high), 1e-9) * 0.1
        low, high = low - margin, high + margin
        step = _round_step((high - low) / 5)
        first = math.ceil(low / step)
        ticks = tuple(step * k for k in range(first, math.floor(high / step) + 1))
        return _Axis(low, high, start, end, ticks)

    def pixel(self, value: float) -> float:
        return self.start + (value - self.low) / (self.high - self.low) * (self.end - self.start)


def _round_step(rough: float) -> float:
    """1, 2 or 5 times a power of ten, at least `rough`."""
    power = 10.0 ** math.floor(math.log10(rough))
    return next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough * (1 - 1e-9))


def _draw_frame(
    pen: ImageDraw.ImageDraw, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, x: _Axis, y: _Axis
) -> None:
    for tick in x.ticks:
        pen.line((x.pixel(tick), y.start, x.pixel(tick), y.end), fill=_GRID)
        pen.text((x.pixel(tick), y.start + 6), f"{tick:.4g}", fill=_INK, font=font, anchor="ma")
    for tick in y.ticks:
        pen.line((x.start, y.pixel(tick), x.end, y.pixel(tick)), fill=_GRID)
        pen.text((x.start - 6, y.pixel(tick)), f"{tick:.4g}", fill=_INK, font=font, anchor="rm")
    pen.rectangle((x.start, y.end, x.end, y.start), outline=_INK)


def _draw_point(
    pen: ImageDraw.ImageDraw, point: Point, x: _Axis, y: _Axis, colour: tuple[int, int, int]
) -> None:
    left, middle = x.pixel(point.x.mean), y.pixel(point.y.mean)
    pen.line((x.pixel(point.x.low), middle, x.pixel(point.x.high), middle), fill=colour)
    pen.line((left, y.pixel(point.y.low), left, y.pixel(point.y.high)), fill=colour)
    box = (left - 5, middle - 5, left + 5, middle + 5)
    if point.group == 0:
        pen.ellipse(box, fill=colour)
    elif point.group == 1:
        pen.rectangle(box, fill=colour)
    else:
        pen.regular_polygon((left, middle, 6), 3, fill=colour)


def _draw_sideways(
    picture: Image.Image, text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont
) -> None:
    strip = Image.new("RGB", (_SIZE[1] - _TOP - _BOTTOM, 18), "white")
    ImageDraw.Draw(strip).text((strip.width / 2, 1), text, fill=_INK, font=font, anchor="ma")
    picture.paste(strip.rotate(90, expand=True), (4, _TOP))
