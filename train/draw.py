"""Draws a Scene (world.py) as a clip: uint8 pixels [F, H, W, 3], RGB.

Each subject is a signed distance field: for every pixel, how far it is from the outline, negative inside.  Coverage is
the distance clipped over one pixel, so edges are smooth without supersampling.  All frames of a subject are evaluated
at once, on a square just large enough to hold it, and blended over the background frame by frame.

Units: the frame is 1 wide and 1 high, x to the right, y down; time s is counted in two seconds.  A shape's own
coordinates u, v have the subject's radius as unit.
"""
import dataclasses
import functools

import numpy as np

from world import CHUNK, CROWD, FRAMES, SIZE, Scene, Story, first_frame

GROUND = 0.86  # y of the floor on which subjects stand
RADIUS = {"small": 0.175, "medium": 0.22, "large": 0.275}
PAIR_RADIUS = 0.17
PAIR_HOMES = 0.25, 0.75  # x of two subjects that each move on their own
OUTLINE_COLOUR = np.array([36, 30, 46], np.float32)
OUTLINE_WIDTH = 0.014  # of the frame
FILL = {name: np.array(rgb, np.float32) for name, rgb in {
    "red": (220, 40, 40), "orange": (246, 140, 30), "yellow": (250, 215, 50), "green": (70, 230, 110),
    "blue": (45, 90, 225), "purple": (140, 60, 190), "pink": (250, 125, 190), "white": (250, 250, 250)}.items()}


# ---- shapes: signed distance in units of the radius ---------------------------------------------------------------

def _circle(u, v):
    return np.hypot(u, v) - 0.92


def _box(u, v, half_width, half_height, corner):
    qu, qv = np.abs(u) - half_width + corner, np.abs(v) - half_height + corner
    return np.hypot(np.maximum(qu, 0), np.maximum(qv, 0)) + np.minimum(np.maximum(qu, qv), 0) - corner


def _square(u, v):
    return _box(u, v, 0.80, 0.80, 0.08)


def _triangle(u, v):
    sides = [np.sin(a) * u - np.cos(a) * (v - 0.12) for a in (np.pi, np.pi / 3, -np.pi / 3)]
    return np.maximum(np.maximum(sides[0], sides[1]), sides[2]) - 0.56


def _star(u, v):
    """Five points: fold the angle into one tenth of the turn, where the outline is one straight edge."""
    r, a = np.hypot(u, v), np.arctan2(u, -v)
    a = np.abs((a + np.pi / 5) % (2 * np.pi / 5) - np.pi / 5)
    inner, outer = 0.50, 1.06
    p, q = r * np.sin(a), r * np.cos(a)
    ex, ey = inner * np.sin(np.pi / 5), inner * np.cos(np.pi / 5) - outer
    length = np.hypot(ex, ey)
    return ((q - outer) * ex - p * ey) / length


def _heart(u, v):
    """Inigo Quilez' exact heart, moved to the middle of the square and 1.65 times as large."""
    x, y = np.abs(u) / 1.65, -v / 1.65 + 0.56
    lobe = np.hypot(x - 0.25, y - 0.75) - np.sqrt(2) / 4
    m = 0.5 * np.maximum(x + y, 0)
    tip = np.sqrt(np.minimum(x * x + (y - 1) ** 2, (x - m) ** 2 + (y - m) ** 2)) * np.sign(x - y)
    return 1.65 * np.where(x + y > 1, lobe, tip)


def _cross(u, v):
    return np.minimum(_box(u, v, 0.38, 0.94, 0.06), _box(u, v, 0.94, 0.38, 0.06))


def _leg(u, v, foot_u, foot_v, hip_u):
    """Distance to the segment from the hip to the foot, less half the leg's width."""
    du, dv = foot_u - hip_u, foot_v - 0.30
    along = np.clip(((u - hip_u) * du + (v - 0.30) * dv) / (du * du + dv * dv), 0, 1)
    return np.hypot(u - hip_u - along * du, v - 0.30 - along * dv) - 0.20


