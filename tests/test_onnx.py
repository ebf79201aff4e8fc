import json
import re
import shutil
import subprocess
import sys

import cv2
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT
from PIL import Image

from net import CROP_SIZE, load_model, main, normalize, predict, save_model, simpleconv3, square


@pytest.fixture(scope="module")
def crops(mouths):
    """Real mouths with their classes: list of (path, 0 for bright or 1 for dark)."""
    return [(path, int(path.parent.name == "dark")) for path in sorted((mouths / "data").rglob("*.png"))]


@pytest.fixture(scope="module")
def exported(crops, tmp_path_factory):
    """Folder with a briefly trained models/model.pt and, made from it on the command line, model.onnx."""
    pytest.importorskip("onnx")
    folder = tmp_path_factory.mktemp("exported")
    torch.manual_seed(0)
    model = simpleconv3(2)
    images = torch.stack([square(Image.open(path)) for path, _ in crops])
    labels = torch.tensor([label for _, label in crops])
    optimizer = torch.optim.SGD(model.parameters(), 0.05, 0.9)
    for _ in range(15):
        optimizer.zero_grad()
        F.cross_entropy(model(normalize(images)), labels).backward()
        optimizer.step()
    model.classes = ("bright", "张嘴")
    save_model(model, folder / "models" / "model.pt", temperature=5.0, scores=[-0.5, 1e-5, True])
    main([str(folder / "models" / "model.pt"), "--export", str(folder / "model.onnx")])
    assert sorted(path.name for path in folder.iterdir()) == ["model.onnx", "models"]
    return folder


def inputs(crops):
    """Grey levels, float32 N x 3 x 48 x 48."""
    return torch.stack([square(Image.open(path)) for path, _ in crops]).float().numpy()


def expected(folder, crops):
    """What net.predict says, float32 N x 2: some of either class, none certain."""
    out = predict(load_model(folder / "models" / "model.pt"), [Image.open(path) for path, _ in crops]).numpy()
    assert 0 < out.argmax(1).mean() < 1 and out.max() < 0.9999
    return out


def test_onnxruntime_gives_what_predict_gives(exported, crops):
    session = pytest.importorskip("onnxruntime").InferenceSession(str(exported / "model.onnx"))
    for n in (40, 1):
        (out,) = session.run(None, {"levels": inputs(crops)[:n]})
        np.testing.assert_allclose(out, expected(exported, crops)[:n], atol=1e-5, rtol=0)


def test_opencv_gives_what_predict_gives(exported, crops):
    net = cv2.dnn.readNetFromONNX(str(exported / "model.onnx"))
    for n in (40, 1, 3):
        net.setInput(inputs(crops)[:n])
        np.testing.assert_allclose(net.forward(), expected(exported, crops)[:n], atol=1e-5, rtol=0)


def test_exported_models_are_valid_and_describe_themselves(exported):
    onnx = pytest.importorskip("onnx")
    model = onnx.load(str(exported / "model.onnx"))
    onnx.checker.check_model(model, full_check=True)
    about = {one.key: one.value for one in model.metadata_props}
    assert (
        json.loads(about["classes"]) == ["bright", "张嘴"]
        and about["input_size"] == str(CROP_SIZE)
        and about["channels"] == "RGB"
    )
    assert about["input"] == "grey levels, 0 to 255" and "mean 0.5 and std 0.5" in about["normalisation"]
    assert model.opset_import[0].version == int(about["opset"]) == 13


def test_without_the_package_the_error_says_what_to_install(inside, monkeypatch, tmp_path):
    save_model(simpleconv3(4), tmp_path / "model.pt")
    monkeypatch.setitem(sys.modules, "onnx", None)  # as if it were not there
    assert (
        "'pip install onnx' brings it"
        in inside("net.py", "model.pt", "--export", "model.onnx", check=1).stderr
    )
    assert not (tmp_path / "model.onnx").exists()


def example(name):
    """The example in models/README.md that starts with a comment that names it."""
    text = (ROOT / "models" / "README.md").read_text("utf-8")
    return re.search(rf"```\w+\n((?:#|//) {name}: .*?)```", text, re.S)[1]


def check_labels(command, folder, crops):
    """Runs an example on four crops, two of each class, and compares what it prints with net.predict."""
    some = crops[:2] + crops[-2:]
    for (path, _), row in zip(some, expected(folder, some)):
        out = subprocess.run(
            [*command, path], cwd=folder, capture_output=True, check=True, encoding="utf-8"
        ).stdout
        label, probability = out.split()
        assert (
            label == ("bright", "张嘴")[row.argmax()]
            and abs(float(probability.rstrip("%")) - 100 * row.max()) < 3
        )


def test_the_python_example_prints_the_label(exported, crops):
    pytest.importorskip("onnxruntime")
    (exported / "label.py").write_text(example("label.py"), "utf-8")
    check_labels([sys.executable, "label.py"], exported, crops)


@pytest.fixture(scope="module")
def label_cpp(tmp_path_factory):
    """The program that the comment in label.cpp makes of it."""
    if (
        not all(map(shutil.which, ("g++", "pkg-config")))
        or subprocess.run(["pkg-config", "--exists", "opencv4"]).returncode
    ):
        pytest.skip("needs g++ and OpenCV's headers")
    folder, code = tmp_path_factory.mktemp("cpp"), example("label.cpp")
    (folder / "label.cpp").write_text(code, "utf-8")
    subprocess.run(re.match("// label.cpp: (.*)", code)[1], shell=True, cwd=folder, check=True)
    return folder / "label"


def test_the_cpp_example_prints_the_label(label_cpp, exported, crops):
    check_labels([label_cpp], exported, crops)
