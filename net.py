"""simpleconv3, the network, and what travels with it: class names, sizes, normalisation, loading, export.

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
import io
import json
import os
import pickle
import re
import secrets
import sys
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

MODEL = Path("models/model.pt")  # what train.py writes
PRETRAINED = Path(__file__).resolve().parent / "models" / "pretrained.pt"  # what comes with the project


# --- the network


class simpleconv3(nn.Module):
    """Three strided convolutions and three linear layers: 1.6 million weights.

    Parameters
    ----------
    nclass : int
        Number of classes, at least 1.

    Attributes
    ----------
    classes : tuple of str
        Names of the classes, in the order of the logits.
    about : dict
        Content of the JSON file beside the weights; empty for a new network.
    path : Path or None
        The file that `load_model` read.

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
        self.classes = CLASSES if nclass == len(CLASSES) else tuple(map(str, range(nclass)))
        self.about = {}
        self.path = None

    def features(self, x):
        """The 128 activations before the last layer: float tensor N x 128, at least 0."""
        x = F.relu(self.bn1(self.conv1(x)))
        x = F.relu(self.bn2(self.conv2(x)))
        x = F.relu(self.bn3(self.conv3(x)))
        x = F.relu(self.fc1(x.flatten(1)))
        return F.relu(self.fc2(x))

    def forward(self, x):
        """Logits, float tensor N x nclass, of inputs N x 3 x 48 x 48 in [-1, 1], any memory format."""
        return self.fc3(self.features(x))


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
            raise ValueError(f"a crop is {image.dtype} of shape {image.shape}, not uint8 of H x W x 3")
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
    model : simpleconv3
        Its ``about`` may hold a ``temperature``, by which the logits are divided.
    """

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, levels):
        """Class probabilities, float tensor N x nclass, of grey levels N x 3 x 48 x 48, 0 to 255."""
        logits = self.model(normalize(levels).to(self.model.fc3.weight.dtype))
        return (logits.float() / self.model.about.get("temperature", 1.0)).softmax(1)


@torch.inference_mode()
def predict(model, crops):
    """Class probabilities of mouth crops.

    Parameters
    ----------
    model : simpleconv3
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
        return torch.empty(0, len(model.classes))
    batch = torch.stack([square(crop) for crop in crops]).to(model.fc3.weight.device)
    return Probabilities(model)(batch).cpu()


# --- saving


def write_file(path, data):
    """Write bytes under a temporary name beside `path`, flush them to the disk, then rename.

    Whoever reads `path`, at any moment and after any crash, finds the old content or the new one, whole.

    Raises
    ------
    OSError
        It cannot be written. The message names the file.
    """
    path = Path(path)
    temporary = path.with_name(f".{secrets.token_hex(8)}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with open(temporary, "xb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
        except BaseException:
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)
            raise
    except OSError as error:  # a full disk's own message names no file
        why = error.strerror or error
        raise OSError(f"{path}: cannot be written ({why}); mend that and run the command again") from None
    if os.name == "posix":
        with contextlib.suppress(OSError):  # some network disks cannot flush a folder
            folder = os.open(path.parent, os.O_RDONLY)
            try:
                os.fsync(folder)
            finally:
                os.close(folder)


def save_model(net, path, **about):
    """Write the weights to `path` as a plain state dict and everything else to the JSON file beside it.

    Parameters
    ----------
    net : simpleconv3
        Its ``classes`` go into the JSON.
    path : path-like
        Usually ``models/model.pt``; the JSON is then ``models/model.json``.
    **about
        What a user of the model may ask: scores, the command that made it. Must fit in JSON.
    """
    path, weights = Path(path), io.BytesIO()
    torch.save({key: value.detach().cpu().contiguous() for key, value in net.state_dict().items()}, weights)
    about = {"classes": list(net.classes), "input_size": CROP_SIZE, "mean": MEAN, "std": STD,
             "channels": "RGB"} | about
    text = json.dumps(about, indent=2, ensure_ascii=False) + "\n"
    write_file(path, weights.getvalue())
    write_file(path.with_suffix(".json"), text.encode())


def export_onnx(model, path):
    """Write a model in the ONNX format: grey levels in, class probabilities out, as `predict` gives them.

    The input ``levels`` is float32 N x 3 x 48 x 48, RGB, 0 to 255: the graph normalises. The output
    ``probabilities`` is float32 N x nclass. The metadata says so, and names the classes (a JSON list).

    Parameters
    ----------
    model : simpleconv3
        In eval mode, as `load_model` returns it.
    path : path-like

    Raises
    ------
    ImportError
        The package onnx is not installed.
    """
    try:
        import onnx
    except ImportError:
        raise ImportError("exporting needs one more package; 'pip install onnx' brings it") from None
    levels = torch.zeros(2, 3, CROP_SIZE, CROP_SIZE, device=model.fc3.weight.device)
    graph = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch recommends its newer exporter, which needs more packages
        torch.onnx.export(
            Probabilities(model).eval(), (levels,), graph, dynamo=False, opset_version=OPSET,
            input_names=["levels"], output_names=["probabilities"],
            dynamic_axes={"levels": {0: "N"}, "probabilities": {0: "N"}})
    graph = onnx.load_from_string(graph.getvalue())
    onnx.helper.set_model_props(graph, {
        "classes": json.dumps(model.classes, ensure_ascii=False),
        "input_size": str(CROP_SIZE),
        "channels": "RGB",
        "input": "grey levels, 0 to 255",
        "normalisation": f"in the graph, mean {MEAN} and std {STD} of levels / 255",
        "opset": str(OPSET),
    })
    write_file(path, graph.SerializeToString())


