"""Defaults: the settings that sora uses when it gets no option for them, stored as keys of the weight file.

The table DEFAULTS lists them. Each row is a name in sora.json, a key of the weight file and, if it has a help text, an
option of export.py. A value comes from the last of these sources that states it:

    1. the table
    2. the release, recognised by the transformer's sizes
    3. scheduler_config.json and model_index.json, except a shift other than the release's
    4. the transformer's config.json (chunks of causal models)
    5. the weight file that is converted again
    6. sora.json beside the checkpoint
    7. the recipe, and the schedule in --timesteps
    8. options of export.py
"""

from dataclasses import dataclass
from fractions import Fraction

from export.files import ExportError, read_json, reading
from export.recipes import RECIPES, falls, schedule

# wan/configs/shared_config.py: sample_neg_prompt, part of the released models' configuration.
NEGATIVE_PROMPT = ("色调艳丽，过曝，静态，细节模糊不清，字幕，风格，作品，画作，画面，静止，整体发灰，最差质量，"
                   "低质量，JPEG压缩残留，丑陋的，残缺的，多余的手指，画得不好的手部，画得不好的脸部，畸形的，毁容的，"
                   "形态畸形的肢体，手指融合，静止不动的画面，杂乱的背景，三条腿，背景人很多，倒着走")
RELEASED = {  # (dim, num_layers, model type, number of experts): its settings, from the original configuration
    (1536, 30, "t2v", 1): {"name": "Wan2.1-T2V-1.3B"},
    (5120, 40, "t2v", 1): {"name": "Wan2.1-T2V-14B"},
    (3072, 30, "ti2v", 1): {"name": "Wan2.2-TI2V-5B", "width": 1280, "height": 704, "frames": 121, "fps": "24",
                            "steps": 50, "guidance": 5.0, "shift": 5.0},
    (5120, 40, "t2v", 2): {"name": "Wan2.2-T2V-A14B", "steps": 40, "guidance": 4.0, "guidance_2": 3.0, "shift": 12.0},
    (5120, 40, "i2v", 2): {"name": "Wan2.2-I2V-A14B", "steps": 40, "guidance": 3.5, "guidance_2": 3.5, "shift": 5.0},
}
BOUNDARIES = {"t2v": 0.875, "i2v": 0.9}  # of the releases with two experts, {model type: noise level}

# {class of diffusers: (sora's name, the configuration's key of the shift, the settings that sora implements)}
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
OTHERWISE_ELSE = ("prediction_type", "use_flow_sigmas")  # diffusers' defaults are other values, so they must be stated

MAX_RATE = 1000000  # of either side of fps
EXPECTED = {int: "a number", float: "a number", str: "a text", bool: "true or false", list: "a list of numbers"}


@dataclass(frozen=True)
class Default:
    """A row of the table. Where value is None and no source states one, the key is not written, and sora chooses."""
    key: str             # in the weight file; fps has two, its numerator and denominator
    kind: type           # of its values: int, float, str, bool or list of floats
    value: object        # when no source states one
    allowed: tuple = ()  # (lowest, highest) of a number or of each in a list, or the choices of a text; () allows any
    help: str = ""       # of its option; without it there is none


