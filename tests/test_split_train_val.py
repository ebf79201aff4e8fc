import os
import re
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

import preprocess_lips
from preprocess_lips import COLUMNS, read_csv, write_csv
from split_train_val import choose_val, group_of, main, merge, near_pairs, table, val_count


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


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 2**32 - 1), st.integers(0, 31))
def test_near_pairs_are_those_that_comparing_all_would_find(seed, distance):
    rng = np.random.default_rng(seed)
    hashes = rng.integers(0, 1 << 16, (12, 16), dtype=np.uint16).repeat(6, 0)
    for i, one in enumerate(hashes):
        for bit in rng.integers(0, 256, i % 6 * 8):
            one[bit // 16] ^= np.uint16(1 << bit % 16)
    hashes = np.unique(hashes, axis=0)
    far = np.bitwise_count(hashes[:, None] ^ hashes).sum(2, dtype=int)
    expected = {
        (i, j) for i in range(len(hashes)) for j in range(i + 1, len(hashes)) if far[i, j] <= distance
    }
    assert set(near_pairs(hashes, distance)) == expected


def test_photos_saved_anew_stay_on_one_side_though_their_crops_differ(tmp_path, orl):
    for i, name in enumerate(sorted(orl)[:200:10]):
        face = Image.fromarray(orl[name]).resize((184, 224), Image.Resampling.BICUBIC)
        folder = tmp_path / "photos" / ("a", "b")[i % 2]
        folder.mkdir(parents=True, exist_ok=True)
        face.save(folder / f"{name}.png")
        face.save(folder / f"{name}_copy.jpg", quality=60)
        face.resize((130, 158)).save(folder / f"{name}_small.jpg", quality=80)
    preprocess_lips.main([str(tmp_path / "photos"), str(tmp_path / "crops"), "--workers", "1"])
    split(tmp_path)
    sources = {row["crop"]: row["source"] for row in read_csv(tmp_path / "crops" / "manifest.csv")}
    sides = {}
    for row in read_csv(tmp_path / "data" / "split.csv"):
        sides.setdefault(sources[row["file"]][2:8].strip("_."), set()).add(row["part"])
    assert len(sides) == 20 and all(len(side) == 1 for side in sides.values())


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


@pytest.mark.parametrize("name", ["Ann_Lee_0001.jpg", "0.973_Ann_Lee_0002.jpg", "1.000-12_Ann_Lee_0003.jpg"])
def test_probabilities_before_the_names_of_sorted_photos_divide_no_group(name):
    assert group_of(f"2smile/{name}", re.compile(r"([^/]+)_\d+\.")) == "Ann_Lee"


def test_groups_that_share_a_pair_become_one():
    groups = {1: "b", 2: "b", 3: "a", 4: "c", 5: "d"}
    assert merge(groups, [(1, 3), (4, 2)]) == {1: "a", 2: "a", 3: "a", 4: "a", 5: "d"}


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
