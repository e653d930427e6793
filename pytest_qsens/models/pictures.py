"""Small pictures drawn by code: the default images, one set for calibration and another for evaluation.

Shapes without antialiasing and without fonts, so that every machine draws the same pixels.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

    from PIL.Image import Image
    from PIL.ImageDraw import ImageDraw

Color = tuple[int, int, int]


@dataclass(frozen=True)
class Picture:
    """A picture with what one might say about it. ``paint`` fills the whole canvas; ``size`` is (width, height)."""

    caption: str
    question: str
    size: tuple[int, int]
    paint: Callable[[ImageDraw, int, int], None]

    def draw(self) -> Image:
        """Draw the picture: an RGB image of ``size``."""
        from PIL import Image, ImageDraw

        image = Image.new("RGB", self.size)
        self.paint(ImageDraw.Draw(image), *self.size)
        return image


def _fill(draw: ImageDraw, width: int, height: int, top: Color, bottom: Color) -> None:
    """Fill with a vertical gradient."""
    for y in range(height):
        color = tuple((a * (height - 1 - y) + b * y) // (height - 1) for a, b in zip(top, bottom, strict=True))
        draw.line([(0, y), (width, y)], fill=color)


def _strokes(draw: ImageDraw, box: tuple[int, int, int, int], seed: int, color: Color) -> None:
    """Draw rows of short strokes that look like handwriting."""
    rng = random.Random(seed)  # noqa: S311 - a drawing, not a secret
    left, top, right, bottom = box
    for y in range(top, bottom - 8, 14):
        x = left
        while x < right - 10:
            points = [(x + 2 * step, y + rng.randint(0, 8)) for step in range(rng.randint(3, 9))]
            draw.line(points, fill=color, width=2)
            x = points[-1][0] + 6


def _red_circle(draw: ImageDraw, width: int, height: int) -> None:
    draw.rectangle((0, 0, width, height), fill=(190, 190, 190))
    draw.ellipse((width // 4, height // 4, 3 * width // 4, 3 * height // 4), fill=(210, 40, 30))


def _house(draw: ImageDraw, width: int, height: int) -> None:
    _fill(draw, width, height, (120, 180, 240), (220, 235, 250))
    draw.rectangle((0, 3 * height // 4, width, height), fill=(70, 140, 60))
    draw.rectangle((width // 4, height // 2, 3 * width // 4, 7 * height // 8), fill=(200, 160, 110))
    roof = [(width // 5, height // 2), (width // 2, height // 5), (4 * width // 5, height // 2)]
    draw.polygon(roof, fill=(150, 50, 40))
    draw.rectangle((7 * width // 16, 5 * height // 8, 9 * width // 16, 7 * height // 8), fill=(80, 50, 30))


def _checkerboard(draw: ImageDraw, width: int, height: int) -> None:
    side = 16
    for y in range(0, height, side):
        for x in range(0, width, side):
            shade = (30, 30, 40) if (x // side + y // side) % 2 else (235, 230, 215)
            draw.rectangle((x, y, x + side - 1, y + side - 1), fill=shade)


def _letter(draw: ImageDraw, width: int, height: int) -> None:
    draw.rectangle((0, 0, width, height), fill=(250, 248, 238))
    _strokes(draw, (14, 14, width - 14, height - 10), seed=3, color=(30, 30, 90))


def _bars(draw: ImageDraw, width: int, height: int) -> None:
    draw.rectangle((0, 0, width, height), fill=(255, 255, 255))
    for index, share in enumerate((0.3, 0.55, 0.45, 0.8, 0.65)):
        left = 12 + index * (width - 24) // 5
        top = int(height - 12 - share * (height - 24))
        draw.rectangle((left, top, left + (width - 24) // 5 - 8, height - 12), fill=(40, 90 + 30 * index, 170))
    draw.line((8, height - 12, width - 8, height - 12), fill=(0, 0, 0), width=2)


def _sunset(draw: ImageDraw, width: int, height: int) -> None:
    _fill(draw, width, height, (40, 30, 90), (250, 140, 60))
    draw.pieslice((width // 3, height // 2, 2 * width // 3, height), 180, 360, fill=(255, 230, 120))
    draw.rectangle((0, 3 * height // 4, width, height), fill=(20, 40, 70))


def _triangle(draw: ImageDraw, width: int, height: int) -> None:
    _fill(draw, width, height, (250, 250, 200), (210, 230, 160))
    draw.polygon(
        [(width // 2, height // 8), (width // 8, 7 * height // 8), (7 * width // 8, 7 * height // 8)],
        fill=(30, 120, 70),
    )


def _night(draw: ImageDraw, width: int, height: int) -> None:
    _fill(draw, width, height, (5, 5, 25), (30, 30, 70))
    rng = random.Random(11)  # noqa: S311 - a drawing, not a secret
    for _ in range(60):
        x, y = rng.randrange(width), rng.randrange(height)
        draw.rectangle((x, y, x + 1, y + 1), fill=(255, 255, 230))
    draw.ellipse((2 * width // 3, height // 8, 2 * width // 3 + 30, height // 8 + 30), fill=(240, 240, 220))


def _blue_squares(draw: ImageDraw, width: int, height: int) -> None:
    draw.rectangle((0, 0, width, height), fill=(245, 240, 230))
    for index in range(3):
        left = width // 10 + index * 3 * width // 10
        draw.rectangle(
            (left, height // 3, left + width // 5, height // 3 + width // 5), fill=(30, 60, 200 - 40 * index)
        )


def _flag(draw: ImageDraw, width: int, height: int) -> None:
    for index, color in enumerate(((200, 30, 45), (250, 250, 250), (20, 60, 140))):
        draw.rectangle((0, index * height // 3, width, (index + 1) * height // 3), fill=color)


def _sign(draw: ImageDraw, width: int, height: int) -> None:
    _fill(draw, width, height, (160, 190, 160), (90, 120, 90))
    draw.rectangle(
        (width // 8, height // 5, 7 * width // 8, 4 * height // 5), fill=(240, 210, 60), outline=(0, 0, 0), width=3
    )
    _strokes(draw, (width // 8 + 12, height // 5 + 14, 7 * width // 8 - 8, 4 * height // 5), seed=8, color=(20, 20, 20))


def _curve(draw: ImageDraw, width: int, height: int) -> None:
    draw.rectangle((0, 0, width, height), fill=(255, 255, 255))
    for step in range(1, 8):
        draw.line((0, step * height // 8, width, step * height // 8), fill=(220, 220, 220))
    points = [(x, height - 10 - (x * x * (height - 20)) // (width * width)) for x in range(0, width, 4)]
    draw.polygon([*points, (width, height), (0, height)], fill=(250, 210, 230))
    draw.line(points, fill=(200, 20, 120), width=3)


CALIBRATION = (
    Picture("a red circle on a grey background", "What shape is in the middle?", (168, 168), _red_circle),
    Picture("a small house on a meadow", "Describe the picture in one sentence.", (224, 168), _house),
    Picture("a black and white checkerboard", "How many colors does the pattern have?", (168, 112), _checkerboard),
    Picture("a page of blue handwriting", "What kind of document is this?", (168, 224), _letter),
    Picture("a bar chart with five bars", "Which bar is the tallest?", (224, 168), _bars),
    Picture("the sun setting over the sea", "What time of day is it?", (224, 140), _sunset),
    Picture("a green triangle on yellow paper", "What color is the triangle?", (168, 168), _triangle),
    Picture("a moon in a sky full of stars", "Is it day or night?", (196, 168), _night),
)
"""The pictures observers see."""

EVALUATION = (
    Picture("three blue squares in a row", "How many squares are there?", (196, 140), _blue_squares),
    Picture("a yellow sign with black writing", "What is on the sign?", (168, 168), _sign),
    Picture("a flag with three stripes", "Name the colors from top to bottom.", (168, 112), _flag),
    Picture("a pink curve that rises to the right", "Does the curve rise or fall?", (224, 168), _curve),
)
"""The pictures scores are measured on."""
