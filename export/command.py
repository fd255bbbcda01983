"""The command line of export.py: parses the arguments, opens the parts, writes the file."""

import argparse
import errno
import hashlib
import math
import os
import shutil
import signal
import sys
import traceback
from pathlib import Path

from gguf import GGMLQuantizationType as Type
from tqdm import tqdm

from export.defaults import DEFAULTS, default_keys, option_of, run_defaults
from export.files import ExportError, is_out_of_memory
from export.keys import FIXED, model_keys
from export.lora import open_lora
from export.parts import KINDS, expert_note, open_part, order_note
from export.recipes import RECIPES, find_recipe
from export.sources import find_sources
from export.tokenizer import find_tokenizer, tokenizer_keys
from export.writer import DIGEST_KEY, NO_DIGEST, TYPES, check_output, plan, spare_sources, write

METAVARS = {int: "N", float: "X", str: "TEXT"}
FILE_TYPES = {Type.F32: 0, Type.F16: 1, Type.Q4_0: 2, Type.Q4_1: 3, Type.Q8_0: 7, Type.Q5_0: 8, Type.Q5_1: 9,
              Type.Q2_K: 10, Type.Q3_K: 12, Type.Q4_K: 15, Type.Q5_K: 17, Type.Q6_K: 18,
              Type.BF16: 32}  # llama.cpp's LLAMA_FTYPE


def check_experts_fit(first, second):
    """Raises ExportError unless two transformers have the same sizes. A weight file states eps in f32."""
    for size, value in first.sizes.items():
        if second.sizes[size] != value and not (size == "eps" and
                                                math.isclose(value, second.sizes[size], rel_tol=1e-6)):
            raise ExportError(f"{second.path}: {size} is {second.sizes[size]}, expected {value} as in the first expert "
                              f"{first.path}")


def check_parts_fit(text, transformer, vae, pieces, tokenizer_path):
    """Raises ExportError unless text width, latent channels and vocabulary agree. pieces: of the tokenizer."""
    channels, latent = transformer.sizes["in_dim"], transformer.sizes["out_dim"]
    with_picture = 2 * latent + (1 << sum(vae.sizes["temperal_downsample"]))
    if transformer.sizes["text_dim"] != text.sizes["dim"]:
        raise ExportError(f"{text.path}: the text encoder has width {text.sizes['dim']}, expected "
                          f"{transformer.sizes['text_dim']} for the transformer {transformer.path}")
    if latent != vae.sizes["z_dim"]:
        raise ExportError(f"{vae.path}: the VAE has {vae.sizes['z_dim']} latent channels, expected {latent} for the "
                          f"transformer {transformer.path}")
    if channels not in (latent, with_picture):
        raise ExportError(f"{transformer.path}: {channels} input channels, expected {latent}, or {with_picture} for an "
                          "image-to-video model: a model conditioned on other latents cannot be run yet")
    if pieces > text.sizes["vocab_size"]:
        raise ExportError(f"{tokenizer_path}: the tokenizer has {pieces} pieces, expected at most "
                          f"{text.sizes['vocab_size']}, the rows of the text encoder's embedding: give the text "
                          "encoder's own tokenizer with --tokenizer")


def check_tiny_fits(tiny, vae):
    """Raises ExportError unless the tiny decoder is for the VAE's latents and patches."""
    for size, what in (("z_dim", "latent channels"), ("out_channels", "channels of a patch of pixels")):
        if tiny.sizes[size] != vae.sizes[size]:
            raise ExportError(f"{tiny.path}: the tiny decoder has {tiny.sizes[size]} {what}, expected "
                              f"{vae.sizes[size]} for the VAE {vae.path}")


def sha256_of(path, bar):
    """The SHA-256 of a file as hex digits. bar: a progress bar in bytes."""
    digest = hashlib.sha256()
    with open(path, "rb") as f:
        while chunk := f.read(1 << 24):
            digest.update(chunk)
            bar.update(len(chunk))
    return digest.hexdigest()


