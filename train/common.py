"""What every training stage needs: the Muon optimiser, averaged weights, checkpoints that a kill cannot
tear, a log.

Muon (Keller Jordan, https://kellerjordan.github.io/posts/muon/) replaces each matrix's momentum by the nearest
orthogonal matrix before it steps, so every direction of the matrix learns at the same pace.  Vectors (biases, norms)
and embeddings take AdamW.
"""
import contextlib
import os
import pathlib
import time

import torch


def orthogonalise(g):
    """The orthogonal factors of g [..., m, n], nearly: five Newton-Schulz steps in the Muon article's coefficients."""
    a, b, c = 3.4445, -4.7750, 2.0315
    x = g.mT if g.shape[-2] > g.shape[-1] else g
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(5):
        xx = x @ x.mT
        x = a * x + (b * xx + c * xx @ xx) @ x
    return x.mT if g.shape[-2] > g.shape[-1] else x


class Muon(torch.optim.Optimizer):
    """Muon with Nesterov momentum for weights of two and more dimensions; convolutions count as [out, in * kernel].

    Matrices of one shape are orthogonalised together.
    """

    def __init__(self, params, lr, momentum=0.95):
        super().__init__(params, dict(lr=lr, momentum=momentum))

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            for p in params:
                self._momentum(p).lerp_(p.grad, 1 - group["momentum"])
            for same in self._by_shape(params):
                for p, update in zip(same, self._updates(same, group["momentum"])):
                    p.sub_(update * group["lr"])

    def _momentum(self, p):
        state = self.state[p]
        if not state:
            state["momentum"] = torch.zeros_like(p)
        return state["momentum"]

    def _updates(self, same, momentum):
        """What parameters of one shape step along: Nesterov's look-ahead, orthogonalised."""
        gradients = torch.stack([p.grad.lerp(self._momentum(p), momentum).flatten(1) for p in same])
        scale = max(1, gradients.shape[1] / gradients.shape[2]) ** 0.5
        return [matrix.view_as(p) * scale for p, matrix in zip(same, orthogonalise(gradients))]

    @staticmethod
    def _by_shape(params):
        shapes = {}
        for p in params:
            shapes.setdefault(p.flatten(1).shape, []).append(p)
        return shapes.values()


# Parts of the names of tables, whose rows are looked up or added one by one: as matrices they mean nothing.
TABLES = ("embed_tokens", "shared", "relative_attention_bias", "scale_shift_table")


def is_matrix(name, p):
    """Whether parameter p is for Muon: at least two rows and two columns, counted as in Muon, and not a table."""
    return p.dim() > 1 and min(p.flatten(1).shape) > 1 and not any(table in name for table in TABLES)


def products(narrow, device="cpu"):
    """The context in which matrices are multiplied: in bfloat16 if narrow, else in float32, whatever stood before."""
    return torch.autocast(device, torch.bfloat16, enabled=narrow)


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
        self.device, self.narrow, self.base = rest[0].device.type, narrow, [muon_lr, adam_lr]
        self.parts = [Muon(matrices, muon_lr),
                      torch.optim.AdamW(rest, adam_lr, betas=(0.9, 0.98), weight_decay=0.0, fused=True)]

    def set_factor(self, factor):
        """The next steps are with both learning rates times `factor`."""
        for part, lr in zip(self.parts, self.base):
            for group in part.param_groups:
                group["lr"] = lr * factor

    def step(self):
        """One step, then clears the gradients."""
        for part in self.parts:
            with products(self.narrow, self.device):
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


@contextlib.contextmanager
def replacing(path):
    """The path of a new file or folder beside `path`, which takes its place at the end of the block: no reader and no
    kill meets half of one."""
    path = pathlib.Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    new = path.with_stem(path.stem + ".new")
    yield new
    os.replace(new, path)


def save_atomically(obj, path):
    """torch.save, as replacing() does it; the file is on the disk before it gets its name."""
    with replacing(path) as new, open(new, "wb") as f:
        torch.save(obj, f)
        f.flush()
        os.fsync(f.fileno())


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
