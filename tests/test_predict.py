import contextlib
import io
import json
import os
import shlex
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import page_data
from PIL import Image, ImageColor
from wcwidth import wcswidth

from net import load_model, save_model, simpleconv3
from predict import PALETTE, annotate, evaluate, main, predict_photos
from preprocess_lips import Later, locked, read_csv


def test_one_line_a_face_and_one_for_what_has_none(inside, model, two_faces, tmp_path):
    Image.new("RGB", (200, 200), "green").save(tmp_path / "meadow.jpg")
    (tmp_path / "broken.jpg").write_bytes(b"\xff\xd8\xff")
    out = inside(
        "predict.py", "two.png", "meadow.jpg", "broken.jpg", "missing.jpg", "two.png", check=1
    ).stdout.splitlines()
    assert out.pop(0) == "weights: models/model.pt"
    assert [line.split("  ")[:2] for line in out[:4]] == [
        ["two.png", "face 1"], ["two.png", "face 2"], ["meadow.jpg", "no face found"], out[3].split("  ")[:2]]
    assert out[3].startswith("broken.jpg  unreadable: ")
    assert out[4].startswith("missing.jpg  unreadable: No such file")
    assert out[5].startswith("two.png  face 1") and out[-1] == "4 faces in 2 of 5 photos"
    name, percent = out[0].split("  ")[2:]
    assert name in ("0none", "2smile", "张嘴") and 33 <= float(percent.rstrip("%")) <= 100
    # what was not named, but lies in a folder, is no reason to fail
    assert inside("predict.py", ".").stdout.splitlines()[-1] == "2 faces in 1 of 3 photos"


def test_json_has_one_object_a_face(model, two_faces, capsys, tmp_path):
    with pytest.raises(SystemExit, match="1"):
        main([str(two_faces), str(tmp_path / "none.jpg"), "--model", str(model), "--json"])
    *faces, missing = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [list(face) for face in faces] == [
        ["source", "face", "box", "mouth", "label", "probability", "probabilities"]
    ] * 2
    for i, face in enumerate(faces, 1):
        assert face["face"] == i and face["source"] == str(two_faces)
        assert sum(face["probabilities"].values()) == pytest.approx(1, abs=1e-3)
        assert (
            face["probability"] == max(face["probabilities"].values()) == face["probabilities"][face["label"]]
        )
        (x0, y0, x1, y1), (a, b, c, d) = face["box"], face["mouth"]
        assert x0 < (a + c) / 2 < x1 and (y0 + y1) / 2 < (b + d) / 2 < y1
    assert missing["face"] is None and missing["error"].startswith("unreadable")


def test_saved_copies_keep_the_folders_layout_and_no_name_is_lost(model, photos, tmp_path, capsys):
    Image.open(photos / "0none" / "s01_1.png").save(photos / "0none" / "s01_1.bmp")
    inputs = [str(photos), str(photos / "0none" / "s01_1.png")]
    main([*inputs, "--model", str(model), "--save", str(tmp_path / "named")])
    saved = sorted(p.relative_to(tmp_path / "named").as_posix() for p in (tmp_path / "named").rglob("*.jpg"))
    assert (
        len(saved) == 26
        and "2smile/s05_1.jpg" in saved
        and "0none/s01_1_2.jpg" in saved
        and "s01_1.jpg" in saved
    )


def test_saving_again_or_beside_originals_replaces_and_doubles_nothing(inside, model, two_faces, tmp_path):
    folder = tmp_path / "hol"
    folder.mkdir()
    two_faces.rename(folder / "two.png")
    for _ in range(3):
        assert "2 faces in 1 of 1 photo;" in inside("predict.py", "hol", "--save", "hol/named").stdout
    (folder / "two.jpg").write_bytes(b"an original that is not looked at")
    (folder / ".trash").mkdir()
    shutil.copy(folder / "two.png", folder / ".trash" / "old.png")
    inside("predict.py", "hol/two.png", "--save", "hol")
    assert (folder / "two.jpg").read_bytes() == b"an original that is not looked at"
    assert (folder / "two_2.jpg").is_file()
    (folder / "two.jpg").unlink()
    (folder / "two_2.jpg").unlink()
    assert "2 faces in 1 of 1 photo;" in inside("predict.py", "hol", "--save", "hol/named").stdout
    (tmp_path / "index.html").write_text("my page")
    assert "index.html: is not of this program" in inside("predict.py", "hol", "--save", ".", check=1).stderr


