import json

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
    expected = transforms.Compose([transforms.Resize(size), transforms.CenterCrop(size), transforms.PILToTensor()])(image)
    assert torch.equal(square(image, size), expected)
    assert torch.equal(square(np.asarray(image), size), expected)


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


def wrong_shape():
    weights = simpleconv3(4).state_dict()
    weights["conv2.weight"] = torch.zeros(24, 12, 5, 5)
    return weights


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 no zip", [1, 2], {"fc3.weight": 3}, {"a": torch.zeros(2)}, wrong_shape(), simpleconv3(4)])
def test_what_is_no_state_dict_of_the_network_is_one_clear_error(tmp_path, content):
    path = tmp_path / "model.pt"
    path.write_bytes(content) if isinstance(content, bytes) else torch.save(content, path)
    with pytest.raises(ValueError, match="model.pt: not a state dict of simpleconv3") as error:
        load_model(path)
    assert "\n" not in str(error.value)


def test_json_that_does_not_fit_the_weights_is_an_error(tmp_path):
    save_model(simpleconv3(4), tmp_path / "model.pt")
    (tmp_path / "model.json").write_text(json.dumps({"classes": ["a", "b"]}))
    with pytest.raises(ValueError, match="names 2 classes, but model.pt has 4"):
        load_model(tmp_path / "model.pt")
    (tmp_path / "model.json").write_text("[]")
    with pytest.raises(ValueError, match="model.json: not the JSON file of a model"):
        load_model(tmp_path / "model.pt")


def test_a_crash_while_writing_leaves_the_old_file(tmp_path):
    path = tmp_path / "x"
    path.write_bytes(b"old")

    def fail(file):
        file.write(b"half")
        raise OSError("disk full")

    with pytest.raises(OSError):
        net.atomic_write(path, fail)
    assert path.read_bytes() == b"old" and list(tmp_path.iterdir()) == [path]


def test_predict_takes_crops_of_any_size():
    model = simpleconv3(4).eval()
    crops = [np.zeros((128, 128, 3), np.uint8), np.full((60, 61, 3), 200, np.uint8)]
    out = predict(model, crops)
    assert out.shape == (2, 4)
    torch.testing.assert_close(out.sum(1), torch.ones(2))
    assert predict(model, []).shape == (0, 4)


def test_command_line_shows_layers_and_parameters(shell, tmp_path):
    assert "1,608,980" in shell("net.py").stdout
    save_model(simpleconv3(2), tmp_path / "two.pt")
    (tmp_path / "two.json").unlink()
    out = shell("net.py", "two.pt").stdout
    assert "fc3" in out and "1,608,722" in out and "classes: 0, 1" in out
    assert "error: none.pt: no such model" in shell("net.py", "none.pt", check=1).stderr
