"""The networks, and what travels with them: class names, sizes, normalisation, loading, export.

A network of your own is a class like `simpleconv3` and a line in `NETWORKS`: train.py --net NAME trains it.

In other code:

    from net import load_model, predict
    model = load_model("models/model.pt")
    probabilities = predict(model, [crop])        # crop: a mouth, any size, RGB
    print(model.classes[probabilities[0].argmax()])

On the command line:
    python net.py models/model.pt                         layers, classes and scores
    python net.py models/model.pt --export model.onnx     for other languages and runtimes
"""

import argparse
import contextlib
import hashlib
import io
import json
import pickle
import re
import warnings
import zipfile
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn

CLASSES = ("0none", "1pouting", "2smile", "3openmouth")
CROP_SIZE = 48  # side of the network's input in pixels
MEAN = STD = 0.5  # of every RGB channel, on a scale of 0 to 1
OPSET = 13  # of exported models: low, for old runtimes
CALIBRATION_IMAGES = 200  # with fewer for validation a temperature would be fitted to chance
CALIBRATION_ERROR = 0.02  # up to here no temperature is needed

MODEL = Path("models/model.pt")  # what train.py writes
PRETRAINED = Path(__file__).resolve().parent / "models" / "pretrained.pt"  # what comes with the project


# --- the networks


class simpleconv3(nn.Module):
    """Three strided convolutions and three linear layers: 1.6 million weights.

    Parameters
    ----------
    nclass : int
        Number of classes, at least 1.

    Notes
    -----
    The attribute names are the keys of the state dict. They, and all shapes, are those of the
    textbook's network of the same name, so its checkpoints load here and ours load there.
    """

    def __init__(self, nclass):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 12, 3, 2)
        self.bn1 = nn.BatchNorm2d(12)
        self.conv2 = nn.Conv2d(12, 24, 3, 2)
        self.bn2 = nn.BatchNorm2d(24)
        self.conv3 = nn.Conv2d(24, 48, 3, 2)
        self.bn3 = nn.BatchNorm2d(48)
        self.fc1 = nn.Linear(48 * 5 * 5, 1200)
        self.fc2 = nn.Linear(1200, 128)
        self.fc3 = nn.Linear(128, nclass)

    def forward(self, x):
        """Logits, float tensor N x nclass, of inputs N x 3 x 48 x 48 in [-1, 1], any memory format."""
        x = F.relu(self.bn1(self.conv1(x)))
        x = F.relu(self.bn2(self.conv2(x)))
        x = F.relu(self.bn3(self.conv3(x)))
        x = F.relu(self.fc1(x.flatten(1)))
        return self.fc3(F.relu(self.fc2(x)))


class Block(nn.Module):
    """Two 3 x 3 convolutions beside a short cut, after He et al. 2016, "Deep residual learning"."""

    def __init__(self, before, after):
        super().__init__()
        self.conv1 = nn.Conv2d(before, after, 3, 2, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(after)
        self.conv2 = nn.Conv2d(after, after, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(after)
        self.short = nn.Sequential(nn.Conv2d(before, after, 1, 2, bias=False), nn.BatchNorm2d(after))

    def forward(self, x):
        return F.relu(self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x))))) + self.short(x))


class smallresnet(nn.Module):
    """Four residual blocks and a mean over what is left of the image: 0.7 million weights."""

    def __init__(self, nclass):
        super().__init__()
        self.blocks = nn.Sequential(Block(3, 24), Block(24, 48), Block(48, 96), Block(96, 192))
        self.fc = nn.Linear(192, nclass)

    def forward(self, x):
        """Logits, float tensor N x nclass, of inputs N x 3 x 48 x 48 in [-1, 1]."""
        return self.fc(self.blocks(x).mean((2, 3)))


# What train.py --net can train: each is called with the number of classes, takes N x 3 x 48 x 48 in [-1, 1],
# and gives the logits by the nn.Linear that it made last. model.json records the name.
NETWORKS = {"simpleconv3": simpleconv3, "smallresnet": smallresnet}


def new_network(name, classes):
    """A network of `NETWORKS` with random weights.

    Parameters
    ----------
    name : str
    classes : sequence of str

    Returns
    -------
    nn.Module
        ``network`` is the name, ``classes`` a tuple of the names in the order of the logits, ``about`` the
        content of the JSON file beside the weights and ``path`` the file that `load_model` read: {} and None.
    """
    net = NETWORKS[name](len(classes))
    if not last_layer(net) or last_layer(net)[1].out_features != len(classes):
        raise ValueError(f"network {name}: the nn.Linear that __init__ makes last must give the logits, "
                         "one a class")
    net.network, net.classes, net.about, net.path = name, tuple(classes), {}, None
    return net