def source_keys(root, files):
    """Two keys: the names of all files that were read, and their SHA-256. A name is relative to `root`, the checkpoint,
    if the file lies there."""
    files = list(dict.fromkeys(files))
    names = [f.relative_to(root).as_posix() if root in f.parents else f.name for f in files]
    names = [os.fsencode(name).decode(errors="replace") for name in names]  # a name may be any bytes
    total = sum(f.stat().st_size for f in files)
    with tqdm(total=total, desc="sha256", unit="B", unit_scale=True, disable=None) as bar:
        return {"sora.source.names": names, "sora.source.sha256": [sha256_of(f, bar) for f in files]}


def carried_keys(own, keys):
    """The history keys of a weight file that is converted again: its entries, then the new ones. own: the weight file's
    reader; keys: the new file's. Raises ExportError for an unknown key, since it would be lost."""
    known = keys.keys() | {row.key for row in DEFAULTS.values()} | {"general.architecture", "general.alignment"}
    if unknown := [key for key in own.keys if key not in known and not key.startswith("GGUF.")]:
        raise ExportError(f"{own.path}: unknown key {unknown[0]}, expected a file of this version of export.py")
    return {key: [*own.keys.get(key, []), *keys[key]] for key in ("sora.lora", "sora.source.names",
                                                                  "sora.source.sha256")}


def check_space(output, planned):
    """Raises OSError unless the disk has room for the new file beside the one it replaces."""
    needed, free = sum(t.bytes() for t in planned), shutil.disk_usage(output.parent).free
    if needed > free:
        raise OSError(errno.ENOSPC, f"needs {needed:,} bytes, the disk has {free:,} left", str(output))


def export(args):
    """Converts a checkpoint. args: of arguments(). Raises ExportError or OSError; then no file is written."""
    opened, output = {}, check_output(Path(args.output))
    sources, wanted = find_sources(args, opened), TYPES[args.type]
    recipe, note = find_recipe(args, sources)
    parts = {name: open_part(name, getattr(sources, name), sources.patterns.get(name, "*"), opened,
                             recipe and recipe.container) for name in KINDS if getattr(sources, name)}
    text, transformer, vae = parts["text_encoder"], parts["transformer"], parts["vae"]
    if sources.expands:
        transformer.sizes["model_type"] = "ti2v"
    tokenizer_path = find_tokenizer(sources.tokenizer)
    tokenizer = tokenizer_keys(tokenizer_path, opened)
    check_parts_fit(text, transformer, vae, len(tokenizer["tokenizer.ggml.tokens"]), tokenizer_path)
    if "vae_tiny" in parts:
        check_tiny_fits(parts["vae_tiny"], vae)

    if sources.transformer_2:
        check_experts_fit(transformer, parts["transformer_2"])
        second = parts["transformer_2"].path
        files = (f"both in {second}" if second == transformer.path else
                 f"{transformer.path}, then {second} for low noise")
        transformer.notes.append(f"two experts: {files}")
        transformer.notes += order_note(transformer, parts["transformer_2"])
    elif args.lora_2:
        raise ExportError("--lora-2 is given, but there is one transformer, expected --transformer-2, too")
    else:
        transformer.notes += expert_note(transformer)

    shapes = {name: shape for name, shape, _ in transformer.rows()}
    merged = {part: [open_lora(option, shapes, args.lora_skip_unmatched, recipe and recipe.lora_alpha)
                     for option in given]
              for part, given in (("transformer", args.lora), ("transformer_2", args.lora_2))}
    loras = [lora for some in merged.values() for lora in some]
    planned = [t for name, part in parts.items() for t in plan(part, wanted, merged.get(name, ()))]
    matrix = next(t for t in planned if t.name == "blocks.0.self_attn.q.weight")
    files = [f for f in (*(f for part in parts.values() for f in part.files), tokenizer_path, sources.scheduler,
                         sources.settings, *(f for lora in loras for f in lora.files)) if f]
    spare_sources(output, files)
    check_space(output, planned)
    keys = {
        "general.file_type": FILE_TYPES[matrix.type],
        **FIXED,
        DIGEST_KEY: NO_DIGEST,
        **default_keys(run_defaults(args, sources, recipe, transformer, vae)),
        **model_keys(parts.values()),
        "sora.lora": [f"{lora.path.name}:{lora.scale:g}" for lora in loras],
        **source_keys(Path(args.checkpoint) if args.checkpoint else None, files),
        **tokenizer,
    }
    if sources.own:
        keys |= carried_keys(sources.own, keys)
    notes = [*([note] if note else []), *(n for part in parts.values() for n in part.notes),
             *(lora.note for lora in loras)]
    print(*notes, sep="\n", end="\n" * bool(notes), file=sys.stderr)
    write(output, keys, planned)
    count = f"{len(planned)} tensor" + "s" * (len(planned) != 1)
    print(f"{output}: {count}, {output.stat().st_size:,} bytes", file=sys.stderr)


