"""Quarters of a town and the land around it, one function each.

Every function takes the scene and its rectangle (u0, v0, u1, v1) of the scene's
frame, paints the ground at once and leaves what stands on it to `scene.later`.
"""

import math

import numpy as np

from . import buildings, vehicles
from .canvas import clip, column, disc, extent, mix, paint, pick, shades

ASPHALT, CONCRETE = (0.37, 0.37, 0.375), (0.60, 0.59, 0.56)
YELLOW = (0.70, 0.60, 0.30)
STREET = 25  # width in pixels


def homes(scene, rect):
    """Blocks of detached houses with gardens and drives."""
    rng = scene.rng
    scene.meadow(rect, patchy=0.15)
    u0, v0, u1, v1 = rect
    rows = max(1, int((v1 - v0) / 150))
    step = (v1 - v0) / rows
    for i in range(1, rows):
        scene.road(u0, v0 + i * step, u1, v0 + i * step, STREET, 0.5)
    for i in range(rows):
        top = v0 + i * step + (STREET / 2 + 6 if i else 2)
        bottom = v0 + (i + 1) * step - (STREET / 2 + 6 if i < rows - 1 else 2)
        middle = (top + bottom) / 2
        for near, far, side in ((top, middle, -1), (bottom, middle, 1)):
            u = u0 + 4
            while u < u1 - 40:
                lot = min(rng.uniform(46, 64), u1 - 4 - u)
                if lot > 42:
                    _lot(scene, u, u + lot, near, far, side)
                u += lot


def _lot(scene, u0, u1, near, far, side):
    rng = scene.rng
    if not scene.visible((u0 + u1) / 2, near, 80):
        return
    depth = abs(far - near)
    grass = pick(rng, [scene.climate["grass"], scene.climate["wild"]], None, 0.03)
    low, high = min(near, far), max(near, far)
    scene.meadow(
        (u0 + 1, low, u1 - 1, high), shades(grass, rng.uniform(0.9, 1.15)), 0.12
    )
    scene.lines([(u0 - 0.4, low, u0 + 0.4, high)], (0.33, 0.31, 0.26), 0.5)
    drive_u = u0 + 8 if rng.random() < 0.5 else u1 - 8
    middle_u = (u0 + u1) / 2 + (5 if drive_u < (u0 + u1) / 2 else -5)
    length = rng.uniform(24, max(27, min(46, u1 - u0 - 22)))
    width = rng.uniform(23, 31)
    v = near - side * (
        15 + width / 2 + rng.uniform(0, max(0, depth - width - 28)) * 0.5
    )
    tail = near - side * rng.uniform(26, 40)
    gate = near + side * 6
    paving = pick(rng, [CONCRETE, (0.5, 0.49, 0.47)])
    drive = (drive_u - 4, min(gate, tail), drive_u + 4, max(gate, tail))
    scene.fill(drive, paving, 0.1)
    angle = (0 if rng.random() < 0.8 else math.pi / 2) + (
        math.pi if rng.random() < 0.5 else 0
    )
    angle += rng.normal(0, 0.03)

    def stand():
        sprite = buildings.house(rng, scene.canvas, scene.theta + angle, length, width)
        scene.put(sprite, middle_u, v, angle, buildings.BUILDING, 3)
        if rng.random() < 0.6:
            scene.car(drive_u, near - side * rng.uniform(9, 18), math.pi / 2)
        back = far + side * 12
        if rng.random() < 0.10 and abs(back - v) > width / 2 + 12:
            pool = rng.uniform(5, 8)
            centre = scene.at(middle_u, back)
            paint(scene.canvas, [disc(pool + 2, *centre)], (0.72, 0.70, 0.66))
            paint(scene.canvas, [disc(pool, *centre)], (0.36, 0.60, 0.66))
        for _ in range(int(rng.integers(2, 8))):
            scene.tree(
                rng.uniform(u0 + 4, u1 - 4),
                rng.uniform(low + 6, high - 6),
                rng.uniform(4, 9),
            )

    scene.later.append(stand)


