import importlib.util
import json
import os
import re
import shutil
import signal
import struct
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import hostile
import numpy as np
import pytest
import torch
from conftest import ROOT, train_flags
from PIL import Image, PngImagePlugin
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torchvision import transforms

import net
import train
from net import load_model, save_model, simpleconv3, square
from preprocess_lips import read_photo
from train import (
    CropFolder,
    confusion_matrix,
    evaluate,
    load_images,
    main,
    random_colour,
    random_crop,
    resample,
)

# --- the data path


def settings(recipe="textbook", **more):
    """The settings of a recipe, some of them others."""
    return SimpleNamespace(**train.RECIPES[recipe] | more)


def random_boxes(n, seed, **more):
    """Centre x, centre y, half width, half height of random crops; the image spans -1 to 1."""
    generator = torch.Generator().manual_seed(seed)
    views = random_crop(torch.eye(2, 3).expand(n, -1, -1), generator, settings(**more))
    assert views[:, 0, 1].eq(0).all() and views[:, 1, 0].eq(0).all()
    return torch.cat([views[:, :, 2], views[:, [0, 1], [0, 1]]], 1)


def load_files(paths, size):
    """The images of some files as training decodes them."""
    folder = Path(paths[0]).parent.parent
    crops = CropFolder(folder, size)
    places = [path for path, _ in crops.samples]
    return load_images(crops, [places.index(str(path)) for path in paths])


def largest_gap(a, b):
    """Kolmogorov-Smirnov distance of two samples."""
    a, b = np.sort(a), np.sort(b)
    points = np.concatenate([a, b])
    return np.abs(
        np.searchsorted(a, points, "right") / len(a) - np.searchsorted(b, points, "right") / len(b)
    ).max()


def test_random_boxes_are_distributed_as_torchvisions():
    n = 20_000
    ours = random_boxes(n, 0).double().numpy()
    crop, image = transforms.RandomResizedCrop(48), torch.empty(3, 1000, 1000)
    torch.manual_seed(0)
    theirs = np.array(
        [crop.get_params(image, crop.scale, crop.ratio) for _ in range(n)], float
    )  # top, left, height, width
    theirs = (
        np.stack(
            [
                theirs[:, 1] + theirs[:, 3] / 2,
                theirs[:, 0] + theirs[:, 2] / 2,
                theirs[:, 3] / 2,
                theirs[:, 2] / 2,
            ],
            1,
        )
        / 500
    )
    theirs[:, :2] -= 1
    for measure in (
        lambda b: b[:, 2] * b[:, 3],
        lambda b: b[:, 2] / b[:, 3],
        lambda b: b[:, 0],
        lambda b: b[:, 1],
        lambda b: b[:, 0] - b[:, 2],
        lambda b: b[:, 1] + b[:, 3],
    ):
        # 1.95 sqrt(2 / n): two samples of one distribution differ by more once in a thousand times
        assert largest_gap(measure(ours), measure(theirs)) < 1.95 * (2 / n) ** 0.5


def test_boxes_lie_inside_the_image_unless_they_may_go_beyond_it():
    boxes = random_boxes(5000, 1)
    assert (boxes[:, :2].abs() + boxes[:, 2:] <= 1 + 1e-6).all()
    wide = random_boxes(5000, 1, crop=(0.4, 1.4), shift=0.12)
    area = wide[:, 2] * wide[:, 3]
    assert (
        0.4 <= area.min() < 0.42 and 1.38 < area.max() <= 1.4 + 1e-6 and abs(float(area.mean()) - 0.9) < 0.02
    )
    assert (wide[:, :2].abs() <= (1 - wide[:, 2:]).abs().clamp(min=0.12) + 1e-6).all()


@pytest.mark.parametrize(
    "left, top, width, height", [(0, 0, 64, 64), (5, 9, 50, 44), (20, 10, 30, 40), (40, 44, 20, 18)]
)
def test_pixels_of_a_box_are_torchvisions(mouths, left, top, width, height):
    path = sorted((mouths / "data" / "train").glob("*/*.png"))[3]
    image = load_files([path], 64)
    centre = (left + width / 2) / 32 - 1, (top + height / 2) / 32 - 1
    view = torch.tensor([[[width / 64, 0, centre[0]], [0, height / 64, centre[1]]]])
    ours = resample(image, view)[0]
    resized = transforms.functional.resized_crop(
        Image.fromarray(image[0].permute(1, 2, 0).numpy()), top, left, height, width, [48, 48]
    )
    theirs = transforms.functional.pil_to_tensor(resized).float()
    # ours has no antialiasing: at most 64 pixels become 48, where it hardly matters
    assert (ours - theirs).abs().mean() < (1.5 if width > 48 else 0.5)
    mirrored = resample(image, view * torch.tensor([-1, 1, 1]))[0]
    torch.testing.assert_close(mirrored, ours.flip(2), atol=1e-2, rtol=0)


def test_grey_photos_meet_colour_in_training_and_colour_photos_lose_it():
    grey = torch.full((2000, 3, 4, 4), 100.0)
    seen = random_colour(grey, torch.Generator().manual_seed(0), settings(colour=0.3, grey=0.25))[..., 0, 0]
    tinted = seen.amax(1) - seen.amin(1) > 0.01
    assert 0.2 < tinted.float().mean() < 0.3
    assert (seen.mean(0) - 100).abs().max() < 2 and seen.min() > 100 * 0.7**2 and seen.max() < 100 * 1.3**2

    torch.manual_seed(0)
    coloured = 60 + 90 * torch.rand(2000, 3, 4, 4)
    seen = random_colour(coloured, torch.Generator().manual_seed(0), settings(colour=0.3, grey=0.25))
    ratios = seen / seen[:, :1]  # a tinted grey image has the same ones everywhere
    assert torch.equal((ratios.amax((2, 3)) - ratios.amin((2, 3))).amax(1) < 1e-4, tinted)
    assert random_colour(coloured, torch.Generator(), settings(colour=0.0, grey=0.0)) is coloured


def test_validation_pixels_are_torchvisions_and_those_that_predict_sees(mouths, tmp_path):
    theirs = transforms.Compose([transforms.Resize(48), transforms.CenterCrop(48), transforms.PILToTensor()])
    paths = sorted((mouths / "data" / "val").glob("*/*.png"))
    for path in paths[:4]:  # JPEGs, too, which could be decoded at half their size much faster
        (tmp_path / "set" / "a").mkdir(parents=True, exist_ok=True)
        Image.open(path).save(tmp_path / "set" / "a" / f"{path.stem}.jpg", quality=95)
    for some in (paths, sorted((tmp_path / "set" / "a").iterdir())):
        expected = torch.stack([theirs(Image.open(path).convert("RGB")) for path in some])
        assert torch.equal(load_files(some, 48), expected)
        assert torch.equal(torch.stack([square(read_photo(path)) for path in some]), expected)


