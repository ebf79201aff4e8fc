import os
import re
from collections import Counter

import cv2
import numpy as np
import pytest
from conftest import SHARED, shared
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

import preprocess_lips
from preprocess_lips import COLUMNS, read_csv, write_csv
from split_train_val import (
    choose_val,
    find_copies,
    group_of,
    list_crops,
    main,
    table,
    val_count,
)


@pytest.fixture
def crops(tmp_path):
    """Crops of three classes, 40, 25 and 7; the content does not matter here."""
    for label, n in (("a", 40), ("b", 25), ("c", 7)):
        (tmp_path / "crops" / label).mkdir(parents=True)
        for i in range(n):
            (tmp_path / "crops" / label / f"p{i % 9}_{label}{i:02d}.jpg").write_text(f"{label}{i}")
    return tmp_path / "crops"


def split(tmp_path, *args):
    main([str(tmp_path / "crops"), str(tmp_path / "data"), *map(str, args)])
    return {
        p.relative_to(tmp_path / "data").as_posix()
        for part in ("train", "val")
        for p in (tmp_path / "data" / part).glob("*/*")
    }


def test_validation_gets_the_textbooks_counts():
    assert [val_count(n) for n in (4763, 3154, 4821, 2348, 9, 2, 1)] == [476, 315, 482, 234, 1, 1, 0]


@settings(deadline=None)
@given(st.dictionaries(st.sampled_from("abcd"), st.integers(1, 60), min_size=1), st.integers(0, 5))
def test_single_crops_meet_the_counts_exactly(classes, seed):
    members = {f"{label}/{i}": [label] for label, n in classes.items() for i in range(n)}
    got = Counter(members[group][0] for group in choose_val(members, seed))
    assert got == Counter({label: val_count(n) for label, n in classes.items()})


@settings(deadline=None)
@given(
    st.lists(st.lists(st.sampled_from("abc"), min_size=1, max_size=6), min_size=2, max_size=40),
    st.integers(0, 5),
)
def test_groups_leave_every_class_some_crops_in_training(groups, seed):
    members = {str(i): classes for i, classes in enumerate(groups)}
    val = choose_val(members, seed)
    for label in "abc":
        holders = [group for group, classes in members.items() if label in classes]
        assert not holders or any(group not in val for group in holders)


def test_every_crop_is_on_one_side(tmp_path, crops):
    made = split(tmp_path)
    assert len(made) == 72
    assert Counter(name.split("/")[0] + name.split("/")[1] for name in made) == {
        "traina": 36, "vala": 4, "trainb": 23, "valb": 2, "trainc": 6, "valc": 1}
    assert (tmp_path / "data" / "val").is_dir()


def test_the_same_seed_gives_the_same_split_and_another_seed_another(tmp_path, crops):
    first = split(tmp_path)
    assert split(tmp_path) == first
    assert split(tmp_path, "--seed", 1) != first
    assert split(tmp_path, "--seed", 0) == first


def test_new_crops_leave_the_old_ones_where_they_are(tmp_path, crops):
    before = split(tmp_path)
    for i in range(35):
        (crops / "c" / f"new{i}.jpg").write_text(f"new{i}")
    after = split(tmp_path)
    assert before <= after and len(after) == 72 + 35
    assert sum(name.startswith("val/c") for name in after) == 4


def test_removed_crops_disappear_and_the_counts_still_hold(tmp_path, crops):
    split(tmp_path)
    for path in sorted((crops / "a").iterdir())[:20]:
        path.unlink()
    after = split(tmp_path)
    assert sum("/a/" in name for name in after) == 20 and sum(name.startswith("val/a") for name in after) == 2


def test_files_of_others_are_never_touched(tmp_path, crops, capsys):
    mine = tmp_path / "data" / "train" / "a" / "mine.jpg"
    mine.parent.mkdir(parents=True)
    mine.write_text("mine")
    same_name = [tmp_path / "data" / part / "a" / "p0_a00.jpg" for part in ("train", "val")]
    for path in same_name:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("also mine")
    split(tmp_path)
    split(tmp_path, "--seed", 3)
    assert mine.read_text() == "mine" and all(path.read_text() == "also mine" for path in same_name)
    assert "left alone, not made by this script" in capsys.readouterr().out


def test_groups_stay_together(tmp_path, crops):
    made = split(tmp_path, "--group", r"(p\d)_")
    sides = {}
    for name in made:
        sides.setdefault(name.split("/")[2][:2], set()).add(name.split("/")[0])
    assert all(len(side) == 1 for side in sides.values()) and len(sides) == 9


