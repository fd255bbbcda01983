"""Draws a Scene (world.py) as a clip: uint8 pixels [F, H, W, 3], RGB.

Each subject is a signed distance field: for every pixel, how far it is from the outline, negative inside.  Coverage is
the distance clipped over one pixel, so edges are smooth without supersampling.  All frames of a subject are evaluated
at once, on a square just large enough to hold it, and blended over the background frame by frame.

Units: the frame is 1 wide and 1 high, x to the right, y down; time s runs from 0 to 1 over the clip.  A shape's own
coordinates u, v have the subject's radius as unit.
"""
import functools

import numpy as np

from world import FRAMES, SIZE

GROUND = 0.86  # y of the floor on which subjects stand
RADIUS = {"small": 0.175, "medium": 0.22, "large": 0.275}
PAIR_RADIUS = 0.17
JUMP = 0.29  # height of a jump
PAIR_HOMES = 0.25, 0.75  # x of two subjects that each move on their own
OUTLINE_COLOUR = np.array([36, 30, 46], np.float32)
OUTLINE_WIDTH = 0.014  # of the frame
FILL = {name: np.array(rgb, np.float32) for name, rgb in {
    "red": (220, 40, 40), "orange": (246, 140, 30), "yellow": (250, 215, 50), "green": (25, 145, 60),
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
# How far it reaches to either side.
SIDE = {"circle": 0.92, "square": 0.80, "triangle": 0.97, "star": 1.01, "heart": 1.00, "cross": 0.94, "character": 0.80}


# ---- motions: where the subject is at each time --------------------------------------------------------------------

class Track:
    """The way of one subject.

    x, y [F]: its centre. scale [F]: its size, relative to the radius. angle [F]: its clockwise turn in radians.
    stride [F]: the swing of its legs. facing: -1 to the left, 1 to the right, 0 to the viewer.
    """

    def __init__(self, s, x, y, scale=1.0, angle=0.0, stride=0.0, facing=0):
        self.x, self.y, self.scale, self.angle, self.stride = (np.broadcast_to(np.asarray(a, float), s.shape)
                                                               for a in (x, y, scale, angle, stride))
        self.facing = facing


def _parabola(s, start, end):
    """0 outside [start, end], and the arc of a throw of height 1 inside."""
    p = np.clip((s - start) / (end - start), 0, 1)
    return 4 * p * (1 - p)


def _two_jumps(s):
    """Height over the ground of who jumps twice, 1 at the top."""
    return _parabola(s, 0.06, 0.46) + _parabola(s, 0.54, 0.94)


def _bouncing(s, restitution=0.75, first_fall=0.21):
    """Height over the ground, 1 at the start: free fall, then arcs that are each `restitution` times as long."""
    height = np.maximum(1 - (s / first_fall) ** 2, 0)
    start, length = first_fall, 2 * first_fall * restitution
    for _ in range(4):
        height = height + (length / (2 * first_fall)) ** 2 * _parabola(s, start, start + length)
        start, length = start + length, length * restitution
    return height


def _legs(s, steps):
    """Swing of the legs over `steps` strides in the clip: a sine."""
    return np.sin(2 * np.pi * steps * s)


def move(motion, s, x0, y0, r, floor):
    """The Track of a subject. x0, y0: where it would rest in the air; r: radius; floor: its y on the ground."""
    reach = 0.48 - r
    sign = -1 if motion.endswith("left") else 1
    ramp = 2 * s - 1
    if motion in ("left", "right"):
        return Track(s, 0.5 + sign * reach * ramp, y0, facing=sign)
    if motion.startswith("walk"):
        return Track(s, x0 + sign * 0.20 * ramp, floor, stride=_legs(s, 2), facing=sign)
    if motion.startswith("run"):
        bob = 0.03 * np.abs(_legs(s, 3))
        return Track(s, 0.5 + sign * 0.33 * ramp, floor - bob, angle=0.22 * sign, stride=1.2 * _legs(s, 3), facing=sign)
    top = 0.04 + r
    up, down = floor - (floor - top) * s, top + (floor - top) * s
    return {
        "up": lambda: Track(s, x0, up),
        "down": lambda: Track(s, x0, down),
        "fall": lambda: Track(s, x0, np.minimum(top + (floor - top) * (s / 0.5) ** 2, floor)),
        "bounce": lambda: Track(s, x0, floor - (floor - top) * _bouncing(s)),
        "jump": lambda: Track(s, x0, floor - JUMP * _two_jumps(s)),
        "spin": lambda: Track(s, x0, y0, angle=np.pi * s),
        "grow": lambda: Track(s, x0, y0, scale=0.45 + 1.0 * s),
        "shrink": lambda: Track(s, x0, y0, scale=1.45 - 1.0 * s),
        "loop": lambda: Track(s, 0.5 + 0.19 * np.sin(2 * np.pi * s), 0.47 - 0.19 * np.cos(2 * np.pi * s)),
        "shake": lambda: Track(s, x0 + 0.05 * np.sin(2 * np.pi * 4 * s), y0),
        "still": lambda: Track(s, x0, floor),
    }[motion]()


def floor_of(shape, r):
    """y of the centre of a shape of radius r that stands on the ground."""
    return GROUND - FOOT[shape] * r


def relate(relation, s, dx, shapes):
    """Tracks of the two subjects of a relation, by their shapes. dx: how far to the side they are who jump together."""
    ramp, floors = 2 * s - 1, [floor_of(shape, PAIR_RADIUS) for shape in shapes]
    on_ground = lambda i, x, facing, step=2: Track(
        s, x, floors[i], stride=_legs(s, step) * (np.abs(np.gradient(x)) > 1e-4), facing=facing)
    if relation == "orbit":
        a = 1.5 * np.pi * s  # a whole turn would carry it by its own width in every latent frame
        return [Track(s, 0.5 + 0.34 * np.sin(a), 0.47 - 0.31 * np.cos(a), scale=0.9), Track(s, 0.5, 0.47, scale=0.9)]
    if relation == "jump together":
        height = JUMP * _two_jumps(s)
        return [Track(s, 0.5 + dx - 0.2, floors[0] - height), Track(s, 0.5 + dx + 0.2, floors[1] - height)]
    if relation == "chase":
        lead = 0.5 + 0.24 * ramp
        return [on_ground(0, lead - 0.18, 1, 3), on_ground(1, lead + 0.18, 1, 3)]
    if relation == "pass":
        return [on_ground(0, 0.5 + 0.42 * ramp, 1), Track(s, 0.5, floors[1] - 0.10)]
    touch = (SIDE[shapes[0]] + SIDE[shapes[1]]) * PAIR_RADIUS / 2  # half the distance between their centres
    speed, restitution = 0.36, 0.75
    way_in = touch + speed * np.maximum(0.55 - s, 0)
    if relation == "collide":
        way_in = way_in + restitution * speed * np.maximum(s - 0.55, 0)
    return [on_ground(0, 0.5 - way_in, 1), on_ground(1, 0.5 + way_in, -1)]


def tracks(scene, frames):
    """The Track of each subject over `frames` frames, and its radius."""
    s = np.linspace(0, 1, frames)
    single = len(scene.subjects) == 1
    radii = [RADIUS[x.size] if single else PAIR_RADIUS for x in scene.subjects]
    if scene.relation:
        return list(zip(relate(scene.relation, s, scene.dx, [x.shape for x in scene.subjects]), radii))
    homes = [0.5 + scene.dx] if single else [home + scene.dx for home in PAIR_HOMES]
    return [(move(x.motion, s, home, 0.48 + scene.dy, r, floor_of(x.shape, r)), r)
            for x, home, r in zip(scene.subjects, homes, radii)]


# ---- backgrounds ---------------------------------------------------------------------------------------------------

def _gradient(size, stops):
    """[size, size, 3]: colours (y, r, g, b) interpolated from top to bottom."""
    y = (np.arange(size) + 0.5) / size
    stops = np.array(stops, float)
    column = np.stack([np.interp(y, stops[:, 0], stops[:, i]) for i in (1, 2, 3)], -1)
    return np.repeat(column[:, None], size, 1)


def _paint(canvas, distance, colour, opacity=1.0):
    """Blends `colour` into canvas [..., 3] where distance (pixels) is negative, smoothly over one pixel."""
    alpha = np.clip(0.5 - distance, 0, 1)[..., None] * opacity
    canvas += alpha * (np.asarray(colour, float) - canvas)


def _hills(canvas, level, height, waves, phase, colour):
    size = canvas.shape[0]
    y, x = (np.mgrid[:size, :size] + 0.5) / size
    _paint(canvas, (level - height * np.sin(waves * x * 2 * np.pi + phase) - y) * size, colour)


def _dots(canvas, seed, count, top, bottom, radius, colour, shift=0.0, opacity=1.0):
    """Round dots at fixed places between top and bottom; shift moves them down, wrapping round."""
    size = canvas.shape[0]
    y, x = (np.mgrid[:size, :size] + 0.5) / size
    places = np.random.default_rng(seed).uniform(0, 1, (count, 3))
    for px, py, scale in places:
        py = top + (bottom - top) * ((py + shift) % 1)
        _paint(canvas, (np.hypot(x - px, y - py) - radius * (0.7 + 0.6 * scale)) * size, colour, opacity)


def _plain(size, s):
    return _gradient(size, [(0, 200, 194, 182), (0.80, 190, 184, 174), (0.81, 164, 158, 150), (1, 172, 166, 158)])


def _night(size, s):
    c = _gradient(size, [(0, 18, 22, 52), (0.8, 52, 56, 104)])
    _dots(c, 1, 18, 0.02, 0.72, 0.011, (226, 222, 196))
    _hills(c, 0.80, 0.02, 1.0, 0.6, (38, 48, 66))
    return c


def _meadow(size, s):
    c = _gradient(size, [(0, 158, 206, 236), (0.75, 184, 214, 230)])
    _hills(c, 0.70, 0.03, 1.5, 0.0, (168, 202, 140))
    _hills(c, 0.79, 0.01, 1.0, 2.0, (140, 186, 108))
    _dots(c, 2, 9, 0.87, 0.98, 0.012, (238, 226, 180))
    return c


def _sunset(size, s):
    c = _gradient(size, [(0, 92, 74, 118), (0.45, 196, 126, 124), (0.76, 242, 186, 140)])
    y, x = (np.mgrid[:size, :size] + 0.5) / size
    _paint(c, (np.hypot(x - 0.74, y - 0.66) - 0.11) * size, (255, 226, 172))
    _hills(c, 0.80, 0.012, 1.0, 1.0, (98, 76, 92))
    return c


def _sea(size, s):
    c = _gradient(size, [(0, 104, 178, 192), (0.8, 38, 100, 132)])
    _hills(c, 0.82, 0.012, 1.5, 0.5, (150, 150, 122))
    _dots(c, 3, 9, 0.02, 0.78, 0.014, (168, 214, 220), shift=-s, opacity=0.7)
    return c


def _snow(size, s):
    c = _gradient(size, [(0, 140, 160, 188), (0.78, 162, 180, 204)])
    _hills(c, 0.79, 0.015, 1.0, 3.0, (186, 200, 222))
    _dots(c, 4, 14, 0.0, 1.0, 0.014, (226, 233, 242), shift=s)
    return c


def _desert(size, s):
    c = _gradient(size, [(0, 150, 196, 214), (0.75, 204, 212, 202)])
    _hills(c, 0.68, 0.04, 1.0, 1.2, (206, 176, 132))
    _hills(c, 0.79, 0.012, 1.5, 0.0, (222, 194, 148))
    return c


BACKGROUND = {"plain": _plain, "night": _night, "meadow": _meadow, "sunset": _sunset, "sea": _sea, "snow": _snow,
              "desert": _desert}


@functools.lru_cache(maxsize=32)
def background(name, size, frames):
    """float32 [F, size, size, 3]; what drifts in it (snow, bubbles) is one turn further at the end of the clip."""
    moving = name in ("sea", "snow")
    stills = [BACKGROUND[name](size, s) for s in (np.linspace(0, 1, frames) if moving else [0.0])]
    return np.broadcast_to(np.stack(stills), (frames, size, size, 3)).astype(np.float32)


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
        look = 0.14 * track.facing
        for side in (-0.31, 0.31):
            _paint(colour, (np.hypot(u - side - look, v + 0.42) - 0.25) * scale, (255, 255, 255))
            _paint(colour, (np.hypot(u - side - 1.6 * look, v + 0.42) - 0.13) * scale, OUTLINE_COLOUR)
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


def draw(scene, size=SIZE, frames=FRAMES):
    """uint8 [frames, size, size, 3]. The second subject is drawn first, so the first passes in front of it."""
    video = background(scene.background, size, frames) * np.float32(scene.light)
    for subject, (track, radius) in reversed(list(zip(scene.subjects, tracks(scene, frames)))):
        blend(video, subject_layer(subject, track, radius, size))
    return np.clip(video + 0.5, 0, 255).astype(np.uint8)
