import json

import numpy as np
import pytest
import torch
from PIL import Image

from net import load_model, save_model, simpleconv3
from predict import annotate, evaluate, main, predict_photos


@pytest.fixture
def model(tmp_path):
    """models/model.pt with untrained weights and a Chinese class name."""
    torch.manual_seed(0)
    net = simpleconv3(3)
    net.classes = ("0none", "2smile", "张嘴")
    save_model(net, tmp_path / "models" / "model.pt")
    return tmp_path / "models" / "model.pt"


@pytest.fixture
def two_faces(orl, tmp_path):
    canvas = np.full((360, 620), 128, np.uint8)
    for i, name in enumerate(("s05_1", "s01_1")):
        canvas[40:264, 60 + 300 * i:244 + 300 * i] = np.asarray(Image.fromarray(orl[name]).resize((184, 224)))
    Image.fromarray(canvas).save(tmp_path / "two.png")
    return tmp_path / "two.png"


def test_one_line_a_face_and_one_for_what_has_none(shell, model, two_faces, tmp_path):
    Image.new("RGB", (200, 200), "green").save(tmp_path / "meadow.jpg")
    (tmp_path / "broken.jpg").write_bytes(b"\xff\xd8\xff")
    out = shell("predict.py", "two.png", "meadow.jpg", "broken.jpg", "missing.jpg", "two.png").stdout.splitlines()
    assert [line.split("  ")[:2] for line in out[:4]] == [
        ["two.png", "face 1"], ["two.png", "face 2"], ["meadow.jpg", "no face found"], out[3].split("  ")[:2]]
    assert out[3].startswith("broken.jpg  unreadable: ") and out[4].startswith("missing.jpg  unreadable: No such file")
    assert out[5].startswith("two.png  face 1") and out[-1] == "4 faces in 2 of 5 photos"
    name, percent = out[0].split("  ")[2:]
    assert name in ("0none", "2smile", "张嘴") and 33 <= float(percent.rstrip("%")) <= 100


def test_json_has_one_object_a_face(model, two_faces, capsys, tmp_path):
    main([str(two_faces), str(tmp_path / "none.jpg"), "--model", str(model), "--json"])
    *faces, missing = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [list(face) for face in faces] == [["source", "face", "box", "mouth", "label", "probability", "probabilities"]] * 2
    for i, face in enumerate(faces, 1):
        assert face["face"] == i and face["source"] == str(two_faces)
        assert sum(face["probabilities"].values()) == pytest.approx(1, abs=1e-3)
        assert face["probability"] == max(face["probabilities"].values()) == face["probabilities"][face["label"]]
        (x0, y0, x1, y1), (a, b, c, d) = face["box"], face["mouth"]
        assert x0 < (a + c) / 2 < x1 and (y0 + y1) / 2 < (b + d) / 2 < y1
    assert missing["face"] is None and missing["error"].startswith("unreadable")


def test_saved_copies_keep_the_folders_layout_and_no_name_is_lost(model, photos, tmp_path, capsys):
    Image.open(photos / "0none" / "s01_1.png").save(photos / "0none" / "s01_1.bmp")
    main([str(photos), str(photos / "0none" / "s01_1.png"), "--model", str(model), "--save", str(tmp_path / "named")])
    saved = sorted(p.relative_to(tmp_path / "named").as_posix() for p in (tmp_path / "named").rglob("*.jpg"))
    assert len(saved) == 26 and "2smile/s05_1.jpg" in saved and "0none/s01_1_2.jpg" in saved and "s01_1.jpg" in saved


@pytest.mark.parametrize("size", [(92, 112), (1840, 2240)])
def test_annotated_photos_show_box_and_words_at_any_size(model, orl, cropper, size):
    photo = np.asarray(Image.fromarray(orl["s05_1"]).convert("RGB").resize(size))
    faces = cropper(photo)
    net = load_model(model)
    picture = np.asarray(annotate(photo, faces, np.array([[0.1, 0.8, 0.1]]), net.classes)).astype(int)
    assert max(picture.shape) >= 360
    yellow = (picture[..., 0] > 200) & (picture[..., 1] > 200) & (picture[..., 2] < 80)
    rows = np.flatnonzero(yellow.sum(1) > 0.1 * picture.shape[1])
    assert len(rows) >= 15  # the label's ground, a line of text high
    annotate(photo, faces, np.array([[0.1, 0.1, 0.8]]), net.classes)  # a name beyond Latin letters


def test_crops_are_classified_whole(model, mouths, capsys):
    main([str(mouths / "data" / "val"), "--model", str(model), "--crops", "--json"])
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert len(lines) == 8 and all(line["mouth"] == [0, 0, 128, 128] for line in lines)


def test_results_come_in_order_and_do_not_depend_on_the_batch(model, photos):
    net, files = load_model(model), sorted(photos.rglob("*.png")) * 3
    together = list(predict_photos(files, net))
    assert [result.source for result in together] == files
    alone = [next(predict_photos([file], net, workers=1)) for file in files[:5]]
    for a, b in zip(together, alone):
        np.testing.assert_allclose(a.probabilities, b.probabilities, atol=1e-5)


def test_scores_by_hand():
    scores = evaluate([(0, 0), (0, 0), (0, 1), (1, 1)], ("a", "b", "c"))
    assert scores["accuracy"] == 0.75 and scores["balanced_accuracy"] == round((2 / 3 + 1) / 2, 4)
    assert scores["classes"]["a"] == {"precision": 1.0, "recall": 0.6667, "f1": 0.8, "images": 3}
    assert scores["classes"]["b"]["precision"] == 0.5 and scores["classes"]["c"]["recall"] is None
    assert scores["confusion"] == [[2, 1, 0], [0, 1, 0], [0, 0, 0]]


def test_evaluate_prints_a_table_or_one_object(shell, model, photos, tmp_path):
    Image.new("RGB", (200, 200), "green").save(photos / "0none" / "meadow.jpg")
    out = shell("predict.py", "--evaluate", "data/raw").stdout
    assert "precision" in out and "balanced accuracy" in out and "on 24 images; 1 without a face" in out
    scores = json.loads(shell("predict.py", "--evaluate", "data/raw", "--json", "--save", "seen").stdout)
    against = scores["contradicted"]
    assert len(against) == 24 - round(24 * scores["accuracy"]) > 0
    assert [one["probability"] for one in against] == sorted((one["probability"] for one in against), reverse=True)
    assert all(one["folder"] in one["source"] and one["folder"] != one["label"] for one in against)
    with Image.open(tmp_path / "seen" / "contradictions.jpg") as sheet:
        assert sheet.width == 900
    assert scores["images"] == 24 and scores["skipped"] == 1 and len(scores["confusion"]) == 3
    assert scores["classes"]["0none"]["images"] == 12


def test_errors_name_the_way_out(shell, model, photos, tmp_path):
    assert "no such model; 'python train.py' makes one" in shell("predict.py", "x.jpg", "--model", "no.pt", check=1).stderr
    (tmp_path / "empty").mkdir()
    assert "empty: no photos in this folder" in shell("predict.py", "empty", check=1).stderr
    (photos / "9other").mkdir()
    (photos / "2smile" / "s05_1.png").rename(photos / "9other" / "s05_1.png")
    assert "9other, which is none of the model's classes" in shell("predict.py", "--evaluate", "data/raw", check=1).stderr