def test_a_group_expression_that_finds_nothing_says_so(tmp_path, crops, capsys):
    split(tmp_path, "--group", r"(p[1-8])_")
    assert (
        "groups of their own, because --group finds nothing in their paths: 9 crops, "
        "such as that of a/p0_a00.jpg"
        in capsys.readouterr().out
    )
    with pytest.raises(
        SystemExit, match=r"error: --group \(x\)_: found in no photo's path; they are like a/p0_a00.jpg"
    ):
        split(tmp_path, "--group", "(x)_")


def test_groups_come_from_the_photos_path_in_the_manifest(tmp_path, crops):
    rows = [
        dict.fromkeys(COLUMNS, "")
        | {
            "source": f"a/person{int(p.stem[-2:]) // 4}_x{i}.png",
            "class": "a",
            "status": "ok",
            "crop": p.name,
        }
        for i, p in enumerate(sorted((crops / "a").iterdir()))
    ]
    write_csv(crops / "manifest.csv", COLUMNS, rows)
    split(tmp_path, "--group", r"(person\d+)_")
    person = {(row["class"], row["crop"]): row["source"].split("_")[0] for row in rows}
    sides = {}
    for row in read_csv(tmp_path / "data" / "split.csv"):
        if row["class"] == "a":
            sides.setdefault(person["a", row["file"]], set()).add(row["part"])
    assert all(len(side) == 1 for side in sides.values())
    assert {"val"} in sides.values()


def test_copies_saved_anew_stay_on_the_side_of_the_original(tmp_path, mouths, capsys):
    folder = tmp_path / "crops" / "a"
    folder.mkdir(parents=True)
    originals = sorted((mouths / "data").glob("*/*/*.png"))
    for i, path in enumerate(originals):
        image = Image.open(path).convert("RGB").resize((128, 128), Image.Resampling.BICUBIC)
        image.save(folder / f"o{i:02d}.jpg", quality=95)
        image.resize((90, 90)).save(folder / f"c{i:02d}.jpg", quality=60)
    made = split(tmp_path)
    sides = {}
    for name in made:
        sides.setdefault(name[-6:], set()).add(name.split("/")[0])
    assert (
        len(sides) == len(originals)
        and all(len(side) == 1 for side in sides.values())
        and {"val"} in sides.values()
    )
    found = re.search(r"near-duplicates: (\d+) crops in (\d+) groups", capsys.readouterr().out)
    assert int(found[1]) == 2 * len(originals) and int(found[2]) <= len(originals)


def crop_photos(cropper, photos, crops):
    """As preprocess_lips.py, but within this process and without workers."""
    rows = []
    for source, label in preprocess_lips.list_photos(photos):
        row, jpeg = preprocess_lips.process_photo(cropper, photos, source, label)
        rows.append(row)
        if jpeg:
            preprocess_lips.write_file(crops / label / row["crop"], jpeg)
    write_csv(crops / "manifest.csv", COLUMNS, rows)
    return rows


def sides_of(folder, key):
    """For what `key` makes of the paths of photos, the parts in which their crops lie."""
    sources = {row["crop"]: row["source"] for row in read_csv(folder / "crops" / "manifest.csv")}
    sides = {}
    for row in read_csv(folder / "data" / "split.csv"):
        sides.setdefault(key(sources[row["file"]]), set()).add(row["part"])
    return sides


