"""Vehicles, aircraft, ships, containers and tanks as sprites, in pixels of 0.3 m.

Local coordinates: x forward, y to the left, the middle at 0, 0.
"""

import math

import cv2
import numpy as np

from .canvas import Sprite, box, disc, mirror, pick, rounded, shades, turn

# type_ids of xView
SMALL_AIRCRAFT, CARGO_PLANE, SMALL_CAR, BUS, BOX_TRUCK = 12, 13, 18, 19, 25
VESSEL, MOTORBOAT, TANK, CONTAINER = 40, 41, 86, 91

CAR_PAINTS = [
    (0.86, 0.86, 0.84), (0.70, 0.71, 0.72), (0.13, 0.13, 0.15), (0.33, 0.34, 0.36),
    (0.55, 0.14, 0.13), (0.17, 0.25, 0.44), (0.62, 0.55, 0.43), (0.20, 0.33, 0.30),
]  # fmt: skip
GLASS = (0.10, 0.12, 0.15)
CONTAINER_PAINTS = [
    (0.51, 0.25, 0.19), (0.21, 0.33, 0.46), (0.28, 0.41, 0.33), (0.68, 0.42, 0.22),
    (0.70, 0.70, 0.67), (0.41, 0.22, 0.22), (0.24, 0.43, 0.46),
]  # fmt: skip


def car(rng):
    """A small car, 12 to 17 px long (4 to 5 m)."""
    length, width = rng.uniform(12.5, 16.5), rng.uniform(5.8, 7.0)
    paint_ = pick(rng, CAR_PAINTS, [30, 18, 17, 8, 9, 8, 5, 3])
    body = rounded(length, width, 1.5)
    parts = [
        (body, shades(paint_, 0.86)),
        (rounded(length - 1.6, width - 1.6, 1.0), paint_),
        (box(length * 0.53, width - 1.8, -0.06 * length), GLASS),
        (box(length * 0.33, width - 2.2, -0.07 * length), shades(paint_, 1.06)),
    ]
    return Sprite(parts, [body], rng.uniform(4.5, 6.0))


def bus(rng):
    """A bus or coach, 36 to 42 px long."""
    length, width = rng.uniform(36, 42), rng.uniform(8.8, 9.8)
    paints = [
        (0.87, 0.70, 0.20),
        (0.78, 0.22, 0.18),
        (0.22, 0.42, 0.62),
        (0.30, 0.52, 0.34),
    ]
    paint_ = pick(rng, paints, [4, 2, 2, 1])
    body = rounded(length, width, 1.2)
    parts = [
        (body, shades(paint_, 0.85)),
        (box(length - 2, width - 2.2), paint_),
        (box(2.2, width - 1.6, length / 2 - 1.8), GLASS),
        (box(length * 0.7, 1.6, -1), shades(paint_, 1.18)),
    ]
    for x in (-0.28, 0.02, 0.27):
        grey = rng.uniform(0.72, 0.86)
        parts.append((box(4.6, 4.2, x * length), (grey, grey, grey)))
    return Sprite(parts, [body], 10)


def box_truck(rng):
    """A tractor with a box trailer, 47 to 55 px long."""
    length, width = rng.uniform(47, 55), rng.uniform(8.6, 9.4)
    cab = 10.5
    trailer_length = length - cab - 2.2
    x = -length / 2 + trailer_length / 2
    white = pick(rng, [(0.88, 0.88, 0.86), (0.74, 0.75, 0.75)], [4, 1], 0.04)
    paint_ = pick(rng, [(0.85, 0.85, 0.84), (0.62, 0.16, 0.14), (0.17, 0.30, 0.52)])
    trailer, nose = (
        box(trailer_length, width, x),
        rounded(cab, 8, 1.2, length / 2 - cab / 2),
    )
    parts = [
        (box(length - 4, 4), (0.2, 0.2, 0.2)),
        (trailer, shades(white, 0.88)),
        (box(trailer_length - 1.4, width - 1.8, x), white),
    ]
    for i in range(1, 6):
        rib = x - trailer_length / 2 + i * trailer_length / 6
        parts.append((box(0.6, width - 1.8, rib), shades(white, 0.9)))
    parts += [
        (nose, paint_),
        (box(2.2, 6.6, length / 2 - 2.6), GLASS),
        (box(4.4, 6.2, length / 2 - 6.8), shades(paint_, 1.08)),
    ]
    return Sprite(parts, [trailer, nose, box(length - 4, 4)], 12)