@pytest.mark.parametrize("size", [(92, 112), (1840, 2240)])
def test_annotated_photos_show_box_and_words_at_any_size(model, orl, cropper, size):
    photo = np.asarray(Image.fromarray(orl["s05_1"]).convert("RGB").resize(size))
    faces = cropper(photo)
    net = load_model(model)
    picture = np.asarray(annotate(photo, faces, np.array([[0.1, 0.8, 0.1]]), net.classes)).astype(int)
    assert max(picture.shape) >= 360
    ground = abs(picture - ImageColor.getrgb(PALETTE[1])).max(2) < 10
    rows = np.flatnonzero(ground.sum(1) > 0.1 * picture.shape[1])
    assert len(rows) >= 15  # the label's ground, a line of text high
    annotate(photo, faces, np.array([[0.1, 0.1, 0.8]]), net.classes)  # a name beyond Latin letters
    height, width = photo.shape[:2]
    beyond = (0, height + 9, 50, height + 59), (-60, 0, -10, 50), (width + 5, -70, width + 55, -20)
    for box in beyond:
        annotate(photo, [faces[0]._replace(mouth=box)], np.array([[0.1, 0.8, 0.1]]), net.classes)


def test_crops_are_classified_whole(model, mouths, capsys):
    main([str(mouths / "data" / "val"), "--model", str(model), "--crops", "--json"])
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert len(lines) == 8 and all(line["mouth"] == [0, 0, 128, 128] for line in lines)


def test_whole_photos_given_as_crops_are_noticed(inside, model, mouths, crawled):
    noticed = "look like whole photos, of which --crops makes nonsense: leave it out\n"
    for args in (["crawled/smile"], ["--evaluate", "crawled"], ["crawled", "--sort", "sorted"]):
        (crawled / "smile").rename(crawled / "2smile") if "--evaluate" in args else None
        shutil.rmtree(crawled / "open mouth") if "--evaluate" in args else None
        assert noticed in inside("predict.py", *args, "--crops").stderr
    assert inside("predict.py", mouths / "data" / "val", "--crops").stderr == ""


def test_results_come_in_order_and_do_not_depend_on_the_batch(model, photos):
    net, files = load_model(model), sorted(photos.rglob("*.png")) * 2  # more than wait for one batch
    together = list(predict_photos(files, net))
    assert [result.source for result in together] == files
    alone = [next(predict_photos([file], net, workers=1)) for file in files[:2]]
    for a, b in zip(together, alone):
        np.testing.assert_allclose(a.probabilities, b.probabilities, atol=1e-5)


def test_models_and_photos_as_notebooks_have_them(model, photos):
    net, files = load_model(model), sorted(photos.rglob("*.png"))[:3]
    expected = [result.probabilities for result in predict_photos(files, net)]
    for other in (torch.nn.DataParallel(net), load_model(model).half()):
        for result, rows in zip(predict_photos(files, other), expected):
            np.testing.assert_allclose(result.probabilities, rows, atol=0.01)
    [alone] = predict_photos(str(files[0]), net)
    np.testing.assert_allclose(alone.probabilities, expected[0], atol=1e-5)
    grey = np.asarray(Image.open(files[0]))
    picture = annotate(grey, alone.faces, alone.probabilities, net.classes)
    assert grey.ndim == 2 and picture.mode == "RGB"


def test_scores_by_hand():
    scores = evaluate([(0, 0), (0, 0), (0, 1), (1, 1)], ("a", "b", "c"))
    assert scores["accuracy"] == 0.75 and scores["balanced_accuracy"] == round((2 / 3 + 1) / 2, 4)
    assert scores["classes"]["a"] == {"precision": 1.0, "recall": 0.6667, "f1": 0.8, "images": 3}
    assert scores["classes"]["b"]["precision"] == 0.5 and scores["classes"]["c"]["recall"] is None
    assert scores["confusion"] == [[2, 1, 0], [0, 1, 0], [0, 0, 0]]


@pytest.fixture
def crawled(orl, tmp_path):
    """Two keyword folders with photos of the same names, one without a face and one that is none."""
    folder = tmp_path / "crawled"
    for keyword, names in (
        ("smile", ("s05_1", "s03_1", "s01_1")),
        ("open mouth", ("s09_1", "s05_1", "s02_1")),
    ):
        (folder / keyword).mkdir(parents=True)
        for i, name in enumerate(names):
            Image.fromarray(orl[name]).save(folder / keyword / f"Google_000{i}.png")
    Image.new("RGB", (200, 200), "green").save(folder / "smile" / "meadow.jpg")
    (folder / "smile" / "page.jpg").write_text("404 Not Found")
    return folder


