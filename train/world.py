"""The world of the bundled model: what may happen in a clip, and how people may say it.

    (seed, index) -> Scene -> caption (here)
                           -> pixels  (draw.py)
    (seed, index) -> Story: Scenes at times -> captions at times, pixels without an end

A Scene is the one record from which both the sentence and the pixels are made, so what the sentence asks for is what
the clip shows, and following a prompt can be measured (detect.py reads the record back from pixels).  Nothing that the
sentence leaves open is left to chance except a little position and light: no background named means the plain one, no
size named means medium, no colour named means red.  That keeps the answer to a prompt narrow enough for a model of a
few million weights.

About one in seven of the combinations shape x colour x motion is held out: a fixed hash decides, training never draws
them, and they are the test of whether the model composes what it learned or remembers whole sentences.
"""
import dataclasses
import zlib

import numpy as np

SIZE, FRAMES = 96, 33  # of every two-second clip: pixels a side, and frames
CHUNK = 4  # latent frames, a second of film; a sentence of a story begins where a chunk does
CROWD = 3  # subjects at a time, at most
WORDS = 23  # of a story's sentence, at most; punctuation marks count
KINDS = "single", "pair", "relation"  # one subject, two that move on their own, two that do something together
TRIO = "trio"  # three that move on their own
SHAPES = {
    "circle": ["circle", "circle", "disc", "ball"],
    "square": ["square", "square", "box", "block"],
    "triangle": ["triangle"],
    "star": ["star"],
    "heart": ["heart"],
    "cross": ["cross", "cross", "plus sign"],
    "character": ["character", "character", "creature", "figure", "fellow", "person"],
}
COLOURS = {
    "red": ["red", "red", "red", "crimson", "scarlet"],
    "orange": ["orange", "orange", "orange", "tangerine"],
    "yellow": ["yellow", "yellow", "yellow", "golden"],
    "green": ["green", "green", "green", "emerald"],
    "blue": ["blue", "blue", "blue", "azure"],
    "purple": ["purple", "purple", "purple", "violet"],
    "pink": ["pink", "pink", "pink", "rose"],
    "white": ["white", "white", "white", "ivory"],
}
SIZES = {"small": ["small", "small", "tiny", "little"], "medium": [], "large": ["large", "big", "big", "huge", "giant"]}
BACKGROUNDS = {
    "plain": ["on a plain background", "on a blank background", "in front of a plain wall"],
    "night": ["at night", "at night", "under the stars", "on a starry night", "beneath the stars", "in the dark",
              "under the starry sky"],
    "meadow": ["on the grass", "on the grass", "in a meadow", "in the meadow", "in a field", "in the park",
               "on a lawn"],
    "sunset": ["at sunset", "at sunset", "at dusk", "in the evening", "as the sun sets", "under the setting sun"],
    "sea": ["under water", "underwater", "in the sea", "in the ocean", "beneath the waves", "at the bottom of the sea"],
    "snow": ["in the snow", "in the snow", "on the snow", "in winter", "on a snowy day", "while it snows"],
    "desert": ["in the desert", "in the desert", "on the sand", "among the dunes", "in the dunes"],
}
_GO = [("moves", "moving"), ("moves", "moving"), ("goes", "going"), ("slides", "sliding"), ("glides", "gliding"),
       ("travels", "traveling"), ("floats", "floating"), ("flies", "flying")]
_WALK = [("walks", "walking"), ("walks", "walking"), ("strolls", "strolling"), ("marches", "marching")]
_RUN = [("runs", "running"), ("runs", "running"), ("sprints", "sprinting"), ("dashes", "dashing"), ("races", "racing")]
_SIDE = {"left": ["left", "to the left", "leftward", "from right to left", "toward the left"],
         "right": ["right", "to the right", "rightward", "from left to right", "toward the right"]}


