"""Grayscale pictures as PNG files, with the standard library only."""

import base64
import struct
import zlib

import numpy as np
from numpy.typing import NDArray


def grayscale_png(pixels: NDArray[np.uint8]) -> bytes:
    """Encode (H, W) uint8 pixels, 0 black and 255 white, without loss."""
    height, width = pixels.shape
    # 8 bits a pixel, one channel, not interlaced. Each line begins with its filter, 0 for none.
    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    lines = np.pad(pixels, ((0, 0), (1, 0))).tobytes()
    chunks = ((b"IHDR", header), (b"IDAT", zlib.compress(lines, 9)), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(_chunk(*each) for each in chunks)


def picture(values: NDArray[np.floating], low: float, high: float) -> str:
    """Encode (H, W) values as the base64 of a PNG: ``low`` black, ``high`` white."""
    scaled = (values.astype(np.float64) - low) / ((high - low) or 1.0)
    pixels = np.rint(255 * scaled.clip(0, 1)).astype(np.uint8)
    return base64.b64encode(grayscale_png(pixels)).decode()


def _chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))
