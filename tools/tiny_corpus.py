"""The corpus that mulki-tiny is pre-trained on: drawings, glyphs, shapes and textures with captions.

It shares no drawing, font or image with the stream mtil-mini: the drawings are other artists' emoji and flags, the
glyphs come from other fonts, shapes and textures are drawn here, by other code, and half of the colour-and-shape pairs
that the stream asks for are left out. Nothing of it is committed; `fetch` brings the packages with npm.
"""

from __future__ import annotations

import io
import json
import math
import random
import re
import subprocess
import tarfile
from collections import defaultdict
from pathlib import Path

import numpy as np
import torch
from attrs import define, field, frozen
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

SIDE = 72

DRAWINGS = (
    "noto", "noto-v1", "fluent-emoji", "fluent-emoji-flat", "twemoji", "emojione", "emojione-v1", "fxemoji",
)  # fmt: skip
FLAGS = ("flag", "flagpack", "cif", "circle-flags")
PRINT_FONTS = (
    "roboto", "open-sans", "lato", "montserrat", "oswald", "merriweather", "playfair-display", "lora", "ubuntu",
    "inconsolata", "courier-prime", "pt-serif", "bitter", "nunito", "raleway", "exo-2", "comfortaa", "roboto-slab",
    "anton", "crimson-text", "libre-baskerville", "space-mono", "quicksand", "arvo", "josefin-sans",
)  # fmt: skip
HAND_FONTS = (
    "caveat", "patrick-hand", "indie-flower", "shadows-into-light", "dancing-script", "kalam", "reenie-beanie",
    "nanum-pen-script", "gloria-hallelujah", "covered-by-your-grace", "homemade-apple", "permanent-marker", "rock-salt",
    "just-another-hand", "architects-daughter", "handlee", "gochi-hand", "schoolbell", "coming-soon",
    "sue-ellen-francisco", "nothing-you-could-do", "cedarville-cursive",
)  # fmt: skip
PACKAGES = [f"@iconify-json/{n}" for n in DRAWINGS + FLAGS] + [f"@fontsource/{n}" for n in PRINT_FONTS + HAND_FONTS]

NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")

_LEFT_OUT = re.compile(
    r"skin-tone|(^|-)(man|woman|men|women|person|people|boy|girl)(-|$)|oclock|thirty|-button|keycap|-hair|family|"
    r"couple-with|kiss-|holding-hands|arrow|regional|symbol-for|squared|negative|ideograph|^\w$|^\d+$|-mark$|-(light|medium|dark)$"
)


@frozen
class Sprites:
    """Pictures of one kind: RGBA uint8 [N, SIDE, SIDE, 4], and the concept of each."""

    pictures: NDArray[np.uint8]
    concepts: NDArray[np.int64]


@define
class Concepts:
    """What can be said: one list of names for each concept, and how a caption is made of a name."""

    names: list[list[str]] = field(factory=list)
    kinds: list[str] = field(factory=list)
    _index: dict[tuple[str, str], int] = field(factory=dict)

    def add(self, kind: str, name: str, *more: str) -> int:
        key = (kind, name)
        if key not in self._index:
            self._index[key] = len(self.names)
            self.names.append([name, *more])
            self.kinds.append(kind)
        return self._index[key]


TEMPLATES = {
    "drawing": (
        "a picture of a {}.", "a drawing of a {}.", "a {}.", "an icon of a {}.", "a small icon of {}.", "a photo of a {}.",
        "a sticker of {}.", "a painting of a {}.", "{}.", "a cartoon {}.",
    ),
    "flag": ("the flag of {}.", "a picture of the flag of {}.", "flag of {}.", "an icon of the flag of {}."),
    "letter": (
        "a photo of the letter {}.", "the letter {}.", "the letter {} in print.", "a picture of the letter {}.",
    ),
    "digit": (
        "a photo of the number {}.", "the number {}.", "the digit {}.", "the handwritten digit {}.",
        "a picture of the digit {}.", "a scan of the digit {}.", "a scan of the number {}.",
    ),
    "shape": ("a {}.", "a picture of a {}.", "a drawing of a {}.", "{}."),
    "texture": ("a {} texture.", "a photo of a {} pattern.", "a {} pattern.", "something {}."),
}  # fmt: skip


