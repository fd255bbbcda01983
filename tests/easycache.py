"""EasyCache's rule around diffusers' transformer: a transcription of easycache_forward in H-EmbodVis/EasyCache's
EasyCache4Wan2.1/easycache_generate.py. Passes alternate between the branches of guidance; the first decides for both.
Upstream has no rule for two experts: here, nothing is known of the one that takes over.
"""

from functools import partial
from types import SimpleNamespace


def size(tensor):
    """What upstream calls a change or a norm."""
    return tensor.abs().mean()


def attach(transformers, threshold, steps, branches):
    """Replaces the transformers' forward. Returns the rule's state; left_out: whether the last pass was left out."""
    first, last = 10, steps - 1  # upstream's ret_steps and cutoff_steps, in steps instead of passes
    state = SimpleNamespace(passes=0, left_out=False, error=0.0, rate=None, before=None, x=None, out=None,
                            residuals={}, serving=None)

    def decide(step, x):
        state.left_out = False
        if step < first or step >= last or state.rate is None:
            state.error = 0.0
        else:
            state.error += state.rate * size(x - state.before) / size(state.out)
            state.left_out = bool(state.error < threshold)
            if not state.left_out:
                state.error = 0.0
        state.before = x

    def run(transformer, forward, hidden_states, *args, **kwargs):
        if state.serving is not transformer:
            state.serving, state.rate, state.out = transformer, None, None
        step, branch = divmod(state.passes, branches)
        state.passes += 1
        x = hidden_states.clone()
        if branch == 0:
            decide(step, x)
        if state.left_out:
            return (x + state.residuals[branch],)
        out = forward(hidden_states, *args, **kwargs)[0]
        if branch == 0:
            if state.out is not None:
                state.rate = size(out - state.out) / size(x - state.x)
            state.x, state.out = x, out.clone()
        state.residuals[branch] = out - x
        return (out,)

    for transformer in transformers:
        transformer.forward = partial(run, transformer, transformer.forward)
    return state
