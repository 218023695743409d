"""Pictures small enough to lie inside a page, as data URIs."""

from __future__ import annotations

import base64
import io

from PIL import Image

from expunge.eval.store import Pixels

# As they are, to the bit.
EXACT = 96
# Longest edge and quality of WebP, tried in turn until a picture takes no more than it may.
LADDER = ((256, 82), (256, 60), (192, 55), (128, 50), (96, 40))


def data_uri(pixels: Pixels, at_most: int) -> str:
    """A picture (H, W, 3) as a data URI.

    Args:
        pixels: The picture. Up to `EXACT` pixels wide and high it loses nothing.
        at_most: The bytes that it should take; the end of the `LADDER` may still take more.
    """
    image = Image.fromarray(pixels)
    if max(image.size) <= EXACT:
        encoded = _webp(image, lossless=True)
        if len(encoded) <= at_most:
            return _uri(encoded)
    for edge, quality in LADDER:
        small = image.copy()
        small.thumbnail((edge, edge), Image.Resampling.LANCZOS)
        encoded = _webp(small, quality=quality)
        if len(encoded) <= at_most:
            break
    return _uri(encoded)


def _webp(image: Image.Image, **settings: int | bool) -> bytes:
    stream = io.BytesIO()
    image.save(stream, "WEBP", **settings)
    return stream.getvalue()


def _uri(encoded: bytes) -> str:
    return f"data:image/webp;base64,{base64.b64encode(encoded).decode()}"
