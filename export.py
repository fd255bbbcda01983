#!/usr/bin/env python3
"""From a released Wan 2.1 text-to-video checkpoint to the one GGUF file that sora maps into memory.

    export/command.py   the command line
    export/sources.py   CHECKPOINT and options  -> which file holds which part
    export/files.py     a path                  -> its files
    export/containers.py  files                 -> tensors, not read yet
    export/parts.py     files of a part         -> its tensors by our names, its sizes
    export/names.py       keys of any layout    -> our names; refuses what sora cannot run
    export/quantised.py   fp8, int8, scales     -> weights
    export/sizes.py       shapes, config.json   -> sizes of the model
    export/tables.py      sizes                 -> every tensor: name, shape, type rule
    export/tokenizer.py tokenizer               -> pieces and rules
    export/lora.py      LoRA files              -> changes of the transformer's tensors
    export/defaults.py  whatever states them    -> what sora does when no option says otherwise
    export/keys.py      sizes                   <-> keys of the weight file
    export/writer.py    all of it               -> model.gguf, a slice of rows at a time

Nothing is skipped silently: a tensor, key or setting that is missing, misshapen or unknown ends the export with one
line that names it, exit status 2, and no file.
"""
# This file must be read by every Python, so that the line below reaches whoever has an old one.
import sys

if sys.version_info < (3, 11):
    sys.exit("export.py: this is Python %d.%d, expected 3.11 or later" % sys.version_info[:2])
try:
    from export.command import main
except ImportError as error:
    sys.exit("export.py: %s: pip install -r requirements.txt" % error)

if __name__ == "__main__":
    sys.exit(main())
