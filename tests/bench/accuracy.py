"""Accuracy of the recipes on a folder of mouth crops, last epoch, no picking of the best.

    python tests/bench/accuracy.py CROPS                                  both recipes, 5 folds
    python tests/bench/accuracy.py CROPS --group '([^/]+)_\\d+\\.'          persons apart
    python tests/bench/accuracy.py CROPS --test OTHER                     train on one set, test on another
    python tests/bench/accuracy.py CROPS --recipes torchvision textbook strong strong:25
    python tests/bench/accuracy.py CROPS --few 3 10 30 100 --plot few.svg --recipes finetune strong

CROPS holds class folders; with a manifest.csv of preprocess_lips.py in it, the groups are taken from the
photos' names, and what data/faces/prepare.py made of photos (copies, warped mouths) is only trained on, not
tested. "torchvision" is the textbook's own loop over torchvision's transforms, "strong:25" the
strong recipe with 25 epochs. The calibration error is that of the predictions on all folds together,
without a temperature. With --looks data/faces/labels.csv the mouths on whose class two looks agree count
once more by themselves. --few takes so many crops of each class to train and 300 others to test, five draws.
Other flags go to train.py.
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
from textbook import folders, train_textbook  # noqa: E402

import net  # noqa: E402
import train  # noqa: E402
from preprocess_lips import MANIFEST, read_csv  # noqa: E402
from split_train_val import group_of, list_crops  # noqa: E402

OFTEN = 30  # images of a class; of fewer a recall says little


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
        shares = [(filled[j] + counts) / total for j in range(k)]
        best = min(range(k), key=lambda j: shares[j].max() * k + shares[j].sum() / 10)
        filled[best] += counts
        fold[members[name]] = best
    return fold


def one_fold(recipe, data, more):
    """Logits on the validation fold after the last epoch, its labels, and the seconds that took."""
    start = time.perf_counter()
    name, _, epochs = recipe.partition(":")
    epochs = int(epochs or train.RECIPES["textbook" if name == "torchvision" else name]["epochs"])
    if name == "torchvision":
        sets = folders(data)
        *_, (seconds, _, trained) = train_textbook(*sets, len(sets[0].classes), epochs, workers=2)
        labels = torch.tensor(sets[1].targets)
        images = torch.stack([image for image, _ in sets[1]])
        with torch.inference_mode():
            return trained.eval()(images), labels, seconds
    args = train.parse_args([
        "--recipe", name, "--epochs", str(epochs), "--data", str(data), "--logs", str(data / "logs"),
        "--models", str(data / "models"), *more])
    with contextlib.redirect_stdout(io.StringIO()):
        run = train.train(args)
    seconds = time.perf_counter() - start
    learner = train.Learner(args, run.classes, torch.ones(len(run.classes)), 1, torch.device("cpu"), 1)
    run.restore(run.state, learner)  # of the last epoch, whichever was kept
    val = train.CropFolder(data / "val", net.CROP_SIZE)
    images, labels = train.load_images(val), torch.tensor(val.targets)
    return train.evaluate(learner.judged, images, labels)[2], labels, seconds


def lay_out(files, held_out, folder):
    """Links to files, (folder, class, name), as an ImageFolder in `folder`; None is on neither side."""
    for (place, label, name), test in zip(files, held_out):
        if test is not None:
            target = Path(folder) / ("val" if test else "train") / label
            target.mkdir(parents=True, exist_ok=True)
            os.symlink((place / label / name).resolve(), target / name)


def print_matrix(title, probabilities, truths, classes):
    """Share named rightly, calibration error, and the confusion matrix: rows are true, columns named."""
    matrix = net.confusion_matrix(probabilities.argmax(1), truths, len(classes))
    recall, often = matrix.diagonal() / matrix.sum(1), matrix.sum(1) >= OFTEN
    error = net.calibration_error(probabilities, truths)
    print(f"  {title}: {matrix.trace() / matrix.sum():.2%} of {len(truths):,}, balanced over classes of "
          f"{OFTEN} and more {recall[often].mean():.2%}, calibration error {error:.1%}")
    for name, row, share in zip(classes, matrix.int().tolist(), recall.tolist()):
        print(f"    {name:14}" + "".join(f"{n:7,}" for n in row) + f"{share:9.1%}")


def few_photos(files, recipes, sizes, draws, tested, more):
    """Accuracy by number of training crops a class: dict of recipe to list of (size, mean, spread)."""
    curves = {}
    for recipe in recipes:
        for size in sizes:
            results = []
            for draw in range(draws):
                rng, taken, held_out = np.random.default_rng(draw), {}, [None] * len(files)
                for i in rng.permutation(len(files)):
                    n = taken[files[i][1]] = taken.get(files[i][1], 0) + 1
                    held_out[i] = n > size if n <= size + tested else None
                with tempfile.TemporaryDirectory() as folder:
                    lay_out(files, held_out, folder)
                    logits, labels, seconds = one_fold(recipe, Path(folder), more)
                results.append((float((logits.argmax(1) == labels).float().mean()), seconds))
            mean, seconds = np.mean(results, 0)
            spread = float(np.std([one for one, _ in results], ddof=1))
            curves.setdefault(recipe, []).append((size, float(mean), spread))
            print(f"{recipe:12} {size:4} a class: {mean:.1%} ± {spread:.1%}   {seconds:.1f} s", flush=True)
    return curves


def plot(curves, path):
    """Draw the curves of `few_photos`, number of photos on a logarithmic axis."""
    from matplotlib.figure import Figure

    figure = Figure((6.4, 3.4), layout="constrained")
    axes = figure.subplots()
    for recipe, points in curves.items():
        sizes, means, spreads = zip(*points)
        axes.errorbar(sizes, means, spreads, marker="o", capsize=3, label=recipe)
        axes.annotate(recipe, (sizes[-1], means[-1]), (10, -4), textcoords="offset points")
    axes.set_xscale("log")
    axes.set_xticks(sizes, sizes, minor=False)
    axes.minorticks_off()
    axes.set(xlabel="photos a class", xlim=(None, 1.9 * sizes[-1]))
    axes.yaxis.set_major_formatter("{x:.0%}")
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("crops", type=Path)
    parser.add_argument("--group", metavar="REGEX")
    parser.add_argument(
        "--test", type=Path, metavar="CROPS", help="other crops; the classes that both have are tested"
    )
    parser.add_argument("--folds", type=int, default=5, metavar="K", help="(default: %(default)s)")
    parser.add_argument("--recipes", nargs="+", default=["textbook", "strong"], help="(default: both)")
    parser.add_argument("--first", type=int, metavar="N", help="only so many of the folds")
    parser.add_argument(
        "--seed", type=int, default=1, metavar="N", help="of the folds (default: %(default)s)"
    )
    parser.add_argument("--threads", type=int, metavar="N")
    parser.add_argument("--looks", type=Path, metavar="CSV", help="table with the columns photo and looks")
    parser.add_argument("--few", type=int, nargs="+", metavar="N", help="numbers of training crops a class")
    parser.add_argument("--plot", type=Path, metavar="SVG", help="a picture of what --few gives")
    parser.add_argument("--draws", type=int, default=5, metavar="N", help="(default: %(default)s)")
    args, more = parser.parse_known_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    files = [(args.crops, *file) for file in list_crops(args.crops)]
    if args.few:
        curves = few_photos(files, args.recipes, args.few, args.draws, 300, more)
        if args.plot:
            plot(curves, args.plot)
        return
    if args.test:
        others = [(args.test, *file) for file in list_crops(args.test)]
        shared = {label for _, label, _ in files} & {label for _, label, _ in others}
        files = [file for file in files + others if file[1] in shared]
        folds = [[file[0] is args.test for file in files]]
        print(
            f"{len(files) - sum(folds[0])} crops to train, {sum(folds[0])} to test, "
            f"classes {', '.join(sorted(shared))}"
        )
    classes = sorted({label for _, label, _ in files})
    if not args.test:
        sources = {(row["class"], row["crop"]): row["source"] for row in read_csv(args.crops / MANIFEST)}
        labels = np.array([classes.index(label) for _, label, _ in files])
        paths = [sources.get(file[1:], "/".join(file[1:])) for file in files]
        groups = [group_of(path, re.compile(args.group)) for path in paths] if args.group else paths
        fold = make_folds(labels, groups, args.folds, args.seed)
        made = np.array([bool(re.search(r"\.(copy|pout)\d+\.", path)) for path in paths])
        folds = [np.where(made & (fold == k), None, fold == k) for k in range(args.folds)]
        print(f"{len(files)} crops of {len(classes)} classes, {len(set(groups))} groups, {args.folds} folds")
        table = read_csv(args.looks) if args.looks else []
        two = {(row["class"], row["photo"]) for row in table if row["looks"] == "2"}
        agreed = {file[1:] for file, path in zip(files, paths) if (file[1], Path(path).name) in two}
    for recipe in args.recipes:
        accuracy, balanced, seconds, logits, truths, tested = [], [], [], [], [], []
        for held_out in folds[:args.first]:
            with tempfile.TemporaryDirectory() as folder:
                lay_out(files, held_out, folder)
                out, truth, time_taken = one_fold(recipe, Path(folder), more)
            matrix = net.confusion_matrix(out.argmax(1), truth, len(classes))
            accuracy.append(float(matrix.trace() / matrix.sum()))
            balanced.append(float((matrix.diagonal() / matrix.sum(1)).mean()))
            seconds.append(time_taken)
            logits.append(out)
            truths.append(truth)
            tested += sorted(file[1:] for file, test in zip(files, held_out) if test)  # as ImageFolder sorts
        logits, truths = torch.cat(logits), torch.cat(truths)
        spread = np.std(accuracy, ddof=len(accuracy) > 1)
        print(
            f"{recipe:12} accuracy {np.mean(accuracy):.2%} ± {spread:.2%}   "
            f"balanced {np.mean(balanced):.2%}   {np.mean(seconds):.1f} s a fold",
            flush=True,
        )
        probabilities = logits.softmax(1)
        print_matrix("all", probabilities, truths, classes)
        if args.looks and not args.test:
            kept = torch.tensor([file in agreed for file in tested])
            print_matrix("those on which two looks agree", probabilities[kept], truths[kept], classes)


if __name__ == "__main__":
    main()