def _character(u, v, stride):
    """A rounded body on two legs; stride (broadcast over frames) is how far the feet are swung apart."""
    body = _box(u, v + 0.30, 0.80, 0.76, 0.60)
    lift = 0.12 * np.abs(stride)
    left = _leg(u, v, -0.36 + 0.5 * stride, 0.82 - lift, -0.36)
    right = _leg(u, v, 0.36 - 0.5 * stride, 0.82 - lift, 0.36)
    return np.minimum(body, np.minimum(left, right))


SHAPE_SDF = {"circle": _circle, "square": _square, "triangle": _triangle, "star": _star, "heart": _heart,
             "cross": _cross}
# How far below the centre a shape touches the ground, in radii.
FOOT = {"circle": 0.92, "square": 0.80, "triangle": 0.68, "star": 0.86, "heart": 0.93, "cross": 0.94, "character": 1.02}
# After which part of a turn it looks the same.
SYMMETRY = {"circle": 1, "square": 4, "triangle": 3, "star": 5, "heart": 1, "cross": 4, "character": 1}
# How far it reaches to either side.
SIDE = {"circle": 0.92, "square": 0.80, "triangle": 0.97, "star": 1.01, "heart": 1.00, "cross": 0.94, "character": 0.80}


# ---- motions: where the subject is at each time --------------------------------------------------------------------
#
# Every motion goes on for ever. Its last second and a half determine what it does next. Subjects that travel turn at
# the edge. Gravity is the same for all that fall, bounce or jump.
#
# The beat is a second: as long as a chunk of the model. Jumps, bounces, legs and shakes repeat on it, and most other
# motions after a few of them. So a motion looks the same in every chunk, or in one of a few ways.

CLIP = FRAMES - 1  # frames in the unit of time
BOUNCE, BOUNCE_LENGTH, JUMP_LENGTH = 0.31, 0.5, 0.4  # height, and units of time in the air
GRAVITY = 8 * BOUNCE / BOUNCE_LENGTH ** 2
JUMP = GRAVITY * JUMP_LENGTH ** 2 / 8  # height
WALK_EDGE, EDGE = 0.30, 0.33  # how far from the middle walkers turn, and runners
SMALLEST, LARGEST = 0.45, 1.45  # scale at which a subject stops shrinking, or growing
LEAST = 0.13  # radius: in a story no subject becomes smaller


class Track:
    """The way of one subject.

    x, y [F]: its centre. scale [F]: its size, relative to the radius. angle [F]: its clockwise turn in radians.
    stride [F]: the swing of its legs. facing [F]: -1 to the left, 1 to the right, 0 to the viewer.
    """

    def __init__(self, s, x, y, scale=1.0, angle=0.0, stride=0.0, facing=0):
        self.x, self.y, self.scale, self.angle, self.stride, self.facing = (
            np.broadcast_to(np.asarray(a, float), s.shape) for a in (x, y, scale, angle, stride, facing))


def _turning(x, edge):
    """(x, 1 or -1: on the way there or back) of a subject that turns `edge` away from the middle. x: where it would be
    if it never turned."""
    inside, p = np.abs(x - 0.5) < edge + 1e-9, (x - 0.5 + edge) % (4 * edge)
    back = ~inside & (p > 2 * edge)
    return np.where(inside, x, 0.5 + np.where(back, 3 * edge - p, p - edge)), np.where(back, -1, 1)


def parabola(s, start, end):
    """0 outside [start, end], and the arc of a throw of height 1 inside."""
    p = np.clip((s - start) / (end - start), 0, 1)
    return 4 * p * (1 - p)


def _bouncing(s):
    """Height over an elastic ground, 1 at the top, of a subject that falls from there and comes up to it again."""
    return parabola((s + BOUNCE_LENGTH / 2) % BOUNCE_LENGTH, 0, BOUNCE_LENGTH)