def test_crops_are_seen_upright_and_on_white_as_predict_sees_them(mouths, tmp_path):
    crop = Image.open(sorted((mouths / "data" / "val" / "dark").glob("*.png"))[0]).convert("RGB")
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees
    place = tmp_path / "set" / "x"
    place.mkdir(parents=True)
    crop.transpose(Image.Transpose.ROTATE_90).save(place / "a.png", exif=exif)
    clear = crop.convert("RGBA")
    clear.paste((0, 0, 0, 0), (0, 0, 128, 40))
    clear.save(place / "b.png")
    turned, white = load_files([place / "a.png", place / "b.png"], 48)
    assert (
        torch.equal(turned, square(crop))
        and white[:, :10].eq(255).all()
        and torch.equal(white[:, 20:], square(crop)[:, 20:])
    )


def test_many_images_are_decoded_by_several_processes_to_the_same_pixels(mouths, monkeypatch):
    crops = CropFolder(mouths / "data" / "train", 64)
    here = load_images(crops)
    monkeypatch.setattr(train, "MANY_IMAGES", 1)
    monkeypatch.setattr(train, "own_cores", lambda: 2)
    assert torch.equal(load_images(crops), here)


def test_metadata_costs_no_crop(mouths, tmp_path):
    crop = Image.open(sorted((mouths / "data" / "val" / "dark").glob("*.png"))[0]).convert("RGB")
    # orientation 3, and the software as a rational number
    exif = struct.pack("<2sHLH", b"II", 42, 8, 2) + struct.pack("<HHLL", 0x0112, 3, 1, 3)
    exif += struct.pack("<HHLL", 0x0131, 5, 1, 38) + struct.pack("<LLL", 0, 1, 3)
    place = tmp_path / "set" / "x"
    place.mkdir(parents=True)
    crop.transpose(Image.Transpose.ROTATE_180).save(place / "a.png", exif=exif)
    text = PngImagePlugin.PngInfo()
    text.add_text("parameters", "x" * 3_000_000, zip=True)
    crop.save(place / "b.png", pnginfo=text)
    crop.save(place / "c.png", exif=b"Exif\0\0broken")
    for image in load_images(CropFolder(place.parent, 48)):
        assert torch.equal(image, square(crop))


def test_images_that_do_not_fit_in_memory_live_in_a_file_without_a_name(mouths, tmp_path, monkeypatch):
    crops = CropFolder(mouths / "data" / "train", 64)
    in_memory = load_images(crops)
    mapped, memmap = [], np.memmap
    monkeypatch.setattr(
        np, "memmap", lambda *args, **more: mapped.append(memmap(*args, **more)) or mapped[-1]
    )
    monkeypatch.setattr(train, "free_memory", lambda: 1)
    assert torch.equal(load_images(crops, folder=tmp_path), in_memory)
    assert len(mapped) == 1 and mapped[0].nbytes == in_memory.numel() and not list(tmp_path.iterdir())


@pytest.fixture
def data(mouths, tmp_path):
    """A copy of the mouths' data/train and data/val that a test may spoil."""
    shutil.copytree(mouths / "data", tmp_path / "data")
    return tmp_path / "data"


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("make, why", [
    (lambda path: path.write_bytes(hostile.png(50_000, 50_000)), "2500000000 pixels"),
    (lambda path: path.write_bytes(hostile.GHOSTSCRIPT), "EPS is not read"),
    (lambda path: path.symlink_to("gone"), "No such file"),
], ids=["bomb", "program", "broken link"])
def test_an_image_that_cannot_be_decoded_is_one_line_that_names_it(data, monkeypatch, make, why, workers):
    if workers:
        monkeypatch.setattr(train, "MANY_IMAGES", 0)
        monkeypatch.setattr(train, "own_cores", lambda: workers)
    make(data / "train" / "dark" / "bad.png")
    why = f"^error: .*bad.png: unreadable: .*{why}[^\n]*; remove it and run the command again$"
    with pytest.raises(SystemExit, match=why):
        main(["--data", str(data), "--models", str(data / "models"), "--device", "cpu"])


def test_the_average_of_the_weights_lags_behind_them_and_forgets_the_first_ones_soon():
    net = simpleconv3(2)
    average = train.make_average(net, 0.9)
    start = net.fc3.bias.detach().clone()
    with torch.no_grad():
        net.fc3.bias += 1
        net.bn1.running_mean += 2
    average.update_parameters(net)
    torch.testing.assert_close(average.module.fc3.bias, start + 10 / 11)  # the decay begins with 1 / 11
    torch.testing.assert_close(average.module.bn1.running_mean, torch.full((12,), 20 / 11))
    for _ in range(100):
        average.update_parameters(net)
    with torch.no_grad():
        net.fc3.bias += 1
    average.update_parameters(net)
    torch.testing.assert_close(average.module.fc3.bias, start + 1.1, atol=1e-3, rtol=0)  # and ends with 0.9


def test_evaluate_sums_over_samples_whatever_the_batches():
    torch.manual_seed(0)
    model, images, labels = (
        simpleconv3(3),
        torch.randint(0, 256, (50, 3, 48, 48), dtype=torch.uint8),
        torch.randint(0, 3, (50,)),
    )
    small, matrix, logits = evaluate(model, images, labels, batch_size=7)
    large, same, _ = evaluate(model, images, labels)
    torch.testing.assert_close(small, large)
    torch.testing.assert_close(small, torch.nn.functional.cross_entropy(logits, labels, reduction="sum"))
    assert (
        torch.equal(matrix, same)
        and matrix.trace() == (logits.argmax(1) == labels).sum()
        and matrix.sum() == 50
    )


def test_confusion_matrix_has_true_classes_in_rows():
    matrix = confusion_matrix(torch.tensor([0, 1, 1, 2]), torch.tensor([0, 0, 1, 2]), 3)
    assert matrix.tolist() == [[1, 1, 0], [0, 1, 0], [0, 0, 1]]


