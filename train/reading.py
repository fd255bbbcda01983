"""The text encoder's first lesson: to read.

Before the transformer listens, the encoder learns from captions alone to say what is in the scene.  The state of a
colour word (every subject has one) must tell the shape, size, motion and role of the subject that it belongs to; the
mean of all states must tell the background and the relation.  It takes minutes, and the transformer then starts with
states in which "red" knows that it is the star that falls, instead of discovering words and pictures at the same time.
The heads that give the answers are thrown away.
"""
import time

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

import model
import world
from common import Log, Optimisers, rate, save_atomically

OF_SUBJECT = {"shape": list(world.SHAPES), "size": list(world.SIZES), "motion": [*world.MOTIONS, *world.RELATIONS],
              "role": [0, 1]}
OF_SCENE = {"background": list(world.BACKGROUNDS), "relation": [None, *world.RELATIONS]}


def colour_of_token(tokenizer):
    """[vocabulary]: the colour that a token names, as an index into world.COLOURS, else -1."""
    table = torch.full((len(tokenizer),), -1)
    for i, words in enumerate(world.COLOURS.values()):
        for word in words:
            table[tokenizer(word)[0]] = i
    return table


def subject_answers(scene):
    """{index of colour: indices of the right answers to OF_SUBJECT}."""
    colours = list(world.COLOURS)
    return {colours.index(s.colour): [OF_SUBJECT["shape"].index(s.shape), OF_SUBJECT["size"].index(s.size),
                                      OF_SUBJECT["motion"].index(s.motion), role]
            for role, s in enumerate(scene.subjects)}


class Reader(nn.Module):
    """Logits of all answers: for the subjects [colour words in the batch, answers], for the scene [B, answers]."""

    def __init__(self, encoder):
        super().__init__()
        self.encoder = encoder
        self.of_subject = nn.ModuleList(nn.Linear(model.TEXT_DIM, len(a)) for a in OF_SUBJECT.values())
        self.of_scene = nn.ModuleList(nn.Linear(model.TEXT_DIM, len(a)) for a in OF_SCENE.values())

    def forward(self, ids, mask, is_colour):
        states = self.encoder(input_ids=ids, attention_mask=mask).last_hidden_state
        weights = mask[..., None].float()
        mean = (states * weights).sum(1) / weights.sum(1)
        return [head(states[is_colour]) for head in self.of_subject] + [head(mean) for head in self.of_scene]


def captions(tokenizer, scenes, rng):
    """One caption of each scene as ids, none longer than model.TOKENS."""
    out = []
    for s in scenes:
        ids = tokenizer(world.caption(s, rng))
        while len(ids) > model.TOKENS:
            ids = tokenizer(world.caption(s, rng))
        out.append(ids)
    return out


def batch_at(step, seed, tokenizer, colours, batch):
    """(ids, mask, is_colour), each [batch, L], of a step, and the right answers to what Reader makes of them."""
    rng = np.random.default_rng([seed, step])
    scenes = [world.scene(seed, int(i)) for i in rng.integers(1 << 40, size=batch)]
    ids, mask = model.pad(captions(tokenizer, scenes, rng), model.TOKENS)
    colour, subjects = colours[ids], [subject_answers(s) for s in scenes]
    for row, answers in enumerate(subjects):  # a word that means nothing may begin with the piece "red"
        colour[row, ~torch.isin(colour[row], torch.tensor(list(answers)))] = -1
    places = (colour >= 0).nonzero().tolist()
    right = list(torch.tensor([subjects[row][int(colour[row, t])] for row, t in places]).T)
    right += [torch.tensor([a.index(getattr(s, name)) for s in scenes]) for name, a in OF_SCENE.items()]
    return ids, mask, colour >= 0, right


def train(out, tokenizer, steps, seed, batch=64):
    """{name: weight} of the encoder, the state dict of a model.new_text_encoder, without the heads.

    out: folder of the run; it is kept there in reading.ckpt, so that it is trained once, but a kill starts it anew.
    steps: of `batch` captions each. seed: of the world, and with the step of the batch and its captions.
    """
    path, log, start = out / "reading.ckpt", Log(out / "log" / "reading.tsv"), time.time()
    if path.exists():
        return torch.load(path, weights_only=True)
    torch.manual_seed(seed)
    reader, colours = Reader(model.new_text_encoder(len(tokenizer))), colour_of_token(tokenizer)
    optimisers = Optimisers(reader.named_parameters(), 0.01, 5e-3)
    names, right = [*OF_SUBJECT, *OF_SCENE], []
    for step in range(1, steps + 1):
        ids, mask, is_colour, wanted = batch_at(step, seed, tokenizer, colours, batch)
        logits = reader(ids, mask, is_colour)
        loss = sum(F.cross_entropy(x, w) for x, w in zip(logits, wanted))
        loss.backward()
        optimisers.set_factor(rate(step - 1, steps, 100, 0.25))
        optimisers.step()
        right.append([float((x.argmax(1) == w).float().mean()) for x, w in zip(logits, wanted)])
        if step % 100 == 0:
            shares = dict(zip(names, np.mean(right, 0).tolist()))
            log.write(step=step, seconds=time.time() - start, loss=loss.item(), **shares)
            right = []
    state = reader.encoder.state_dict()
    save_atomically(state, path)
    return state