def _phrases(verbs, tails):
    """Every verb (third person, participle) with every tail: [("moves left", "moving left"), ...]."""
    return [(f"{third} {tail}".strip(), f"{participle} {tail}".strip())
            for third, participle in verbs for tail in tails]


MOTIONS = {
    "left": _phrases(_GO, _SIDE["left"]),
    "right": _phrases(_GO, _SIDE["right"]),
    "up": _phrases([("moves", "moving"), ("goes", "going"), ("flies", "flying"), ("floats", "floating")],
                   ["up", "upward", "up to the top"])
          + [("rises", "rising"), ("rises", "rising"), ("ascends", "ascending")],
    "down": _phrases([("moves", "moving"), ("goes", "going"), ("glides", "gliding"), ("floats", "floating")],
                     ["down", "downward"]) + [("sinks", "sinking"), ("sinks", "sinking"), ("descends", "descending")],
    "fall": _phrases([("falls", "falling"), ("falls", "falling"), ("drops", "dropping")],
                     ["", "", "to the ground", "down", "to the floor"]) + [("plunges", "plunging")],
    "bounce": _phrases([("bounces", "bouncing")], ["", "", "", "up and down", "on the ground", "like a ball"]),
    "jump": _phrases([("jumps", "jumping"), ("jumps", "jumping"), ("hops", "hopping"), ("leaps", "leaping")],
                     ["", "", "up", "in the air", "twice"]),
    "spin": _phrases([("spins", "spinning"), ("spins", "spinning"), ("rotates", "rotating"), ("twirls", "twirling"),
                      ("turns", "turning")], ["around", "in place"]) + [("spins", "spinning"), ("rotates", "rotating")],
    "grow": [("grows", "growing"), ("grows", "growing"), ("gets bigger", "getting bigger"),
             ("becomes larger", "becoming larger"), ("swells", "swelling"), ("expands", "expanding")],
    "shrink": [("shrinks", "shrinking"), ("shrinks", "shrinking"), ("gets smaller", "getting smaller"),
               ("becomes smaller", "becoming smaller"), ("contracts", "contracting")],
    "loop": [("moves in a circle", "moving in a circle"), ("moves in circles", "moving in circles"),
             ("goes round and round", "going round and round"), ("goes in circles", "going in circles"),
             ("flies in a circle", "flying in a circle"), ("circles", "circling")],
    "shake": [("shakes", "shaking"), ("shakes", "shaking"), ("trembles", "trembling"), ("shivers", "shivering"),
              ("wobbles", "wobbling"), ("vibrates", "vibrating")],
    "still": [("stands still", "standing still"), ("stands still", "standing still"), ("stays still", "staying still"),
              ("does not move", "not moving"), ("rests", "resting"), ("waits", "waiting"), ("stands", "standing")],
    "walk left": _phrases(_WALK, _SIDE["left"]),
    "walk right": _phrases(_WALK, _SIDE["right"] + ["", ""]),
    "run left": _phrases(_RUN, _SIDE["left"]),
    "run right": _phrases(_RUN, _SIDE["right"] + ["", ""]),
}
_GOES = [("moves away", "moving away"), ("goes away", "going away")]  # of subjects that leave
PAIR_MOTIONS = ["up", "down", "fall", "bounce", "jump", "spin", "grow", "shrink", "shake", "still"]
RELATIONS = {
    "orbit": ["{A} orbits {B}", "{A} circles around {B}", "{A} goes around {B}", "{A} revolves around {B}",
              "{A} moves in a circle around {B}", "{A} orbiting {B}", "{A} flies around {B}"],
    "meet": ["{A} and {B} meet", "{A} meets {B}", "{A} and {B} come together", "{A} and {B} meet in the middle",
             "{A} and {B} move toward each other and meet", "{A} and {B} meeting"],
    "jump together": ["{A} and {B} jump together", "{A} jumps together with {B}", "{A} and {B} hop together",
                      "{A} and {B} jump side by side", "{A} and {B} jumping together", "{A} and {B} jump"],
    "chase": ["{A} chases {B}", "{A} runs after {B}", "{A} follows {B}", "{B} is chased by {A}", "{A} chasing {B}",
              "{A} pursues {B}", "{B} runs away from {A}"],
    "pass": ["{A} passes in front of {B}", "{A} moves in front of {B}", "{A} passing in front of {B}",
             "{A} crosses in front of {B}", "{A} goes past {B}"],
    "collide": ["{A} and {B} collide", "{A} bumps into {B}", "{A} crashes into {B}", "{A} hits {B}",
                "{A} and {B} crash into each other", "{A} and {B} bounce off each other", "{A} and {B} colliding"],
}
# {background, shape, size, motion, relation or change: how often the clips of the VAE and the transformer show it}; what
# is not here they show once, or as CHANGES says. It is what is learned last.
LEARNED_LAST = {"night": 2.5, "character": 3, "star": 3.5, "cross": 3.5, "triangle": 1.5, "small": 2,
                "large": 1.5, "loop": 3, "jump": 3, "spin": 2, "walk left": 2.5, "walk right": 2.5, "run left": 4,
                "run right": 4, "bounce": 2.5, "shake": 1.5, "orbit": 3, "jump together": 2.5, "enter": 12,
                "leave": 3, "relation": 8}