def container(rng, length=None):
    """A shipping container of 20 or 40 feet: 20.3 or 40.6 px by 8.2 px."""
    length = length or (20.3, 40.6)[int(rng.integers(2))]
    paint_ = pick(rng, CONTAINER_PAINTS, [4, 4, 2, 2, 2, 2, 2], 0.05)
    body = box(length, 8.2)
    parts = [(body, shades(paint_, 0.82)), (box(length - 1.6, 6.8), paint_)]
    for i in range(1, int(length / 2.5)):
        rib = -length / 2 + i * 2.5
        parts.append((box(0.7, 6.8, rib), shades(paint_, 0.86)))
    return Sprite(parts, [body], 8.6)


def tank(rng, canvas, heading, radius):
    """A storage tank: a cone roof with seams, or a floating roof in its own shade."""
    grey = rng.uniform(0.74, 0.88)
    base = pick(rng, [(grey, grey, grey * 0.97), (0.66, 0.60, 0.50)], [4, 1], 0.02)
    height = rng.uniform(10, 20)
    parts = [(disc(radius), shades(base, 0.72)), (disc(radius - 1.2), base)]
    toward = math.atan2(canvas.sun[1], canvas.sun[0]) - heading
    if rng.random() < 0.45:
        deep = min(radius * 0.5, rng.uniform(3, 9))
        x, y = deep * math.cos(toward), deep * math.sin(toward)
        parts.append((disc(radius - 2), shades(base, 0.52)))
        # What the rim's shadow leaves in light is a lens: both discs' intersection.
        lens = cv2.intersectConvexConvex(
            disc(radius - 2).astype(np.float32),
            disc(radius - 2, x, y).astype(np.float32),
        )[1][:, 0]
        parts.append((lens, shades(base, 0.93)))
    else:
        steps = 20
        for i in range(steps):
            a, b = (2 * math.pi * (i + j) / steps for j in (0, 1))
            rim = radius - 1.8
            wedge = [(0, 0)] + [(rim * math.cos(t), rim * math.sin(t)) for t in (a, b)]
            light = 1 - 0.13 * math.cos((a + b) / 2 - toward)
            parts.append((np.array(wedge), shades(base, light)))
        parts.append((disc(1.8), shades(base, 0.7)))
    angle = rng.uniform(0, 2 * math.pi)
    x, y = radius * 0.55 * math.cos(angle), radius * 0.55 * math.sin(angle)
    parts.append((turn(box(radius * 0.8, 1.2), angle, (x, y)), shades(base, 0.6)))
    return Sprite(parts, [disc(radius)], height)


def cargo_plane(rng):
    """A jet with swept wings, 58 to 80 px long."""
    size = rng.uniform(58, 80)
    s = size / 80
    white = pick(
        rng, [(0.90, 0.90, 0.90), (0.80, 0.81, 0.82), (0.66, 0.68, 0.69)], [5, 2, 1]
    )
    tail = pick(rng, [(0.16, 0.26, 0.50), (0.62, 0.14, 0.14), (0.85, 0.60, 0.2), white])
    body = np.array(
        [(40, 0), (38, 2), (34, 3.6), (26, 4.2), (-18, 4.2), (-32, 2.2), (-40, 0.7)]
    )
    body = np.concatenate([body, mirror(body[1:])[::-1]]) * s
    wing = np.array([(11, 3), (-13, 37), (-18, 37), (-8, 3)]) * s
    fin = np.array([(-29, 1), (-37, 13), (-40, 13), (-37, 1)]) * s
    engine = box(8 * s, 3.6 * s, 1.5 * s, 13 * s)
    parts = []
    for side in (np.asarray, mirror):
        parts += [
            (side(engine), (0.45, 0.46, 0.48)),
            (side(wing), shades(white, 0.86)),
            (
                side(np.array([(-7, 4), (-15, 34), (-17, 35), (-8, 4)]) * s),
                shades(white, 0.72),
            ),
            (side(fin), shades(white, 0.85)),
        ]
    parts += [
        (body, shades(white, 0.93)),
        (body * (0.97, 0.5), shades(white, 1.08)),
        (box(2 * s, 4.4 * s, 36 * s), GLASS),
        (np.array([(-26, 0.8), (-38, 1.0), (-38, -1.0), (-26, -0.8)]) * s, tail),
    ]
    outline = [body]
    for polygon in (engine, wing, fin):
        outline += [polygon, mirror(polygon)]
    return Sprite(parts, outline, 9 * s)


