"""Outlines of twelve everyday objects, each made of named parts, with random proportions.

A builder draws one object: a list of shapes, back to front, each with the name of the part that it shows. Nothing
here knows pixels, poses or colours; `scenes` adds those. The drawings are our own.

Shape legend: V vertices. Outlines are `(V, 2)` float64, (x, y) in a unit frame of about [-1, 1], x right and y down.
"""

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

Outline = NDArray[np.float64]  # (V, 2)
Shape = tuple[str, Outline, float]  # part name, outline, brightness relative to the part's colour
Uniform = Callable[[float, float], float]  # a random number between two bounds

# Which parts make which whole. "background" inside a builder cuts a hole.
CLASS_PARTS: dict[str, tuple[str, ...]] = {
    "bicycle": ("frame", "handlebar", "saddle", "wheel"),
    "boat": ("flag", "hull", "mast", "sail"),
    "car": ("body", "cabin", "light", "wheel", "window"),
    "cat": ("body", "ear", "eye", "head", "leg", "nose", "tail"),
    "face": ("ear", "eye", "hair", "head", "mouth", "nose"),
    "fish": ("body", "eye", "fin", "tail"),
    "flower": ("core", "leaf", "petal", "stem"),
    "house": ("chimney", "door", "roof", "wall", "window"),
    "robot": ("antenna", "arm", "eye", "head", "leg", "mouth", "torso"),
    "rocket": ("body", "cone", "fin", "flame", "window"),
    "train": ("boiler", "bumper", "cabin", "chimney", "light", "roof", "wheel", "window"),
    "tree": ("crown", "fruit", "trunk"),
}
CLASS_NAMES: tuple[str, ...] = tuple(CLASS_PARTS)
PART_NAMES: tuple[str, ...] = (
    "background",
    "occluder",
    *sorted({part for parts in CLASS_PARTS.values() for part in parts}),
)


def _points(*points: tuple[float, float]) -> Outline:
    return np.array(points, dtype=np.float64)


def _box(left: float, top: float, right: float, bottom: float) -> Outline:
    return _points((left, top), (right, top), (right, bottom), (left, bottom))


def _oval(x: float, y: float, radius_x: float, radius_y: float | None = None, *, turn: float = 0.0) -> Outline:
    """An ellipse, turned by `turn` radians."""
    angles = np.linspace(0, 2 * np.pi, 32, endpoint=False)
    along, across = radius_x * np.cos(angles), (radius_y or radius_x) * np.sin(angles)
    cos, sin = np.cos(turn), np.sin(turn)
    return np.stack([x + cos * along - sin * across, y + sin * along + cos * across], axis=-1)


def _stroke(width: float, line: Outline) -> Outline:
    """A line of constant width through the points."""
    direction = np.gradient(line, axis=0)
    normal = np.stack([-direction[:, 1], direction[:, 0]], axis=-1)
    normal *= width / 2 / np.sqrt((normal**2).sum(axis=-1, keepdims=True))
    return np.concatenate([line + normal, (line - normal)[::-1]])


def _house(u: Uniform) -> list[Shape]:
    wide, eaves, peak = u(0.6, 0.85), u(-0.2, 0.0), u(-0.95, -0.75)
    ridge, door, side = max(0.0, u(-0.4, 0.45)), u(-0.12, 0.12), 1 if u(-1, 1) > 0 else -1
    return [
        ("chimney", _box(side * 0.4 - 0.12, peak - 0.12, side * 0.4 + 0.12, eaves), 1.0),
        ("wall", _box(-wide, eaves, wide, 0.9), 1.0),
        ("roof", _points((-wide - 0.2, eaves), (-ridge, peak), (ridge, peak), (wide + 0.2, eaves)), 1.0),
        ("door", _box(door - 0.17, 0.9 - u(0.5, 0.62), door + 0.17, 0.9), 1.0),
        ("door", _oval(door + 0.1, 0.65, 0.04), 0.4),
        *(
            ("window", _box(x - size, 0.34 - size, x + size, 0.34 + size), shade)
            for x in (-wide * 0.64, wide * 0.64)
            for size, shade in ((0.16, 1.0), (0.1, 0.72))
        ),
    ]


