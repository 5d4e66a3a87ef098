"""Buildings as sprites: houses, flat roofs, halls; slopes are lit by the sun."""

import math

import numpy as np

from .canvas import Sprite, box, disc, pick, shades, turn

BUILDING = 73  # type_id of xView
ROOFS = [
    (0.53, 0.40, 0.34), (0.47, 0.37, 0.33), (0.47, 0.46, 0.45), (0.36, 0.36, 0.37),
    (0.60, 0.56, 0.49), (0.41, 0.42, 0.44),
]  # fmt: skip


def _pitched(canvas, heading, roof, length, width, x=0.0, y=0.0, hip=0.0):
    """Parts of a gabled (hip 0) or hipped roof, each slope lit by the sun."""
    a, b = length / 2, width / 2
    inner = a - hip * b
    slopes = [
        ([(-a, 0 - b), (a, -b), (inner, 0), (-inner, 0)], -math.pi / 2),
        ([(-a, b), (a, b), (inner, 0), (-inner, 0)], math.pi / 2),
    ]
    if hip:
        slopes.append(([(a, -b), (a, b), (inner, 0)], 0.0))
        slopes.append(([(-a, -b), (-a, b), (-inner, 0)], math.pi))
    parts = [(box(length, width, x, y), roof)]
    for points, facing in slopes:
        tone = shades(roof, canvas.lit(facing + heading, 0.24))
        parts.append((np.array(points) + (x, y), tone))
    parts.append((box(2 * inner, 0.9, x, y), shades(roof, 1.15)))
    return parts


def house(rng, canvas, heading, length, width):
    """A house with a pitched roof; some have a wing or a garage."""
    roof = pick(rng, ROOFS, None, 0.05)
    hip = float(rng.random() < 0.5)
    parts, outline = [], [box(length, width)]
    if rng.random() < 0.4:
        wing_length, wing_width = width * 0.9, length * rng.uniform(0.35, 0.45)
        x = (length - wing_width) / 2 * (1 if rng.random() < 0.5 else -1)
        y = width * 0.38 * (1 if rng.random() < 0.5 else -1)
        cross = _pitched(
            canvas, heading + math.pi / 2, roof, wing_length, wing_width, 0, 0, hip
        )
        parts = [(turn(p, math.pi / 2, (x, y)), c) for p, c in cross]
        outline.append(turn(box(wing_length, wing_width), math.pi / 2, (x, y)))
    parts = _pitched(canvas, heading, roof, length, width, 0, 0, hip)[:1] + parts
    parts += _pitched(canvas, heading, roof, length, width, 0, 0, hip)
    spot = (rng.uniform(-0.3, 0.3) * length, rng.uniform(-0.25, 0.25) * width)
    parts.append((box(2.4, 2.4, spot[0] + 0.8, spot[1] + 0.8), shades(roof, 0.5)))
    parts.append((box(2.4, 2.4, *spot), shades(roof, 1.3)))
    if rng.random() < 0.15:  # solar panels
        x = rng.uniform(-0.2, 0.2) * length
        parts.append(
            (box(length * 0.35, width * 0.3, x, width * 0.24), (0.13, 0.16, 0.25))
        )
    return Sprite(parts, outline, rng.uniform(13, 20))


def flat_roof(rng, canvas, heading, length, width, height=None, tone=None):
    """A large building with a flat roof, parapet, vents; some are L-shaped."""
    tones = [
        (0.74, 0.73, 0.70),
        (0.60, 0.59, 0.56),
        (0.48, 0.47, 0.46),
        (0.66, 0.61, 0.54),
    ]
    roof = tone or pick(rng, tones, None, 0.05)
    rects = [box(length, width)]
    if rng.random() < 0.4:
        a, b = length / 2, width / 2
        cut_x, cut_y = length * rng.uniform(0.35, 0.55), width * rng.uniform(0.35, 0.55)
        flip = np.array([rng.choice([-1, 1]), rng.choice([-1, 1])])
        rects = [
            np.array([(-a, -b), (a, -b), (a, b - cut_y), (-a, b - cut_y)]) * flip,
            np.array([(-a, -b), (a - cut_x, -b), (a - cut_x, b), (-a, b)]) * flip,
        ]
    parts = [(r, shades(roof, 1.14)) for r in rects]
    toward = math.atan2(canvas.sun[1], canvas.sun[0]) - heading
    step = (1.6 * math.cos(toward), 1.6 * math.sin(toward))

    def inset(r, by):
        middle = (r.max(0) + r.min(0)) / 2
        size = r.max(0) - r.min(0)
        return (r - middle) * ((size - 2 * by) / size) + middle

    parts += [(inset(r, 1.4), shades(roof, 0.66)) for r in rects]
    for i, r in enumerate(rects):  # the parapet's shade stays on the sunny side
        grow = inset(r, 1.4)
        low, high = grow.min(0), grow.max(0)
        shift = np.clip(grow + step, low, high)
        parts.append((shift if i == 0 else shift, roof))
    for _ in range(int(rng.integers(0, 3))):
        size = rng.uniform(0.12, 0.3, 2) * (length, width)
        spot = rng.uniform(-0.28, 0.28, 2) * (length, width) * (1, 0.6)
        parts.append(
            (_inside(box(*size, *spot), rects), shades(roof, rng.uniform(0.9, 1.1)))
        )
    for _ in range(int(length * width / 450) + 1):
        base = rects[int(rng.integers(len(rects)))]
        low, high = base.min(0) + 6, base.max(0) - 6
        if np.any(high <= low):
            continue
        spot, size = rng.uniform(low, high), rng.uniform(2.2, 6.0, 2)
        grey = rng.uniform(0.62, 0.86)
        parts.append((box(*size, *(spot + np.array(step) * 1.3)), shades(roof, 0.58)))
        parts.append((box(*size, *spot), (grey, grey, grey)))
    return Sprite(parts, rects, height or rng.uniform(16, 34))


def _inside(polygon, rects):
    low, high = rects[0].min(0) + 2, rects[0].max(0) - 2
    return np.clip(polygon, low, high)


def warehouse(rng, canvas, heading, length, width):
    """A long hall: a shallow pitched metal roof with ribs and skylights."""
    tones = [
        (0.72, 0.73, 0.73),
        (0.56, 0.60, 0.64),
        (0.64, 0.56, 0.48),
        (0.46, 0.51, 0.49),
    ]
    roof = pick(rng, tones, None, 0.04)
    a, b = length / 2, width / 2
    parts = [(box(length, width), roof)]
    for side, facing in ((-1, -math.pi / 2), (1, math.pi / 2)):
        tone = shades(roof, canvas.lit(facing + heading, 0.09))
        parts.append((box(length, b, 0, side * b / 2), tone))
        for i in range(1, int(length / 7)):
            parts.append((box(0.7, b, -a + i * 7, side * b / 2), shades(tone, 0.94)))
        if rng.random() < 0.6:
            for i in range(1, int(length / 21)):
                parts.append(
                    (box(5, b * 0.4, -a + i * 21, side * b / 2), shades(tone, 1.16))
                )
    parts.append((box(length, 1.4), shades(roof, 1.15)))
    for _ in range(int(rng.integers(0, 4))):
        spot = rng.uniform(-0.4, 0.4, 2) * (length, width)
        parts.append((box(3, 3, spot[0] + 1, spot[1] + 1), shades(roof, 0.55)))
        parts.append((disc(1.6, *spot, corners=12), (0.85, 0.85, 0.85)))
    return Sprite(parts, [box(length, width)], rng.uniform(16, 24))
