"""The detector: says from pixels alone what a clip shows: shapes, colours, sizes, motions, relation and background.

It is classical, so that it can be checked by reading.  The world's fill colours are unlike any background, so a subject
is the pixels close to one of them.  Each question is then answered by synthesis: of everything that draw.py could have
drawn (shapes at all angles, tracks of all motions, backgrounds), what comes closest to what is there?

`python train/detect.py` holds it to account on clips that it never saw.
"""
import dataclasses
import functools
import itertools

import numpy as np

import draw
import world

PATCH = 28  # shapes are compared on a grid of PATCH x PATCH
NEAR = np.where([name == "white" for name in draw.FILL], 30.0, 42.0)  # how far, in 8-bit RGB, from a fill colour
POSITION, LOG_SCALE, ANGLE = 0.035, 0.14, 0.30  # what counts as one unit of error of a track
WORST = 9.0  # no frame counts more than this, so that a hidden or cut-off subject spoils little
SECOND = 0.12  # a second subject has at least this share of the first one's area


@dataclasses.dataclass
class Seen:
    """What the detector followed of one colour: centre [F, 2], area [F] (share of the frame; 0 is not seen), masks [F, H, W]."""
    colour: str
    centre: np.ndarray
    area: np.ndarray
    mask: np.ndarray
    shape: str = ""
    angle: np.ndarray | None = None


# ---- colour ---------------------------------------------------------------------------------------------------------------

def _erode(mask):
    out = mask.copy()
    for axis in (1, 2):
        out &= np.roll(mask, 1, axis) & np.roll(mask, -1, axis)
    return out


def _dilate(mask):
    out = mask.copy()
    for axis in (1, 2):
        out |= np.roll(mask, 1, axis) | np.roll(mask, -1, axis)
    return out


def colour_masks(video):
    """{colour: mask [F, H, W]}: pixels closest to that fill, and close enough, at any brightness that shading may give."""
    pixels = video.astype(np.float32)
    fills = np.stack(list(draw.FILL.values()))
    gain = np.clip(pixels @ fills.T / (fills * fills).sum(1), 0.93, 1.08)
    square = (pixels * pixels).sum(-1)[..., None] - 2 * gain * (pixels @ fills.T) + gain * gain * (fills * fills).sum(1)
    best = square.argmin(-1)
    close = square.min(-1) < (NEAR * NEAR)[best]
    return {name: _dilate(_erode(close & (best == i))) & close & (best == i) for i, name in enumerate(draw.FILL)}


def _core(mask):
    """A mask [F, H, W] without what lies far from its middle in each frame: snowflakes, stars, a gleam elsewhere."""
    out = mask.copy()
    for frame in out:
        y, x = np.nonzero(frame)
        if len(y) == 0:
            continue
        distance = np.hypot(y - np.median(y), x - np.median(x))
        far = distance > 3.0 * np.median(distance) + 2
        frame[y[far], x[far]] = False
    return out


def _follow(colour, mask):
    size, mask = mask.shape[1], _core(mask)
    count = mask.sum((1, 2))
    grid = (np.arange(size) + 0.5) / size
    weight = np.maximum(count, 1)
    centre = np.stack([(mask.sum(1) * grid).sum(1) / weight, (mask.sum(2) * grid).sum(1) / weight], 1)
    return Seen(colour, centre, count / size ** 2, mask)


def subjects_of(video):
    """The one or two subjects seen, larger first."""
    seen = [_follow(colour, mask) for colour, mask in colour_masks(video).items()]
    seen.sort(key=lambda s: -np.median(s.area))
    first, second = seen[:2]
    is_eyes = second.colour == "white" and np.median(np.hypot(*(first.centre - second.centre).T)) < 0.06
    if is_eyes:
        second = seen[2]
    solid = np.median(_erode(_erode(second.mask)).mean((1, 2)))
    two = np.median(second.area) > SECOND * np.median(first.area) and solid > 0.0008
    return [first, second] if two else [first]


# ---- shape ----------------------------------------------------------------------------------------------------------------

def _patches(mask):
    """Each frame's mask [F, H, W] as [F, PATCH^2], moved to its centre and scaled to one size; False where nothing is."""
    size = mask.shape[1]
    out = np.zeros((len(mask), PATCH * PATCH), bool)
    steps = (np.arange(PATCH) + 0.5) / PATCH * 2 - 1
    for f, frame in enumerate(mask):
        y, x = np.nonzero(frame)
        if len(y) < 12:
            continue
        cy, cx = y.mean(), x.mean()
        reach = 2.3 * np.sqrt(((y - cy) ** 2 + (x - cx) ** 2).mean())
        rows, columns = np.rint(cy + reach * steps).astype(int), np.rint(cx + reach * steps).astype(int)
        inside = ((rows >= 0) & (rows < size))[:, None] & ((columns >= 0) & (columns < size))[None]
        out[f] = (frame[np.clip(rows, 0, size - 1)[:, None], np.clip(columns, 0, size - 1)[None]] & inside).ravel()
    return out