def test_calibration_error_by_hand_and_temperature_mends_it():
    probabilities = torch.tensor([[0.9, 0.1], [0.9, 0.1], [0.6, 0.4]])
    error = net.calibration_error(probabilities, torch.tensor([0, 1, 0]))
    assert error == pytest.approx((2 * abs(0.5 - 0.9) + 1 * abs(1 - 0.6)) / 3)
    generator = torch.Generator().manual_seed(0)
    true = torch.randn(4000, 3, generator=generator)
    labels = torch.multinomial(true.softmax(1), 1, generator=generator)[:, 0]
    assert net.fit_temperature(3 * true, labels) == pytest.approx(3, rel=0.1)
    assert (
        net.calibration_error((3 * true).softmax(1), labels)
        > 0.1
        > 0.04
        > net.calibration_error(true.softmax(1), labels)
    )


def test_smoothing_does_not_favour_rare_classes():
    """With the loss that is least for these labels, a rare class is no likelier than another wrong one."""
    labels, counts = torch.tensor([0] * 50 + [1] * 49 + [2]), torch.tensor([40, 40, 5])
    logits = torch.zeros(3, 3, requires_grad=True)
    criterion, optimizer = train.make_criterion(counts, 1.0, 0.1), torch.optim.SGD([logits], 1.0)
    for _ in range(500):
        optimizer.zero_grad()
        criterion(logits[labels], labels).backward()
        optimizer.step()
    wrong = logits.detach().softmax(1)[0, 1:]
    assert float(wrong[0]) == pytest.approx(float(wrong[1]), rel=0.05) and float(wrong[0]) == pytest.approx(
        0.1 / 3, rel=0.1
    )


def test_rare_classes_weigh_more():
    logits, labels = torch.tensor([[0.0, 0.0], [3.0, 0.0]]), torch.tensor([0, 1])
    losses = torch.nn.functional.cross_entropy(logits, labels, reduction="none")
    for balance, weights in ((0.0, (1, 1)), (1.0, (1, 9)), (0.5, (1, 3))):
        loss = train.make_criterion(torch.tensor([90, 10]), balance, 0.0)(logits, labels)
        assert float(loss) == pytest.approx(float((losses * torch.tensor(weights)).sum() / sum(weights)))


def test_augmentation_keeps_levels_and_mirrors_turn_about_the_centre(mouths):
    images = load_images(CropFolder(mouths / "data" / "train", 64))
    for recipe in train.RECIPES:
        batch = train.augment(images, torch.Generator().manual_seed(0), settings(recipe))
        assert batch.shape == (32, 3, 48, 48) and -1 <= batch.min() < batch.max() <= 1
        assert torch.equal(batch, train.augment(images, torch.Generator().manual_seed(0), settings(recipe)))
    whole = torch.eye(2, 3).expand(32, -1, -1)
    half_turn = resample(images, -whole)
    torch.testing.assert_close(half_turn, resample(images, whole).flip(2, 3), atol=0.05, rtol=0)
    turned = train.random_turn(whole, torch.Generator().manual_seed(0), settings(rotate=15.0))
    angles = torch.rad2deg(torch.atan2(turned[:, 1, 0], turned[:, 0, 0]))
    assert 12 < angles.abs().max() <= 15 and angles.min() < 0 < angles.max()
    mirrored = train.random_flip(whole, torch.Generator().manual_seed(0), settings())[:, 0, 0]
    assert set(mirrored.tolist()) == {-1.0, 1.0}


# --- whole runs


@pytest.fixture
def run(mouths, tmp_path, monkeypatch):
    """Calls train.main on the mouths in a folder of its own; returns model.json."""
    monkeypatch.chdir(tmp_path)

    def run(*args):
        main(train_flags(mouths / "data", None, *args))
        folder = args[args.index("--models") + 1] if "--models" in args else "models"
        return json.loads((tmp_path / folder / "model.json").read_text("utf-8"))

    return run


def scalars(logs):
    events = EventAccumulator(str(logs))
    events.Reload()
    return events


def weights(path):
    return torch.load(path, weights_only=True)


@pytest.mark.sheets
def test_a_run_learns_and_leaves_model_json_and_curves(run, tmp_path, capsys):
    about = run("--epochs", 12, "--lr", 0.03)
    assert about["best"]["val_acc"] == 1.0 and about["classes"] == ["bright", "dark"]
    assert about["images"] == {"train": 32, "val": 8} and about["settings"]["lr"] == 0.03
    simpleconv3(2).load_state_dict(torch.load(tmp_path / "models" / "model.pt", weights_only=True))
    assert load_model(tmp_path / "models" / "model.pt").classes == ("bright", "dark")
    (log,) = (tmp_path / "logs").iterdir()
    events = scalars(log)
    tags = events.Tags()
    assert {"data/trainloss", "data/trainacc", "data/valloss", "data/valacc"} <= set(tags["scalars"])
    for tag in ("data/trainloss", "data/valacc"):
        assert [e.step for e in events.Scalars(tag)] == list(range(1, 13))
    assert all(0 <= e.value <= 1 for e in events.Scalars("data/trainacc"))
    assert events.Scalars("data/valacc")[about["best"]["epoch"] - 1].value == 1.0
    assert {"how well the kept weights do", "augmented training crops"} == set(tags["images"])
    sheet = Image.open(tmp_path / "models" / "model.png")
    assert sheet.size[0] > 1000 and np.asarray(sheet).std() > 10
    assert about["scores"]["dark"] == {"precision": 1.0, "recall": 1.0, "f1": 1.0, "images": 4}
    assert tags["graph"] and tags["histograms"]
    out = capsys.readouterr().out
    assert out.count("\nepoch ") + out.startswith("epoch ") == 12 and "models/model.pt" in out.replace(
        "\\", "/"
    )
    assert "one validation image more or less is 12.5%" in out
    run("--resume")
    assert "nothing is left to do; --epochs with a larger number goes on" in capsys.readouterr().out


def test_the_learning_rate_steps_as_steplr_does_from_the_first_epoch(run, tmp_path, monkeypatch):
    used, step = [], torch.optim.SGD.step

    def noting(self, *args):
        used.append(self.param_groups[0]["lr"])
        return step(self, *args)

    monkeypatch.setattr(torch.optim.SGD, "step", noting)
    run("--epochs", 5, "--step-size", 2)  # of two batches
    (log,) = (tmp_path / "logs").iterdir()
    assert [round(e.value, 6) for e in scalars(log).Scalars("learning rate")] == [0.1, 0.1, 0.01, 0.01, 0.001]
    assert [round(lr, 6) for lr in used] == [0.1] * 4 + [0.01] * 4 + [0.001] * 2


