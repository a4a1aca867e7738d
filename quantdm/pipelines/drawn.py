"""Pictures that a protocol may ask for instead of files: the same shapes for the same number, on every machine."""

import hashlib
from collections.abc import Iterator

from PIL import Image, ImageDraw

KINDS = ("scene", "mask", "edges", "clip")
CLIP_FRAMES = 16
_FINE = 4  # drawn that much larger and scaled down, so that edges are smooth


def draw(kind: str, number: int, size: tuple[int, int]) -> Image.Image | list[Image.Image]:
    """Return the picture of that kind and number (a list of frames for "clip"), RGB.

    "scene" shows four coloured shapes before a gradient, "mask" the first shape of the same scene in white on black,
    "edges" the outlines of all its shapes in white on black, "clip" the scene with its shapes moving.

    Args:
        size: (width, height) in pixels.
    """
    if kind == "clip":
        return [_draw("scene", number, size, frame / CLIP_FRAMES) for frame in range(CLIP_FRAMES)]
    return _draw(kind, number, size, 0.0)


def _draw(kind: str, number: int, size: tuple[int, int], time: float) -> Image.Image:
    width, height = (side * _FINE for side in size)
    chance = _numbers(number)
    colours = [tuple(int(255 * next(chance)) for _ in range(3)) for _ in range(2)]
    picture = _gradient((width, height), *colours) if kind == "scene" else Image.new("RGB", (width, height))
    pen = ImageDraw.Draw(picture)
    for index in range(4):
        x, y, radius, form, dx, dy = (next(chance) for _ in range(6))
        colour = tuple(int(255 * next(chance)) for _ in range(3))
        if kind == "mask" and index:
            break
        x, y = (x + time * (dx - 0.5)) * width, (y + time * (dy - 0.5)) * height
        reach = (0.12 + 0.18 * radius) * min(width, height)
        shape = {
            "scene": {"fill": colour},
            "mask": {"fill": (255, 255, 255)},
            "edges": {"outline": (255, 255, 255), "width": _FINE},
        }[kind]
        _shape(pen, form, (x, y), reach, shape)
    return picture.resize(size, Image.Resampling.BOX)


def _shape(pen: ImageDraw.ImageDraw, form: float, centre: tuple[float, float], reach: float, how: dict) -> None:
    x, y = centre
    box = (x - reach, y - reach, x + reach, y + reach)
    if form < 0.4:
        pen.ellipse(box, **how)
    elif form < 0.7:
        pen.rectangle(box, **how)
    else:
        pen.polygon([(x, y - reach), (x + reach, y + reach), (x - reach, y + reach)], **how)


def _gradient(size: tuple[int, int], top: tuple[int, ...], bottom: tuple[int, ...]) -> Image.Image:
    shade = Image.linear_gradient("L").resize(size)
    return Image.composite(Image.new("RGB", size, bottom), Image.new("RGB", size, top), shade)


def _numbers(number: int) -> Iterator[float]:
    """Yield numbers in [0, 1) that depend on `number` alone: no random state, no library version."""
    for block in range(2**16):
        for byte in hashlib.sha256(f"quantdm scene {number} {block}".encode()).digest():
            yield byte / 256