def tree(folder):
    """The visible files of a folder, as dict of path to content."""
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*"))
            if p.is_file() and not p.name.startswith(".")}


def test_photos_are_sorted_by_their_largest_face_and_their_probability(
    inside, model, crawled, two_faces, tmp_path
):
    two_faces.rename(crawled / "smile" / "two.png")
    before, net = tree(crawled), load_model(model)
    results = list(predict_photos([crawled / name for name in before if "page" not in name], net))
    sure = float(np.median([result.probabilities[0].max() for result in results if result.faces]))
    out = inside("predict.py", "crawled", "--sort", "sorted", "--sure", sure).stdout
    assert tree(crawled) == before and "page.jpg  unreadable" in out
    expected = set()
    for result in results:
        if result.faces:
            p, label = result.probabilities[0].max(), net.classes[result.probabilities[0].argmax()]
            head = f"{int(1000 * p) / 1000:.3f}"
            label, head = (label, head + "_") if p >= sure else ("unsure", f"{head}-{label}_")
            expected.add((label, head, result.source.read_bytes()))
        else:
            expected.add(("no_face", "meadow.jpg", result.source.read_bytes()))
    after = tree(tmp_path / "sorted")
    assert len(after) == 8 and len(expected) == 7  # one photo is there twice
    assert {label for label, _, _ in expected} > {"unsure", "no_face"}
    for label, head, data in expected:
        head = head.removesuffix("_")  # what is there twice has a number next
        assert any(name.startswith(f"{label}/{head}") and content == data for name, content in after.items())
    counts = dict(line.split() for line in out.splitlines() if len(line.split()) == 2)
    assert sum(int(counts[label]) for label in (*net.classes, "unsure", "no_face")) == 8
    assert "8 photos copied to sorted" in out and "1 left out" in out
    assert "python preprocess_lips.py sorted" in out.splitlines()[-1]


@pytest.mark.parametrize("link", [False, True])
def test_sorting_again_adds_what_is_new_and_leaves_what_was_moved(inside, model, crawled, tmp_path, link):
    command = ["predict.py", "crawled", "--sort", "sorted", "--sure", "0", *["--link"] * link]
    inside(*command)
    sorted_ = tmp_path / "sorted"
    first = tree(sorted_)
    assert len(first) == 7 and {p.stat().st_nlink for p in sorted_.rglob("*.*g")} == {1 + link}
    gone, moved, *_ = first
    (sorted_ / gone).unlink()
    (sorted_ / "9other").mkdir()
    (sorted_ / moved).rename(sorted_ / "9other" / Path(moved).name)
    shutil.copy(crawled / "smile" / "Google_0000.png", crawled / "new.png")
    out = inside(*command).stdout
    second = tree(sorted_)
    assert "1 photos" in out and "7 left alone" in out
    assert len(second) == 7 and first.keys() - second.keys() == {gone, moved}
    # the page follows what was moved, and forgets what was deleted
    cards = page_data(tmp_path / "sorted.html")["cards"]
    assert {card["source"] for card in cards} == {f"sorted/{name}" for name in second}
    assert {card["folder"] for card in cards if "9other" in card["source"]} == {"9other"}
    assert all(Path(card["copy"]).is_relative_to("sorted") for card in cards)
    assert [name for name in second.keys() - first.keys() if name.endswith("_new.png")]


def test_photos_of_one_name_all_get_a_place_and_no_file_is_replaced(inside, model, crawled, tmp_path):
    for folder in ("smile", "open mouth"):  # the same photo under the same name, too
        shutil.copy(crawled / "smile" / "meadow.jpg", crawled / folder / "wood.jpg")
        shutil.copy(crawled / "smile" / "Google_0000.png", crawled / folder / "same.png")
    (tmp_path / "sorted" / "no_face").mkdir(parents=True)
    (tmp_path / "sorted" / "no_face" / "meadow.jpg").write_bytes(b"somebody's")
    inside("predict.py", "crawled", "--sort", "sorted", "--sure", "0")
    after = tree(tmp_path / "sorted")
    assert after.pop("no_face/meadow.jpg") == b"somebody's"
    sources = [data for name, data in tree(crawled).items() if "page" not in name]
    assert sorted(after.values()) == sorted(sources) and len(sources) == 11


