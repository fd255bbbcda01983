"""Defaults: what sora does when no option of its own says otherwise, as keys of the weight file.

The table DEFAULTS is the list of them: each row is a name in sora.json, a key of the file and, where it has a text of
help, an option of export.py. From the general to the particular, these say a default: the table, the release, the
configurations of scheduler and transformer, the weight file that is converted, sora.json beside the checkpoint, a
recipe, options of the command.
"""

from dataclasses import dataclass
from fractions import Fraction

from export.files import ExportError, read_json, reading
from export.recipes import RECIPES, schedule

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
EXPECTED = {int: "a number", float: "a number", str: "a text", bool: "true or false", list: "a list of numbers"}


@dataclass(frozen=True)
class Default:
    """A row of the table. A value of None leaves the key out of the file, and the choice to sora."""
    key: str             # in the weight file; fps has two, its numerator and denominator
    kind: type           # of its values: int, float, str, bool or list of floats
    value: object        # where nothing says otherwise
    allowed: tuple = ()  # (lowest, highest) of a number or of each in a list, the choices of a text; () is any
    help: str = ""       # of its option, if it has one


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
    "rule": Default("scheduler.rule", str, None, ("multistep", "renoise", "euler"), "how a step moves"),
    "timesteps": Default("scheduler.timesteps", list, None, (0, 1000)),  # as the transformer is told
    "sigmas": Default("scheduler.sigmas", list, None, (0, 1)),
    "first_timesteps": Default("scheduler.first_timesteps", list, None, (0, 1000)),
    "first_sigmas": Default("scheduler.first_sigmas", list, None, (0, 1)),
    "noise_scale": Default("scheduler.noise_scale", float, None, (1e-3, 10)),
    "noise_frames_first": Default("scheduler.noise_frames_first", bool, None),
    "chunk_frames": Default("causal.chunk_frames", int, None, (1, 4096), "latent frames made at once"),
    "independent_first_frame": Default("causal.independent_first_frame", bool, None),
    "window": Default("causal.window", int, None, (0, 1000000), "latent frames that are looked back at; 0: all"),
    "sink": Default("causal.sink", int, None, (0, 1000000), "first latent frames that are never dropped"),
    "positions": Default("causal.positions", str, None, ("absolute", "relative"), "of latent frames in time"),
    "context_noise": Default("causal.context_noise", float, None, (0, 1000), "time step of the pass that is kept"),
    "prompt_change": Default("causal.prompt_change", str, None, ("keep", "recache", "flush")),
    "recache_sink": Default("causal.recache_sink", bool, None),
}
OF_A_LIST = ("timesteps", "sigmas", "first_timesteps", "first_sigmas", "noise_scale", "noise_frames_first")

# What the transformer's config.json of causal models states, by the names of defaults.
CAUSAL_CONFIG = {"num_frame_per_block": "chunk_frames", "num_frames_per_block": "chunk_frames", "sink_size": "sink",
                 "local_attn_size": "window", "independent_first_frame": "independent_first_frame"}


def option_of(name):
    """The option of export.py that states a default."""
    return "--negative" if name == "negative_prompt" else "--" + name.replace("_", "-")


def scheduler_defaults(path):
    """Sampler and shift of a scheduler_config.json; a setting that sora does not compute is an error."""
    config = read_json(path)
    if config.get("_class_name") == "SelfForcingFlowMatchScheduler":  # of fixed lists, which stand elsewhere
        return {}
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


def causal_defaults(config):
    """What a transformer's config.json says of chunks; -1 is no window."""
    stated = {name: config[key] for key, name in CAUSAL_CONFIG.items() if config.get(key) not in (None, -1)}
    return stated if "chunk_frames" in stated or stated.get("window") else {}


