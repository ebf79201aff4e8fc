"""Photos a second and faces found: the textbook's cell and preprocess_lips.py, on the same folder in one run.

    python tests/bench/preprocess_speed.py PHOTOS                  PHOTOS holds class folders
    python tests/bench/preprocess_speed.py PHOTOS --tight FOLDER   and mouth positions against FOLDER/labels.csv
                                                                   (file, mouth_box_x0, y0, x1, y1)

The textbook's cell: imread, cascade (1.3, 5), first face, landmarks. Loading the landmark file counts for
neither. Pictures without faces are made here: shuffled tiles and corners of the photos, text, shapes, noise.
"""

import argparse
import csv
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import cv2
import dlib
import numpy as np
from PIL import Image, ImageDraw, ImageFont

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

import preprocess_lips  # noqa: E402
from preprocess_lips import LipCropper, cores, landmark_file, list_photos, preprocess, read_photo  # noqa: E402


def textbook(files):
    """Faces found and seconds."""
    cascade = cv2.CascadeClassifier(cv2.data.haarcascades + "haarcascade_frontalface_default.xml")
    predictor = dlib.shape_predictor(str(landmark_file()))
    cv2.setNumThreads(cores())
    found, start = 0, time.perf_counter()
    for file in files:
        image = cv2.imread(str(file))
        faces = cascade.detectMultiScale(image, 1.3, 5)
        if len(faces):
            x, y, w, h = map(int, faces[0])
            predictor(image, dlib.rectangle(x, y, x + w, y + h)).parts()
            found += 1
    return found, time.perf_counter() - start


def ours(photos):
    """Faces found, photos a second from the first finished photos on, and seconds of the whole run."""
    marks, real = [], preprocess_lips.run_parallel

    def watched(*args):
        for rows in real(*args):
            marks.append((time.perf_counter(), len(rows)))
            yield rows

    preprocess_lips.run_parallel = watched
    with tempfile.TemporaryDirectory() as crops:
        start = time.perf_counter()
        rows, *_ = preprocess(photos, Path(crops), cores())
        seconds = time.perf_counter() - start
    preprocess_lips.run_parallel = real
    rate = sum(n for _, n in marks[1:]) / (marks[-1][0] - marks[0][0])
    return sum(row["status"] in ("ok", "duplicate") for row in rows), rate, seconds


