import json
import os
import shutil
import zipfile

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torchvision import transforms

import net
from net import CLASSES, load_model, normalize, predict, save_model, simpleconv3, square

SHAPES = {
    "conv1.weight": (12, 3, 3, 3), "conv2.weight": (24, 12, 3, 3), "conv3.weight": (48, 24, 3, 3),
    "fc1.weight": (1200, 1200), "fc2.weight": (128, 1200), "fc3.weight": (4, 128),
}


def test_keys_and_shapes_are_the_textbooks():
    weights = simpleconv3(4).state_dict()
    layers = {key.split(".")[0] for key in weights}
    assert layers == {"conv1", "bn1", "conv2", "bn2", "conv3", "bn3", "fc1", "fc2", "fc3"}
    assert {key: tuple(weights[key].shape) for key in SHAPES} == SHAPES


def test_forward_gives_the_same_in_any_memory_format():
    model, x = simpleconv3(4).eval(), torch.rand(5, 3, 48, 48)
    torch.testing.assert_close(model(x.to(memory_format=torch.channels_last)), model(x), atol=1e-5, rtol=1e-5)
    assert model(x).shape == (5, 4)


@settings(max_examples=60, deadline=None)
@given(st.integers(20, 200), st.integers(20, 200), st.sampled_from([48, 64]), st.integers(0, 9))
def test_square_is_torchvisions_resize_and_center_crop(width, height, size, seed):
    noise = np.random.default_rng(seed).integers(0, 256, (height // 4 + 1, width // 4 + 1, 3), dtype=np.uint8)
    image = Image.fromarray(noise).resize((width, height), Image.Resampling.BICUBIC)
    expected = transforms.Compose(
        [transforms.Resize(size), transforms.CenterCrop(size), transforms.PILToTensor()]
    )(image)
    assert torch.equal(square(image, size), expected)
    assert torch.equal(square(np.asarray(image), size), expected)


def test_square_of_a_strip_takes_no_memory_for_what_it_drops():
    strip = Image.new("L", (50_000_000, 1), 90)
    strip.paste(30, (25_000_000, 0, 50_000_000, 1))
    out = square(strip)
    assert (
        (out[..., 0] > 88).all()
        and (out[..., -1] < 32).all()
        and (out[..., 23] > 60).all()
        and (out[..., 24] < 60).all()
    )
    assert torch.equal(square(strip.transpose(Image.Transpose.TRANSPOSE)), out.transpose(1, 2))


def test_grey_images_become_three_equal_channels():
    grey = np.random.default_rng(0).integers(0, 256, (60, 60), dtype=np.uint8)
    out = square(grey)
    assert torch.equal(out[0], out[1]) and torch.equal(out[0], out[2])


def test_normalize_is_totensor_and_normalize():
    levels = torch.arange(256, dtype=torch.uint8).view(1, 16, 16).expand(3, -1, -1)
    expected = transforms.Normalize([0.5] * 3, [0.5] * 3)(levels / 255)
    torch.testing.assert_close(normalize(levels), expected, atol=1e-6, rtol=0)


def test_saved_weights_load_in_anyones_code_and_ours(tmp_path):
    model = simpleconv3(4)
    save_model(model, tmp_path / "模型" / "model.pt", accuracy=0.5)
    plain = simpleconv3(4)
    plain.load_state_dict(torch.load(tmp_path / "模型" / "model.pt", weights_only=True))
    again = load_model(tmp_path / "模型" / "model.pt")
    for key, value in model.state_dict().items():
        assert torch.equal(value, plain.state_dict()[key]) and torch.equal(value, again.state_dict()[key])
    assert again.classes == CLASSES and again.about["accuracy"] == 0.5 and not again.training


def test_textbook_checkpoints_load_without_json(tmp_path):
    torch.save(simpleconv3(2).state_dict(), tmp_path / "old.pt")
    assert load_model(tmp_path / "old.pt").classes == ("0", "1")
    torch.save({f"module.{k}": v for k, v in simpleconv3(4).state_dict().items()}, tmp_path / "parallel.pth")
    assert load_model(tmp_path / "parallel.pth").classes == CLASSES


@pytest.mark.parametrize(
    "wrap",
    [
        lambda weights: {"state_dict": weights, "epoch": 3, "optimizer": {"state": {}, "param_groups": []}},
        lambda weights: {"model_state_dict": weights, "loss": 0.1},
        lambda weights: {
            "model": {f"module.{key}": value for key, value in weights.items()},
            "args": {"lr": 0.1},
        },
        lambda weights: {"state_dict": {f"model._orig_mod.{key}": value for key, value in weights.items()}},
        lambda weights: (
            {"n_averaged": torch.tensor(3)} | {f"module.{key}": value for key, value in weights.items()}
        ),
        lambda weights: {key: value.half() for key, value in weights.items()},
    ],
    ids=[
        "state_dict",
        "model_state_dict",
        "DataParallel in a checkpoint",
        "Lightning, compiled",
        "average",
        "half",
    ],
)
def test_state_dicts_that_other_programs_wrapped_load(tmp_path, wrap):
    weights = simpleconv3(4).state_dict()
    torch.save(wrap(weights), tmp_path / "theirs.pt")
    loaded = load_model(tmp_path / "theirs.pt").state_dict()
    for key, value in weights.items():
        torch.testing.assert_close(loaded[key], value, atol=1e-3, rtol=1e-3)


def test_a_checkpoint_of_a_training_run_loads_as_the_model_that_it_kept(mouths, tmp_path):
    import train

    train.main(["--data", str(mouths / "data"), "--models", str(tmp_path), "--logs", str(tmp_path / "logs"),
                "--device", "cpu", "--recipe", "strong", "--epochs", "2"])
    model, checkpoint = (load_model(tmp_path / name) for name in ("model.pt", "checkpoint.pt"))
    assert all(
        torch.equal(a, b) for a, b in zip(model.state_dict().values(), checkpoint.state_dict().values())
    )


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-16-be"])
def test_a_json_file_that_an_editor_saved_anew_keeps_its_class_names(tmp_path, encoding):
    model = simpleconv3(4)
    model.classes = ("无", "嘟嘴", "微笑", "张嘴")
    save_model(model, tmp_path / "model.pt")
    text = (tmp_path / "model.json").read_text("utf-8").replace("\n", "\r\n")
    (tmp_path / "model.json").write_bytes(text.encode(encoding))
    assert load_model(tmp_path / "model.pt").classes == model.classes


def test_predict_takes_what_notebooks_have():
    torch.manual_seed(0)
    model, crop = (
        simpleconv3(4).eval(),
        np.random.default_rng(0).integers(0, 256, (60, 60, 3), dtype=np.uint8),
    )
    expected = predict(model, [crop])
    torch.testing.assert_close(predict(torch.nn.DataParallel(model), [crop]), expected)
    grey = crop[..., 0]
    torch.testing.assert_close(predict(model, [grey]), predict(model, [grey[..., None]]))
    torch.testing.assert_close(predict(model, np.stack([crop, crop])), expected.expand(2, -1))
    for odd, why in (
        ([crop / 255], "float64"),
        ([crop[..., :2]], r"\(60, 60, 2\)"),
        (Image.fromarray(crop), "one image"),
        (grey, "one image"),
        (["photo.jpg"], "a crop is text, not a PIL image .*read_photo reads files"),
    ):
        with pytest.raises(ValueError, match=why):
            predict(model, odd)
    half = predict(model.half(), [crop])
    assert half.dtype == torch.float32
    torch.testing.assert_close(half, expected, atol=2e-2, rtol=0)


def test_without_a_path_the_own_model_comes_before_that_beside_net_and_the_one_of_the_project(
        tmp_path, monkeypatch, recwarn):
    (tmp_path / "notebooks").mkdir()
    monkeypatch.chdir(tmp_path / "notebooks")
    monkeypatch.setattr(net, "__file__", str(tmp_path / "net.py"))
    monkeypatch.setattr(net, "PRETRAINED", tmp_path / "theirs.pt")
    with pytest.raises(FileNotFoundError, match="theirs.pt: no such model"):
        load_model()
    for path in (net.PRETRAINED, tmp_path / net.MODEL, net.MODEL):
        save_model(simpleconv3(4), path)
        recwarn.clear()
        assert load_model().path == path
        assert [str(one.message) for one in recwarn] == [
            f"no models/model.pt here: took {path}, which comes with the project"] * (path == net.PRETRAINED)


def test_the_json_file_of_another_model_is_refused(tmp_path):
    """Weights copied over one's own would get the other's names, at full confidence."""
    ours, theirs = simpleconv3(4), simpleconv3(4)
    theirs.classes = ("open", "shut", "left", "right")
    save_model(ours, tmp_path / "ours.pt")
    save_model(theirs, tmp_path / "theirs.pt")
    shutil.copy(tmp_path / "theirs.pt", tmp_path / "ours.pt")
    with pytest.raises(ValueError, match="ours.json: belongs to other weights than .*ours.pt; copy the"):
        load_model(tmp_path / "ours.pt")
    shutil.copy(tmp_path / "theirs.json", tmp_path / "ours.json")
    assert load_model(tmp_path / "ours.pt").classes == theirs.classes
    torch.save(torch.load(tmp_path / "ours.pt"), tmp_path / "ours.pt", _use_new_zipfile_serialization=False)
    assert load_model(tmp_path / "ours.pt").classes == theirs.classes  # the same weights in another file
    about = json.loads((tmp_path / "theirs.json").read_text("utf-8"))
    del about["weights"]  # as earlier versions wrote it
    (tmp_path / "ours.json").write_text(json.dumps(about), "utf-8")
    shutil.copy(tmp_path / "theirs.pt", tmp_path / "ours.pt")
    assert load_model(tmp_path / "ours.pt").classes == theirs.classes


def test_whoever_loads_a_model_while_it_is_replaced_gets_the_old_one_or_the_new_one(tmp_path, monkeypatch):
    import preprocess_lips

    path, seen, real = tmp_path / "model.pt", [], preprocess_lips.write_file

    def write_file(*args):
        real(*args)
        seen.append(load_model(path).about["run"])  # between the two files, and after them

    save_model(simpleconv3(4), path, run=1)
    monkeypatch.setattr(preprocess_lips, "write_file", write_file)
    save_model(simpleconv3(4), path, run=2)
    save_model(simpleconv3(4), path, run=3)
    assert seen == [2, 2, 3, 3]


class Tiny(torch.nn.Module):
    """A network of somebody's own."""

    def __init__(self, nclass):
        super().__init__()
        self.body = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3 * 48 * 48, 8), torch.nn.ReLU())
        self.head = torch.nn.Linear(8, nclass)

    def forward(self, x):
        return self.head(self.body(x))