def test_sorting_goes_on_after_ctrl_c_or_a_kill(inside, model, crawled, tmp_path, monkeypatch):
    import predict

    command = ["predict.py", "crawled", "--sort", "sorted", "--sure", "0"]
    real, calls = predict.Tray._place, []

    def place(self, photo, target):
        calls.append(photo)
        if len(calls) == 4:
            raise KeyboardInterrupt
        real(self, photo, target)

    with monkeypatch.context() as patch:
        patch.setattr(predict.Tray, "_place", place)
        assert "interrupted" in inside(*command, check=1).stderr
    assert len(tree(tmp_path / "sorted")) == 3
    record = tmp_path / "sorted" / ".sorted"
    record.write_bytes(record.read_bytes()[:-20])  # the third photo is there, its line is not whole
    (tmp_path / "sorted" / "0123456789abcdef.tmp").touch()
    inside(*command)
    sources = [data for name, data in tree(crawled).items() if "page" not in name]
    (tmp_path / "sorted" / "0123456789abcdef.tmp").unlink()
    assert sorted(tree(tmp_path / "sorted").values()) == sorted(sources)
    assert "0 photos copied" in inside(*command).stdout


def test_sorted_photos_are_the_next_steps_input_without_the_unsure(
    inside, model, crawled, tmp_path, monkeypatch
):
    sure = "0.35"
    inside("predict.py", "crawled", "--sort", "crawled/sorted", "--sure", sure)
    inside("predict.py", "crawled", "--sort", "crawled/sorted", "--sure", sure)  # which lies within the input
    folder = crawled / "sorted"
    for i, path in enumerate(sorted(folder.glob("*/0.*"))):  # as if half were unsure
        target = folder / ("2smile" if i % 2 else "unsure") / path.name
        target.parent.mkdir(exist_ok=True)
        path.rename(target)
    out = inside("preprocess_lips.py", "crawled/sorted", "lips").stdout
    rows = read_csv(tmp_path / "lips" / "manifest.csv")
    assert {row["class"] for row in rows} == {"2smile"} and len(rows) == 3
    assert "unsure: no class" in out and "no_face: no class" in out
    (tmp_path / "lips" / "unsure").mkdir()
    shutil.copy(next((tmp_path / "lips" / "2smile").iterdir()), tmp_path / "lips" / "unsure" / "x.jpg")
    inside("split_train_val.py", "lips", "data")
    assert {path.name for path in (tmp_path / "data" / "train").iterdir()} == {"2smile"}


def test_crops_can_be_sorted(inside, model, mouths, tmp_path):
    out = inside("predict.py", mouths / "data" / "val", "--crops", "--sort", "sorted", "--sure", "0").stdout
    assert len(tree(tmp_path / "sorted")) == 8 and "python split_train_val.py sorted" in out


def test_what_cannot_be_sorted_is_one_line(inside, model, crawled, tmp_path):
    for names in (["crawled", "--sort", "crawled"], ["crawled/smile", "--sort", "crawled"]):
        assert "where sorted photos go; name another folder" in inside("predict.py", *names, check=1).stderr
    (tmp_path / "mine.html").write_text("my page")
    assert "mine.html: is not of this program" in inside(
        "predict.py", "crawled", "--sort", "mine", check=1).stderr
    net = simpleconv3(2)
    net.classes = ("a", "unsure")
    save_model(net, tmp_path / "odd.pt")
    assert (
        "has a class" in inside("predict.py", "crawled", "--sort", "x", "--model", "odd.pt", check=1).stderr
    )
    with locked(tmp_path / "sorted" / ".lock"):
        assert "another run is at work" in inside("predict.py", "crawled", "--sort", "sorted", check=1).stderr
    inside("predict.py", "crawled/smile/page.jpg", "--sort", "sorted", check=1)


@pytest.mark.skipif(os.name == "nt", reason="Windows has no such file names")
def test_names_of_sorted_photos_are_kept_whatever_they_are(inside, model, crawled, tmp_path):
    names = ["x" * 251 + ".png", ODD, "0.123_again.png", "-rf.png", "\u5f20\u5634.png"]
    for name in names:
        shutil.copy(crawled / "smile" / "Google_0000.png", crawled / name)
    lines = inside("predict.py", "crawled", "--sort", "sorted", "--sure", "0", "--json").stdout.splitlines()
    placed = [json.loads(line).get("sorted") for line in lines]
    assert sum(map(bool, placed)) == 12 and all((tmp_path / path).is_file() for path in placed if path)
    heads = {os.path.basename(path)[:6] for path in placed if path and path.endswith("again.png")}
    assert len(heads) == 1 and not any("0.123" in path for path in placed if path)
    assert any(path.endswith(f"_{ODD}") for path in placed if path)