def faceless(files, n=300):
    """n pictures without a face."""
    rng = np.random.default_rng(0)
    for i in range(n):
        photo = read_photo(files[rng.integers(len(files))])
        height, width = photo.shape[:2]
        if i % 5 == 0:
            k = int(rng.integers(4, 7))
            side = min(height, width) // k
            tiles = [photo[y * side:(y + 1) * side, x * side:(x + 1) * side] for y in range(k) for x in range(k)]
            rng.shuffle(tiles)
            yield np.vstack([np.hstack(tiles[y * k:(y + 1) * k]) for y in range(k)])
        elif i % 5 == 1:
            side = int(min(height, width) * rng.uniform(0.25, 0.38))
            y, x = rng.choice([0, height - side]), rng.choice([0, width - side])
            yield np.ascontiguousarray(photo[y:y + side, x:x + side])
        elif i % 5 == 2:
            picture = Image.new("RGB", (400, 400), tuple(rng.integers(150, 256, 3).tolist()))
            font = ImageFont.load_default(int(rng.integers(12, 70)))
            for y in range(0, 400, 30):
                words = "".join(map(chr, rng.integers(33, 126, 40)))
                ImageDraw.Draw(picture).text((int(rng.integers(0, 40)), y), words, tuple(rng.integers(0, 120, 3).tolist()), font)
            yield np.array(picture)
        elif i % 5 == 3:
            picture = np.full((300, 300, 3), rng.integers(0, 256), np.uint8)
            for _ in range(int(rng.integers(3, 15))):
                a, b, colour = (tuple(rng.integers(0, m, k).tolist()) for m, k in ((300, 2), (300, 2), (256, 3)))
                cv2.circle(picture, a, int(rng.integers(10, 90)), colour, -1) if rng.random() < 0.5 else cv2.rectangle(picture, a, b, colour, -1)
            yield picture
        else:
            k = int(rng.integers(3, 60))
            yield cv2.resize(rng.integers(0, 256, (k, k, 3), dtype=np.uint8), (320, 320), interpolation=int(rng.integers(0, 3)))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("photos", type=Path)
    parser.add_argument("--tight", type=Path, metavar="FOLDER")
    parser.add_argument("--rounds", type=int, default=3, metavar="N", help="(default: %(default)s)")
    args = parser.parse_args()
    files = [args.photos / source for source, _ in list_photos(args.photos)]
    rounds = []
    for _ in range(args.rounds):
        (t_found, t_seconds), (found, rate, seconds) = textbook(files), ours(args.photos)
        rounds.append((rate / (len(files) / t_seconds), len(files) / t_seconds, rate, len(files) / seconds))
    ratio, theirs, rate, whole = (statistics.median(column) for column in zip(*rounds))
    print(f"{cores()} cores, {len(files)} photos")
    print(f"textbook's cell      {t_found / len(files):7.1%} found {theirs:6.0f} photos/s")
    print(f"preprocess_lips.py   {found / len(files):7.1%} found {rate:6.0f} photos/s, {ratio:.2f} times as many ({whole:.0f} with starting up)")
    cropper = LipCropper()
    pictures = list(faceless(files))
    print(f"{sum(bool(cropper(picture, largest=True)) for picture in pictures)} of {len(pictures)} pictures without a face yield a mouth")
    if args.tight:
        errors, missed = [], 0
        for row in csv.DictReader(open(args.tight / "labels.csv", newline="")):
            x0, y0, x1, y1 = (float(row[key]) for key in ("mouth_box_x0", "y0", "x1", "y1"))
            faces, *_ = cropper.find(args.tight / row["file"], largest=True)
            missed += not faces
            for face in faces:
                a, b, c, d = face.mouth
                errors.append(np.hypot(a + c - x0 - x1, b + d - y0 - y1) / 2 / (x1 - x0))
        t_found, _ = textbook([args.tight / row["file"] for row in csv.DictReader(open(args.tight / "labels.csv", newline=""))])
        print(f"tight faces: {len(errors) / (len(errors) + missed):.1%} found (textbook's cell {t_found / (len(errors) + missed):.1%}); "
              f"mouth off by {np.median(errors):.1%} of its width (median), by over a quarter in {np.mean(np.array(errors) > 0.25):.1%}")
    print("growth with the photo's size, one core:")
    photo = Image.fromarray(read_photo(files[0]))
    with tempfile.TemporaryDirectory() as folder:
        for megapixels in (0.1, 0.5, 2, 12):
            side = round((megapixels * 1e6) ** 0.5)
            path = Path(folder) / f"{megapixels}.jpg"
            photo.resize((side, side), Image.Resampling.BICUBIC).save(path, quality=90)
            start = time.perf_counter()
            for _ in range(5):
                cropper.find(path, largest=True)
            mine = (time.perf_counter() - start) / 5
            print(f"{megapixels:6} megapixels: {mine * 1e3:6.0f} ms, textbook's cell {textbook([path])[1] * 1e3:6.0f} ms", flush=True)
    print("growth with the number of photos:")
    with tempfile.TemporaryDirectory() as folder:
        for n in (250, 1000):
            for i, file in enumerate(files[:n]):
                target = Path(folder) / str(n) / "a" / f"{i}{file.suffix}"
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_bytes(file.read_bytes())
            print(f"{min(n, len(files)):6} photos: {ours(Path(folder) / str(n))[2]:.1f} s")
    shell = []
    for code in ("import torch, cv2, dlib; from preprocess_lips import landmark_file; dlib.shape_predictor(str(landmark_file()))", None):
        if code is None and not (ROOT / "models" / "model.pt").is_file():
            print("no models/model.pt: predict.py was not timed")
            break
        command = [sys.executable, *(("-c", code) if code else ("predict.py", str(files[0])))]
        times = []
        for _ in range(args.rounds + 2):
            start = time.perf_counter()
            subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
            times.append(time.perf_counter() - start)
        shell.append(statistics.median(times))
    if len(shell) == 2:
        start = time.perf_counter()
        subprocess.run([sys.executable, "predict.py", str(args.photos)], cwd=ROOT, check=True, capture_output=True)
        seconds = time.perf_counter() - start
        print(f"predict.py: one photo {shell[1]:.2f} s, {shell[1] / shell[0]:.2f} times importing torch, cv2, dlib and loading the landmarks; "
              f"the folder {len(files) / (seconds - shell[1]):.0f} photos/s")


if __name__ == "__main__":
    main()