def _two_jumps(s):
    """Height over the ground, 1 at the top, of a subject that jumps twice in each unit of time."""
    s = s % 1
    return parabola(s, 0.05, 0.05 + JUMP_LENGTH) + parabola(s, 0.55, 0.55 + JUMP_LENGTH)


def _legs(s, steps):
    """Swing of the legs over `steps` strides in a unit of time: a sine."""
    return np.sin(2 * np.pi * steps * s)


def move(motion, s, x0, y0, r, floor, scale=None, top=None, smallest=SMALLEST):
    """The Track of a subject. x0, y0: where it would rest in the air; r: radius; floor: its y on the ground.

    scale: how large it is, at first if it grows or shrinks; top: y from which it falls; smallest: scale at which it
    stops shrinking.
    """
    reach = 0.48 - r
    sign = -1 if motion.endswith("left") else 1
    ramp = 2 * s - 1
    size = 1.0 if scale is None else scale
    if motion in ("left", "right"):
        x, way = _turning(0.5 + sign * reach * ramp, reach)
        return Track(s, x, y0, size, facing=sign * way)
    if motion.startswith("walk"):
        x, way = _turning(x0 + sign * 0.20 * ramp, WALK_EDGE)
        return Track(s, x, floor, size, stride=_legs(s, 2), facing=sign * way)
    if motion.startswith("run"):
        x, way = _turning(0.5 + sign * EDGE * ramp, EDGE)
        bob = 0.03 * np.abs(_legs(s, 3))
        return Track(s, x, floor - bob, size, 0.22 * sign * way, 1.2 * _legs(s, 3), sign * way)
    high = 0.04 + r
    there = 1 - np.abs(s % 2 - 1)  # from 0 to 1 and back
    return {
        "up": lambda: Track(s, x0, floor - (floor - high) * there, size),
        "down": lambda: Track(s, x0, high + (floor - high) * there, size),
        "fall": lambda: Track(s, x0, np.minimum((high if top is None else top) + GRAVITY / 2 * s ** 2, floor), size),
        "bounce": lambda: Track(s, x0, floor - BOUNCE * _bouncing(s), size),
        "jump": lambda: Track(s, x0, floor - JUMP * _two_jumps(s), size),
        "spin": lambda: Track(s, x0, y0, size, angle=np.pi * s),
        "grow": lambda: Track(s, x0, y0, np.minimum((SMALLEST if scale is None else scale) + 1.0 * s, LARGEST)),
        "shrink": lambda: Track(s, x0, y0, np.maximum((LARGEST if scale is None else scale) - 1.0 * s, smallest)),
        "loop": lambda: Track(s, 0.5 + 0.19 * np.sin(2 * np.pi * s), 0.47 - 0.19 * np.cos(2 * np.pi * s), size),
        "shake": lambda: Track(s, x0 + 0.05 * np.sin(2 * np.pi * 4 * s), y0, size),
        "still": lambda: Track(s, x0, floor, size),
    }[motion]()


def floor_of(shape, r):
    """y of the centre of a shape of radius r that stands on the ground."""
    return GROUND - FOOT[shape] * r


