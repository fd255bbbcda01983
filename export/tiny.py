"""Tiny decoder: changes TAEHV's tensors to those that sora's layers read.

    MEMORY's first convolution   [frame, frame before] as channels  -> two taps in time, the frame before first
    GROW                         rows of frames that the level does not make, dropped, as taehv.py does
    the last convolution         pixels in [0, 1], rows before columns in a patch -> [-1, 1], columns before rows
"""

import math
import re
from dataclasses import dataclass
from typing import Callable

from export.containers import Stored


@dataclass
class Changed(Stored):
    """A tensor that is computed from all values of another."""
    source: Stored
    change: Callable

    def rows(self, first=None, last=None):
        return self.change(self.source.rows())[first:last].contiguous()


def changed(source, shape, change):
    return Changed(source.key, tuple(shape), source.dtype, source.file, source, change)


def time_taps(tensor):
    """(o, 2 i, 3, 3) -> (o, i, 2, 3, 3)"""
    o, i, *kernel = tensor.shape
    return changed(tensor, (o, i // 2, 2, *kernel),
                   lambda values: values.unflatten(1, (2, i // 2)).flip(1).transpose(1, 2))


def last_rows(tensor, count):
    """The last `count` rows, or the tensor if it has no more."""
    return tensor if tensor.shape[0] <= count else changed(tensor, (count, *tensor.shape[1:]), lambda v: v[-count:])


def pixels(tensor, is_bias):
    """The last convolution."""
    p = math.isqrt(tensor.shape[0] // 3)

    def change(values):
        values = 2 * values - 1 if is_bias else 2 * values
        return values.unflatten(0, (3, p, p)).transpose(1, 2).flatten(0, 2)

    return changed(tensor, tensor.shape, change) if 3 * p * p == tensor.shape[0] else tensor


def tiny_tensors(tensors):
    """{name: tensor} as the tables have them, from those of taehv.py."""
    def adapt(name, tensor):
        if re.fullmatch(r"\d+\.conv\.0\.weight", name) and len(tensor.shape) == 4:
            return time_taps(tensor)
        if name == "7.conv.weight":
            return last_rows(tensor, tensor.shape[1])
        return pixels(tensor, name.endswith("bias")) if name.startswith("22.") else tensor

    return {name: adapt(name, tensor) for name, tensor in tensors.items()}