def fetch(folder: Path) -> None:
    """Bring the packages that are missing, with npm, into `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    for package in PACKAGES:
        stem = package.removeprefix("@").replace("/", "-")
        if not list(folder.glob(f"{stem}-[0-9]*.tgz")):
            subprocess.run(["npm", "pack", "--silent", package], cwd=folder, check=True, stdout=subprocess.DEVNULL)


def _member(folder: Path, package: str, name: str) -> bytes | None:
    stem = package.removeprefix("@").replace("/", "-")
    with tarfile.open(sorted(folder.glob(f"{stem}-[0-9]*.tgz"))[-1]) as archive:
        try:
            member = archive.extractfile(f"package/{name}")
        except KeyError:
            return None
        return member.read() if member else None


def _json(folder: Path, package: str, name: str) -> dict:
    return json.loads(_member(folder, package, name) or b"{}")


def drawings(folder: Path, concepts: Concepts) -> Sprites:
    """Every emoji that is one thing (no variants of skin or sex, no clock faces) and that three artists drew; by each."""
    found: dict[str, list[tuple[str, dict]]] = defaultdict(list)
    for family in DRAWINGS[::-1]:  # fxemoji, whose names are run together, is matched last
        data = _json(folder, f"@iconify-json/{family}", "icons.json")
        for name, icon in data["icons"].items():
            found[_plain(name)].append((family, {"w": data.get("width", 16), "h": data.get("height", 16), **icon}))
    together = {name.replace("-", ""): name for name in found if "-" in name}
    for name in [n for n in found if n in together]:
        found[together[name]] += found.pop(name)
    pictures, labels = [], []
    for name in sorted(found):
        artists = {family for family, _ in found[name]}
        if _LEFT_OUT.search(name) or len(artists) < (2 if name.startswith("flag-of-") else 3):
            continue
        flag = name.startswith("flag-of-")
        concept = concepts.add("flag" if flag else "drawing", _words(name.removeprefix("flag-of-")))
        for _, icon in found[name]:
            pictures.append(rasterised(icon["body"], icon["w"], icon["h"]))
            labels.append(concept)
    return Sprites(np.stack(pictures), np.array(labels))


def flags(folder: Path, concepts: Concepts) -> Sprites:
    """The flags of the countries that the emoji have, by four more makers of icons."""
    country = {}
    for code, name in _json(folder, "@iconify-json/twemoji", "chars.json").items():
        points = [int(c, 16) - 0x1F1E6 for c in code.split("-")]
        if name.startswith("flag-") and len(points) == 2 and all(0 <= p < 26 for p in points):
            country["".join(chr(97 + p) for p in points)] = name.removeprefix("flag-")
    pictures, labels = [], []
    for family in FLAGS:
        data = _json(folder, f"@iconify-json/{family}", "icons.json")
        for name, icon in sorted(data["icons"].items()):
            if (code := name.split("-")[0]) in country and not re.search(r"-(?!1x1|4x3)", name):
                width, height = icon.get("width", data.get("width", 16)), icon.get("height", data.get("height", 16))
                pictures.append(rasterised(icon["body"], width, height))
                labels.append(concepts.add("flag", _words(country[code])))
    return Sprites(np.stack(pictures), np.array(labels))


def _plain(name: str) -> str:
    name = re.sub(r"^flag-for-flag-|^flag-for-|^flag-(?!in)", "flag-of-", name)
    return name.replace("-and-", "-").replace("-face-face", "-face")


def _words(name: str) -> str:
    return name.replace("-", " ")


def rasterised(body: str, width: float, height: float) -> NDArray[np.uint8]:
    """An SVG's body as RGBA [SIDE, SIDE, 4], cropped to what is drawn and centred."""
    import resvg_py

    svg = f'<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" viewBox="0 0 {width} {height}">{body}</svg>'
    png = resvg_py.svg_to_bytes(
        svg_string=svg, width=SIDE, height=max(1, round(SIDE * height / width)), skip_system_fonts=True
    )
    return fitted(Image.open(io.BytesIO(bytes(png))).convert("RGBA"))


