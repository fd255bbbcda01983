"""Parts: the models, opened from their files, renamed and measured.

The table KINDS says what belongs to each part, and which functions of other modules handle it. Wan 2.2 A14B has two
transformers, its experts; all other models have one.
"""

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Callable

from export.containers import open_file
from export.files import ExportError, read_json, reading, weight_files
from export.keys import stated_sizes
from export.names import (EXPERT, HIGH, LOW, SHARED, TIED, UNUSED, count_upsamples, our_name, plain_name,
                          refuse_unsupported)
from export.quantised import weights_in
from export.sizes import text_encoder_sizes, tiny_sizes, transformer_sizes, vae_sizes
from export.tables import TEXT_ENCODER, TRANSFORMER, block_rows, tiny_rows, vae_rows
from export.tiny import tiny_tensors


@dataclass(frozen=True)
class Kind:
    """What belongs to one of the models."""
    prefix: str        # of its tensors in the weight file, where it shares names with the transformer
    names: str         # pattern of its tensors in the weight file
    mark: str          # a key that only its config.json has
    measure: Callable  # part -> sizes
    rows: Callable     # sizes -> (name, shape, type rule) of every tensor, in order of use
    adapt: Callable = lambda tensors: tensors  # {name: tensor} as the tables have them


KINDS = {  # in the order of the weight file
    "text_encoder": Kind("", r"(token_embd|enc)\.", "d_model", text_encoder_sizes,
                         lambda sizes: block_rows(TEXT_ENCODER, sizes)),
    "transformer": Kind("", r"(?!token_embd\.|enc\.|vae\.|transformer_2\.)", "ffn_dim", transformer_sizes,
                        lambda sizes: block_rows(TRANSFORMER, sizes)),
    "transformer_2": Kind("transformer_2.", r"transformer_2\.", "ffn_dim", transformer_sizes,
                          lambda sizes: block_rows(TRANSFORMER, sizes)),
    "vae": Kind("vae.", r"vae\.(?!tiny\.)", "z_dim", vae_sizes, vae_rows),
    "vae_tiny": Kind("vae.tiny.", r"vae\.tiny\.", "", tiny_sizes, tiny_rows, tiny_tensors),
}


@dataclass
class Part:
    """One of the models: its tensors by our names, what its config.json states, and its sizes."""
    name: str
    path: Path
    tensors: dict
    config: dict
    files: list
    sizes: dict = field(default_factory=dict)
    signs: list = field(default_factory=list)  # texts: why it seems to be made for one schedule
    notes: list = field(default_factory=list)  # lines for the user

    @property
    def title(self):
        return self.name.replace("_", " ")

    @property
    def prefix(self):
        return KINDS[self.name].prefix

    def rows(self):
        """[(name, shape, type rule)] of every tensor that it must have, in order of use."""
        return list(KINDS[self.name].rows(self.sizes))


def open_part(name, path, pattern="*", opened=None, container=None):
    """Opens one part: its files, its tensors under the weight file's names, its sizes. name: a key of KINDS; path: a
    file or folder; pattern: of the files in a folder; opened: {path: reader}, added to; container: the one to take from
    a pickle that has several. Raises ExportError for files that cannot be read and models that sora cannot run."""
    with reading(path):
        paths = weight_files(path, pattern)
        files = [open_file(p, opened, container) for p in paths]
        if files[0].own:
            return own_part(name, path, files[0])
        config_path = paths[0].parent / "config.json"
        config = read_json(config_path) if config_path.is_file() else {}
        if KINDS[name].mark not in config:  # an original release folder has one config.json, the transformer's
            config = {}
        stored = all_tensors(files)
        unused = UNUSED.get(name)
        kept = {key: tensor for key, tensor in stored.items() if not (unused and unused.search(key))}
        part = Part(name, path, rename(name, weights_in(kept)), config, paths + ([config_path] if config else []))
        part.sizes = KINDS[name].measure(part)
        part.tensors = KINDS[name].adapt(part.tensors)
        left_out = len(stored) - len(kept)
        part.signs = signs_of_a_schedule(files, config, left_out)
        part.notes = [*(f.note for f in files if f.note), *unused_note(part, left_out)]
        return part


def signs_of_a_schedule(files, config, unused):
    """Texts that say why weights seem distilled, or made to generate in chunks. unused: number of tensors left out,
    FastWan's gate if this is a transformer."""
    generators = [c for f in files for c in f.containers if c.startswith("generator")]
    kind = str(config.get("_class_name", ""))
    return [*(f"its weights are a {c}" for c in generators), *([f"is a {kind}"] if kind.startswith("Causal") else []),
            *(["has FastWan's gate"] if unused else [])]


def unused_note(part, count):
    """[a note] if tensors were left out, else []. count: of them."""
    what = {"transformer": "FastWan's gate left out: attention is dense here",
            "vae_tiny": "the tiny encoder left out: the VAE's own is used"}
    return [f"{part.path}: {count} tensors of {what[part.name]}"] if count else []


def expert_note(part):
    """[a note] if a transformer that is given alone has the size and the name of an expert of Wan 2.2 A14B, else [].
    A name proves nothing, so such a file is not refused."""
    called = EXPERT.search("/".join(part.path.absolute().parts[-2:]))
    if part.sizes["dim"] != 5120 or not called:
        return []
    return [f"{part.path}: named like an expert of Wan 2.2 A14B ({called[0]}), which alone makes no clip; used as "
            "a whole model. Both experts: --transformer HIGH --transformer-2 LOW"]


def order_note(first, second):
    """[a note] if the files of two experts are named the other way round, else []. first, second: parts."""
    names = ["/".join(part.path.absolute().parts[-2:]) for part in (first, second)]
    if not (LOW.search(names[0]) and HIGH.search(names[1])):
        return []
    return [f"{first.path}: named like the expert for low noise, but given as the one for high noise, and "
            f"{second.path} the other way round: expected --transformer HIGH --transformer-2 LOW"]


def own_part(name, path, file):
    """A part of a weight file that export.py wrote. Its tensors need no renaming, and its keys state the sizes. Its
    only transformer can be the second expert of another file."""
    kind = KINDS[name if name != "transformer_2" or has_experts(file) else "transformer"]
    tensors = {key.removeprefix(kind.prefix): t for key, t in file.tensors.items() if re.match(kind.names, key)}
    return Part(name, path, tensors, {}, [file.path], stated_sizes(name, file))


def has_experts(file):
    """Whether a weight file that export.py wrote has two transformers."""
    return any(key.startswith(KINDS["transformer_2"].prefix) for key in file.tensors)


def all_tensors(files):
    """{key: tensor} of all files of a part. Raises ExportError for a key in two files, or of a model that sora cannot
    run."""
    stored = {}
    for file in files:
        refuse_unsupported(file.path, file.tensors)
        for key, tensor in file.tensors.items():
            if key in stored:
                raise ExportError(f"{file.path}: {key} is also in {stored[key].file.path}")
            stored[key] = tensor
    return stored


def rename(part, weights):
    """{name in the weight file: tensor}. weights: {key: tensor}. Raises ExportError for two keys with one name."""
    if SHARED in weights:
        weights.pop(TIED, None)
    plain = [plain_name(key) for key in weights]
    tensors = {}
    for name, tensor in zip(count_upsamples(plain) if part == "vae" else plain, weights.values()):
        name = our_name(part, name)
        if name in tensors:
            raise ExportError(f"{tensor.file.path}: {tensor.key} and {tensors[name].key} are both {name}")
        tensors[name] = tensor
    return tensors
