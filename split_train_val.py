"""Mouth crops to an ImageFolder: one tenth of every class for validation, the rest for training.

    python split_train_val.py                          data/lips to data/train and data/val
    python split_train_val.py crops data --seed 7      other folders, another draw
    python split_train_val.py --group '(s\\d+)_'        all crops of s07_3.png, s07_4.png ... on one side

Validation gets floor(n / 10) of each class, at least one of two or more. Crops that look the same, such as
bursts and re-encoded copies, stay on one side. The same crops and seed give the same split; when crops are
added, the old ones stay where they are. split.csv in the output folder lists what was made, so that a rerun
replaces just that and touches no other file.
"""

import argparse
import hashlib
import os
import re
import shutil
from collections import Counter, defaultdict
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from PIL import Image
from tabulate import tabulate
from tqdm import tqdm

from preprocess_lips import (
    MANIFEST,
    class_folders,
    command_line,
    composed,
    cores,
    is_hidden,
    is_name,
    locked,
    perceptual_hash,
    printable,
    read_csv,
    sweep,
    temporary,
    write_csv,
    writing,
)

COLUMNS = ("part", "class", "file", "group", "draw")
RECORD = "split.csv"
# Bits in which the hashes of near-duplicates may differ. Of copies saved anew, halved or made brighter, 99 in
# 100 differ in 17 at most, all in 25, photos too; of 2,300 crops of different photos, no two in fewer than
# 33. Must be less than 32: see `near_pairs`.
HASH_DISTANCE = 28


# --- groups


