"""diffusers' three schedulers, configured for Wan, under sora's names."""

from diffusers import DPMSolverMultistepScheduler, FlowMatchEulerDiscreteScheduler, UniPCMultistepScheduler

NAMES = ("unipc", "euler", "dpm++")  # in the order of sora.h


def configure(name: str, shift: float):
    """A scheduler for WanPipeline. name: of NAMES."""
    if name == "euler":
        return FlowMatchEulerDiscreteScheduler(shift=shift)
    flow = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": shift, "solver_order": 2}
    if name == "unipc":
        return UniPCMultistepScheduler(**flow)
    return DPMSolverMultistepScheduler(algorithm_type="dpmsolver++", **flow)


def make(name: str, shift: float, steps: int):
    """A scheduler whose step() can be called."""
    scheduler = configure(name, shift)
    scheduler.set_timesteps(steps)
    scheduler.set_begin_index(0)
    return scheduler