def relate(relation, s, dx, shapes):
    """Tracks of the two subjects of a relation, by their shapes. dx: how far to the side they jump together."""
    ramp, floors = 2 * s - 1, [floor_of(shape, PAIR_RADIUS) for shape in shapes]
    on_ground = lambda i, x, facing, step=2, walks=1: Track(
        s, x, floors[i], stride=_legs(s, step) * walks, facing=facing)
    if relation == "orbit":
        a = 1.5 * np.pi * s  # a whole turn would carry it by its own width in every latent frame
        return [Track(s, 0.5 + 0.34 * np.sin(a), 0.47 - 0.31 * np.cos(a), scale=0.9), Track(s, 0.5, 0.47, scale=0.9)]
    if relation == "jump together":
        height = JUMP * _two_jumps(s)
        return [Track(s, 0.5 + dx - 0.2, floors[0] - height), Track(s, 0.5 + dx + 0.2, floors[1] - height)]
    if relation == "chase":  # the chased one turns at the edge first, and runs past the other
        lead = 0.5 + 0.24 * ramp
        return [on_ground(0, *_turning(lead - 0.18, 0.42), 3), on_ground(1, *_turning(lead + 0.18, 0.42), 3)]
    if relation == "pass":
        return [on_ground(0, *_turning(0.5 + 0.42 * ramp, 0.42)), Track(s, 0.5, floors[1] - 0.10)]
    touch = (SIDE[shapes[0]] + SIDE[shapes[1]]) * PAIR_RADIUS / 2  # half the distance between their centres
    speed, contact, way = 0.36, 0.55, 0.27  # way: how far those who collide go back
    if relation == "meet":
        way_in, walks = touch + speed * np.maximum(contact - s, 0), s < contact + 1 / CLIP
    else:  # they collide, and come back from the edges
        way_in, walks = touch + np.abs((speed * (s - contact) + way) % (2 * way) - way), 1
    return [on_ground(0, 0.5 - way_in, 1, walks=walks), on_ground(1, 0.5 + way_in, -1, walks=walks)]


# ---- stories: from one sentence to the next ------------------------------------------------------------------------
#
#     beat 0                         beat 1, 2, ...
#     each goes to where it begins   what the sentence says, from its beginning
#
# From beat 1 on a chunk shows what a chunk of the scene alone would show: a story is made of what is known already.
# Who is told nothing new goes on, and only moves aside if somebody comes or goes: each number of subjects has its
# places. Who falls does so at once.

BEAT = 4 * CHUNK  # frames
PICTURE = 3  # frames by which a clip's first latent frame, which is one picture, is shorter than others
HOMES = {1: (1 / 2,), 2: PAIR_HOMES, 3: (1 / 6, 1 / 2, 5 / 6)}  # x of so many that each move on their own
FAR = 0.1  # a character that has so far to go to its place walks there


class Act:
    """What one subject does.

    way: s -> Track; begin: the frame in which s is 0, before which it waits at its beginning; r: radius; size: the
    scale that it has unless it grows or shrinks.
    """

    def __init__(self, subject, r, way, begin=0, size=1.0):
        self.subject, self.r, self.way, self.begin, self.size = subject, r, way, begin, size
        self.gap, self.since, self.turned = np.zeros(4), begin, 0.0

    def track(self, frames):
        """Its Track in these frames."""
        track = self.way(np.maximum(frames - self.begin, 0) / CLIP)
        p = np.clip((frames - self.since) / BEAT, 0, 1)
        left = 1 - p * p * (3 - 2 * p)
        track.x, track.y, track.scale, track.angle = (
            a + gap * left for a, gap in zip((track.x, track.y, track.scale, track.angle + self.turned), self.gap))
        if abs(self.gap[0]) > FAR:
            track.stride = np.where(p < 1, _legs(p, 2), track.stride)
            track.facing = np.where(p < 1, -np.sign(self.gap[0]), track.facing)
        return track

    def pose(self, frame):
        """[4]: x, y, scale and angle in a frame."""
        track = self.track(np.array([frame]))
        return np.array([track.x[0], track.y[0], track.scale[0], track.angle[0]])

    def glide(self, pose, frame):
        """Itself, but at a pose in a frame, from which it glides to its own way in a beat.

        It turns no further than until it looks upright.
        """
        gap, repeats = pose - self.pose(frame), 2 * np.pi / SYMMETRY[self.subject.shape]
        self.turned = repeats * np.round(gap[3] / repeats)
        self.gap, self.since = gap - [0, 0, 0, self.turned], frame
        return self


def _way(scene, i, home, r, **more):
    """s -> Track of subject i of a scene. home: x where it rests, r: its radius, if it moves on its own; more: as of
    move."""
    x = scene.subjects[i]
    if scene.relation:
        shapes = [x.shape for x in scene.subjects]
        return lambda s: relate(scene.relation, s, scene.dx, shapes)[i]
    return functools.partial(move, x.motion, x0=home, y0=0.48 + scene.dy, r=r, floor=floor_of(x.shape, r), **more)


