#!/usr/bin/env python3
"""From a released Wan 2.1 text-to-video checkpoint to the one GGUF file that sora maps into memory.

    export/sources.py   CHECKPOINT and options  -> which file holds which part; defaults of a run
    export/files.py     files                   -> tensors, not read yet
    export/names.py     keys of any layout      -> our names; refuses what sora cannot run
    export/sizes.py     shapes and config.json  -> sizes of the three models
    export/tables.py    sizes                   -> every tensor: name, shape, type rule
    export/tokenizer.py tokenizer               -> pieces and rules
    export/lora.py      LoRA files              -> changes of the transformer's tensors
    export/writer.py    all of it               -> model.gguf, a slice of rows at a time

Nothing is skipped silently: a tensor, key or setting that is missing, misshapen or unknown ends the export with one
line that names it, exit status 2, and no file.
"""

import argparse
import hashlib
import signal
import sys
from pathlib import Path

from gguf import GGMLQuantizationType as Type
from tqdm import tqdm

from export.files import ExportError, is_out_of_memory, reading
from export.lora import open_lora
from export.names import open_part
from export.sizes import text_encoder_sizes, transformer_sizes, vae_sizes
from export.sources import DEFAULTS, default_keys, find_sources, run_defaults
from export.tables import TEXT_ENCODER, TRANSFORMER, block_rows, vae_rows
from export.tokenizer import find_tokenizer, tokenizer_keys
from export.writer import DIGEST_KEY, NO_DIGEST, TYPES, check_output, plan, spare_sources, write

FORMAT_VERSION = 1
FILE_TYPES = {Type.F32: 0, Type.F16: 1, Type.Q8_0: 7, Type.BF16: 32}  # llama.cpp's LLAMA_FTYPE


def model_keys(transformer, text, vae):
    """The three models' configuration, under the names of their own conventions."""
    return {
        "wan.model_type": "t2v",
        **{f"wan.{key}": transformer[key] for key in ("dim", "ffn_dim", "freq_dim", "in_dim", "out_dim", "num_heads",
                                                      "num_layers", "text_len", "text_dim", "patch_size", "eps")},
        "wan.qk_norm": True,
        "wan.cross_attn_norm": True,
        "wan.patch_embedding_layout": "O,I,T,Y,X",
        "t5encoder.block_count": text["num_layers"],
        "t5encoder.embedding_length": text["dim"],
        "t5encoder.feed_forward_length": text["ffn_dim"],
        "t5encoder.vocab_size": text["vocab_size"],
        "t5encoder.context_length": transformer["text_len"],
        "t5encoder.attention.head_count": text["num_heads"],
        "t5encoder.attention.key_length": text["head_dim"],
        "t5encoder.attention.relative_buckets_count": text["num_buckets"],
        "t5encoder.attention.relative_max_distance": text["max_distance"],
        "t5encoder.attention.layer_norm_rms_epsilon": text["eps"],
        **{f"vae.{key}": vae[key] for key in ("z_dim", "base_dim", "decoder_base_dim", "dim_mult", "num_res_blocks",
                                              "in_channels", "out_channels", "patch_size", "latents_mean",
                                              "latents_std")},
        "vae.temperal_downsample": [int(t) for t in vae["temperal_downsample"]],
        "vae.conv_layout": "O,T,Y,X,I",
    }


def check_parts_fit(transformer, text, vae, tokenizer):
    """The parts must have been made for each other."""
    if transformer["text_dim"] != text["dim"]:
        raise ExportError(f"the transformer takes text of width {transformer['text_dim']}, the text encoder gives "
                          f"{text['dim']}")
    if transformer["in_dim"] != vae["z_dim"]:
        raise ExportError(f"the transformer has {transformer['in_dim']} latent channels, the VAE {vae['z_dim']}")
    if len(tokenizer["tokenizer.ggml.tokens"]) > text["vocab_size"]:
        raise ExportError(f"the tokenizer has {len(tokenizer['tokenizer.ggml.tokens'])} pieces, the text encoder's "
                          f"embedding {text['vocab_size']} rows")


def sha256_of(path, bar):
    """The hex digest of a file."""
    digest = hashlib.sha256()
    with open(path, "rb") as f:
        while chunk := f.read(1 << 24):
            digest.update(chunk)
            bar.update(len(chunk))
    return digest.hexdigest()


