"""Sources: finds the file of each part, in every layout of a checkpoint."""

from dataclasses import dataclass, field
from pathlib import Path

from export.containers import Gguf, open_file
from export.files import ExportError, read_json, reading
from export.parts import has_experts
from export.recipes import KNOWN_PIPELINES

PARTS = ("transformer", "transformer_2", "text_encoder", "vae", "tokenizer")


@dataclass
class Sources:
    """Paths of the parts and their settings; None where there is none."""
    transformer: Path | None = None
    transformer_2: Path | None = None  # the second expert: the one for low noise
    text_encoder: Path | None = None
    vae: Path | None = None
    tokenizer: Path | None = None
    scheduler: Path | None = None
    settings: Path | None = None
    vae_tiny: Path | None = None
    own: Gguf | None = None  # the weight file, if one is converted again
    pipeline: str | None = None  # its class in model_index.json
    expands: bool = False  # whether a picture may be the first frame: expand_timesteps in model_index.json
    boundary: float | None = None  # from which noise level the first expert serves: boundary_ratio in model_index.json
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
            sources = own_sources(root, file) if file.own else Sources(transformer=root)
        elif (root / "model_index.json").is_file():
            sources = diffusers_sources(root, bool(args.transformer))
        else:
            sources = original_sources(root, args)
        if (root / "sora.json").is_file():
            sources.settings = root / "sora.json"
    for part in (*PARTS, "vae_tiny"):
        if getattr(args, part):
            setattr(sources, part, Path(getattr(args, part)))
            sources.patterns.pop(part, None)
    if not sources.tokenizer and sources.text_encoder and sources.text_encoder.is_file():
        sources.tokenizer = sources.text_encoder  # ComfyUI's and llama.cpp's text encoders contain it
    for part in PARTS:
        if getattr(sources, part) is None and part != "transformer_2":
            raise ExportError(f"no {part.replace('_', ' ')} is given, expected one in CHECKPOINT or "
                              f"--{part.replace('_', '-')}")
    return sources


def own_sources(path, file):
    """The sources in a weight file that export.py wrote."""
    return Sources(path, path if has_experts(file) else None, path, path, path,
                   vae_tiny=path if "vae.tiny.widths" in file.keys else None, own=file)


PIPELINES = ("WanPipeline", "WanImageToVideoPipeline", *KNOWN_PIPELINES)


def diffusers_sources(root, replaced):
    """The sources in a diffusers pipeline folder. replaced: the transformer comes from an option, so any pipeline will
    do."""
    path = root / "model_index.json"
    with reading(path):
        index = read_json(path)
        if not replaced:
            refuse_pipeline(root, index)
        second = root / "transformer_2" if any(index.get("transformer_2") or []) else None
    scheduler = root / "scheduler" / "scheduler_config.json"
    return Sources(root / "transformer", second, root / "text_encoder", root / "vae", root / "tokenizer",
                   scheduler if scheduler.is_file() else None, pipeline=None if replaced else index.get("_class_name"),
                   expands=index.get("expand_timesteps") is True, boundary=index.get("boundary_ratio"))


def refuse_pipeline(root, index):
    """Raises ExportError for a pipeline that sora cannot run. index: model_index.json."""
    if any(index.get("image_encoder") or []):
        raise ExportError(f"{root}: an image-to-video model (CLIP image encoder) cannot be run yet (image_encoder in "
                          "model_index.json)")
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

    if (found := sorted(root.glob("models_clip_*"))) and not args.transformer:
        raise ExportError(f"{root}: an image-to-video model (CLIP image encoder) cannot be run yet ({found[0].name})")
    others = only("text_encoder", "models_t5_*"), only("vae", "Wan*_VAE.*"), only("tokenizer", "google/umt5-xxl")
    experts = root / "high_noise_model", root / "low_noise_model"
    if any(expert.is_dir() for expert in experts):
        return Sources(*experts, *others)
    return Sources(root, None, *others, patterns={"transformer": "diffusion_pytorch_model*"})