_KIND_WORDS = ["nice", "happy", "cute", "pretty", "lovely", "funny", "bright", "shiny"]
_ADVERBS = ["now", "here", "again", "happily", "gently", "today", "all alone"]
_OPENINGS = ["a video of", "a clip of", "an animation of", "a short film of", "a cartoon of", "we see", "there is",
             "watch"]


@dataclasses.dataclass(frozen=True)
class Subject:
    """One thing in a clip; motion is a key of MOTIONS, or of RELATIONS where the scene has a relation."""
    shape: str
    colour: str
    size: str
    motion: str
    enters: str = ""  # in a story, the side that its sentence names: "left" or "right"


@dataclasses.dataclass(frozen=True)
class Scene:
    """The record of one clip, or of a story from one sentence to the next.

    dx, dy: offset of the subjects in frame widths; light: brightness of the background.
    """
    background: str
    subjects: tuple
    relation: str | None
    dx: float
    dy: float
    light: float


@dataclasses.dataclass(frozen=True)
class Story:
    """Scenes, one after the other; the last has no end. starts: the latent frame at which each begins, the first 0.

    A scene says all that is to be seen while it lasts. A subject with the same colour in the next scene is the same one
    and goes on from where it is. New subjects come in, missing ones go out. The place changes by a cut.
    """
    scenes: tuple
    starts: tuple

    def at(self, frame):
        """The scene of a frame of pixels."""
        return [s for s, start in zip(self.scenes, self.starts) if first_frame(start) <= frame][-1]


def first_frame(latent):
    """The first frame of pixels that a latent frame stands for: latent frame 0 is one picture, each later one four."""
    return max(4 * latent - 3, 0)


def is_held_out(shape, colour, motion):
    """True for about one combination in seven, the same ones on every machine and in every version of Python."""
    action = motion.removesuffix(" together")  # jumping together is jumping
    return zlib.crc32(f"{shape}|{colour}|{action}".encode()) % 7 == 0


def _is_held_out(subject):
    return is_held_out(subject.shape, subject.colour, subject.motion)


def motions_of(shape):
    """The motions that a subject of this shape may have: only characters walk, and a spinning circle shows nothing."""
    if shape == "character":
        return [m for m in MOTIONS if m not in ("left", "right")]
    return [m for m in MOTIONS if not m.startswith(("walk", "run")) and (shape, m) != ("circle", "spin")]


def _motions_among(count):
    """The motions that one of so many subjects may have that each move on their own; three leave no room to grow."""
    return [m for m in (MOTIONS if count == 1 else PAIR_MOTIONS) if (count, m) != (CROWD, "grow")]