def source_keys(root, files):
    """Names, relative to the checkpoint where they lie in it, and SHA-256 of all files that were read."""
    files = list(dict.fromkeys(files))
    names = [f.relative_to(root).as_posix() if root in f.parents else f.name for f in files]
    total = sum(f.stat().st_size for f in files)
    with tqdm(total=total, desc="sha256", unit="B", unit_scale=True, disable=None) as bar:
        return {"sora.source.names": names, "sora.source.sha256": [sha256_of(f, bar) for f in files]}


def export(args):
    """From the arguments to the finished file."""
    output = check_output(Path(args.output))
    sources, wanted = find_sources(args), TYPES.get(args.type)
    parts, sizes = [], []
    for name, measure in (("transformer", transformer_sizes), ("text_encoder", text_encoder_sizes), ("vae", vae_sizes)):
        path = getattr(sources, name)
        with reading(path):
            parts.append(open_part(name, path, sources.transformer_pattern if name == "transformer" else "*"))
            sizes.append(measure(parts[-1]))
    transformer, text, vae = parts
    tokenizer_path = find_tokenizer(sources.tokenizer)
    tokenizer = tokenizer_keys(tokenizer_path, text.opened)
    check_parts_fit(*sizes, tokenizer)

    rows = list(block_rows(TRANSFORMER, sizes[0]))
    loras = [open_lora(option, {name: shape for name, shape, _ in rows}) for option in args.lora]
    planned = [*plan(text, block_rows(TEXT_ENCODER, sizes[1]), wanted),
               *plan(transformer, rows, wanted, loras),
               *plan(vae, vae_rows(sizes[2]), wanted)]
    matrix = next(t for t in planned if t.name == "blocks.0.self_attn.q.weight")
    values = run_defaults(args, sources, sizes[0], sizes[2])
    files = [f for f in (*text.files, *transformer.files, *vae.files, tokenizer_path, sources.scheduler,
                         sources.settings, *(f for lora in loras for f in lora.files)) if f]
    spare_sources(output, files)
    write(output, {
        "general.file_type": FILE_TYPES[matrix.type],
        "general.quantization_version": 2,
        "sora.format_version": FORMAT_VERSION,
        DIGEST_KEY: NO_DIGEST,
        **default_keys(values),
        **model_keys(*sizes),
        "sora.lora": [f"{lora.path.name}:{lora.scale:g}" for lora in loras],
        **source_keys(Path(args.checkpoint) if args.checkpoint else None, files),
        "tokenizer.ggml.model": "t5",
        **tokenizer,
        "tokenizer.ggml.add_bos_token": False,
        "tokenizer.ggml.add_eos_token": True,
    }, planned)
    print(f"{output}: {len(planned)} tensors, {output.stat().st_size:,} bytes", file=sys.stderr)


def arguments(argv):
    """The command line; each default of a run is an option of its type."""
    parser = argparse.ArgumentParser(description="Converts a Wan 2.1 text-to-video checkpoint to one GGUF file.")
    parser.add_argument("checkpoint", nargs="?", metavar="CHECKPOINT",
                        help="a diffusers folder, an original release folder, or the transformer's file")
    parser.add_argument("-o", "--output", required=True, help="the GGUF file to write")
    parser.add_argument("--type", choices=TYPES,
                        help="type of the matrices (default: as they are stored; quantised ones but for q8_0 as bf16)")
    parser.add_argument("--lora", action="append", default=[], metavar="FILE[:SCALE]", help="merge a LoRA; repeatable")
    for part in ("transformer", "text-encoder", "vae", "tokenizer"):
        parser.add_argument(f"--{part}", metavar="PATH", help="file or folder to take this part from")
    defaults = parser.add_argument_group("defaults that the file gives to sora")
    for key, value in DEFAULTS.items():
        option = "--negative" if key == "negative_prompt" else f"--{key}"
        defaults.add_argument(option, dest=key, type=type(value), metavar=type(value).__name__.upper())
    return parser.parse_args(argv)


def main(argv=None):
    """Exit status: 0 done, 2 bad usage or bad input, 3 out of disk or memory, 130 interrupted."""
    args = arguments(argv)
    try:
        export(args)
    except ExportError as error:
        print(f"export.py: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"export.py: {error.filename or args.output}: {error.strerror}", file=sys.stderr)
        return 2 if isinstance(error, (FileNotFoundError, PermissionError)) else 3
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        print("export.py: out of memory", file=sys.stderr)
        return 3
    except KeyboardInterrupt:
        print("export.py: interrupted", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # clean up as after control-C
    sys.exit(main())
