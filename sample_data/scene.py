"""One scene: its plan, ground, roads, light and camera.

A scene is laid out in a frame of its own (u to the right, v down, in pixels from the
scene's centre, turned by a few degrees): rows of cells with roads between them, each
cell filled by the function of its kind.
"""

import math

import cv2
import numpy as np

from . import open_land, quarters, vehicles
from .canvas import (
    Canvas,
    Sprite,
    clip,
    column,
    coverage,
    disc,
    extent,
    flush,
    mix,
    noise,
    paint,
    pick,
    place,
    plant,
    shades,
    turn,
)

# Height, width, and rows of cells with each row's share of the height. "coast" is a
# quay with the sea behind it, "airport" a runway with its taxiway and apron.
PLANS = [
    (1230, 1240, "airport*1.0 / bus trucks tanks*0.8 / homes shops homes*0.95"),
    (1250, 1180, "homes bus homes*0.85 / tanks boxes trucks*0.75 / coast*0.95"),
    (1200, 1300, "boxes tanks homes*0.8 / airport*1.0 / homes bus flats*0.85"),
    (1000, 1100, "desert"),
    (1250, 1150, "flats homes park*0.85 / trucks shops boxes*0.7 / coast*0.9"),
    (1180, 1300, "fields farm homes*0.8 / bus homes shops*0.75 / airport*1.0"),
    (1260, 1200, "wood homes homes*0.9 / halls tanks trucks*0.8 / coast*0.95"),
    # a wood without a label: tiles in which every box is a mistake
    (
        1620,
        1260,
        "wood wood*1.1 / homes homes bus*0.85 / tanks trucks boxes*0.75 / coast*1.0",
    ),
    (1150, 1330, "wood homes homes*0.9 / airport*1.0 / trucks tanks halls*0.7"),
    (1250, 1200, "park homes flats*0.9 / shops homes boxes*0.75 / coast*0.9"),
    (1200, 1280, "airport*1.0 / homes bus boxes*0.85 / fields homes farm*0.85"),
    (1220, 1260, "homes homes park*0.85 / boxes trucks homes*0.8 / airport*1.0"),
]
# By strip: dry or green ground.
CLIMATES = [
    {
        "grass": (0.36, 0.39, 0.26),
        "soil": (0.50, 0.44, 0.36),
        "wild": (0.33, 0.36, 0.24),
    },
    {
        "grass": (0.47, 0.45, 0.32),
        "soil": (0.58, 0.50, 0.40),
        "wild": (0.50, 0.46, 0.35),
    },
    {
        "grass": (0.31, 0.37, 0.25),
        "soil": (0.42, 0.37, 0.31),
        "wild": (0.29, 0.33, 0.22),
    },
]
LINE = (0.84, 0.84, 0.82)
ARTERIAL, STREET = 46, quarters.STREET
KINDS = {
    "airport": open_land.airport,
    "coast": open_land.coast,
    **{
        f.__name__: f
        for f in (
            quarters.homes, quarters.flats, quarters.shops, quarters.bus,
            quarters.trucks, quarters.halls, quarters.tanks, quarters.boxes,
            quarters.fields, quarters.farm, quarters.wood, quarters.park,
        )
    },
}  # fmt: skip


def draw_scene(index, seed, haze=0.0):
    """Draw scene `index` of the series `seed`; it depends on nothing else.

    `haze` is added to what the air scatters into every pixel, a share of its light.

    Returns (image uint8 (H, W, 3) RGB, objects): objects is a list of
    (type_id, x1, y1, x2, y2), int pixels, tight around the object without its
    shadow; where an object crosses the border its box overhangs.
    """
    return Scene(index, seed, haze).render()


def strip_of(index):
    """The strip (one pass of the satellite) that a scene was cut from: 0, 0, 0, 1..."""
    return index * 2 // 5


def _shares(weights, low, high):
    total = np.cumsum([0, *weights]) / sum(weights)
    return [float(low + (high - low) * t) for t in total]


def _strip(u0, v0, u1, v1, half, extend):
    if v0 == v1:
        return (u0 - extend, v0 - half, u1 + extend, v0 + half)
    return (u0 - half, v0 - extend, u0 + half, v1 + extend)


