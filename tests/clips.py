"""Clips and pictures that runs begin from: written as Y4M and PPM, and read again as a reference has to see them."""

from pathlib import Path

import numpy as np

WEIGHTS = {"bt601": (0.299, 0.587, 0.114), "bt709": (0.2126, 0.7152, 0.0722)}


def matrix_of(width: int, height: int) -> tuple[float, float, float]:
    """The weights of red, green and blue in luma, as players assume them for frames of this size."""
    return WEIGHTS["bt709" if width >= 1280 or height > 576 else "bt601"]


def make_planes(width: int, height: int, frames: int, seed: int) -> np.ndarray:
    """Y, Cb and Cr of a clip in 4:4:4, [F, 3, Y, X] bytes: waves that travel, and a little noise."""
    rng = np.random.default_rng(seed)
    t, y, x = np.meshgrid(np.arange(frames), np.arange(height), np.arange(width), indexing="ij")
    planes = []
    for low, high in ((40, 210), (70, 180), (70, 180)):
        wave = sum(np.sin(2 * np.pi * (rng.uniform(0.3, 3) * x / width + rng.uniform(0.3, 3) * y / height
                                       + rng.uniform(-0.2, 0.2) * t + rng.uniform())) for _ in range(3)) / 3
        planes.append((low + high + (high - low) * wave) / 2 + rng.normal(0, 3, wave.shape))
    return np.clip(np.stack(planes, 1), 16, 235).round().astype(np.uint8)


def write_y4m(path: Path, planes: np.ndarray) -> None:
    """planes: [F, 3, Y, X] bytes."""
    _, _, height, width = planes.shape
    header = f"YUV4MPEG2 W{width} H{height} F24:1 Ip A1:1 C444\n".encode()
    path.write_bytes(header + b"".join(b"FRAME\n" + frame.tobytes() for frame in planes))


def colours(planes: np.ndarray) -> np.ndarray:
    """The clip [3, F, Y, X] of planes in limited range, clamped to [-1, 1]."""
    red, green, blue = matrix_of(planes.shape[3], planes.shape[2])
    y, cb, cr = planes.astype(np.float64).swapaxes(0, 1)
    y, cb, cr = (y - 125.5) / 109.5, (cb - 128) / 112, (cr - 128) / 112
    r, b = y + (2 - 2 * red) * cr, y + (2 - 2 * blue) * cb
    return np.clip(np.stack([r, (y - red * r - blue * b) / green, b]), -1, 1).astype(np.float32)


def write_ppm(path: Path, pixels: np.ndarray) -> None:
    """pixels: [Y, X, 3] bytes."""
    path.write_bytes(f"P6\n{pixels.shape[1]} {pixels.shape[0]}\n255\n".encode() + pixels.tobytes())