def run_defaults(args, sources, recipe, transformer, vae):
    """{name: value} of all that are stated. recipe: of recipes.py, or None; transformer, vae: parts."""
    values = {name: row.value for name, row in DEFAULTS.items() if row.value is not None}
    values.update(RELEASED.get((transformer.sizes["dim"], transformer.sizes["num_layers"]), {}))
    if sources.scheduler:
        with reading(sources.scheduler):
            values.update(scheduler_defaults(sources.scheduler))
    values.update(causal_defaults(transformer.config))
    if sources.own:
        values.update(keys_defaults(sources.own.keys))
    if sources.settings:
        values.update(read_json(sources.settings))
    options = {name: getattr(args, name) for name, row in DEFAULTS.items() if row.help}
    options = {name: value for name, value in options.items() if value is not None}
    shift = {**values, **(recipe.defaults if recipe else {}), **options}["shift"]
    planned = schedule(args, recipe, shift)
    if planned or args.rule == "multistep":  # what was said of another list is not said of this one
        values = {name: value for name, value in values.items() if name not in OF_A_LIST}
    values |= planned | (recipe.defaults if recipe else {}) | options
    for name, value in values.items():
        check_default(name, value)
    if transformer.signs and "timesteps" not in values and args.rule != "multistep":
        raise ExportError(f"{transformer.path}: {transformer.signs[0]}: such weights are made for one schedule, which "
                          f"they do not tell: say --recipe {'|'.join(RECIPES)}, or --timesteps and --rule")
    check_clip(values, transformer.sizes, vae.sizes)
    check_schedule(values, args)
    check_chunks(values)
    return values


def check_default(name, value):
    """A value of sora.json or of an option must be of its row's kind and range."""
    if name not in DEFAULTS:
        raise ExportError(f"sora.json: {name!r} is none of {', '.join(DEFAULTS)}")
    row = DEFAULTS[name]
    kinds = {int: (int,), float: (int, float), str: (str, int) if name == "fps" else (str,), bool: (bool,),
             list: (list,)}[row.kind]
    if type(value) not in kinds:
        raise ExportError(f"{name} is {value!r}, expected {EXPECTED[row.kind]}")
    if row.kind is list:
        check_list(name, value, *row.allowed)
        return
    if row.kind is str and not is_text(value):
        raise ExportError(f"{name} is {value!r}, expected UTF-8 without a character 0")
    if row.allowed and row.kind is str and value not in row.allowed:
        raise ExportError(f"{name} is {value!r}, expected one of {', '.join(row.allowed)}")
    if row.allowed and row.kind is not str and not row.allowed[0] <= value <= row.allowed[1]:
        raise ExportError("{} is {!r}, expected {:g} to {:g}".format(name, value, *row.allowed))


def check_list(name, values, lowest, highest):
    """A list of times or noise levels falls."""
    if not values or any(type(v) not in (int, float) or not lowest < v <= highest for v in values) or \
            any(a <= b for a, b in zip(values, values[1:])):
        raise ExportError(f"{name} is {values!r}, expected numbers that fall, each above {lowest} and at most {highest}")


def check_schedule(values, args):
    """A fixed list and its rule need each other; the number of steps is its length."""
    fixed = values.get("rule", "multistep") != "multistep"
    if fixed != ("timesteps" in values):
        raise ExportError("a list of time steps goes with --rule renoise or --rule euler, and these with --timesteps or "
                          "--recipe")
    if not fixed:
        return
    if args.steps not in (None, len(values["timesteps"])):
        raise ExportError(f"--steps is {args.steps}, but the schedule is a list of {len(values['timesteps'])}")
    values["steps"] = len(values["timesteps"])
    for first in ("", "first_"):
        times, sigmas = values.get(f"{first}timesteps", []), values.get(f"{first}sigmas")
        if sigmas is not None and len(sigmas) != len(times):
            raise ExportError(f"{first}sigmas are {len(sigmas)}, but {first}timesteps {len(times)}")


def check_chunks(values):
    """What is said of chunks, window and sink must go together."""
    causal = [name for name, row in DEFAULTS.items() if row.key.startswith("causal.") and name in values]
    causal += ["first_timesteps"] if "first_timesteps" in values else []
    if causal and "chunk_frames" not in values:
        raise ExportError(f"{causal[0]} goes with chunk_frames (--chunk-frames)")
    window, sink = values.get("window", 0), values.get("sink", 0)
    if sink and not window:
        raise ExportError(f"sink is {sink}, but there is no window that it would be part of (--window)")
    if window and window < sink + values["chunk_frames"]:
        raise ExportError(f"window is {window}, expected 0 or at least {sink + values['chunk_frames']}: the sink of "
                          f"{sink} and a chunk of {values['chunk_frames']}")


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
        **{row.key: [float(v) for v in values[name]] if row.kind is list else row.kind(values[name])
           for name, row in DEFAULTS.items() if name in values and name != "fps"},
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
