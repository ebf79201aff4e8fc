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
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(Path(__file__).resolve().parent)]

import torch  # noqa: E402
from accuracy import print_matrix  # noqa: E402

from net import load_model, predict  # noqa: E402
from preprocess_lips import LipCropper, read_csv, read_photo  # noqa: E402


def lips(data, part):
    """Crops of the decided mouths of persons kept apart, and their rows of labels.csv."""
    files = {path.name: path for path in (data / "lips").glob("*/*.jpg")}  # a few lie in their old class
    rows = [row for row in read_csv(ROOT / "data" / "faces" / "labels.csv")
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
    for row in read_csv(data / "tight_faces" / "labels.csv"):
        for face in cropper(read_photo(data / "tight_faces" / row["file"]), largest=True):
            crops.append(face.crop)
            names.append(row["file"])
            smiles.append(row["smile"] == "1")
    return crops, names, smiles


def name(model, crops):
    """Class probabilities, float tensor N x nclass."""
    return torch.cat([predict(model, crops[i:i + 256]) for i in range(0, len(crops), 256)])


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
    labels = torch.tensor([classes.index(row["class"]) for row in rows])
    two = torch.tensor([row["looks"] == "2" for row in rows])
    print("lips: rows are true, columns named, then the share named rightly")
    print_matrix(f"{args.part} part", probabilities, labels, classes)
    print_matrix("those on which two looks agree", probabilities[two], labels[two], classes)
    table = read_csv(Path(__file__).with_name("colour.csv"))
    looks = {(row["set"], row["file"]): row["class"] for row in table}
    for title, read in (("mouths", mouths), ("tight_faces", tight_faces)):
        crops, names, smiles = read(args.data)
        named = name(model, crops).argmax(1)
        smiles, smiling = torch.tensor(smiles), named == classes.index("2smile")
        found, false = smiling[smiles], smiling[~smiles]
        right = (smiling == smiles).float().mean()
        print(f"{title}: smile or not {right:.1%} of {len(smiles)} right; named smiling "
              f"{found.sum()} of {len(found)} smiles and {false.sum()} of {len(false)} others")
        pairs = [(classes[n], looks.get((title, file))) for n, file in zip(named, names)]
        right = [label == look for label, look in pairs if look]
        print(f"{title}: {sum(right) / len(right):.1%} of the {len(right)} on whose class two looks agree")


if __name__ == "__main__":
    main()