def test_model_pt_is_the_best_epoch_and_the_last_is_recorded(run, tmp_path, mouths):
    about = run("--epochs", 8, "--lr", 0.3)
    model = load_model(tmp_path / "models" / "model.pt")
    data = train.load_data(mouths / "data")
    loss, matrix, _ = evaluate(model, data.val_images, data.val_labels)
    assert matrix.trace() / 8 == about["best"]["val_acc"] and about["last"]["epoch"] == 8
    assert abs(loss / 8 - about["best"]["val_loss"]) < 1e-5


@pytest.mark.parametrize("recipe", ["textbook", "strong"])
def test_a_resumed_run_ends_with_the_same_bits(run, tmp_path, ctrl_c, recipe):
    run("--recipe", recipe, "--epochs", 6, "--step-size", 4, "--models", "whole")
    with ctrl_c(4):
        run("--recipe", recipe, "--epochs", 6, "--step-size", 4)
    about = run("--resume")
    # from the checkpoint
    assert about["settings"]["step_size"] == 4 and about["settings"]["recipe"] == recipe
    whole, resumed = (weights(tmp_path / folder / "checkpoint.pt") for folder in ("whole", "models"))
    for part in ("model", "kept"):
        assert all(torch.equal(whole[part][key], resumed[part][key]) for key in whole[part])
    assert whole["history"] == resumed["history"] and whole["confusion"] == resumed["confusion"]
    log = [p for p in (tmp_path / "logs").iterdir() if str(p.name) in resumed["log_dir"]][0]
    assert sorted(e.step for e in scalars(log).Scalars("data/valacc")) == [1, 2, 3, 4, 5, 6]


def test_a_one_cycle_run_cannot_change_its_length_midway(run):
    run("--recipe", "strong", "--epochs", 2)
    with pytest.raises(SystemExit, match="cannot be resumed for another number"):
        run("--resume", "--epochs", 3)


@pytest.mark.parametrize("flags, why", [
    (("--recipe", "strong"), "--recipe strong: the run to resume was begun with textbook"),
    (("--average", "0.9"), "--average 0.9: the run to resume was begun with 0.0"),
    (("--keep", "last"), "--keep last: the run to resume was begun with best"),
])
def test_a_run_is_not_resumed_for_another_kind_of_model(run, capsys, flags, why):
    run("--epochs", 1)
    with pytest.raises(SystemExit, match="2"):
        run("--resume", *flags)
    assert why in capsys.readouterr().err


def test_a_run_is_not_resumed_on_other_images(run, mouths, tmp_path):
    shutil.copytree(mouths / "data", tmp_path / "data")
    main(["--epochs", "1", "--device", "cpu"])
    moved = sorted((tmp_path / "data" / "train" / "dark").iterdir())[0]
    moved.rename(tmp_path / "data" / "val" / "dark" / moved.name)
    with pytest.raises(
        SystemExit,
        match="error: data: holds other images than those of the run to resume; start again without --resume",
    ):
        main(["--resume", "--epochs", "2", "--device", "cpu"])


def test_a_run_is_resumed_on_the_devices_that_there_are(run, tmp_path, capsys):
    run("--epochs", 1)
    path = tmp_path / "models" / "checkpoint.pt"
    torch.save(weights(path) | {"device": "cuda"}, path)
    run("--resume", "--epochs", 2)
    assert "the run was begun on cuda; it goes on on cpu" in capsys.readouterr().out
    assert len(weights(path)["history"]) == 2


@pytest.mark.parametrize("flags, learnt", [([], False), (["--no-flip"], True)])
def test_classes_that_mirror_each_other_are_learnt_without_flips(tmp_path, flags, learnt):
    for part, n in (("train", 32), ("val", 12)):
        for label, left in (("left", 200), ("right", 60)):
            (tmp_path / "data" / part / label).mkdir(parents=True)
            for i in range(n):
                levels = np.full((64, 64), 130, np.uint8)
                levels[:, :32], levels[:, 32:] = left - i, 260 - left + i
                Image.fromarray(levels).save(tmp_path / "data" / part / label / f"{i}.png")
    more = "--epochs 8 --lr 0.02 --crop 0.6 1".split()
    main(train_flags(tmp_path / "data", tmp_path, "--models", tmp_path, *flags, *more))
    last = json.loads((tmp_path / "model.json").read_text("utf-8"))["last"]["val_acc"]
    assert (last > 0.95) == learnt and (learnt or last < 0.75)


def test_training_from_weights_begins_with_what_they_know(run, tmp_path, capsys):
    run("--epochs", 12, "--lr", 0.03)
    about = run("--weights", tmp_path / "models" / "model.pt", "--epochs", 1, "--lr", 1e-9, "--freeze-norm",
                "--models", "again")
    assert about["last"]["val_acc"] == 1.0
    known, again = (weights(tmp_path / folder / "model.pt") for folder in ("models", "again"))
    for key in known:
        if "num_batches" not in key:
            torch.testing.assert_close(again[key], known[key], atol=1e-6, rtol=0)
    with pytest.raises(SystemExit, match="error: gone.pt: no such model"):
        run("--weights", "gone.pt")


def test_a_run_goes_on_without_the_file_that_it_started_from(run, tmp_path, ctrl_c):
    run("--epochs", 1)
    (tmp_path / "models" / "model.pt").rename(tmp_path / "other.pt")
    (tmp_path / "models" / "model.json").rename(tmp_path / "other.json")
    with ctrl_c(2):
        run("--weights", "other.pt", "--epochs", 2)
    (tmp_path / "other.pt").unlink()
    assert run("--resume")["last"]["epoch"] == 2


def test_the_last_layers_weights_go_to_classes_of_the_same_name(tmp_path):
    old = simpleconv3(3)
    old.classes = ("a", "b", "c")
    save_model(old, tmp_path / "old.pt")
    new = train.make_net("simpleconv3", ("c", "new", "a"), load_model(tmp_path / "old.pt"))
    assert torch.equal(new.fc3.weight[[0, 2]], old.fc3.weight[[2, 0]])
    assert torch.equal(new.fc3.bias[[0, 2]], old.fc3.bias[[2, 0]])
    assert not any(torch.equal(new.fc3.weight[1], row) for row in old.fc3.weight)
    assert torch.equal(new.fc1.weight, old.fc1.weight)


@pytest.mark.parametrize("classes, kept", [
    (("bright", "dark"), True), (("bright",), True), (("bright", "dark", "grin"), False), (("a",), False)])
