#!/usr/bin/env python3
"""Converts a checkpoint of Wan 2.1 or 2.2 to one GGUF file, which sora maps into memory.

    export/command.py   the command line
    export/sources.py   CHECKPOINT and options  -> which file holds which part
    export/files.py     a path                  -> its files
    export/containers.py  files                 -> tensors, not read yet
    export/parts.py     files of a part         -> its tensors by our names, its sizes
    export/names.py       keys of any layout    -> our names; refuses what sora cannot run
    export/quantised.py   fp8, int8, scales     -> weights
    export/sizes.py       shapes, config.json   -> sizes of the model
    export/tiny.py        TAEHV's tensors       -> those that sora reads
    export/tables.py      sizes                 -> every tensor: name, shape, type rule
    export/tokenizer.py tokenizer               -> pieces and rules
    export/lora.py      LoRA files              -> changes of the transformer's tensors
    export/recipes.py   a recipe's name         -> schedule and chunks of distilled and causal weights
    export/defaults.py  options and settings    -> the default settings of a run
    export/keys.py      sizes                   <-> keys of the weight file
    export/writer.py    all of it               -> model.gguf, a slice of rows at a time

Nothing is skipped silently. A tensor, key or setting that is missing, has the wrong shape, or is unknown ends the
export: one line names it, the exit status is 2, and no file is written.
"""
# Keep to the syntax of old Pythons in this file, so that they print the line below and not a SyntaxError.
import sys

if sys.version_info < (3, 11):
    sys.exit("export.py: this is Python %d.%d, expected 3.11 or later" % sys.version_info[:2])
try:
    from export.command import main
except ImportError as error:
    sys.exit("export.py: %s: pip install -r requirements.txt" % error)

if __name__ == "__main__":
    sys.exit(main())