def last_layer(net):
    """The name and the layer of a network that give the logits: the nn.Linear that it made last, or None."""
    linear = [(name, layer) for name, layer in net.named_modules() if isinstance(layer, nn.Linear)]
    return linear[-1] if linear else None


def features(net, images):
    """What the last layer of a network sees of network inputs N x 3 x 48 x 48: float tensor N x width."""
    seen = []
    hook = last_layer(net)[1].register_forward_pre_hook(lambda _, inputs: seen.extend(inputs))
    try:
        net(images)
    finally:
        hook.remove()
    return seen[0]


# --- from a crop to the network's input


def square(image, size=CROP_SIZE):
    """Resize the shorter side to `size` and keep the central square.

    The same pixels as torchvision's ``Resize(size)`` and ``CenterCrop(size)`` on a PIL image.

    Parameters
    ----------
    image : PIL.Image.Image or uint8 array of shape (H, W, 3), (H, W, 1) or (H, W)
        A mouth crop. Grey becomes RGB with three equal channels.
    size : int
        Side of the result in pixels.

    Returns
    -------
    uint8 tensor of shape (3, size, size)

    Raises
    ------
    ValueError
        `image` is an array of another type or shape.
    """
    if not isinstance(image, Image.Image):
        image = np.asarray(image)
        if image.ndim == 3 and image.shape[2] == 1:
            image = image[..., 0]
        if image.dtype != np.uint8 or image.ndim != 2 and image.shape[2:] not in ((3,), (4,)):
            what = "text" if image.dtype.kind == "U" else f"{image.dtype} of shape {image.shape}"
            raise ValueError(f"a crop is {what}, not a PIL image or a uint8 array H x W x 3; "
                             "preprocess_lips.read_photo reads files")
        image = Image.fromarray(image)
    width, height = image.size
    short = min(width, height)
    if max(width, height) > 32 * short:  # enlarged, a strip would fill gigabytes, and only its middle is kept
        left, top = max(0, width // 2 - 8 * short), max(0, height // 2 - 8 * short)
        image = image.crop((left, top, width - left, height - top))
        width, height = image.size
    width, height = int(size * width / short), int(size * height / short)
    image = image.convert("RGB").resize((width, height), Image.Resampling.BILINEAR)
    left, top = round((width - size) / 2), round((height - size) / 2)
    image = image.crop((left, top, left + size, top + size))
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def normalize(images):
    """Grey levels to network input: (x / 255 - 0.5) / 0.5.

    Parameters
    ----------
    images : uint8 or float tensor, values 0 to 255

    Returns
    -------
    float32 tensor of the same shape and memory format, values -1 to 1
    """
    return (images * (1 / (255 * STD))).sub_(MEAN / STD)


# --- prediction


class Probabilities(nn.Module):
    """A model from grey levels to probabilities: what `predict` computes and `export_onnx` writes.

    Parameters
    ----------
    model : nn.Module
        Its ``about`` may hold a ``temperature``, by which the logits are divided.
    """

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, levels):
        """Class probabilities, float tensor N x nclass, of grey levels N x 3 x 48 x 48, 0 to 255."""
        logits = self.model(normalize(levels).to(next(self.model.parameters()).dtype))
        return (logits.float() / getattr(self.model, "about", {}).get("temperature", 1.0)).softmax(1)


@torch.inference_mode()
def predict(model, crops):
    """Class probabilities of mouth crops.

    Parameters
    ----------
    model : nn.Module
        In eval mode, as `load_model` returns it; in half precision or in ``DataParallel``, too.
    crops : sequence of PIL images or uint8 arrays (H, W, 3) in RGB or (H, W), any sizes

    Returns
    -------
    float32 tensor of shape (len(crops), nclass) on the CPU, rows that sum to 1

    Raises
    ------
    ValueError
        `crops` is a single image, or holds what is no image.
    """
    if getattr(crops, "ndim", 4) < 4 or isinstance(crops, Image.Image):
        raise ValueError("crops is one image; predict takes a list of them")
    model = getattr(model, "module", model)
    if not len(crops):
        return torch.empty(0, last_layer(model)[1].out_features)
    batch = torch.stack([square(crop) for crop in crops]).to(next(model.parameters()).device)
    return Probabilities(model)(batch).cpu()