def test_weights_that_know_the_classes_are_gone_half_the_way_from(run, tmp_path, ctrl_c, classes, kept):
    """But not where the task is another one."""
    torch.manual_seed(5)
    old = net.new_network("simpleconv3", classes)
    save_model(old, tmp_path / "old.pt")
    flags = ("--weights", "old.pt", "--epochs", 4, "--average", 0, "--lr", 0.01, "--keep", "last")
    with ctrl_c(3):
        run(*flags, "--mix", 0.25)
    (tmp_path / "old.pt").rename(tmp_path / "gone.pt")
    run("--resume")
    (tmp_path / "gone.pt").rename(tmp_path / "old.pt")
    run(*flags, "--models", "whole")
    mixed, whole = (weights(tmp_path / folder / "model.pt") for folder in ("models", "whole"))
    for key, value in whole.items():
        if value.is_floating_point():
            torch.manual_seed(0)  # as --seed is: where the last layer's new rows begin
            start = net.new_network("simpleconv3", ("bright", "dark")).state_dict()[key]
            if key.startswith("fc3"):
                start[:len(classes)] = old.state_dict()[key][:2]
            else:
                start = old.state_dict()[key]
            share = 0.25 if kept else 1.0
            torch.testing.assert_close(mixed[key], start.lerp(value, share), atol=1e-6, rtol=1e-5)


def test_what_weights_to_start_from_make_of_the_images_is_said(run, tmp_path, capsys):
    run("--epochs", 12, "--lr", 0.03)
    about = load_model("models/model.pt")
    about.classes = ("dark", "bright")
    save_model(about, tmp_path / "other.pt")
    for path, said in (("models/model.pt", "16 of 16 bright, 16 of 16 dark"),
                       ("other.pt", r"0 of 16 bright \(if it means something else here, give it another")):
        run("--weights", path, "--epochs", 1, "--models", "new")
        assert re.search(f"^{path} names as filed: {said}", capsys.readouterr().out, re.M)


@pytest.mark.parametrize("classes, lost", [(("bright", "dark", "grin"), ["grin"]), (("a", "b"), [])])
def test_a_class_of_the_weights_without_images_is_pointed_out(run, tmp_path, capsys, classes, lost):
    """Weights of another task, which share no class, are worth no word."""
    old = simpleconv3(len(classes))
    old.classes = classes
    save_model(old, tmp_path / "old.pt")
    run("--weights", "old.pt", "--epochs", 1)
    assert re.findall(r"^old.pt names .*; it also names (.*): without", capsys.readouterr().out, re.M) == lost


def test_of_a_few_images_some_are_left_out_in_turns(run, mouths, none_left_out, monkeypatch, capsys):
    monkeypatch.setattr(train, "FEW_STEPS", none_left_out)
    run("--epochs", 2, "--lr", 0.03)
    said = (r"four fifths of all 40 images in turns, it names (\d+\.\d)% of the rest rightly, give or take "
            r"\d+%; balanced over the classes \1%; to say bright always is right on 50.0%")
    out = capsys.readouterr().out
    assert re.search(said, out) and "s of leaving some out" in out
    assert "leaving a fifth of all images out" in out  # before it begins, as there is no terminal for a bar
    args = train.parse_args(["--data", str(mouths / "data"), "--epochs", "2000"])
    assert train.leave_some_out(args) is None  # it would take minutes


@pytest.mark.parametrize("recipe, kept", [("textbook", "best"), ("strong", "last")])
def test_a_recipe_that_ends_at_rest_keeps_its_last_epoch(run, tmp_path, monkeypatch, recipe, kept):
    """Validation that grows worse with every epoch: the first one is the best."""
    real, losses = train.score, iter(range(10))
    monkeypatch.setattr(train, "score", lambda *args: real(*args) | {"val_acc": 1 - 0.1 * next(losses)})
    about = run("--recipe", recipe, "--epochs", 3, "--lr", 0.01)
    assert about["kept"] == kept and about["best"]["epoch"] == 1 and about["last"]["epoch"] == 3
    state = weights(tmp_path / "models" / "checkpoint.pt")
    judged = state["average"] or {f"module.{key}": value for key, value in state["model"].items()}
    same = torch.equal(weights(tmp_path / "models" / "model.pt")["fc3.weight"], judged["module.fc3.weight"])
    assert same == (kept == "last")


def test_a_temperature_is_fitted_on_many_validation_images_only():
    torch.manual_seed(0)
    labels = torch.randint(0, 2, (400,))
    logits = (
        9 * torch.nn.functional.one_hot(torch.where(torch.rand(400) < 0.8, labels, 1 - labels), 2).float()
    )
    assert net.calibrate(logits, labels)["temperature"] > 2
    assert net.calibrate(logits[:199], labels[:199])["temperature"] == 1.0


def test_computing_in_bfloat16_learns_as_well(run):
    assert run("--epochs", 12, "--lr", 0.03, "--amp")["best"]["val_acc"] == 1.0


def test_a_setting_that_a_checkpoint_lacks_is_as_before_and_one_that_is_gone_is_named(run, tmp_path):
    run("--epochs", 1)
    path = tmp_path / "models" / "checkpoint.pt"
    state = weights(path)
    fewer = {key: value for key, value in state["settings"].items() if key not in ("grey", "net")}
    torch.save(state | {"settings": fewer}, path)
    about = run("--resume", "--epochs", 2)
    assert about["settings"]["grey"] == 0 and about["settings"]["net"] == "simpleconv3"
    torch.save(state | {"settings": fewer | {"blur_side": 2}}, path)
    with pytest.raises(SystemExit, match="begun with --blur-side, which train.py no longer knows"):
        run("--resume", "--epochs", 2)


class Tiny(torch.nn.Module):
    """A network of somebody's own."""

    def __init__(self, nclass):
        super().__init__()
        self.norm = torch.nn.BatchNorm2d(3)
        self.head = torch.nn.Linear(3 * 12 * 12, nclass)

    def forward(self, x):
        return self.head(torch.nn.functional.avg_pool2d(self.norm(x), 4).flatten(1))


def invert(pixels, generator, settings):
    """An augmentation of somebody's own."""
    chosen = torch.rand(len(pixels), 1, 1, 1, generator=generator, device=pixels.device) < settings.invert
    return torch.where(chosen, 255 - pixels, pixels)