def _car(u: Uniform) -> list[Shape]:
    back, front, top, size = u(-0.8, -0.5), u(0.15, 0.35), u(-0.62, -0.5), u(0.21, 0.26)
    post, low, high = u(-0.3, -0.1), -0.1, top + 0.1
    return [
        ("cabin", _points((back - 0.1, -0.04), (back + 0.1, top), (front, top), (front + 0.32, -0.04)), 1.0),
        ("window", _points((back + 0.06, low), (back + 0.17, high), (post - 0.04, high), (post - 0.04, low)), 1.0),
        ("window", _points((post + 0.04, low), (post + 0.04, high), (front - 0.04, high), (front + 0.16, low)), 1.0),
        ("body", _points((-1, 0.3), (-1, 0.0), (-0.92, -0.08), (0.72, -0.08), (0.97, 0.02), (1.02, 0.3)), 1.0),
        ("light", _oval(0.9, 0.08, 0.09), 1.0),
        *(("wheel", _oval(x, 0.32, r), s) for x in (-0.56, 0.56) for r, s in ((size, 1.0), (size * 0.5, 1.45))),
    ]


def _tree(u: Uniform) -> list[Shape]:
    thick, shapes = u(0.1, 0.16), list[Shape]()
    shapes.append(("trunk", _points((-thick, 0), (thick, 0), (thick * 1.5, 1), (-thick * 1.5, 1)), 1.0))
    if u(0, 1) < 0.5:  # a fir
        for wide, top, low in ((0.72, -0.35, 0.5), (0.58, -0.7, 0.1), (0.42, -1.0, -0.3)):
            shapes.append(("crown", _points((-wide, low), (0, top), (wide, low)), u(0.85, 1.1)))
        spots = [(-0.3, 0.33), (0.32, 0.3), (0.02, 0.08), (-0.17, -0.15), (0.14, -0.46)]
    else:
        for x, y, radius in ((-0.38, -0.08, 0.42), (0.38, -0.08, 0.42), (0, -0.2, 0.45), (0, -0.52, 0.45)):
            shapes.append(("crown", _oval(x, y, radius * u(0.9, 1.1)), u(0.88, 1.1)))
        spots = [(-0.42, -0.05), (0.42, -0.1), (0.02, 0.08), (-0.18, -0.5), (0.2, -0.6)]
    return shapes + [("fruit", _oval(x + u(-0.06, 0.06), y + u(-0.06, 0.06), 0.1), 1.0) for x, y in spots]


def _boat(u: Uniform) -> list[Shape]:
    mast, top, deck = u(-0.2, 0.1), u(-1.0, -0.85), 0.42
    return [
        ("mast", _box(mast - 0.05, top, mast + 0.05, 0.5), 1.0),
        ("sail", _points((mast + 0.09, top + 0.12), (mast + 0.09, 0.3), (mast + u(0.62, 0.8), 0.3)), 1.0),
        ("sail", _points((mast - 0.09, top + 0.34), (mast - 0.09, 0.3), (mast - u(0.45, 0.6), 0.3)), 0.85),
        ("flag", _points((mast, top - 0.16), (mast, top + 0.08), (mast - 0.36, top - 0.04)), 1.0),
        ("hull", _points((-1, deck), (1, deck), (0.66, 0.9), (-0.7, 0.9)), 1.0),
        ("hull", _points((-0.93, 0.52), (0.92, 0.52), (0.83, 0.64), (-0.85, 0.64)), 0.7),
    ]


def _face(u: Uniform) -> list[Shape]:
    wide, eye_x, eye_y, smile, long = u(0.66, 0.8), u(0.26, 0.34), u(-0.2, -0.08), u(-0.06, 0.2), u(-0.1, 0.75)
    x = np.linspace(-1, 1, 12)
    mouth = np.stack([x * u(0.3, 0.42), 0.5 + smile * (1 - x**2)], axis=-1)
    lip = mouth + np.stack([0 * x, 0.05 + 0.1 * (1 - x**2)], axis=-1)
    cap = [(np.cos(a) * (wide + 0.12), np.sin(a) * 1.05 - 0.02) for a in np.linspace(-np.pi, 0, 20)]
    return [
        ("hair", _points((-wide - 0.12, long), *cap, (wide + 0.12, long)), 0.85),
        *(("ear", _oval(side * (wide + 0.02), 0.06, 0.14, 0.2), 1.0) for side in (-1, 1)),
        ("head", _oval(0, 0.03, wide, 0.95), 1.0),
        ("hair", _points(*cap[3:-3], (0.1, u(-0.62, -0.45))), 1.0),
        *(("eye", _oval(s * eye_x, eye_y, r, r * 0.85), c) for s in (-1, 1) for r, c in ((0.16, 1.0), (0.08, 0.3))),
        ("nose", _points((0, -0.08), (0.14, 0.3), (-0.14, 0.3)), 1.0),
        ("mouth", np.concatenate([mouth, lip[::-1]]), 1.0),
    ]