def test_without_a_model_named_it_says_which_it_takes(inside, model, two_faces, monkeypatch):
    import net

    assert inside("predict.py", "two.png").stdout.splitlines()[0] == "weights: models/model.pt"
    done = inside("predict.py", "two.png", "--json")
    assert done.stderr == "weights: models/model.pt\n" and all(map(json.loads, done.stdout.splitlines()))
    assert "weights" not in inside("predict.py", "two.png", "--model", model).stdout
    monkeypatch.setattr(net, "PRETRAINED", model.rename(model.with_name("other.pt")))
    model.with_suffix(".json").rename(model.with_name("other.json"))
    assert "other.pt" in inside("predict.py", "two.png").stdout.splitlines()[0]


def test_evaluate_prints_a_table_or_one_object(inside, model, photos, tmp_path):
    Image.new("RGB", (200, 200), "green").save(photos / "0none" / "meadow.jpg")
    out = inside("predict.py", "--evaluate", "data/raw").stdout
    assert "precision" in out and "balanced accuracy" in out and "on 24 images; 1 without a face" in out
    # columns end at the same place, whatever a name's letters take
    for table in out.split("\n", 1)[1].split("\n\n")[:2]:
        assert "张嘴" in table and len({wcswidth(line) for line in table.split("\n")}) == 1
    scores = json.loads(inside("predict.py", "--evaluate", "data/raw", "--json", "--save", "seen").stdout)
    against = scores["contradicted"]
    assert len(against) == 24 - round(24 * scores["accuracy"]) > 0
    assert [one["probability"] for one in against] == sorted(
        (one["probability"] for one in against), reverse=True
    )
    assert all(one["folder"] in one["source"] and one["folder"] != one["label"] for one in against)
    assert [path.name for path in (tmp_path / "seen").iterdir()] == ["evaluation.html"]
    assert scores["images"] == 24 and scores["skipped"] == 1 and len(scores["confusion"]) == 3
    assert scores["classes"]["0none"]["images"] == 12


def test_evaluate_leaves_out_what_sort_could_not_place(
    inside, model, photos, tmp_path
):
    one = json.loads(inside("predict.py", "data/raw", "--json").stdout.splitlines()[0])
    for folder in (one["label"], "unsure", "no_face"):
        (tmp_path / "sorted" / folder).mkdir(parents=True)
        shutil.copy(tmp_path / one["source"], tmp_path / "sorted" / folder)
    out = inside("predict.py", "--evaluate", "sorted", "--save", "seen").stdout
    assert "on 1 images" in out and "contradicted" not in out
    assert len(page_data(tmp_path / "seen" / "evaluation.html")["cards"]) == 1


def test_a_module_that_cannot_be_loaded_is_one_line(inside, model, monkeypatch):
    import predict

    monkeypatch.setattr(predict, "cv2", Later("no_such_module"))
    said = inside("predict.py", "x.jpg", check=1).stderr
    assert said.startswith("error: no_such_module cannot be loaded") and said.count("\n") == 1


def test_errors_name_the_way_out(inside, model, photos, tmp_path):
    assert (
        "no such model; 'python train.py' makes one"
        in inside("predict.py", "x.jpg", "--model", "no.pt", check=1).stderr
    )
    (tmp_path / "empty").mkdir()
    for left in ("@eaDir/a.jpg/SYNOPHOTO_THUMB_M.jpg", ".thumbnails/b.jpg", "#recycle/c.jpg"):
        (tmp_path / "empty" / left).parent.mkdir(parents=True)
        (tmp_path / "empty" / left).write_bytes(b"x")
    assert "empty: no photos or videos in this folder" in inside("predict.py", "empty", check=1).stderr
    (tmp_path / "crops" / "0none").mkdir(parents=True)
    Image.new("RGB", (128, 128), "green").save(tmp_path / "crops" / "0none" / "meadow.jpg")
    assert (
        "no face in any of 1 photos; if they are mouth crops, add --crops"
        in inside("predict.py", "--evaluate", "crops", check=1).stderr
    )
    Image.new("RGB", (99, 99)).save(photos / "preview.jpg")  # beside the class folders: of no class
    (photos / "9other").mkdir()
    (photos / "2smile" / "s05_1.png").rename(photos / "9other" / "s05_1.png")
    assert (
        "9other, which is none of the model's classes"
        in inside("predict.py", "--evaluate", "data/raw", check=1).stderr
    )