def _seem_related(scene):
    """Whether subjects that each jump on their own would look like the relation "jump together"."""
    return not scene.relation and [x.motion for x in scene.subjects].count("jump") > 1


def _choose(rng, names, weights):
    """One of the names, each as likely as its weight says; 1 where there is none."""
    p = np.array([weights.get(name, 1) for name in names], float)
    return str(rng.choice(names, p=p / p.sum()))


def _subject(rng, motions, sizes, weights):
    shape = _choose(rng, list(SHAPES), weights)
    motion = _choose(rng, [m for m in motions_of(shape) if m in motions], weights)
    size = "medium" if motion in ("grow", "shrink") else _choose(rng, sizes, weights)
    return Subject(shape, str(rng.choice(list(COLOURS))), size, motion)


def _try_scene(rng, kind, weights):
    """One scene of a kind (of KINDS, or TRIO), which may turn out to be held out."""
    background = _choose(rng, list(BACKGROUNDS), weights)
    relation, count = None, {"single": 1, TRIO: CROWD}.get(kind, 2)
    sizes = list(SIZES) if count == 1 else ["medium"]
    subjects = tuple(_subject(rng, _motions_among(count), sizes, weights) for _ in range(count))
    if kind == "relation":
        relation = _choose(rng, list(RELATIONS), weights)
        subjects = tuple(dataclasses.replace(s, motion=relation) for s in subjects)
    dx, dy = rng.uniform(-0.05, 0.05, 2)
    return Scene(background, subjects, relation, float(dx), float(dy), float(rng.uniform(0.96, 1.04)))


def scene(seed, index, kinds=KINDS, held_out=False, weights={}):
    """The scene number `index` of world `seed`: a pure function of its arguments.

    kinds: drawn from evenly. held_out: False never gives a scene with a held-out combination, True gives only scenes in
    which every subject is one. weights: as of LEARNED_LAST.
    """
    return _scene(np.random.default_rng([seed, index]), kinds, held_out, weights)


def _scene(rng, kinds, held_out, weights):
    """The next scene that a generator gives."""
    kind = str(rng.choice(kinds))
    while True:
        s = _try_scene(rng, kind, weights)
        distinct = len({subject.colour for subject in s.subjects}) == len(s.subjects)
        fits = all(_is_held_out(x) == held_out for x in s.subjects)
        if fits and distinct and not _seem_related(s):
            return s


# What is hardest to draw and to see: {shape, motion, relation: how often}, and colours that are dark like the outlines.
HARD = {**{name: 0 for name in (*SHAPES, *MOTIONS, *RELATIONS, "large")}, "medium": 1e-9, "star": 1, "cross": 1,
        "character": 1, "bounce": 1, "jump": 1, "spin": 1, "loop": 1, "shake": 1, "left": 1, "right": 1, "run left": 1,
        "run right": 1, "orbit": 1, "chase": 1, "pass": 1, "jump together": 1}
DARK = "green", "blue", "purple"


def hard_scene(seed, index, held_out=False):
    """The scene number `index` of those that are hard."""
    rng = np.random.default_rng([seed, index])
    while True:
        s = _scene(rng, KINDS, held_out, HARD)
        if all(x.colour in DARK for x in s.subjects):
            return s


def _noun_phrase(rng, subject, alone):
    """"a small red star", "the star that is red", "one big happy blue box" ...; if it is alone, perhaps "a star"."""
    noun, colour = rng.choice(SHAPES[subject.shape]), rng.choice(COLOURS[subject.colour])
    if alone and subject.colour == "red" and rng.random() < 0.3:
        colour = ""
    size = rng.choice(SIZES[subject.size]) if SIZES[subject.size] else ""
    kind = rng.choice(_KIND_WORDS) if rng.random() < 0.08 else ""
    if colour and rng.random() < 0.08:
        words = f"{kind} {noun} that is {size} and {colour}" if size else f"{kind} {noun} that is {colour}"
    else:
        words = f"{size} {kind} {colour} {noun}" if rng.random() < 0.9 else f"{kind} {colour} {size} {noun}"
    words = " ".join(words.split())
    article = rng.choice(["a", "a", "a", "the", "one", ""])
    if article == "a" and words[0] in "aeiou":
        article = "an"
    return f"{article} {words}".strip()