def _flower(u: Uniform) -> list[Shape]:
    count, bend, turn, y = int(u(5, 8.99)), u(-0.2, 0.2), u(0, 1), -0.42
    reach, slim = u(0.34, 0.4), u(0.2, 0.24) * (6 / count) ** 0.5
    angles = 2 * np.pi * (np.arange(count) + turn) / count
    petals = [_oval(np.cos(a) * reach, y + np.sin(a) * reach, 0.26, slim, turn=a) for a in angles]
    return [
        ("stem", _stroke(0.12, _points((0, y), (bend * 0.6, 0.1), (bend * 0.8, 0.55), (bend * 0.4, 1.05))), 1.0),
        *(("leaf", _oval(bend * 0.8 + s * 0.3, u(0.5, 0.7), 0.3, 0.13, turn=s * u(-0.7, -0.3)), 1.0) for s in (-1, 1)),
        *(("petal", petal, 1.0 if i % 2 else 0.9) for i, petal in enumerate(petals)),
        ("core", _oval(0, y, u(0.2, 0.26)), 1.0),
    ]


def _robot(u: Uniform) -> list[Shape]:
    head, wide, lift = u(0.3, 0.42), u(0.36, 0.46), u(-0.25, 0.45)
    return [
        ("antenna", _box(-0.04, -1.0, 0.04, -0.7), 1.0),
        ("antenna", _oval(0, -1.0, 0.11), 1.0),
        *(("arm", _stroke(0.17, _points((s * wide, 0.0), (s * 0.72, 0.1), (s * 0.84, lift))), 1.0) for s in (-1, 1)),
        *(("arm", _oval(s * 0.84, lift, 0.13), 0.75) for s in (-1, 1)),
        *(("leg", _box(s * 0.22 - 0.11, 0.5, s * 0.22 + 0.11, 0.95), 1.0) for s in (-1, 1)),
        *(("leg", _box(s * 0.26 - 0.19, 0.88, s * 0.26 + 0.19, 1.04), 0.7) for s in (-1, 1)),
        ("torso", _box(-wide, -0.13, wide, 0.58), 1.0),
        ("torso", _box(-wide * 0.6, 0.04, wide * 0.6, 0.36), 0.72),
        ("head", _box(-head, -0.74, head, -0.17), 1.0),
        *(("eye", _oval(s * head * 0.5, -0.52, r), c) for s in (-1, 1) for r, c in ((0.12, 1.0), (0.06, 0.3))),
        ("mouth", _box(-head * 0.6, -0.34, head * 0.6, -0.24), 1.0),
    ]


def _fish(u: Uniform) -> list[Shape]:
    tall, fork = u(0.36, 0.5), u(-0.86, -0.72)
    return [
        ("tail", _points((-0.5, 0), (-1.05, -u(0.36, 0.5)), (fork, 0), (-1.05, u(0.36, 0.5))), 1.0),
        ("fin", _points((-0.3, -tall * 0.7), (-0.12, -tall - u(0.2, 0.34)), (0.34, -tall * 0.7)), 1.0),
        ("fin", _points((-0.2, tall * 0.7), (-0.28, tall + u(0.14, 0.24)), (0.2, tall * 0.7)), 1.0),
        ("body", _oval(0.12, 0, 0.75, tall), 1.0),
        ("body", _oval(-0.22, 0, 0.1, tall * 0.78), 0.72),
        ("body", _oval(0.08, 0, 0.1, tall * 0.9), 0.72),
        ("fin", _points((0.1, 0.05), (-0.2, 0.22), (0.12, 0.25)), 1.0),
        ("eye", _oval(0.53, -0.1, 0.12), 1.0),
        ("eye", _oval(0.56, -0.1, 0.06), 0.3),
    ]


def _rocket(u: Uniform) -> list[Shape]:
    wide, tip = u(0.24, 0.32), u(-1.05, -0.9)
    fins = [_points((s * wide, 0.1), (s * (wide + 0.32), 0.68), (s * wide * 0.9, 0.52)) for s in (-1, 1)]
    return [
        (
            "flame",
            _points((-0.24, 0.5), (-0.3, 0.8), (-0.13, 0.76), (0, 1.12), (0.13, 0.76), (0.3, 0.8), (0.24, 0.5)),
            1,
        ),
        ("flame", _points((-0.12, 0.5), (0, 0.92), (0.12, 0.5)), 1.5),
        *(("fin", fin, 1.0) for fin in fins),
        ("body", _points((-wide, -0.4), (wide, -0.4), (wide, 0.45), (0.2, 0.58), (-0.2, 0.58), (-wide, 0.45)), 1.0),
        ("body", _box(-wide, 0.26, wide, 0.38), 0.72),
        ("cone", _points((-wide, -0.4), (-wide * 0.62, -0.72), (0, tip), (wide * 0.62, -0.72), (wide, -0.4)), 1.0),
        *(("window", _oval(0, -0.12, radius), shade) for radius, shade in ((0.17, 1.0), (0.11, 0.72))),
    ]


