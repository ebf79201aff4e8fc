"""Warp a closed mouth to a pouting one: photos of pouting people are rare, those of closed mouths are not.

The shapes are those that landmarks show on real pouts. Against neutral mouths these are little narrower
(width over the eyes' distance 0.72 to 0.85) but nearly twice as tall for their width (0.58 to 0.32), and the
lips are a little apart.
"""

import cv2
import numpy as np

LIP_HEIGHT = 0.48, 0.88  # height of the lips over their width that a warp aims at
SEEN_HEIGHT = 0.46, 0.95  # and that landmarks found on its result must show: full lips at rest reach 0.45
SEEN_GAP = 0.32  # at most, between the lips, over the mouth's width
TRIES = 6
LEAST_HEIGHT = 0.27  # of the lips to start from: thin ones, stretched, are a smear


def mouth_frame(landmarks):
    """Centre of the lips' line, unit vectors along it and across it (downwards), and the width in pixels."""
    corners = landmarks[[48, 54]]
    along = corners[1] - corners[0]
    width = max(float(np.hypot(*along)), 1.0)
    along = along / width
    centre = (corners.mean(0) + landmarks[[62, 66]].mean(0)) / 2
    return centre, along, np.array([-along[1], along[0]]), width


def mouth_grid(photo, landmarks):
    """Every pixel's place, along and across the mouth from its centre, in mouth widths: two arrays (H, W)."""
    centre, along, across, width = mouth_frame(landmarks)
    y, x = np.mgrid[: photo.shape[0], : photo.shape[1]].astype(np.float32)
    return [((x - centre[0]) * axis[0] + (y - centre[1]) * axis[1]) / width for axis in (along, across)]


def fetch(photo, landmarks, u, v):
    """A photo, float32, whose every pixel comes from a place (u, v), in the terms of `mouth_grid`."""
    centre, along, across, width = mouth_frame(landmarks)
    x, y = (centre[i] + width * (u * along[i] + v * across[i]) for i in (0, 1))
    return cv2.remap(photo.astype(np.float32), x.astype(np.float32), y.astype(np.float32),
                     cv2.INTER_CUBIC, borderMode=cv2.BORDER_REPLICATE)


def lip_shape(landmarks):
    """Of the lips: height over width, and the gap between them over width."""
    _, _, across, width = mouth_frame(landmarks)
    heights = landmarks @ across / width
    return heights[57] - heights[51], heights[66] - heights[62]


def looks_pouting(landmarks):
    """Whether lips have the height for their width that pouting ones have, and no open mouth's gap."""
    height, gap = lip_shape(landmarks)
    return SEEN_HEIGHT[0] <= height <= SEEN_HEIGHT[1] and gap < SEEN_GAP


def hump(u, v, up, down, aside=1.0):
    """1 at the mouth, smoothly down to 0 at `up` above, `down` below and `aside` beside it (mouth widths)."""
    r = np.hypot(u / aside, v / np.where(v < 0, up, down))
    t = np.clip((r - 0.25) / 0.75, 0, 1)
    return 1 - t * t * (3 - 2 * t)


