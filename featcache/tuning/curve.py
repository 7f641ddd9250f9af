"""The curve of a run, for spreadsheets and for eyes: a CSV, and a picture of loss and accuracy by epoch."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields

from PIL import Image, ImageDraw, ImageFont

from featcache.tuning.train import Epoch

_SIZE = (960, 380)  # pixels
_TRAIN, _CHOICE, _INK, _PALE = (31, 119, 180), (214, 90, 20), (60, 60, 60), (225, 225, 225)
_GRIDLINES = 5


def curve_csv(curve: Sequence[Epoch]) -> str:
    """A line an epoch, the names of the columns first."""
    text = io.StringIO()
    writer = csv.DictWriter(text, [field.name for field in fields(Epoch)], lineterminator="\n")
    writer.writeheader()
    for epoch in curve:
        writer.writerow(
            {name: f"{v:.6g}" if isinstance(v, float) else v for name, v in asdict(epoch).items()}
        )
    return text.getvalue()


def curve_png(curve: Sequence[Epoch], *, best_epoch: int) -> bytes:
    """Loss on the left, accuracy on the right; a vertical line marks the epoch whose weights were best."""
    image = Image.new("RGB", _SIZE, "white")
    draw = ImageDraw.Draw(image)
    epochs = [row.epoch for row in curve]
    panels = (
        ("loss", math.inf, [row.loss for row in curve], [row.choice_loss for row in curve]),
        ("accuracy", 1.0, [row.accuracy for row in curve], [row.choice_accuracy for row in curve]),
    )
    for place, (title, most, train, choice) in enumerate(panels):
        left = 60 + place * _SIZE[0] // 2
        panel = _Panel(
            draw, (left, 50, left + _SIZE[0] // 2 - 90, _SIZE[1] - 45), epochs, [*train, *choice], most
        )
        panel.draw_axes(title)
        panel.draw_mark(best_epoch)
        panel.draw_line(train, _TRAIN)
        panel.draw_line(choice, _CHOICE)
    named = (("training rows", _TRAIN), ("choice rows", _CHOICE), ("best epoch", _PALE))
    for place, (name, colour) in enumerate(named):
        x = 60 + 140 * place
        draw.line([(x, 18), (x + 20, 18)], fill=colour, width=3)
        draw.text((x + 26, 11), name, fill=_INK, font=_font())
    data = io.BytesIO()
    image.save(data, "PNG")
    return data.getvalue()


@dataclass(frozen=True)
class _Panel:
    """A rectangle (left, top, right, bottom) in which epochs run to the right and values upwards."""

    image: ImageDraw.ImageDraw
    box: tuple[int, int, int, int]
    epochs: Sequence[int]
    values: Sequence[float]
    most: float  # that a value can be; the least is 0

    def draw_axes(self, title: str) -> None:
        left, top, right, bottom = self.box
        low, high = self._span
        self.image.text((left, top - 18), title, fill=_INK, font=_font())
        for step in range(_GRIDLINES):
            value = low + (high - low) * step / (_GRIDLINES - 1)
            y = self._y(value)
            self.image.line([(left, y), (right, y)], fill=_PALE)
            self.image.text((left - 44, y - 6), f"{value:.3g}", fill=_INK, font=_font())
        every = max(1, len(self.epochs) // 8)
        for epoch in self.epochs[::every]:
            self.image.text((self._x(epoch) - 3, bottom + 8), str(epoch), fill=_INK, font=_font())
        self.image.text(((left + right) // 2 - 18, bottom + 24), "epoch", fill=_INK, font=_font())
        self.image.rectangle(self.box, outline=_INK)

    def draw_mark(self, epoch: int) -> None:
        if epoch in self.epochs:
            self.image.line(
                [(self._x(epoch), self.box[1]), (self._x(epoch), self.box[3])], fill=_PALE, width=3
            )

    def draw_line(self, values: Sequence[float], colour: tuple[int, int, int]) -> None:
        points = [(self._x(epoch), self._y(value)) for epoch, value in zip(self.epochs, values, strict=True)]
        self.image.line(points, fill=colour, width=2)
        for x, y in points:
            self.image.ellipse([x - 3, y - 3, x + 3, y + 3], fill=colour)

    @property
    def _span(self) -> tuple[float, float]:
        low, high = min(self.values), max(self.values)
        margin = 0.05 * (high - low) or 0.05
        return max(0.0, low - margin), min(self.most, high + margin)

    def _x(self, epoch: int) -> float:
        first, last = self.epochs[0], self.epochs[-1]
        share = (epoch - first) / (last - first) if last > first else 0.5
        return self.box[0] + 10 + share * (self.box[2] - self.box[0] - 20)

    def _y(self, value: float) -> float:
        low, high = self._span
        return self.box[3] - (value - low) / (high - low) * (self.box[3] - self.box[1])


def _font() -> ImageFont.ImageFont | ImageFont.FreeTypeFont:
    return ImageFont.load_default()
