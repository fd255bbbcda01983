"""Sources: which file holds which part in every layout, and what sora does when no option says otherwise."""

from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

from export.files import ExportError, read_json, reading

# ---------------------------------------------------------------- parts

PARTS = ("transformer", "text_encoder", "vae", "tokenizer")


@dataclass
class Sources:
    """Paths of the parts. Named ones replace those that CHECKPOINT has."""
    transformer: Path | None = None
    text_encoder: Path | None = None
    vae: Path | None = None
    tokenizer: Path | None = None
    scheduler: Path | None = None
    settings: Path | None = None
    transformer_pattern: str = "*"


def find_sources(args):
    """Recognises CHECKPOINT's layout and lays the named parts over it."""
    sources = Sources()
    if args.checkpoint:
        root = Path(args.checkpoint)
        if not root.exists():
            raise ExportError(f"{root}: no such file or folder")
        if root.is_file():
            sources = Sources(transformer=root)
        elif (root / "model_index.json").is_file():
            sources = diffusers_sources(root, bool(args.transformer))
        else:
            sources = original_sources(root, bool(args.transformer))
        if (root / "sora.json").is_file():
            sources.settings = root / "sora.json"
    for part in PARTS:
        if getattr(args, part):
            setattr(sources, part, Path(getattr(args, part)))
    if args.transformer:
        sources.transformer_pattern = "*"
    if not sources.tokenizer and sources.text_encoder and sources.text_encoder.suffix in (".gguf", ".safetensors"):
        sources.tokenizer = sources.text_encoder  # ComfyUI's and llama.cpp's text encoders carry it
    for part in PARTS:
        if getattr(sources, part) is None:
            raise ExportError(f"no {part.replace('_', ' ')}: name it with --{part.replace('_', '-')}")
    return sources


def diffusers_sources(root, replaced):
    """The parts of a diffusers pipeline folder; of any pipeline's if its transformer is replaced."""
    path = root / "model_index.json"
    with reading(path):
        index = read_json(path)
        if not replaced:
            refuse_pipeline(root, index)
    scheduler = root / "scheduler" / "scheduler_config.json"
    return Sources(root / "transformer", root / "text_encoder", root / "vae", root / "tokenizer",
                   scheduler if scheduler.is_file() else None)


def refuse_pipeline(root, index):
    """An error that names the model, where diffusers would do something else with it than sora does."""
    for key, what in (("transformer_2", "Wan 2.2 A14B (two experts)"), ("image_encoder", "an image-to-video model")):
        if any(index.get(key) or []):
            raise ExportError(f"{root}: {what} cannot be run yet ({key} in model_index.json)")
    if index.get("expand_timesteps"):
        raise ExportError(f"{root}: Wan 2.2 TI2V-5B cannot be run yet (expand_timesteps in model_index.json)")
    if index.get("_class_name", "WanPipeline") != "WanPipeline":
        raise ExportError(f"{root}: a {index['_class_name']} cannot be run yet (_class_name in model_index.json)")


def original_sources(root, replaced):
    """The parts of a folder as the original repository's generate.py expects it (wan/configs)."""
    def first(pattern):
        return next(iter(sorted(root.glob(pattern))), None)

    for pattern, what in (("*_noise_model", "Wan 2.2 A14B (two experts)"), ("Wan2.2_VAE.*", "Wan 2.2 TI2V-5B"),
                          ("models_clip_*", "an image-to-video model (CLIP image encoder)")):
        if (found := first(pattern)) and not replaced:
            raise ExportError(f"{root}: {what} cannot be run yet ({found.name})")
    return Sources(root, first("models_t5_*"), first("Wan*_VAE.*"), first("google/umt5-xxl"),
                   transformer_pattern="diffusion_pytorch_model*")


# ---------------------------------------------------------------- defaults of a run

# Those of diffusers' WanPipeline, with the shift that its documentation gives for 480 lines: sora's samplers are
# diffusers', and both layouts of a model must give one file. The original repository's generate.py takes shift 5; its
# README recommends 8 to 12 for the 1.3B model, with guidance 6.
DEFAULTS = {"width": 832, "height": 480, "frames": 81, "fps": "16", "steps": 50, "guidance": 5.0, "shift": 3.0,
            "sampler": "unipc", "negative_prompt": "", "name": "Wan"}

# What sora takes.
RANGES = {"width": (1, 16384), "height": (1, 16384), "frames": (1, 1000001), "steps": (1, 1000),
          "guidance": (0, 1000), "shift": (1e-3, 1000)}
MAX_RATE = 1000000  # of either side of fps

# wan/configs/shared_config.py: sample_neg_prompt, part of the released models' configuration.
NEGATIVE_PROMPT = ("色调艳丽，过曝，静态，细节模糊不清，字幕，风格，作品，画作，画面，静止，整体发灰，最差质量，低质量，"
                   "JPEG压缩残留，丑陋的，残缺的，多余的手指，画得不好的手部，画得不好的脸部，畸形的，毁容的，"
                   "形态畸形的肢体，手指融合，静止不动的画面，杂乱的背景，三条腿，背景人很多，倒着走")
RELEASED = {  # (dim, num_layers): what the original configuration says of it
    (1536, 30): {"name": "Wan2.1-T2V-1.3B", "negative_prompt": NEGATIVE_PROMPT},
    (5120, 40): {"name": "Wan2.1-T2V-14B", "negative_prompt": NEGATIVE_PROMPT},
}