def _bicycle(u: Uniform) -> list[Shape]:
    size, tilt = u(0.4, 0.47), u(-0.06, 0.06)
    rear, front, crank, seat, head = (
        (-0.6, 0.3),
        (0.62, 0.3),
        (-0.08, 0.32),
        (-0.28 + tilt, -0.34),
        (0.42 + tilt, -0.36),
    )
    wheels = list[Shape]()
    for x, y in (rear, front):
        wheels += [("wheel", _oval(x, y, size), 1.0), ("background", _oval(x, y, size - 0.12), 1.0)]
        wheels += [("wheel", _oval(x, y, 0.08), 1.0)]
    tubes = [(rear, crank), (crank, seat), (seat, head), (crank, head), (rear, seat), (head, front)]
    grip = u(0.1, 0.22)
    return [
        *wheels,
        *(("frame", _stroke(0.1, _points(*tube)), 1.0) for tube in tubes),
        ("frame", _oval(*crank, 0.12), 0.7),
        ("saddle", _points((-0.52, -0.46), (-0.06, -0.42), (-0.1, -0.34), (-0.5, -0.32)) + (tilt, 0.0), 1.0),
        ("handlebar", _stroke(0.12, _points(head, (0.4 + tilt, -0.58), (0.4 + tilt + grip, -0.64))), 1.0),
    ]


def _cat(u: Uniform) -> list[Shape]:
    curl, wide, y = u(-0.25, 0.3), u(0.42, 0.5), -0.42
    bend = np.linspace(0, 1, 12)
    tail = np.stack([0.3 + 0.45 * np.sin(bend * 2.6) + curl * bend**4, 0.85 - 0.85 * bend**1.5], axis=-1)
    ears = [_points((s * 0.42, y - 0.1), (s * u(0.38, 0.46), y - 0.58), (s * 0.08, y - 0.3)) for s in (-1, 1)]
    return [
        ("tail", _stroke(0.17, tail), 1.0),
        ("body", _oval(0, 0.42, wide, 0.58), 1.0),
        *(("leg", _oval(s * 0.17, 0.74, 0.13, 0.3), 1.0) for s in (-1, 1)),
        *(("ear", ear, 1.0) for ear in ears),
        ("head", _oval(0, y, 0.47, 0.4), 1.0),
        *(("eye", _oval(s * 0.2, y - 0.04, r, 0.13), c) for s in (-1, 1) for r, c in ((0.12, 1.0), (0.045, 0.25))),
        ("nose", _points((-0.1, y + 0.14), (0.1, y + 0.14), (0, y + 0.26)), 1.0),
    ]


def _train(u: Uniform) -> list[Shape]:
    top, funnel, stack = u(-0.3, -0.15), u(0.5, 0.66), u(-0.62, -0.5)
    funnel_low, funnel_high = (funnel - 0.09, funnel + 0.09), (funnel - 0.17, funnel + 0.17)
    stack_outline = _points(
        (funnel_high[0], stack), (funnel_high[1], stack), (funnel_low[1], top + 0.05), (funnel_low[0], top + 0.05)
    )
    return [
        ("chimney", stack_outline, 1.0),
        ("boiler", _box(-0.3, top, 0.86, 0.3), 1.0),
        ("boiler", _box(0.1, top, 0.2, 0.3), 0.7),
        ("cabin", _box(-0.95, -0.6, -0.2, 0.3), 1.0),
        ("window", _box(-0.78, -0.44, -0.38, -0.1), 1.0),
        ("roof", _box(-1.05, -0.74, -0.1, -0.58), 1.0),
        ("light", _oval(0.88, u(top + 0.12, 0.0), 0.11), 1.0),
        ("bumper", _points((0.78, 0.28), (0.86, 0.28), (1.12, 0.62), (0.78, 0.62)), 1.0),
        *(("wheel", _oval(x, 0.42, r), c) for x in (-0.72, -0.22, 0.28, 0.66) for r, c in ((0.21, 1.0), (0.1, 1.45))),
    ]


_BUILDERS: dict[str, Callable[[Uniform], list[Shape]]] = {
    "bicycle": _bicycle,
    "boat": _boat,
    "car": _car,
    "cat": _cat,
    "face": _face,
    "fish": _fish,
    "flower": _flower,
    "house": _house,
    "robot": _robot,
    "rocket": _rocket,
    "train": _train,
    "tree": _tree,
}


def draw_object(name: str, uniform: Uniform) -> list[Shape]:
    """One object of class `name` with random proportions: its shapes, back to front, in the unit frame."""
    return _BUILDERS[name](uniform)