def _homes(scene):
    """x of each place of a scene, from left to right."""
    count = len(scene.subjects)
    return [x + scene.dx * (count < CROWD) for x in HOMES[count]]


def _first(scene):
    """The Acts of a scene that nothing comes before."""
    radii = [RADIUS[x.size] if len(scene.subjects) == 1 else PAIR_RADIUS for x in scene.subjects]
    return [Act(x, r, _way(scene, i, home, r))
            for i, (x, home, r) in enumerate(zip(scene.subjects, _homes(scene), radii))]


def _outside(r):
    """How far from the middle a subject of radius r is no longer seen."""
    return 0.5 + 1.1 * r


def _strange(x, dy):
    """The pose of a stranger before it comes: from the right, unless the left is named."""
    side = -1 if x.enters == "left" else 1
    far = _outside(PAIR_RADIUS)
    return np.array([0.5 + side * far, 0.5 - far if x.motion == "fall" else 0.48 + dy, 1.0, 0.0])


def _next(acts, before, scene, begin):
    """The Acts of a scene that begins in frame `begin`, after these of the scene before; those that leave come last."""
    past = {a.subject.colour: a for a in acts if a.subject in before.subjects}
    poses = {colour: a.pose(begin) for colour, a in past.items()}
    result = []
    for i, (x, home) in enumerate(zip(scene.subjects, _homes(scene))):
        old = past.get(x.colour)
        pose = poses[x.colour] if old else _strange(x, scene.dy)
        if old and (old.subject.motion, before.relation) == (x.motion, scene.relation):
            way = old.way if scene.relation else functools.partial(old.way, x0=home)
            result.append(Act(x, old.r, way, old.begin, old.size).glide(pose, begin))
            continue
        r, size = (old.r, old.size) if old else (PAIR_RADIUS, 1.0)
        if old and old.subject.motion in ("grow", "shrink"):
            size = pose[2]
        if x.motion == "fall" and not old:
            pose = np.array([home, *pose[1:]])
        way = _way(scene, i, home, r * size, scale=size, top=min(pose[1], floor_of(x.shape, r * size)),
                   smallest=max(SMALLEST, LEAST / r))
        wait = PICTURE + BEAT * (x.motion != "fall")
        result.append(Act(x, r, way, begin + wait, size).glide(pose, begin))
    for colour, old in past.items():
        if colour not in {x.colour for x in scene.subjects}:
            x, y, scale, angle = poses[colour]
            x = 0.5 + np.sign(x - 0.5 + 1e-9) * _outside(old.r * scale)
            leave = functools.partial(Track, x=x, y=y, scale=scale, angle=angle)
            result.append(Act(old.subject, old.r, leave, begin).glide(poses[colour], begin))
    return result


def acts(story):
    """[(first frame, scene, Acts)]: what is to be seen from each frame on, front to back."""
    result = [(0, story.scenes[0], _first(story.scenes[0]))]
    for start, scene in zip(story.starts[1:], story.scenes[1:]):
        _, before, done = result[-1]
        result.append((first_frame(start), scene, _next(done, before, scene, first_frame(start))))
    return result


# ---- backgrounds: layers of paint over a gradient ------------------------------------------------------------------
#
# What a layer covers is a list of signed distances in frame widths, of the points x, y at time s.

def _hills(x, y, s, level, height, waves, phase):
    """All below a sine wave. level, height: of the frame's height; waves: across the frame; phase: radians."""
    return [level - height * np.sin(waves * x * 2 * np.pi + phase) - y]


def _disc(x, y, s, middle_x, middle_y, radius):
    return [np.hypot(x - middle_x, y - middle_y) - radius]


def _dots(x, y, s, seed, count, top, bottom, radius, drift=0):
    """Round dots at places between top and bottom that the seed fixes; drift: 1 falls, -1 rises, one turn a unit."""
    places = np.random.default_rng(seed).uniform(0, 1, (count, 3))
    return [np.hypot(x - px, y - (top + (bottom - top) * ((py + drift * s) % 1))) - radius * (0.7 + 0.6 * scale)
            for px, py, scale in places]


