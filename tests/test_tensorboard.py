"""What a run leaves for TensorBoard, read back."""

import io
import json
import re
import shutil
import time

import numpy as np
import pytest
import torch
from conftest import train_flags
from google.protobuf import text_format
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.backend.event_processing.event_file_loader import LegacyEventFileLoader
from tensorboard.plugins.custom_scalar import layout_pb2
from tensorboard.plugins.hparams import plugin_data_pb2
from tensorboard.plugins.projector.projector_config_pb2 import ProjectorConfig
from tensorboard.util.tensor_util import make_ndarray

import train
from train import main


def fit(data, folder, *args):
    """Trains in a folder; returns the folder of its curves, which must be the only one."""
    main(train_flags(data, folder, *args))
    (log,) = (folder / "logs").iterdir()
    return log


def read(log):
    events = EventAccumulator(str(log), {"scalars": 0, "images": 0, "histograms": 0, "tensors": 0})
    events.Reload()
    return events


def values(events, tag):
    return [(e.step, e.value) for e in events.Scalars(tag)]


@pytest.fixture(scope="module")
def finished(mouths, tmp_path_factory):
    """A whole run of 25 epochs, its confusion matrices, and what was predicted at its end."""
    seen, real = [], train.evaluate

    def evaluate(*args, **more):
        seen.append(real(*args, **more))
        return seen[-1]

    train.evaluate = evaluate
    try:
        folder = tmp_path_factory.mktemp("finished")
        log = fit(mouths / "data", folder, "--recipe", "strong", "--epochs", 25)
    finally:
        train.evaluate = real
    return log, read(log), [matrix for _, matrix, _ in seen], seen[-1][2]


def test_the_runs_folder_sorts_by_time_names_the_recipe_and_has_no_other_runs_in_it(finished):
    log = finished[0]
    assert re.fullmatch(r"\d{4}-\d\d-\d\d_\d\d-\d\d-\d\d_strong", log.name)
    assert sorted(
        p.relative_to(log).as_posix() for p in log.rglob("*") if p.is_file() and "tfevents" not in p.name
    ) == [
        "00025/features/metadata.tsv",
        "00025/features/sprite.png",
        "00025/features/tensors.tsv",
        "projector_config.pbtxt",
    ]
    assert len(list(log.parent.rglob("*tfevents*"))) == 1


def test_every_scalar_comes_once_an_epoch_and_recalls_are_the_matrixs_diagonal(finished):
    _, events, matrices, _ = finished
    for tag in (
        "data/trainloss",
        "data/trainacc",
        "data/valloss",
        "data/valacc",
        "data/valbalanced",
        "learning rate",
    ):
        assert [step for step, _ in values(events, tag)] == list(range(1, 26))
    for i, name in enumerate(("bright", "dark")):
        steps, recalls = zip(*values(events, f"recall/{name}"))
        assert steps == tuple(range(1, 26))
        assert recalls == pytest.approx([float(matrix[i, i] / matrix[i].sum()) for matrix in matrices])
    assert values(events, "data/valacc")[9][1] == pytest.approx(
        float(matrices[9].trace() / matrices[9].sum())
    )


def test_one_layout_draws_training_and_validation_together(finished):
    _, events, _, _ = finished
    layout = layout_pb2.Layout.FromString(
        events.Tensors("custom_scalars__config__")[0].tensor_proto.string_val[0]
    )
    charts = {
        chart.title: list(chart.multiline.tag) for category in layout.category for chart in category.chart
    }
    assert charts["loss"] == ["data/trainloss", "data/valloss"]
    assert charts["accuracy"] == ["data/trainacc", "data/valacc", "data/valbalanced"]
    for patterns in charts.values():
        for pattern in patterns:
            assert any(re.fullmatch(pattern, tag) for tag in events.Tags()["scalars"])