# The schedulers that sora has, and the only settings in which it has them.
SCHEDULERS = {
    "UniPCMultistepScheduler": ("unipc", "flow_shift", {
        "prediction_type": "flow_prediction", "use_flow_sigmas": True, "solver_order": 2, "solver_type": "bh2",
        "predict_x0": True, "lower_order_final": True, "disable_corrector": []}),
    "FlowMatchEulerDiscreteScheduler": ("euler", "shift", {"invert_sigmas": False, "stochastic_sampling": False}),
    "DPMSolverMultistepScheduler": ("dpm++", "flow_shift", {
        "prediction_type": "flow_prediction", "use_flow_sigmas": True, "solver_order": 2, "solver_type": "midpoint",
        "algorithm_type": "dpmsolver++", "lower_order_final": True, "euler_at_final": False}),
}
ALL_SCHEDULERS = {"num_train_timesteps": 1000, "use_dynamic_shifting": False, "shift_terminal": None,
                  "thresholding": False, "final_sigmas_type": "zero", "use_karras_sigmas": False,
                  "use_exponential_sigmas": False, "use_beta_sigmas": False}
OTHERWISE_ELSE = ("prediction_type", "use_flow_sigmas")  # what a configuration leaves out, diffusers does otherwise

SAMPLERS = [sampler for sampler, _, _ in SCHEDULERS.values()]


def scheduler_defaults(path):
    """Sampler and shift of a scheduler_config.json; a setting that sora does not compute is an error."""
    config = read_json(path)
    if config.get("_class_name") not in SCHEDULERS:
        raise ExportError(f"{path}: {config.get('_class_name')} is none of {', '.join(SCHEDULERS)}")
    sampler, shift, settings = SCHEDULERS[config["_class_name"]]
    for key, value in {**ALL_SCHEDULERS, **settings}.items():
        found = config.get(key, None if key in OTHERWISE_ELSE else value)
        if found != value:
            raise ExportError(f"{path}: {key} is {found!r}, expected {value!r}")
    return {"sampler": sampler, "shift": float(config.get(shift, 1.0))}


def run_defaults(args, sources, transformer, vae):
    """What sora does when no option says otherwise, from the general to the particular: this script, the release, the
    scheduler's configuration, sora.json beside the checkpoint, options of this command. transformer, vae: sizes."""
    values = {**DEFAULTS, **RELEASED.get((transformer["dim"], transformer["num_layers"]), {})}
    if sources.scheduler:
        with reading(sources.scheduler):
            values.update(scheduler_defaults(sources.scheduler))
    if sources.settings:
        values.update(read_json(sources.settings))
    values.update({key: getattr(args, key) for key in DEFAULTS if getattr(args, key) is not None})
    for key, value in values.items():
        check_default(key, value)
    check_clip(values, transformer, vae)
    return values


def check_default(key, value):
    """A value of sora.json or of an option must be of the kind that its default is."""
    if key not in DEFAULTS:
        raise ExportError(f"sora.json: {key!r} is none of {', '.join(DEFAULTS)}")
    kinds = {int: (int,), float: (int, float), str: (str, int) if key == "fps" else (str,)}[type(DEFAULTS[key])]
    if type(value) not in kinds:
        raise ExportError(f"{key} is {value!r}, expected {'a text' if kinds[0] is str else 'a number'}")
    if key in RANGES and not RANGES[key][0] <= value <= RANGES[key][1]:
        raise ExportError("{} is {!r}, expected {:g} to {:g}".format(key, value, *RANGES[key]))
    if key == "sampler" and value not in SAMPLERS:
        raise ExportError(f"sampler is {value!r}, expected one of {', '.join(SAMPLERS)}")


def check_clip(values, transformer, vae):
    """Width, height and length must be ones that the model can make."""
    levels, patch = vae["temperal_downsample"], transformer["patch_size"]
    space, time = vae["patch_size"] << len(levels), 1 << sum(levels)
    for key, multiple in (("height", space * patch[1]), ("width", space * patch[2])):
        if values[key] % multiple:
            raise ExportError(f"{key} is {values[key]}, expected a multiple of {multiple}")
    if (values["frames"] - 1) % time:
        raise ExportError(f"frames is {values['frames']}, expected {time}k+1")


def default_keys(values):
    """The keys of the defaults; f64 where diffusers computes with a Python float."""
    rate = parse_rate(values["fps"])
    return {
        "general.name": values["name"],
        **{f"default.{key}": values[key] for key in ("width", "height", "frames", "steps", "negative_prompt")},
        "default.fps_num": rate.numerator,
        "default.fps_den": rate.denominator,
        "default.guidance": float(values["guidance"]),
        "scheduler.sampler": values["sampler"],
        "scheduler.shift": float(values["shift"]),
        "scheduler.num_train_timesteps": 1000,
    }


def parse_rate(text):
    """Frames a second, N or N:D."""
    try:
        rate = Fraction(str(text).replace(":", "/"))
    except (ValueError, ZeroDivisionError):
        rate = Fraction(0)
    if not 0 < rate.numerator <= MAX_RATE >= rate.denominator:
        raise ExportError(f"fps is {text!r}, expected N or N:D of at most {MAX_RATE}")
    return rate