# {name: (colours (y, r, g, b) from top to bottom, layers (colour, opacity, what it covers, its arguments))}
BACKGROUND = {
    "plain": ([(0, 200, 194, 182), (0.80, 190, 184, 174), (0.81, 164, 158, 150), (1, 172, 166, 158)], []),
    "night": ([(0, 18, 22, 52), (0.8, 52, 56, 104)],
              [((226, 222, 196), 1, _dots, 1, 18, 0.02, 0.72, 0.011),
               ((38, 48, 66), 1, _hills, 0.80, 0.02, 1.0, 0.6)]),
    "meadow": ([(0, 158, 206, 236), (0.75, 184, 214, 230)],
               [((168, 202, 140), 1, _hills, 0.70, 0.03, 1.5, 0.0),
                ((140, 186, 108), 1, _hills, 0.79, 0.01, 1.0, 2.0),
                ((238, 226, 180), 1, _dots, 2, 9, 0.87, 0.98, 0.012)]),
    "sunset": ([(0, 92, 74, 118), (0.45, 196, 126, 124), (0.76, 242, 186, 140)],
               [((255, 226, 172), 1, _disc, 0.74, 0.66, 0.11),
                ((98, 76, 92), 1, _hills, 0.80, 0.012, 1.0, 1.0)]),
    "sea": ([(0, 104, 178, 192), (0.8, 38, 100, 132)],
            [((150, 150, 122), 1, _hills, 0.82, 0.012, 1.5, 0.5),
             ((168, 214, 220), 0.7, _dots, 3, 9, 0.02, 0.78, 0.018, -1)]),
    "snow": ([(0, 140, 160, 188), (0.78, 162, 180, 204)],
             [((186, 200, 222), 1, _hills, 0.79, 0.015, 1.0, 3.0),
              ((226, 233, 242), 1, _dots, 4, 14, 0.0, 1.0, 0.016, 1)]),
    "desert": ([(0, 150, 196, 214), (0.75, 204, 212, 202)],
               [((206, 176, 132), 1, _hills, 0.68, 0.04, 1.0, 1.2),
                ((222, 194, 148), 1, _hills, 0.79, 0.012, 1.5, 0.0)]),
}
DRIFTING = "sea", "snow"  # their dots


def _paint(canvas, distance, colour, opacity=1.0):
    """Blends `colour` into canvas [..., 3] where distance (pixels) is negative, smoothly over one pixel."""
    alpha = np.clip(0.5 - distance, 0, 1)[..., None] * opacity
    canvas += alpha * (np.asarray(colour, float) - canvas)


@functools.lru_cache(maxsize=16)
def _turn(name, size):
    """float32 [n, size, size, 3]: the frames in which what drifts in a background (snow, bubbles) makes one turn."""
    y, x = (np.mgrid[:size, :size] + 0.5) / size
    stops, layers = BACKGROUND[name]
    heights, *channels = np.array(stops, float).T
    frames = []
    for s in np.arange(CLIP) / CLIP if name in DRIFTING else [0.0]:
        canvas = np.stack([np.interp(y, heights, channel) for channel in channels], -1)
        for colour, opacity, covers, *arguments in layers:
            for distance in covers(x, y, s, *arguments):
                _paint(canvas, distance * size, colour, opacity)
        frames.append(canvas)
    return np.stack(frames).astype(np.float32)


def background(name, size, frames, first=0):
    """float32 [frames, size, size, 3], from frame `first` on."""
    turn = _turn(name, size)
    return turn[np.arange(first, first + frames) % len(turn)]


# ---- subjects over backgrounds -------------------------------------------------------------------------------------

