"""EasyCache's rule around diffusers' transformer: a transcription of easycache_t2v_forward in H-EmbodVis/EasyCache's
EasyCache4Wan2.1/easycache_generate.py. Passes alternate between the branches of guidance; the first decides for both.
"""

from types import SimpleNamespace


def size(tensor):
    """What upstream calls a change or a norm."""
    return tensor.abs().mean()


def attach(transformer, threshold, steps, branches):
    """Replaces transformer.forward. Returns the rule's state: left_out says whether the last pass was left out."""
    forward = transformer.forward
    first, last = 10, steps - 1  # upstream's ret_steps and cutoff_steps, in steps instead of passes
    state = SimpleNamespace(passes=0, left_out=False, error=0.0, rate=None, before=None, x=None, out=None, residuals={})

    def decide(step, x):
        state.left_out = False
        if step < first or step >= last:
            state.error = 0.0
        elif state.rate is not None:
            state.error += state.rate * size(x - state.before) / size(state.out)
            state.left_out = bool(state.error < threshold)
            if not state.left_out:
                state.error = 0.0
        state.before = x

    def wrapped(hidden_states, *args, **kwargs):
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

    transformer.forward = wrapped
    return state