def flats(scene, rect):
    """Apartment blocks around yards, cars between them."""
    rng = scene.rng
    scene.meadow(rect, patchy=0.2)
    u0, v0, u1, v1 = rect
    columns, rows = max(1, int((u1 - u0) / 130)), max(1, int((v1 - v0) / 150))
    du, dv = (u1 - u0) / columns, (v1 - v0) / rows
    for i in range(columns):
        for j in range(rows):
            a, b = u0 + i * du, v0 + j * dv
            if not scene.visible(a + du / 2, b + dv / 2, 120):
                continue
            lot = (a + 8, b + dv - 46, a + du - 8, b + dv - 6)
            parking(scene, lot, 0.7)

            def stand(a=a, b=b):
                length, width = du * rng.uniform(0.66, 0.84), rng.uniform(36, 50)
                angle = math.pi * int(rng.integers(2))
                sprite = buildings.flat_roof(
                    rng, scene.canvas, scene.theta + angle, length, width
                )
                scene.put(
                    sprite, a + du / 2, b + 14 + width / 2, angle, buildings.BUILDING, 3
                )
                for _ in range(14):
                    scene.tree(
                        rng.uniform(a, a + du),
                        rng.uniform(b, b + dv - 50),
                        rng.uniform(5, 10),
                    )

            scene.later.append(stand)


def shops(scene, rect):
    """A large store or two and their car park."""
    rng = scene.rng
    scene.fill(rect, pick(rng, [ASPHALT, (0.44, 0.44, 0.43)]), 0.12)
    scene.stains(rect, 60)
    u0, v0, u1, v1 = rect
    deep = min(120, (v1 - v0) * 0.42)
    store = (u0 + 14, v0 + 8, u1 - 14, v0 + 8 + deep)
    parking(
        scene,
        (u0 + 10, v0 + deep + 30, u1 - 10, v1 - 6),
        rng.uniform(0.55, 0.9),
        trees=True,
    )
    scene.fill((store[0] - 4, store[1] - 4, store[2] + 4, store[3] + 6), CONCRETE)

    def stand():
        u = store[0]
        while u < store[2] - 50:
            wide = min(rng.uniform(70, 108), store[2] - u)
            height = deep * rng.uniform(0.75, 1.0)
            sprite = buildings.flat_roof(
                rng, scene.canvas, scene.theta, wide - 6, height
            )
            scene.put(
                sprite, u + wide / 2, store[1] + height / 2, 0, buildings.BUILDING, 3
            )
            u += wide

    scene.later.append(stand)