def subject_layer(subject, track, radius, size):
    """(colour [F, K, K, 3], alpha [F, K, K, 1], corner_x [F], corner_y [F]) of one subject's square in each frame.

    K: pixels a side; the corners are integers and may lie outside of the frame.
    """
    pixels = np.maximum(track.scale * radius * size, 1e-3)
    half = int(np.ceil(1.25 * pixels.max())) + 2
    corner_x = np.floor(track.x * size).astype(int) - half
    corner_y = np.floor(track.y * size).astype(int) - half
    grid = np.arange(2 * half) + 0.5
    px = (grid[None, None, :] + (corner_x - track.x * size)[:, None, None]).astype(np.float32)
    py = (grid[None, :, None] + (corner_y - track.y * size)[:, None, None]).astype(np.float32)
    cos, sin, scale = (a[:, None, None].astype(np.float32) for a in (np.cos(track.angle), np.sin(track.angle), pixels))
    u, v = (cos * px + sin * py) / scale, (cos * py - sin * px) / scale
    if subject.shape == "character":
        distance = _character(u, v, track.stride[:, None, None].astype(np.float32)) * scale
    else:
        distance = SHAPE_SDF[subject.shape](u, v) * scale
    fill = np.clip(FILL[subject.colour] * (1.03 - 0.09 * v)[..., None], 0, 255)
    inner = np.clip(0.5 - distance - OUTLINE_WIDTH * size, 0, 1)[..., None]
    colour = OUTLINE_COLOUR + inner * (fill - OUTLINE_COLOUR)
    if subject.shape == "character":
        look, pupil = (a[:, None, None].astype(np.float32) for a in (0.14 * track.facing, 0.224 * track.facing))
        for side in (-0.31, 0.31):
            _paint(colour, (np.hypot(u - side - look, v + 0.42) - 0.25) * scale, (255, 255, 255))
            _paint(colour, (np.hypot(u - side - pupil, v + 0.42) - 0.13) * scale, OUTLINE_COLOUR)
    return colour, np.clip(0.5 - distance, 0, 1)[..., None], corner_x, corner_y


def blend(video, layer):
    """Lays what subject_layer returned over video [F, size, size, 3], in place."""
    colour, alpha, corner_x, corner_y = layer
    size, k = video.shape[1], alpha.shape[1]
    for f in range(video.shape[0]):
        x0, y0 = max(corner_x[f], 0), max(corner_y[f], 0)
        x1, y1 = min(corner_x[f] + k, size), min(corner_y[f] + k, size)
        if x0 < x1 and y0 < y1:
            part = np.s_[y0 - corner_y[f]:y1 - corner_y[f], x0 - corner_x[f]:x1 - corner_x[f]]
            target = video[f, y0:y1, x0:x1]
            target += alpha[f][part] * (colour[f][part] - target)


def draw(story, size=SIZE, frames=FRAMES, first=0, mistakes={}):
    """uint8 [frames, size, size, 3]: these frames of a Story, or of a Scene, which is a story without a next sentence.
    mistakes: as of world.mistaken.

    A scene's last subject is drawn first, so the first passes in front of the others. After a cut flakes and bubbles are
    where they are in the second chunk of a clip.
    """
    if isinstance(story, Scene):
        story = Story((story,), (0,))
    parts, video = acts(story), np.empty((frames, size, size, 3), np.float32)
    ends, place = [begin for begin, _, _ in parts[1:]] + [first + frames], None
    for (begin, scene, doing), end in zip(parts, ends):
        if scene.background != place:
            place, cut = scene.background, max(begin - first_frame(CHUNK), 0)
        begin, end = max(begin, first), min(end, first + frames)
        if begin < end:
            part, times = video[begin - first:end - first], np.arange(begin, end)
            part[:] = background(place, size, end - begin, begin - cut) * np.float32(scene.light)
            for act in reversed(doing):
                mistake = mistakes.get(act.subject.colour, {})
                if mistake is not None:
                    subject = dataclasses.replace(act.subject, **mistake)
                    blend(part, subject_layer(subject, act.track(times), act.r, size))
    return np.clip(video + 0.5, 0, 255).astype(np.uint8)
