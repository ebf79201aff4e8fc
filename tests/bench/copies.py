"""Which copies of photos split_train_val.py keeps together, and which different photos it takes for copies.

    python tests/bench/copies.py PHOTOS                PHOTOS holds class folders of photos
    python tests/bench/copies.py PHOTOS --crops CROPS  CROPS holds class folders of mouths, of other photos

Every fifth photo is saved anew in many ways, and found and cropped as a photo of its own.
"""

import argparse
import io
import sys
import tempfile
import time
from pathlib import Path

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


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("photos", type=Path)
    parser.add_argument("--crops", type=Path)
    args = parser.parse_args()
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