# --- scores


def confusion_matrix(predicted, labels, nclass):
    """Counts, float nclass x nclass: rows are true classes, columns predicted ones."""
    return torch.bincount(labels * nclass + predicted, minlength=nclass**2).view(nclass, nclass).float()


def reliability(probabilities, labels, bins=15):
    """How sure a model is and how often it is right, over bins of its confidence.

    Of probabilities N x nclass and labels N: sums of confidence and of right answers, and counts, 3 x bins.
    """
    confidence, predicted = probabilities.max(1)
    place = (confidence * bins).long().clamp(max=bins - 1)
    rows = torch.stack([confidence, (predicted == labels).float(), torch.ones_like(confidence)])
    return torch.zeros(3, bins, device=rows.device).index_add(1, place, rows)


def calibration_error(probabilities, labels):
    """Expected calibration error: mean distance of confidence and accuracy over the bins of `reliability`.

    0 (as sure as right) to 1. After Guo et al. 2017, "On Calibration of Modern Neural Networks".
    """
    confidence, right, _ = reliability(probabilities, labels)
    return float((right - confidence).abs().sum() / len(labels))


def fit_temperature(logits, labels):
    """The number by which logits must be divided so that their softmax fits the labels best: 0.2 to 5.

    From the same paper; the cross-entropy is computed for 200 temperatures and the best one taken.
    """
    logits, labels = logits.cpu(), labels.cpu()  # Apple's devices have no logspace
    temperatures = torch.logspace(-0.7, 0.7, 200)
    losses = torch.stack([F.cross_entropy(logits / t, labels) for t in temperatures])
    return float(temperatures[losses.argmin()])


def calibrate(logits, labels):
    """Calibration error of logits, and the temperature that mends it where it is large: dict."""
    error = calibration_error(logits.softmax(1), labels)
    fit = len(labels) >= CALIBRATION_IMAGES and error > CALIBRATION_ERROR
    return {"calibration_error": round(error, 4),
            "temperature": round(fit_temperature(logits, labels), 4) if fit else 1.0}


def balanced(matrix):
    """Mean of the classes' recalls, from a confusion matrix: 0 to 1."""
    return float((matrix.diagonal() / matrix.sum(1)).mean())


def scores_of(matrix, classes):
    """Precision, recall, F1 and number of images of every class: dict of name to dict.

    `matrix` is a confusion matrix, rows true, columns predicted. What has no denominator is None.
    """
    matrix = np.asarray(matrix)
    hits, true, named = matrix.diagonal(), matrix.sum(1), matrix.sum(0)

    def ratio(a, b):
        return round(float(a / b), 4) if b else None

    return {name: {"precision": ratio(hit, n), "recall": ratio(hit, t), "f1": ratio(2 * hit, t + n),
                   "images": int(t)} for name, hit, t, n in zip(classes, hits, true, named)}


# --- saving


def fingerprint(weights):
    """A hash of a state dict's values: 16 letters, the same for the same weights, whoever saved them."""
    sha1 = hashlib.sha1()
    for key in sorted(weights):
        sha1.update(key.encode() + weights[key].detach().cpu().float().contiguous().numpy().tobytes())
    return sha1.hexdigest()[:16]


def save_model(net, path, **about):
    """Write the weights to `path` as a plain state dict and everything else to the JSON file beside it.

    Parameters
    ----------
    net : nn.Module
        Its ``network`` and ``classes``, as `new_network` gives them, go into the JSON.
    path : path-like
        Usually ``models/model.pt``; the JSON is then ``models/model.json``.
    **about
        What a user of the model may ask: scores, the command that made it. Must fit in JSON.

    Raises
    ------
    OSError
        It cannot be written. The message names the file.
    """
    from preprocess_lips import write_file  # here: whoever only loads models needs this file alone

    path, data = Path(path), io.BytesIO()
    weights = {key: value.detach().cpu().contiguous() for key, value in net.state_dict().items()}
    torch.save(weights, data)
    beside, classes, hashes = path.with_suffix(".json"), list(class_names(net)), [fingerprint(weights)]
    with contextlib.suppress(OSError, ValueError):  # until the weights are written, these are there
        before = read_about(beside)
        hashes += before.get("weights", [])[:1] if before["classes"] == classes else []
    about = {"classes": classes, "network": getattr(net, "network", "simpleconv3"), "weights": hashes,
             "input_size": CROP_SIZE, "mean": MEAN, "std": STD, "channels": "RGB"} | about
    write_file(beside, (json.dumps(about, indent=2, ensure_ascii=False) + "\n").encode())
    write_file(path, data.getvalue())