@pytest.mark.parametrize("name", ["tiny", "smallresnet"])
def test_other_networks_are_saved_loaded_and_asked_like_simpleconv3(tmp_path, monkeypatch, name):
    monkeypatch.setitem(net.NETWORKS, "tiny", Tiny)
    model = net.new_network(name, ("a", "b", "c")).eval()
    save_model(model, tmp_path / "model.pt")
    again = load_model(tmp_path / "model.pt")
    crops = [np.full((60, 60, 3), level, np.uint8) for level in (20, 90, 200)]
    assert torch.equal(predict(again, crops), predict(model, crops)) and again.classes == ("a", "b", "c")
    x = torch.rand(5, 3, 48, 48)
    seen = net.features(model, x)
    torch.testing.assert_close(net.last_layer(model)[1](seen), model(x))
    assert not net.last_layer(model)[1]._forward_pre_hooks
    (tmp_path / "model.json").unlink()
    with pytest.raises(ValueError, match="model.pt: not a state dict of simpleconv3"):
        load_model(tmp_path / "model.pt")
    save_model(model, tmp_path / "model.pt", network="lost")
    with pytest.raises(ValueError, match="network 'lost' is not in net.NETWORKS, which has simpleconv3"):
        load_model(tmp_path / "model.pt")


@pytest.mark.parametrize("odd", [
    lambda n: torch.nn.Conv2d(3, n, 48),
    lambda n: torch.nn.Sequential(torch.nn.Linear(6, n), torch.nn.Linear(n, 7)),
])
def test_a_network_whose_last_linear_layer_gives_no_logits_is_refused_at_once(monkeypatch, odd):
    monkeypatch.setitem(net.NETWORKS, "odd", odd)
    with pytest.raises(ValueError, match="network odd: the nn.Linear that __init__ makes last must give"):
        net.new_network("odd", ("a", "b"))