def test_what_is_heavy_comes_about_ten_times_and_at_the_last_epoch(finished):
    _, events, _, logits = finished
    points = [3, 6, 9, 12, 15, 18, 21, 24, 25]
    assert [e.step for e in events.Images("how well the kept weights do")] == [25]
    assert [e.step for e in events.Histograms("fc1/weight")] == points
    assert [e.step for e in events.Images("augmented training crops")] == [0] and events.Graph().node
    curve = events.Tensors("precision and recall/dark")
    assert [e.step for e in curve] == points
    # at the threshold of 0 all images are taken for the class: 4 true and 4 false positives
    true_positives, false_positives = make_ndarray(curve[-1].tensor_proto)[:2]
    assert (true_positives[0], false_positives[0]) == (4, 4)
    middle = int((logits.softmax(1)[4:, 1] * 126 >= 63).sum())  # labels are sorted: the last 4 are dark
    assert true_positives[63] == middle


def test_a_histogram_of_some_weights_has_the_form_of_all(finished):
    log, events, _, _ = finished
    weights = torch.load(log.parent.parent / "models" / "checkpoint.pt", weights_only=True)["model"][
        "fc1.weight"
    ]
    histogram = events.Histograms("fc1/weight")[-1].histogram_value
    assert histogram.num == 10_000
    assert histogram.sum / histogram.num == pytest.approx(
        float(weights.mean()), abs=3 * float(weights.std()) / 100
    )
    assert (histogram.sum_squares / histogram.num) ** 0.5 == pytest.approx(
        float(weights.square().mean().sqrt()), rel=0.05
    )


def hparams(log):
    """The settings of a run and whether it was marked as finished, from the raw events."""
    found = {}
    for file in log.glob("*tfevents*"):
        for event in LegacyEventFileLoader(str(file)).Load():
            for value in event.summary.value:
                if value.metadata.plugin_data.plugin_name == "hparams":
                    found[value.tag] = plugin_data_pb2.HParamsPluginData.FromString(
                        value.metadata.plugin_data.content
                    )
    settings = found["_hparams_/session_start_info"].session_start_info.hparams
    return {
        key: value.WhichOneof("kind") and getattr(value, value.WhichOneof("kind"))
        for key, value in settings.items()
    }, "_hparams_/session_end_info" in found


def test_settings_and_best_scores_stand_in_the_run_itself(finished):
    log, events, _, _ = finished
    settings, ended = hparams(log)
    assert (
        ended
        and settings["recipe"] == "strong"
        and settings["epochs"] == 25
        and settings["flip"] == "True"
        and settings["keep"] == "last"
    )
    assert not {"data", "logs", "models", "resume"} & set(settings)
    best = json.loads((log.parent.parent / "models" / "model.json").read_text("utf-8"))["best"]
    for key in ("val_acc", "val_balanced", "val_loss"):
        assert values(events, f"run/best_{key}")[-1] == (25, pytest.approx(best[key]))
    assert min(events.Tags()["scalars"]).startswith("data/")  # which TensorBoard shows first
    seconds = [value for _, value in values(events, "run/seconds")]
    assert seconds == sorted(seconds) and seconds[0] > 0


def test_the_projector_finds_a_row_a_label_and_a_picture_for_every_image(finished, mouths):
    log, _, _, logits = finished
    (about,) = text_format.Parse(
        (log / "projector_config.pbtxt").read_text("utf-8"), ProjectorConfig()
    ).embeddings
    features = np.loadtxt(log / about.tensor_path, delimiter="\t")
    rows = [line.split("\t") for line in (log / about.metadata_path).read_text("utf-8").splitlines()]
    assert (
        features.shape == (8, 128)
        and rows[0] == ["true", "predicted", "probability", "right"]
        and len(rows) == 9
    )
    probabilities = logits.softmax(1)
    for row, true, p in zip(rows[1:], ["bright"] * 4 + ["dark"] * 4, probabilities):
        assert row == [
            true,
            ("bright", "dark")[int(p.argmax())],
            f"{float(p.max()):.3f}",
            "yes" if row[0] == row[1] else "no",
        ]
    sprite = np.asarray(Image.open(log / about.sprite.image_path))
    assert list(about.sprite.single_image_dim) == [48, 48] and sprite.shape == (144, 144, 3)
    images = train.load_data(mouths / "data").val_images.permute(0, 2, 3, 1).numpy()
    assert np.array_equal(sprite[48:96, 96:144], images[5]) and not sprite[96:, 96:].any()


