"""Fill data/raw with the faces of labels.csv, taken from a clone of muxspace/facial_expressions.

    git clone --depth 1 https://github.com/muxspace/facial_expressions ~/facial_expressions
    python data/faces/prepare.py ~/facial_expressions      data/raw/{0none,1pouting,2smile,3openmouth}/*.jpg
    python data/faces/prepare.py ~/facial_expressions strangers --part test     the persons kept apart

The training part, which is the default, has few pouting mouths, so it also gets copies of these and closed
mouths warped to pouts (pouts.csv names them). They are called after their photos, Ann_0001.copy02.jpg and
Ann_0001.pout1.jpg. What is there already is left alone. Keep persons apart when you split:

    python split_train_val.py --group '([^/]+?)_?\\d+\\.'
"""

import argparse
import csv
import io
import sys
from collections import Counter
from pathlib import Path

from PIL import Image
from tqdm import tqdm

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent.parent), str(HERE)]

from pout import make_pout  # noqa: E402

from preprocess_lips import LipCropper, read_photo, write_file  # noqa: E402

CLONE = "git clone --depth 1 https://github.com/muxspace/facial_expressions"
POUTING = "1pouting"
TIMES = 10  # that each real pout is there
NAMED = 5  # of the missing photos


def read_table(name):
    """The rows of a CSV file beside this script, as dicts."""
    with open(HERE / name, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def commented(jpeg, text):
    """A JPEG file's bytes with a comment: another file of the same pixels."""
    comment = text.encode()
    return jpeg[:2] + b"\xff\xfe" + (len(comment) + 2).to_bytes(2, "big") + comment + jpeg[2:]


def plan(part):
    """What is to be made: list of (path below the output folder, photo, how)."""
    rows = [row for row in read_table("labels.csv") if row["sure"] == "1" and part in (row["part"], "all")]
    files = [(f"{row['class']}/{row['photo']}", row["photo"], "photo") for row in rows]
    if part != "test":
        for row in rows:
            if row["class"] == POUTING and row["part"] == "train":
                stem = f"{POUTING}/{Path(row['photo']).stem}"
                files += [(f"{stem}.copy{i:02d}.jpg", row["photo"], "copy") for i in range(2, TIMES + 1)]
        for row in read_table("pouts.csv"):
            stem = f"{POUTING}/{Path(row['photo']).stem}"
            files.append((f"{stem}.pout{row['warp']}.jpg", row["photo"], "warped"))
    return files


def make(photo, path, how, cropper):
    """The bytes of one file of the plan.

    Parameters
    ----------
    photo : Path
        In the clone.
    path : str
        As in the plan.
    how : str
        photo, copy or warped.
    cropper : callable
        Returns a `LipCropper`, which takes half a second to load.

    Returns
    -------
    bytes or None
        None where none of the warps looks like a pout, or no mouth is found.
    """
    data = photo.read_bytes()
    if how == "copy":
        return commented(data, Path(path).stem)
    if how == "warped":
        warped = make_pout(read_photo(data), cropper(), f"{photo.name}{Path(path).stem[-1]}")
        if warped is None:
            return None
        jpeg = io.BytesIO()
        Image.fromarray(warped).save(jpeg, "JPEG", quality=92)
        return jpeg.getvalue()
    return data


def prepare(clone, raw, part):
    """Lay out the photos of `part`.

    Returns
    -------
    (kinds, classes, known, missing, stiff) : Counter, Counter, int, list of str, list of str
        Files by kind and by class, how many of them were there before, photos that the clone lacks, and
        photos of which no pout could be made.
    """
    files = plan(part)
    images = clone / "images"
    there = {path.name for path in images.iterdir()} if images.is_dir() else set()
    if not there & {photo for _, photo, _ in files}:
        raise ValueError(f"{clone}: no clone of muxspace/facial_expressions, whose photos lie in images/; "
                         f"'{CLONE}' brings it")
    loaded = []

    def cropper():
        if not loaded:
            loaded.append(LipCropper())
        return loaded[0]

    counts, classes, known, missing, stiff = Counter(), Counter(), 0, set(), set()
    for path, photo, how in tqdm(files, unit="photo", leave=False, disable=None):
        if photo not in there:
            missing.add(photo)
            continue
        if (raw / path).is_file():
            known += 1
        else:
            data = make(images / photo, path, how, cropper)
            if data is None:
                stiff.add(photo)
                continue
            (raw / path).parent.mkdir(parents=True, exist_ok=True)
            write_file(raw / path, data)
        counts[how] += 1
        classes[path.split("/")[0]] += 1
    return counts, classes, known, sorted(missing), sorted(stiff)


def main(argv=None):
    title, commands, more, split = __doc__.strip().split("\n\n")
    parser = argparse.ArgumentParser(
        description=f"{title}\n\n{more}", epilog=f"examples:\n{commands}\n{split}",
        formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("clone", type=Path, help="the folder that git clone made; its photos lie in images/")
    parser.add_argument("raw", nargs="?", type=Path, default=HERE.parent / "raw",
                        help="where the class folders go (default: data/raw)")
    parser.add_argument("--part", choices=["train", "test", "all"], default="train",
                        help="test: a tenth of the persons, whom the shipped weights never saw; "
                             "train: all others (default: %(default)s)")
    args = parser.parse_args(argv)
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        counts, classes, known, missing, stiff = prepare(args.clone, args.raw, args.part)
    except KeyboardInterrupt:
        sys.exit("\ninterrupted: what is done is kept; the same command goes on from there")
    except (OSError, ValueError) as error:
        sys.exit(f"error: {error}")
    print(f"{sum(counts.values()):,} photos in {args.raw}, {known:,} of them from before: "
          + ", ".join(f"{n:,} {label}" for label, n in sorted(classes.items())))
    if counts["copy"] or counts["warped"]:
        print(f"of the pouting ones {counts['copy']:,} are copies of real ones and {counts['warped']:,} "
              "closed mouths, warped")
    for photos, what in ((missing, f"are not in {args.clone / 'images'}"),
                         (stiff, "could not be warped to a pout")):
        if photos:
            more = " ..." if len(photos) > NAMED else ""
            print(f"{len(photos):,} photos {what}: {', '.join(photos[:NAMED])}{more}")


if __name__ == "__main__":
    main()
