"""Airport, coast and desert: what fills a whole row of a scene, or all of it.

The functions are called as those of `quarters`.
"""

import math

import cv2
import numpy as np

from . import buildings, vehicles
from .canvas import Sprite, blend, box, coverage, noise, paint, pick, shades, turn
from .quarters import CONCRETE, YELLOW


def airport(scene, rect):
    """Runway, taxiway, apron with airliners, a corner for small aircraft."""
    rng = scene.rng
    scene.meadow(rect, shades(scene.climate["grass"], 1.05), 0.35)
    # Keep it all in the picture where the row reaches over the scene's border.
    half = scene.height / 2
    u0, v0, u1, v1 = rect[0], max(rect[1], -half), rect[2], min(rect[3], half)
    deep = v1 - v0
    runway = (u0, v0 + deep * 0.05, u1, v0 + deep * 0.05 + 84)
    taxi = (u0, runway[3] + deep * 0.09, u1, runway[3] + deep * 0.09 + 34)
    scene.fill((u0, runway[1] - 8, u1, runway[3] + 8), (0.46, 0.455, 0.44), 0.12)
    scene.fill(runway, (0.33, 0.33, 0.34), 0.10)
    middle = (runway[1] + runway[3]) / 2
    marks = [
        (u0, runway[1] + 3, u1, runway[1] + 5.5),
        (u0, runway[3] - 5.5, u1, runway[3] - 3),
    ]
    marks += [(u, middle - 1.5, u + 60, middle + 1.5) for u in np.arange(u0, u1, 105)]
    end = -scene.width / 2 + scene.width * 0.18
    for k in range(4):
        for side in (-1, 1):
            o = middle + side * (9 + k * 7)
            marks.append((end, o - 2, end + 62, o + 2))
            if k < 3:
                marks.append((end + 150, o - 2, end + 190, o + 2))
    scene.lines(marks, (0.85, 0.85, 0.83), 0.8)
    for _ in range(26):
        u, o = end + 170 + rng.exponential(110), middle + rng.normal(0, 8)
        scene.fill(
            (u, o - 1.2, u + rng.uniform(40, 120), o + 1.2), (0.16, 0.16, 0.17), 0, 0.22
        )
    joint = (0.44, 0.44, 0.43)
    scene.fill(taxi, joint, 0.08)
    for u in (-scene.width * 0.27, scene.width * 0.22):
        scene.fill((u - 18, runway[3] - 2, u + 18, taxi[1] + 2), joint, 0.08)
        scene.lines([(u - 0.8, runway[3], u + 0.8, taxi[3] - 16)], YELLOW)
    scene.lines(
        [(u0, (taxi[1] + taxi[3]) / 2 - 0.8, u1, (taxi[1] + taxi[3]) / 2 + 0.8)], YELLOW
    )
    apron = (u0, taxi[3] + 8, u1, v1 - 58)
    scene.fill(apron, pick(rng, [(0.63, 0.62, 0.60), (0.57, 0.57, 0.56)]), 0.08)
    slabs = [(u, apron[1], u + 0.7, apron[3]) for u in np.arange(u0, u1, 22)]
    slabs += [(u0, v, u1, v + 0.7) for v in np.arange(apron[1], apron[3], 22)]
    scene.lines(slabs, (0.46, 0.46, 0.45), 0.5)
    scene.fill((u0, v1 - 58, u1, v1), (0.50, 0.49, 0.47), 0.12)
    split = scene.width * rng.uniform(0.20, 0.26)
    scene.later.append(lambda: _apron(scene, apron, split, v1))


