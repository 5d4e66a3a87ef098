"""A canvas for scenes seen from above: antialiased polygons, shadows, tight boxes.

Sprites are drawn at four times their size and reduced, so edges and angles are
smooth. Every random number comes from the generator that is passed in. Pixels are
plain float32 sums and products or integers, so that a processor's vector width does
not change the result.
"""

import math
from dataclasses import dataclass, field

import cv2
import numpy as np

FINE = 4  # supersampling of everything that has an edge
SHIFT = 4  # fractional bits of the coordinates given to cv2.fillPoly


@dataclass
class Sprite:
    """One object: `parts` (polygon (N, 2), rgb 0..1), painted in order.

    `outline`: convex polygons whose union is the silhouette. `height`: pixels above
    the ground, for the shadow. `stamp`: see `plant`.
    """

    parts: list
    outline: list
    height: float
    stamp: tuple | None = None


@dataclass
class Canvas:
    """A scene while it is drawn.

    `image`: float32 (H, W, 3), 0..1. `grain`: float32 (H, W), about -1..1, texture
    for whatever is painted. `taken`: uint8 (H, W), 1 under an object, 2 under a tree.
    `sun`: (x, y) shadow in pixels for each pixel of height. `shade`: (3,) what a
    shadow leaves of the light. `objects`: (type_id, x1, y1, x2, y2) in whole pixels,
    without shadow, not clipped to the canvas.
    """

    image: np.ndarray
    grain: np.ndarray
    sun: tuple
    shade: np.ndarray
    taken: np.ndarray = None  # type: ignore[assignment]  # all free, made below
    objects: list = field(default_factory=list)
    layers: dict = field(default_factory=dict)

    def __post_init__(self):
        if self.taken is None:
            self.taken = np.zeros(self.image.shape[:2], np.uint8)

    def lit(self, angle: float, strength: float = 0.2) -> float:
        """Brightness of a slope that faces `angle` (radians on the canvas)."""
        towards_sun = math.atan2(-self.sun[1], -self.sun[0])
        return 1.0 + strength * math.cos(angle - towards_sun)


def box(length, width, x=0.0, y=0.0):
    """Rectangle (4, 2) of `length` along x and `width` along y, centred at x, y."""
    a, b = length / 2, width / 2
    return np.array([(x - a, y - b), (x + a, y - b), (x + a, y + b), (x - a, y + b)])


def rounded(length, width, cut, x=0.0, y=0.0):
    """Rectangle with its corners cut off by `cut` pixels, (8, 2)."""
    a, b, c = length / 2, width / 2, cut
    points = [
        (a - c, -b), (a, c - b), (a, b - c), (a - c, b),
        (c - a, b), (-a, b - c), (-a, c - b), (c - a, -b),
    ]  # fmt: skip
    return np.array(points) + (x, y)


def disc(radius, x=0.0, y=0.0, corners=28):
    """Circle as a polygon (corners, 2)."""
    angles = [2 * math.pi * i / corners for i in range(corners)]
    ring = [(x + radius * math.cos(a), y + radius * math.sin(a)) for a in angles]
    return np.array(ring)


def mirror(polygon):
    """The polygon on the other side of the x axis."""
    return np.asarray(polygon, float) * (1, -1)


def turn(polygon, heading, centre):
    """Local polygon to canvas pixels: rotate by `heading` radians, then move."""
    c, s = math.cos(heading), math.sin(heading)
    p = np.asarray(polygon, float)
    x, y = p[:, 0] * c - p[:, 1] * s, p[:, 0] * s + p[:, 1] * c
    out = np.empty_like(p)
    out[:, 0], out[:, 1] = x + centre[0], y + centre[1]
    return out


def extent(polygons, pad=2):
    low = np.min([p.min(0) for p in polygons], 0)
    high = np.max([p.max(0) for p in polygons], 0)
    x0, y0 = (int(math.floor(v)) - pad for v in low)
    x1, y1 = (int(math.ceil(v)) + pad for v in high)
    return x0, y0, x1, y1


def _fixed(polygon, x0, y0, scale):
    # fillPoly counts pixel centres; half a fine pixel brings edges back in place.
    local = (polygon - (x0, y0)) * scale - 0.5
    return np.round(local * (1 << SHIFT)).astype(np.int32)


def coverage(polygons, x0, y0, x1, y1):
    """How much of each pixel the polygons cover: uint8 (y1 - y0, x1 - x0), 0..255."""
    scale = FINE if (x1 - x0) * (y1 - y0) < 700_000 else 2
    mask = np.zeros(((y1 - y0) * scale, (x1 - x0) * scale), np.uint8)
    for polygon in polygons:
        cv2.fillPoly(mask, [_fixed(polygon, x0, y0, scale)], 255, shift=SHIFT)
    return cv2.resize(mask, (x1 - x0, y1 - y0), interpolation=cv2.INTER_AREA)