def class_names(net):
    """The names of a network's classes; those of the textbook's task, or numbers, where nobody named them."""
    n = last_layer(net)[1].out_features
    return getattr(net, "classes", CLASSES if n == len(CLASSES) else tuple(map(str, range(n))))


def export_onnx(model, path):
    """Write a model in the ONNX format: grey levels in, class probabilities out, as `predict` gives them.

    The input ``levels`` is float32 N x 3 x 48 x 48, RGB, 0 to 255: the graph normalises. The output
    ``probabilities`` is float32 N x nclass. The metadata says so, and names the classes (a JSON list).

    Parameters
    ----------
    model : nn.Module
        In eval mode, as `load_model` returns it.
    path : path-like

    Raises
    ------
    ImportError
        The package onnx is not installed.
    """
    from preprocess_lips import write_file

    try:
        import onnx
    except ImportError:
        raise ImportError("exporting needs one more package; 'pip install onnx' brings it") from None
    levels = torch.zeros(2, 3, CROP_SIZE, CROP_SIZE, device=next(model.parameters()).device)
    graph = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch recommends its newer exporter, which needs more packages
        torch.onnx.export(
            Probabilities(model).eval(), (levels,), graph, dynamo=False, opset_version=OPSET,
            input_names=["levels"], output_names=["probabilities"],
            dynamic_axes={"levels": {0: "N"}, "probabilities": {0: "N"}})
    graph = onnx.load_from_string(graph.getvalue())
    onnx.helper.set_model_props(graph, {
        "classes": json.dumps(class_names(model), ensure_ascii=False),
        "input_size": str(CROP_SIZE),
        "channels": "RGB",
        "input": "grey levels, 0 to 255",
        "normalisation": f"in the graph, mean {MEAN} and std {STD} of levels / 255",
        "opset": str(OPSET),
    })
    write_file(path, graph.SerializeToString())


# --- loading: weights and JSON may come from a stranger

MAX_JSON = 2**20  # bytes; ours has about 1,000

# Training scripts put the state dict into a larger dict under one of these names; train.py's is the first.
WRAPPED = ("kept", "state_dict", "model_state_dict", "model", "net", "weights")
# DataParallel, torch.compile, Lightning and AveragedModel put these before its keys.
PREFIXES = re.compile(r"^((module|_orig_mod|model|net)\.)+")

# empty, . or .., a control character, a separator, half a surrogate pair, or too long for a folder's name
NO_CLASS_NAME = re.compile(r"^\.{0,2}$|[\0-\x1f\x7f-\x9f/\\\ud800-\udfff]|.{256}", re.S)


def printable(text):
    """The text with control characters, and those that turn the direction of writing, as escapes."""
    return "".join(c if c.isprintable() or c in "\u200c\u200d" else ascii(c)[1:-1] for c in text)


def reason(error):
    """What an error says, in one printable line of at most 200 characters; its name where it says nothing."""
    return printable(" ".join(str(error).split()))[:200] or type(error).__name__


def check_classes(names):
    """Raise a ValueError for the first class name that no folder can have, or that occurs twice."""
    seen = set()
    for i, name in enumerate(names):
        if not isinstance(name, str) or NO_CLASS_NAME.search(name):
            raise ValueError(f"class {i} is {ascii(name)[:40]}, which no folder can be called")
        if name in seen:
            raise ValueError(f"there are two classes {ascii(name)}")
        seen.add(name)


def load_pickle(data):
    """What ``torch.save`` wrote into these bytes: nothing is executed, and memory stays below their number.

    Raises
    ------
    ValueError, or almost anything else
        They are something else.
    """
    if data.startswith(b"PK\3\4"):
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            entries = archive.infolist()
        # torch.save compresses nothing: entries that unpack to more than the file are a bomb
        if any(e.compress_type for e in entries) or sum(e.file_size for e in entries) > len(data):
            raise ValueError("a compressed archive")
    try:
        if b"bytearray\n" in data:  # torch.load lets a pickle ask for one of any size
            raise pickle.UnpicklingError
        return torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:  # whose message recommends weights_only=False
        raise ValueError("damaged, or holds more than tensors, such as a whole model") from None