def _apron(scene, apron, split, v1):
    rng = scene.rng
    u0, top, u1, bottom = apron
    leads = []
    for u in np.arange(u0 + 50, split - 40, 88):
        v = bottom - 50
        if not scene.visible(u, v):
            continue
        leads.append((u - 0.6, top, u + 0.6, bottom - 8))
        angle = math.pi / 2 + rng.normal(0, 0.03)
        if rng.random() < 0.93:
            scene.put(
                vehicles.cargo_plane(rng), u, v, angle, vehicles.CARGO_PLANE, 2, 2
            )
    for u in np.arange(u0 + 90, split - 40, 118):
        v = top + 44
        if bottom - top > 172 and scene.visible(u, v) and rng.random() < 0.85:
            angle = rng.choice([0.0, math.pi]) + rng.normal(0, 0.05)
            scene.put(
                vehicles.cargo_plane(rng), u, v, angle, vehicles.CARGO_PLANE, 2, 2
            )
    scene.lines(leads, YELLOW, 0.7)
    _small_planes(scene, apron, split)
    _hangars(scene, (u0, v1 - 30, u1), split)
    for _ in range(16):
        u, v = rng.uniform(u0, split), bottom - rng.uniform(4, 10)
        if scene.visible(u, v):
            scene.car(u, v, 0.0)


def _small_planes(scene, apron, split):
    rng = scene.rng
    _, top, u1, bottom = apron
    for v in np.arange(top + 26, bottom - 16, 44):
        for u in np.arange(split + 26, u1 - 14, 46):
            if scene.visible(u, v) and rng.random() < 0.7:
                angle = rng.choice([-1, 1]) * math.pi / 2 + rng.normal(0, 0.25)
                scene.put(
                    vehicles.small_aircraft(rng),
                    u,
                    v,
                    angle,
                    vehicles.SMALL_AIRCRAFT,
                    2,
                    2,
                )


def _hangars(scene, row, split):
    rng = scene.rng
    u0, v, u1 = row
    u = u0 + 10
    while u < u1 - 70:
        wide = rng.uniform(60, 100)
        kind = buildings.flat_roof if u < split else buildings.warehouse
        sprite = kind(rng, scene.canvas, scene.theta, wide, 40)
        scene.put(sprite, u + wide / 2, v, 0, buildings.BUILDING, 3)
        for k in range(3):
            scene.car(u + wide + 8 + 10 * k, v + 10, math.pi / 2)
        u += wide + rng.uniform(40, 60)


def coast(scene, rect):
    """A quay with piers, a marina, open water."""
    rng = scene.rng
    u0, v0, u1, v1 = rect
    edge = v0 + 62
    scene.fill((u0, v0, u1, edge + 3), CONCRETE, 0.14)
    # The natural shore on one side of the quay bulges into the water.
    start = scene.width * rng.uniform(0.20, 0.28)
    shore, phases = [], rng.uniform(0, 2 * math.pi, 3)
    for u in np.arange(u0, u1 + 1, 6):
        if u < start:
            shore.append((u, edge))
        else:
            near = min(1.0, (u - start) / 60)
            wave = sum(
                size * math.sin(u / period + phase)
                for size, period, phase in zip(
                    (20, 9, 4), (61, 23, 9), phases, strict=True
                )
            )
            shore.append((u, edge + near * (55 + wave)))
    far = [(u1, v1 + 60), (u0, v1 + 60)]
    centre = (scene.width / 2, scene.height / 2)
    water = turn(shore + far, scene.theta, centre)
    sand = turn(
        [(u, v - (0 if u < start else 16)) for u, v in shore] + far, scene.theta, centre
    )
    bulge = [(u, v + 4) for u, v in shore[::-1] if u > start]
    beach = turn([(start, edge), (u1, edge)] + bulge, scene.theta, centre)
    paint(scene.canvas, [beach], scene.climate["grass"], 1, 0.25)
    paint(scene.canvas, [sand], (0.66, 0.59, 0.46), 1, 0.12)
    _water(scene, water)
    piers, u = [], -scene.width / 2 + 60
    while u < start - 70:
        if scene.visible(u, edge + 90, 60):
            piers.append((u - 13, edge - 4, u + 13, edge + rng.uniform(150, 190)))
        u += rng.uniform(115, 135)
    floats, u = [], start + 60
    while u < u1 - 30:
        if scene.visible(u, edge + 190, 40):
            floats.append((u - 2, edge + 118, u + 2, edge + 262))
        u += 62
    scene.later.append(lambda: _moor(scene, rect, edge, piers, floats, start))