def clip(canvas, x0, y0, x1, y1):
    h, w = canvas.taken.shape
    return max(x0, 0), max(y0, 0), min(x1, w), min(y1, h)


def paint(canvas, polygons, colour, alpha=1.0, texture=0.0):
    """Paint flat polygons (canvas pixels) on the ground.

    `colour`: rgb 0..1. `texture`: how strongly the canvas' grain shows in it.
    """
    if not polygons:
        return
    x0, y0, x1, y1 = clip(canvas, *extent(polygons))
    if x0 >= x1 or y0 >= y1:
        return
    mask = coverage(polygons, x0, y0, x1, y1)
    blend(canvas, mask, colour, alpha, texture, x0, y0)


def blend(canvas, mask, colour, alpha, texture, x0, y0):
    """Mix a colour into the picture where `mask`, uint8 placed at x0, y0, is set."""
    window = np.s_[y0 : y0 + mask.shape[0], x0 : x0 + mask.shape[1]]
    area, grain = canvas.image[window], canvas.grain[window]
    tone = np.asarray(colour, np.float32)
    where = None
    if 8 * np.count_nonzero(mask) < mask.size:  # thin or slanted: touch those pixels
        where = np.nonzero(mask)
        mask, grain, whole, area = mask[where], grain[where], area, area[where]
    a = mask.astype(np.float32)[..., None] * np.float32(alpha / 255)
    if texture:
        tone = tone * (1 + np.float32(texture) * grain[..., None])
    area += a * (tone - area)
    if where is not None:
        whole[where] = area


def place(canvas, sprite, centre, heading, type_id=None, layer=1, margin=1.0):
    """Put a sprite where nothing stands yet; True if it was placed.

    It is drawn by `flush`, layer by layer. With a `type_id` its tight box is added
    to `canvas.objects`, unless less than a third of it is on the canvas.
    `margin`: free pixels kept around it.
    """
    outline = [turn(p, heading, centre) for p in sprite.outline]
    full = extent(outline, 2 + int(margin))
    x0, y0, x1, y1 = clip(canvas, *full)
    if x0 >= x1 or y0 >= y1:
        return False
    whole = coverage(outline, *full)
    mask = whole[y0 - full[1] : y1 - full[1], x0 - full[0] : x1 - full[0]]
    window = canvas.taken[y0:y1, x0:x1]
    if margin:
        reach = 2 * int(math.ceil(margin)) + 1
        wide = cv2.dilate(mask, np.ones((reach, reach), np.uint8))
    else:
        wide = mask
    if np.any(window[wide > 100]):
        return False
    window[mask > 60] = 1
    canvas.layers.setdefault(layer, []).append((sprite, outline, centre, heading))
    solid = whole > 100
    if type_id is not None and 3 * np.count_nonzero(mask > 100) >= solid.sum() > 0:
        columns, rows = np.flatnonzero(solid.any(0)), np.flatnonzero(solid.any(1))
        left, top = full[0] + int(columns[0]), full[1] + int(rows[0])
        right, bottom = full[0] + int(columns[-1]) + 1, full[1] + int(rows[-1]) + 1
        canvas.objects.append((type_id, left, top, right, bottom))
    return True


def plant(canvas, sprite, centre, layer=4):
    """Put a tree where no object stands; trees may touch each other.

    The same sprite may stand in many places: it is drawn once, kept as its `stamp`
    (x, y of the corner, picture, mask), and copied to whole pixels.
    """
    if sprite.stamp is None:
        full = extent(sprite.outline)
        sprite.stamp = (*full[:2], *_render(sprite, sprite.outline, (0, 0), 0.0, full))
    centre = (int(centre[0]), int(centre[1]))
    (x0, y0, x1, y1), mask, _ = _stamped(canvas, sprite, centre)
    if x0 >= x1 or y0 >= y1:
        return
    window = canvas.taken[y0:y1, x0:x1]
    if np.any(window[mask > 60] == 1):
        return
    window[(mask > 60) & (window == 0)] = 2
    outline = [p + centre for p in sprite.outline]
    canvas.layers.setdefault(layer, []).append((sprite, outline, centre, None))


def _stamped(canvas, sprite, centre):
    dx, dy, picture, mask = sprite.stamp
    left, top = centre[0] + dx, centre[1] + dy
    right, bottom = left + mask.shape[1], top + mask.shape[0]
    x0, y0, x1, y1 = clip(canvas, left, top, right, bottom)
    part = np.s_[max(0, y0 - top) : max(0, y1 - top), x0 - left : max(0, x1 - left)]
    return (x0, y0, x1, y1), mask[part], picture[part]


