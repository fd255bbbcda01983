"""Sources: finds the file of each part, in every layout of a checkpoint."""

from dataclasses import dataclass, field
from pathlib import Path

from export.containers import Gguf, open_file
from export.files import ExportError, read_json, reading
from export.recipes import KNOWN_PIPELINES

PARTS = ("transformer", "text_encoder", "vae", "tokenizer")


@dataclass
class Sources:
    """Paths of the parts and their settings; None where there is none."""
    transformer: Path | None = None
    text_encoder: Path | None = None
    vae: Path | None = None
    tokenizer: Path | None = None
    scheduler: Path | None = None
    settings: Path | None = None
    own: Gguf | None = None  # the weight file, if one is converted again
    pipeline: str | None = None  # its class in model_index.json
    patterns: dict = field(default_factory=dict)  # {part: pattern of its files, in a folder that holds several parts}


def find_sources(args, opened):
    """The sources of CHECKPOINT, in which options such as --vae replace parts. opened: {path: reader}, added to. Raises
    ExportError for a missing part or a pipeline that sora cannot run."""
    sources = Sources()
    if args.checkpoint:
        root = Path(args.checkpoint)
        root = root.parent if root.name == "model_index.json" else root
        if not root.exists():
            raise ExportError(f"{root}: no such file or folder")
        if root.is_file():
            file = open_file(root, opened)
            sources = Sources(root, root, root, root, own=file) if file.own else Sources(transformer=root)
        elif (root / "model_index.json").is_file():
            sources = diffusers_sources(root, bool(args.transformer))
        else:
            sources = original_sources(root, args)
        if (root / "sora.json").is_file():
            sources.settings = root / "sora.json"
    for part in PARTS:
        if getattr(args, part):
            setattr(sources, part, Path(getattr(args, part)))
            sources.patterns.pop(part, None)
    if not sources.tokenizer and sources.text_encoder and sources.text_encoder.is_file():
        sources.tokenizer = sources.text_encoder  # ComfyUI's and llama.cpp's text encoders contain it
    for part in PARTS:
        if getattr(sources, part) is None:
            raise ExportError(f"no {part.replace('_', ' ')} is given, expected one in CHECKPOINT or "
                              f"--{part.replace('_', '-')}")
    return sources


PIPELINES = ("WanPipeline", *KNOWN_PIPELINES)


def diffusers_sources(root, replaced):
    """The sources in a diffusers pipeline folder. replaced: the transformer comes from an option, so any pipeline will
    do."""
    path = root / "model_index.json"
    with reading(path):
        index = read_json(path)
        if not replaced:
            refuse_pipeline(root, index)
    scheduler = root / "scheduler" / "scheduler_config.json"
    return Sources(root / "transformer", root / "text_encoder", root / "vae", root / "tokenizer",
                   scheduler if scheduler.is_file() else None, pipeline=None if replaced else index.get("_class_name"))


def refuse_pipeline(root, index):
    """Raises ExportError for a pipeline that sora cannot run. index: model_index.json."""
    for key, what in (("transformer_2", "Wan 2.2 A14B (two experts)"), ("image_encoder", "an image-to-video model")):
        if any(index.get(key) or []):
            raise ExportError(f"{root}: {what} cannot be run yet ({key} in model_index.json)")
    if index.get("_class_name", "WanPipeline") not in PIPELINES:
        raise ExportError(f"{root}: a {index['_class_name']} cannot be run yet (_class_name in model_index.json)")


def original_sources(root, args):
    """The sources in a folder that the original repository's generate.py takes (wan/configs). args: of the command
    line."""
    def only(part, pattern):
        found = sorted(root.glob(pattern))
        if len(found) > 1 and not getattr(args, part):
            raise ExportError(f"{root}: {found[0].name} and {found[1].name}, expected one: give it with "
                              f"--{part.replace('_', '-')}")
        return found[0] if found else None

    for pattern, what in (("*_noise_model", "Wan 2.2 A14B (two experts)"), ("models_clip_*", "an image-to-video model (CLIP image encoder)")):
        if (found := sorted(root.glob(pattern))) and not args.transformer:
            raise ExportError(f"{root}: {what} cannot be run yet ({found[0].name})")
    return Sources(root, only("text_encoder", "models_t5_*"), only("vae", "Wan*_VAE.*"),
                   only("tokenizer", "google/umt5-xxl"), patterns={"transformer": "diffusion_pytorch_model*"})