def small_aircraft(rng):
    """A propeller aircraft with straight wings, span 30 to 38 px."""
    s = rng.uniform(30, 38) / 36
    white = pick(rng, [(0.90, 0.90, 0.88), (0.86, 0.80, 0.62)], [4, 1])
    trim = pick(rng, [(0.62, 0.16, 0.15), (0.16, 0.28, 0.52), (0.2, 0.4, 0.3), white])
    body = np.array([(12, 0), (10, 2.0), (2, 2.4), (-13, 0.9)])
    body = np.concatenate([body, mirror(body)[::-1]]) * s
    wing = box(5.4 * s, 36 * s, 3.2 * s)
    fin = box(3.4 * s, 12 * s, -12 * s)
    parts = [
        (wing, shades(white, 0.96)),
        (box(5.4 * s, 4 * s, 3.2 * s, 16 * s), trim),
        (box(5.4 * s, 4 * s, 3.2 * s, -16 * s), trim),
        (box(1 * s, 28 * s, 1.2 * s), shades(white, 0.8)),
        (fin, shades(white, 0.92)),
        (body, white),
        (box(15 * s, 0.9 * s, -4 * s), trim),
        (box(3 * s, 3.2 * s, 6 * s), GLASS),
    ]
    return Sprite(parts, [body, wing, fin], 5 * s)


def vessel(rng):
    """A coaster, ferry or fishing ship, 60 to 92 px long."""
    length = rng.uniform(60, 92)
    width = rng.uniform(0.17, 0.21) * length
    a, b = length / 2, width / 2
    hull_paint = pick(
        rng,
        [(0.30, 0.16, 0.14), (0.16, 0.20, 0.28), (0.24, 0.32, 0.30), (0.62, 0.62, 0.6)],
    )
    deck = pick(rng, [(0.48, 0.30, 0.24), (0.42, 0.46, 0.44), (0.55, 0.53, 0.48)])
    white = (0.88, 0.88, 0.86)
    half = np.array(
        [(a, 0), (a * 0.86, b * 0.55), (a * 0.62, b), (-a * 0.93, b), (-a, b * 0.8)]
    )
    hull = np.concatenate([half, mirror(half[1:])[::-1]])
    parts = [(hull, hull_paint), (hull * (0.97, 0.84), deck)]
    house = box(length * 0.17, width * 0.82, -a * 0.70)
    parts += [
        (box(length * 0.19, width * 0.82, -a * 0.68), shades(deck, 0.55)),
        (house, white),
        (box(length * 0.05, width * 0.9, -a * 0.62), shades(white, 0.93)),
        (box(length * 0.05, width * 0.3, -a * 0.78), pick(rng, CONTAINER_PAINTS)),
    ]
    if rng.random() < 0.5:  # deck cargo
        for i in range(5):
            for j in (-1, 0, 1):
                if rng.random() < 0.85:
                    spot = -a * 0.42 + i * length * 0.125 + length * 0.06
                    load = box(length * 0.115, width * 0.24, spot, j * width * 0.25)
                    parts.append((load, pick(rng, CONTAINER_PAINTS)))
    else:  # hatches
        for i in range(3):
            spot = -a * 0.34 + i * length * 0.21 + length * 0.06
            hatch = shades(deck, rng.uniform(1.15, 1.4))
            parts.append((box(length * 0.18, width * 0.6, spot), shades(deck, 0.62)))
            parts.append((box(length * 0.165, width * 0.52, spot), hatch))
            parts.append(
                (
                    box(length * 0.012, width * 0.78, spot + length * 0.1),
                    (0.8, 0.75, 0.4),
                )
            )
    parts.append((box(length * 0.03, width * 0.3, a * 0.78), shades(deck, 0.7)))
    return Sprite(parts, [hull], 7)


def motorboat(rng):
    """A motorboat, 17 to 27 px long."""
    length = rng.uniform(17, 27)
    a, b = length / 2, length * rng.uniform(0.15, 0.19)
    white = pick(rng, [(0.92, 0.92, 0.90), (0.84, 0.83, 0.80)], [3, 1])
    half = np.array([(a, 0), (a * 0.6, b * 0.7), (a * 0.15, b), (-a, b * 0.9)])
    hull = np.concatenate([half, mirror(half[1:])[::-1]])
    inside = pick(rng, [(0.52, 0.40, 0.28), (0.30, 0.33, 0.38), (0.60, 0.56, 0.50)])
    parts = [
        (hull, shades(white, 0.86)),
        (hull * (0.92, 0.74), white),
        (box(a * 0.75, b * 1.25, -a * 0.52), inside),
        (box(a * 0.2, b * 1.4, 0.02 * a), GLASS),
        (box(a * 0.14, b * 0.7, -a * 0.92), (0.15, 0.15, 0.16)),
    ]
    return Sprite(parts, [hull], 3)