SYMMETRY = {"circle": 1, "square": 4, "triangle": 3, "star": 5, "heart": 1, "cross": 4, "character": 1}

# The poses of the character that it is compared with; a white one's eyes do not show as holes.
WALKING = list(itertools.product(("red", "white"), (0.0, 0.5, -0.5, 1.0, -1.0), (-1, 0, 1)))


def _fill(shape, colour, track, radius, size):
    """Mask [F, size, size] of the fill of a subject drawn on black."""
    canvas = np.zeros((len(track.x), size, size, 3), np.float32)
    draw._blend(canvas, draw._subject_layer(world.Subject(shape, colour, "medium", "still"), track, radius, size))
    return colour_masks(canvas.astype(np.uint8))[colour]


@functools.lru_cache(maxsize=4)
def _templates(size):
    """(patches [N, PATCH^2], shape names [N], angles [N]) of every shape at every angle, and strides of the character."""
    names, angles, masks = [], [], []
    for shape, symmetry in SYMMETRY.items():
        count = 1 if shape == "circle" else 36 // symmetry
        turn = 2 * np.pi / symmetry * np.arange(count) / count
        poses = WALKING if shape == "character" else [("red", 0.0, 0)]
        for radius, (colour, stride, facing) in itertools.product((0.11, 0.20), poses):
            track = draw.Track(turn, 0.5, 0.5, angle=turn, stride=stride, facing=facing)
            masks.append(_fill(shape, colour, track, radius, size))
            names += [shape] * count
            angles += list(turn)
    return _patches(np.concatenate(masks)), np.array(names), np.array(angles)


def recognise(seen):
    """Sets the shape of what was seen, by vote over the frames, and its angle [F] in each."""
    templates, names, angles = _templates(seen.mask.shape[1])
    patches = _patches(seen.mask)
    t, p = templates.astype(np.float32), patches.astype(np.float32)
    common = p @ t.T
    overlap = common / (p.sum(1)[:, None] + t.sum(1)[None] - common + 1e-6)
    whole = seen.area > 0.6 * np.median(seen.area[seen.area > 0])
    votes = {shape: overlap[whole][:, names == shape].max(1).sum() for shape in SYMMETRY}
    seen.shape = max(votes, key=votes.get)
    mine = np.nonzero(names == seen.shape)[0]
    seen.angle = angles[mine[overlap[:, mine].argmax(1)]]


@functools.lru_cache(maxsize=256)
def fill_area(shape, radius, size):
    """Share of the frame that a shape's visible fill takes."""
    return max(_fill(shape, "red", draw.Track(np.zeros(1), 0.5, 0.5), radius, size).mean(), 1e-5)


# ---- motion ---------------------------------------------------------------------------------------------------------------

def _centre_offset(shape):
    """How far below a track's centre the middle of the fill is, in radii."""
    return {"triangle": 0.12, "character": -0.10, "heart": -0.08}.get(shape, 0.0)


def _cost(seen, track, radius, free_x, free_y):
    """Mean squared error per frame between what was seen and a track; free_x, free_y: how much the track may be moved."""
    size = seen.mask.shape[1]
    visible = seen.area > 0.15 * np.median(seen.area)
    offset = _centre_offset(seen.shape) * radius * track.scale
    dx = seen.centre[:, 0] - track.x + offset * np.sin(track.angle)
    dy = seen.centre[:, 1] - track.y - offset * np.cos(track.angle)
    dx, dy = (d - np.clip(np.median(d[visible]), -free, free) for d, free in ((dx, free_x), (dy, free_y)))
    expected = np.array([fill_area(seen.shape, round(radius * a, 2), size) for a in track.scale])
    ds = 0.5 * np.log(np.maximum(seen.area, 1e-5) / expected)
    error = (dx / POSITION) ** 2 + (dy / POSITION) ** 2 + (ds / LOG_SCALE) ** 2
    if seen.shape != "circle":
        period = 2 * np.pi / SYMMETRY[seen.shape]
        turn = (seen.angle - track.angle + period / 2) % period - period / 2
        error = error + np.minimum((turn / ANGLE) ** 2, 4)
    return np.minimum(error[visible], WORST * 3).mean()


def _single(seen):
    """(motion, size) of a subject that is alone."""
    s = np.linspace(0, 1, len(seen.area))
    costs = {}
    for motion in world.motions_of(seen.shape):
        for size in ("medium",) if motion in ("grow", "shrink") else world.SIZES:
            r = draw.RADIUS[size]
            track = draw.move(motion, s, 0.5, 0.48, r, draw.GROUND - draw.FOOT[seen.shape] * r)
            costs[motion, size] = _cost(seen, track, r, 0.07, 0.06)
    return min(costs, key=costs.get)