def parking(scene, rect, share, trees=False):
    """Rows of bays, two rows to an aisle; `share` of the bays is taken."""
    rng = scene.rng
    scene.fill(rect, pick(rng, [ASPHALT, (0.41, 0.41, 0.41)]), 0.10)
    scene.stains(rect, 30)
    u0, v0, u1, v1 = rect
    bay, depth, aisle = 9.4, 18, 22
    marks, spots, v = [], [], v0 + 2
    while v + depth <= v1:
        for u in np.arange(u0 + 6, u1 - 6, bay):
            marks.append((u - 0.3, v, u + 0.3, v + depth))
            if u + bay < u1 - 6:
                spots.append((u + bay / 2, v + depth / 2))
        pair = (int((v - v0) // (depth + 1))) % 2
        v += depth + (aisle if not pair else 1)
    scene.lines(marks, alpha=0.6)

    def stand():
        clusters = rng.uniform(0.6, 1.4, 64)
        for u, v in spots:
            if not scene.visible(u, v):
                continue
            here = share * clusters[int((u - u0) / 60) % 64]
            if rng.random() < here:
                angle = math.pi / 2 * (1 if rng.random() < 0.5 else -1)
                scene.car(
                    u + rng.normal(0, 0.3),
                    v + rng.normal(0, 0.8),
                    angle + rng.normal(0, 0.02),
                )
            elif trees and rng.random() < 0.03:
                scene.tree(u, v, rng.uniform(4, 7))

    scene.later.append(stand)


def bus(scene, rect):
    """A depot: rows of buses, a hall, some cars."""
    rng = scene.rng
    scene.fill(rect, pick(rng, [CONCRETE, (0.46, 0.46, 0.455)]), 0.12)
    scene.stains(rect, 130)
    u0, v0, u1, v1 = rect
    hall = min(70, (v1 - v0) * 0.25)
    parking(scene, (u0 + 10, v1 - 44, u1 - 10, v1 - 4), 0.6)

    def stand():
        sprite = buildings.warehouse(
            rng, scene.canvas, scene.theta, min(120, (u1 - u0) * 0.45), hall
        )
        scene.put(
            sprite, u0 + (u1 - u0) * 0.35, v0 + 10 + hall / 2, 0, buildings.BUILDING, 3
        )
        v = v0 + hall + 44
        while v < v1 - 68:
            for u in np.arange(u0 + 20, u1 - 20, 17.0):
                if scene.visible(u, v) and rng.random() < 0.42:
                    angle = math.pi / 2 + rng.normal(0, 0.012)
                    scene.put(
                        vehicles.bus(rng),
                        u,
                        v + rng.normal(0, 1.5),
                        angle,
                        vehicles.BUS,
                    )
            v += 64

    scene.later.append(stand)


def trucks(scene, rect):
    """Warehouses with docks, trucks backed against them."""
    rng = scene.rng
    scene.fill(rect, pick(rng, [(0.47, 0.465, 0.45), CONCRETE]), 0.12)
    scene.stains(rect, 150)
    u0, v0, u1, v1 = rect
    deep = min(100, (v1 - v0) * 0.34)
    spots = [
        (u, v0 + deep + 41, -math.pi / 2) for u in np.arange(u0 + 24, u1 - 16, 17.5)
    ]
    park = v1 - 36
    spots += [(u, park, math.pi / 2) for u in np.arange(u0 + 24, u1 - 16, 19)]
    marks = [(u - 8.8, v - 26, u - 8.2, v + 26) for u, v, _ in spots]
    scene.lines(marks, YELLOW, 0.4)

    def stand():
        u = u0 + 10
        while u < u1 - 60:
            wide = min(rng.uniform(86, 118), u1 - 8 - u)
            sprite = buildings.warehouse(rng, scene.canvas, scene.theta, wide - 8, deep)
            scene.put(sprite, u + wide / 2, v0 + 8 + deep / 2, 0, buildings.BUILDING, 3)
            u += wide
        for u, v, facing in spots:
            roll = rng.random()
            if scene.visible(u, v) and roll < 0.5:
                angle = -facing + rng.normal(0, 0.015)
                scene.put(vehicles.box_truck(rng), u, v, angle, vehicles.BOX_TRUCK)
            elif roll < 0.58:
                scene.car(u, v, facing)

    scene.later.append(stand)


def halls(scene, rect):
    """Workshops of all sizes with yards between."""
    rng = scene.rng
    scene.fill(rect, pick(rng, [(0.50, 0.48, 0.45), (0.45, 0.45, 0.44)]), 0.16)
    scene.stains(rect, 120)
    u0, v0, u1, v1 = rect
    columns, rows = max(1, int((u1 - u0) / 125)), max(1, int((v1 - v0) / 115))
    du, dv = (u1 - u0) / columns, (v1 - v0) / rows

    def stand():
        for i in range(columns):
            for j in range(rows):
                u, v = u0 + (i + 0.5) * du, v0 + (j + 0.5) * dv
                if not scene.visible(u, v, 80):
                    continue
                size = rng.uniform(0.45, 0.75, 2) * (du, dv)
                kind = (
                    buildings.warehouse if rng.random() < 0.6 else buildings.flat_roof
                )
                sprite = kind(rng, scene.canvas, scene.theta, size[0], size[1])
                scene.put(sprite, u, v - dv * 0.08, 0, buildings.BUILDING, 3)
                for _ in range(int(rng.integers(1, 6))):
                    scene.car(
                        u + rng.uniform(-0.45, 0.45) * du, v + dv * 0.42, math.pi / 2
                    )

    scene.later.append(stand)


def tanks(scene, rect):
    """A tank farm: bunds with tanks in rows, pipes between."""
    rng = scene.rng
    scene.fill(rect, pick(rng, [(0.52, 0.48, 0.42), (0.47, 0.45, 0.42)]), 0.22)
    u0, v0, u1, v1 = rect
    jobs, pipes, v = [], [], v0 + 12
    while v < v1 - 50:
        size = min(rng.uniform(52, 92), v1 - 8 - v)
        u = u0 + 10
        while u < u1 - size * 0.8:
            wide = min(size * rng.uniform(0.98, 1.15), u1 - 6 - u)
            scene.fill((u, v, u + wide, v + size), (0.58, 0.55, 0.49), 0.14)
            inner = (u + 3, v + 3, u + wide - 3, v + size - 3)
            scene.fill(inner, pick(rng, [(0.50, 0.46, 0.40), (0.45, 0.43, 0.39)]), 0.18)
            radius = min(wide, size) / 2 * rng.uniform(0.55, 0.80)
            if rng.random() < 0.9:
                jobs.append((u + wide / 2, v + size / 2, radius))
                pipes.append(
                    (u + wide / 2 - 1, v + size / 2, u + wide / 2 + 1, v + size + 4)
                )
            u += wide + 5
        pipes.append((u0 + 8, v + size + 3, u1 - 8, v + size + 5))
        v += size + 10
    scene.lines(pipes, (0.72, 0.71, 0.68), 0.8)

    def stand():
        for u, v, radius in jobs:
            sprite = vehicles.tank(rng, scene.canvas, scene.theta, radius)
            scene.put(sprite, u, v, 0, vehicles.TANK, 2)

    scene.later.append(stand)


def boxes(scene, rect):
    """A container yard: short rows, lanes between, trucks in the lanes."""
    rng = scene.rng
    scene.fill(rect, pick(rng, [(0.50, 0.50, 0.49), CONCRETE]), 0.14)
    scene.stains(rect, 140)
    u0, v0, u1, v1 = rect
    lanes, spots, v = [], [], v0 + 14
    while v < v1 - 50:
        for u in np.arange(u0 + 14, u1 - 20, 15.5):
            if (u - u0) % 124 < 108:  # a gap for the crane after each seven
                spots.append((u, v + 22))
        lanes.append((u0 + 8, v + 56, u1 - 8, v + 57))
        v += 70
    scene.lines(lanes, YELLOW, 0.5)

    def stand():
        for u, v in spots:
            if scene.visible(u, v) and rng.random() >= 0.3:
                _stack(scene, u, v)
        for _ in range(6):
            u, v = rng.uniform(u0 + 40, u1 - 40), v0 + 66 + 70 * int(rng.integers(0, 4))
            if v < v1 - 12 and scene.visible(u, v):
                scene.put(vehicles.box_truck(rng), u, v, 0, vehicles.BOX_TRUCK, 1, 2)

    scene.later.append(stand)


def _stack(scene, u, v):
    """One long container, or two short ones."""
    rng = scene.rng
    angle = math.pi / 2 + rng.normal(0, 0.008)
    if rng.random() < 0.7:
        sprite = vehicles.container(rng, 40.6)
        scene.put(sprite, u, v, angle, vehicles.CONTAINER, 2)
        return
    for side in (-10.8, 10.8):
        sprite = vehicles.container(rng, 20.3)
        scene.put(sprite, u, v + side, angle, vehicles.CONTAINER, 2, 0.5)


def fields(scene, rect):
    """Parcels split again and again."""
    rng = scene.rng

    def split(u0, v0, u1, v1, depth):
        if depth == 0 or max(u1 - u0, v1 - v0) < 130:
            field(scene, (u0, v0, u1, v1))
            scene.lines([(u0 - 1, v0, u0 + 1, v1), (u0, v0 - 1, u1, v0 + 1)],
                       (0.30, 0.32, 0.21), 0.6)  # fmt: skip
        elif u1 - u0 > v1 - v0:
            cut = u0 + (u1 - u0) * rng.uniform(0.35, 0.65)
            split(u0, v0, cut, v1, depth - 1)
            split(cut, v0, u1, v1, depth - 1)
        else:
            cut = v0 + (v1 - v0) * rng.uniform(0.35, 0.65)
            split(u0, v0, u1, cut, depth - 1)
            split(u0, cut, u1, v1, depth - 1)
        if rng.random() < 0.5:
            hedge = [(rng.normal(u0, 1.5), v) for v in np.arange(v0, v1, 9)]
            scene.later.append(
                lambda: [scene.tree(*p, rng.uniform(3, 7)) for p in hedge]
            )

    split(*rect, 4)


def field(scene, rect):
    """One parcel: bare or grown, with rows along one side."""
    rng = scene.rng
    crops = [
        (0.34, 0.40, 0.25), (0.42, 0.44, 0.29), (0.58, 0.52, 0.37), (0.47, 0.39, 0.31),
        (0.53, 0.46, 0.37), (0.30, 0.36, 0.23),
    ]  # fmt: skip
    base = np.array(pick(rng, crops), np.float32)
    other = np.array(pick(rng, crops), np.float32)
    pitch, along = (
        rng.uniform(4.5, 9),
        scene.theta + (math.pi / 2) * int(rng.integers(2)),
    )
    depth, blend = rng.uniform(0.02, 0.07), rng.uniform(0.1, 0.35)
    c, s = math.cos(along), math.sin(along)
    tram = rng.uniform(36, 60)
    quad = scene.quad(*rect)
    x0, y0, x1, y1 = clip(scene.canvas, *extent([quad]))

    def tone(n, m, f):
        yy, xx = np.mgrid[y0:y1, x0:x1]
        across = xx * s - yy * c + m * 1.2
        rows = np.sin(across * (2 * math.pi / pitch)).astype(np.float32)
        wheel = (np.mod(across, tram) < 3.0).astype(np.float32)
        light = 1 + depth * rows * (1 + 0.8 * m) + 0.07 * f + 0.07 * m - 0.10 * wheel
        return mix(base, other, (n + 0.6 * m) * blend) * column(light)

    scene.material(rect, tone)


def farm(scene, rect):
    """Fields and a farmstead."""
    fields(scene, rect)
    rng = scene.rng
    u, v = (rect[0] + rect[2]) / 2, rect[3] - 60
    scene.fill((u - 70, v - 45, u + 70, v + 60), (0.53, 0.48, 0.41), 0.2)

    def stand():
        for du, dv, long, wide in (
            (-35, -15, 55, 26),
            (30, -18, 44, 30),
            (10, 28, 38, 22),
        ):
            sprite = buildings.house(rng, scene.canvas, scene.theta, long, wide)
            scene.put(sprite, u + du, v + dv, 0, buildings.BUILDING, 3)
        for _ in range(12):
            scene.tree(
                u + rng.uniform(-70, 70), v + rng.uniform(-45, 55), rng.uniform(5, 10)
            )

    scene.later.append(stand)


def wood(scene, rect):
    scene.meadow(rect, shades(scene.climate["wild"], 0.85), 0.2)
    u0, v0, u1, v1 = rect
    rng = scene.rng

    def stand():
        for _ in range(int((u1 - u0) * (v1 - v0) / 110)):
            u, v = rng.uniform(u0, u1), rng.uniform(v0, v1)
            if scene.thickness(u, v) > -0.15:
                scene.tree(u, v, rng.uniform(5, 11))

    scene.later.append(stand)


def park(scene, rect):
    """Lawns, paths, groups of trees."""
    scene.meadow(rect, patchy=0.3)
    u0, v0, u1, v1 = rect
    rng = scene.rng
    u, v = (u0 + u1) / 2, (v0 + v1) / 2
    tone = pick(rng, [(0.62, 0.57, 0.48), CONCRETE])
    paths = [(u0, v - 3, u1, v + 3), (u - 3, v0, u + 3, v1)]
    for r in paths:
        scene.fill(r, tone)
    ring = scene.at(u, v)
    paint(scene.canvas, [disc(34, *ring)], tone, 1, 0.1)
    paint(scene.canvas, [disc(26, *ring)], scene.climate["grass"], 1, 0.2)

    def stand():
        for _ in range(int((u1 - u0) * (v1 - v0) / 190)):
            a, b = rng.uniform(u0, u1), rng.uniform(v0, v1)
            if scene.thickness(a, b) > 0.1 and abs(a - u) > 12 and abs(b - v) > 12:
                scene.tree(a, b, rng.uniform(5, 11))

    scene.later.append(stand)
