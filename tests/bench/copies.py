"""Which copies of photos split_train_val.py keeps together, and which different photos it takes for copies.

    python tests/bench/copies.py PHOTOS                PHOTOS holds class folders of photos
    python tests/bench/copies.py PHOTOS --crops CROPS  CROPS holds class folders of mouths, of other photos
    python tests/bench/copies.py --crops CROPS --growth 15086 100000  seconds and memory by number and kind

Every fifth photo is saved anew in many ways, and found and cropped as a photo of its own.
"""

import argparse
import io
import itertools
import resource
import sys
import tempfile
import time
from pathlib import Path

import cv2
import numpy as np
from PIL import Image, ImageEnhance, ImageFilter
from tqdm import tqdm

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from preprocess_lips import LipCropper, list_photos  # noqa: E402
from split_train_val import find_copies, list_crops  # noqa: E402

RNG = np.random.default_rng(0)


def scaled(image, factor):
    return image.resize((int(image.width * factor), int(image.height * factor)), Image.Resampling.BICUBIC)


def cut(image, low, high):
    """Without a random share, from `low` to `high`, of each side."""
    shares = RNG.uniform(low, high, 4) * np.tile(image.size, 2)
    left, top, right, bottom = map(int, shares)
    return image.crop((left, top, image.width - right, image.height - bottom))


def brighter(image, factor):
    return ImageEnhance.Brightness(image).enhance(factor)


COPIES = {  # what is done to the photo, and the quality with which it is saved
    "JPEG, quality 60": (lambda image: image, 60),
    "JPEG, quality 30": (lambda image: image, 30),
    "half the size": (lambda image: scaled(image, 0.5), 85),
    "0.7 of the size": (lambda image: scaled(image, 0.7), 70),
    "1.7 times the size": (lambda image: scaled(image, 1.7), 85),
    "darker, 0.65": (lambda image: brighter(image, 0.65), 90),
    "brighter, 1.3": (lambda image: brighter(image, 1.3), 90),
    "more contrast, 1.4": (lambda image: ImageEnhance.Contrast(image).enhance(1.4), 90),
    "gamma 0.7": (lambda image: image.point([int(255 * (i / 255) ** 0.7 + 0.5) for i in range(256)] * 3), 90),
    "grey": (lambda image: image.convert("L").convert("RGB"), 90),
    "blurred by a pixel": (lambda image: image.filter(ImageFilter.GaussianBlur(1)), 85),
    "0 to 5 % cut off each side": (lambda image: cut(image, 0, 0.05), 90),
    "0 to 10 % cut off, 0.6 of the size": (lambda image: scaled(cut(image, 0, 0.1), 0.6), 75),
    "0 to 10 % cut off, brighter, 1.25": (lambda image: brighter(cut(image, 0, 0.1), 1.25), 75),
    "5 to 10 % cut off": (lambda image: cut(image, 0.05, 0.1), 90),
    "10 to 15 % cut off": (lambda image: cut(image, 0.1, 0.15), 85),
}


def save_crop(cropper, photo, path):
    """Save the crop of a photo's largest face; whether there is one."""
    faces = cropper.find(photo, largest=True).faces
    if faces:
        Image.fromarray(faces[0].crop).save(path, quality=95)
    return bool(faces)


KINDS = {  # pixels of 128 by which mouths are bent, and degrees by which they are turned, at random
    "different": (1.5, 4),  # the upper half of one mouth and the lower half of another
    "ten of each": (0.3, 5),
    "frames of one, still": (0.6, 2),
    "frames of one, talking": (2, 2),
}


def grown(kind, i, mouths):
    """The i-th mouth of a kind: uint8 array of shape (128, 128)."""
    rng = np.random.default_rng((len(kind), i))
    bend, turn = KINDS[kind]
    image = mouths[i // 10 % len(mouths) if kind == "ten of each" else 0]
    if kind == "different":
        upper, lower = mouths[rng.integers(0, len(mouths), 2)]
        image = np.where(np.arange(128)[:, None] < 64, upper, lower)
    turned = cv2.getRotationMatrix2D((63.5, 63.5), rng.uniform(-turn, turn), rng.uniform(0.95, 1.05))
    turned[:, 2] += rng.uniform(-3, 3, 2)
    field = cv2.resize(rng.normal(0, bend, (5, 5, 2)), (128, 128), interpolation=cv2.INTER_CUBIC)
    places = np.mgrid[:128, :128][::-1].transpose(1, 2, 0) @ turned[:, :2].T + turned[:, 2] + field
    image = cv2.remap(image, np.float32(places), None, cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE)
    image = (image - 128.0) * rng.uniform(0.75, 1.25) + 128 + rng.uniform(-25, 25)
    return np.uint8(np.clip(image + rng.normal(0, 1, image.shape), 0, 255))


def growth(crops, counts):
    """Print the seconds and the memory that finding copies among so many crops of each kind takes."""
    mouths = np.stack([cv2.resize(np.asarray(Image.open(path).convert("L")), (128, 128))
                       for path in tqdm(list_crops(crops).values(), "mouths")])
    for n, kind in itertools.product(counts, KINDS):
        with tempfile.TemporaryDirectory() as folder:
            files = {("a", f"{i:06}.jpg"): Path(folder, f"{i:06}.jpg") for i in range(n)}
            for i, path in enumerate(tqdm(files.values(), kind)):
                Image.fromarray(grown(kind, i, mouths)).save(path, quality=85)
            start, cpu = time.perf_counter(), time.process_time()
            pairs = find_copies(files)
            seconds, cpu = time.perf_counter() - start, time.process_time() - cpu
        memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
        print(f"{n} mouths, {kind:22}: {seconds:.1f} s, {cpu:.1f} s of CPU time, {memory} MB at most, "
              f"{len(pairs)} joined to {len({first for first, _ in pairs})}", flush=True)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("photos", nargs="?", type=Path)
    parser.add_argument("--crops", type=Path)
    parser.add_argument("--growth", nargs="+", type=int, metavar="N")
    args = parser.parse_args()
    if args.growth:
        growth(args.crops, args.growth)
        return
    cropper = LipCropper()
    sources = [args.photos / source for source, _ in list_photos(args.photos)][::5]
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        photos = {("a", f"{i}.jpg"): (path, folder / f"{i}.jpg") for i, path in enumerate(sources)}
        originals = {file: crop for file, (path, crop) in tqdm(photos.items(), "photos")
                     if save_crop(cropper, path, crop)}
        for title, (change, quality) in COPIES.items():
            copies, pairs = {}, set()
            for file in originals:
                data = io.BytesIO()
                change(Image.open(photos[file][0]).convert("RGB")).save(data, "JPEG", quality=quality)
                crop, copy = folder / f"copy_{file[1]}", ("b", file[1])
                if save_crop(cropper, data.getvalue(), crop):
                    copies[copy] = crop
                    pairs.add((file, copy))
            joined = pairs & set(find_copies(originals | copies))
            share = len(joined) / len(pairs)
            print(f"{title:36} {len(joined)} of {len(pairs)} joined, {share:.1%}", flush=True)
    if args.crops:
        files = list_crops(args.crops)
        start = time.process_time()
        pairs = find_copies(files)
        seconds = time.process_time() - start
        print(f"{len(files)} other mouths, {seconds:.0f} s of CPU time: {len(pairs)} pairs joined",
              *(f"{a[1]} and {b[1]}" for a, b in pairs), sep="\n")


if __name__ == "__main__":
    main()