def test_another_network_and_augmentation_take_a_line_each(run, mouths, monkeypatch, ctrl_c, inside):
    monkeypatch.setitem(train.NETWORKS, "tiny", Tiny)
    setting = train.Setting("invert", (0.0, 0.0, 0.1), "share with inverted levels")
    monkeypatch.setattr(train, "SETTINGS", (*train.SETTINGS, setting))
    monkeypatch.setitem(train.RECIPES, "textbook", train.RECIPES["textbook"] | {"invert": 0.0})
    monkeypatch.setattr(train, "LOOKS", [*train.LOOKS, invert])
    flags = ("--net", "tiny", "--epochs", 6, "--lr", 0.03, "--invert", 0.05)
    with ctrl_c(3):
        run(*flags)
    about = run("--resume")
    assert about["last"]["epoch"] == 6 and about["network"] == "tiny"
    assert about["settings"]["invert"] == 0.05
    whole = run(*flags, "--models", "whole")
    assert about["last"] == whole["last"] and about["best"]["val_acc"] > 0.8
    said = inside("predict.py", "--evaluate", mouths / "data" / "val", "--crops", "--json").stdout
    assert json.loads(said.splitlines()[-1])["accuracy"] == round(about["best"]["val_acc"], 4)
    assert "network: tiny" in inside("net.py", "models/model.pt").stdout
    flags = ("--net", "tiny", "--weights", "models/model.pt", "--epochs", 1, "--lr", 1e-9)
    again = run(*flags, "--models", "again")
    assert again["best"]["val_acc"] == about["best"]["val_acc"]
    with pytest.raises(SystemExit, match="weights of tiny, but --net is simpleconv3; add --net tiny"):
        run("--weights", "models/model.pt")
    if importlib.util.find_spec("onnx"):
        inside("net.py", "models/model.pt", "--export", "model.onnx")
    with pytest.raises(SystemExit, match="2"):
        run("--invert", 2)


def test_validation_names_what_predict_names_to_the_last_digit(run, mouths, inside):
    """JPEGs, and a model that is neither always right nor sure."""
    for part in ("train", "val"):
        for path in (mouths / "data" / part).glob("*/*.png"):
            jpeg = Path("jpegs", part, path.parent.name, f"{path.stem}.jpg")
            jpeg.parent.mkdir(parents=True, exist_ok=True)
            Image.open(path).save(jpeg, quality=90)
    for seed in range(8):  # the first whose accuracy says something
        about = run("--data", "jpegs", "--epochs", 1, "--lr", 0.02, "--seed", seed)
        if 0.5 < about["last"]["val_acc"] < 1:
            break
    data = train.load_data(Path("jpegs"))
    model = load_model("models/model.pt")
    ours = train.logits_of(model, data.val_images).detach().softmax(1)
    said = inside("predict.py", "--evaluate", "jpegs/val", "--crops", "--json").stdout
    said = json.loads(said.splitlines()[-1])
    assert said["accuracy"] == round(about["last"]["val_acc"], 4)
    assert torch.tensor(said["confusion"]).equal(confusion_matrix(ours.argmax(1), data.val_labels, 2).long())
    lines = inside("predict.py", "jpegs/val", "--crops", "--json").stdout.splitlines()
    theirs = {row["source"]: row["probabilities"] for row in map(json.loads, lines)}
    for path, row in zip(data.val_paths, ours.tolist()):
        assert list(theirs[path].values()) == [round(p, 4) for p in row]
    onnxruntime = pytest.importorskip("onnxruntime")
    inside("net.py", "models/model.pt", "--export", "model.onnx")
    session = onnxruntime.InferenceSession("model.onnx")
    (out,) = session.run(None, {"levels": data.val_images.float().numpy()})
    np.testing.assert_allclose(out, ours.numpy(), atol=1e-5, rtol=0)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("recipe", ["textbook", "strong"])
def test_the_same_seed_gives_the_same_bits_on_a_gpu(run, tmp_path, recipe):
    for folder in "ab":
        run("--recipe", recipe, "--epochs", 4, "--device", "cuda", "--models", folder)
    a, b = (weights(tmp_path / folder / "checkpoint.pt")["model"] for folder in "ab")
    assert all(torch.equal(a[key], b[key]) for key in a)


def test_weights_none_begins_with_random_ones(run):
    assert run("--recipe", "finetune", "--weights", "none", "--epochs", 1)["settings"]["weights"] is None


@pytest.mark.skipif(os.name == "nt", reason="Windows has no such signals")
@pytest.mark.parametrize("name", ["SIGTERM", "SIGHUP"])
def test_the_end_of_a_job_saves_all_finished_epochs_as_ctrl_c_does(run, monkeypatch, name):
    real, calls = train.evaluate, []

    def evaluate(*args, **more):
        calls.append(1)
        if len(calls) == 3:
            os.kill(os.getpid(), getattr(signal, name))
        return real(*args, **more)

    monkeypatch.setattr(train, "evaluate", evaluate)
    before = signal.signal(getattr(signal, name), signal.SIG_DFL)  # which nohup may have changed
    try:
        with pytest.raises(SystemExit, match="all finished epochs are saved; 'python train.py --resume"):
            run("--epochs", 9)
    finally:
        signal.signal(getattr(signal, name), before)
    assert json.loads(Path("models", "model.json").read_text("utf-8"))["last"]["epoch"] == 2


def test_a_last_epoch_that_is_far_worse_than_the_best_is_pointed_out(run, monkeypatch, capsys):
    real, accuracies = train.score, iter((1.0, 0.4, 0.4))
    monkeypatch.setattr(train, "score", lambda *args: real(*args) | {"val_acc": next(accuracies)})
    run("--recipe", "strong", "--epochs", 3, "--lr", 0.01)
    out = capsys.readouterr().out
    assert "epoch 1 did far better than the last one, which is kept" in out and "--keep best" in out


@pytest.mark.parametrize("corrected", [False, True])
def test_photos_as_sort_left_them_are_no_test_of_the_model(run, mouths, tmp_path, capsys, corrected):
    shutil.copytree(mouths / "data", tmp_path / "data")
    lines = ["part,class,file,group,draw,source"]
    for i in range(32):
        name = "0.981-dark_x" if corrected and i < 20 else "0.981_x"
        lines.append(f"train,bright,{i}.jpg,{i},seed=0,bright/{name}{i}.jpg")
    (tmp_path / "data" / "split.csv").write_text("\n".join(lines) + "\n", "utf-8")
    run("--data", tmp_path / "data", "--epochs", 1)
    said = "32 of 32 training photos have names that --sort gave" in capsys.readouterr().out
    assert said != corrected