def test_a_resumed_run_goes_on_in_the_same_folder_without_a_gap_or_a_double(mouths, tmp_path, ctrl_c):
    with ctrl_c(6):
        fit(mouths / "data", tmp_path, "--epochs", 10)
    (log,) = (tmp_path / "logs").iterdir()
    assert not hparams(log)[1] and not (log / "projector_config.pbtxt").exists()
    time.sleep(1.1)  # within a second TensorBoard orders files by a counter, as text: 10 before 9
    assert fit(mouths / "data", tmp_path, "--resume") == log
    events = read(log)
    for tag in ("data/valacc", "recall/dark", "run/best_val_acc"):
        assert [step for step, _ in values(events, tag)] == list(range(1, 11))
    assert [e.step for e in events.Images("how well the kept weights do")] == [5, 10]
    assert (
        len(events.Tensors("custom_scalars__config__")) == 1
        and hparams(log)[1]
        and (log / "projector_config.pbtxt").exists()
    )


NAMES = ("a\u2028b", "笑\u202e", "x" * 60)


@pytest.mark.sheets
def test_names_of_classes_cannot_break_tags_tables_or_pictures(mouths, tmp_path):
    for part in ("train", "val"):
        for name in NAMES:
            shutil.copytree(mouths / "data" / part / "dark", tmp_path / "data" / part / name)
    log = fit(tmp_path / "data", tmp_path, "--epochs", 2)
    safe = ["a\\u2028b", "x" * 60, "笑\\u202e"]
    events = read(log)
    assert {f"recall/{name}" for name in safe} <= set(events.Tags()["scalars"])
    lines = (log / "00002" / "features" / "metadata.tsv").read_bytes().decode().split("\n")
    assert len(lines) == 14 and lines[-1] == "" and all(line.count("\t") == 3 for line in lines[:-1])
    assert {line.split("\t")[0] for line in lines[1:-1]} == set(safe)
    (sheet,) = events.Images("how well the kept weights do")
    assert Image.open(io.BytesIO(sheet.encoded_image_string)).width == 1300


@pytest.mark.sheets
def test_the_sheet_shows_the_surest_mistakes_first_and_any_number_of_classes():
    images = torch.randint(0, 256, (8, 3, 48, 48), dtype=torch.uint8)
    history = [{"epoch": i, "train_loss": 1, "train_acc": 0.5, "val_loss": 1, "val_acc": 0.5} for i in (1, 2)]
    for nclass in (2, 30, 70):
        labels = torch.arange(8) % nclass
        probabilities = torch.rand(8, nclass, generator=torch.Generator().manual_seed(0)).softmax(1)
        matrix = train.confusion_matrix(probabilities.argmax(1), labels, nclass)
        classes = [f"嘴 {i}" for i in range(nclass)]
        sheet = train.draw_sheet(
            history, 1, matrix, probabilities, images, labels, ["a/图.jpg"] * 8, classes)
        assert sheet.dtype == np.uint8 and sheet.shape[1:] == (1300, 3) and sheet.std() > 10
    figure = pytest.importorskip("matplotlib.figure").Figure()
    probabilities = torch.tensor([[0.6, 0.4], [0.1, 0.9], [0.3, 0.7], [0.0, 1.0]])
    train.draw_mistakes(figure, probabilities, images[:4], torch.tensor([1, 0, 0, 1]), list("wxyz"), "ab")
    titles = [axes.get_title() for axes in figure.axes]
    assert titles[:4] == ["b 90%\ntrue: a\nx", "b 70%\ntrue: a\ny", "a 60%\ntrue: b\nw", ""]


def test_weights_that_are_no_numbers_do_not_end_in_a_histograms_error(mouths, tmp_path):
    # one step an epoch: the second breaks the weights, which only the validation after it shows
    with pytest.raises(SystemExit, match="epoch 2: the loss is no longer a number; try a lower --lr"):
        fit(
            mouths / "data",
            tmp_path,
            "--epochs",
            10,
            "--lr",
            0.01,
            "--step-size",
            1,
            "--gamma",
            "1e30",
            "--batch-size",
            32,
        )