def _does(rng, subject):
    """What a subject does: (third person, participle)."""
    forms = MOTIONS[subject.motion]
    if subject.enters:
        verbs = ("walks", "walking") if subject.shape == "character" else ("moves", "moving")
        forms = _phrases([verbs], [f"in from the {subject.enters}"])
    return forms[rng.integers(len(forms))]


def _event(rng, s, gone):
    """What happens, without the place: (sentence, noun-phrase form), the second for use after "a video of"."""
    subjects = s.subjects + gone
    names = [_noun_phrase(rng, subject, len(subjects) == 1) for subject in subjects]
    if s.relation:
        text = str(rng.choice(RELATIONS[s.relation])).format(A=names[0], B=names[1])
        return text, text
    verbs = [_does(rng, subject) for subject in s.subjects] + [_GOES[rng.integers(len(_GOES))] for _ in gone]
    if rng.random() < 0.06:
        adverb = rng.choice(_ADVERBS)
        verbs = [(f"{third} {adverb}", f"{participle} {adverb}") for third, participle in verbs]
    joint = str(rng.choice([" and ", " while ", ", ", " and "]))
    third = joint.join(f"{n} {v[0]}" for n, v in zip(names, verbs))
    participle = joint.join(f"{n} {v[1]}" for n, v in zip(names, verbs))
    progressive = joint.join(f"{n} is {v[1]}" for n, v in zip(names, verbs))
    return (progressive if rng.random() < 0.2 else third), participle


def _junk(rng, text):
    """Puts a word that means nothing somewhere, so that the encoder learns to pass over what it does not know."""
    words = text.split()
    junk = "".join(rng.choice(list("abcdefghijklmnopqrstuvwxyz"), rng.integers(3, 8)))
    words.insert(rng.integers(len(words) + 1), junk)
    return " ".join(words)


def caption(s, rng, gone=()):
    """One of the many English sentences for scene `s`; `rng` (numpy Generator) chooses which.

    gone: subjects that are not in the scene, and leave as it begins.
    """
    event, noun_form = _event(rng, s, gone)
    named = s.background != "plain" or rng.random() < 0.1
    place = str(rng.choice(BACKGROUNDS[s.background])) if named else ""
    form = rng.random()
    if form < 0.45:
        text = f"{event} {place}"
    elif form < 0.65:
        text = f"{place}, {event}" if place else event
    elif form < 0.85:
        text = f"{rng.choice(_OPENINGS)} {noun_form} {place}"
    elif form < 0.93:
        text = f"{place} {noun_form}"
    else:
        text = f"{noun_form}, {place}" if place else noun_form
    if rng.random() < 0.04:
        text = _junk(rng, text)
    return " ".join(text.split()) + ("." if rng.random() < 0.3 else "")


# ---- stories -------------------------------------------------------------------------------------------------------

CHANGES = {"motion": 4, "relation": 3, "enter": 3, "leave": 1, "cut": 2}  # what a sentence brings, and how often
WALKS_IN = 0.4  # of the subjects that come stand still then; of these a sentence says from where they come
ONCE = "fall", "grow", "shrink"  # motions that come to an end
ALOFT = "up", "loop", "spin", "shake", "grow", "shrink"  # a subject that does one of these is in the air, and may fall