def test_the_line_for_the_curves_can_be_pasted(run, tmp_path, capsys):
    run("--epochs", 1, "--logs", "logs [1]")
    assert "\ncurves: tensorboard --logdir 'logs [1]'\n" in capsys.readouterr().out


def test_a_checkpoint_of_an_earlier_version_says_so(run, tmp_path):
    (tmp_path / "models").mkdir()
    torch.save(
        {"net": simpleconv3(2).state_dict(), "momentum": [], "log_dir": "x"},
        tmp_path / "models" / "checkpoint.pt",
    )
    with pytest.raises(
        SystemExit, match="an earlier version of train.py wrote it.; start again without --resume"
    ):
        run("--resume")


def test_links_are_followed_but_not_in_circles_and_what_is_hidden_or_of_other_programs_is_left_out(
        mouths, tmp_path):
    shutil.copytree(mouths / "data" / "train" / "dark", tmp_path / "elsewhere")
    (tmp_path / "set" / "dark").mkdir(parents=True)
    (tmp_path / "set" / "dark" / "link").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "set" / "dark" / "circle").symlink_to(tmp_path / "set" / "dark")
    (tmp_path / "set" / "empty").mkdir()
    for hidden in (".hidden/x.png", "dark/.x.png", "dark/.thumbnails/x.png", "dark/notes.txt", "@eaDir/x.png",
                   "dark/@eaDir/a.png/x.png", "#recycle/x.png", "dark/__MACOSX/x.png"):
        path = tmp_path / "set" / hidden
        path.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(next((tmp_path / "elsewhere").iterdir()), path)
    folder = train.CropFolder(tmp_path / "set", 48)
    assert folder.classes == ["dark"] and len(folder) == 16


def test_ctrl_c_before_an_epoch_is_done_promises_nothing(run, monkeypatch):
    run("--epochs", 1)

    def interrupt(*args, **more):
        raise KeyboardInterrupt

    os.utime("models/checkpoint.pt", (1, 1))  # of an older run
    monkeypatch.setattr(train, "evaluate", interrupt)
    with pytest.raises(SystemExit, match="interrupted: before an epoch was finished: nothing is saved"):
        run("--epochs", 2)


def test_a_checkpoint_cannot_lead_the_curves_out_of_logs(run, tmp_path):
    run("--epochs", 1)
    path = tmp_path / "models" / "checkpoint.pt"
    state = weights(path)
    for log_dir in ("..", "../..", "logs/..", ".", "", "/", "..\\..", "a\n", 7):
        torch.save(state | {"log_dir": log_dir}, path)
        before = sorted(tmp_path.rglob("*"))
        with pytest.raises(
            SystemExit, match=r"checkpoint.pt: damaged \([^\n]*\); start again without --resume"
        ):
            run("--resume", "--epochs", 2)
        assert sorted(tmp_path.rglob("*")) == before
    for epochs, log_dir in ((2, "../../elsewhere/begun_in_linux"), (3, "C:\\logs\\begun_in_windows")):
        torch.save(state | {"log_dir": log_dir}, path)
        before = {file for file in tmp_path.rglob("*") if file.is_file()}
        run("--resume", "--epochs", epochs)
        new = {file for file in tmp_path.rglob("*") if file.is_file() and file not in before}
        (place,) = {file.relative_to(tmp_path).parts[:2] for file in new}
        assert place[0] == "logs" and place[1].startswith("begun_in")


def test_a_checkpoint_in_which_something_is_of_another_kind_is_damaged(run, tmp_path):
    run("--epochs", 1)
    path = tmp_path / "models" / "checkpoint.pt"
    state = weights(path)
    short = {key: value for key, value in state["model"].items() if key != "fc3.bias"}
    for odd in (
        {"model": short},
        {"kept": {}},
        {"optimizer": 3},
        {"history": "one"},
        {"history": [None]},
        {"history": [{}]},
        {"history": [state["history"][0] | {"val_acc": "x"}]},
        {"confusion": [["x"]]},
        {"classes": None},
        {"settings": []},
        {"settings": {}},
        {"log_dir": 7},
    ):
        torch.save(state | odd, path)
        with pytest.raises(SystemExit) as end:
            run("--resume", "--epochs", 3)
        assert re.fullmatch(
            r"error: models/checkpoint\.pt: damaged \([ -~]+\); start again without --resume", str(end.value)
        ), (odd, end.value)


def test_the_same_seed_gives_the_same_weights_and_another_seed_others(run, tmp_path):
    for seed, folder in ((0, "a"), (0, "b"), (1, "c")):
        run("--epochs", 2, "--seed", seed, "--models", folder)
    a, b, c = (weights(tmp_path / folder / "model.pt")["fc3.weight"] for folder in "abc")
    assert torch.equal(a, b) and not torch.equal(a, c)


