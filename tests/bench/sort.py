"""What predict.py --sort gives at which threshold, on mouths of persons whom the weights never saw.

    python tests/bench/sort.py [--model models/pretrained.pt]

Two tables. The first compares decided mouths (the part of data/faces/labels.csv that is kept apart) with
mouths on which people could not agree (of persons that the weights did not see either): which share of each
goes to unsure/. The second is about keyword folders such as a crawler's: seven tenths of the decided mouths
belong to the folder's class, three tenths to others, and to every ten of them come two undecided mouths and
one picture without a face. It says what share of such a folder comes out right (in the folder of its class,
in unsure/ if undecided, in no_face/ if there is none), what is decided but left to be looked at in unsure/,
and what is in a wrong place.
"""

import argparse
import re
import sys
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(Path(__file__).resolve().parent)]

from preprocess_speed import faceless  # noqa: E402
from strangers import lips, name  # noqa: E402

from net import load_model, predict  # noqa: E402
from preprocess_lips import LipCropper, read_csv, read_photo  # noqa: E402

THRESHOLDS = (0.5, 0.6, 0.7, 0.8, 0.85, 0.9, 0.95, 0.98)
KEYWORDS = ("0none", "2smile", "3openmouth")
OTHERS, UNDECIDED, FACELESS = 0.3, 0.2, 0.1  # shares as above


def person(name):
    """Of whom a photo is, by its name: Ann_Lee_0001.jpg."""
    return re.sub(r"_?\d+$", "", name.split(".")[0])


def faceless_rows(model, data):
    """Pictures without a face: their number, and the probabilities of those in which a mouth is found."""
    cropper, pictures = LipCropper(), list(faceless(sorted((data / "photos").glob("*/*.jpg"))))
    faces = [face for picture in pictures for face in cropper(picture, largest=True)]
    return len(pictures), predict(model, [face.crop for face in faces]).numpy()


def keyword_folder(rows, truth, unsure, none, label, sure, rng):
    """Shares (right, left in unsure, wrong) of a keyword folder for class number `label`."""
    own, others = np.flatnonzero(truth == label), np.flatnonzero(truth != label)
    others = rng.choice(others, round(len(own) * OTHERS / (1 - OTHERS)))
    chosen = np.concatenate([own, others])
    n = len(chosen)
    top, named = rows[chosen].max(1), rows[chosen].argmax(1)
    right = ((named == truth[chosen]) & (top >= sure)).sum()
    wrong = ((named != truth[chosen]) & (top >= sure)).sum()
    caught = (unsure.max(1) < sure).mean() * UNDECIDED * n
    pictures, found = none
    clean = (1 - (found.max(1, initial=0) >= sure).sum() / pictures) * FACELESS * n  # unsure/ is right, too
    total = n * (1 + UNDECIDED + FACELESS)
    right, wrong = right + caught + clean, wrong + (UNDECIDED + FACELESS) * n - caught - clean
    return np.array([right, total - right - wrong, wrong]) / total


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=ROOT / "models" / "pretrained.pt", metavar="FILE")
    parser.add_argument("--data", type=Path, default=ROOT.parent / "shared" / "data", metavar="DIR")
    args = parser.parse_args()
    model = load_model(args.model)
    crops, apart = lips(args.data, "test")
    rows = name(model, crops).numpy()
    truth = np.array([model.classes.index(row["class"]) for row in apart])
    seen = {person(row["photo"]) for row in read_csv(ROOT / "data" / "faces" / "labels.csv")
            if row["part"] == "train"}
    files = sorted((args.data / "lips_undecided").glob("*.jpg"))
    undecided = name(model, [read_photo(path) for path in files if person(path.name) not in seen]).numpy()
    none = faceless_rows(model, args.data)
    print(f"{len(rows)} decided mouths, {len(undecided)} undecided ones, {none[0]} pictures without a face, "
          f"of which {len(none[1])} yield a mouth\n")
    print("threshold  undecided to unsure  decided to unsure  of the others right")
    for sure in THRESHOLDS:
        kept = rows.max(1) >= sure
        right = (rows.argmax(1) == truth)[kept].mean()
        print(f"{sure:9}{(undecided.max(1) < sure).mean():20.1%}{1 - kept.mean():19.1%}{right:21.1%}")
    print("\na keyword folder: right, left in unsure, wrong")
    print("threshold" + "".join(f"{label:>24}" for label in KEYWORDS) + f"{'mean':>24}")
    for sure in THRESHOLDS:
        rng = np.random.default_rng(0)
        shares = [keyword_folder(rows, truth, undecided, none, model.classes.index(label), sure, rng)
                  for label in KEYWORDS]
        cells = [" ".join(f"{share:.1%}" for share in row) for row in (*shares, np.mean(shares, axis=0))]
        print(f"{sure:9}" + "".join(f"{cell:>24}" for cell in cells), flush=True)


if __name__ == "__main__":
    main()