def _pair_motion(seen):
    """(cost, motion) of a subject that has a companion but moves on its own."""
    s, r = np.linspace(0, 1, len(seen.area)), draw.PAIR_RADIUS
    home = 0.27 if np.median(seen.centre[:, 0]) < 0.5 else 0.73
    floor = draw.GROUND - draw.FOOT[seen.shape] * r
    motions = [m for m in world.motions_of(seen.shape) if m in world.PAIR_MOTIONS]
    return min((_cost(seen, draw.move(m, s, home, 0.48, r, floor), r, 0.07, 0.06), m) for m in motions)


def _relation(seen):
    """(cost, relation, subjects in the order of their roles)."""
    s, best = np.linspace(0, 1, len(seen[0].area)), (np.inf, None, seen)
    for order in (seen, seen[::-1]):
        floors = [draw.GROUND - draw.FOOT[x.shape] * draw.PAIR_RADIUS for x in order]
        for relation in world.RELATIONS:
            found = draw.relate(relation, s, 0.0, floors)
            cost = sum(_cost(x, t, draw.PAIR_RADIUS, 0.06, 0.02) for x, t in zip(order, found))
            if cost < best[0]:
                best = (cost, relation, order)
    return best


# ---- background and the whole ---------------------------------------------------------------------------------------------

def background_of(video, seen):
    """The background that, at its best brightness, comes closest where no subject is."""
    frames, size = video.shape[:2]
    hidden = np.zeros(video.shape[:3], bool)
    for x in seen:
        hidden |= _dilate(_dilate(_dilate(x.mask)))
    pixels, errors = video[~hidden].astype(np.float32), {}
    for name in world.BACKGROUNDS:
        there = draw.background(name, size, frames)[~hidden]
        gain = np.clip((pixels * there).sum() / (there * there).sum(), 0.9, 1.1)
        errors[name] = np.abs(pixels - gain * there).mean()
    return min(errors, key=errors.get)


def detect(video):
    """uint8 [F, S, S, 3] -> {"background", "relation", "subjects": [{"shape", "colour", "size", "motion"}]}."""
    seen = subjects_of(video)
    for x in seen:
        recognise(x)
    result = {"background": background_of(video, seen), "relation": None}
    if len(seen) == 1:
        motions = [_single(seen[0])]
    else:
        alone = [_pair_motion(x) for x in seen]
        cost, relation, order = _relation(seen)
        both_jump = all(motion == "jump" for _, motion in alone)
        if both_jump:
            relation, order = "jump together", seen
        if both_jump or cost < sum(c for c, _ in alone):
            result["relation"], seen = relation, order
            motions = [(relation, "medium")] * 2
        else:
            motions = [(m, "medium") for _, m in alone]
    result["subjects"] = [dict(shape=x.shape, colour=x.colour, size=size, motion=motion)
                          for x, (motion, size) in zip(seen, motions)]
    return result


SYMMETRIC = ("meet", "jump together", "collide")  # relations whose two subjects have the same role


def compare(scene, found):
    """{attribute: True or False} for every attribute that the scene asks for; subjects are matched by their colours."""
    marks = {"background": found["background"] == scene.background, "relation": found["relation"] == scene.relation,
             "count": len(found["subjects"]) == len(scene.subjects)}
    by_colour = {x["colour"]: x for x in found["subjects"]}
    for i, subject in enumerate(scene.subjects):
        match = by_colour.get(subject.colour)
        if match is None:
            marks[f"colour{i}"] = False
            match = found["subjects"][min(i, len(found["subjects"]) - 1)]
        else:
            marks[f"colour{i}"] = True
        marks[f"shape{i}"] = match["shape"] == subject.shape
        marks[f"motion{i}"] = match["motion"] == subject.motion
        if len(scene.subjects) == 1:
            marks[f"size{i}"] = match["size"] == subject.size
    if scene.relation and scene.relation not in SYMMETRIC:
        marks["roles"] = [x["colour"] for x in found["subjects"]] == [x.colour for x in scene.subjects]
    return marks


def account(clips, seed=2, size=96, frames=33):
    """Share of right answers by attribute on drawn clips, and the clips that were misread."""
    right, wrong = {}, []
    for i in range(clips):
        scene = world.scene(seed, i)
        marks = compare(scene, detect(draw.draw(scene, size, frames)))
        for name, ok in marks.items():
            right.setdefault(name.rstrip("01"), []).append(ok)
        if not all(marks.values()):
            wrong.append((i, scene, [n for n, ok in marks.items() if not ok]))
    return {name: float(np.mean(oks)) for name, oks in right.items()}, wrong


if __name__ == "__main__":
    shares, wrong = account(300)
    for index, scene, attributes in wrong:
        print(index, scene, attributes)
    print({name: round(share, 4) for name, share in shares.items()})
