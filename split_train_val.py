"""Mouth crops to an ImageFolder: one tenth of every class for validation, the rest for training.

    python split_train_val.py                          data/lips to data/train and data/val
    python split_train_val.py crops data --seed 7      other folders, another draw
    python split_train_val.py --group '(s\\d+)_'        all crops of s07_3.png, s07_4.png ... on one side

Validation gets floor(n / 10) of each class, at least one of two or more. Crops that show one moment, such as
bursts and re-encoded copies, stay on one side. The same crops and seed give the same split; when crops are
added, the old ones stay where they are. split.csv in the output folder lists what was made, so that a rerun
replaces just that and touches no other file.
"""

import argparse
import functools
import hashlib
import itertools
import os
import re
import shutil
import sys
from collections import Counter, defaultdict
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np
from numpy.lib.stride_tricks import sliding_window_view
from PIL import Image
from tqdm import tqdm

from preprocess_lips import (
    MANIFEST,
    NEEDED,
    class_folders,
    class_table,
    command_line,
    composed,
    cores,
    counted,
    is_hidden,
    is_name,
    locked,
    printable,
    read_csv,
    replacing,
    sweep,
    write_csv,
    writing,
)

COLUMNS = ("part", "class", "file", "group", "draw", "source")
RECORD = "split.csv"
# Correlations of two mouths; tests/bench/README.md says what copies and different photos reach
GLANCE = 0.84  # roughly aligned, in few directions: those of copies, and nine pairs in 1,000 of others
ALIKE = 0.935  # aligned to a pixel: one pair in 10,000 of others
ALIGNABLE = 0.92  # before they are laid over each other with care
MOST = 32  # tries without success, then the rest of the less alike is left
SAME_MOUTH = 0.985  # after that: they are of one photo
SIDES = 26, 29, 32, 35, 38  # widths in pixels to which mouths are scaled to look alike
LIPS = 14, 40, 14, 50  # first and last row and column of the lips in 64 x 64 pixels


# --- groups


def list_crops(crops):
    """All images in the class folders of `crops`: dict of (class, file name), sorted, to path.

    Raises ValueError where two files have one name, their accents written in two ways.
    """
    suffixes, found = Image.registered_extensions(), {}
    for folder in class_folders(crops):
        for path in folder.iterdir():
            if is_hidden(path.name) or path.suffix.lower() not in suffixes or not path.is_file():
                continue
            other = found.setdefault((composed(folder.name), composed(path.name)), path)
            if other != path and other.read_bytes() != path.read_bytes():
                raise ValueError(f"{path}: has the same name as {other}, written in another way; rename one")
    return dict(sorted(found.items()))


def find_group(path, pattern):
    """The match of `pattern` in a path, in which what --sort puts before names does not count; or None."""
    return pattern.search(re.sub(r"(^|/)[01]\.\d{3}(-[^/_]+)?_", r"\1", path))


def group_of(path, pattern):
    """The part of `path` that names its group: the first parenthesis of `pattern`, else the whole match.

    A path that does not match is a group of its own.
    """
    match = find_group(path, pattern)
    if not match:
        return path
    return match.group(1) if pattern.groups and match.group(1) is not None else match.group(0)


def miniature(path):
    """An image in grey, uint8 array of 64 x 64; 0 for what is no readable image."""
    try:
        with Image.open(path) as image:
            if image.format in ("EPS", "WMF"):  # programs, which Pillow has Ghostscript or Windows run
                return 0
            image.draft("L", (64, 64))
            return np.asarray(image.convert("L").resize((64, 64), Image.Resampling.BOX))
    except Exception:  # decoders raise almost anything; train.py names the file
        return 0


def progress(doing, total):
    """A progress bar over crops; where there is no terminal for it, one line if they are many."""
    if total >= 2000 and not sys.stderr.isatty():
        print(f"{doing} {total:,} crops ...", file=sys.stderr, flush=True)
    return tqdm(total=total, desc=doing, unit="crop", leave=False, disable=None)