# The values are those of diffusers' WanPipeline, with the shift that its documentation gives for 480 lines: sora's
# samplers are diffusers', and both layouts of a model must give the same file. The original repository's generate.py
# takes shift 5; its README recommends 8 to 12 for the 1.3B model, with guidance scale 6.
DEFAULTS = {
    "name": Default("general.name", str, "Wan", help="the model's name"),
    "width": Default("default.width", int, 832, (1, 16384), "width of the clip in pixels"),
    "height": Default("default.height", int, 480, (1, 16384), "height of the clip in pixels"),
    "frames": Default("default.frames", int, 81, (1, 1000001), "frames of the clip"),
    "fps": Default("default.fps", str, "16", help="frames per second, N or N:D"),
    "steps": Default("default.steps", int, 50, (1, 1000), "denoising steps"),
    "guidance": Default("default.guidance", float, 5.0, (0, 1000), "classifier-free guidance scale"),
    "guidance_2": Default("default.guidance_2", float, None, (0, 1000), "guidance scale of the second expert"),
    "negative_prompt": Default("default.negative_prompt", str, "", help="negative prompt"),
    "precision": Default("default.precision", str, None, ("f32", "bf16", "int8"), "arithmetic of the large products"),
    "sampler": Default("scheduler.sampler", str, "unipc", tuple(name for name, _, _ in SCHEDULERS.values()),
                       "sampler"),
    "shift": Default("scheduler.shift", float, 3.0, (1e-3, 1000), "time shift of the noise schedule"),
    "boundary": Default("scheduler.boundary", float, None, (0, 1),
                        "noise level, 0 to 1, from which on the first expert serves; below it the second"),
    "rule": Default("scheduler.rule", str, None, ("multistep", "renoise", "euler"),
                    "how a step computes the next latents"),
    "timesteps": Default("scheduler.timesteps", list, None, (0, 1000)),  # what the transformer gets
    "sigmas": Default("scheduler.sigmas", list, None, (0, 1)),
    "first_timesteps": Default("scheduler.first_timesteps", list, None, (0, 1000)),
    "first_sigmas": Default("scheduler.first_sigmas", list, None, (0, 1)),
    "noise_scale": Default("scheduler.noise_scale", float, None, (1e-3, 10)),
    "noise_frames_first": Default("scheduler.noise_frames_first", bool, None),
    "chunk_frames": Default("causal.chunk_frames", int, None, (1, 4096), "latent frames that are generated at once"),
    "independent_first_frame": Default("causal.independent_first_frame", bool, None),
    "window": Default("causal.window", int, None, (0, 1000000), "latent frames that attention sees; 0: all"),
    "sink": Default("causal.sink", int, None, (0, 1000000), "first latent frames that attention always sees"),
    "positions": Default("causal.positions", str, None, ("absolute", "relative"), "positions of latent frames in time"),
    "context_noise": Default("causal.context_noise", float, None, (0, 1000),
                             "time step of the pass that fills the cache"),
    "prompt_change": Default("causal.prompt_change", str, None, ("keep", "recache", "flush")),
    "recache_sink": Default("causal.recache_sink", bool, None),
}
OF_A_LIST = ("timesteps", "sigmas", "first_timesteps", "first_sigmas", "noise_scale", "noise_frames_first")

# {key in the config.json of causal transformers: name of the default}
CAUSAL_CONFIG = {"num_frame_per_block": "chunk_frames", "num_frames_per_block": "chunk_frames", "sink_size": "sink",
                 "local_attn_size": "window", "independent_first_frame": "independent_first_frame"}


def option_of(name):
    """The option of export.py for a default."""
    return "--negative" if name == "negative_prompt" else "--" + name.replace("_", "-")


def scheduler_defaults(path):
    """{name: value} of sampler and shift in a scheduler_config.json. Raises ExportError for a class or a setting that
    sora does not implement."""
    config = read_json(path)
    if config.get("_class_name") == "SelfForcingFlowMatchScheduler":  # its time steps are a recipe's
        return {}
    if config.get("_class_name") not in SCHEDULERS:
        raise ExportError(f"{path}: _class_name is {config.get('_class_name')}, expected one of "
                          f"{', '.join(SCHEDULERS)}")
    sampler, shift, settings = SCHEDULERS[config["_class_name"]]
    for key, value in {**ALL_SCHEDULERS, **settings}.items():
        found = config.get(key, None if key in OTHERWISE_ELSE else value)
        if found != value:
            raise ExportError(f"{path}: {key} is {found!r}, expected {value!r}")
    return {"sampler": sampler, "shift": float(config.get(shift, 1.0))}


def keys_defaults(keys):
    """{name: value} of the defaults in a weight file. keys: the file's."""
    values = {name: keys[row.key] for name, row in DEFAULTS.items() if row.key in keys}
    if "default.fps_num" in keys:
        values["fps"] = f"{keys['default.fps_num']}:{keys['default.fps_den']}"
    return values


def causal_defaults(config):
    """{name: value} of the chunks in a transformer's config.json, where -1 means no window; {} for other models."""
    stated = {name: config[key] for key, name in CAUSAL_CONFIG.items() if config.get(key) not in (None, -1)}
    return stated if "chunk_frames" in stated or stated.get("window") else {}