def read_weights(path, like):
    """The state dict of a network in a file that may come from a stranger.

    Parameters
    ----------
    path : path-like
        What ``torch.save`` wrote: a state dict, or a dict that holds one, such as a checkpoint.
    like : nn.Module
        A network of the kind that it claims to be, with any number of classes.

    Returns
    -------
    dict of str to tensor
        Finite values, any number of classes; what else it must look like, ``load_state_dict`` says.

    Raises
    ------
    ValueError, or almost anything else
        It is no such file.
    """
    size = sum(4 * value.numel() for value in like.state_dict().values())
    most = 4 * 2**20 + 5 * size  # bytes: room for many classes, and for what else a checkpoint holds
    with open(path, "rb") as file:
        data = file.read(most + 1)
    if len(data) > most:
        raise ValueError(f"larger than {most >> 20} MiB; of a checkpoint, save the state dict alone")
    weights = load_pickle(data)
    while isinstance(weights, dict):
        inner = [weights[key] for key in WRAPPED if isinstance(weights.get(key), dict)]
        if not inner:
            break
        weights = inner[0]
    if not isinstance(weights, dict):
        raise ValueError(f"a {type(weights).__name__}, where a dict of tensors belongs")
    weights = {PREFIXES.sub("", str(key)): value for key, value in weights.items() if key != "n_averaged"}
    for key, value in weights.items():
        if not isinstance(value, torch.Tensor):
            raise ValueError(f"{key} is {type(value).__name__}, where a tensor belongs")
        if not (value.is_floating_point() or key.endswith("num_batches_tracked")):
            raise ValueError(f"{key} is {value.dtype}")
    # a tensor can be larger than what it is a view of
    if sum(4 * value.numel() for value in weights.values()) > most:
        raise ValueError(f"tensors of more than {most >> 20} MiB")
    for key, value in weights.items():
        if not value.float().isfinite().all() or key.endswith("running_var") and (value < 0).any():
            raise ValueError(f"{key} holds what is no weight: not finite, or a negative variance")
    return weights


def read_about(path):
    """The JSON file beside a model: dict; classes, network, weights and temperature are valid.

    Raises
    ------
    ValueError
        It is no such file. The message names it.
    """
    try:
        if not path.is_file():
            raise ValueError("it is no file")
        with open(path, "rb") as file:
            data = file.read(MAX_JSON + 1)
        if len(data) > MAX_JSON:
            raise ValueError(f"larger than {MAX_JSON >> 20} MiB")
        about = json.loads(data)  # in any Unicode encoding, with the mark that editors put before it
        if not isinstance(about, dict) or not isinstance(about.get("classes"), list):
            raise ValueError("no list of classes")
        check_classes(about["classes"])
        if about.get("network", "simpleconv3") not in list(NETWORKS):
            raise ValueError(f"network {ascii(about['network'])[:40]} is not in net.NETWORKS, which has "
                             + ", ".join(NETWORKS))
        if not isinstance(about.get("weights", []), list):
            raise ValueError("weights must be a list of their hashes")
        temperature = about.get("temperature", 1.0)
        if type(temperature) not in (int, float) or not 0.01 <= temperature <= 100:
            raise ValueError("temperature must be a number between 0.01 and 100")
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not the JSON file of a model ({printable(str(error))}); "
                         "remove it to load the weights without names") from None
    return about


def default_model():
    """The weights to take where none are named: your own, here or beside this file, else the project's."""
    own = MODEL, Path(__file__).resolve().parent / MODEL
    return next((path for path in own if path.exists()), PRETRAINED)


