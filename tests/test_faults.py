"""Nothing lost, nothing trusted: broken photos, kills, full disks, two runs at once. README.md here has the table."""

import csv
import faulthandler
import itertools
import json
import multiprocessing
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

import hostile
import preprocess_lips
from conftest import ROOT
from preprocess_lips import COLUMNS, MAX_MEMORY, MAX_PIXELS, TEMPORARY, crop_name, locked, plain, preprocess, read_csv, read_photo, write_csv, write_file

posix = pytest.mark.skipif(os.name != "posix", reason="needs POSIX")
linux = pytest.mark.skipif(sys.platform != "linux", reason="looks at /proc")


@pytest.fixture(scope="module")
def face(orl):
    return Image.fromarray(orl["s05_1"]).convert("RGB")


def rows_of(crops):
    return {row["source"]: row for row in read_csv(crops / "manifest.csv")}


def command(script, *args):
    return [sys.executable, str(ROOT / script), *map(str, args)]


def files_in(*folders):
    """Content of all files but lock files: dict of path to bytes. Fails on leftovers of killed runs."""
    found = {path: path.read_bytes() for folder in folders for path in folder.rglob("*") if path.is_file() and path.name != ".lock"}
    assert not [path for path in found if path.match(TEMPORARY)]
    return found


# --- photos