def flush(canvas):
    """Draw what was placed: for each layer all shadows first, then the objects."""
    for layer in sorted(canvas.layers):
        items = canvas.layers[layer]
        shadow = np.zeros_like(canvas.taken)
        for sprite, outline, _, _ in items:
            reach = np.array(canvas.sun) * sprite.height
            for polygon in outline:
                both = np.concatenate([polygon, polygon + reach]).astype(np.float32)
                hull = cv2.convexHull(both)[:, 0]
                points = np.round((hull - 0.5) * (1 << SHIFT)).astype(np.int32)
                cv2.fillPoly(shadow, [points], 255, cv2.LINE_AA, SHIFT)
        darken(canvas, cv2.GaussianBlur(shadow, (3, 3), 0.7))
        for sprite, outline, centre, heading in items:
            _draw(canvas, sprite, outline, centre, heading)
    canvas.layers.clear()


def darken(canvas, shadow):
    """Apply a shadow mask, uint8 (H, W), to the picture."""
    where = np.nonzero(shadow)
    depth = shadow[where].astype(np.float32)[:, None] / np.float32(255)
    canvas.image[where] *= 1 - depth * (1 - canvas.shade)


def _draw(canvas, sprite, outline, centre, heading):
    if heading is None:
        (x0, y0, x1, y1), mask, patch = _stamped(canvas, sprite, centre)
    else:
        x0, y0, x1, y1 = clip(canvas, *extent(outline))
        if x0 >= x1 or y0 >= y1:
            return
        patch, mask = _render(sprite, outline, centre, heading, (x0, y0, x1, y1))
    tone = patch.astype(np.float32) / np.float32(255)
    tone *= 1 + np.float32(0.05) * canvas.grain[y0:y1, x0:x1, None]
    a = mask.astype(np.float32)[..., None] / np.float32(255)
    area = canvas.image[y0:y1, x0:x1]
    area += a * (tone - area)


def _render(sprite, outline, centre, heading, window):
    """Picture uint8 (h, w, 3) and mask uint8 (h, w) of a sprite in a window."""
    x0, y0, x1, y1 = window
    base = np.round(np.array(sprite.parts[0][1]) * 255)
    patch = np.empty(((y1 - y0) * FINE, (x1 - x0) * FINE, 3), np.uint8)
    patch[:] = np.clip(base, 0, 255).astype(np.uint8)
    corners = np.concatenate([polygon for polygon, _ in sprite.parts])
    corners = _fixed(turn(corners, heading, centre), x0, y0, FINE)
    first = 0
    for polygon, colour in sprite.parts:
        points = corners[first : first + len(polygon)]
        first += len(polygon)
        rgb = [min(255, max(0, round(255 * c))) for c in colour]
        cv2.fillPoly(patch, [points], rgb, shift=SHIFT)
    patch = cv2.resize(patch, (x1 - x0, y1 - y0), interpolation=cv2.INTER_AREA)
    return patch, coverage(outline, x0, y0, x1, y1)


def shades(colour, factor):
    """The colour times `factor`, kept in 0..1."""
    return tuple(min(1.0, max(0.0, c * factor)) for c in colour)


def pick(rng, colours, weights=None, jitter=0.03):
    """One of the colours, a little changed."""
    p = None if weights is None else np.array(weights) / sum(weights)
    colour = colours[rng.choice(len(colours), p=p)]
    light = 1 + rng.uniform(-2.2, 2.2) * jitter
    tint = rng.uniform(-0.4, 0.4, 3) * jitter
    return shades(tuple(float(c + t) for c, t in zip(colour, tint, strict=True)), light)


def noise(rng, height, width, cell, octaves=4, fade=0.55):
    """Smooth noise, float32 (height, width), standard deviation near 0.4.

    `cell`: pixels between the coarsest random values; each octave halves it. Grids
    are doubled in size with cv2's exact integer interpolation until they fit.
    """
    doublings = max(0, int(round(math.log2(max(cell, 1)))))
    rows, columns = (-(-n // (1 << doublings)) + 2 for n in (height, width))
    field = np.zeros((rows, columns), np.int16)
    reach = 3500.0
    for level in range(doublings + 1):
        if level:
            size = (field.shape[1] * 2, field.shape[0] * 2)
            field = cv2.resize(field, size, interpolation=cv2.INTER_LINEAR_EXACT)
        if level < octaves:
            high = int(reach)
            field += rng.integers(-high, high + 1, field.shape, dtype=np.int16)
            reach *= fade
    return field[:height, :width].astype(np.float32) / np.float32(5000)


def column(x):
    """(h, w) to float32 (h, w, 1), to weigh colours with."""
    return np.asarray(x, np.float32)[..., None]


def mix(a, b, share):
    """Between colours a and b; `share` (h, w) is noise around 0, 0.3 is added to it."""
    return a + (b - a) * column(np.clip(share + 0.3, 0, 1))