def test_a_small_network_may_not_bring_a_large_file(tmp_path, monkeypatch):
    monkeypatch.setitem(net.NETWORKS, "tiny", Tiny)
    save_model(simpleconv3(4), tmp_path / "model.pt", network="tiny")
    with pytest.raises(ValueError, match="not a state dict of tiny .larger than 5 MiB"):
        load_model(tmp_path / "model.pt")


def altered(key, value):
    """The network's weights with one of them replaced or added."""
    return simpleconv3(4).state_dict() | {key: value}


class Calls:
    """Pickles as a call of a function, which happens when it is loaded."""

    def __init__(self, *call):
        self.call = call

    def __reduce__(self):
        return self.call[0], self.call[1:]


@pytest.mark.parametrize(
    "content, reason",
    [
        (b"", ""),
        (b"PK\x03\x04 no zip", ""),
        ([1, 2], ""),
        ({"fc3.weight": 3}, ""),
        ({"a": torch.zeros(2)}, "fc3.weight"),
        (simpleconv3(4), "holds more than tensors"),
        (altered("fc3.weight", torch.zeros(0, 128)) | {"fc3.bias": torch.zeros(0)}, "no classes"),
        ({3: torch.zeros(2)}, ""),
        (altered("conv2.weight", torch.zeros(24, 12, 5, 5)), "size mismatch"),
        (altered("fc2.weight", torch.zeros(128, 1200, dtype=torch.int32)), "fc2.weight is torch.int32"),
        (
            altered("fc2.weight", torch.zeros(128, 1200, dtype=torch.complex64)),
            "fc2.weight is torch.complex64",
        ),
        (altered("conv1.bias", torch.full((12,), torch.nan)), "conv1.bias holds what is no weight"),
        (
            altered("fc1.bias", torch.full((1200,), 1e300, dtype=torch.float64)),
            "fc1.bias holds what is no weight",
        ),
        (altered("bn2.running_var", torch.full((24,), -1.0)), "bn2.running_var holds what is no weight"),
        (altered("fc3.weight", torch.zeros(1, 1).expand(10**7, 128)), "tensors of more than 34 MiB"),
        (altered("fc3.weight", torch.zeros(20_000_000, 0)), "it has no fc3.weight, or one of another shape"),
        (altered("new", torch.zeros(5 * 2**20, dtype=torch.uint8)), "new is torch.uint8"),
        (altered("new", torch.zeros(9 * 2**20)), "larger than 34 MiB"),
        (Calls(bytearray, 2**28), "holds more than tensors"),
    ],
)
@pytest.mark.parametrize("zipped", [True, False])
def test_what_is_no_state_dict_of_the_network_is_one_clear_error(tmp_path, content, reason, zipped):
    path = tmp_path / "model.pt"
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        torch.save(content, path, _use_new_zipfile_serialization=zipped)
    with pytest.raises(ValueError, match="model.pt: not a state dict of simpleconv3") as error:
        load_model(path)
    assert "\n" not in str(error.value) and reason in str(error.value)