@posix
def test_hostile_photos_each_get_their_status_and_no_more_memory_than_allowed(tmp_path, face, shell):
    """Bombs, lies, cuts, pipes, devices, loops, ten gigabytes, odd names: all are told apart in one run."""
    expected = hostile.make(tmp_path / "photos" / "a", face)
    # measured from a small process: one that this large one starts would be counted as large
    measure = ("import resource, subprocess, sys; done = subprocess.run(sys.argv[1:]); "
               "print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss); sys.exit(done.returncode)")
    done = subprocess.run([sys.executable, "-c", measure, *command("preprocess_lips.py", "photos", "crops", "--workers", "2")],
                          cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    out = done.stdout.decode()
    peak = int(out.split()[-1])
    assert done.returncode == 0 and "Traceback" not in out and "Warning" not in out and "Decode" not in out, out
    got = {source.removeprefix("a/"): row["status"] for source, row in rows_of(tmp_path / "crops").items()}
    assert {name: status for name, status in got.items() if status not in expected[name]} == {}
    assert set(got) == set(expected)
    # the largest process; the worst honest photo here takes 50 MB, the worst bomb would take over a gigabyte
    assert peak * (1024 if sys.platform == "linux" else 1) < 700e6
    again = shell("preprocess_lips.py", "photos", "crops").stdout
    assert "0 new photos" in again


@posix
@pytest.mark.parametrize("what", ["pipe.jpg", "device.jpg", "ten gigabytes.jpg", "bomb that keeps its word.png"])
def test_readers_of_single_photos_refuse_them_too(tmp_path, face, cropper, what):
    hostile.make(tmp_path / "a", face)
    for read in (read_photo, cropper.find):
        with pytest.raises(OSError):
            read(tmp_path / "a" / what)


@posix
def test_photos_that_are_programs_are_not_run(tmp_path, shell):
    """Pillow would hand PostScript to Ghostscript where there is one."""
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "gs").write_text(f"#!/bin/sh\ntouch {tmp_path / 'run'}\n")
    (tmp_path / "bin" / "gs").chmod(0o755)
    (tmp_path / "photos" / "a").mkdir(parents=True)
    (tmp_path / "photos" / "a" / "face.jpg").write_bytes(hostile.GHOSTSCRIPT)
    shell("preprocess_lips.py", "photos", "crops", "--workers", 1, env={"PATH": f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}"}, check=1)
    assert rows_of(tmp_path / "crops")["a/face.jpg"]["status"] == "unreadable" and not (tmp_path / "run").exists()


@pytest.mark.slow
@linux
def test_the_largest_photos_stay_within_the_memory_of_a_worker(tmp_path):
    """Every kind of decoding at MAX_PIXELS, in a worker as preprocessing starts it."""
    side = int(MAX_PIXELS ** 0.5)
    red = Image.new("RGB", (side, side), "red")
    exif = Image.Exif()
    exif[0x0112] = 6
    photos = {
        "rgb.png": lambda: hostile.encode(red, "PNG", compress_level=1), "turned.png": lambda: hostile.encode(red, "PNG", compress_level=1, exif=exif),
        "rgba.png": lambda: hostile.encode(red, "PNG", "RGBA", compress_level=1), "progressive.jpg": lambda: hostile.encode(red, "JPEG", progressive=True),
        "16 bit.png": lambda: hostile.encode(Image.fromarray(np.full((side, side), 3000, np.uint16)), "PNG", "I;16", compress_level=1),
        "webp": lambda: hostile.encode(red, "WEBP", "RGBA", lossless=True, quality=0, method=0), "gif": lambda: hostile.encode(red, "GIF", "P"),
        "rgb.tif": lambda: hostile.encode(red, "TIFF"), "rgba.tif": lambda: hostile.encode(red, "TIFF", "RGBA")}
    (tmp_path / "photos" / "a").mkdir(parents=True)
    for name, make in photos.items():
        (tmp_path / "photos" / "a" / name).write_bytes(make())
    with subprocess.Popen(command("preprocess_lips.py", tmp_path / "photos", tmp_path / "crops", "--workers", "1"), stderr=subprocess.PIPE, text=True) as process:
        err = process.stderr.read()
        _, _, usage = os.wait4(process.pid, 0)
    status = {Path(source).name: row["status"] for source, row in rows_of(tmp_path / "crops").items()}
    assert "not one photo gave a mouth" in err and set(status.values()) <= {"no_face", "unreadable"}
    assert {name for name, s in status.items() if s == "unreadable"} <= {"webp", "rgba.tif"}  # decoders that hold several copies
    print(status, usage.ru_maxrss // 1024, "MiB")
    assert usage.ru_maxrss * 1024 < MAX_MEMORY + 500e6


def work_that_hangs(tasks):
    """As `_work`, but one photo sends the decoder into an endless loop that never lets Python in."""
    real = preprocess_lips.process_photo

    def process_photo(cropper, photos, crops, source, *more):
        if source == "0none/s02_2.png":
            re.match(r"(a+)+$", "a" * 60 + "b")
        return real(cropper, photos, crops, source, *more)

    preprocess_lips.process_photo = process_photo
    try:
        return REAL_WORK(tasks)
    finally:
        preprocess_lips.process_photo = real


REAL_WORK = preprocess_lips._work


def test_a_photo_that_takes_for_ever_costs_only_itself(photos, tmp_path, monkeypatch):
    monkeypatch.setattr(preprocess_lips, "_work", work_that_hangs)
    monkeypatch.setattr(preprocess_lips, "MAX_SECONDS", 2)
    rows, new = preprocess(photos, tmp_path / "crops", 2)
    assert {row["source"]: row["status"] for row in rows if row["status"] != "ok"} == {"0none/s02_2.png": "unreadable"} and new == 24
    monkeypatch.undo()
    assert preprocess(photos, tmp_path / "crops", 2)[1] == 0  # it is remembered: a rerun does not hang again


def start_and_die(seconds):
    os._exit(1)


def test_workers_that_cannot_start_are_an_error_not_unreadable_photos(photos, tmp_path, monkeypatch, shell):
    monkeypatch.setattr(preprocess_lips, "_start_worker", start_and_die)
    with pytest.raises(OSError, match="die before they begin"):
        preprocess(photos, tmp_path / "crops", 1)
    models = tmp_path / "face_recognition_models" / "models"
    models.mkdir(parents=True)
    (models.parent / "__init__.py").touch()
    (models / "shape_predictor_68_face_landmarks.dat").write_bytes(b"half a download")
    done = shell("preprocess_lips.py", photos, tmp_path / "crops", env={"PYTHONPATH": str(tmp_path)}, check=1)
    assert "not a file of landmarks" in done.stderr and len(done.stderr.strip().splitlines()) == 1
    assert not (tmp_path / "crops" / "manifest.csv").exists()


@posix
def test_processes_of_a_job_do_not_wait_for_photos_that_cannot_be_read(tmp_path, face):
    folder = tmp_path / "photos" / "a"
    folder.mkdir(parents=True)
    face.save(folder / "a.png")
    for name in "bcd":
        (folder / name).symlink_to("gone")
    ranks = [subprocess.Popen(command("preprocess_lips.py", "photos", "crops", "--workers", "1"), cwd=tmp_path,
                              env=os.environ | {"RANK": str(rank), "WORLD_SIZE": "2"}) for rank in (0, 1)]
    try:
        assert [process.wait(60) for process in ranks] == [0, 0]
    finally:
        for process in ranks:
            process.kill()
    assert [row["status"] for row in rows_of(tmp_path / "crops").values()] == ["ok"] + 3 * ["unreadable"]


@pytest.fixture
def nobody(tmp_path_factory):
    """A folder, and a function that runs a script there as a user whom permissions bind."""
    folder = tmp_path_factory.mktemp("nobody")
    user = {}
    if os.name == "posix" and os.getuid() == 0:
        user = {"user": 65534, "group": 65534, "extra_groups": []}
        os.chown(folder, 65534, 65534)
        for place in folder.parents[:2]:
            place.chmod(0o711)

    def run(script, *args, env=None):
        try:
            done = subprocess.run(command(script, *args), cwd=folder, env=os.environ | {"HOME": "/nonexistent"} | (env or {}), capture_output=True, text=True, **user)
        except PermissionError:
            pytest.skip("another user may not run this Python")
        if "Permission denied" in done.stderr and str(ROOT) in done.stderr:
            pytest.skip("another user may not read this folder")
        assert "Traceback" not in done.stderr, done.stderr
        return done

    yield folder, run
    for place in folder.rglob("*"):
        if not place.is_symlink():
            place.chmod(0o700)


@posix
def test_what_may_not_be_read_is_said_and_tried_again_once_it_may(nobody, face):
    folder, run = nobody
    (folder / "photos" / "a" / "closed folder").mkdir(parents=True)
    for name in ("open.png", "closed.png", "closed folder/inside.png"):
        face.save(folder / "photos" / "a" / name)
    closed = [folder / "photos" / "a" / name for name in ("closed.png", "closed folder")]
    for path in closed:
        path.chmod(0)
    (folder / "photos" / "a").chmod(0o555)  # and the photos' folder is read-only
    if os.getuid() == 0:
        for path in (folder / "photos").rglob("*"):
            os.chown(path, 65534, 65534)
    assert run("preprocess_lips.py", "photos", "crops").returncode == 0
    assert {source: row["status"] for source, row in rows_of(folder / "crops").items()} == {
        "a/closed folder": "unreadable", "a/closed.png": "unreadable", "a/open.png": "ok"}
    for path in closed:
        path.chmod(0o700)
    assert run("preprocess_lips.py", "photos", "crops").returncode == 0
    assert sorted(row["status"] for row in rows_of(folder / "crops").values()) == ["duplicate", "duplicate", "ok"]


@posix
@pytest.mark.parametrize("env", [{"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}, {"PYTHONIOENCODING": "ascii"}, {"PYTHONIOENCODING": "cp1252"}])
def test_names_of_all_alphabets_pass_through_poor_terminals_and_missing_homes(tmp_path, face, env):
    folder = tmp_path / "脸" / "嘴\x1b[31m唇\n\x07"
    folder.mkdir(parents=True)
    for i in range(2):
        face.rotate(i).save(folder / f"微笑 {i}.png")
    for script, args in (("preprocess_lips.py", ["脸", "裁剪"]), ("split_train_val.py", ["裁剪", "数据"]), ("split_train_val.py", ["没有"])):
        done = subprocess.run(command(script, *args), cwd=tmp_path, capture_output=True,
                              env={key: value for key, value in os.environ.items() if key not in ("HOME", "LANG", "LC_ALL")} | env)
        out = done.stdout + done.stderr
        assert done.returncode == (args == ["没有"]) and b"Traceback" not in out, out
        assert not set(out) & set(b"\x1b\x07"), out
    assert [row["class"] for row in read_csv(tmp_path / "数据" / "split.csv")] == 2 * [folder.name]


def test_long_class_names_leave_room_for_the_photos_name():
    name = crop_name("唇" * 83, "0123456789abcdef")
    assert len(name.encode()) <= 255 and name.endswith("唇_0123456789ab.jpg")


@given(st.text())
def test_what_is_printed_steers_no_terminal(text):
    shown = plain(text)
    assert shown.isprintable() and all(c in shown for c in text if c.isascii() and c.isprintable())


# --- CSV


cells = st.text(st.characters(exclude_categories=["Cs"]) | st.sampled_from("=+-@\t\r\n'\",;\udcff\udc80 0"), max_size=12)


@pytest.fixture(scope="module")
def csv_file(tmp_path_factory):
    return tmp_path_factory.mktemp("csv") / "x.csv"


@settings(max_examples=300, deadline=None)
@given(st.lists(st.tuples(cells, cells), max_size=4))
def test_csv_files_come_back_as_they_were_and_hold_no_formulas(csv_file, rows):
    path = csv_file
    rows = [{"source": a, "class": b} for a, b in rows]
    write_csv(path, ("source", "class"), rows)
    assert read_csv(path) == rows
    with open(path, encoding="utf-8", errors="surrogateescape", newline="") as file:
        for row in csv.reader(file):
            assert not any(re.match(r"[=+\-@\t\r]", cell) for cell in row if not re.fullmatch(r"-[-\d ]+", cell))


def test_boxes_with_negative_edges_stay_numbers(tmp_path):
    write_csv(tmp_path / "x.csv", ("mouth", "source"), [{"mouth": "-12 5 -3 40", "source": "-12.jpg"}])
    assert (tmp_path / "x.csv").read_text().splitlines() == ["mouth,source", "-12 5 -3 40,'-12.jpg"]


def test_records_from_others_remove_nothing_outside(photos, tmp_path):
    """A manifest.csv or split.csv that came with a download may say anything."""
    mine = [tmp_path / "mine.jpg", tmp_path / ".._mine.jpg", tmp_path / "data" / "mine.jpg"]
    for path in mine:
        path.write_text("mine")
    crops, data = tmp_path / "data" / "lips", tmp_path / "data"
    base = dict.fromkeys(COLUMNS, "") | {"status": "ok", "source": "gone.png", "sha1": "mine"}
    write_csv(crops / "manifest.csv", COLUMNS, [
        base | {"class": "..", "crop": "../mine.jpg"}, base | {"class": "..", "crop": "mine.jpg"}, base | {"class": "../..", "crop": ".._mine.jpg"},
        base | {"class": "../../..", "crop": "../../.._mine.jpg"}, base | {"class": str(tmp_path), "crop": "mine.jpg"}])
    preprocess_lips.main([str(photos), str(crops), "--workers", "1"])
    import split_train_val

    write_csv(data / "split.csv", split_train_val.COLUMNS, [
        dict(part=part, **{"class": label}, file=name, group="g", draw="d")
        for part, label, name in (("..", ".", "mine.jpg"), ("train", "../..", "mine.jpg"), ("train", "..", "../mine.jpg"), ("val", str(tmp_path), "mine.jpg"))])
    split_train_val.main([str(crops), str(data)])
    assert all(path.read_text() == "mine" for path in mine)


@pytest.mark.parametrize("content", [b"", b"\0\xff\xfe", b"source\n", b"status,class\nok\n", b'"', b"source,class,status\n" + b"a," * 9000, b'42\n[1]\n{"source": ["a"]}\n{}\n', "嘴,".encode("utf-16")])
def test_a_damaged_record_stops_nothing(photos, tmp_path, content):
    crops = tmp_path / "crops"
    crops.mkdir()
    (crops / "manifest.csv").write_bytes(content)
    (crops / "manifest.csv.part0").write_bytes(content)
    (tmp_path / "split.csv").write_bytes(content)
    shutil.rmtree(photos / "2smile")
    for path in sorted(photos.glob("*/*"))[2:]:
        path.unlink()
    preprocess_lips.main([str(photos), str(crops), "--workers", "1"])
    import split_train_val

    split_train_val.main([str(crops), str(tmp_path)])
    assert len(read_csv(tmp_path / "split.csv")) == len(rows_of(crops)) == 2


# --- mutants


def fuzz(n, seed, files, report):
    """Feed n mutants to a worker's cropper; any error but those of unreadable photos ends this process."""
    from preprocess_lips import _start_worker

    _start_worker(60)
    counts = dict.fromkeys(("face", "no face", "unreadable", "memory"), 0)
    start, slowest = time.perf_counter(), 0
    for i, (name, data) in enumerate(hostile.mutants(files, n, seed)):
        faulthandler.dump_traceback_later(60, exit=True)
        began = time.perf_counter()
        try:
            faces, _, _ = preprocess_lips._cropper.find(data, largest=True)
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
    peak = next(int(line.split()[1]) // 1024 for line in open("/proc/self/status") if line.startswith("VmHWM")) if sys.platform == "linux" else 0
    Path(report).write_text(json.dumps(counts | {"seconds": round(time.perf_counter() - start), "slowest": round(slowest, 2), "peak MiB": peak}))


@posix
@pytest.mark.parametrize("n", [300, pytest.param(20_000, marks=pytest.mark.slow)])
def test_mutated_photos_crash_nothing(tmp_path, face, n):
    process = multiprocessing.get_context("spawn").Process(target=fuzz, args=(n, n, hostile.seeds(face), str(tmp_path / "report.json")))
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


# --- kills


KILLER = """
import os, signal, sys
left, folder = int(os.environ["KILL_AFTER"]), os.environ["KILL_IN"]
def hook(event, args):
    global left
    if event in ("open", "os.rename", "os.remove", "os.link", "os.mkdir", "os.rmdir", "shutil.copyfile", "shutil.copystat"):
        if any(isinstance(a, (str, bytes, os.PathLike)) and os.fsdecode(a).startswith(folder) for a in args[:2]):
            left -= 1
            if left < 0:
                os.killpg(0, signal.SIGKILL)
sys.addaudithook(hook)
"""


@pytest.fixture
def killed(tmp_path):
    """Runs a command and kills it with all its processes, like a battery at its end: at the n-th touch of a file or after a time.

    Returns whether it was killed before it was done.
    """
    (tmp_path / "killer").mkdir()
    (tmp_path / "killer" / "sitecustomize.py").write_text(KILLER)

    def run(args, touches=None, seconds=None):
        env = os.environ | {"OMP_NUM_THREADS": "1"}
        if touches is not None:
            env |= {"PYTHONPATH": str(tmp_path / "killer"), "KILL_AFTER": str(touches), "KILL_IN": str(tmp_path / "work")}
        process = subprocess.Popen(args, cwd=tmp_path, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)
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
def test_preprocessing_killed_anywhere_loses_nothing_and_ends_with_the_same_bytes(photos, tmp_path, killed, n):
    for path in sorted(photos.glob("*/*"))[::2]:
        path.unlink()
    shutil.copy(photos / "0none" / sorted(os.listdir(photos / "0none"))[0], photos / "2smile")
    crops, args = tmp_path / "work" / "crops", ["--workers", "1"]
    preprocess_lips.main([str(photos), str(tmp_path / "reference"), *args])
    reference = {path.relative_to(tmp_path / "reference"): data for path, data in files_in(tmp_path / "reference").items()}
    rng, hits = random.Random(n), 0
    for i in itertools.count():
        run = command("preprocess_lips.py", photos, crops, *args)
        hits += killed(run, touches=rng.randrange(70)) if i % 2 == 0 else killed(run, seconds=rng.uniform(0.5, 3))
        for path in crops.glob("*/*.jpg"):
            twin = Path("0none") / path.name.replace("2smile", "0none"), Path("2smile") / path.name.replace("0none", "2smile")
            assert is_whole(path)
            assert path.read_bytes() == reference.get(path.relative_to(crops)) or not set(twin) & set(reference)  # a conflict, not settled yet
        if (crops / "manifest.csv").exists():
            assert (crops / "manifest.csv").read_bytes() == reference[Path("manifest.csv")]
        if i % 4 == 3 or hits == n:
            assert not killed(run)
            assert {path.relative_to(crops): data for path, data in files_in(crops).items()} == reference
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
    rng, hits = random.Random(n), 0
    import split_train_val

    for seed in range(2):
        split_train_val.main([str(crops), str(tmp_path / f"reference{seed}"), "--seed", str(seed)])
    reference = [{path.relative_to(tmp_path / f"reference{seed}"): content for path, content in files_in(tmp_path / f"reference{seed}").items()} for seed in range(2)]
    for i in itertools.count():
        seed = i % 2  # from one draw to the other: crops change sides
        run = command("split_train_val.py", crops, data, "--seed", seed)
        hits += killed(run, touches=rng.randrange(120)) if i % 3 else killed(run, seconds=rng.uniform(0.3, 0.9))
        parts = {part: {path.name for path in (data / part).glob("*/*.jpg")} for part in ("train", "val")}
        assert not parts["train"] & parts["val"]  # at no moment is a crop on both sides
        assert {path.read_bytes() for part in parts for path in (data / part).glob("*/*.jpg")} <= whole
        if i % 2 or hits == n:
            assert not killed(run)
            assert {path.relative_to(data): content for path, content in files_in(data).items()} == reference[seed]
        if hits == n:
            break
    print(f"{n} kills in {i + 1} runs; the others had ended")


TRAIN = "import sys, train; train.SAVE_SECONDS = 0; train.main(sys.argv[1:])"


@posix
@pytest.mark.parametrize("n", [1, pytest.param(32, marks=pytest.mark.slow)])
def test_training_killed_anywhere_resumes_to_the_same_weights(mouths, tmp_path, killed, n):
    import torch

    from net import load_model

    def run(models, *more):
        return [sys.executable, "-c", f"import sys; sys.path.insert(0, {str(ROOT)!r}); {TRAIN}", "--data", str(mouths / "data"), "--device", "cpu",
                "--batch-size", "16", "--epochs", "6", "--lr", "0.03", "--models", str(models), "--logs", str(tmp_path / "logs"), *more]

    def weights(models):
        return torch.load(models / "model.pt", weights_only=True) | torch.load(models / "checkpoint.pt", weights_only=True)["net"]

    assert not killed(run(tmp_path / "reference"))
    reference, about = weights(tmp_path / "reference"), json.loads((tmp_path / "reference" / "model.json").read_text())
    models, hits = tmp_path / "work" / "models", 0
    rng = random.Random(n)
    for i in itertools.count():
        resume = ["--resume"] if (models / "checkpoint.pt").exists() else []
        # saving an epoch touches some ten files; the last ones are the end's
        hits += killed(run(models, *resume), touches=rng.randrange(1, 60)) if i % 3 != 2 else killed(run(models, *resume), seconds=rng.uniform(3, 9))
        if (models / "checkpoint.pt").exists():
            assert 1 <= torch.load(models / "checkpoint.pt", weights_only=True)["epoch"] <= 6
        if (models / "model.pt").exists():
            load_model(models / "model.pt")
        if i % 4 == 3 or hits == n:
            assert not killed(run(models, *(["--resume"] if (models / "checkpoint.pt").exists() else [])))
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

    args = ["--data", str(mouths / "data"), "--device", "cpu", "--batch-size", "16", "--epochs", "2", "--logs", str(tmp_path / "logs"), "--models", str(tmp_path / "models")]
    monkeypatch.setattr(train, "SAVE_SECONDS", float("inf"))
    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr(train, "save_model", stop)
        train.main(args)
    assert [path.name for path in files_in(tmp_path / "models")] == ["checkpoint.pt"]
    train.main([*args, "--resume"])
    assert json.loads((tmp_path / "models" / "model.json").read_text())["last"]["epoch"] == 2 and (tmp_path / "models" / "model.pt").exists()


@linux
def test_workers_end_with_a_killed_parent(photos, tmp_path):
    process = subprocess.Popen(command("preprocess_lips.py", photos, tmp_path / "crops", "--workers", "2"), stderr=subprocess.DEVNULL)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    while len(workers := [int(pid) for pid in children.read_text().split()]) < 3:  # two workers and Python's resource tracker
        time.sleep(0.05)
        assert process.poll() is None
    process.kill()
    process.wait()
    for _ in range(100):
        left = [pid for pid in workers if Path(f"/proc/{pid}/stat").exists() and Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"]
        if not left:
            return
        time.sleep(0.1)
    pytest.fail(f"workers {left} outlive their parent")


def test_leftovers_of_killed_runs_are_swept_and_files_of_others_are_not(photos, tmp_path):
    import split_train_val

    crops, data = tmp_path / "crops", tmp_path / "data"
    left = [folder / ".0123456789abcdef.tmp" for folder in (crops, crops / "0none", data, data / "train" / "0none", data / "val" / "gone")]
    mine = [crops / ".mine.tmp", crops / "0none" / "x.tmp", data / "train" / "0none" / ".0.tmp"]
    for path in left + mine:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("half")
    preprocess_lips.main([str(photos), str(crops), "--workers", "1"])
    split_train_val.main([str(crops), str(data)])
    assert not any(path.exists() for path in left) and all(path.exists() for path in mine)


def test_a_failed_write_leaves_the_old_file_and_no_other(tmp_path, monkeypatch):
    write_file(tmp_path / "x", b"old")
    flushed = []
    monkeypatch.setattr(os, "fsync", lambda handle: flushed.append(os.fstat(handle).st_size))
    write_file(tmp_path / "x", b"newer")
    assert flushed == [5]  # whole, before the rename

    def fail(handle):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match=r"x: cannot be written \(No space left on device\)"):
        write_file(tmp_path / "x", b"never")
    assert (tmp_path / "x").read_bytes() == b"newer" and len(list(tmp_path.iterdir())) == 1


# --- disks


@pytest.fixture
def disk(tmp_path):
    """Mounts a small disk of its own: disk(kilobytes) returns its folder; remount(folder, "ro") changes it."""
    mounted = []

    def mount(kilobytes):
        folder = tmp_path / f"disk{len(mounted)}"
        folder.mkdir()
        if sys.platform != "linux" or subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={kilobytes}k", "tmpfs", folder], capture_output=True).returncode:
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


def test_a_full_disk_ends_preprocessing_and_split_with_one_line_and_loses_nothing(photos, disk, shell, tmp_path, orl):
    folder = disk(2000)
    crops, data = folder / "crops", folder / "data"
    shell("preprocess_lips.py", photos, crops, "--workers", 1)
    shell("split_train_val.py", crops, data)
    before = files_in(crops, data)
    for i in range(1, 11):
        for person in (6, 8):
            Image.fromarray(orl[f"s{person:02d}_{i}"]).save(photos / "0none" / f"new{person}_{i}.png")
    fill(folder, 24)
    one_line(shell("preprocess_lips.py", photos, crops, "--workers", 1, check=1), "cannot be written", "No space left")
    after = files_in(crops, data)
    assert all(after[path] == content for path, content in before.items())
    for path in set(after) - set(before):
        assert "manifest.csv.part" in path.name or is_whole(path)
    (folder / "ballast").unlink()
    assert "new photos" in shell("preprocess_lips.py", photos, crops, "--workers", 1).stdout
    assert len([row for row in rows_of(crops).values() if row["status"] == "ok"]) == 44
    before = files_in(data)
    fill(folder, 24)
    one_line(shell("split_train_val.py", crops, data, "--seed", 5, check=1), "cannot be written", "No space left")
    inside = {path.name: content for path, content in files_in(data).items() if path.suffix == ".jpg"}
    assert all(inside[path.name] == content for path, content in before.items() if path.suffix == ".jpg")  # some changed sides, none is gone
    (folder / "ballast").unlink()
    shell("split_train_val.py", crops, data, "--seed", 5)
    assert len(list(data.glob("*/*/*.jpg"))) == 44


def test_a_read_only_disk_ends_preprocessing_and_split_with_one_line(photos, disk, shell):
    folder = disk(3000)
    shutil.copytree(photos, folder / "photos")
    crops, data = folder / "crops", folder / "data"
    shell("preprocess_lips.py", photos, crops, "--workers", 1)
    shell("split_train_val.py", crops, data)
    before = files_in(crops, data)
    remount(folder, "ro")
    one_line(shell("preprocess_lips.py", folder / "photos", crops, check=1), "cannot be written", "Read-only")
    one_line(shell("preprocess_lips.py", folder / "photos", folder / "new", check=1), "cannot be written", "Read-only")
    one_line(shell("split_train_val.py", crops, data, check=1), "cannot be written", "Read-only")
    assert files_in(crops, data) == before


def test_training_on_a_full_or_read_only_disk_keeps_the_old_model(mouths, disk, shell):
    import train

    folder = disk(30_000)
    args = ["--data", str(mouths / "data"), "--device", "cpu", "--batch-size", "16", "--models", str(folder / "models"), "--logs", str(folder / "logs")]
    train.main([*args, "--epochs", "1"])
    before = files_in(folder / "models")
    fill(folder, 2000)
    with pytest.raises(SystemExit, match=r"^error: .*models/checkpoint.pt: cannot be written \(No space left on device\)[^\n]*$"):
        train.main([*args, "--epochs", "2"])
    assert files_in(folder / "models") == before
    fill(folder, 0)
    one_line(shell("train.py", *args, "--epochs", 2, check=1), "logs: cannot be written (No space left on device)")  # TensorBoard's files
    assert files_in(folder / "models") == before
    remount(folder, "ro")
    with pytest.raises(SystemExit, match=r"^error: .*models/.lock: cannot be written \(Read-only file system\)[^\n]*$"):
        train.main([*args, "--epochs", "2"])
    assert files_in(folder / "models") == before


# --- two at once


@pytest.mark.parametrize("script, folder", [("preprocess_lips.py", "crops"), ("split_train_val.py", "data"), ("train.py", "models")])
def test_a_second_run_on_the_same_folder_ends_with_one_line(mouths, photos, tmp_path, shell, script, folder):
    (tmp_path / "crops" / "a").mkdir(parents=True)
    args = {"preprocess_lips.py": (photos, "crops"), "split_train_val.py": ("crops", "data"),
            "train.py": ("--data", mouths / "data", "--models", "models", "--device", "cpu", "--epochs", 1)}[script]
    with locked(tmp_path / folder / ".lock"):
        before = set((tmp_path / folder).rglob("*"))
        one_line(shell(script, *args, check=1), folder, "another run is at work there")
        assert set((tmp_path / folder).rglob("*")) == before


@posix
def test_a_lock_ends_with_its_process(tmp_path):
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r}); from preprocess_lips import *\nwith locked(Path('x/.lock')): print('held', flush=True); sys.stdin.read()"
    with subprocess.Popen([sys.executable, "-c", code], cwd=tmp_path, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as holder:
        assert holder.stdout.readline() == b"held\n"
        with pytest.raises(BlockingIOError, match="another run is at work there; wait for its end"):
            with locked(tmp_path / "x" / ".lock"):
                pass
        holder.kill()
        holder.wait()
        with locked(tmp_path / "x" / ".lock"):
            pass


def test_two_runs_started_together_end_as_one_would(photos, tmp_path):
    args = command("preprocess_lips.py", photos, tmp_path / "crops", "--workers", "1")
    runs = [subprocess.Popen(args, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    errors = [run.communicate(timeout=100)[1] for run in runs]
    codes = [run.returncode for run in runs]
    assert 0 in codes and all(code == 0 or "another run is at work there" in error for code, error in zip(codes, errors))
    preprocess_lips.main([str(photos), str(tmp_path / "alone"), "--workers", "1"])
    two, one = ({path.relative_to(tmp_path / name): data for path, data in files_in(tmp_path / name).items()} for name in ("crops", "alone"))
    assert two == one


# --- Windows, as far as it can be seen from here


def test_nothing_that_windows_lacks_is_imported_or_called_at_import():
    code = ("import sys\nfor name in ('fcntl', 'resource', 'pwd', 'grp', 'termios'): sys.modules[name] = None\n"
            "import os; [delattr(os, name) for name in ('fork', 'sync', 'mkfifo', 'sched_getaffinity', 'getuid') if hasattr(os, name)]\n"
            "import net, preprocess_lips, split_train_val, train, predict; print(preprocess_lips.cores() >= 1)")
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout == "True\n", done.stderr
