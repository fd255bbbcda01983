"""What every training stage needs: the Muon optimiser, averaged weights, checkpoints that a kill cannot tear, a log.

Muon (Keller Jordan, https://kellerjordan.github.io/posts/muon/) replaces each matrix's momentum by the nearest
orthogonal matrix before it steps, so every direction of the matrix learns at the same pace.  Vectors (biases, norms)
and embeddings take AdamW.
"""
import os
import pathlib
import time

import torch
import torch.distributed as dist


def orthogonalise(g):
    """The orthogonal factor of g [m, n], nearly: five Newton-Schulz steps in the coefficients of the Muon article."""
    a, b, c = 3.4445, -4.7750, 2.0315
    x = g.T if g.shape[0] > g.shape[1] else g
    x = x / (x.norm() + 1e-7)
    for _ in range(5):
        xx = x @ x.T
        x = a * x + (b * xx + c * xx @ xx) @ x
    return x.T if g.shape[0] > g.shape[1] else x


def sum_over_workers(tensors, scale=1.0):
    """Replaces each tensor by its sum over the worker processes, times scale; nothing to do for a single process."""
    if dist.is_initialized():
        flat = torch.cat([t.flatten() for t in tensors])
        dist.all_reduce(flat)
        for t, piece in zip(tensors, flat.mul_(scale).split([t.numel() for t in tensors])):
            t.copy_(piece.view_as(t))


class Muon(torch.optim.Optimizer):
    """Muon with Nesterov momentum for weights of two and more dimensions; convolutions count as [out, in * kernel].

    With several workers each orthogonalises its share of the matrices, and the updates are summed.
    """

    def __init__(self, params, lr, momentum=0.95):
        super().__init__(params, dict(lr=lr, momentum=momentum))

    @torch.no_grad()
    def step(self):
        rank, world_size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            updates = [self._update(p, group["momentum"], i % world_size == rank) for i, p in enumerate(params)]
            sum_over_workers(updates)
            for p, update in zip(params, updates):
                p.add_(update, alpha=-group["lr"])

    def _update(self, p, momentum, mine):
        state = self.state[p]
        if not state:
            state["momentum"] = torch.zeros_like(p)
        buffer = state["momentum"]
        buffer.lerp_(p.grad, 1 - momentum)
        if not mine:
            return torch.zeros_like(p)
        matrix = p.grad.lerp(buffer, momentum).flatten(1)
        rows, columns = matrix.shape
        return orthogonalise(matrix).view_as(p) * max(1, rows / columns) ** 0.5


# Parts of the names of tables, whose rows are looked up or added one by one: as matrices they mean nothing.
TABLES = ("embed_tokens", "shared", "relative_attention_bias", "scale_shift_table")


def is_matrix(name, p):
    """Whether parameter p is for Muon: at least two rows and two columns, counted as in Muon, and not a table."""
    return p.dim() > 1 and min(p.flatten(1).shape) > 1 and not any(table in name for table in TABLES)


def products(narrow):
    """The context in which matrices are multiplied: in bfloat16 if narrow, else in float32, whatever stood before."""
    return torch.autocast("cpu", torch.bfloat16, enabled=narrow)


def rate(step, steps, rise, falling):
    """Factor of the learning rate: up to 1 in `rise` steps, then linearly down over the last share `falling` of all."""
    return min(1, (step + 1) / rise, max((1 - step / steps) / falling, 1e-3))


class Optimisers:
    """Muon on the matrices and AdamW on the rest of some named parameters, stepped together.

    narrow: whether Muon's products are in bfloat16.
    """

    def __init__(self, named, muon_lr, adam_lr, narrow=False):
        named = [(n, p) for n, p in named if p.requires_grad]
        matrices = [p for n, p in named if is_matrix(n, p)]
        rest = [p for n, p in named if not is_matrix(n, p)]
        self.parts = [Muon(matrices, muon_lr),
                      torch.optim.AdamW(rest, adam_lr, betas=(0.9, 0.98), weight_decay=0.0, fused=True)]
        self.base, self.narrow = [muon_lr, adam_lr], narrow

    def step(self, factor=1.0):
        """One step with both learning rates times `factor`, then clears the gradients."""
        for part, lr in zip(self.parts, self.base):
            for group in part.param_groups:
                group["lr"] = lr * factor
            with products(self.narrow):
                part.step()
            part.zero_grad(set_to_none=True)

    def state_dict(self):
        return [part.state_dict() for part in self.parts]

    def load_state_dict(self, states):
        for part, state in zip(self.parts, states):
            part.load_state_dict(state)


class Average:
    """Exponential moving average of parameters, with a short memory at first: decay min(decay, (1 + n) / (10 + n))."""

    def __init__(self, module, decay):
        self.decay, self.count = decay, 0
        self.shadow = {n: p.detach().clone() for n, p in module.state_dict().items()}

    @torch.no_grad()
    def update(self, module):
        self.count += 1
        decay = min(self.decay, (1 + self.count) / (10 + self.count))
        state = module.state_dict()
        torch._foreach_lerp_(list(self.shadow.values()), [state[n] for n in self.shadow], 1 - decay)


def save_atomically(obj, path):
    """torch.save to a temporary name, then rename: a reader or a kill never meets half a file."""
    path = pathlib.Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    with open(temporary, "wb") as f:
        torch.save(obj, f)
        f.flush()
        os.fsync(f.fileno())
    os.replace(temporary, path)


class Log:
    """A tab-separated file, one line a call; the first call names the columns. The lines also go to standard output."""

    def __init__(self, path):
        self.path = pathlib.Path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)

    def write(self, **row):
        row = {"utc": time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime()), **row}
        values = [f"{v:.5g}" if isinstance(v, float) else str(v) for v in row.values()]
        with open(self.path, "a") as f:
            if f.tell() == 0:
                f.write("\t".join(row) + "\n")
            f.write("\t".join(values) + "\n")
        print(self.path.stem, *(f"{k}={v}" for k, v in zip(row, values)), flush=True)