class Parser(argparse.ArgumentParser):
    """argparse's parser, whose errors are one line."""

    def error(self, message):
        self.exit(2, f"export.py: {message} (--help lists the options)\n")


def arguments(argv):
    """The parsed command line. Every row of DEFAULTS that has a help text is an option. argv: None is sys.argv."""
    parser = Parser(prog="export.py", description="Converts a checkpoint of Wan 2.1 or 2.2 to one GGUF file.")
    parser.add_argument("checkpoint", nargs="?", metavar="CHECKPOINT",
                        help="a diffusers folder, an original release folder, the transformer's file, or a weight file "
                             "that export.py wrote")
    parser.add_argument("-o", "--output", required=True, metavar="FILE", help="the GGUF file to write")
    parser.add_argument("--type", choices=TYPES, default="keep",
                        help="type of the matrices (default keep: as stored; "
                             "a type that sora cannot read becomes bf16)")
    parser.add_argument("--lora", action="append", default=[], metavar="FILE[:SCALE]",
                        help="merge a LoRA; can be given several times")
    parser.add_argument("--lora-2", action="append", default=[], metavar="FILE[:SCALE]",
                        help="the same for the second expert")
    parser.add_argument("--lora-skip-unmatched", action="store_true",
                        help="leave out LoRA keys that match no tensor, and print their number")
    for part, what in (("transformer", "transformer"), ("transformer-2", "second expert, the one for low noise,"),
                       ("text-encoder", "text encoder"), ("vae", "VAE"), ("tokenizer", "tokenizer")):
        parser.add_argument(f"--{part}", metavar="PATH", help=f"take the {what} from this file or folder")
    parser.add_argument("--vae-tiny", metavar="FILE", help="add a tiny decoder, TAEHV's taew2_1 or taew2_2")
    schedule = parser.add_argument_group("the schedule for which distilled and causal weights were trained")
    schedule.add_argument("--recipe", choices=RECIPES, metavar="NAME",
                          help=f"the released model whose schedule and chunks the weights have: {', '.join(RECIPES)}")
    schedule.add_argument("--timesteps", metavar="LIST", help="time steps before the shift, such as 1000,750,500,250")
    schedule.add_argument("--first-timesteps", metavar="LIST", help="time steps of the first chunk")
    schedule.add_argument("--no-warp", action="store_true",
                          help="give the transformer these time steps without the shift")
    defaults = parser.add_argument_group("defaults of a run, stored in the file")
    for name, row in ((name, row) for name, row in DEFAULTS.items() if row.help):
        choices = f": {', '.join(row.allowed)}" if row.kind is str and row.allowed else ""
        defaults.add_argument(option_of(name), dest=name, type=row.kind, metavar=METAVARS[row.kind],
                              help=row.help + choices)
    return parser.parse_args(argv)


def main(argv=None):
    """Runs the command. Returns the exit status: 0 done, 2 bad usage or bad input, 3 out of disk or memory, 130
    interrupted."""
    if argv is None:
        signal.signal(signal.SIGTERM, signal.default_int_handler)  # clean up as after control-C
    args = arguments(argv)
    try:
        export(args)
    except ExportError as error:
        print(f"export.py: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"export.py: {error.filename or args.output}: {error.strerror or error}", file=sys.stderr)
        return 2 if isinstance(error, (FileNotFoundError, PermissionError, NotADirectoryError)) else 3
    except KeyboardInterrupt:
        print("export.py: interrupted", file=sys.stderr)
        return 130
    except Exception as error:  # a bug of this program, or an input that it does not foresee: still one line
        if is_out_of_memory(error):
            print("export.py: out of memory", file=sys.stderr)
            return 3
        at = traceback.extract_tb(error.__traceback__)[-1]
        print(f"export.py: internal error: {type(error).__name__}: {error} ({Path(at.filename).name}:{at.lineno})",
              file=sys.stderr)
        return 2
    return 0