def fitted(picture: Image.Image) -> NDArray[np.uint8]:
    box = picture.getbbox()
    if box is None:
        return np.zeros((SIDE, SIDE, 4), np.uint8)
    drawn = picture.crop(box)
    scale = SIDE / max(drawn.size)
    size = (max(1, round(drawn.width * scale)), max(1, round(drawn.height * scale)))
    sprite = Image.new("RGBA", (SIDE, SIDE))
    sprite.paste(drawn.resize(size, Image.Resampling.LANCZOS), ((SIDE - size[0]) // 2, (SIDE - size[1]) // 2))
    return np.asarray(sprite)


def glyphs(folder: Path, concepts: Concepts) -> tuple[Sprites, Sprites]:
    """Letters in printed and written fonts, and digits likewise."""
    sets: dict[str, tuple[list, list]] = {"letter": ([], []), "digit": ([], [])}
    for fonts in (PRINT_FONTS, HAND_FONTS):
        for name in fonts:
            for weight in (400, 700):
                data = _member(folder, f"@fontsource/{name}", f"files/{name}-latin-{weight}-normal.woff2")
                if data is None:
                    continue
                font = ImageFont.truetype(io.BytesIO(data), SIDE, layout_engine=ImageFont.Layout.BASIC)
                for character in "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz":
                    _glyph(sets["letter"], font, character, concepts.add("letter", character.lower()))
                for value, word in enumerate(NUMBERS):
                    for _ in range(3 if fonts is HAND_FONTS else 1):
                        _glyph(sets["digit"], font, str(value), concepts.add("digit", word, str(value)))
    letters, digits = (Sprites(np.stack(p), np.array(c)) for p, c in sets.values())
    return letters, digits


def _glyph(into: tuple[list, list], font: ImageFont.FreeTypeFont, character: str, concept: int) -> None:
    canvas = Image.new("RGBA", (4 * SIDE, 4 * SIDE))
    ImageDraw.Draw(canvas).text((SIDE, SIDE), character, font=font, fill="white")
    into[0].append(fitted(canvas))
    into[1].append(concept)


SHAPE_COLOURS = {
    "red": ("#e6194b", "#b11226", "#ff3b30"), "orange": ("#ff8c1a", "#f26b0f", "#ffa64d"), "yellow": ("#ffe119", "#f7d708", "#fff04d"),
    "green": ("#3cb44b", "#1e7d32", "#66cc66"), "blue": ("#4363d8", "#1034a6", "#2f80ed"), "purple": ("#911eb4", "#6a0dad", "#9b59b6"),
    "pink": ("#ff69b4", "#f78fb3", "#ff99cc"), "brown": ("#8b5a2b", "#6d4c41", "#7b3f00"), "black": ("#000000", "#1a1a1a", "#222222"),
    "white": ("#ffffff", "#fafafa", "#f2f2f2"), "gray": ("#808080", "#9e9e9e", "#666666"), "cyan": ("#17becf", "#00bcd4", "#4dd0e1"),
}  # fmt: skip
SHAPES = {
    "circle": '<circle cx="50" cy="50" r="45" {}/>',
    "square": '<rect x="8" y="8" width="84" height="84" rx="2" {}/>',
    "triangle": '<path d="M50 8L94 90L6 90Z" {}/>',
    "star": '<path d="M50 3L61 37L97 37L68 58L79 93L50 72L21 93L32 58L3 37L39 37Z" {}/>',
    "heart": '<path d="M50 92C-20 45 12 2 34 10Q46 13 50 28Q54 13 66 10C88 2 120 45 50 92Z" {}/>',
    "cross": '<path d="M38 5H62V38H95V62H62V95H38V62H5V38H38Z" {}/>',
    "diamond": '<path d="M50 4L90 50L50 96L10 50Z" {}/>',
    "pentagon": '<path d="M50 5L95 39L78 92L22 92L5 39Z" {}/>',
    "hexagon": '<path d="M27 10H73L97 50L73 90H27L3 50Z" {}/>',
    "oval": '<ellipse cx="50" cy="50" rx="47" ry="28" {}/>',
    "rectangle": '<rect x="3" y="25" width="94" height="50" {}/>',
    "crescent": '<path d="M70 8A45 45 0 1 0 70 92A38 38 0 1 1 70 8Z" {}/>',
    "arrow": '<path d="M5 40H55V18L95 50L55 82V60H5Z" {}/>',
}


def shapes(concepts: Concepts) -> Sprites:
    """Coloured shapes, plain, outlined or shaded; a chequerboard half of the stream's 36 pairs is left out."""
    stream_colours, stream_shapes = list(SHAPE_COLOURS)[:6], list(SHAPES)[:6]
    pairs = ((i, c, j, s) for i, c in enumerate(stream_colours) for j, s in enumerate(stream_shapes))
    left_out = {(c, s) for i, c, j, s in pairs if (i + j) % 2 == 0}
    pictures, labels = [], []
    for colour, tones in SHAPE_COLOURS.items():
        for shape, path in SHAPES.items():
            if (colour, shape) in left_out:
                continue
            for tone in tones:
                for style in (
                    f'fill="{tone}"',
                    f'fill="{tone}" stroke="black" stroke-width="4"',
                    f'fill="{tone}" fill-opacity="0.85" stroke="{tone}" stroke-width="5"',
                ):
                    pictures.append(rasterised(path.format(style), 100, 100))
                    labels.append(concepts.add("shape", f"{colour} {shape}"))
    return Sprites(np.stack(pictures), np.array(labels))


TEXTURE_TILES = {
    "striped": '<rect width="20" height="{w}" fill="F"/>',
    "lined": '<rect width="20" height="1.5" fill="F"/>',
    "dotted": '<circle cx="10" cy="10" r="{r}" fill="F"/>',
    "bubbly": '<circle cx="6" cy="6" r="5" fill="none" stroke="F"/><circle cx="15" cy="14" r="3.5" fill="none" stroke="F"/>',
    "checkered": '<rect width="10" height="10" fill="F"/><rect x="10" y="10" width="10" height="10" fill="F"/>',
    "plaid": '<rect width="20" height="6" fill="F" fill-opacity="0.6"/><rect width="6" height="20" fill="F" fill-opacity="0.6"/>',
    "zigzagged": '<path d="M0 5L10 15L20 5" fill="none" stroke="F" stroke-width="{s}"/>',
    "grid": '<path d="M0 0H20M0 0V20" stroke="F" stroke-width="{s}"/>',
    "brick": '<path d="M0 0H20M0 10H20M5 0V10M15 10V20" stroke="F" stroke-width="{t}"/>',
    "wavy": '<path d="M0 10Q5 2 10 10T20 10" fill="none" stroke="F" stroke-width="{s}"/>',
    "scaly": '<path d="M0 10A10 10 0 0 0 20 10M-10 20A10 10 0 0 0 10 20M10 20A10 10 0 0 0 30 20M-10 0A10 10 0 0 0 10 0M10 0A10 10 0 0 0 30 0" fill="none" stroke="F" stroke-width="{t}"/>',
    "starry": '<path d="M10 3L12 8L17 8L13 11L15 16L10 13L5 16L7 11L3 8L8 8Z" fill="F"/>',
    "crosshatched": '<path d="M0 0L20 20M20 0L0 20" stroke="F" stroke-width="{t}"/>',
    "woven": '<path d="M2 0V9M6 0V9M11 12H20M11 16H20" stroke="F" stroke-width="2.5"/>',
    "honeycombed": '<path d="M0 5.77L5 2.89L5 -2.89M5 2.89L10 5.77L10 11.55L5 14.43L0 11.55M10 5.77L15 2.89L15 -2.89M15 2.89L20 5.77M20 11.55L15 14.43L10 11.55M5 14.43V20.2M15 14.43V20.2" fill="none" stroke="F" stroke-width="{t}"/>',
}
RADIAL_TEXTURES = ("spiralled", "ringed", "rayed")
CLOUDY_TEXTURES = ("marbled", "blotchy", "speckled")


def textures(concepts: Concepts, each: int, seed: int) -> Sprites:
    """Opaque pictures of patterns: SVG tiles, curves about a centre, and filtered noise."""
    rng = random.Random(seed)
    pictures, labels = [], []
    for name in (*TEXTURE_TILES, *RADIAL_TEXTURES, *CLOUDY_TEXTURES):
        concept = concepts.add("texture", name)
        for _ in range(each):
            front, back = _contrasting(rng)
            if name in TEXTURE_TILES:
                svg = _tiled(TEXTURE_TILES[name], front, back, rng)
            elif name in RADIAL_TEXTURES:
                svg = _radial(name, front, back, rng)
            else:
                svg = _cloudy(name, front, back, rng)
            pictures.append(rasterised(svg, 100, 100))
            labels.append(concept)
    return Sprites(np.stack(pictures), np.array(labels))


def _contrasting(rng: random.Random) -> tuple[str, str]:
    dark = "#" + "".join(f"{rng.randint(0, 120):02x}" for _ in range(3))
    light = "#" + "".join(f"{rng.randint(135, 255):02x}" for _ in range(3))
    return (dark, light) if rng.random() < 0.5 else (light, dark)


def _tiled(tile: str, front: str, back: str, rng: random.Random) -> str:
    size = {"w": rng.uniform(7, 13), "r": rng.uniform(3.5, 8), "s": rng.uniform(2, 6), "t": rng.uniform(1.2, 2.6)}
    body = re.sub(r"\{(\w)\}", lambda m: f"{size[m[1]]:.2f}", tile).replace('"F"', f'"{front}"')
    turn, scale = rng.uniform(-90, 90), rng.uniform(0.8, 2.0)
    height = 17.32 if "5.77" in tile else 20
    return (
        f'<defs><pattern id="p" width="20" height="{height}" patternUnits="userSpaceOnUse" '
        f'patternTransform="rotate({turn:.1f}) scale({scale:.2f}) translate({rng.uniform(0, 20):.1f} {rng.uniform(0, 20):.1f})">'
        f'{body}</pattern></defs><rect width="100" height="100" fill="{back}"/><rect width="100" height="100" fill="url(#p)"/>'
    )


def _radial(name: str, front: str, back: str, rng: random.Random) -> str:
    x, y, step = rng.uniform(30, 70), rng.uniform(30, 70), rng.uniform(7, 16)
    if name == "ringed":
        marks = "".join(f'<circle cx="{x}" cy="{y}" r="{r}"/>' for r in np.arange(step / 2, 130, step))
    elif name == "spiralled":
        sign = rng.choice((-1, 1))
        points = [
            (x + step * t / 6.283 * math.cos(sign * t), y + step * t / 6.283 * math.sin(t))
            for t in np.arange(0, 100, 0.2)
        ]
        marks = '<path d="M' + "L".join(f"{a:.1f} {b:.1f}" for a, b in points) + '"/>'
    else:
        rays = rng.randint(8, 20)
        turns = [2 * math.pi * k / rays for k in range(rays)]
        marks = "".join(f'<path d="M{x} {y}L{x + 150 * math.cos(a):.1f} {y + 150 * math.sin(a):.1f}"/>' for a in turns)
    width = step * rng.uniform(0.3, 0.6)
    return f'<rect width="100" height="100" fill="{back}"/><g fill="none" stroke="{front}" stroke-width="{width:.1f}">{marks}</g>'


def _cloudy(name: str, front: str, back: str, rng: random.Random) -> str:
    kind, frequency, slope = {
        "marbled": ("turbulence", rng.uniform(0.02, 0.05), 6),
        "blotchy": ("fractalNoise", rng.uniform(0.02, 0.05), 12),
        "speckled": ("fractalNoise", rng.uniform(0.15, 0.3), 12),
    }[name]
    intercept = -slope * {"marbled": 0.18, "blotchy": 0.5, "speckled": 0.58}[name] + 0.5
    return (
        f'<defs><filter id="n" x="0" y="0" width="1" height="1"><feTurbulence type="{kind}" baseFrequency="{frequency:.3f}" '
        f'numOctaves="3" seed="{rng.randint(0, 99999)}"/><feColorMatrix values="0 0 0 0 0 0 0 0 0 0 0 0 0 0 0 1 0 0 0 0"/>'
        f'<feComponentTransfer result="m"><feFuncA type="linear" slope="{slope}" intercept="{intercept:.2f}"/></feComponentTransfer>'
        f'<feFlood flood-color="{front}"/><feComposite operator="in" in2="m"/></filter></defs>'
        f'<rect width="100" height="100" fill="{back}"/><rect width="100" height="100" filter="url(#n)"/>'
    )


def caption(concepts: Concepts, concept: int, generator: torch.Generator) -> str:
    """One way to say it: a template of its kind about one of its names."""
    templates, names = TEMPLATES[concepts.kinds[concept]], concepts.names[concept]
    i, j = (int(torch.randint(0, n, (1,), generator=generator)) for n in (len(templates), len(names)))
    return templates[i].format(names[j])