def pout(photo, landmarks, rng):
    """Warp a closed mouth to a pouting one, of a random shape.

    Everything happens within a smooth hump around the mouth that falls to nothing at its rim.

    Parameters
    ----------
    photo : uint8 array of shape (H, W) or (H, W, 3)
    landmarks : float array of shape (68, 2)
    rng : numpy.random.Generator

    Returns
    -------
    uint8 array of the photo's shape
    """
    centre, _, across, width = mouth_frame(landmarks)
    narrow = rng.uniform(0.60, 0.95)
    height = narrow * rng.uniform(*LIP_HEIGHT)
    gap = narrow * max(0.0, rng.uniform(-0.06, 0.22))
    lopsided, uneven = rng.normal(0, 0.06, 2)
    shift_u, shift_v = rng.normal(0, 0.03), rng.normal(-0.02, 0.03)
    turn = np.radians(rng.uniform(-6, 6))

    u, v = mouth_grid(photo, landmarks)
    up, down = 0.62, 0.80
    weight = hump(u, v, up, down)
    cos, sin = np.cos(turn * weight), np.sin(turn * weight)
    s = cos * u + sin * v - shift_u * weight  # on the new mouth
    t = cos * v - sin * u - shift_v * weight

    # the gap opens between the lips: what lies in it comes from their line
    half = gap / 2 * np.clip(1 - (2 * s / narrow) ** 2, 0, 1)
    lips = np.sign(t) * (np.hypot(np.maximum(np.abs(t) - half, 0) + 0.02, 0.02) - np.hypot(0.02, 0.02))
    lips = np.where(half > 0, t + (lips - t) * weight, t)
    # each lip is stretched so that its edge, where the hump has fallen a little, comes out where it should
    scale = np.empty_like(t)
    for side, points, sign, share in ((t < 0, [50, 51, 52], -1, 0.43), (t >= 0, [56, 57, 58], 1, 0.57)):
        edge = max(float(np.mean((landmarks[points] - centre) @ across)) * sign / width, 0.05)
        aim = max((height - gap) * share * (1 + uneven), 0.04)  # the lower lip is the fuller one
        reach = float(hump(0.0, sign * (aim + gap / 2), up, down))
        scale[side] = np.clip(1 - (1 - edge / aim) / max(reach, 0.3), 0.36, 1.6)
    source_u = s * (1 + weight * (1 / (narrow * (1 + lopsided * np.tanh(4 * s))) - 1))
    source_v = lips * (1 + weight * (scale - 1))
    warped = fetch(photo, landmarks, source_u, source_v)

    # light on the lips, shade below them, darkness between them, all as strong as the photo's own contrast
    near = (np.abs(u) < 0.7) & (np.abs(v) < 0.5)
    contrast = float(photo[near].std()) if near.any() else 20.0
    lower = gap / 2 + (height - gap) * 0.57
    middle = (np.abs(t) - (gap / 2 + lower) / 2) / (0.3 * lower + 0.02)
    light = np.exp(-(s / (0.35 * narrow)) ** 2 - middle**2)
    shade = np.exp(-(s / (0.4 * narrow)) ** 2 - ((t - lower - 0.08) / 0.07) ** 2)
    level = contrast * (rng.uniform(0, 0.5) * light - rng.uniform(0, 0.6) * shade)
    if rng.random() < 0.5 or gap > 0.1:
        wide, high = narrow * rng.uniform(0.15, 0.4), gap / 2 + rng.uniform(0.02, 0.05)
        level -= contrast * rng.uniform(0.7, 2.2) * np.exp(-(s / wide) ** 2 - (t / high) ** 2)
    if photo.ndim == 3:
        level = level[..., None]
    return np.clip(warped + level, 0, 255).astype(np.uint8)


def make_pout(photo, cropper, name, least=LEAST_HEIGHT, tries=TRIES):
    """The first of a few warps in which the landmarks, found again, look pouting.

    Parameters
    ----------
    photo : uint8 array of shape (H, W, 3)
    cropper : preprocess_lips.LipCropper
    name : str
        Of the photo: the same name gives the same warp.
    least : float
        Height over width that the lips must have.
    tries : int

    Returns
    -------
    uint8 array of the photo's shape, or None
        No face was found, its lips are too thin, or none of the warps looks like a pout.
    """
    found = cropper(photo, largest=True)
    if not found or lip_shape(found[0].landmarks)[0] < least:
        return None
    for attempt in range(tries):
        warped = pout(photo, found[0].landmarks, np.random.default_rng([*name.encode(), attempt]))
        again = cropper(warped, largest=True)
        if again and looks_pouting(again[0].landmarks):
            return warped
    return None
