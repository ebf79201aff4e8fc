"""How weights name the mouths of persons whom they never saw: confusion matrix, accuracy, calibration.

    python tests/bench/strangers.py                        models/pretrained.pt on ../shared/data
    python tests/bench/strangers.py models/model.pt        other weights of the four classes

Three sets: lips, the persons that data/faces/labels.csv keeps apart (the sure labels, and among them those on
which two looks agree); mouths, the textbook's crops, in colour; tight_faces, in colour, cropped by
preprocess_lips.py. The labels of the last two tell a smile from all else, and draw the line elsewhere than
labels.csv does. So they are counted by labels of its four classes as well, those of colour.csv, where two
looks agree.
"""

import argparse
import csv
import sys
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402

from net import load_model, predict  # noqa: E402
from preprocess_lips import LipCropper, read_photo  # noqa: E402

THREE = ("0none", "2smile", "3openmouth")  # of pouting there are too few to average with
BINS = 15


def calibration_error(probabilities, right):
    """Mean distance of confidence and accuracy over bins of confidence; arrays N x nclass and N."""
    confidence = probabilities.max(1)
    place = np.minimum((confidence * BINS).astype(int), BINS - 1)
    return sum(abs((right - confidence)[place == i].sum()) for i in range(BINS)) / len(right)


def read_table(path):
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def lips(data, part):
    """Crops of the decided mouths of persons kept apart, and their rows of labels.csv."""
    files = {path.name: path for path in (data / "lips").glob("*/*.jpg")}  # a few lie in their old class
    rows = [row for row in read_table(ROOT / "data" / "faces" / "labels.csv")
            if row["part"] == part and row["sure"] == "1"]
    return [read_photo(files[row["photo"]]) for row in rows], rows


def mouths(data):
    """The textbook's crops, their names, and which of them smile by its labels."""
    paths = sorted((data / "mouths").glob("*/*.jpg"))
    return ([read_photo(path) for path in paths], [path.name for path in paths],
            [path.parent.name == "2smile" for path in paths])


def tight_faces(data):
    """Crops of the faces in which one is found, their names, and which of them smile by their labels."""
    cropper, crops, names, smiles = LipCropper(), [], [], []
    for row in read_table(data / "tight_faces" / "labels.csv"):
        for face in cropper(read_photo(data / "tight_faces" / row["file"]), largest=True):
            crops.append(face.crop)
            names.append(row["file"])
            smiles.append(row["smile"] == "1")
    return crops, names, smiles


def name(model, crops):
    """Class probabilities, array N x nclass."""
    return torch.cat([predict(model, crops[i:i + 256]) for i in range(0, len(crops), 256)]).numpy()


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", type=Path, default=ROOT / "models" / "pretrained.pt")
    parser.add_argument("--data", type=Path, default=ROOT.parent / "shared" / "data")
    parser.add_argument("--part", choices=["test", "train"], default="test", help="of lips (default: test)")
    args = parser.parse_args()
    model = load_model(args.model)
    classes = list(model.classes)

    crops, rows = lips(args.data, args.part)
    probabilities = name(model, crops)
    labels, named = np.array([classes.index(row["class"]) for row in rows]), probabilities.argmax(1)
    two = np.array([row["looks"] == "2" for row in rows])
    for title, kept in ((f"lips, {args.part} part", labels >= 0), ("those on which two looks agree", two)):
        matrix = np.zeros((len(classes), len(classes)), int)
        np.add.at(matrix, (labels[kept], named[kept]), 1)
        recall = {c: matrix[i, i] / matrix[i].sum() for i, c in enumerate(classes) if matrix[i].sum()}
        error = calibration_error(probabilities[kept], (named == labels)[kept])
        print(f"{title}: {matrix.trace():,} of {kept.sum():,} right, {matrix.trace() / kept.sum():.1%}; "
              f"balanced over {', '.join(THREE)} {np.mean([recall[label] for label in THREE]):.1%}; "
              f"calibration error {error:.1%}")
        print(" " * 12 + "".join(f"{label:>12}" for label in classes) + "   (columns: named)")
        for label, row in zip(classes, matrix):
            print(f"{label:12}" + "".join(f"{n:12,}" for n in row))
    table = read_table(Path(__file__).with_name("colour.csv"))
    looks = {(row["set"], row["file"]): row["class"] for row in table}
    for title, read in (("mouths", mouths), ("tight_faces", tight_faces)):
        crops, names, smiles = read(args.data)
        named = name(model, crops).argmax(1)
        smiles, smiling = np.array(smiles), named == classes.index("2smile")
        found, false = smiling[smiles], smiling[~smiles]
        print(f"{title}: smile or not {(smiling == smiles).mean():.1%} of {len(smiles)} right; named smiling "
              f"{found.sum()} of {len(found)} smiles and {false.sum()} of {len(false)} others")
        pairs = [(classes[n], looks.get((title, file))) for n, file in zip(named, names)]
        right = [label == look for label, look in pairs if look]
        print(f"{title}: {np.mean(right):.1%} of the {len(right)} on whose class two looks agree")


if __name__ == "__main__":
    main()