class _Teller:
    """Makes up the scenes of one story."""

    def __init__(self, rng, first, held_out, weights):
        self.rng, self.held_out, self.weights = rng, held_out, weights
        self.scenes = [first]
        self.bulk = {}  # colour: the last of "grow" and "shrink" that its subject did
        self._remember(first)

    def _remember(self, scene):
        self.bulk |= {x.colour: x.motion for x in scene.subjects if x.motion in ("grow", "shrink")}

    def _fits(self, subject):
        return _is_held_out(subject) == self.held_out

    def _motion(self, subject, count, new=False):
        """The subject with another motion, that it can have among `count` subjects; None if there is none."""
        grown = self.bulk.get(subject.colour)
        names = [m for m in motions_of(subject.shape)
                 if m not in (subject.motion, grown) and m in _motions_among(count)
                 and (m, subject.size) not in (("grow", "large"), ("shrink", "small"))
                 and (m != "fall" or new or subject.motion in ALOFT)]
        names = [m for m in names if self._fits(dataclasses.replace(subject, motion=m))]
        return dataclasses.replace(subject, motion=_choose(self.rng, names, self.weights), enters="") if names else None

    def _others(self, subjects, changed):
        """The subjects, those of the numbers `changed` with another motion."""
        return tuple(self._motion(x, len(subjects)) if i in changed else x for i, x in enumerate(subjects))

    def _stranger(self, subjects):
        """A subject of a new colour, that comes to these."""
        colour = self.rng.choice([c for c in COLOURS if c not in {x.colour for x in subjects} | set(self.bulk)])
        new = Subject(_choose(self.rng, list(SHAPES), self.weights), str(colour), "medium", "still")
        if self.rng.random() < WALKS_IN:
            return dataclasses.replace(new, enters=str(self.rng.choice(["left", "right"])))
        return self._motion(new, len(subjects) + 1, new=True)

    def _try(self, change):
        """What comes after the last scene, by one change; None in it, or None, where that change cannot be."""
        rng, last = self.rng, self.scenes[-1]
        old = tuple(dataclasses.replace(x, enters="") for x in last.subjects)
        count, everyone = len(old), range(len(old))
        plain = not any(x.colour in self.bulk for x in old)
        if change == "cut":
            place = _choose(rng, [b for b in BACKGROUNDS if b != last.background], self.weights)
            return dataclasses.replace(last, background=place, subjects=old)
        if change == "relation" and count == 2 and plain:
            relation = _choose(rng, [r for r in RELATIONS if r != last.relation], self.weights)
            order = [int(i) for i in rng.permutation(2)]
            return dataclasses.replace(last, relation=relation,
                                       subjects=tuple(dataclasses.replace(old[i], motion=relation) for i in order))
        # These get another motion: subjects of a relation that ends, and one that has no room for its own any more.
        must = {i for i in everyone if last.relation or count == 1 and old[i].motion not in PAIR_MOTIONS}
        if change == "enter" and count < CROWD and plain and (count > 1 or old[0].size == "small"):
            subjects = tuple(self._motion(x, count + 1) if i in must else x for i, x in enumerate(old))
            new = self._stranger(old)
            subjects = (new, *subjects) if new and new.enters == "left" else (*subjects, new)
            return dataclasses.replace(last, subjects=subjects, relation=None)
        if change == "leave" and count > 1:
            gone = int(rng.integers(count))
            rest, must = old[:gone] + old[gone + 1:], set(range(count - 1)) if last.relation else set()
            return dataclasses.replace(last, subjects=self._others(rest, must), relation=None)
        if change == "motion":
            changed = set(everyone) if last.relation else {int(rng.integers(count))}
            return dataclasses.replace(last, subjects=self._others(old, changed), relation=None)
        return None

    def go_on(self):
        """Adds one scene."""
        while True:
            scene = self._try(_choose(self.rng, list(CHANGES), CHANGES | self.weights))
            if scene and None not in scene.subjects and all(map(self._fits, scene.subjects)):
                if not _seem_related(scene):
                    break
        self.scenes.append(scene)
        self._remember(scene)