def _along(u0, v0, u1, v1, start, end, offset, half):
    """A strip of a road from `start` to `end` pixels along it, `offset` to its side."""
    if v0 == v1:
        return (u0 + start, v0 + offset - half, u0 + end, v0 + offset + half)
    return (u0 - offset - half, v0 + start, u0 - offset + half, v0 + end)


class Scene:
    """Draws one scene with one random generator, used in a fixed order.

    The quarters use it as their drawing board. Rectangles are (u0, v0, u1, v1) and
    angles are radians, both in the scene's frame; colours are rgb 0..1. Noise fields
    `coarse`, `middle`, `fine` are float32 (H, W), about -1..1. Functions in `later`
    put objects in place once all ground and roads are painted.
    """

    def __init__(self, index, seed, haze=0.0):
        strip = np.random.default_rng(
            np.random.SeedSequence((seed, 1, strip_of(index)))
        )
        self.rng = rng = np.random.default_rng(np.random.SeedSequence((seed, 2, index)))
        self.height, self.width, self.plan = PLANS[index % len(PLANS)]
        if index >= len(PLANS):
            self.height += int(rng.integers(-60, 61))
            self.width += int(rng.integers(-60, 61))
        h, w = self.height, self.width
        self.climate = CLIMATES[int(strip.integers(len(CLIMATES)))]
        azimuth = strip.uniform(0, 2 * math.pi) + rng.uniform(-0.1, 0.1)
        reach = strip.uniform(0.45, 0.95)
        self.haze = strip.uniform(0.0, 0.10) + rng.uniform(0, 0.06) + haze
        self.haze_most = 0.3 + haze
        self.haze_tone = np.array([0.70, 0.74, 0.80], np.float32)
        self.cast = 1 + strip.uniform(-0.025, 0.025, 3) + rng.uniform(-0.008, 0.008, 3)
        self.gain = rng.uniform(0.92, 1.08)
        self.coarse = noise(rng, h, w, 256, 4)
        self.middle = noise(rng, h, w, 32, 4)
        fine = noise(rng, h, w, 3, 3, 0.9)
        grain = self.middle * np.float32(0.7) + fine * np.float32(0.6)
        tint = np.array([0.42, 0.45, 0.52], np.float32) + np.float32(self.haze)
        ground = self.ground(fine)
        sun = (reach * math.cos(azimuth), reach * math.sin(azimuth))
        self.canvas = Canvas(ground, grain, sun, tint)
        self.fine = fine
        self.theta = math.radians(rng.uniform(-14, 14))
        if rng.random() < 0.5:
            self.theta += math.pi
        self.lanes, self.later = [], []
        self.crowns = []  # 96 trees, drawn when the first is planted

    def at(self, u, v):
        """Frame to canvas pixels."""
        return turn([(u, v)], self.theta, (self.width / 2, self.height / 2))[0]

    def quad(self, u0, v0, u1, v1):
        """A frame rectangle as a polygon on the canvas."""
        corners = [(u0, v0), (u1, v0), (u1, v1), (u0, v1)]
        return turn(corners, self.theta, (self.width / 2, self.height / 2))

    def fill(self, rect, colour, texture=0.08, alpha=1.0):
        """Pave a rectangle."""
        paint(self.canvas, [self.quad(*rect)], colour, alpha, texture)

    def lines(self, rects, colour=LINE, alpha=0.85):
        """Paint markings: many thin rectangles at once."""
        paint(self.canvas, [self.quad(*r) for r in rects], colour, alpha, 0.25)

    def put(self, sprite, u, v, angle=0.0, type_id=None, layer=1, margin=1.0):
        """Put a sprite at u, v, heading `angle`; True if there was room."""
        spot, heading = self.at(u, v), self.theta + angle
        return place(self.canvas, sprite, spot, heading, type_id, layer, margin)

    def visible(self, u, v, pad=30):
        """Whether the point is in the picture, or at most `pad` pixels outside."""
        x, y = self.at(u, v)
        return -pad < x < self.width + pad and -pad < y < self.height + pad

    def ground(self, fine):
        """Open land, green and dry by turns: float32 (H, W, 3)."""
        wild, soil = (np.array(self.climate[k], np.float32) for k in ("wild", "soil"))
        mix = np.clip(self.coarse * 0.9 + self.middle * 0.5 + 0.35, 0, 1)[..., None]
        tone = wild + (soil - wild) * mix.astype(np.float32)
        shade = 1 + 0.10 * self.middle + 0.09 * fine
        return (tone * shade[..., None]).astype(np.float32)

    def meadow(self, rect, colour=None, patchy=0.25):
        """Lawn or grass with worn patches."""
        base = np.array(colour or self.climate["grass"], np.float32)
        soil = np.array(self.climate["soil"], np.float32)
        self.material(
            rect,
            lambda n, m, f: (
                mix(base, soil, n * patchy + m * patchy)
                * column(1 + 0.10 * m + 0.10 * f)
            ),
        )

    def material(self, rect, tone):
        """Paint `tone(coarse, middle, fine)` -> (h, w, 3) over the rectangle."""
        quad = self.quad(*rect)
        x0, y0, x1, y1 = clip(self.canvas, *extent([quad]))
        if x0 >= x1 or y0 >= y1:
            return
        s = np.s_[y0:y1, x0:x1]
        colour = tone(self.coarse[s], self.middle[s], self.fine[s])
        a = coverage([quad], x0, y0, x1, y1).astype(np.float32)[..., None] / 255
        area = self.canvas.image[s]
        area += (a * (colour - area)).astype(np.float32)

    def road(self, u0, v0, u1, v1, width, traffic=1.0):
        """A straight road between two points of the frame, along u or v."""
        self.lanes.append((u0, v0, u1, v1, width, traffic))

    def draw_roads(self):
        """Pavements first, then all asphalt, then markings, then traffic."""
        rng = self.rng
        strips = [(_strip(*lane[:4], lane[4] / 2 + 5, 0), lane) for lane in self.lanes]
        tone = pick(rng, [(0.58, 0.57, 0.54), (0.52, 0.51, 0.48)])
        paint(self.canvas, [self.quad(*r) for r, _ in strips], tone, 1, 0.10)
        road = pick(rng, [quarters.ASPHALT, (0.42, 0.42, 0.42), (0.33, 0.33, 0.345)])
        for _, lane in strips:
            r = _strip(*lane[:4], lane[4] / 2, 7)
            paint(
                self.canvas,
                [self.quad(*r)],
                shades(road, rng.uniform(0.95, 1.06)),
                1,
                0.07,
            )
            self._wear(lane)
        for u0, v0, u1, v1, width, _ in self.lanes:
            wide, marks = width > 35, []
            length = abs(u1 - u0) + abs(v1 - v0)
            for a in np.arange(14, length - 18, 24):
                for side in (-0.25, 0.25) if wide else (0.0,):
                    marks.append(_along(u0, v0, u1, v1, a, a + 10, side * width, 0.55))
            self.lines(marks, alpha=0.7)
            if wide:
                both = [_along(u0, v0, u1, v1, 0, length, o, 0.5) for o in (-1.3, 1.3)]
                self.lines(both, quarters.YELLOW, 0.6)
            zebra = []
            for end in (5, length - 13):
                for o in np.arange(-width / 2 + 3, width / 2 - 2, 5):
                    zebra.append(_along(u0, v0, u1, v1, end, end + 8, o, 1.2))
            if length > 120 and rng.random() < 0.7:
                self.lines(zebra, alpha=0.6)

    def _wear(self, lane):
        """Wheel tracks along the lanes, and patches where the road was mended."""
        rng, (u0, v0, u1, v1, width, _) = self.rng, lane
        length = abs(u1 - u0) + abs(v1 - v0)
        lanes = (-0.375, -0.125, 0.125, 0.375) if width > 35 else (-0.25, 0.25)
        tracks = [
            _along(u0, v0, u1, v1, 0, length, side * width + wheel, 1.0)
            for side in lanes
            for wheel in (-2.4, 2.4)
        ]
        self.lines(tracks, (0.22, 0.22, 0.23), 0.13)
        for _ in range(int(length / 130)):
            a, o = rng.uniform(0, length), rng.choice(lanes) * width
            patch = _along(u0, v0, u1, v1, a, a + rng.uniform(8, 40), o, width * 0.11)
            tone = (0.25, 0.25, 0.26) if rng.random() < 0.6 else (0.5, 0.5, 0.49)
            self.lines([patch], tone, rng.uniform(0.15, 0.4))

    def avenue(self):
        """Trees along some of the wide roads."""
        rng = self.rng
        for u0, v0, u1, v1, width, _ in self.lanes:
            if rng.random() < (0.75 if width > 35 else 0.35):
                length = abs(u1 - u0) + abs(v1 - v0)
                for a in np.arange(16, length - 16, rng.uniform(26, 40)):
                    for o in (-width / 2 - 4, width / 2 + 4):
                        if rng.random() < 0.7:
                            r = _along(u0, v0, u1, v1, a, a, o, 0)
                            self.tree(r[0], r[1], rng.uniform(3.5, 6.5))

    def stains(self, rect, count):
        """Oil, damp and dust on a paved yard, and tracks of tyres."""
        rng = self.rng
        u0, v0, u1, v1 = rect
        for _ in range(count):
            u, v = rng.uniform(u0, u1), rng.uniform(v0, v1)
            if not self.visible(u, v):
                continue
            angles = np.arange(0, 9) * (2 * math.pi / 9)
            size = rng.uniform(2, 11) * rng.uniform(0.5, 1.3, 9)
            blot = np.stack([size * np.cos(angles), size * np.sin(angles)], 1)
            blot = np.clip(self.at(u, v) + blot, self.at(u, v) - 30, self.at(u, v) + 30)
            tone = (0.2, 0.2, 0.2) if rng.random() < 0.7 else (0.72, 0.70, 0.66)
            paint(self.canvas, [blot], tone, rng.uniform(0.05, 0.16), 0.5)
        for _ in range(count // 4):
            u, v, radius = rng.uniform(u0, u1), rng.uniform(v0, v1), rng.uniform(25, 60)
            if not self.visible(u, v):
                continue
            start, turned = rng.uniform(0, 2 * math.pi), rng.uniform(0.6, 1.8)
            steps = start + np.linspace(0, turned, 10)
            for r in (radius, radius + 6):
                ring = [
                    (k * math.cos(t), k * math.sin(t))
                    for k, ts in ((r, steps), (r + 1.6, steps[::-1]))
                    for t in ts
                ]
                points = np.array(ring) - (r * math.cos(start), r * math.sin(start))
                paint(self.canvas, [points + self.at(u, v)], (0.2, 0.2, 0.2), 0.13, 0.5)

    def drive(self):
        """Vehicles on every road, each in its lane."""
        rng = self.rng
        for u0, v0, u1, v1, width, traffic in self.lanes:
            length = abs(u1 - u0) + abs(v1 - v0)
            heading = math.atan2(v1 - v0, u1 - u0)
            sides = (-0.375, -0.125, 0.125, 0.375) if width > 35 else (-0.25, 0.25)
            for side in sides:
                a = rng.uniform(0, 60)
                while a < length - 22:
                    turnabout = 0.0 if side > 0 else math.pi
                    r = _along(u0, v0, u1, v1, a, a, side * width, 0)
                    if self.visible(r[0], r[1]):
                        self.vehicle(
                            r[0], r[1], heading + turnabout + rng.normal(0, 0.02), width
                        )
                    a += 32 + rng.exponential(130 / traffic)

    def vehicle(self, u, v, angle, width=0):
        roll = self.rng.random()
        if roll < 0.045 and width > 35:
            self.put(vehicles.bus(self.rng), u, v, angle, vehicles.BUS)
        elif roll < 0.09 and width > 35:
            self.put(vehicles.box_truck(self.rng), u, v, angle, vehicles.BOX_TRUCK)
        else:
            self.car(u, v, angle)

    def car(self, u, v, angle, layer=1):
        self.put(vehicles.car(self.rng), u, v, angle, vehicles.SMALL_CAR, layer)

    def render(self):
        if self.plan == "desert":
            open_land.desert(self)
        else:
            self.town()
        flush(self.canvas)
        return self.finish(), self.canvas.objects

    def town(self):
        h, w, rng = self.height, self.width, self.rng
        c, s = abs(math.cos(self.theta)), abs(math.sin(self.theta))
        reach_u, reach_v = (w * c + h * s) / 2 + 30, (w * s + h * c) / 2 + 30
        plan = [row.strip().split("*") for row in self.plan.split("/")]
        edges = _shares([float(share) for _, share in plan], -h / 2, h / 2)
        edges[0], edges[-1] = -reach_v, reach_v
        jobs = []
        for (kinds, _), v0, v1 in zip(plan, edges[:-1], edges[1:], strict=True):
            top = v0 + (ARTERIAL / 2 if v0 > -reach_v else 0)
            bottom = v1 - (ARTERIAL / 2 if v1 < reach_v else 0)
            if v1 < reach_v:
                self.road(-reach_u, v1, reach_u, v1, ARTERIAL, 1.25)
            cells = kinds.split()
            cuts = _shares(rng.uniform(0.85, 1.15, len(cells)), -w / 2, w / 2)
            cuts[0], cuts[-1] = -reach_u, reach_u
            for kind, u0, u1 in zip(cells, cuts[:-1], cuts[1:], strict=True):
                left = u0 + (STREET / 2 if u0 > -reach_u else 0)
                right = u1 - (STREET / 2 if u1 < reach_u else 0)
                if u1 < reach_u:
                    self.road(u1, top, u1, bottom, STREET)
                jobs.append((kind, (left, top + 5, right, bottom - 5)))
        # Ground first, then roads over it, then what stands on both.
        for kind, rect in jobs:
            KINDS[kind](self, rect)
        self.draw_roads()
        for job in self.later:
            job()
        self.drive()
        self.avenue()

    def thickness(self, u, v):
        x, y = (int(t) for t in self.at(u, v))
        if not (0 <= x < self.width and 0 <= y < self.height):
            return -1.0
        return float(self.coarse[y, x] + 0.4 * self.middle[y, x])

    def tree(self, u, v, radius):
        """A tree of about that radius. A distractor, it has no label."""
        if self.visible(u, v, 12):
            if not self.crowns:
                self.crowns = [self.crown(2 + 9 * i / 95) for i in range(96)]
            i = round((radius - 2) * 95 / 9) + int(self.rng.integers(-5, 6))
            plant(self.canvas, self.crowns[min(95, max(0, i))], self.at(u, v))

    def crown(self, radius):
        """A lobed disc, lit from the side of the sun."""
        rng = self.rng
        greens = [(0.22, 0.28, 0.16), (0.26, 0.31, 0.19), (0.30, 0.33, 0.20)]
        green = pick(rng, greens, [4, 3, 2], 0.06)
        angles = np.arange(0, 11) * (2 * math.pi / 11)
        reach = radius * rng.uniform(0.78, 1.1, 11)
        edge = np.stack([reach * np.cos(angles), reach * np.sin(angles)], 1)
        sun = -np.array(self.canvas.sun) / max(0.1, math.hypot(*self.canvas.sun))
        parts = [(edge, shades(green, 0.72))]
        for _ in range(int(radius * 0.9) + 2):
            spot = rng.uniform(-0.55, 0.55, 2) * radius
            light = 0.95 + 0.35 * float(spot @ sun) / radius + rng.uniform(-0.12, 0.12)
            lobe = disc(radius * rng.uniform(0.25, 0.42), *spot, corners=9)
            parts.append((lobe, shades(green, light)))
        return Sprite(parts, [edge], radius * rng.uniform(1.2, 2.0))

    def finish(self):
        """Cloud, haze, colour cast, optics and sensor: float canvas to uint8."""
        rng, h, w = self.rng, self.height, self.width
        image = self.canvas.image
        if rng.random() < 0.35:
            veil = noise(rng, h, w, 512, 6, 0.6)
            cloud = np.clip(veil * 1.1 - 0.35, 0, 0.5).astype(np.float32)[..., None]
            image += cloud * (np.float32(0.92) - image)
        uneven = np.clip(
            self.haze * (1 + 0.5 * noise(rng, h, w, 512, 2)), 0, self.haze_most
        )
        image += uneven.astype(np.float32)[..., None] * (self.haze_tone - image)
        image *= (self.cast * self.gain).astype(np.float32)
        grey = (image[..., :1] + image[..., 1:2] * 2 + image[..., 2:]) * np.float32(
            0.25
        )
        image = grey + np.float32(0.9) * (image - grey)
        # A gentle S curve, as a product is delivered: y = x + k x (1 - x) (2 x - 1).
        image = np.clip(image, 0, 1)
        image = image + np.float32(0.35) * image * (1 - image) * (2 * image - 1)
        small = np.round(image * 255).astype(np.uint8)
        blurred = cv2.GaussianBlur(small, (3, 3), 0.55).astype(np.int16)
        grain = rng.integers(-3, 4, (h, w, 1), dtype=np.int16)
        grain = grain + rng.integers(-2, 3, (h, w, 3), dtype=np.int16)
        return np.clip(blurred + grain, 0, 255).astype(np.uint8)