@pytest.mark.parametrize("zipped", [True, False])
def test_code_in_a_model_is_not_executed(tmp_path, zipped):
    content = altered("conv1.bias", Calls(open, str(tmp_path / "executed"), "w"))
    torch.save(content, tmp_path / "model.pt", _use_new_zipfile_serialization=zipped)
    (tmp_path / "executed").unlink(missing_ok=True)
    with pytest.raises(ValueError, match="not a state dict"):
        load_model(tmp_path / "model.pt")
    assert not (tmp_path / "executed").exists()


def test_models_cut_off_anywhere_are_one_clear_error(tmp_path):
    torch.save(simpleconv3(4).state_dict(), tmp_path / "whole.pt")
    whole = (tmp_path / "whole.pt").read_bytes()
    for length in (1, 5, 1000, len(whole) // 2, len(whole) - 1):
        (tmp_path / "model.pt").write_bytes(whole[:length])
        with pytest.raises(ValueError, match="model.pt: not a state dict"):
            load_model(tmp_path / "model.pt")


def test_small_archives_of_large_content_are_refused_before_they_are_unpacked(tmp_path):
    torch.save(altered("new", torch.zeros(32 * 2**20)), tmp_path / "large.pt")
    with (
        zipfile.ZipFile(tmp_path / "large.pt") as large,
        zipfile.ZipFile(tmp_path / "model.pt", "w", zipfile.ZIP_DEFLATED, compresslevel=1) as small,
    ):
        for entry in large.namelist():
            if (
                entry.split("/")[1] in ("data.pkl", "version", "byteorder")
                or large.getinfo(entry).file_size == 2**27
            ):
                small.writestr(entry, large.read(entry))
    assert (tmp_path / "model.pt").stat().st_size < 2**20
    with pytest.raises(ValueError, match="a compressed archive"):
        load_model(tmp_path / "model.pt")


@pytest.mark.parametrize("name", ["model.pt", "model.json"])
@pytest.mark.parametrize(
    "make",
    [os.mkdir, lambda path: os.symlink("/dev/zero", path), os.mkfifo],
    ids=["folder", "device", "pipe"],
)
def test_folders_devices_and_pipes_are_not_read(tmp_path, name, make):
    save_model(simpleconv3(4), tmp_path / "model.pt")
    (tmp_path / name).unlink()
    make(tmp_path / name)
    with pytest.raises((ValueError, FileNotFoundError), match=f"{name}: .*(not a file|no file)"):
        load_model(tmp_path / "model.pt")


FOUR = {"classes": ["a", "b", "c", "d"]}


@pytest.mark.parametrize(
    "about, reason",
    [
        ("[]", "no list of classes"),
        ("{}", "no list of classes"),
        ('{"classes": "abcd"}', "no list of classes"),
        ("{", ""),
        (b"\xff{}", ""),
        ("[" * 10**5, ""),
        (" " * 2**20 + json.dumps(FOUR), "larger than 1 MiB"),
        (b"[" + b"1" * 5000 + b"]", ""),
        ({"classes": ["a", "b"]}, "names 2 classes, but the weights beside it have 4"),
        ({"classes": ["a", "b", "c", 4]}, "class 3 is 4"),
        ({"classes": ["a", "b", "c", ["d"]]}, "class 3 is"),
        ({"classes": ["a", "b", "c", "a"]}, "two classes 'a'"),
        ({"classes": ["a", "b", "c", ""]}, "class 3 is ''"),
        ({"classes": ["\x1b[2J", "b", "c", "d"]}, r"class 0 is '\x1b[2J'"),
        ({"classes": ["a\nb", "b", "c", "d"]}, r"class 0 is 'a\nb'"),
        ({"classes": ["a", "\x9b", "c", "d"]}, r"class 1 is '\x9b'"),
        ({"classes": ["a", "b", "\ud800", "d"]}, "class 2 is"),
        ({"classes": ["../../a", "b", "c", "d"]}, "class 0 is '../../a'"),
        ({"classes": ["a", "..", "c", "d"]}, "class 1 is '..'"),
        ({"classes": ["C:\\a", "b", "c", "d"]}, "class 0 is"),
        ({"classes": ["a" * 300, "b", "c", "d"]}, "class 0 is 'aaa"),
        *[
            (FOUR | {"temperature": t}, "temperature must be")
            for t in (0, -1, "1", None, True, [1], float("nan"), float("inf"), 1e-40, 10**400)
        ],
    ],
)
def test_json_that_does_not_fit_is_one_clear_error(tmp_path, about, reason):
    save_model(simpleconv3(4), tmp_path / "model.pt")
    text = json.dumps(about) if isinstance(about, dict) else about
    (tmp_path / "model.json").write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(
        ValueError, match="model.json: (not the JSON file of a model|names 2 classes)"
    ) as error:
        load_model(tmp_path / "model.pt")
    assert (
        reason in str(error.value)
        and len(str(error.value)) < 400 + len(str(tmp_path))
        and str(error.value).isprintable()
    )


def test_names_in_any_script_are_class_names(tmp_path):
    model = simpleconv3(4)
    model.classes = ("张嘴", "می\u200cخندد", "with space", "a.b")
    save_model(model, tmp_path / "model.pt")
    assert load_model(tmp_path / "model.pt").classes == model.classes


def test_predict_takes_crops_of_any_size():
    model = simpleconv3(4).eval()
    crops = [np.zeros((128, 128, 3), np.uint8), np.full((60, 61, 3), 200, np.uint8)]
    out = predict(model, crops)
    assert out.shape == (2, 4)
    torch.testing.assert_close(out.sum(1), torch.ones(2))
    assert predict(model, []).shape == (0, 4)
    with pytest.raises(ValueError, match="crops is one image; predict takes a list of them"):
        predict(model, np.zeros((128, 128, 3), np.uint8))


def test_command_line_shows_layers_and_parameters(inside, tmp_path):
    assert "1,608,980" in inside("net.py").stdout
    save_model(simpleconv3(2), tmp_path / "two.pt")
    assert (
        "--export would replace the weights"
        in inside("net.py", "two.pt", "--export", "./two.pt", check=2).stderr
    )
    (tmp_path / "two.json").unlink()
    out = inside("net.py", "two.pt").stdout
    assert "fc3" in out and "1,608,722" in out and "classes: 0, 1" in out
    assert "error: none.pt: no such model" in inside("net.py", "none.pt", check=1).stderr
    assert "\x1b" not in inside("net.py", "\x1b[2J.pt", check=1).stderr


def test_nothing_in_a_model_steers_the_terminal(inside, tmp_path):
    save_model(simpleconv3(4), tmp_path / "model.pt", command="\x1b[2J\x9b2J", log="\u202e")
    model = json.loads((tmp_path / "model.json").read_text("utf-8"))
    (tmp_path / "model.json").write_text(
        json.dumps(model | {"classes": ["\u202ea", "b", "می\u200cخندد", "d"]}), "utf-8"
    )
    out = inside("net.py", "model.pt").stdout
    assert out.replace("\n", "").replace("\u200c", "").isprintable()
    assert r"\u202ea, b, می‌خندد, d" in out and r"\x9b2J" in out
    torch.save(altered("\x1b[31m", torch.zeros(1)), tmp_path / "model.pt")
    assert "\x1b" not in inside("net.py", "model.pt", check=1).stderr


def test_normalize_leaves_its_argument_as_it_is():
    levels = torch.full((1, 3, 48, 48), 255.0)
    assert net.normalize(levels).eq(1).all() and levels.eq(255).all()