def checkpoint_defaults(sources, transformer):
    """{name: value} of what the release and the files of a diffusers folder state. Where they disagree, there is a note
    in transformer.notes: diffusers' converter writes another shift for Wan 2.2 A14B than the release uses."""
    sizes, experts = transformer.sizes, 1 + bool(sources.transformer_2)
    released = RELEASED.get((sizes["dim"], sizes["num_layers"], sizes["model_type"], experts), {})
    values = {"negative_prompt": NEGATIVE_PROMPT} | released if released else {}
    if experts > 1 and sizes["model_type"] in BOUNDARIES:
        values["boundary"] = BOUNDARIES[sizes["model_type"]]
    if sources.scheduler:
        with reading(sources.scheduler):
            values |= scheduler_defaults(sources.scheduler)
    if sources.boundary is not None and experts > 1:
        values["boundary"] = sources.boundary
    if values.get("shift") != released.get("shift", values.get("shift")):
        transformer.notes.append(f"{sources.scheduler}: the shift is {values['shift']:g}, the release's is "
                                 f"{released['shift']:g}, which is used; "
                                 f"--shift {values['shift']:g} for diffusers' clips")
        values["shift"] = released["shift"]
    return values


def run_defaults(args, sources, recipe, transformer, vae):
    """{name: value} of every default, from all sources. args: of the command line; recipe: of recipes.py, or None;
    transformer, vae: parts. Raises ExportError for a value that is not allowed or does not fit the others."""
    values = {name: row.value for name, row in DEFAULTS.items() if row.value is not None}
    values.update(checkpoint_defaults(sources, transformer))
    values.update(causal_defaults(transformer.config))
    if sources.own:
        values.update(keys_defaults(sources.own.keys))
    settings = read_json(sources.settings) if sources.settings else {}
    values.update(settings)
    options = {name: getattr(args, name) for name, row in DEFAULTS.items() if row.help}
    options = {name: value for name, value in options.items() if value is not None}
    shift = {**values, **(recipe.defaults if recipe else {}), **options}["shift"]
    planned = schedule(args, recipe, shift)
    if planned or args.rule == "multistep":  # the former schedule's lists do not belong to this one
        values = {name: value for name, value in values.items() if name not in OF_A_LIST}
    chosen = planned | (recipe.defaults if recipe else {}) | options
    if "guidance" in chosen:
        values.pop("guidance_2", None)  # it is that of both experts, unless the other is given, too
    values |= chosen
    where = {name: f"{sources.settings}: {name}" for name in settings} | {name: option_of(name) for name in options}
    for name, value in values.items():
        check_default(where.get(name, name), name, value)
    if transformer.signs and "timesteps" not in values and args.rule != "multistep":
        raise ExportError(f"{transformer.path}: {transformer.signs[0]}: such weights were trained for one schedule "
                          f"and do not state it; expected --recipe {'|'.join(RECIPES)}, or --timesteps and --rule")
    check_clip(where, values, transformer.sizes, vae.sizes)
    check_schedule(values, args)
    check_chunks(values)
    check_experts(values, bool(sources.transformer_2))
    return values


def check_default(where, name, value):
    """Raises ExportError unless a value is of its row's kind and range. where: the option or file that states it."""
    if name not in DEFAULTS:
        raise ExportError(f"{where}: unknown setting, expected one of {', '.join(DEFAULTS)}")
    row = DEFAULTS[name]
    kinds = {int: (int,), float: (int, float), str: (str, int) if name == "fps" else (str,), bool: (bool,),
             list: (list,)}[row.kind]
    if type(value) not in kinds:
        raise ExportError(f"{where} is {value!r}, expected {EXPECTED[row.kind]}")
    if row.kind is list:
        if not falls(value, *row.allowed):
            raise ExportError("{} is {!r}, expected numbers that fall, each above {} and at most {}".format(
                where, value, *row.allowed))
        return
    if row.kind is str and not is_text(value):
        raise ExportError(f"{where} is {value!r}, expected UTF-8 without a character 0")
    if row.allowed and row.kind is str and value not in row.allowed:
        raise ExportError(f"{where} is {value!r}, expected one of {', '.join(row.allowed)}")
    if row.allowed and row.kind is not str and not row.allowed[0] <= value <= row.allowed[1]:
        raise ExportError("{} is {!r}, expected {:g} to {:g}".format(where, value, *row.allowed))