def list_crops(crops):
    """All images in the class folders of `crops`: dict of (class, file name), sorted, to path.

    Raises
    ------
    ValueError
        Two files have one name, their accents written in two ways.
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


def group_of(path, pattern):
    """The part of `path` that names its group: the first parenthesis of `pattern`, else the whole match.

    A path that does not match is a group of its own.
    """
    match = pattern.search(re.sub(r"(^|/)[01]\.\d{3}(-\d+)?_", r"\1", path))  # without --sort's numbers
    if not match:
        return path
    return match.group(1) if pattern.groups and match.group(1) is not None else match.group(0)


def crop_hash(path):
    """The `perceptual_hash` of an image file; empty for what is no readable image."""
    try:
        with Image.open(path) as image:
            if image.format in ("EPS", "WMF"):  # programs, which Pillow has Ghostscript or Windows run
                return ""
            image.draft("L", (64, 64))
            return perceptual_hash(image)
    except Exception:  # decoders raise almost anything; train.py names the file
        return ""


def near_pairs(hashes, distance=HASH_DISTANCE):
    """All pairs of hashes that differ in few bits, without comparing every hash with every other.

    Two hashes of 16 words that differ in fewer than 32 bits have a word in which they differ in one bit at
    most: only such pairs are compared (the pigeonhole principle, as in Norouzi et al. 2012, "Fast Search in
    Hamming Space").

    Parameters
    ----------
    hashes : uint16 array of shape (N, 16), no two alike
    distance : int
        0 to 31.

    Yields
    ------
    (int, int)
        Indices, the smaller first; a pair may come several times.
    """
    flips = np.concatenate([[0], 1 << np.arange(16)]).astype(np.uint16)
    for word in hashes.T:
        order = np.argsort(word, kind="stable")
        starts = np.concatenate([[0], np.bincount(word, minlength=1 << 16).cumsum()])
        for flip in flips:
            low, high = starts[word ^ flip], starts[1:][word ^ flip]
            for shift in range(int((high - low).max())):
                first = np.flatnonzero(low + shift < high)
                second = order[(low + shift)[first]]
                first, second = first[first < second], second[first < second]
                near = np.bitwise_count(hashes[first] ^ hashes[second]).sum(1) <= distance
                yield from zip(first[near].tolist(), second[near].tolist())


def merge(groups, pairs):
    """Groups that pairs connect become one.

    Parameters
    ----------
    groups : dict
        For every crop the name of its group.
    pairs : iterable of (crop, crop)

    Returns
    -------
    dict
        The same, where groups that are connected bear the name of the first of them in the alphabet.
    """
    parent = {name: name for name in groups.values()}

    def root(name):
        while parent[name] != name:
            parent[name] = name = parent[parent[name]]
        return name

    for a, b in pairs:
        first, second = sorted((root(groups[a]), root(groups[b])))
        parent[second] = first
    return {key: root(name) for key, name in groups.items()}


def look_alikes(crops, photos):
    """Pairs of crops that are near-duplicates, or whose photos are.

    A photo saved anew gives landmarks a pixel further, and a crop that may differ in a hundred bits; the
    photos do not.

    Parameters
    ----------
    crops : dict
        As `list_crops` returns it.
    photos : dict
        For a file the `perceptual_hash` of its photo, 64 hexadecimal digits, where it is known.

    Returns
    -------
    list of pairs of files
    """
    with ThreadPoolExecutor(cores()) as pool:
        hashes = pool.map(crop_hash, crops.values())
        hashes = list(tqdm(hashes, "comparing", len(crops), leave=False, unit="crop", disable=None))
    pairs = []
    for looks in (zip(crops, hashes), ((file, photos.get(file, "")) for file in crops)):
        same = defaultdict(list)
        for file, look in looks:
            if re.fullmatch("[0-9a-f]{64}", look):
                same[look].append(file)
        pairs += [(copies[0], other) for copies in same.values() for other in copies[1:]]
        firsts = [copies[0] for copies in same.values()]
        distinct = np.frombuffer(bytes.fromhex("".join(same)), np.uint16).reshape(-1, 16)
        if len(firsts) > 1:
            pairs += [(firsts[i], firsts[j]) for i, j in near_pairs(distinct)]
    return pairs


def find_groups(crops, files, pattern=None):
    """Group the crops that must stay on one side: by `pattern`, and because they look the same.

    Parameters
    ----------
    crops : Path
    files : dict
        As `list_crops` returns it.
    pattern : re.Pattern, optional
        See `group_of`. It looks at the photo's path in the manifest of `crops`, or at the crop's own path
        where the manifest does not know it.

    Returns
    -------
    (groups, alike, alone) : dict, (int, int), list of str
        For every file the name of its group; how many crops look like others, in how many groups; and the
        paths in which `pattern` finds nothing.

    Raises
    ------
    ValueError
        `pattern` finds nothing in any path.
    """
    photos = {(composed(row["class"]), composed(row["crop"])): row
              for row in read_csv(crops / MANIFEST) if row["status"] == "ok"}
    groups = {file: photos[file]["source"] if file in photos else "/".join(file) for file in files}
    alone = []
    if pattern:
        alone = [path for path in groups.values() if not pattern.search(path)]
        if len(alone) == len(files):
            raise ValueError(f"--group {pattern.pattern}: found in no photo's path; they are like {alone[0]}")
        groups = {file: group_of(path, pattern) for file, path in groups.items()}
    pairs = look_alikes(files, {file: row["look"] for file, row in photos.items()})
    clusters = merge({file: file for pair in pairs for file in pair}, pairs)
    return merge(groups, pairs), (len(clusters), len(set(clusters.values()))), alone


# --- choice


def val_count(n):
    """How many of n crops of a class validation gets: a tenth, rounded down, but one of two or more."""
    return max(n // 10, 1 if n > 1 else 0)


def choose_val(members, seed, before=None):
    """Choose the groups that go to validation.

    Parameters
    ----------
    members : dict of str to list of str
        For every group the classes of its crops, one entry a crop.
    seed : int
        Orders the groups at random.
    before : dict of str to str, optional
        Groups that are on a side already, "train" or "val": they stay if the counts allow it.

    Returns
    -------
    set of str
        The groups for validation. Their crops come as close to `val_count` of each class as whole groups
        can; with one crop a group they meet it exactly. Where two groups or more hold a class, each side
        gets at least one of them, unless that leaves another class without crops in training.
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
    part = temporary(target)
    with writing(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            os.link(source, part) if link else shutil.copy2(source, part)
            part.replace(target)
        finally:
            part.unlink(missing_ok=True)


def read_record(data):
    """The rows of the record of an earlier split whose files lie in ``data/train`` or ``data/val``."""
    return [row for row in read_csv(data / RECORD)
            if row["part"] in ("train", "val") and is_name(row["class"]) and is_name(row["file"])]


def key_of(row):
    """What names a file in `data`: (part, class, file name)."""
    return row["part"], row["class"], row["file"]


def split(crops, data, seed=0, group=None, link=False):
    """Bring ``data/train`` and ``data/val`` up to date with `crops`.

    Parameters
    ----------
    crops, data : Path
    seed : int
    group : str, optional
        Regular expression; see `find_groups`.
    link : bool
        Hard links instead of copies.

    Returns
    -------
    (rows, foreign, alike, alone) : list of dict, list of Path, (int, int), list of str
        What `split.csv` now says; files of the same name that this script did not make: left alone; the other
        two as `find_groups` returns them.

    Raises
    ------
    FileNotFoundError
        There are no crops.
    ValueError
        As `find_groups`.
    """
    files = list_crops(crops)
    if not files:
        raise FileNotFoundError(f"{crops}: no crops in class folders; 'python preprocess_lips.py' makes them")
    groups, alike, alone = find_groups(crops, files, group and re.compile(group))
    members = defaultdict(list)
    for (label, _), name in groups.items():
        members[name].append(label)
    draw = f"seed={seed} group={group or ''}"
    old = read_record(data)
    sides = {(row["class"], row["file"]): row["part"] for row in old if row["draw"] == draw}
    val = choose_val(members, seed, {groups[file]: part for file, part in sides.items() if file in groups})
    rows = [{"part": "val" if groups[file] in val else "train", "class": file[0], "file": file[1],
             "group": groups[file], "draw": draw} for file in files]

    made = set(map(key_of, old))
    foreign = {path for _, label, name in map(key_of, rows) for part in ("train", "val")
               if (part, label, name) not in made and (path := data / part / label / name).exists()}
    rows = [row for row in rows
            if not foreign & {data / part / row["class"] / row["file"] for part in ("train", "val")}]
    wanted = set(map(key_of, rows))
    # the record comes first and names the old and the new files: killed at any point, a rerun knows its own
    write_csv(data / RECORD, COLUMNS, rows + [row for row in old if key_of(row) not in wanted])
    remove(data, made - wanted, wanted)
    for row in tqdm(rows, unit="crop", leave=False, disable=None):
        place_crop(files[row["class"], row["file"]], data.joinpath(*key_of(row)), link)
    for part, label, _ in made - wanted:
        folder = data / part / label
        if folder.is_dir() and not any(folder.iterdir()):
            folder.rmdir()
    if hasattr(os, "sync"):
        os.sync()  # before the record says that all of it is there; one by one takes many times as long
    write_csv(data / RECORD, COLUMNS, rows)
    return rows, sorted(foreign), alike, alone


def remove(data, stale, wanted):
    """Remove stale files, or move them to the other side if they are wanted there.

    Parameters
    ----------
    data : Path
    stale, wanted : set of (part, class, file name)
    """
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
    counts = Counter((row["class"], row["part"]) for row in rows)
    classes = sorted({row["class"] for row in rows})
    lines = []
    for name, labels in (*((label, [label]) for label in classes), ("total", classes)):
        train, val = (sum(counts[label, part] for label in labels) for part in ("train", "val"))
        lines.append([printable(name), train + val, train, val])
    return tabulate(lines, ("class", "total", "train", "val"), "plain", disable_numparse=True,
                    colalign=("left", "right", "right", "right"))


def report(args, rows, foreign, alike, alone):
    """Print what `split` did, and what a user may have overlooked."""
    print(table(rows))
    counts = Counter((row["class"], row["part"]) for row in rows)
    lines = [f"{label}: none in val, because all its crops belong together; smaller groups would help"
             for label in sorted({row["class"] for row in rows})
             if counts[label, "train"] > 1 and not counts[label, "val"]]
    if args.group:
        sides = [len({row["group"] for row in rows if row["part"] == part}) for part in ("train", "val")]
        lines.append(f"groups: {sides[0]} in train, {sides[1]} in val, none in both")
    if alone:
        lines.append("groups of their own, because --group finds nothing in their paths: "
                     f"{len(alone)} crops, such as that of {alone[0]}")
    if alike[0]:
        lines.append(f"near-duplicates: {alike[0]} crops in {alike[1]} groups, each on one side")
    suffixes = Image.registered_extensions()
    deeper = [path for path in sorted(args.crops.glob("*/*/**/*"))
              if path.suffix.lower() in suffixes and path.is_file()
              and not any(map(is_hidden, path.relative_to(args.crops).parts))]
    if deeper:
        lines.append(f"left out, because crops lie in the class folders themselves: {len(deeper)} images in "
                     f"folders below, such as {deeper[0]}")
    lines += [f"left alone, not made by this script: {path}" for path in foreign[:5]]
    if len(foreign) > 5:
        lines.append(f"... and {len(foreign) - 5} more")
    lines.append(f"{'linked' if args.link else 'copied'} to {args.data / 'train'} and {args.data / 'val'}, "
                 f"listed in {args.data / RECORD}")
    print(*map(printable, lines), sep="\n")


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
            rows, foreign, alike, alone = split(args.crops, args.data, args.seed, args.group, args.link)
        report(args, rows, foreign, alike, alone)


if __name__ == "__main__":
    main()