# sets a title, breaks the line, clears the screen, turns the writing; bytes that are no UTF-8
ODD = "\x1b]0;x\x07\n\x9b2J\u202e\u5634\udcff.png"


@pytest.mark.skipif(os.name == "nt", reason="Windows has no such file names")
def test_names_of_files_and_classes_steer_no_terminal_and_are_exact_in_json(
    shell, inside, model, mouths, tmp_path
):
    for label in ("0none", "2smile", "\u5f20\u5634"):
        (tmp_path / "in" / label).mkdir(parents=True)
        shutil.copy(next((mouths / "data" / "val").glob("*/*.png")), tmp_path / "in" / label / ODD)
    env = {"LANG": "C", "LC_ALL": "", "PYTHONIOENCODING": ""}
    args = ["--evaluate", "in", "in", "gone\x1b[2J.png", "--crops"]
    out = shell("predict.py", *args, env=env, check=1).stdout
    assert all(line.isprintable() for line in out.split("\n"))
    shown = r"\x1b]0;x\x07\n\x9b2J\u202e" + "\u5634" + r"\udcff.png"
    # a line for each of three, and for the two whose folder the model contradicts
    assert out.count(shown) == 5
    assert "gone\\x1b[2J.png  unreadable: No such file" in out
    with contextlib.redirect_stdout(io.TextIOWrapper(io.BytesIO(), "ascii")) as poor:
        folder = str(tmp_path / "in")
        main([folder, "--evaluate", folder, "--model", str(model), "--crops", "--json"])
        poor.flush()
    scores, *faces = map(json.loads, poor.buffer.getvalue().decode("ascii").splitlines())
    sources = [str(tmp_path / "in" / label / ODD) for label in ("0none", "2smile", "\u5f20\u5634")]
    assert [face["source"] for face in faces] == sources
    assert {one["source"] for one in scores["contradicted"]} < set(sources)
    assert all(
        list(face["probabilities"]) == list(scores["classes"]) == ["0none", "2smile", "\u5f20\u5634"]
        for face in faces
    )
    (tmp_path / "in" / "0none").rename(tmp_path / "in" / "\x1b[31m\nred")
    error = inside("predict.py", "--evaluate", "in", check=1).stderr
    assert error.startswith(r"error: in: holds \x1b[31m\nred, which is none of")
    assert error.count("\n") == 1 and error[:-1].isprintable()


def test_help_fits_a_screen_and_its_examples_work(model, two_faces, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "100")
    with pytest.raises(SystemExit):
        main(["--help"])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) <= 45 and max(map(len, lines)) <= 100
    *_, inputs, camera = lines
    assert inputs.startswith("  python predict.py ")
    assert camera == "  python predict.py --camera 0"  # tests/test_video.py
    (tmp_path / "holiday").mkdir()
    two_faces.rename(tmp_path / "holiday" / "two.png")
    with pytest.raises(SystemExit, match="1"):
        main(shlex.split(inputs)[2:])  # where photo.jpg and clip.mp4 are missing
    out = capsys.readouterr().out
    assert (
        "photo.jpg  unreadable" in out
        and "clip.mp4  unreadable" in out
        and (tmp_path / "named" / "two.jpg").is_file()
    )


@pytest.mark.parametrize("args, why", [
    ((), "name photos, videos or a folder"),
    (("--camera", "0", "photo.jpg"), "--camera goes with --model, --json and --save only"),
    (("http://a/b.jpg", "--sort", "x"), "http://a/b.jpg: photos are not fetched"),
    (("photo.jpg", "--sort", "x", "--save", "y"), "--sort goes with photos"),
    (("photo.jpg", "--sort", "x", "--sure", "95"), "--sure must be between 0 and 1"),
    (("photo.jpg", "--link"), "--sure and --link go with --sort"),
    (("--evaluate", "x", "--sort", "y"), "--sort goes with photos"),
])
def test_flags_that_exclude_each_other_say_so(args, why, capsys):
    with pytest.raises(SystemExit):
        main(list(args))
    assert why in capsys.readouterr().err
