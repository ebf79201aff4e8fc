"""Cross-validated accuracy of the recipes on a folder of mouth crops, last epoch, no picking of the best.

    python tests/bench/accuracy.py CROPS                                     both recipes, 5 folds
    python tests/bench/accuracy.py CROPS --group '([^/]+)_\\d+\\.'             persons apart
    python tests/bench/accuracy.py CROPS --test OTHER                        trained on one set, tested on another
    python tests/bench/accuracy.py CROPS --recipes torchvision textbook strong strong:25     and seconds to get there

CROPS holds class folders; with a manifest.csv of preprocess_lips.py in it, the groups are taken from the
photos' names. "torchvision" is the textbook's own loop over torchvision's transforms, "strong:25" the strong recipe
with 25 epochs. The calibration error is that of the predictions on all folds together, without a temperature.
"""

import argparse
import contextlib
import io
import os
import re
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

sys.path[:0] = [str(Path(__file__).resolve().parents[2]), str(Path(__file__).resolve().parent)]

import torch  # noqa: E402

import train  # noqa: E402
from net import simpleconv3  # noqa: E402
from preprocess_lips import MANIFEST, read_csv  # noqa: E402
from split_train_val import group_of, list_crops  # noqa: E402
from textbook import folders, train_textbook  # noqa: E402


def make_folds(labels, groups, k, seed):
    """Fold of every crop: groups whole, classes as even as the groups allow."""
    members = {}
    for i, group in enumerate(groups):
        members.setdefault(group, []).append(i)
    names = sorted(members)
    np.random.default_rng(seed).shuffle(names)
    names.sort(key=lambda name: -len(members[name]))
    total = np.bincount(labels)
    filled, fold = np.zeros((k, len(total))), np.zeros(len(labels), int)
    for name in names:
        counts = np.bincount(labels[members[name]], minlength=len(total))
        best = min(range(k), key=lambda j: (((filled[j] + counts) / total).max() * k + ((filled[j] + counts) / total).sum() / 10))
        filled[best] += counts
        fold[members[name]] = best
    return fold


def one_fold(recipe, data, more):
    """Logits on the validation fold after the last epoch, its labels, and the seconds from crops on disk to there."""
    start = time.perf_counter()
    name, _, epochs = recipe.partition(":")
    epochs = int(epochs or train.RECIPES["textbook" if name == "torchvision" else name]["epochs"])
    if name == "torchvision":
        sets = folders(data)
        for seconds, _, net in train_textbook(*sets, len(sets[0].classes), epochs, workers=2):
            pass
        labels = torch.tensor(sets[1].targets)
        images = torch.stack([image for image, _ in sets[1]])
        with torch.inference_mode():
            return net.eval()(images), labels, seconds
    args = train.parse_args(["--recipe", name, "--epochs", str(epochs), "--data", str(data), "--logs", str(data / "logs"),
                             "--models", str(data / "models"), *more])
    with contextlib.redirect_stdout(io.StringIO()):
        run = train.train(args)
    seconds = time.perf_counter() - start
    net = simpleconv3(len(run.classes))
    net.load_state_dict(run.state["average"] or run.state["net"])
    _, _, (images, labels) = train.load_data(data)
    return train.evaluate(net, images, labels, flip=args.flip, views=args.views)[2], labels, seconds


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("crops", type=Path)
    parser.add_argument("--group", metavar="REGEX")
    parser.add_argument("--test", type=Path, metavar="CROPS", help="other crops, whose classes that are the same are tested")
    parser.add_argument("--folds", type=int, default=5, metavar="K", help="(default: %(default)s)")
    parser.add_argument("--recipes", nargs="+", default=["textbook", "strong"], help="(default: both)")
    parser.add_argument("--first", type=int, metavar="N", help="only so many of the folds")
    parser.add_argument("--seed", type=int, default=1, metavar="N", help="of the folds (default: %(default)s)")
    parser.add_argument("--threads", type=int, metavar="N")
    args, more = parser.parse_known_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    files = [(args.crops, *file) for file in list_crops(args.crops)]
    if args.test:
        others = [(args.test, *file) for file in list_crops(args.test)]
        shared = {label for _, label, _ in files} & {label for _, label, _ in others}
        files = [file for file in files + others if file[1] in shared]
        folds = [[file[0] is args.test for file in files]]
        print(f"{len(files) - sum(folds[0])} crops to train, {sum(folds[0])} to test, classes {', '.join(sorted(shared))}")
    classes = sorted({label for _, label, _ in files})
    if not args.test:
        sources = {(row["class"], row["crop"]): row["source"] for row in read_csv(args.crops / MANIFEST)}
        labels = np.array([classes.index(label) for _, label, _ in files])
        paths = [sources.get(file[1:], "/".join(file[1:])) for file in files]
        groups = [group_of(path, re.compile(args.group)) for path in paths] if args.group else paths
        fold = make_folds(labels, groups, args.folds, args.seed)
        folds = [fold == k for k in range(args.folds)]
        print(f"{len(files)} crops of {len(classes)} classes, {len(set(groups))} groups, {args.folds} folds")
    for recipe in args.recipes:
        accuracy, balanced, seconds, logits, truths = [], [], [], [], []
        for held_out in folds[:args.first]:
            with tempfile.TemporaryDirectory() as folder:
                for (place, label, name), test in zip(files, held_out):
                    target = Path(folder) / ("val" if test else "train") / label
                    target.mkdir(parents=True, exist_ok=True)
                    os.symlink((place / label / name).resolve(), target / name)
                out, truth, time_taken = one_fold(recipe, Path(folder), more)
            matrix = train.confusion_matrix(out.argmax(1), truth, len(classes))
            accuracy.append(float(matrix.trace() / matrix.sum()))
            balanced.append(float((matrix.diagonal() / matrix.sum(1)).mean()))
            seconds.append(time_taken)
            logits.append(out)
            truths.append(truth)
        error = train.calibration_error(torch.cat(logits).softmax(1), torch.cat(truths))
        print(f"{recipe:12} accuracy {np.mean(accuracy):.2%} ± {np.std(accuracy, ddof=len(accuracy) > 1):.2%}   balanced {np.mean(balanced):.2%}   "
              f"calibration error {error:.1%}   {np.mean(seconds):.1f} s a fold   folds "
              + " ".join(f"{a:.1%}" for a in accuracy), flush=True)


if __name__ == "__main__":
    main()
