"""An image file as the RGB picture that a person would see."""

from __future__ import annotations

import numpy as np
from PIL import Image, ImageOps

from mulki_plugins.errors import MulkiError
from mulki_plugins.streams.entries import register_openers


def open_picture(path: str) -> Image.Image:
    """The picture in a file: turned as its EXIF says, in RGB, what is transparent on white; of several the first.

    MulkiError, which names the file, where it is damaged or no image that Pillow reads.
    """
    register_openers()
    try:
        with Image.open(path) as file:
            file.load()
            return _rgb(_upright(file))
    except Exception as error:  # decoders raise whatever they please at damaged files
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        if isinstance(error, OSError) and error.strerror:  # the file is gone, or may not be read
            reason = error.strerror
        elif str(path) in reason:  # Pillow's own words for a file that it does not know
            reason = "it is no image, or of a kind that Pillow does not read"
        raise MulkiError(f"{path}: this image cannot be read: {reason}") from error


def _upright(image: Image.Image) -> Image.Image:
    try:
        return ImageOps.exif_transpose(image)
    except Exception:  # EXIF data that nobody can read turn nothing
        return image


def _rgb(image: Image.Image) -> Image.Image:
    if image.mode == "RGB" and "transparency" not in image.info:
        return image.copy()
    if image.mode.startswith("I"):  # 16 bits of grey, which Pillow would clip at 255
        grey = image.convert("I")
        if image.mode == "I" and np.asarray(grey).max() <= 255:  # whole numbers of 32 bits that hold bytes
            return grey.convert("L").convert("RGB")
        return grey.point(lambda value: value / 257).convert("L").convert("RGB")
    if image.mode == "F":
        raise ValueError("its pixels are floating-point numbers; save it with 8 or 16 bits")
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        image = image.convert("RGBA")
        ground = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(ground, image).convert("RGB")
    return image.convert("RGB")