def load_model(path=None, device="cpu"):
    """Read weights and, where there is one, the JSON file beside them. Both may come from a stranger.

    Parameters
    ----------
    path : path-like, optional
        A state dict of a network: ours, the textbook's, or one that another program wrapped in a checkpoint
        or in ``DataParallel``. Default: `default_model`, with a warning where that is `PRETRAINED`.
    device : str or torch.device

    Returns
    -------
    nn.Module
        In eval mode, as `new_network` makes it: of the kind that the JSON file names, without one a
        `simpleconv3` whose classes are `CLASSES`, if it has four, or numbers.

    Raises
    ------
    FileNotFoundError
        There is no such file.
    ValueError
        It is not a state dict of that network, or the JSON file is not of this model.
    """
    if not path and (path := default_model()) == PRETRAINED:
        warnings.warn(f"no {MODEL} here: took {PRETRAINED}, which comes with the project", stacklevel=2)
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(
            f"{path}: {'not a file' if path.exists() else 'no such model'}; 'python train.py' makes one")
    beside = path.with_suffix(".json")
    about = read_about(beside) if beside != path and beside.exists() else {}
    name = about.get("network", "simpleconv3")
    try:
        like = NETWORKS[name](1)
        weights, last = read_weights(path, like), last_layer(like)[0] + ".weight"
        if last not in weights or weights[last].shape[1:] != last_layer(like)[1].weight.shape[1:]:
            raise ValueError(f"it has no {last}, or one of another shape")
        if not len(weights[last]):
            raise ValueError("no classes")
        net = NETWORKS[name](len(weights[last]))
        net.load_state_dict(weights)
    except Exception as error:  # torch.load raises almost anything on a file that it did not write
        raise ValueError(f"{path}: not a state dict of {name} ({reason(error)}); "
                         "'python train.py' makes one") from None
    if about:
        check_beside(beside, about, path, weights, last_layer(net)[1].out_features)
    net.network, net.about, net.path = name, about, path
    net.classes = tuple(about["classes"]) if about else class_names(net)
    return net.to(device).eval()


def check_beside(beside, about, path, weights, nclass):
    """Raise a ValueError where the JSON file beside a model is another model's."""
    if len(about["classes"]) != nclass:
        raise ValueError(f"{beside}: names {len(about['classes'])} classes, "
                         f"but the weights beside it have {nclass}")
    if about.get("weights") and fingerprint(weights) not in about["weights"]:
        raise ValueError(f"{beside}: belongs to other weights than {path}; copy the JSON file of these, too, "
                         "or remove that one to load them without names")


# --- the command line


def layer_table(net):
    """Text: every layer with its kind, output shape and number of parameters."""
    from tabulate import tabulate  # here: it takes 0.2 s to load, and train.py prints no table

    rows, hooks = [], []
    for name, layer in net.named_children():
        def note(layer, inputs, output, name=name):
            count = sum(p.numel() for p in layer.parameters())
            rows.append((name, type(layer).__name__, " x ".join(map(str, output.shape[1:])), f"{count:,}"))
        hooks.append(layer.register_forward_hook(note))
    with torch.inference_mode():
        net.eval()(torch.zeros(1, 3, CROP_SIZE, CROP_SIZE))
    for hook in hooks:
        hook.remove()
    rows.append(("total", "", "", f"{sum(p.numel() for p in net.parameters()):,}"))
    return tabulate(
        rows, ("layer", "kind", "output", "parameters"), "plain", disable_numparse=True,
        colalign=("left", "left", "right", "right"))


def main(argv=None):
    from preprocess_lips import command_line

    title, own, *_, examples = __doc__.split("\n\n")
    parser = argparse.ArgumentParser(description=f"{title}\n\n{own}", epilog=examples,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "model", nargs="?", type=Path, help="weights to show; without: a new four-class network")
    parser.add_argument(
        "--export", type=Path, metavar="FILE",
        help=f"write the model as ONNX, opset {OPSET}: RGB levels N x 3 x {CROP_SIZE} x {CROP_SIZE}, "
             "0 to 255, to probabilities")
    args = parser.parse_args(argv)
    if args.export and not args.model:
        parser.error("--export needs a model")
    if args.export and args.export.resolve() == args.model.resolve():
        parser.error("--export would replace the weights; name another file")
    with command_line("nothing is written"):
        net = load_model(args.model) if args.model else new_network("simpleconv3", CLASSES)
        if args.export:
            export_onnx(net, args.export)
        print_model(net)
        if args.export:
            print("exported:", printable(str(args.export)))


def print_model(net):
    """Print a network's layers, classes, and what its JSON file says."""
    print(f"input: N x 3 x {CROP_SIZE} x {CROP_SIZE}, RGB, (x / 255 - {MEAN}) / {STD}")
    print(layer_table(net))
    print("network:", net.network)
    print("classes:", printable(", ".join(net.classes)))
    for key, value in net.about.items():
        if key not in {"classes", "network", "weights", "input_size", "mean", "std", "channels"}:
            print(printable(f"{key}: {json.dumps(value, ensure_ascii=False)}"))


if __name__ == "__main__":
    main()