def check_schedule(values, args):
    """Raises ExportError unless rule and list of time steps fit. Sets the number of steps to the list's length."""
    rule = values.get("rule", "multistep")
    fixed = rule != "multistep"
    if fixed and "timesteps" not in values:
        raise ExportError(f"--rule is {rule}, but there is no list of time steps, expected --timesteps or --recipe, "
                          "too")
    if not fixed and "timesteps" in values:
        raise ExportError(f"the rule is {rule}, expected --rule renoise or --rule euler for a list of time steps")
    if not fixed:
        return
    if args.steps not in (None, len(values["timesteps"])):
        raise ExportError(f"--steps is {args.steps}, expected {len(values['timesteps'])}, the length of the schedule")
    values["steps"] = len(values["timesteps"])
    for first in ("", "first_"):
        times, sigmas = values.get(f"{first}timesteps", []), values.get(f"{first}sigmas")
        if sigmas is not None and len(sigmas) != len(times):
            raise ExportError(f"{first}sigmas has {len(sigmas)} numbers, expected {len(times)} as {first}timesteps")


def check_chunks(values):
    """Raises ExportError unless chunk, window and sink fit."""
    causal = [name for name, row in DEFAULTS.items() if row.key.startswith("causal.") and name in values]
    causal += ["first_timesteps"] if "first_timesteps" in values else []
    if causal and "chunk_frames" not in values:
        raise ExportError(f"{option_of(causal[0])} is given, expected --chunk-frames, too")
    window, sink = values.get("window", 0), values.get("sink", 0)
    if sink and not window:
        raise ExportError(f"--sink is {sink}, but there is no window, expected --window, too")
    if window and window < sink + values["chunk_frames"]:
        raise ExportError(f"--window is {window}, expected 0 or at least {sink + values['chunk_frames']}: the sink of "
                          f"{sink} and a chunk of {values['chunk_frames']}")


def check_experts(values, two):
    """Raises ExportError unless a model of two experts, and no other, has a boundary between them."""
    if two and "boundary" not in values:
        raise ExportError("two experts, but no boundary between them is known, expected --boundary, such as 0.875")
    if two and "chunk_frames" in values:
        raise ExportError("two experts that generate in chunks cannot be run yet")
    for name in ("boundary", "guidance_2"):
        if not two and name in values:
            raise ExportError(f"{option_of(name)} is given, but there is one transformer, "
                              "expected --transformer-2, too")


def is_text(value):
    """Whether a text is UTF-8 without a character 0. Arguments and JSON may hold lone surrogates."""
    try:
        return b"\0" not in str(value).encode()
    except UnicodeEncodeError:
        return False


def check_clip(where, values, transformer, vae):
    """Raises ExportError unless the model can make this width, height and number of frames. transformer, vae: sizes."""
    levels, patch = vae["temperal_downsample"], transformer["patch_size"]
    space, time = vae["patch_size"] << len(levels), 1 << sum(levels)
    for key, multiple in (("height", space * patch[1]), ("width", space * patch[2])):
        if values[key] % multiple:
            raise ExportError(f"{where.get(key, key)} is {values[key]}, expected a multiple of {multiple}")
    if (values["frames"] - 1) % time:
        raise ExportError(f"{where.get('frames', 'frames')} is {values['frames']}, expected {time}k+1")


def default_keys(values):
    """{key of the weight file: value}; a float becomes f64, since diffusers computes with Python's floats."""
    rate = parse_rate(values["fps"])
    return {
        **{row.key: [float(v) for v in values[name]] if row.kind is list else row.kind(values[name])
           for name, row in DEFAULTS.items() if name in values and name != "fps"},
        "default.fps_num": rate.numerator,
        "default.fps_den": rate.denominator,
        "scheduler.num_train_timesteps": 1000,
    }


def parse_rate(text):
    """The frame rate of a text N or N:D as a Fraction. Raises ExportError for another text."""
    try:
        rate = Fraction(str(text).replace(":", "/"))
    except (ValueError, ZeroDivisionError):
        rate = Fraction(0)
    if not 0 < rate.numerator <= MAX_RATE >= rate.denominator:
        raise ExportError(f"fps is {text!r}, expected N or N:D of at most {MAX_RATE}")
    return rate