def test_photos_saved_anew_stay_on_one_side_though_their_crops_differ(tmp_path, orl, cropper):
    for i, name in enumerate(sorted(orl)[:200:10]):
        face = Image.fromarray(orl[name]).resize((184, 224), Image.Resampling.BICUBIC)
        folder = tmp_path / "photos" / ("a", "b")[i % 2]
        folder.mkdir(parents=True, exist_ok=True)
        face.save(folder / f"{name}.png")
        face.save(folder / f"{name}_copy.jpg", quality=60)
        face.resize((130, 158)).save(folder / f"{name}_small.jpg", quality=80)
        face.point([min(255, level * 13 // 10) for level in range(256)]).save(folder / f"{name}_bright.jpg")
        face.crop((14, 10, 172, 212)).save(folder / f"{name}_cut.jpg")
    crop_photos(cropper, tmp_path / "photos", tmp_path / "crops")
    split(tmp_path)
    sides = sides_of(tmp_path, lambda source: source[2:8].strip("_."))
    assert len(sides) == 20 and all(len(side) == 1 for side in sides.values())


def before_a_wall(face, wall, place=(250, 120)):
    """A face in an oval before a wall: a PIL image."""
    face = cv2.resize(face, (138, 168), interpolation=cv2.INTER_CUBIC)
    oval = cv2.ellipse(np.zeros(face.shape, np.float32), (69, 84), (60, 80), 0, 0, 360, 1, -1)
    oval = cv2.GaussianBlur(oval, (0, 0), 4)[..., None]
    x, y = place
    photo = wall.copy()
    part = photo[y:y + 168, x:x + 138]
    part[:] = oval * face[..., None] + (1 - oval) * part
    return Image.fromarray(photo)


WALLS = {
    "white": lambda rng: np.full((480, 640, 3), 235, np.uint8),
    "shadow": lambda rng: np.tile(np.linspace(60, 200, 640, dtype=np.uint8)[None, :, None], (480, 1, 3)),
    "shelves": lambda rng: rng.integers(0, 256, (12, 16, 3), dtype=np.uint8).repeat(40, 0).repeat(40, 1),
}


@pytest.mark.parametrize("wall", WALLS.values(), ids=WALLS)
def test_different_people_before_one_wall_are_no_copies(tmp_path, orl, cropper, wall, capsys):
    background = wall(np.random.default_rng(0))
    for i in range(40):
        folder = tmp_path / "photos" / ("a", "b")[i % 2]
        folder.mkdir(parents=True, exist_ok=True)
        before_a_wall(orl[f"s{i + 1:02d}_1"], background).save(folder / f"{i}.png")
    rows = crop_photos(cropper, tmp_path / "photos", tmp_path / "crops")
    made = split(tmp_path)
    assert "near-duplicates" not in capsys.readouterr().out
    counts = Counter(row["class"] for row in rows if row["status"] == "ok")
    assert counts.total() >= 36
    assert sum(name.startswith("val/") for name in made) == sum(map(val_count, counts.values()))


def test_no_chain_of_small_steps_leads_from_one_face_to_another(tmp_path, orl, cropper):
    """Frames in which one face becomes another: neighbours may be taken for copies, the ends may not."""
    wall = WALLS["white"](None)
    (tmp_path / "photos" / "a").mkdir(parents=True)
    for i in range(21):
        face = cv2.addWeighted(orl["s05_1"], 1 - i / 20, orl["s13_5"], i / 20, 0)
        before_a_wall(face, wall).save(tmp_path / "photos" / "a" / f"{i:02d}.png")
    crop_photos(cropper, tmp_path / "photos", tmp_path / "crops")
    split(tmp_path)
    sources = {row["crop"]: row["source"] for row in read_csv(tmp_path / "crops" / "manifest.csv")}
    groups = {}
    for row in read_csv(tmp_path / "data" / "split.csv"):
        groups.setdefault(row["group"], set()).add(int(sources[row["file"]][2:4]))
    assert len(groups) < 21 and max(max(group) - min(group) for group in groups.values()) < 20
    assert len(groups) > 2


def test_copies_in_two_classes_are_named_and_stay_on_one_side(tmp_path, orl, cropper, capsys):
    for label, size in (("a", 224), ("b", 150)):
        (tmp_path / "photos" / label).mkdir(parents=True)
        for i in range(1, 11):
            face = Image.fromarray(orl[f"s{i + 10 * (label == 'b' and i > 1):02d}_1"])
            face.resize((size * 92 // 112, size)).save(tmp_path / "photos" / label / f"{i}.jpg", quality=90)
    crop_photos(cropper, tmp_path / "photos", tmp_path / "crops")
    split(tmp_path)
    assert (
        "near-duplicates in two classes, of which one is wrong: a/1.jpg (a) and b/1.jpg (b)\n"
        in capsys.readouterr().out
    )
    assert (
        len(sides_of(tmp_path, lambda source: source)["a/1.jpg"] | sides_of(tmp_path, lambda s: s)["b/1.jpg"])
        == 1
    )
    split(tmp_path, "--group", r"^(\w/\d+)")
    assert (
        "in two groups, which --group keeps apart: a/1.jpg (a) and b/1.jpg (b)\n" in capsys.readouterr().out
    )


@shared("photos")
def test_copies_of_photos_of_other_people_are_found_and_others_are_not_joined(tmp_path, cropper, capsys):
    folder = tmp_path / "photos" / "a"
    folder.mkdir(parents=True)
    files = sorted((SHARED / "photos").glob("*/*.jpg"))[31::100]
    copies = (
        lambda image: image,
        lambda image: image.resize((image.width // 2, image.height // 2)),
        lambda image: image.point([level * 2 // 3 for level in range(256)] * 3),
        lambda image: image.crop((6, 6, image.width - 4, image.height - 6)),
        lambda image: image.crop((30, 25, image.width - 20, image.height - 25)),
    )
    for i, path in enumerate(files):
        image = Image.open(path).convert("RGB")
        image.save(folder / f"{i:02d}_a.jpg", quality=95)
        copies[i % 5](image).save(folder / f"{i:02d}_b.jpg", quality=50)
    crop_photos(cropper, tmp_path / "photos", tmp_path / "crops")
    split(tmp_path)
    sides = sides_of(tmp_path, lambda source: source[2:4])
    assert len(sides) == len(files) and all(len(side) == 1 for side in sides.values())
    assert f"near-duplicates: {2 * len(files)} crops in {len(files)} groups" in capsys.readouterr().out


def test_a_crop_of_others_on_the_other_side_is_not_joined_by_ours(tmp_path, crops, capsys):
    names = sorted(path.name for path in (crops / "a").iterdir())
    (tmp_path / "data" / "val" / "a").mkdir(parents=True)
    for name in names:
        (tmp_path / "data" / "val" / "a" / name).write_text("not ours")
    made = split(tmp_path)
    assert {name for name in made if "/a/" in name} == {f"val/a/{name}" for name in names}
    assert "left alone, not made by this script" in capsys.readouterr().out


def test_a_class_without_validation_is_told(tmp_path, crops, capsys):
    split(tmp_path, "--group", "^([abc])/")
    assert "a: none in val, because all its crops belong together" in capsys.readouterr().out


def test_crops_below_the_class_folders_are_counted_not_forgotten(tmp_path, crops, capsys):
    for path in ("b/more/deep/x.jpg", "b/more/y.PNG", "b/more/notes.txt", "b/.hidden/z.jpg"):
        (crops / path).parent.mkdir(parents=True, exist_ok=True)
        (crops / path).write_text("x")
    assert len(split(tmp_path)) == 72
    assert f"2 images in folders below, such as {crops / 'b/more/deep/x.jpg'}\n" in capsys.readouterr().out


def test_what_other_programs_leave_among_the_crops_is_no_class_and_no_crop(tmp_path, crops, capsys):
    for path in ("@eaDir/a/x.jpg", "a/@eaDir/p0_a00.jpg/x.jpg", "b/.t/x.jpg", "#recycle/x.jpg"):
        (crops / path).parent.mkdir(parents=True, exist_ok=True)
        (crops / path).write_text("x")
    assert len(split(tmp_path)) == 72
    assert "folders below" not in capsys.readouterr().out


@pytest.mark.parametrize("name", ["Ann_Lee_0001.jpg", "0.973_Ann_Lee_0002.jpg", "1.000-12_Ann_Lee_0003.jpg",
                                  "0.654-\u5f20.\u5634-2_Ann_Lee_0004.jpg"])
def test_probabilities_before_the_names_of_sorted_photos_divide_no_group(name):
    assert group_of(f"2smile/{name}", re.compile(r"([^/]+)_\d+\.")) == "Ann_Lee"


def test_probabilities_alone_are_no_match_of_a_group(tmp_path, crops, capsys):
    (crops / "a" / "0.981_Ann.jpg").write_bytes((crops / "a" / "p0_a00.jpg").read_bytes())
    split(tmp_path, "--group", r"p(\d+)_|0\.\d+_")
    assert "because --group finds nothing in their paths: 1 crops" in capsys.readouterr().out


def test_link_makes_hard_links_and_switching_back_makes_copies(tmp_path, crops):
    name = sorted(split(tmp_path, "--link"))[0]
    source = crops / name.split("/", 1)[1]
    assert os.path.samefile(source, tmp_path / "data" / name)
    split(tmp_path)
    assert not os.path.samefile(source, tmp_path / "data" / name)


def test_an_interrupted_split_is_finished_by_the_next(tmp_path, crops, monkeypatch):
    import split_train_val

    real, done = split_train_val.place_crop, []

    def stop_after_ten(*args):
        if len(done) == 10:
            raise KeyboardInterrupt
        done.append(real(*args))

    monkeypatch.setattr(split_train_val, "place_crop", stop_after_ten)
    with pytest.raises(SystemExit, match="again to finish"):
        split(tmp_path)
    monkeypatch.undo()
    assert len(split(tmp_path)) == 72
    assert len(split(tmp_path, "--seed", 2)) == 72  # and knows all of it as its own


def test_errors_name_the_way_out(shell, tmp_path, crops):
    assert "'python preprocess_lips.py' makes it" in shell("split_train_val.py", check=1).stderr
    assert "not a regular expression" in shell("split_train_val.py", "crops", "--group", "(", check=1).stderr


def test_the_table_is_printed(shell, tmp_path, crops):
    out = shell("split_train_val.py", "crops", "out").stdout
    assert [line.split() for line in out.splitlines()[:5]] == [
        ["class", "total", "train", "val"],
        ["a", "40", "36", "4"],
        ["b", "25", "23", "2"],
        ["c", "7", "6", "1"],
        ["total", "72", "65", "7"],
    ]


def test_tables_stay_in_line_below_names_whose_letters_are_wide():
    rows = [{"class": label, "part": part} for label in ("a", "张嘴", "007") for part in ("train", "val")]
    assert table(rows).splitlines() == [
        "class      total    train    val",
        "007            2        1      1",
        "a              2        1      1",
        "张嘴           2        1      1",
        "total          6        3      3"]


def moved(image, dx=0, dy=0, scale=1.0, turn=0.0):
    """An image shifted by pixels, scaled, and turned by degrees, its border replicated."""
    height, width = image.shape[:2]
    warp = cv2.getRotationMatrix2D((width / 2, height / 2), turn, scale)
    warp[:, 2] += dx, dy
    return cv2.warpAffine(image, warp, (width, height), borderMode=cv2.BORDER_REPLICATE)


def save_mouths(folder, images):
    folder.mkdir(parents=True)
    for name, image in images.items():
        Image.fromarray(image).save(folder / name, quality=85)
    return list_crops(folder.parent)


@pytest.fixture
def some_mouths(mouths):
    """Mouths of different persons: list of uint8 arrays of shape (128, 128)."""
    paths = sorted((mouths / "data").glob("*/*/*.png"))
    return [cv2.resize(np.asarray(Image.open(path).convert("L")), (128, 128)) for path in paths]


def test_copies_shifted_and_scaled_by_a_few_pixels_are_joined_to_the_first(tmp_path, some_mouths):
    changes = [{}, dict(dx=5, dy=-4), dict(scale=1.08), dict(scale=0.93, dx=-4), dict(dy=6, turn=2)]
    files = save_mouths(tmp_path / "crops" / "a", {
        f"{i:02d}_{k}.jpg": moved(image, **change)
        for i, image in enumerate(some_mouths[:6]) for k, change in enumerate(changes)})
    assert {(first[1], other[1]) for first, other in find_copies(files)} >= {
        (f"{i:02d}_0.jpg", f"{i:02d}_{k}.jpg") for i in range(6) for k in range(1, 5)}


def test_copies_hundreds_of_crops_apart_are_found_and_a_group_has_one_first(tmp_path, some_mouths):
    """More crops than are compared at once: frames alike lie between, nearly all of one group."""
    between = {f"b{i:03d}.jpg": moved(some_mouths[0], dx=i % 5, dy=i // 5 % 5) for i in range(300)}
    files = save_mouths(tmp_path / "crops" / "a", {
        "a.jpg": some_mouths[1], "c.jpg": moved(some_mouths[1], dx=3, scale=1.05)} | between)
    pairs = find_copies(files)
    assert (("a", "a.jpg"), ("a", "c.jpg")) in pairs
    assert len(pairs) > 290 and pairs == sorted(pairs)
    assert len({other for _, other in pairs}) == len(pairs)
    assert not {first for first, _ in pairs} & {other for _, other in pairs}


def test_crops_of_one_colour_or_unreadable_are_copies_of_none(tmp_path, some_mouths):
    grey = np.full((128, 128), 90, np.uint8)
    files = save_mouths(tmp_path / "crops" / "a", {"a.jpg": grey, "b.jpg": grey, "c.jpg": some_mouths[0]})
    (tmp_path / "crops" / "a" / "d.jpg").write_text("no image")
    (tmp_path / "crops" / "a" / "e.jpg").write_text("no image")
    assert len(list_crops(tmp_path / "crops")) == 5
    assert find_copies(list_crops(tmp_path / "crops")) == [] and len(files) == 3
