"""The README's first command, from the sample's labels to named photos, in a copy of the project."""

import csv
import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT

from net import load_model, predict
from preprocess_lips import read_photo

prefix = Path(sys.prefix)
COUNT = 442  # photos


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    """A copy of the project in which data/sample/run.sh has run, and what it printed."""
    if not (prefix / "installed").is_file():
        pytest.skip("runs in the .venv that tests/run.sh makes")
    copy = tmp_path_factory.mktemp("项目")
    for path in [*ROOT.glob("*.py"), ROOT / "requirements.txt"]:
        shutil.copy2(path, copy)
    for folder in ("data/sample", "data/faces"):
        shutil.copytree(ROOT / folder, copy / folder)
    shutil.copy2(ROOT / "data" / "page.html", copy / "data")
    (copy / "models").mkdir()
    for path in (ROOT / "models").glob("pretrained.*"):
        shutil.copy2(path, copy / "models")
    (copy / ".venv").symlink_to(prefix)
    done = subprocess.run(
        ["bash", "data/sample/run.sh"],
        cwd=copy,
        capture_output=True,
        text=True,
        encoding="utf-8",
        timeout=280,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return copy, done.stdout


def test_it_ends_with_a_model_curves_and_named_photos(project):
    folder, out = project
    about = json.loads((folder / "models" / "sample" / "model.json").read_text("utf-8"))
    assert (
        about["classes"] == ["0none", "1pouting", "2smile", "3openmouth"]
        and about["settings"]["recipe"] == "finetune"
    )
    assert (
        list((folder / "logs").glob("*/events*"))
        and len(list((folder / "data" / "named").rglob("*.jpg"))) == about["images"]["val"]
    )
    assert "balanced accuracy" in out and "tensorboard --logdir logs" in out
    # persons it has not seen; the weights that it starts from have seen thousands of others
    assert about["kept"] == "last" and about["last"]["val_acc"] > 0.8


def test_every_photo_has_a_crop_and_persons_are_on_one_side(project):
    folder, _ = project
    rows = list(csv.DictReader(open(folder / "data" / "lips" / "manifest.csv", newline="")))
    assert len(rows) == COUNT and all(row["status"] == "ok" for row in rows)
    sides = {}
    for row in csv.DictReader(open(folder / "data" / "split.csv", newline="")):
        sides.setdefault(row["group"], set()).add(row["part"])
    assert len(sides) == 39 and all(len(side) == 1 for side in sides.values())


def test_photos_of_others_in_data_raw_are_not_mixed_with_the_sample(project):
    folder, _ = project
    mine = folder / "data" / "raw" / "2smile" / "me.jpg"
    mine.write_bytes(b"mine")
    done = subprocess.run(
        [sys.executable, "data/sample/prepare.py"],
        cwd=folder,
        capture_output=True,
        text=True,
        encoding="utf-8",
    )
    assert (
        done.returncode == 1
        and "me.jpg: not of the sample; move your own photos" in done.stderr
        and mine.read_bytes() == b"mine"
    )


def test_labels_name_real_faces_and_say_what_is_warped(orl):
    rows = list(csv.DictReader(open(ROOT / "data" / "sample" / "labels.csv", newline="")))
    for row in rows:
        name, label, warped = row.values()
        person, photo, *made = name.removesuffix(".png").split("_")
        assert f"{person}_{photo}" in orl and warped == str(len(made))
        assert not made or label == {"open": "3openmouth"}.get(made[0], "1pouting")
    assert len({row["file"] for row in rows}) == len(rows) == COUNT


@pytest.mark.parametrize(
    "suffix, measure, least", [("warped", 0, 0.4), ("open", 1, 0.25)], ids=["pouting", "open"]
)
def test_warping_makes_closed_lips_pout_or_open_and_leaves_the_eyes_alone(
    orl, cropper, suffix, measure, least
):
    from pout import lip_shape
    from prepare import warp

    before, after = [], []
    for name in ("s10_10", "s24_1", "s29_4", "s04_7", "s13_5"):
        face, file = orl[name], f"{name}_{suffix}.png"
        warped = warp(face, cropper, file)
        assert warped.shape == face.shape and (warped == warp(face, cropper, file)).all()
        assert np.abs(warped[:50].astype(int) - face[:50]).max() <= 2  # eyes and brows
        for photo, shapes in (face, before), (warped, after):
            shapes.append(lip_shape(cropper(photo, largest=True)[0].landmarks)[measure])
    assert np.median(after) > least > np.median(before)


def test_the_shipped_weights_and_the_sample_mean_the_same_by_each_class(project):
    folder, _ = project
    model = load_model(ROOT / "models" / "pretrained.pt")
    for label in model.classes:
        crops = [read_photo(path) for path in (folder / "data" / "lips" / label).glob("*.jpg")]
        named = predict(model, crops).argmax(1)
        assert (named == model.classes.index(label)).float().mean() > 0.8, label