# --- loading: weights and JSON may come from a stranger

MAX_FILE = 32 * 2**20  # bytes of a file; the weights of four classes take 6.4 MB, a checkpoint up to 26
MAX_WEIGHTS = 16 * 2**20  # bytes of the weights themselves
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


def read_weights(path):
    """The state dict of a `simpleconv3` in a file that may come from a stranger.

    Parameters
    ----------
    path : path-like
        What ``torch.save`` wrote: a state dict, or a dict that holds one, such as a checkpoint.

    Returns
    -------
    dict of str to tensor
        Finite values; ``fc3.weight`` has one row a class.

    Raises
    ------
    ValueError, or almost anything else
        It is no such file.
    """
    with open(path, "rb") as file:
        data = file.read(MAX_FILE + 1)
    if len(data) > MAX_FILE:
        raise ValueError(f"larger than {MAX_FILE >> 20} MiB; of a checkpoint, save the state dict alone")
    weights = load_pickle(data)
    while isinstance(weights, dict):
        inner = [weights[name] for name in WRAPPED if isinstance(weights.get(name), dict)]
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
    if sum(4 * value.numel() for value in weights.values()) > MAX_WEIGHTS:
        raise ValueError(f"tensors of more than {MAX_WEIGHTS >> 20} MiB")
    if "fc3.weight" not in weights:
        raise ValueError("it has no fc3.weight")
    if weights["fc3.weight"].shape[1:] != (128,):  # as many classes as it likes, for no weights at all
        raise ValueError("fc3.weight has another shape")
    if not len(weights["fc3.weight"]):
        raise ValueError("no classes")
    for key, value in weights.items():
        if not value.float().isfinite().all() or key.endswith("running_var") and (value < 0).any():
            raise ValueError(f"{key} holds what is no weight: not finite, or a negative variance")
    return weights


def read_about(path, nclass):
    """The JSON file beside a model of `nclass` classes: dict, ``classes`` and ``temperature`` are valid.

    Raises
    ------
    ValueError
        It does not fit, or is no such file. The message names it.
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
        temperature = about.get("temperature", 1.0)
        if type(temperature) not in (int, float) or not 0.01 <= temperature <= 100:
            raise ValueError("temperature must be a number between 0.01 and 100")
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not the JSON file of a model ({printable(str(error))}); "
                         "remove it to load the weights without names") from None
    if len(about["classes"]) != nclass:
        n = len(about["classes"])
        raise ValueError(f"{path}: names {n} classes, but the weights beside it have {nclass}")
    return about


def load_model(path=None, device="cpu"):
    """Read weights and, where there is one, the JSON file beside them. Both may come from a stranger.

    Parameters
    ----------
    path : path-like, optional
        A state dict of `simpleconv3`: ours, the textbook's, or one that another program wrapped in a
        checkpoint or in ``DataParallel``. Default: `MODEL` where there is one, else `PRETRAINED`.
    device : str or torch.device

    Returns
    -------
    simpleconv3
        In eval mode. ``classes`` holds the class names (without a JSON file: `CLASSES` for a network
        of four classes, numbers for any other), ``about`` the content of the JSON file, ``path`` the file.

    Raises
    ------
    FileNotFoundError
        There is no such file.
    ValueError
        It is not a state dict of simpleconv3, or the JSON file does not fit it.
    """
    path = Path(path) if path else MODEL if MODEL.exists() else PRETRAINED
    if not path.is_file():
        raise FileNotFoundError(
            f"{path}: {'not a file' if path.exists() else 'no such model'}; 'python train.py' makes one")
    try:
        weights = read_weights(path)
        net = simpleconv3(len(weights["fc3.weight"]))
        net.load_state_dict(weights)
    except Exception as error:  # torch.load raises almost anything on a file that it did not write
        raise ValueError(f"{path}: not a state dict of simpleconv3 ({reason(error)}); "
                         "'python train.py' makes one") from None
    beside = path.with_suffix(".json")
    if beside != path and beside.exists():
        net.about = read_about(beside, len(net.classes))
        net.classes = tuple(net.about["classes"])
    net.path = path
    return net.to(device).eval()


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
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="backslashreplace")  # for terminals that lack the letters of a name
    description, *_, examples = __doc__.split("\n\n")
    parser = argparse.ArgumentParser(
        description=description, epilog=examples, formatter_class=argparse.RawDescriptionHelpFormatter)
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
    try:
        net = load_model(args.model) if args.model else simpleconv3(len(CLASSES))
        if args.export:
            export_onnx(net, args.export)
    except (ImportError, OSError, ValueError) as error:
        sys.exit(f"error: {printable(str(error))}")
    print(f"input: N x 3 x {CROP_SIZE} x {CROP_SIZE}, RGB, (x / 255 - {MEAN}) / {STD}")
    print(layer_table(net))
    print("classes:", printable(", ".join(net.classes)))
    for key, value in net.about.items():
        if key not in {"classes", "input_size", "mean", "std", "channels"}:
            print(printable(f"{key}: {json.dumps(value, ensure_ascii=False)}"))
    if args.export:
        print("exported:", printable(str(args.export)))


if __name__ == "__main__":
    main()