def story(seed, index, kinds=KINDS, held_out=False, weights={}, sentences=1, chunks=(3, 9)):
    """The story number `index` of world `seed`; it begins as the scene of that number.

    kinds, held_out, weights: as of `scene`. chunks: how long a sentence lasts, at least and at most. A subject
    that is alone at first may be small, and only then has room for others to come.
    """
    rng = np.random.default_rng([seed, index])
    first = _scene(rng, kinds, held_out, weights)
    while len(first.subjects) > 1 and "shrink" in {x.motion for x in first.subjects}:  # for ever too small to be seen
        first = _scene(rng, kinds, held_out, weights)
    alone = first.subjects[0] if len(first.subjects) == 1 else None
    if alone and sentences > 1 and alone.motion in PAIR_MOTIONS and alone.motion not in ("grow", "shrink"):
        if rng.random() < 0.7:
            first = dataclasses.replace(first, subjects=(dataclasses.replace(alone, size="small"),))
    teller = _Teller(rng, first, held_out, weights)
    for _ in range(sentences - 1):
        teller.go_on()
    lengths = rng.integers(chunks[0], chunks[1] + 1, sentences - 1) * CHUNK
    return Story(tuple(teller.scenes), (0, *(int(t) for t in np.cumsum(lengths))))


def story_captions(story, rng):
    """[(latent frame, text)]: a sentence for each scene of a story.

    It tells all that the scene shows, so it can be read without the sentences before it, and who leaves. Of a subject
    that fell, grew or shrank in an earlier sentence it says that it rests.
    """
    texts = []
    for before, scene in zip((None, *story.scenes), story.scenes):
        were = {x.colour: x for x in before.subjects} if before else {}
        at_rest = [x.motion in ONCE and x.colour in were and were[x.colour].motion == x.motion for x in scene.subjects]
        told = dataclasses.replace(scene, subjects=tuple(
            dataclasses.replace(x, motion="still") if rests else x for x, rests in zip(scene.subjects, at_rest)))
        gone = tuple(x for x in were.values() if x.colour not in {y.colour for y in scene.subjects})
        while True:
            text = caption(told, rng, gone)
            words = text.replace(",", " ,").replace(".", " .").split()
            if len(words) <= WORDS and "twice" not in words:  # on a film without an end nothing is counted
                break
        texts.append(text)
    return list(zip(story.starts, texts))


def mistaken(scenes, rng):
    """{colour: fields of Subject that are wrong, or None if it is lost}: what a model may have taken one subject of
    these scenes of a story for, or more."""
    subjects = [x for scene in scenes for x in scene.subjects]
    while True:
        mistakes = {}
        for colour, shape in sorted({(x.colour, x.shape) for x in subjects}):
            what = str(rng.choice(["right", "shape", "colour", "lost"], p=(0.3, 0.45, 0.15, 0.1)))
            others = [x for x in {"shape": SHAPES, "colour": COLOURS}.get(what, ()) if x not in (shape, colour)]
            if what != "right":
                mistakes[colour] = {what: str(rng.choice(others))} if others else None
        seen = [dataclasses.replace(x, **mistakes[x.colour]) for x in subjects if mistakes.get(x.colour)]
        if mistakes and not any(map(_is_held_out, seen)):
            return mistakes


def vocabulary():
    """Every word that a caption may contain, sorted; the tokenizer keeps each as one piece."""
    phrases = ["a an the one that is and while"] + _KIND_WORDS + _ADVERBS + _OPENINGS
    for table in (SHAPES, COLOURS, SIZES, BACKGROUNDS):
        phrases += [p for ps in table.values() for p in ps]
    phrases += [form for forms in MOTIONS.values() for pair in forms for form in pair]
    phrases += [t.replace("{A}", "").replace("{B}", "") for ts in RELATIONS.values() for t in ts]
    return sorted({word for phrase in phrases for word in phrase.split()})
