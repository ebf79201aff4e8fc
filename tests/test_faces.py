"""data/faces: the labels, photos laid out by them, and the pouts that are made of some."""

import contextlib
import csv
import functools
import hashlib
import importlib.util
import io
import os
import re
import shutil
import subprocess
import sys
from collections import Counter, defaultdict

import numpy as np
import pytest
from conftest import ROOT, SHARED
from PIL import Image

SCRIPT = ROOT / "data" / "faces" / "prepare.py"
sys.path.append(str(SCRIPT.parent))  # after the sample's, which has a prepare.py too
GROUP = re.compile(r"([^/]+?)_?\d+\.")  # as the README says


def read(name):
    with open(SCRIPT.with_name(name), newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


@functools.cache
def script():
    """The script as a module; it goes by another name than the sample's."""
    spec = importlib.util.spec_from_file_location("prepare_faces", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "path", sys.path[:])  # which the script changes
        spec.loader.exec_module(module)
    return module


def run(*args, check=0):
    """What the script prints, or the error with which it ends; within this process."""
    with contextlib.redirect_stdout(io.StringIO()) as out:
        try:
            script().main([*map(str, args)])
        except SystemExit as end:
            assert check == 1, end.code
            return end.code
    assert check == 0
    return out.getvalue()


@pytest.fixture(scope="module")
def clone(tmp_path_factory):
    """Some of ../shared/data/photos, laid out as a clone of the public repository: 12 to warp, 40 a class."""
    if not (SHARED / "photos").is_dir():
        pytest.skip("needs ../shared/data/photos")
    images = tmp_path_factory.mktemp("clone") / "images"
    images.mkdir()
    source = {path.name: path for path in sorted((SHARED / "photos").glob("*/*.jpg"))}
    labels = {row["photo"]: row["class"] for row in read("labels.csv")}
    some = sorted({row["photo"] for row in read("pouts.csv")})[:12]
    for label in sorted(set(labels.values())):
        some += [name for name in source if labels.get(name) == label][:40]
    for name in some:
        shutil.copyfile(source[name], images / name)
    return images.parent


@pytest.fixture(scope="module")
def laid_out(clone, tmp_path_factory):
    raw = tmp_path_factory.mktemp("raw") / "raw"
    return raw, run(clone, raw)


def test_every_photo_has_one_class_and_every_person_one_part():
    rows = read("labels.csv")
    assert len({row["photo"] for row in rows}) == len(rows) == 6711
    counts = Counter(row["class"] for row in rows)
    assert counts == {"0none": 3169, "1pouting": 24, "2smile": 3027, "3openmouth": 491}
    parts = defaultdict(set)
    for row in rows:
        match = GROUP.search(row["photo"])
        parts[match[1] if match else row["photo"]].add(row["part"])
        name = match[1] if match else row["photo"]
        tenth = int(hashlib.sha1(name.encode()).hexdigest(), 16) % 10
        assert row["part"] == ("train" if tenth else "test")
        assert row["sure"] + row["looks"] in ("01", "11", "12") and not re.search(r"[/\\]", row["photo"])
    assert all(len(part) == 1 for part in parts.values())
    assert 0.08 < sum(part == {"test"} for part in parts.values()) / len(parts) < 0.12
    kept = ("train", "0none", "1")
    closed = {row["photo"] for row in rows if (row["part"], row["class"], row["sure"]) == kept}
    assert {row["photo"] for row in read("pouts.csv")} <= closed


def test_photos_lie_in_the_folders_of_their_labels(laid_out, clone):
    raw, out = laid_out
    labels = {row["photo"]: row for row in read("labels.csv")}
    real = [path for path in raw.rglob("*.jpg") if "." not in path.stem]
    assert len(real) > 80
    for path in real:
        row = labels[path.name]
        assert (row["class"], row["sure"], row["part"]) == (path.parent.name, "1", "train")
        assert path.read_bytes() == (clone / "images" / path.name).read_bytes()
    assert re.search(r"^[\d,]+ photos are not in .*images: \w+.*, .* \.\.\.$", out, re.M)


def test_pouts_are_made_and_belong_to_their_persons(laid_out):
    raw, out = laid_out
    made = sorted((raw / "1pouting").glob("*.pout?.jpg"))
    assert made and f"{len(made)} closed mouths, warped" in out
    for path in (raw / "1pouting").iterdir():
        person = GROUP.search(f"1pouting/{path.name}")[1]
        assert path.name.startswith(person)
        assert re.fullmatch(r"_?\d+(\.(copy\d\d|pout\d))?\.jpg", path.name[len(person):])


def test_landmarks_see_pouts_where_there_were_closed_mouths(laid_out, clone, cropper):
    from pout import lip_shape, looks_pouting

    from preprocess_lips import read_photo

    before, after = [], []
    for path in sorted((laid_out[0] / "1pouting").glob("*.pout?.jpg")):
        photos = read_photo(clone / "images" / (path.name.split(".")[0] + ".jpg")), read_photo(path)
        assert photos[0].shape == photos[1].shape
        (old,), (new,) = (cropper(photo, largest=True) for photo in photos)
        before.append(lip_shape(old.landmarks)[0])
        after.append(lip_shape(new.landmarks)[0])
        assert 0.35 < after[-1] < 1  # saved as a JPEG, a little other than when it was made
        difference = np.abs(photos[0].astype(int) - photos[1]).max(2)
        assert np.median(difference[: int(old.landmarks[27:36, 1].mean())]) <= 3  # eyes and brows
    assert np.median(after) > 1.3 * np.median(before) and not looks_pouting(old.landmarks - old.landmarks)


def test_copies_of_real_pouts_differ_in_a_comment_alone(laid_out):
    from preprocess_lips import read_photo

    copies = sorted((laid_out[0] / "1pouting").glob("*.copy??.jpg"))
    real = {path.stem for path in (laid_out[0] / "1pouting").glob("*.jpg") if "." not in path.stem}
    assert len(copies) == 9 * len(real) > 0
    assert len({path.read_bytes() for path in copies}) == len(copies)
    original = copies[0].with_name(copies[0].name.split(".")[0] + ".jpg")
    assert (read_photo(copies[0]) == read_photo(original)).all()


def test_a_second_run_changes_nothing_and_the_test_part_holds_other_persons(laid_out, clone, tmp_path):
    raw, _ = laid_out
    before = {path: path.stat().st_mtime_ns for path in raw.rglob("*.jpg")}
    assert f"{len(before):,} of them from before" in run(clone, raw)
    assert {path: path.stat().st_mtime_ns for path in raw.rglob("*.jpg")} == before
    run(clone, tmp_path / "test", "--part", "test")
    learnt, apart = ({GROUP.search(path.name)[1] for path in folder.rglob("*.jpg")}
                     for folder in (raw, tmp_path / "test"))
    assert apart and not learnt & apart


def test_a_photo_without_a_mouth_to_warp_is_named_and_the_rest_is_made(clone, tmp_path):
    """Another version of OpenCV or dlib may find one mouth less than the one that made pouts.csv."""
    images = tmp_path / "clone" / "images"
    images.mkdir(parents=True)
    faceless, face = sorted({row["photo"] for row in read("pouts.csv")})[:2]
    Image.new("RGB", (64, 64)).save(images / faceless)
    shutil.copyfile(clone / "images" / face, images / face)
    out = run(images.parent, tmp_path / "raw")
    assert re.search(rf"^\d photos could not be warped to a pout: {faceless}$", out, re.M)
    made = {path.name for path in (tmp_path / "raw" / "1pouting").glob("*.pout?.jpg")}
    assert made and not any(name.startswith(faceless[:-4]) for name in made)


@pytest.mark.slow
def test_every_mouth_that_is_listed_for_it_is_warped_to_a_pout(cropper):
    from pout import make_pout

    from preprocess_lips import read_photo

    source = {path.name: path for path in (SHARED / "photos").glob("*/*.jpg")}
    rows = [row for row in read("pouts.csv") if row["photo"] in source]
    if not rows:
        pytest.skip("needs ../shared/data/photos")
    for row in rows:
        photo, name = read_photo(source[row["photo"]]), row["photo"] + row["warp"]
        assert make_pout(photo, cropper, name) is not None, name


def test_no_clone_gets_one_line_that_says_where_to_get_it(tmp_path):
    for folder in (tmp_path, tmp_path / "missing"):
        end = run(folder, tmp_path / "raw", check=1)
        assert "\n" not in end and "'git clone --depth 1 https://github.com/" in end
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "cat.jpg").write_bytes(b"")
    assert "no clone of" in run(tmp_path, tmp_path / "raw", check=1)
    assert not (tmp_path / "raw").exists()
    help = subprocess.run([sys.executable, SCRIPT, "--help"], capture_output=True, text=True, check=True)
    assert "examples:" in help.stdout and not help.stderr
    assert os.listdir(tmp_path / "images") == ["cat.jpg"]