@pytest.fixture(scope="module")
def endless(mouths, tmp_path_factory):
    """Two trainings without end, started together, as loading torch takes seconds: (process, its folder)."""
    command = [sys.executable, str(ROOT / "train.py"), "--data", str(mouths / "data"), "--device", "cpu"]
    runs = []
    for _ in range(2):
        folder = tmp_path_factory.mktemp("endless")
        process = subprocess.Popen([*command, "--epochs", "100000"], cwd=folder, text=True,
                                   stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        runs.append((process, folder))
    yield iter(runs)
    for process, _ in runs:
        process.kill()
        process.wait()


@pytest.mark.skipif(os.name == "nt", reason="Windows has no SIGINT for child processes")
def test_ctrl_c_saves_all_finished_epochs(endless, mouths):
    process, folder = next(endless)
    for line in process.stdout:
        if line.startswith("epoch   3"):
            break
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 1 and "Traceback" not in err
    # the command that finds this run again
    again = f"python train.py --resume --data {mouths / 'data'}"
    assert f"all finished epochs are saved; '{again}' goes on" in err
    done = json.loads((folder / "models" / "model.json").read_text())["last"]["epoch"]
    printed = [line for line in out.splitlines() if line.startswith("epoch")]
    assert done >= 3 and (not printed or int(printed[-1].split()[1].split("/")[0]) == done)


def test_a_closed_pipe_ends_training_as_ctrl_c_does(endless):
    process, _ = next(endless)
    while not process.stdout.readline().startswith("epoch   2"):
        pass
    process.stdout.close()
    assert process.wait(60) == 1 and "all finished epochs are saved" in process.stderr.read()
    process.stderr.close()


RANKS = """
import json, os, sys, torch
sys.path.insert(0, sys.argv[1])
import train

real = train.evaluate

def evaluate(net, *args, **more):
    torch.save(net.state_dict(), f"rank{os.environ['RANK']}.pt")
    return real(net, *args, **more)

def until_the_third(*args, **more):
    calls.append(None)
    if len(calls) == 3:
        raise KeyboardInterrupt
    return real(*args, **more)

# a group that was left cannot be joined again: here it is not
left, train.dist.destroy_process_group = [], lambda: left.append(None)
usual, resumed, rare, endless = json.loads(sys.argv[2])
train.main(usual)
calls, train.evaluate = [], until_the_third
try:
    train.main(resumed)
except SystemExit as stopped:
    print(stopped)
train.dist.barrier()  # the first has saved the checkpoint
train.evaluate = real
train.main([*resumed, "--resume"])
train.evaluate = evaluate
train.main(rare)
train.evaluate = real
assert len(left) == 4
train.main(endless)
"""


@pytest.fixture(scope="module")
def job(mouths, tmp_path_factory):
    """What two processes of a job leave of four trainings, one after the other; a kill ends the last.

    The folder in which "usual", "resumed", "rare" and "endless" are, what was printed, and torchrun's status.
    """
    root = tmp_path_factory.mktemp("job")
    shutil.copytree(mouths / "data", root / "data")
    for part in ("train", "val"):  # a class of one image, which one of the processes lacks
        (root / "data" / part / "rare").mkdir()
        source = sorted((mouths / "data" / part / "dark").iterdir())[0]
        shutil.copy(source, root / "data" / part / "rare" / "x.png")
    (root / "ranks.py").write_text(RANKS)
    trainings = [
        train_flags(mouths / "data", root / "usual", "--epochs", 12, "--lr", 0.03),
        train_flags(mouths / "data", root / "resumed", "--epochs", 12, "--lr", 0.03),
        train_flags(root / "data", root / "rare", "--epochs", 2, "--recipe", "strong"),
        train_flags(mouths / "data", root / "endless", "--epochs", 100_000),
    ]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--standalone"]
    process = subprocess.Popen([*torchrun, "--", "ranks.py", str(ROOT), json.dumps(trainings)], cwd=root,
                               text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    out = []
    for line in process.stdout:
        out.append(line)
        if re.match("epoch +3/100000 ", line):
            break
    else:
        pytest.fail("".join(out))
    workers = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True).stdout.split()
    os.kill(int(workers[-1]), signal.SIGKILL)
    process.communicate(timeout=120)
    return root, "".join(out), process.returncode


posix = pytest.mark.skipif(os.name == "nt", reason="needs POSIX signals")


@posix
def test_two_processes_train_as_well_as_one_and_write_once(job):
    root, out, _ = job
    assert out.count("kept the best epoch, ") == 2 and "2 processes" in out  # once for "usual" and "resumed"
    assert len(list((root / "usual" / "logs").iterdir())) == 1
    about = json.loads((root / "usual" / "models" / "model.json").read_text())
    assert about["images"] == {"train": 32, "val": 8} and about["best"]["val_acc"] == 1.0


@posix
def test_a_run_resumed_by_two_processes_ends_with_the_same_bits(job):
    root, out, _ = job
    assert "all finished epochs are saved" in out
    usual, resumed = (weights(root / name / "models" / "checkpoint.pt") for name in ("usual", "resumed"))
    for part in ("model", "kept"):
        assert all(torch.equal(usual[part][key], resumed[part][key]) for key in usual[part])
    assert usual["history"] == resumed["history"]


@posix
def test_processes_share_gradients_statistics_and_the_counts_of_the_classes(job):
    root = job[0]
    first, second = (weights(root / f"rank{rank}.pt") for rank in (0, 1))
    assert all(torch.equal(first[key], second[key]) for key in first)
    saved = weights(root / "rare" / "models" / "checkpoint.pt")["kept"]
    assert all(torch.equal(first[key], saved[key]) for key in first)


@posix
def test_a_killed_process_ends_the_run_and_leaves_a_checkpoint_to_resume(job):
    root, _, status = job
    assert status != 0
    models = root / "endless" / "models"
    done = len(torch.load(models / "checkpoint.pt", weights_only=True)["history"])
    assert done >= 1 and load_model(models / "model.pt").classes == ("bright", "dark")


def test_settings_that_cannot_work_are_one_clear_error(inside, mouths, tmp_path):
    error = "error: data/train: no such folder; 'python split_train_val.py' makes it"
    assert error in inside("train.py", check=1).stderr.replace("\\", "/")
    shutil.copytree(mouths / "data", tmp_path / "data")
    assert "no run to resume" in inside("train.py", "--resume", check=1).stderr
    for flags, why in (
        (("--device", "x\x1b[2J"), r"--device x\x1b[2J: this machine has "),
        (("--smoothing", 2), "--smoothing must be between 0 and 1"),
        (("--seed", 10**20), "--seed must be between"),
        (("--rotate", "nan"), "--rotate must be between 0 and 180"),
        (("--lr", -1), "--lr must be at least 1e-12"),
        (("--crop", 1, 0.5), "--crop: the smaller number first"),
        (("--net", "gone"), "argument --net: invalid choice: 'gone'"),
        (("--epochs", 0), "--epochs must be at least 1"),
    ):
        assert why in inside("train.py", *flags, check=2).stderr
    shutil.rmtree(tmp_path / "data" / "val" / "dark")
    assert (
        "all 16 crops of class dark are here, none in data/val; they belong together"
        in inside("train.py", check=1).stderr
    )
    shutil.rmtree(tmp_path / "data" / "train" / "dark")
    assert "only one class, bright" in inside("train.py", check=1).stderr
    (tmp_path / "data" / "val" / "bright" / "broken.jpg").write_bytes(b"nothing")
    shutil.copytree(mouths / "data" / "train" / "dark", tmp_path / "data" / "train" / "dark")
    shutil.copytree(mouths / "data" / "val" / "dark", tmp_path / "data" / "val" / "dark")
    assert "broken.jpg: unreadable: " in inside("train.py", check=1).stderr


def test_a_loss_that_is_no_number_ends_the_run_with_advice_and_keeps_the_best(run, tmp_path):
    run("--epochs", 2)
    before = (tmp_path / "models" / "model.pt").read_bytes()
    with pytest.raises(SystemExit, match="no longer a number; try a lower --lr"):
        run("--epochs", 5, "--lr", 1e30)
    assert (tmp_path / "models" / "model.pt").read_bytes() == before
