"""Defaults: what sora does when no option of its own says otherwise, as keys of the weight file.

The table DEFAULTS is the list of them: each row is an option of export.py, a name in sora.json and a key of the file.
From the general to the particular, these say a default: the table, the release, the scheduler's configuration, the
weight file that is converted, sora.json beside the checkpoint, options of the command.
"""

from dataclasses import dataclass
from fractions import Fraction

from export.files import ExportError, read_json, reading

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

MAX_RATE = 1000000  # of either side of fps


@dataclass(frozen=True)
class Default:
    """A row of the table. A value of None leaves the key out of the file, and the choice to sora."""
    key: str             # in the weight file; fps has two, its numerator and denominator
    kind: type           # of its values: int, float or str
    value: object        # where nothing says otherwise
    allowed: tuple = ()  # (lowest, highest) of a number, the choices of a text; () is any
    help: str = ""


# Those of diffusers' WanPipeline, with the shift that its documentation gives for 480 lines: sora's samplers are
# diffusers', and both layouts of a model must give one file. The original repository's generate.py takes shift 5; its
# README recommends 8 to 12 for the 1.3B model, with guidance 6.
DEFAULTS = {
    "name": Default("general.name", str, "Wan", help="of the model"),
    "width": Default("default.width", int, 832, (1, 16384), "of the clip, in pixels"),
    "height": Default("default.height", int, 480, (1, 16384), "of the clip, in pixels"),
    "frames": Default("default.frames", int, 81, (1, 1000001), "of the clip"),
    "fps": Default("default.fps", str, "16", help="frames a second, N or N:D"),
    "steps": Default("default.steps", int, 50, (1, 1000), "of the sampler"),
    "guidance": Default("default.guidance", float, 5.0, (0, 1000), "scale of classifier-free guidance"),
    "negative_prompt": Default("default.negative_prompt", str, "", help="negative prompt"),
    "precision": Default("default.precision", str, None, ("f32", "bf16", "int8"), "arithmetic of the large products"),
    "sampler": Default("scheduler.sampler", str, "unipc", tuple(name for name, _, _ in SCHEDULERS.values()), "by name"),
    "shift": Default("scheduler.shift", float, 3.0, (1e-3, 1000), "of the schedule towards noise"),
}


def option_of(name):
    """The option of export.py that states a default."""
    return "--negative" if name == "negative_prompt" else "--" + name.replace("_", "-")


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


def keys_defaults(keys):
    """The defaults that the keys of a weight file state."""
    values = {name: keys[row.key] for name, row in DEFAULTS.items() if row.key in keys}
    if "default.fps_num" in keys:
        values["fps"] = f"{keys['default.fps_num']}:{keys['default.fps_den']}"
    return values


def run_defaults(args, sources, transformer, vae):
    """{name: value} of all that are stated. transformer, vae: sizes."""
    values = {name: row.value for name, row in DEFAULTS.items() if row.value is not None}
    values.update(RELEASED.get((transformer["dim"], transformer["num_layers"]), {}))
    if sources.scheduler:
        with reading(sources.scheduler):
            values.update(scheduler_defaults(sources.scheduler))
    if sources.own:
        values.update(keys_defaults(sources.own.keys))
    if sources.settings:
        values.update(read_json(sources.settings))
    values.update({name: getattr(args, name) for name in DEFAULTS if getattr(args, name) is not None})
    for name, value in values.items():
        check_default(name, value)
    check_clip(values, transformer, vae)
    return values


def check_default(name, value):
    """A value of sora.json or of an option must be of its row's kind and range."""
    if name not in DEFAULTS:
        raise ExportError(f"sora.json: {name!r} is none of {', '.join(DEFAULTS)}")
    row = DEFAULTS[name]
    kinds = {int: (int,), float: (int, float), str: (str, int) if name == "fps" else (str,)}[row.kind]
    if type(value) not in kinds:
        raise ExportError(f"{name} is {value!r}, expected {'a text' if row.kind is str else 'a number'}")
    if row.kind is str and not is_text(value):
        raise ExportError(f"{name} is {value!r}, expected UTF-8 without a character 0")
    if row.allowed and row.kind is str and value not in row.allowed:
        raise ExportError(f"{name} is {value!r}, expected one of {', '.join(row.allowed)}")
    if row.allowed and row.kind is not str and not row.allowed[0] <= value <= row.allowed[1]:
        raise ExportError("{} is {!r}, expected {:g} to {:g}".format(name, value, *row.allowed))


def is_text(value):
    """Whether a text can be written as one: arguments and JSON may hold halves of characters."""
    try:
        return b"\0" not in str(value).encode()
    except UnicodeEncodeError:
        return False


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
        **{row.key: row.kind(values[name]) for name, row in DEFAULTS.items() if name in values and name != "fps"},
        "default.fps_num": rate.numerator,
        "default.fps_den": rate.denominator,
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
