"""Nothing lost, nothing trusted: broken photos, kills, full disks, two at once. README.md has the table."""

import contextlib
import copy
import csv
import ctypes
import faulthandler
import hashlib
import io
import itertools
import json
import multiprocessing
import os
import random
import re
import shutil
import signal
import stat
import subprocess
import sys
import threading
import time
import tracemalloc
import zipfile
from concurrent.futures import ThreadPoolExecutor
from concurrent.futures.thread import BrokenThreadPool
from pathlib import Path

import cv2
import hostile
import numpy as np
import pytest
from conftest import ROOT, train_flags, without_workers
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image

import preprocess_lips
from preprocess_lips import (
    COLUMNS,
    MAX_MEMORY,
    MAX_PIXELS,
    TEMPORARY,
    crop_name,
    locked,
    preprocess,
    printable,
    read_csv,
    read_photo,
    write_csv,
    write_file,
)

posix = pytest.mark.skipif(os.name != "posix", reason="needs POSIX")
linux = pytest.mark.skipif(sys.platform != "linux", reason="looks at /proc")
no_workers = pytest.mark.usefixtures("no_workers")


@pytest.fixture(scope="module")
def face(orl):
    return Image.fromarray(orl["s05_1"]).convert("RGB")


@pytest.fixture(scope="module")
def corpus(tmp_path_factory, face):
    """A folder of hostile photos, and for each the statuses that are right."""
    folder = tmp_path_factory.mktemp("photos") / "a"
    return folder, hostile.make(folder, face)


def rows_of(crops):
    return {row["source"]: row for row in read_csv(crops / "manifest.csv")}


def command(script, *args):
    return [sys.executable, str(ROOT / script), *map(str, args)]


def files_in(*folders):
    """Content of all files but lock files: dict of path to bytes. Fails on leftovers of killed runs."""
    found = {
        path: path.read_bytes()
        for folder in folders
        for path in folder.rglob("*")
        if path.is_file() and path.name != ".lock"
    }
    assert not [path for path in found if path.match(TEMPORARY)]
    return found


def below(folder):
    """As `files_in`, with paths that are relative to the folder."""
    return {path.relative_to(folder): data for path, data in files_in(folder).items()}


# --- photos