def _water(scene, polygon):
    h, w = scene.height, scene.width
    mask = coverage([polygon], 0, 0, w, h)
    wobble = noise(scene.rng, h, w, 16, 3)
    small = cv2.resize(mask, (w // 8, h // 8), interpolation=cv2.INTER_AREA)
    near = cv2.resize(
        cv2.GaussianBlur(small, (31, 31), 7),
        (w, h),
        interpolation=cv2.INTER_LINEAR_EXACT,
    ).astype(np.float32) / np.float32(255)
    deep = np.clip((near - 0.5) * 2 + 0.10 * scene.coarse, 0, 1)[..., None]
    shallow = np.array((0.33, 0.42, 0.40), np.float32)
    abyss = np.array((0.15, 0.235, 0.275), np.float32)
    tone = shallow + (abyss - shallow) * deep.astype(np.float32)
    # Ripples, drawn out along the wind.
    ripple = np.repeat(noise(scene.rng, h, -(-w // 2), 8, 4, 0.8), 2, 1)[:, :w]
    light = 1 + 0.05 * ripple + 0.05 * wobble + 0.05 * scene.coarse + 0.03 * scene.fine
    tone *= light[..., None]
    a = mask.astype(np.float32)[..., None] / np.float32(255)
    scene.canvas.image += a * (tone.astype(np.float32) - scene.canvas.image)
    rim = cv2.subtract(cv2.dilate(mask, np.ones((3, 3), np.uint8)), mask)
    blend(scene.canvas, rim, (0.72, 0.72, 0.68), 0.35, 0.3, 0, 0)


def _moor(scene, rect, edge, piers, floats, start):
    u0, _, u1, v1 = rect
    for r in piers:
        length, width = r[3] - r[1], r[2] - r[0]
        deck, top = box(length, width), box(length, width - 5)
        parts = [(deck, (0.56, 0.55, 0.52)), (top, (0.62, 0.61, 0.58))]
        sprite = Sprite(parts, [deck], 5)
        scene.put(sprite, (r[0] + r[2]) / 2, (r[1] + r[3]) / 2, math.pi / 2, None, 0, 0)
    for r in floats:
        sprite = Sprite(
            [(box(r[3] - r[1], 4), (0.66, 0.63, 0.57))], [box(r[3] - r[1], 4)], 1
        )
        scene.put(sprite, (r[0] + r[2]) / 2, (r[1] + r[3]) / 2, math.pi / 2, None, 0, 0)
        _boats(scene, r)
    for r in piers:
        for side in (-1, 1):
            _vessels(scene, r, side)
    _on_the_quay(scene, (u0, edge), start)
    _at_sea(scene, (u0, edge + 235, u1, v1))


def _boats(scene, r):
    """Motorboats on both sides of a float."""
    rng = scene.rng
    for v in np.arange(r[1] + 8, r[3] - 4, 13):
        for side in (-1, 1):
            if rng.random() < 0.62:
                boat = vehicles.motorboat(rng)
                half = float(boat.outline[0][:, 0].max())
                u = (r[0] + r[2]) / 2 + side * (half + 4)
                angle = rng.normal(0 if side > 0 else math.pi, 0.05)
                scene.put(boat, u, v, angle, vehicles.MOTORBOAT, 1, 0.5)


def _vessels(scene, r, side):
    """Vessels along one side of a pier."""
    rng = scene.rng
    v = r[1] + 14
    while v < r[3] + 10:
        sprite = vehicles.vessel(rng)
        long = sprite.outline[0][:, 0].max() * 2
        wide = sprite.outline[0][:, 1].max() * 2
        u = (r[0] if side < 0 else r[2]) + side * (wide / 2 + 3)
        if rng.random() < 0.85:
            angle = rng.choice([-1, 1]) * math.pi / 2 + rng.normal(0, 0.01)
            scene.put(sprite, u, v + long / 2, angle, vehicles.VESSEL, 1, 0.5)
        v += long + 10


def _on_the_quay(scene, corner, start):
    rng = scene.rng
    u0, edge = corner
    for _ in range(60):
        u, v = rng.uniform(u0 + 20, start), edge - rng.uniform(8, 50)
        if scene.visible(u, v):
            if rng.random() < 0.35:
                scene.put(vehicles.container(rng), u, v, 0, vehicles.CONTAINER, 2, 3)
            elif rng.random() < 0.25:
                scene.put(vehicles.box_truck(rng), u, v, 0, vehicles.BOX_TRUCK, 1, 2)
            else:
                scene.car(u, v, 0.0)


def _at_sea(scene, rect):
    rng = scene.rng
    u0, v0, u1, v1 = rect
    for _ in range(int(rng.integers(10, 16))):
        u, v = rng.uniform(u0, u1), rng.uniform(v0, v1)
        angle = rng.uniform(0, 2 * math.pi)
        if not scene.visible(u, v, -30):
            continue
        ship = rng.random() < 0.4
        sprite = vehicles.vessel(rng) if ship else vehicles.motorboat(rng)
        if scene.put(
            sprite, u, v, angle, vehicles.VESSEL if ship else vehicles.MOTORBOAT, 1, 40
        ):
            _wake(scene, sprite, u, v, angle)


def _wake(scene, sprite, u, v, angle):
    """Foam behind the stern and two thin arms, fading out in short steps."""
    a = float(sprite.outline[0][:, 0].max())
    wide = float(sprite.outline[0][:, 1].max())
    reach, steps = a * scene.rng.uniform(2.0, 4.0), 14
    centre = scene.at(u, v)
    foam, arms = (0.80, 0.82, 0.82), (0.62, 0.68, 0.70)
    for i in range(steps):
        x0, x1 = (-a * 0.9 - reach * (i + j) / steps for j in (0, 1))
        fade = (1 - i / steps) ** 1.5
        w0, w1 = (wide * (0.7 + 0.9 * (i + j) / steps) for j in (0, 1))
        quad = [(x0, -w0), (x1, -w1), (x1, w1), (x0, w0)]
        tail = turn(quad, scene.theta + angle, centre)
        paint(scene.canvas, [tail], foam, 0.5 * fade, 0.9)
        for side in (-1, 1):
            y0, y1 = (side * (wide + 0.22 * reach * (i + j) / steps) for j in (0, 1))
            arm = [(x0, y0 - 1), (x1, y1 - 1.3), (x1, y1 + 1.3), (x0, y0 + 1)]
            lines = turn(arm, scene.theta + angle, centre)
            paint(scene.canvas, [lines], arms, 0.4 * fade, 0.9)


def desert(scene):
    """Dunes, dry washes and a track; nothing to label."""
    h, w, rng = scene.height, scene.width, scene.rng
    yy, xx = np.mgrid[0:h, 0:w]
    c, s = math.cos(scene.theta), math.sin(scene.theta)
    across = xx * c + yy * s + 46.0 * scene.coarse + 6.0 * scene.middle
    dune = np.mod(across, 74.0) / 74.0
    ridge = np.where(dune < 0.78, dune / 0.78, (1 - dune) / 0.22).astype(np.float32)
    slope = np.where(dune < 0.78, 1.06, 0.80).astype(np.float32)
    sand = np.array((0.70, 0.58, 0.44), np.float32)
    flat = np.array((0.60, 0.51, 0.42), np.float32)
    mask = np.clip(scene.coarse * 1.5 + 0.6, 0, 1).astype(np.float32)[..., None]
    tone = sand * (slope * (0.9 + 0.16 * ridge))[..., None]
    tone = flat + (tone - flat) * mask
    tone = tone * (1 + 0.05 * scene.middle + 0.05 * scene.fine)[..., None]
    scene.canvas.image[:] = tone.astype(np.float32)
    for o in (-5, 5):
        track = []
        for u in np.arange(-w, w, 20):
            v = 90 * math.sin(u / 310) + 25 * math.sin(u / 90) + o
            track.append(scene.at(u, v))
        back = [p + (0, 3.0) for p in track[::-1]]
        paint(scene.canvas, [np.array(track + back)], (0.76, 0.67, 0.54), 0.7, 0.2)
    for _ in range(260):
        u, v = rng.uniform(-w, w, 2) * 0.7
        if scene.thickness(u, v) < -0.1:
            scene.tree(u, v, rng.uniform(2, 4.5))