def windows(images, side, reach):
    """The mouths of miniatures made `side` pixels wide, from all places up to `reach` pixels off the middle.

    From uint8 of shape (N, 64, 64), float32 of shape (N, (2 * reach + 1)**2, 320): 16 rows, 20 columns each.
    """
    small = np.empty((len(images), side, side), np.uint8)
    for image, smaller in zip(images, small):
        cv2.resize(image, (side, side), smaller, interpolation=cv2.INTER_AREA)
    top, left = round(0.42 * side) - 8 - reach, side // 2 - 10 - reach
    some = sliding_window_view(np.float32(small), (16, 20), (1, 2))
    return some[:, top:, left:][:, :2 * reach + 1, :2 * reach + 1].reshape(len(images), -1, 16 * 20)


def discriminants(images):
    """In which directions mouths differ most, compared with what a small shift or scaling changes.

    Of miniatures, uint8 of shape (N, 64, 64), the 40 best, float32 of shape (320, 40), to project `windows`
    on; brightness drops out. Fisher 1936, "The use of multiple measurements in taxonomic problems".
    """
    some = images[::len(images) // 2000 + 1]
    mouths = windows(some, 32, 0)
    moved = np.concatenate([windows(some, 32, 1), windows(some, 31, 0), windows(some, 33, 0)], 1) - mouths
    contrast = mouths.std(2, keepdims=True) + 1e-6
    mouths, moved = (((x - x.mean(2, keepdims=True)) / contrast).reshape(-1, 320) for x in (mouths, moved))
    within = moved.T @ moved
    within += np.eye(320) * (within.trace() / 3200 + 1e-3)  # noise, and what else copies differ by
    root = np.linalg.inv(np.linalg.cholesky(within))
    best = root.T @ np.linalg.eigh(root @ (mouths.T @ mouths) @ root.T)[1][:, :-41:-1]
    return np.float32(best - best.mean(0))


def directions(vectors):
    return vectors / (np.linalg.norm(vectors, axis=-1, keepdims=True) + 1e-6)


def alike(images, basis, others):
    """Which mouths look alike at a glance, shifted by a tenth and scaled by a fifth at most.

    For each of `images`, uint8 of shape (N, 64, 64), an array of the indices of the `others` that are like
    it, the nearest first. `others` are mouths in the middles of images, projected on the `basis` that
    `discriminants` gives, float32 of shape (M, 40).
    """
    if not len(images):
        return []
    places = np.stack([windows(images, side, 3) @ basis for side in SIDES], 1)
    # first 15 of the 245 places and 24 of the 40 directions, then all of them for what is left
    few = places.reshape(len(images), len(SIDES), 7, 7, 40)[:, 1:4, (3, 1, 5, 3, 3), (3, 3, 3, 1, 5), :24]
    few = directions(few.reshape(-1, 24))
    places, near = directions(places.reshape(len(images), 245, 40)), []
    for start in range(0, len(others), 1024):  # their products fit a processor's cache
        best = few @ directions(others[start:start + 1024, :24]).T
        best = best.reshape(len(images), 15, -1).max(1)
        near.append(np.argwhere(best >= GLANCE) + (0, start))
    near = np.concatenate(near)
    near, others = near[near[:, 0].argsort(kind="stable")], directions(others)
    ends = np.searchsorted(near[:, 0], np.arange(1, len(images)))
    found = []
    for place, likely in zip(places, np.split(near[:, 1], ends)):
        look = (place @ others[likely].T).max(0, initial=-1)
        found.append(likely[(-look).argsort(kind="stable")[:np.count_nonzero(look >= ALIKE)]])
    return found


def templates(image):
    """The lips of a miniature in five sizes: list of (uint8 array, scale, its first row and column)."""
    top, bottom, left, right = LIPS
    found = []
    for side in (54, 59, 64, 69, 74):
        scale = side / 64
        scaled = cv2.resize(image, (side, side), interpolation=cv2.INTER_AREA)
        y0, y1, x0, x1 = (round(edge * scale) for edge in (top + 3, bottom - 3, left + 3, right - 3))
        found.append((scaled[y0:y1, x0:x1].copy(), scale, y0, x0))
    return found


def agreement(a, templates_of_a, b):
    """How well the lips of a miniature correlate with another one, laid over each other as well as can be.

    They are shifted and scaled first, then bent by an affine map (Evangelidis and Psarakis 2008, "Parametric
    image alignment using enhanced correlation coefficient maximization"). What lies below the lips does not
    count: it may be cut off in one of the photos.
    """
    top, bottom, left, right = LIPS
    best, warp = -1.0, None
    for template, scale, y0, x0 in templates_of_a:
        _, correlation, _, (x, y) = cv2.minMaxLoc(cv2.matchTemplate(b, template, cv2.TM_CCOEFF_NORMED))
        if correlation > best:
            best = correlation
            warp = np.float32([[scale, 0, x - x0 + left * scale], [0, scale, y - y0 + top * scale]])
    if best < ALIGNABLE:
        return best
    lips = np.float32(a[top:bottom, left:right])
    stop = (cv2.TERM_CRITERIA_COUNT + cv2.TERM_CRITERIA_EPS, 40, 1e-3)
    try:
        return max(best, cv2.findTransformECC(lips, np.float32(b), warp, cv2.MOTION_AFFINE, stop, None, 3)[0])
    except cv2.error:  # it does not converge
        return best


def find_copies(crops):
    """Pairs of crops that show one moment, copies of a photo or neighbours in a burst, among `list_crops`.

    Each is the first file of a group and another file of it: the first is compared with the others, so that
    no chain of small steps leads from one face to another.
    """
    files, paths = list(crops), list(crops.values())
    images, taken = np.zeros((len(files), 64, 64), np.uint8), np.zeros(len(files), bool)
    blocks = [range(start, min(start + 128, len(files))) for start in range(0, len(files), 128)]

    def read(block):
        for i in block:
            images[i] = miniature(paths[i])
            taken[i] = not np.ptp(images[i])  # a crop of one colour is a copy of none

    with ThreadPoolExecutor(cores()) as pool:
        with progress("reading", len(files)) as bar:
            for block, _ in zip(blocks, pool.map(read, blocks)):
                bar.update(len(block))

        # an image is compared with many; those of a hundred thousand would take half a GB
        lips = functools.lru_cache(20_000)(lambda i: templates(images[i]))

        def one_moment(i, j):
            return any(agreement(images[a], lips(a), images[b]) >= SAME_MOUTH for a, b in ((i, j), (j, i)))

        basis = discriminants(images)
        mouths = np.concatenate([windows(images[block], 32, 0)[:, 0] @ basis for block in blocks])
        pairs = []
        with progress("comparing", len(files)) as bar:
            for block in blocks:
                rest = np.flatnonzero(~taken[block[0]:]) + block[0]
                firsts = rest[rest <= block[-1]]
                for i, near in zip(firsts, alike(images[firsts], basis, mouths[rest])):
                    near = [] if taken[i] else [j for j in rest[near] if j > i and not taken[j]]
                    # where a video's frames all look alike, most are far from the same
                    for some in (near[at:at + MOST] for at in range(0, len(near), MOST)):
                        same = list(pool.map(functools.partial(one_moment, i), some))
                        pairs += [(files[i], files[j]) for j in itertools.compress(some, same)]
                        taken[some] |= same
                        if not any(same):
                            break
                bar.update(len(block))
    return sorted(pairs)


class Groups(NamedTuple):
    """Which crops stay together, and what a user should know of it."""

    names: dict  # for every file the name of its group
    pairs: list  # of files that show one moment: (first of a group, another of it)
    alone: list  # paths in which the pattern of --group finds nothing
    sources: dict  # for every file the path of its photo, or its own where that is unknown


def find_groups(crops, files, pattern=None):
    """Group those of `list_crops` that must stay on one side, by `pattern`, else those that show one moment.

    The pattern, see `group_of`, looks at the photo's path in the manifest of `crops`, or at the crop's own
    path where the manifest does not know it. What it holds apart is not joined, whatever it looks like.
    Raises ValueError where it finds nothing in any path.
    """
    photos = {(composed(row["class"]), composed(row["crop"])): row["source"]
              for row in read_csv(crops / MANIFEST, NEEDED) if row["status"] == "ok"}
    sources = {file: photos.get(file, "/".join(file)) for file in files}
    names, alone = dict(sources), []
    if pattern:
        alone = [path for path in sources.values() if not find_group(path, pattern)]
        if len(alone) == len(files):
            raise ValueError(f"--group {pattern.pattern}: found in no photo's path; they are like {alone[0]}")
        names = {file: group_of(path, pattern) for file, path in sources.items()}
    pairs = find_copies(files)
    if not pattern:
        names |= {other: names[first] for first, other in pairs}
    return Groups(names, pairs, alone, sources)


# --- choice


def val_count(n):
    """How many of n crops of a class validation gets: a tenth, rounded down, but one of two or more."""
    return max(n // 10, 1 if n > 1 else 0)


def choose_val(members, seed, before=None):
    """The names of the groups that go to validation, a set.

    `members` says for every group the classes of its crops, one entry a crop; the integer `seed` orders the
    groups at random; groups that `before` says are in "train" or "val" stay there if the counts allow it.

    The crops chosen come as close to `val_count` of each class as whole groups can; with one crop a group
    they meet it exactly. Where two groups or more hold a class, each side gets at least one of them, unless
    that leaves another class without crops in training.
    """
    before = before or {}
    counts = {group: Counter(classes) for group, classes in members.items()}
    total = sum(counts.values(), Counter())
    wanted = {label: val_count(n) for label, n in total.items()}
    rank = {"val": 0, None: 1, "train": 2}

    def draw(group):
        return hashlib.sha1(f"{seed}/{group}".encode("utf-8", "surrogateescape")).digest()

    order = sorted(members, key=lambda group: (rank[before.get(group)], draw(group)))
    val, taken = set(), Counter()

    def gain(group):
        """How much nearer to the wanted counts this group brings validation, as shares of them."""
        missing = {label: wanted[label] - taken[label] for label in counts[group]}
        return sum((abs(missing[label]) - abs(missing[label] - n)) / max(wanted[label], 1)
                   for label, n in counts[group].items())

    def leaves_some(group):
        return all(taken[label] + n < total[label] for label, n in counts[group].items())

    def take(group):
        nonlocal taken
        val.add(group)
        taken += counts[group]

    for group in order:  # first what fits, then what still brings the counts nearer
        if all(taken[label] + n <= wanted[label] for label, n in counts[group].items()):
            take(group)
    for group in order:
        if group not in val and gain(group) > 0 and leaves_some(group):
            take(group)
    for label in sorted(wanted):
        if wanted[label] and not taken[label]:
            # the class lives in large groups only: take the one that disturbs the others least
            rest = [group for group in order if counts[group][label] and leaves_some(group)]
            if rest:
                take(max(rest, key=gain))
    return val


# --- copies


def place_crop(source, target, link):
    """Copy or hard-link, by way of a temporary name; nothing to do where the same file stands already."""
    if target.exists():
        a, b = source.stat(), target.stat()
        same = os.path.samefile(source, target)
        if same if link else not same and (a.st_size, a.st_mtime_ns) == (b.st_size, b.st_mtime_ns):
            return
    with replacing(target) as part:
        os.link(source, part) if link else shutil.copy2(source, part)


def read_record(data):
    """The rows of the record of an earlier split whose files lie in ``data/train`` or ``data/val``."""
    rows = read_csv(data / RECORD, COLUMNS[:5], "restore it, or remove it with train and val")
    return [row for row in rows
            if row["part"] in ("train", "val") and is_name(row["class"]) and is_name(row["file"])]


def check_record(data, old, foreign):
    """Raise ValueError where the record names classes that are not there, and not others that are.

    `old` is what `read_record` returns; `foreign` are files where crops should go, unknown to the record.
    """
    named = {row["class"] for row in old}
    gone = {label for label in named if not any((data / part / label).is_dir() for part in ("train", "val"))}
    unknown = {path.parent.name for path in foreign} - named
    if gone and unknown:
        raise ValueError(f"{data / RECORD}: names the class {min(gone)}, which is not there, and not "
                         f"{min(unknown)}, which is; another program may have changed it: restore it, or "
                         "remove it with train and val")


def key_of(row):
    """What names a file in `data`: (part, class, file name)."""
    return row["part"], row["class"], row["file"]


def split(crops, data, seed=0, group=None, link=False):
    """Bring ``data/train`` and ``data/val`` up to date with the folder `crops`, by copies or hard links.

    `group` is a regular expression, see `find_groups`. Returns the rows of `split.csv`; a list of the files
    of the same name that this script did not make and leaves alone; and the `Groups`. Raises
    FileNotFoundError where there are no crops, ValueError as `list_crops`, `find_groups`, `check_record`.
    """
    files = list_crops(crops)
    if not files:
        raise FileNotFoundError(f"{crops}: no crops in class folders; 'python preprocess_lips.py' makes them")
    groups = find_groups(crops, files, group and re.compile(group))
    names, members = groups.names, defaultdict(list)
    for (label, _), name in names.items():
        members[name].append(label)
    draw = f"seed={seed} group={group or ''}"
    old = read_record(data)
    sides = {(row["class"], row["file"]): row["part"] for row in old if row["draw"] == draw}
    val = choose_val(members, seed, {names[file]: part for file, part in sides.items() if file in names})
    rows = [{"part": "val" if names[file] in val else "train", "class": file[0], "file": file[1],
             "group": names[file], "draw": draw, "source": groups.sources[file]} for file in files]

    made = set(map(key_of, old))
    foreign = {path for _, label, name in map(key_of, rows) for part in ("train", "val")
               if (part, label, name) not in made and (path := data / part / label / name).exists()}
    check_record(data, old, foreign)
    rows = [row for row in rows
            if not foreign & {data / part / row["class"] / row["file"] for part in ("train", "val")}]
    wanted = set(map(key_of, rows))
    # the record comes first and names the old and the new files: killed at any point, a rerun knows its own
    write_csv(data / RECORD, COLUMNS, rows + [row for row in old if key_of(row) not in wanted])
    remove(data, made - wanted, wanted)
    with progress("placing", len(rows)) as bar:
        for row in rows:
            place_crop(files[row["class"], row["file"]], data.joinpath(*key_of(row)), link)
            bar.update()
    for part, label, _ in made - wanted:
        folder = data / part / label
        if folder.is_dir() and not any(folder.iterdir()):
            folder.rmdir()
    if hasattr(os, "sync"):
        os.sync()  # before the record says that all of it is there; one by one takes many times as long
    write_csv(data / RECORD, COLUMNS, rows)
    return rows, sorted(foreign), groups


def remove(data, stale, wanted):
    """Remove stale files, (part, class, file name), or move them to the other side if wanted there."""
    for part, label, name in sorted(stale):
        other = "train" if part == "val" else "val"
        here, there = (data / side / label / name for side in (part, other))
        with writing(here):
            if (other, label, name) in wanted and here.exists() and not there.exists():
                there.parent.mkdir(parents=True, exist_ok=True)
                here.replace(there)  # what changes sides is never on both, nor on none
            here.unlink(missing_ok=True)


# --- the command line


def table(rows):
    """Text: class, total, train, val."""
    return class_table(rows, "part", ("train", "val"), "total")


def report(args, rows, foreign, groups):
    """Print what `split` did, and what a user may have overlooked."""
    print(table(rows))
    counts = Counter((row["class"], row["part"]) for row in rows)
    lines = [f"{label}: none in val, because all its crops belong together; smaller groups would help"
             for label in sorted({row["class"] for row in rows})
             if counts[label, "train"] > 1 and not counts[label, "val"]]
    if args.group:
        sides = [len({row["group"] for row in rows if row["part"] == part}) for part in ("train", "val")]
        lines.append(f"groups: {sides[0]} in train, {sides[1]} in val, none in both")
    lines += counted("groups of their own, because --group finds nothing in their paths: "
                     "{n} crops, such as that of {one}", groups.alone)
    lines += copies_told(groups)
    suffixes = Image.registered_extensions()
    deeper = [path for path in args.crops.glob("*/*/**/*")
              if path.suffix.lower() in suffixes and path.is_file()
              and not any(map(is_hidden, path.relative_to(args.crops).parts))]
    lines += counted("left out, because crops lie in the class folders themselves: {n} images in "
                     "folders below, such as {one}", deeper)
    lines += told("left alone, not made by this script: {}", foreign)
    lines.append(f"{'linked' if args.link else 'copied'} to {args.data / 'train'} and {args.data / 'val'}, "
                 f"listed in {args.data / RECORD}")
    print(*map(printable, lines), sep="\n")


def told(text, things, most=5):
    """Lines of text about some things, and how many more there are."""
    lines = [text.format(thing) for thing in things[:most]]
    return lines + [f"... and {len(things) - most} more"] * (len(things) > most)


def copies_told(groups):
    """Lines of text about the crops that show one moment."""
    names, pairs, sources = groups.names, groups.pairs, groups.sources
    together = [pair for pair in pairs if names[pair[0]] == names[pair[1]]]
    lines = []
    if together:
        firsts = {first for first, _ in together}
        lines.append(f"near-duplicates: {len(firsts) + len(together)} crops in {len(firsts)} groups, "
                     "each on one side")
    classes = [pair for pair in pairs if pair[0][0] != pair[1][0]]
    apart = [pair for pair in pairs if names[pair[0]] != names[pair[1]]]
    for text, some in (("near-duplicates in two classes, of which one is wrong: {}", classes),
                       ("near-duplicates in two groups, which --group keeps apart: {}", apart)):
        lines += told(text, [" and ".join(f"{sources[file]} ({file[0]})" for file in pair) for pair in some])
    return lines


def build_parser():
    title, examples, more = __doc__.strip().split("\n\n")
    parser = argparse.ArgumentParser(
        description=f"{title}\n\n{more}", epilog=f"examples:\n{examples}",
        formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("crops", nargs="?", type=Path, default=Path("data/lips"),
                        help="folder with one folder of crops a class (default: %(default)s)")
    parser.add_argument("data", nargs="?", type=Path, default=Path("data"),
                        help="where train/ and val/ go (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, metavar="N",
                        help="another seed, another draw (default: %(default)s)")
    parser.add_argument("--group", metavar="REGEX",
                        help="keep crops together whose photo's path agrees in this expression's first "
                             "parenthesis, for example those of one person")
    parser.add_argument("--link", action="store_true",
                        help="hard links instead of copies: no disk space, one file system")
    return parser


def main(argv=None):
    args = build_parser().parse_args(argv)
    with command_line("run the same command again to finish"):
        if not args.crops.is_dir():
            raise FileNotFoundError(f"{args.crops}: no such folder; 'python preprocess_lips.py' makes it")
        try:
            re.compile(args.group or "")
        except re.error as error:
            raise ValueError(f"--group {args.group}: not a regular expression ({error})") from None
        with locked(args.data / ".lock"):
            sweep(args.data, *args.data.glob("train/*/"), *args.data.glob("val/*/"))
            rows, foreign, groups = split(args.crops, args.data, args.seed, args.group, args.link)
        report(args, rows, foreign, groups)


if __name__ == "__main__":
    main()
