"""How weights name the mouths of persons whom they never saw: confusion matrix, accuracy, calibration.

    python tests/bench/strangers.py                        models/pretrained.pt on ../shared/data
    python tests/bench/strangers.py models/model.pt        other weights of the four classes

Three sets: lips, the persons that data/faces/labels.csv keeps apart (those labels that are sure); mouths,
the textbook's crops, in colour; tight_faces, in colour, cropped by preprocess_lips.py. The last two tell a
smile from all else, so that is what is counted there.
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


def lips(data, part):
    """Crops of the decided mouths of persons kept apart, and their classes."""
    with open(ROOT / "data" / "faces" / "labels.csv", newline="", encoding="utf-8") as file:
        rows = [row for row in csv.DictReader(file) if row["part"] == part and row["sure"] == "1"]
    crops = [read_photo(data / "lips" / row["class"] / row["photo"]) for row in rows]
    return crops, [row["class"] for row in rows]


def mouths(data):
    """The textbook's crops, and which of them smile."""
    paths = sorted((data / "mouths").glob("*/*.jpg"))
    return [read_photo(path) for path in paths], [path.parent.name == "2smile" for path in paths]


def tight_faces(data):
    """Crops of the faces in which one is found, and which of them smile."""
    cropper, crops, smiles = LipCropper(), [], []
    with open(data / "tight_faces" / "labels.csv", newline="", encoding="utf-8") as file:
        for row in csv.DictReader(file):
            for face in cropper(read_photo(data / "tight_faces" / row["file"]), largest=True):
                crops.append(face.crop)
                smiles.append(row["smile"] == "1")
    return crops, smiles


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

    crops, truth = lips(args.data, args.part)
    probabilities, labels = name(model, crops), np.array([classes.index(label) for label in truth])
    named = probabilities.argmax(1)
    matrix = np.zeros((len(classes), len(classes)), int)
    np.add.at(matrix, (labels, named), 1)
    recall = {label: matrix[i, i] / matrix[i].sum() for i, label in enumerate(classes) if matrix[i].sum()}
    print(f"lips, {args.part} part: {matrix.trace():,} of {len(labels):,} right, "
          f"{matrix.trace() / len(labels):.1%}; "
          f"balanced over {', '.join(THREE)} {np.mean([recall[label] for label in THREE]):.1%}; "
          f"calibration error {calibration_error(probabilities, named == labels):.1%}")
    print(" " * 12 + "".join(f"{label:>12}" for label in classes) + "   (columns: named)")
    for label, row in zip(classes, matrix):
        print(f"{label:12}" + "".join(f"{n:12,}" for n in row))
    pouting = classes.index("1pouting")
    others = labels != pouting
    print(f"pouting: {matrix[pouting, pouting]} of {matrix[pouting].sum()} named so, "
          f"and {(named[others] == pouting).sum()} of {others.sum():,} others")
    for title, (crops, smiles) in (("mouths", mouths(args.data)), ("tight_faces", tight_faces(args.data))):
        smiles = np.array(smiles)
        smiling = name(model, crops).argmax(1) == classes.index("2smile")
        found, false = smiling[smiles], smiling[~smiles]
        print(f"{title}: {(smiling == smiles).mean():.1%} of {len(smiles)} right; named smiling "
              f"{found.sum()} of {len(found)} smiles and {false.sum()} of {len(false)} others")


if __name__ == "__main__":
    main()