@posix
def test_hostile_photos_each_get_their_status_and_no_more_memory_than_allowed(tmp_path, corpus, inside):
    """Bombs, lies, cuts, pipes, devices, loops, ten gigabytes, odd names: all are told apart in one run."""
    folder, expected = corpus
    # measured from a small process: one that this large one starts would be counted as large
    measure = ("import resource, subprocess, sys; done = subprocess.run(sys.argv[1:]); "
               "print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss); sys.exit(done.returncode)")
    run = command("preprocess_lips.py", folder.parent, "crops", "--workers", "2")
    done = subprocess.run([sys.executable, "-c", measure, *run], cwd=tmp_path,
                          stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    out = done.stdout.decode()
    peak = int(out.split()[-1])
    assert done.returncode == 0 and not re.search("Traceback|Warning|Decode", out), out
    got = {source.removeprefix("a/"): row["status"] for source, row in rows_of(tmp_path / "crops").items()}
    assert {name: status for name, status in got.items() if status not in expected[name]} == {}
    assert set(got) == set(expected)
    # the largest process; the worst honest photo here takes 50 MB, the worst bomb would take over a gigabyte
    assert peak * (1024 if sys.platform == "linux" else 1) < 700e6
    assert "0 photos looked at" in inside("preprocess_lips.py", folder.parent, "crops").stdout


@posix
@pytest.mark.parametrize(
    "what, why",
    [
        ("pipe.jpg", "not a regular file"),
        ("device.jpg", "not a regular file"),
        ("ten gigabytes.jpg", "larger than 480 MB"),
        ("bomb that keeps its word.png", "11504 x 11504 pixels"),
        ("bomb under Pillow's limit.png", "13000 x 13000 pixels"),
        ("page.jpg", "no image, or of a kind that Pillow does not know"),
    ],
)
def test_readers_of_single_photos_refuse_them_too(corpus, cropper, what, why):
    path = corpus[0] / what
    if what == "pipe.jpg":  # whoever opens it reads nothing, instead of waiting for ever
        threading.Thread(target=lambda: [open(path, "wb").close() for _ in range(2)], daemon=True).start()
    for read in (read_photo, cropper.find):
        with pytest.raises(OSError, match=why):
            read(path)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("name", ["nan.tif", "infinite.tif", "infinitely far apart.tif"])
def test_levels_that_are_no_numbers_become_levels(corpus, name):
    assert read_photo(corpus[0] / name).shape == (100, 100, 3)


@linux
def test_no_more_is_read_of_a_file_than_allowed_whatever_size_it_claims(monkeypatch):
    monkeypatch.setattr(preprocess_lips, "MAX_BYTES", 100)
    assert (
        os.stat("/proc/self/status").st_size == 0
        and len(preprocess_lips.read_file("/proc/self/status")) == 100
    )


@posix
def test_photos_that_are_programs_are_not_run(tmp_path, shell):
    """Pillow would hand PostScript to Ghostscript where there is one."""
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "gs").write_text(f"#!/bin/sh\ntouch {tmp_path / 'run'}\n")
    (tmp_path / "bin" / "gs").chmod(0o755)
    (tmp_path / "photos" / "a").mkdir(parents=True)
    (tmp_path / "photos" / "a" / "face.jpg").write_bytes(hostile.GHOSTSCRIPT)
    env = {"PATH": f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}"}
    shell("preprocess_lips.py", "photos", "crops", "--workers", 1, env=env, check=1)
    assert rows_of(tmp_path / "crops")["a/face.jpg"]["status"] == "unreadable"
    shell("split_train_val.py", "photos", "data", env=env)
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
@linux
def test_the_largest_photos_stay_within_the_memory_of_a_worker(tmp_path):
    """Every kind of decoding at MAX_PIXELS, in a worker as preprocessing starts it."""
    side = int(MAX_PIXELS ** 0.5)
    red = Image.new("RGB", (side, side), "red")
    exif = Image.Exif()
    exif[0x0112] = 6
    photos = {
        "rgb.png": lambda: hostile.encode(red, "PNG", compress_level=1),
        "turned.png": lambda: hostile.encode(red, "PNG", compress_level=1, exif=exif),
        "rgba.png": lambda: hostile.encode(red, "PNG", "RGBA", compress_level=1),
        "progressive.jpg": lambda: hostile.encode(red, "JPEG", progressive=True),
        "16 bit.png": lambda: hostile.encode(
            Image.fromarray(np.full((side, side), 3000, np.uint16)), "PNG", "I;16", compress_level=1
        ),
        "webp": lambda: hostile.encode(red, "WEBP", "RGBA", lossless=True, quality=0, method=0),
        "gif": lambda: hostile.encode(red, "GIF", "P"),
        "rgb.tif": lambda: hostile.encode(red, "TIFF"),
        "rgba.tif": lambda: hostile.encode(red, "TIFF", "RGBA"),
    }
    (tmp_path / "photos" / "a").mkdir(parents=True)
    for name, make in photos.items():
        (tmp_path / "photos" / "a" / name).write_bytes(make())
    with subprocess.Popen(
        command("preprocess_lips.py", tmp_path / "photos", tmp_path / "crops", "--workers", "1"),
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        err = process.stderr.read()
        _, _, usage = os.wait4(process.pid, 0)
    status = {Path(source).name: row["status"] for source, row in rows_of(tmp_path / "crops").items()}
    assert "not one photo gave a mouth" in err and set(status.values()) <= {"no_face", "unreadable"}
    assert {name for name, s in status.items() if s == "unreadable"} <= {
        "webp",
        "rgba.tif",
    }  # decoders that hold several copies
    print(status, usage.ru_maxrss // 1024, "MiB")
    assert usage.ru_maxrss * 1024 < MAX_MEMORY + 500e6


REAL_WORK, REAL_DECODE = preprocess_lips.work, preprocess_lips._decode


def decode(source, least=None):
    """As `_decode`, but one photo keeps Python out for a long time, and two ask for all the memory."""
    if source.endswith(b"for ever"):
        # 20 seconds, ten times what is allowed below: a test that fails is better than one that hangs
        re.match(r"(a+)+$", "a" * 29 + "b")
    if source.endswith(b"too much"):
        np.empty(MAX_MEMORY, np.uint8)
    if source.endswith(b"too much for OpenCV"):
        cv2.resize(np.zeros((1, 1), np.uint8), (30_000, MAX_MEMORY // 30_000))
    return REAL_DECODE(source, least)


def write_slowly(path, data, **more):
    if path.name == os.environ["SLOW_CROP"]:
        time.sleep(2.5)
    write_file(path, data, **more)


def work(*args):
    preprocess_lips._decode = decode
    REAL_WORK(*args)


def test_photos_that_take_for_ever_or_too_much_memory_cost_only_themselves(photos, tmp_path, monkeypatch):
    bad = {"0none/s02_2.png": b"for ever"}
    if sys.platform == "linux":
        bad |= {"2smile/s05_1.png": b"too much", "2smile/s05_2.png": b"too much for OpenCV"}
    for name, more in bad.items():
        with open(photos / name, "ab") as file:
            file.write(more)
    slow = hashlib.sha1((photos / "0none" / "s01_1.png").read_bytes()).hexdigest()
    monkeypatch.setenv("SLOW_CROP", crop_name("0none", slow))  # the disk may take longer than photos may
    monkeypatch.setattr(preprocess_lips, "work", work)
    monkeypatch.setattr(preprocess_lips, "write_file", write_slowly)
    monkeypatch.setattr(preprocess_lips, "MAX_SECONDS", 1.5)
    rows, new, _ = preprocess(photos, tmp_path / "crops", 1)
    assert {row["source"]: row["status"] for row in rows if row["status"] != "ok"} == dict.fromkeys(
        bad, "unreadable"
    ) and new == 24
    monkeypatch.undo()
    assert preprocess(photos, tmp_path / "crops", 1)[1] == 0  # it is remembered: a rerun does not hang again


def start_and_die(pipe, seconds):
    os._exit(1)


def test_workers_that_cannot_start_are_an_error_not_unreadable_photos(photos, tmp_path, monkeypatch, shell):
    monkeypatch.setattr(preprocess_lips, "work", start_and_die)
    with pytest.raises(OSError, match="die before they begin"):
        preprocess(photos, tmp_path / "crops", 1)
    models = tmp_path / "face_recognition_models" / "models"
    models.mkdir(parents=True)
    (models.parent / "__init__.py").touch()
    (models / "shape_predictor_68_face_landmarks.dat").write_bytes(b"half a download")
    args, env = [photos, tmp_path / "crops", "--workers", 1], {"PYTHONPATH": str(tmp_path)}
    done = shell("preprocess_lips.py", *args, env=env, check=1)
    assert "not a file of landmarks" in done.stderr and len(done.stderr.strip().splitlines()) == 1
    assert not (tmp_path / "crops" / "manifest.csv").exists()


@posix
def test_what_parts_of_a_job_could_not_read_is_in_the_manifest_too(tmp_path, face, inside, monkeypatch):
    folder = tmp_path / "photos" / "a"
    folder.mkdir(parents=True)
    face.save(folder / "a.png")
    for name in "bcd":
        (folder / name).symlink_to("gone")
    for rank, world in ((0, 2), (1, 2), (0, 1)):
        monkeypatch.setenv("RANK", str(rank))
        monkeypatch.setenv("WORLD_SIZE", str(world))
        inside("preprocess_lips.py", "photos", "crops", "--workers", 1)
    assert [row["status"] for row in rows_of(tmp_path / "crops").values()] == ["ok"] + 3 * ["unreadable"]


def bind():
    """Root goes, in this thread and those it starts, without the rights to do what permissions forbid."""
    if os.getuid() == 0:
        libc, head, rights = ctypes.CDLL(None), (ctypes.c_uint32 * 2)(0x20080522), (ctypes.c_uint32 * 6)()
        assert not libc.capget(head, rights)
        for i in range(3):  # what is in force, permitted, inherited
            rights[i] &= ~0b110  # CAP_DAC_OVERRIDE and CAP_DAC_READ_SEARCH
        assert not libc.capset(head, rights)


@pytest.fixture
def permitted(tmp_path, inside, monkeypatch):
    """As `inside`, but permissions bind even where the tests are run by root, and there is no home."""
    monkeypatch.setenv("HOME", "/nonexistent")

    def run(*args, **more):
        try:
            with ThreadPoolExecutor(1, initializer=bind) as thread:
                return thread.submit(inside, *args, **more).result()
        except BrokenThreadPool:
            pytest.skip("permissions do not bind this user")

    yield run
    for place in tmp_path.rglob("*"):
        if not place.is_symlink():
            place.chmod(0o700)


def test_a_script_that_lacks_the_guard_of_spawned_processes_is_told_what_to_write(photos, tmp_path):
    (tmp_path / "own.py").write_text(
        f"import sys\nsys.path.insert(0, {str(ROOT)!r})\nfrom pathlib import Path\nimport preprocess_lips\n"
        f"preprocess_lips.main([{str(photos)!r}, 'crops', '--workers', '1'])\n")
    done = subprocess.run([sys.executable, "own.py"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert "must call this below 'if __name__ == \"__main__\":'" in done.stderr


@posix
def test_what_may_not_be_read_is_said_and_tried_again_once_it_may(permitted, tmp_path, face):
    folder = tmp_path / "photos" / "a"
    (folder / "closed folder").mkdir(parents=True)
    for name in ("open.png", "closed.png", "closed folder/inside.png"):
        face.save(folder / name)
    closed = [folder / name for name in ("closed.png", "closed folder")]
    for path in closed:
        path.chmod(0)
    folder.chmod(0o555)  # and the photos' folder is read-only
    permitted("preprocess_lips.py", "photos", "crops")
    assert {source: row["status"] for source, row in rows_of(tmp_path / "crops").items()} == {
        "a/closed folder": "unreadable", "a/closed.png": "unreadable", "a/open.png": "ok"}
    assert "0 photos looked at" in permitted("preprocess_lips.py", "photos", "crops").stdout
    for path in closed:
        path.chmod(0o700)
    permitted("preprocess_lips.py", "photos", "crops")
    statuses = [row["status"] for row in rows_of(tmp_path / "crops").values()]
    assert sorted(statuses) == ["duplicate", "duplicate", "ok"]


def test_heic_photos_name_the_package_that_reads_them_and_are_tried_again_with_it(
    shell, inside, tmp_path, face, monkeypatch
):
    from net import save_model, simpleconv3  # here: processes that other tests start import this file

    pillow_heif = pytest.importorskip("pillow_heif")
    folder = tmp_path / "photos" / "a"
    folder.mkdir(parents=True)
    face.save(folder / "usual.png")
    pillow_heif.from_pillow(face).save(folder / "IMG_0001.HEIC")
    # as messengers name them
    pillow_heif.from_pillow(face.rotate(3)).save(folder / "IMG_0002.jpg", format="HEIF")
    (folder / "IMG_0003.HEIC").write_text("none at all")
    (tmp_path / "without").mkdir()
    (tmp_path / "without" / "pillow_heif.py").write_text("raise ImportError")
    env = {"PYTHONPATH": str(tmp_path / "without")}
    said = shell("preprocess_lips.py", "photos", "crops", "--workers", 1, env=env).stdout
    assert "2 of the unreadable ones are HEIC, which 'pip install pillow-heif'" in said
    save_model(simpleconv3(4), tmp_path / "models" / "model.pt")
    with monkeypatch.context() as patch:  # as in a process that found no such package
        patch.setattr(preprocess_lips, "pillow_heif", None)
        patch.setattr(Image, "ID", [name for name in Image.ID if name != "HEIF"])
        assert "unreadable: HEIC; 'pip install pillow-heif'" in inside("predict.py", folder).stdout
    assert inside("preprocess_lips.py", "photos", "crops").stdout.count("HEIC") == 0
    status = {source: row["status"] for source, row in rows_of(tmp_path / "crops").items()}
    assert status == {"a/IMG_0001.HEIC": "ok", "a/IMG_0002.jpg": "ok", "a/IMG_0003.HEIC": "unreadable",
                      "a/usual.png": "ok"}
    assert "IMG_0001.HEIC  face 1" in inside("predict.py", folder).stdout
    (folder / "IMG_0001.HEIC").write_bytes((folder / "IMG_0001.HEIC").read_bytes()[:200])
    assert "pip" not in (said := inside("predict.py", folder).stdout) and "IMG_0001.HEIC  unreadable" in said


@posix
@pytest.mark.parametrize(
    "env",
    [
        {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},
        {"PYTHONIOENCODING": "cp1252"},
    ],
)
def test_names_of_all_alphabets_pass_through_poor_terminals_and_missing_homes(tmp_path, face, env):
    folder = tmp_path / "脸" / "嘴\x1b[31m唇\n\x07"
    folder.mkdir(parents=True)
    for i in range(2):
        face.rotate(i).save(folder / f"微笑 {i}.png")
    env = {key: value for key, value in os.environ.items() if key not in ("HOME", "LANG", "LC_ALL")} | env
    for script, args in (("preprocess_lips", ["脸", "裁剪", "--workers", "1"]),
                         ("split_train_val", ["裁剪", "数据"])):
        # what is there, and in the same process, which costs a second to start, what is not
        code = (f"import sys; sys.path.insert(0, {str(ROOT)!r}); from {script} import main\n"
                "main(sys.argv[2:]); print('done', flush=True); main(sys.argv[1:2])")
        done = subprocess.run([sys.executable, "-c", code, "没有\x1b[31m", *args], cwd=tmp_path,
                              capture_output=True, env=env)
        out = done.stdout + done.stderr
        assert done.returncode == 1 and b"Traceback" not in out, out
        assert done.stdout.endswith(b"done\n") and b"error: " in done.stderr, out
        assert not set(out) & set(b"\x1b\x07"), out
        for crop in sorted((tmp_path / "裁剪").glob("*/*.jpg"))[:1]:
            for part in ("train", "val"):  # files of others, which the split names and leaves alone
                (tmp_path / "数据" / part / folder.name).mkdir(parents=True, exist_ok=True)
                (tmp_path / "数据" / part / folder.name / crop.name).touch()
    assert [row["class"] for row in read_csv(tmp_path / "数据" / "split.csv")] == [folder.name]


def test_long_class_names_leave_room_for_the_photos_name():
    name = crop_name("唇" * 83, "0123456789abcdef")
    assert len(name.encode()) <= 255 and name.endswith("唇_0123456789ab.jpg")


@given(st.text())
def test_what_is_printed_steers_no_terminal(text):
    shown = printable(text)
    assert shown.isprintable() and all(c in shown for c in text if c.isascii() and c.isprintable())


# --- CSV


cells = st.text(
    st.characters(exclude_categories=["Cs"]) | st.sampled_from("=+-@\t\r\n'\",;\udcff\udc80 0"), max_size=12
)


@pytest.fixture(scope="module")
def csv_file(tmp_path_factory):
    return tmp_path_factory.mktemp("csv") / "x.csv"


@settings(max_examples=300, deadline=None)
@given(st.lists(st.tuples(cells, cells), max_size=4))
@example([(c + "1", "1" + c) for c in "=+-@\t\r\n'\",;\udcff"])
def test_csv_files_come_back_as_they_were_and_hold_no_formulas(csv_file, rows):
    path = csv_file
    rows = [{"source": a, "class": b} for a, b in rows]
    write_csv(path, ("source", "class"), rows)
    assert read_csv(path) == rows
    with open(path, encoding="utf-8", errors="surrogateescape", newline="") as file:
        for row in csv.reader(file):
            assert not any(
                re.match(r"[=+\-@\t\r\n]", cell) for cell in row if not re.fullmatch(r"-[-\d ]+", cell)
            )


def test_boxes_with_negative_edges_stay_numbers(tmp_path):
    write_csv(tmp_path / "x.csv", ("mouth", "source"), [{"mouth": "-12 5 -3 40", "source": "-12.jpg"}])
    assert (tmp_path / "x.csv").read_text().splitlines() == ["mouth,source", "-12 5 -3 40,'-12.jpg"]


@no_workers
def test_records_from_others_remove_nothing_that_is_not_ours(photos, tmp_path):
    """A manifest.csv or split.csv that came with a download may say anything, and bring folders."""
    import split_train_val

    crops, data = tmp_path / "data" / "lips", tmp_path / "data"
    mine = [
        tmp_path / "mine.jpg",
        data / "m.jpg",
        data / ".._mine.jpg",
        crops / "_mine.jpg",
        crops / "0none" / "mine.jpg",
    ]
    for folder in (crops / "0none" / "0none_", data / "train" / "0none"):
        folder.mkdir(parents=True)
    for path in mine:
        path.write_text("mine")
    base = dict.fromkeys(COLUMNS, "") | {"status": "ok", "source": "gone.png"}
    about = (photos / "0none" / "s01_1.png").stat()
    write_csv(
        crops / "manifest.csv",
        COLUMNS,
        [
            *(
                base | {"class": label, "sha1": sha1, "crop": crop}
                for label, sha1, crop in (
                    ("..", "mine", "../mine.jpg"),
                    ("..", "mine", ".._mine.jpg"),
                    ("", "mine", "_mine.jpg"),
                    ("0none", "mine", "mine.jpg"),
                    ("0none", "/../../../m", "0none_/../../../m.jpg"),
                    (str(tmp_path), "mine", "mine.jpg"),
                )
            ),
            base
            | {
                "source": "0none/s01_1.png",
                "class": "0none",
                "crop": "../../m.jpg",
                "sha1": "m",
                "bytes": about.st_size,
                "mtime_ns": about.st_mtime_ns,
            },
        ],
    )
    preprocess_lips.main([str(photos), str(crops), "--workers", "1"])
    write_csv(
        data / "split.csv",
        split_train_val.COLUMNS,
        [
            {"part": part, "class": label, "file": name, "group": "g", "draw": "d", "source": "s"}
            for part, label, name in (
                ("..", "data", "m.jpg"),
                ("train", "..", "m.jpg"),
                ("train", "0none", "../../m.jpg"),
                ("train", "0none", ""),
                ("val", str(tmp_path), "mine.jpg"),
            )
        ],
    )
    split_train_val.main([str(crops), str(data)])
    assert all(path.read_text() == "mine" for path in mine)


NO_RECORD = {
    "no CSV": b"a" * 200_000,
    "empty": b"",
    "bytes": b"\0\xff\xfe",
    "a column": b"source\n",
    "other columns": b"status,class\nok\n",
    "a quote": b'"',
    "many cells": b"source,class,status\n" + b"a," * 9000,
    "other letters": "\u5634,".encode("utf-16"),
    "cut short": "source,class".encode("utf-16")[:-1],
}


@pytest.mark.parametrize("content", NO_RECORD.values(), ids=NO_RECORD)
def test_a_record_that_cannot_be_read_is_one_line_and_stays_as_it_is(photos, tmp_path, content):
    import split_train_val

    crops, line = tmp_path / "crops", r"^error: [^\n]*/{}: [^\n]*; restore it, or remove it [^\n]*$"
    (crops / "a").mkdir(parents=True)
    (crops / "a" / "x.jpg").touch()
    for path in (crops / "manifest.csv", tmp_path / "split.csv"):
        path.write_bytes(content)
    with pytest.raises(SystemExit, match=line.format("manifest.csv")):
        preprocess_lips.main([str(photos), str(crops)])
    with pytest.raises(SystemExit, match=line.format("manifest.csv")):
        split_train_val.main([str(crops), str(tmp_path)])
    (crops / "manifest.csv").rename(crops / "away")
    with pytest.raises(SystemExit, match=line.format("split.csv")):
        split_train_val.main([str(crops), str(tmp_path)])
    assert (crops / "away").read_bytes() == (tmp_path / "split.csv").read_bytes() == content


@no_workers
def test_a_journal_that_a_kill_cut_short_stops_nothing(photos, tmp_path):
    (tmp_path / "crops").mkdir()
    (tmp_path / "crops" / "manifest.csv.part0").write_bytes(b'{"source": "0none/s01\n')
    for path in sorted(photos.glob("*/*"))[1:]:
        path.unlink()
    preprocess_lips.main([str(photos), str(tmp_path / "crops"), "--workers", "1"])
    assert len(rows_of(tmp_path / "crops")) == 1


@pytest.fixture(scope="module")
def recorded(tmp_path_factory, orl, cropper):
    """photos, crops and data with classes whose names spreadsheets change or cannot write."""
    import split_train_val

    root = tmp_path_factory.mktemp("recorded")
    for i, label in enumerate(("007", "1-2", "\u5634 \u00e9", "=1+1")):
        (root / "photos" / label).mkdir(parents=True)
        for j in range(2):
            Image.fromarray(orl[f"s{i + 1:02d}_{j + 1}"]).save(root / "photos" / label / f"{j}e{j}.png")
    with without_workers(cropper):
        preprocess_lips.main([str(root / "photos"), str(root / "crops")])
    split_train_val.main([str(root / "crops"), str(root / "data")])
    return root


def copies(recorded, folder):
    return [shutil.copytree(recorded / name, folder / name) for name in ("crops", "data")]


def spreadsheet(
    path, encoding="utf-8-sig", delimiter=",", end="\r\n", errors="strict", quoting=csv.QUOTE_MINIMAL
):
    """Open a record and save it, as spreadsheets do that take for a number or a date what looks like one."""
    with open(path, encoding="utf-8", newline="") as file:
        rows = list(csv.reader(file))
    for row in rows:
        for i, cell in enumerate(row):
            if re.fullmatch(r"\d+([eE]\d+)?", cell):
                row[i] = f"{float(cell):.2E}" if len(cell) > 15 or "e" in cell else str(int(cell))
            elif re.fullmatch(r"\d{1,2}[-/]\d{1,2}", cell):
                row[i] = "01. Feb"
    text = io.StringIO(newline="")
    csv.writer(text, delimiter=delimiter, lineterminator=end, quoting=quoting).writerows(
        [*rows, [""] * len(rows[0])]
    )
    path.write_bytes(text.getvalue().encode(encoding, errors))


SPREADSHEETS = {
    "Excel": {},
    "Excel in Germany": {"delimiter": ";"},
    "Excel, Unicode text": {"encoding": "utf-16", "delimiter": "\t"},
    "Excel on a Mac": {"end": "\r"},
    "Notepad": {"end": "\n"},
    "LibreOffice": {"encoding": "utf-8", "end": "\n", "quoting": csv.QUOTE_ALL},
}


@pytest.mark.parametrize("how", SPREADSHEETS.values(), ids=SPREADSHEETS)
def test_records_that_spreadsheets_saved_are_read_as_they_were(recorded, tmp_path, capsys, how):
    import split_train_val

    crops, data = copies(recorded, tmp_path)
    before = files_in(crops, data)
    for path in (crops / "manifest.csv", data / "split.csv"):
        spreadsheet(path, **how)
    split_train_val.main([str(crops), str(data)])
    preprocess_lips.main([str(recorded / "photos"), str(crops)])
    said = capsys.readouterr().out
    assert "left alone" not in said and "0 photos looked at" in said and files_in(crops, data) == before


@pytest.mark.parametrize(
    "how", [{"encoding": "gbk"}, {"encoding": "cp1252", "errors": "replace"}], ids=["China", "Europe"]
)
def test_records_that_a_spreadsheet_saved_in_other_letters_are_refused_and_nothing_is_lost(
    recorded, tmp_path, how
):
    import split_train_val

    crops, data = copies(recorded, tmp_path)
    for path, run in (
        (data / "split.csv", lambda: split_train_val.main([str(crops), str(data)])),
        (crops / "manifest.csv", lambda: preprocess_lips.main([str(recorded / "photos"), str(crops)])),
    ):
        spreadsheet(path, **how)
        before = files_in(crops, data)
        with pytest.raises(SystemExit, match=rf"^error: [^\n]*{path.name}: [^\n]*; restore it, or remove it"):
            run()
        assert files_in(crops, data) == before


def test_a_record_that_lost_a_class_does_not_disown_its_files(recorded, tmp_path):
    """What looks like a date in one country is a name in another: no writer can foresee it."""
    import split_train_val

    crops, data = copies(recorded, tmp_path)
    text = (data / "split.csv").read_text("utf-8")
    (data / "split.csv").write_text(text.replace(",\u5634 \u00e9,", ",1. Mai,"), "utf-8")
    before = files_in(crops, data)
    with pytest.raises(
        SystemExit, match=r"split.csv: names the class 1. Mai, which is not there, and not [^\n]*\u5634"
    ):
        split_train_val.main([str(crops), str(data)])
    assert files_in(crops, data) == before


# --- mutants


def fuzz(n, seed, files, report):
    """Feed n mutants to a worker's cropper; any error but those of unreadable photos ends this process."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # as workers do
    cropper = preprocess_lips.LipCropper()
    preprocess_lips.limit_memory()
    counts = dict.fromkeys(("face", "no face", "unreadable", "memory"), 0)
    start, slowest = time.perf_counter(), 0
    for i, (name, data) in enumerate(hostile.mutants(files, n, seed)):
        faulthandler.dump_traceback_later(60, exit=True)
        began = time.perf_counter()
        try:
            faces, *_ = cropper.find(data, largest=True)
            counts["face" if faces else "no face"] += 1
        except OSError:
            counts["unreadable"] += 1
        except MemoryError:
            counts["memory"] += 1
        except BaseException:
            Path(report).with_suffix(".mutant").write_bytes(data)
            print(f"mutant {i} of {name}", file=sys.stderr)
            raise
        slowest = max(slowest, time.perf_counter() - began)
    faulthandler.cancel_dump_traceback_later()
    # not getrusage: that of a process which a larger one started begins with the larger one's
    peak = (
        next(int(line.split()[1]) // 1024 for line in open("/proc/self/status") if line.startswith("VmHWM"))
        if sys.platform == "linux"
        else 0
    )
    Path(report).write_text(
        json.dumps(
            counts
            | {"seconds": round(time.perf_counter() - start), "slowest": round(slowest, 2), "peak MiB": peak}
        )
    )


@posix
@pytest.mark.parametrize("n", [200, pytest.param(20_000, marks=pytest.mark.slow)])
def test_mutated_photos_crash_nothing(tmp_path, face, n):
    process = multiprocessing.get_context("spawn").Process(
        target=fuzz, args=(n, n, hostile.seeds(face), str(tmp_path / "report.json"))
    )
    process.start()
    process.join()
    assert process.exitcode == 0
    report = json.loads((tmp_path / "report.json").read_text())
    print(report)
    assert sum(report[key] for key in ("face", "no face", "unreadable", "memory")) == n
    assert report["unreadable"] and report["face"]  # the mutants are neither all dead nor all sound
    assert report["peak MiB"] < 1000


@pytest.fixture(scope="module")
def small(face):
    return [b"", *hostile.seeds(face.resize((4, 4))).values()]


@pytest.mark.filterwarnings("ignore::UserWarning")  # Pillow's, about what is odd
@settings(max_examples=200, deadline=None)
@given(st.integers(0, 60), st.integers(0, 100), st.binary(max_size=200))
def test_any_bytes_are_a_photo_or_an_oserror(small, which, length, more):
    try:
        assert read_photo(small[which % len(small)][:length] + more).shape[2] == 3
    except OSError:
        pass


# --- models; more in test_net.py and test_train.py


@pytest.mark.parametrize("name", ["model.pt", "model.json"])
def test_of_large_files_that_claim_to_be_models_little_is_read(tmp_path, name):
    from net import load_model, save_model, simpleconv3

    save_model(simpleconv3(4), tmp_path / "model.pt")
    os.truncate(tmp_path / name, 200_000_000)
    tracemalloc.start()
    try:
        with pytest.raises(ValueError, match=f"{name}: .*larger than"):
            load_model(tmp_path / "model.pt")
        assert tracemalloc.get_traced_memory()[1] < 50e6
    finally:
        tracemalloc.stop()


def test_archives_whose_entries_share_their_bytes_are_refused(tmp_path):
    """Nothing is compressed there, and yet it holds a hundred times what it takes."""
    from net import load_model, save_model, simpleconv3

    save_model(simpleconv3(4), tmp_path / "model.pt")
    with zipfile.ZipFile(tmp_path / "model.pt", "a") as archive:
        largest = max(archive.infolist(), key=lambda entry: entry.file_size)
        for i in range(100):
            twin = copy.copy(largest)
            twin.filename = twin.orig_filename = f"{largest.filename}{i}"
            archive.filelist.append(twin)
        archive._didModify = True
    with pytest.raises(ValueError, match="a compressed archive"):
        load_model(tmp_path / "model.pt")


def test_endless_names_in_a_model_do_not_fill_the_screen(tmp_path):
    import torch

    from net import load_model, simpleconv3

    torch.save(simpleconv3(4).state_dict() | {"x" * 1_000_000: torch.zeros(1)}, tmp_path / "model.pt")
    with pytest.raises(ValueError, match="not a state dict of simpleconv3") as error:
        load_model(tmp_path / "model.pt")
    assert len(str(error.value)) < 1000


class Code:
    """Pickles as a call that makes a folder."""

    def __init__(self, folder):
        self.folder = folder

    def __reduce__(self):
        return os.mkdir, (str(self.folder),)


def test_a_checkpoint_from_a_stranger_runs_nothing_and_writes_where_the_user_says(
    mouths, tmp_path, monkeypatch
):
    import torch

    import train

    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").symlink_to(mouths / "data")
    args, elsewhere = ["--device", "cpu", "--batch-size", "16"], tmp_path / "elsewhere"
    train.main([*args, "--epochs", "1"])
    checkpoint = tmp_path / "models" / "checkpoint.pt"
    state = torch.load(checkpoint, weights_only=True)
    for content in (
        *(state | {"settings": state["settings"] | {name: str(elsewhere)}} for name in ("logs", "models")),
        state | {"classes": ["a\x1b[2J", "b"]},
        state | {"more": Code(elsewhere)},
        {key: state[key] for key in state if key != "settings"},
        [1],
        b"",
        checkpoint.read_bytes()[:-1000],
    ):
        checkpoint.write_bytes(content) if isinstance(content, bytes) else torch.save(content, checkpoint)
        with pytest.raises(
            SystemExit, match=r"^error: .*checkpoint.pt: damaged \([^\n]+\); start again without --resume$"
        ):
            train.main([*args, "--resume"])
    assert not elsewhere.exists()


@posix
def test_class_folders_that_a_model_could_not_name_end_training_before_it_begins(mouths, tmp_path):
    import train

    for part in ("train", "val"):
        for label, name in (("bright", "bright"), ("dark", "dark\x1b[2J")):
            (tmp_path / part).mkdir(exist_ok=True)
            (tmp_path / part / name).symlink_to(mouths / "data" / part / label)
    with pytest.raises(SystemExit, match=r"^error: class 1 is 'dark\\x1b\[2J'"):
        train.main(train_flags(tmp_path, tmp_path, "--epochs", 1))
    assert not (tmp_path / "logs").exists()


@posix
def test_names_of_classes_and_images_steer_no_terminal_in_training(mouths, tmp_path, capsys):
    import train

    data = tmp_path / "data"
    for part in ("train", "val"):
        for label, name in (("bright", "bright"), ("dark", "\u7b11\u202e")):
            shutil.copytree(mouths / "data" / part / label, data / part / name)
    args = train_flags(data, tmp_path, "--epochs", 1)
    train.main(args)
    out = capsys.readouterr().out
    assert "\u7b11\\u202e" in out and all(line.isprintable() for line in out.splitlines())
    with contextlib.redirect_stdout(io.TextIOWrapper(io.BytesIO(), "ascii")) as poor:
        train.main(args)
        poor.flush()
    assert rb"(bright, \u7b11\u202e)" in poor.buffer.getvalue()
    (data / "train" / "bright" / "\x1b[2J.png").touch()
    with pytest.raises(SystemExit) as error:
        train.main(args)
    assert r"\x1b[2J.png: unreadable: " in error.value.code and error.value.code.isprintable()




# --- kills


KILLER = """
import os, signal, sys
left, folder = int(os.environ["KILL_AFTER"]), os.environ["KILL_IN"]
def hook(event, args):
    global left
    if event in ("open", "os.rename", "os.remove", "os.link", "os.mkdir", "os.rmdir", "shutil.copyfile",
                 "shutil.copystat"):
        names = [os.fsdecode(a) for a in args[:2] if isinstance(a, (str, bytes, os.PathLike))]
        if any(name.startswith(folder) for name in names):
            left -= 1
            if left < 0:
                os.killpg(0, signal.SIGKILL)
sys.addaudithook(hook)
"""


@pytest.fixture
def killed(tmp_path):
    """Runs a command and kills it with all its processes, at the n-th touch of a file or after a time.

    Returns whether it was killed before it was done.
    """
    (tmp_path / "killer").mkdir()
    (tmp_path / "killer" / "sitecustomize.py").write_text(KILLER)

    def run(args, touches=None, seconds=None):
        env = os.environ | {"OMP_NUM_THREADS": "1"}
        if touches is not None:
            env |= {
                "PYTHONPATH": str(tmp_path / "killer"),
                "KILL_AFTER": str(touches),
                "KILL_IN": str(tmp_path / "work"),
            }
        process = subprocess.Popen(
            args,
            cwd=tmp_path,
            env=env,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        try:
            process.wait(seconds)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        assert process.returncode in (0, -signal.SIGKILL)
        return process.returncode != 0

    return run


def is_whole(path):
    with Image.open(path) as image:
        image.load()
    return True


kills = pytest.mark.parametrize("n", [3, pytest.param(34, marks=pytest.mark.slow)])


@posix
@kills
@no_workers  # in the runs that are not killed
def test_preprocessing_killed_anywhere_loses_nothing_and_ends_with_the_same_bytes(
    photos, tmp_path, killed, n
):
    for path in sorted(photos.glob("*/*"))[::2]:
        path.unlink()
    shutil.copy(photos / "0none" / sorted(os.listdir(photos / "0none"))[0], photos / "2smile")
    crops = tmp_path / "work" / "crops"
    preprocess_lips.main([str(photos), str(tmp_path / "reference")])
    reference = below(tmp_path / "reference")
    rng, hits = random.Random(n), 0
    for i in itertools.count():
        run = command("preprocess_lips.py", photos, crops, "--workers", "1")
        hits += (
            killed(run, touches=rng.randrange(70)) if i % 2 == 0 else killed(run, seconds=rng.uniform(0.5, 3))
        )
        for path in crops.glob("*/*.jpg"):
            twin = (
                Path("0none") / path.name.replace("2smile", "0none"),
                Path("2smile") / path.name.replace("0none", "2smile"),
            )
            assert is_whole(path)
            assert path.read_bytes() == reference.get(path.relative_to(crops)) or not set(twin) & set(
                reference
            )  # a conflict, not settled yet
        if (crops / "manifest.csv").exists():
            assert (crops / "manifest.csv").read_bytes() == reference[Path("manifest.csv")]
        if i % 4 == 3 or hits == n:
            preprocess_lips.main([str(photos), str(crops)])
            assert below(crops) == reference
            shutil.rmtree(crops)
        if hits == n:
            break
    print(f"{n} kills in {i + 1} runs; the others had ended")


@posix
@kills
def test_a_split_killed_anywhere_is_finished_by_the_next(tmp_path, killed, n):
    crops, data = tmp_path / "work" / "crops", tmp_path / "work" / "data"
    for label, count in (("a", 30), ("b", 12)):
        (crops / label).mkdir(parents=True)
        for i in range(count):
            (crops / label / f"{label}{i}.jpg").write_bytes(os.urandom(20_000))
    whole = {path.read_bytes() for path in crops.glob("*/*")}
    rng, hits, placed = random.Random(n), 0, set()
    import split_train_val

    for seed in range(2):
        split_train_val.main([str(crops), str(tmp_path / f"reference{seed}"), "--seed", str(seed)])
    reference = [below(tmp_path / f"reference{seed}") for seed in range(2)]
    for i in itertools.count():
        seed = i % 2  # from one draw to the other: crops change sides
        run = command("split_train_val.py", crops, data, "--seed", seed)
        hits += (
            killed(run, touches=rng.randrange(120)) if i % 3 else killed(run, seconds=rng.uniform(0.3, 0.9))
        )
        parts = {part: {path.name for path in (data / part).glob("*/*.jpg")} for part in ("train", "val")}
        assert (
            not parts["train"] & parts["val"] and placed <= parts["train"] | parts["val"]
        )  # at no moment is a crop on both sides, or again on none
        assert {path.read_bytes() for part in parts for path in (data / part).glob("*/*.jpg")} <= whole
        if i % 2 or hits == n:
            split_train_val.main([str(crops), str(data), "--seed", str(seed)])
            assert below(data) == reference[seed]
            placed = {path.name for path in crops.glob("*/*")}
        if hits == n:
            break
    print(f"{n} kills in {i + 1} runs; the others had ended")


TRAIN = f"""
import sys
sys.path.insert(0, {str(ROOT)!r})
import train
train.SAVE_SECONDS = train.FEW_STEPS = 0
train.main(sys.argv[1:])
"""


@pytest.fixture
def one_thread():
    """Sums of floating-point numbers depend on the number of threads: one, as in runs that are killed."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@posix
@pytest.mark.parametrize("n", [1, pytest.param(32, marks=pytest.mark.slow)])
def test_training_killed_anywhere_resumes_to_the_same_weights(mouths, tmp_path, killed, one_thread, n):
    import torch

    import train
    from net import load_model

    def args(models, *more):
        return train_flags(mouths / "data", tmp_path, "--epochs", 6, "--lr", 0.03, "--models", models, *more)

    def weights(models):
        last = torch.load(models / "checkpoint.pt", weights_only=True)["model"]
        return torch.load(models / "model.pt", weights_only=True) | last

    train.main(args(tmp_path / "reference"))
    reference = weights(tmp_path / "reference")
    about = json.loads((tmp_path / "reference" / "model.json").read_text())
    models, hits = tmp_path / "work" / "models", 0
    rng = random.Random(n)
    for i in itertools.count():
        resume = ["--resume"] if (models / "checkpoint.pt").exists() else []
        run = [sys.executable, "-c", TRAIN, *args(models, *resume)]
        # saving an epoch touches some ten files; the last ones are the end's
        when = {"touches": rng.randrange(1, 60)} if i % 3 != 2 else {"seconds": rng.uniform(3, 9)}
        hits += killed(run, **when)
        if (models / "checkpoint.pt").exists():
            assert 1 <= len(torch.load(models / "checkpoint.pt", weights_only=True)["history"]) <= 6
        if (models / "model.pt").exists():
            load_model(models / "model.pt")
        if i % 4 == 3 or hits == n:
            train.main(args(models, *["--resume"] if (models / "checkpoint.pt").exists() else []))
            result = weights(models)
            assert all(torch.equal(result[key], reference[key]) for key in reference)
            got = json.loads((models / "model.json").read_text())
            assert got["best"] == about["best"] and got["last"] == about["last"]
            files_in(models)
            shutil.rmtree(models)
        if hits == n:
            break
    print(f"{n} kills in {i + 1} runs; the others had ended")


def test_a_kill_between_checkpoint_and_model_leaves_no_old_model_behind(mouths, tmp_path, monkeypatch):
    import train

    def stop(*args, **more):
        raise KeyboardInterrupt

    args = train_flags(mouths / "data", tmp_path, "--epochs", 2)
    monkeypatch.setattr(train, "SAVE_SECONDS", float("inf"))
    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr(train, "save_model", stop)
        train.main(args)
    assert [path.name for path in files_in(tmp_path / "models")] == ["checkpoint.pt"]
    train.main([*args, "--resume"])
    assert (
        json.loads((tmp_path / "models" / "model.json").read_text())["last"]["epoch"] == 2
        and (tmp_path / "models" / "model.pt").exists()
    )


@linux
def test_workers_end_with_a_killed_parent(photos, tmp_path):
    process = subprocess.Popen(
        command("preprocess_lips.py", photos, tmp_path / "crops", "--workers", "2"), stderr=subprocess.DEVNULL
    )
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    while (
        len(workers := [int(pid) for pid in children.read_text().split()]) < 3
    ):  # two workers and Python's resource tracker
        time.sleep(0.05)
        assert process.poll() is None
    process.kill()
    process.wait()
    for _ in range(100):
        left = [
            pid
            for pid in workers
            if Path(f"/proc/{pid}/stat").exists()
            and Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
        ]
        if not left:
            return
        time.sleep(0.1)
    pytest.fail(f"workers {left} outlive their parent")


@no_workers
def test_leftovers_of_killed_runs_are_swept_and_files_of_others_are_not(photos, mouths, tmp_path):
    import split_train_val
    import train

    crops, data, models = tmp_path / "crops", tmp_path / "data", tmp_path / "models"
    left = [
        folder / ".0123456789abcdef.tmp"
        for folder in (crops, crops / "0none", data, data / "train" / "0none", data / "val" / "gone", models)
    ]
    mine = [
        crops / ".mine.tmp",
        crops / "0none" / "x.tmp",
        data / "train" / "0none" / ".0.tmp",
        models / ".mine.tmp",
    ]
    for path in left + mine:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("half")
    preprocess_lips.main([str(photos), str(crops), "--workers", "1"])
    split_train_val.main([str(crops), str(data)])
    train.main(train_flags(mouths / "data", tmp_path, "--models", models, "--epochs", 1))
    assert not any(path.exists() for path in left) and all(path.exists() for path in mine)


def test_a_failed_write_leaves_the_old_file_and_no_other(tmp_path, monkeypatch):
    path, flushed = tmp_path / "x", []
    write_file(path, b"old")

    def fsync(handle):
        about = os.fstat(handle)
        flushed.append((about.st_size if stat.S_ISREG(about.st_mode) else "folder", path.read_bytes()))

    monkeypatch.setattr(os, "fsync", fsync)
    write_file(path, b"newer")
    assert flushed[0] == (5, b"old")  # whole, before the rename
    assert flushed[1:] == ([("folder", b"newer")] if os.name == "posix" else [])

    def fail(handle):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match=r"x: cannot be written \(No space left on device\)"):
        write_file(path, b"never")
    assert path.read_bytes() == b"newer" and list(tmp_path.iterdir()) == [path]


WITNESS = """
import json, os, sys
log, journal = os.open(os.environ["WITNESS"], os.O_WRONLY | os.O_CREAT | os.O_APPEND), os.environ["JOURNAL"]
fsync, sync = os.fsync, os.sync
def note(*event):
    text = open(journal).read() if os.path.exists(journal) else ""
    os.write(log, (json.dumps([*event, text]) + "\\n").encode())
def flush(handle):
    fsync(handle)
    note("flush", os.readlink(f"/proc/self/fd/{handle}"))
def flush_all():
    sync()
    note("flush", "all")
def rename(event, args):
    if event == "os.rename":
        note(str(args[0]), str(args[1]))
os.fsync, os.sync = flush, flush_all
sys.addaudithook(rename)
"""


@linux
def test_what_is_flushed_when_the_power_goes_is_what_names_and_records_speak_of(photos, tmp_path, shell):
    """Contents before names, names before the journal and the manifest, all of a split before its record."""
    crops, data = tmp_path / "crops", tmp_path / "data"
    (tmp_path / "witness").mkdir()
    (tmp_path / "witness" / "sitecustomize.py").write_text(WITNESS)

    def seen(script, *args):
        """What was renamed and flushed, in order: (old name or "flush", new name or what, the journal)."""
        shell(
            script,
            *args,
            env={
                "PYTHONPATH": str(tmp_path / "witness"),
                "WITNESS": str(tmp_path / script),
                "JOURNAL": str(crops / "manifest.csv.part0"),
            },
        )
        events = [json.loads(line) for line in (tmp_path / script).read_text().splitlines()]

        def renamed(path):
            """Where in the order a file got its name, its content flushed before, and its folder's flush."""
            at = max(i for i, (_, name, _) in enumerate(events) if name == str(path))
            assert ["flush", events[at][0]] in [event[:2] for event in events[:at]]
            return at, next(i for i in range(at, len(events)) if events[i][:2] == ["flush", str(path.parent)])

        return events, renamed

    events, renamed = seen("preprocess_lips.py", photos, crops, "--workers", 1)
    made = list(crops.glob("*/*.jpg"))
    manifest, after = renamed(crops / "manifest.csv")
    for crop in made:
        _, flushed = renamed(crop)
        assert crop.name not in events[flushed][2] and flushed < manifest and crop.name in events[after][2]
    assert len(made) == 24
    events, renamed = seen("split_train_val.py", crops, data)
    record, _ = renamed(data / "split.csv")
    placed = [i for i, (_, name, _) in enumerate(events) if name.endswith(".jpg")]
    assert len(placed) == 24 and any(events[i][:2] == ["flush", "all"] for i in range(max(placed), record))


# --- disks


@pytest.fixture
def disk(tmp_path):
    """Mounts a small disk: disk(kilobytes) returns its folder; remount(folder, "ro") changes it."""
    mounted = []

    def mount(kilobytes):
        folder = tmp_path / f"disk{len(mounted)}"
        folder.mkdir()
        if (
            sys.platform != "linux"
            or subprocess.run(
                ["mount", "-t", "tmpfs", "-o", f"size={kilobytes}k", "tmpfs", folder], capture_output=True
            ).returncode
        ):
            pytest.skip("may not mount a disk")
        mounted.append(folder)
        return folder

    yield mount
    for folder in mounted:
        subprocess.run(["umount", "-l", folder], check=True)


def remount(folder, how):
    subprocess.run(["mount", "-o", f"remount,{how}", folder], check=True)


def one_line(done, *words):
    assert done.stderr.startswith("error: ") or "\nerror: " in done.stderr, done.stderr
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert all(word in line for word in words), line
    assert "Traceback" not in done.stderr


def fill(folder, leave):
    """Fill a disk up to `leave` kilobytes."""
    with open(folder / "ballast", "ab") as file:
        file.write(bytes((shutil.disk_usage(folder).free // 1024 - leave) * 1024))


def test_a_full_disk_ends_preprocessing_and_split_with_one_line_and_loses_nothing(
    photos, disk, inside, tmp_path, orl
):
    folder = disk(2000)
    crops, data = folder / "crops", folder / "data"
    inside("preprocess_lips.py", photos, crops)
    inside("split_train_val.py", crops, data)
    before = files_in(crops, data)
    for i in range(1, 11):
        for person in (6, 8):
            Image.fromarray(orl[f"s{person:02d}_{i}"]).save(photos / "0none" / f"new{person}_{i}.png")
    fill(folder, 24)
    one_line(inside("preprocess_lips.py", photos, crops, check=1), "cannot be written", "No space left")
    after = files_in(crops, data)
    assert all(after[path] == content for path, content in before.items())
    for path in set(after) - set(before):
        assert "manifest.csv.part" in path.name or is_whole(path)
    (folder / "ballast").unlink()
    assert "photos looked at" in inside("preprocess_lips.py", photos, crops).stdout
    assert len([row for row in rows_of(crops).values() if row["status"] == "ok"]) == 44
    before = files_in(data)
    fill(folder, 24)
    done = inside("split_train_val.py", crops, data, "--seed", 5, check=1)
    one_line(done, "cannot be written", "No space left")
    there = {path.name: content for path, content in files_in(data).items() if path.suffix == ".jpg"}
    # some changed sides, none is gone, and none is cut short
    assert {path.name for path in before if path.suffix == ".jpg"} <= set(there)
    assert there.items() <= {path.name: path.read_bytes() for path in crops.glob("*/*.jpg")}.items()
    (folder / "ballast").unlink()
    inside("split_train_val.py", crops, data, "--seed", 5)
    assert len(list(data.glob("*/*/*.jpg"))) == 44


def test_a_read_only_disk_ends_preprocessing_and_split_with_one_line(photos, disk, inside):
    folder = disk(3000)
    shutil.copytree(photos, folder / "photos")
    crops, data = folder / "crops", folder / "data"
    inside("preprocess_lips.py", photos, crops)
    inside("split_train_val.py", crops, data)
    before = files_in(crops, data)
    remount(folder, "ro")
    for place in (crops, folder / "new"):
        done = inside("preprocess_lips.py", folder / "photos", place, check=1)
        one_line(done, "cannot be written", "Read-only")
    one_line(inside("split_train_val.py", crops, data, check=1), "cannot be written", "Read-only")
    assert files_in(crops, data) == before


@posix
def test_folders_that_may_not_be_written_are_one_line(permitted, photos, tmp_path):
    (tmp_path / "crops").mkdir()
    (tmp_path / "crops" / "0none").touch()
    one_line(permitted("preprocess_lips.py", photos, "crops", check=1), "0none_", ".jpg: cannot be written (")
    (tmp_path / "crops" / "0none").unlink()
    permitted("preprocess_lips.py", photos, "crops")
    permitted("split_train_val.py", "crops", "data")
    for folder in (tmp_path / "data").glob("*/*"):
        folder.chmod(0o555)
    one_line(
        permitted("split_train_val.py", "crops", "data", "--seed", 1, check=1),
        ".jpg: cannot be written (Permission denied); the same command goes on",
    )


def test_training_on_a_full_or_read_only_disk_keeps_the_old_model(mouths, disk, inside):
    import train

    folder = disk(30_000)
    args = train_flags(mouths / "data", folder)
    train.main([*args, "--epochs", "1"])
    before = files_in(folder / "models")
    fill(folder, 2000)
    with pytest.raises(
        SystemExit,
        match=r"^error: .*models/checkpoint.pt: cannot be written \(No space left on device\)[^\n]*$",
    ):
        train.main([*args, "--epochs", "2"])
    assert files_in(folder / "models") == before
    fill(folder, 0)
    done = inside("train.py", *args, "--epochs", 2, check=1)
    one_line(done, "logs: cannot be written (No space left on device)")  # TensorBoard's files
    assert files_in(folder / "models") == before
    remount(folder, "ro")
    with pytest.raises(
        SystemExit, match=r"^error: .*models/.lock: cannot be written \(Read-only file system\)[^\n]*$"
    ):
        train.main([*args, "--epochs", "2"])
    assert files_in(folder / "models") == before


def test_training_is_saved_although_the_disk_of_the_curves_is_full(mouths, disk, tmp_path, monkeypatch):
    import torch

    import train

    logs = disk(350) / "logs"  # room for the beginning
    monkeypatch.setattr(train, "SAVE_SECONDS", float("inf"))
    with pytest.raises(SystemExit, match=r"logs: cannot be written \(No space left on device\)"):
        train.main(train_flags(mouths / "data", tmp_path, "--logs", logs, "--epochs", 10))
    assert (
        len(torch.load(tmp_path / "models" / "checkpoint.pt", weights_only=True)["history"]) >= 1
        and (tmp_path / "models" / "model.pt").exists()
    )


# --- two at once


@pytest.mark.parametrize(
    "script, folder",
    [("preprocess_lips.py", "crops"), ("split_train_val.py", "data"), ("train.py", "models")],
)
def test_a_second_run_on_the_same_folder_ends_with_one_line(mouths, photos, tmp_path, inside, script, folder):
    (tmp_path / "crops" / "a").mkdir(parents=True)
    args = {
        "preprocess_lips.py": (photos, "crops"),
        "split_train_val.py": ("crops", "data"),
        "train.py": ("--data", mouths / "data", "--models", "models", "--device", "cpu", "--epochs", 1),
    }[script]
    with locked(tmp_path / folder / ".lock"):
        (tmp_path / folder / ".0123456789abcdef.tmp").touch()  # the first run is writing that
        before = set((tmp_path / folder).rglob("*"))
        one_line(inside(script, *args, check=1), folder, "another run is at work there")
        assert set((tmp_path / folder).rglob("*")) == before


@posix
def test_a_lock_ends_with_its_process(tmp_path):
    code = (
        f"import sys; sys.path.insert(0, {str(ROOT)!r}); from preprocess_lips import *\n"
        "with locked(Path('x/.lock')): print('held', flush=True); sys.stdin.read()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code], cwd=tmp_path, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as holder:
        assert holder.stdout.readline() == b"held\n"
        with pytest.raises(BlockingIOError, match="another run is at work there; wait for its end"):
            with locked(tmp_path / "x" / ".lock"):
                pass
        holder.kill()
        holder.wait()
        with locked(tmp_path / "x" / ".lock"):
            pass


@no_workers
def test_two_runs_started_together_end_as_one_would(photos, tmp_path):
    args = command("preprocess_lips.py", photos, tmp_path / "crops", "--workers", "1")
    runs = [
        subprocess.Popen(args, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for _ in range(2)
    ]
    errors = [run.communicate(timeout=100)[1] for run in runs]
    codes = [run.returncode for run in runs]
    assert 0 in codes and all(
        code == 0 or "another run is at work there" in error for code, error in zip(codes, errors)
    )
    preprocess_lips.main([str(photos), str(tmp_path / "alone"), "--workers", "1"])
    assert below(tmp_path / "crops") == below(tmp_path / "alone")


# --- Windows, as far as it can be seen from here


def test_nothing_that_windows_lacks_is_imported_or_called_at_import():
    code = (
        "import sys\nfor name in ('fcntl', 'resource', 'pwd', 'grp', 'termios'): sys.modules[name] = None\n"
        "import os\n"
        "for name in ('fork', 'sync', 'mkfifo', 'sched_getaffinity', 'getuid'):\n"
        "    if hasattr(os, name): delattr(os, name)\n"
        "import net, preprocess_lips, split_train_val, train, predict; print(preprocess_lips.cores() >= 1)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout == "True\n", done.stderr
