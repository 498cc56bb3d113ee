"""From any picture that Pillow reads to 8-bit RGB of the wanted size."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps
from PIL.ExifTags import Base as Exif


def decode(image: Image.Image, side: int, aspect: float) -> tuple[NDArray[np.uint8], tuple[str, ...]]:
    """Decodes a picture, turns it upright, converts it to RGB, crops its centre and resizes it.

    Transparent parts show a white page; greyscale is repeated to three channels; 16 bits are scaled to 8.

    Args:
        image: As opened; its pixels may not be read yet.
        side: Length of the shorter side of the result, in pixels.
        aspect: Longer side by shorter side is at most this; what is beyond is cut off evenly. 1 gives a square.

    Returns:
        Pixels, shape (3, height, width), and what had to be converted ("greyscale", "alpha", ...).

    Raises:
        Exception: Whatever Pillow raises for a broken file; ValueError for pixels without an agreed range.
    """
    # JPEG can be decoded at 1/2, 1/4 or 1/8 of its size; twice the wanted side is left to the resize below.
    image.draft(None, (2 * side, 2 * side))
    rotated = image.getexif().get(Exif.Orientation, 1) in range(2, 9)
    colour, converted = _rgb(ImageOps.exif_transpose(image) if rotated else image)
    shorter, longer = sorted(colour.size)
    scale, longest = side / shorter, min(longer, shorter * aspect)
    width, height = (min(length, longest) for length in colour.size)
    size = (round(width * scale), round(height * scale))
    if size != colour.size:
        left, top = (colour.width - width) / 2, (colour.height - height) / 2
        colour = colour.resize(size, Image.Resampling.BILINEAR, box=(left, top, left + width, top + height))
    pixels = np.ascontiguousarray(np.asarray(colour).transpose(2, 0, 1))
    return pixels, (*converted, "rotated by EXIF") if rotated else converted


def _rgb(image: Image.Image) -> tuple[Image.Image, tuple[str, ...]]:
    """The same picture in 8-bit RGB, and the names of the conversions that were needed."""
    if image.mode.startswith("I"):
        return _eight_bits(image).convert("RGB"), ("greyscale", "16-bit")
    if image.mode == "F":
        raise ValueError("floating-point pixels have no agreed range")
    if image.has_transparency_data:
        # Dropping alpha would show whatever colours hide under the transparent parts.
        page = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(page, image.convert("RGBA")).convert("RGB"), ("alpha",)
    if image.mode == "RGB":
        image.load()
        return image, ()
    kind = {"1": "greyscale", "L": "greyscale", "P": "palette"}.get(image.mode, image.mode)
    return image.convert("RGB"), (kind,)


def _eight_bits(image: Image.Image) -> Image.Image:
    """Scales 0 .. 65535 to 0 .. 255; Pillow's own conversion would clip at 255."""
    values = np.asarray(image).astype(np.int64)
    if values.min() < 0 or values.max() > 65535:
        raise ValueError("32-bit pixels outside 0 .. 65535")
    return Image.fromarray(((values * 255 + 32767) // 65535).astype(np.uint8))
