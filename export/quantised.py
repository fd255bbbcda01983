"""Quantised weights: fp8 tied to its scale, and what is stored in no known way refused.

Pitfall: fp8 without its scale loads as well as with it, and gives a white picture.
"""

import math
import re

from export.files import ExportError, Gguf

# Keys that carry no weight of the model: ComfyUI's markers, and scales of activations in fp8 products.
IGNORED = re.compile(r"(^|\.)(scaled_fp8|spiece_model|comfy_quant|scale_input|input_scale)$")
SCALES = (".scale_weight", ".weight_scale")
FLOATS = ("F64", "F32", "F16", "BF16")


def weights_in(stored):
    """The tensors that are weights, each fp8 one tied to its scale: without it, it is an error."""
    scales = {k: t for k, t in stored.items() if k.endswith(SCALES)}
    weights = {k: t for k, t in stored.items() if k not in scales and not IGNORED.search(k)}
    for key, tensor in weights.items():
        module = key.removesuffix(".weight")
        tensor.scale = next((scales.pop(module + s) for s in SCALES if module + s in scales), None)
        check_stored(key, tensor, module)
    if scales:
        key, tensor = next(iter(scales.items()))
        raise ExportError(f"{tensor.file.path}: {key} scales no tensor")
    return weights


def check_stored(key, tensor, module):
    """A tensor must be stored in a way that is known to be readable as numbers."""
    fp8 = tensor.dtype.startswith("F8")
    if fp8 and tensor.scale is None:
        raise ExportError(f"{tensor.file.path}: {key} is fp8 without its scale ({module}.scale_weight)")
    if not fp8 and (tensor.scale or tensor.dtype not in FLOATS and not isinstance(tensor.file, Gguf)):
        raise ExportError(f"{tensor.file.path}: {key} is {tensor.dtype}{' with a scale' if tensor.scale else ''}, "
                          "which is no known way to store weights")
    if fp8 and math.prod(tensor.scale.shape) not in (1, tensor.shape[0]):
        raise ExportError(f"{tensor.file.path}: {tensor.scale.key} has shape {list(tensor.scale.shape)}, expected one "
                          f"value, or one for each of {tensor.shape[0]} rows")
