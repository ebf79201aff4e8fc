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

import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn

CLASSES = ("0none", "1pouting", "2smile", "3openmouth")
CROP_SIZE = 48  # side of the network's input in pixels
MEAN = STD = 0.5  # of every RGB channel, on a scale of 0 to 1
MIRROR = torch.eye(CROP_SIZE).flip(0)  # x @ MIRROR is x.flip(3), to the bit
OPSET = 13  # of exported models: the lowest that says all, for old runtimes
MAX_WEIGHTS, MAX_JSON = 16 * 2**20, 2**20  # bytes; four classes take 6.4 MB and about 1 KB
# empty, . or .., a control character, a separator, half a surrogate pair, or longer than a folder's name may be
NO_CLASS_NAME = re.compile(r"^\.{0,2}$|[\0-\x1f\x7f-\x9f/\\\ud800-\udfff]|.{256}", re.S)


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
        self.about = {}
        self.classes = CLASSES if nclass == len(CLASSES) else tuple(map(str, range(nclass)))

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


def square(image, size=CROP_SIZE):
    """Resize the shorter side to `size` and keep the central square.

    The same pixels as torchvision's ``Resize(size)`` and ``CenterCrop(size)`` on a PIL image.

    Parameters
    ----------
    image : PIL.Image.Image or uint8 array of shape (H, W, 3) or (H, W)
        A mouth crop. Grey becomes RGB with three equal channels.
    size : int
        Side of the result in pixels.

    Returns
    -------
    uint8 tensor of shape (3, size, size)
    """
    if not isinstance(image, Image.Image):
        image = Image.fromarray(image)
    width, height = image.size
    short = min(width, height)
    if max(width, height) > 32 * short:  # a strip: enlarged, it would fill gigabytes, of which the middle is kept
        left, top = max(0, width // 2 - 8 * short), max(0, height // 2 - 8 * short)
        image = image.crop((left, top, width - left, height - top))
        width, height = image.size
    image = image.convert("RGB")
    width, height = int(size * width / short), int(size * height / short)
    image = image.resize((width, height), Image.Resampling.BILINEAR)
    left, top = round((width - size) / 2), round((height - size) / 2)
    image = image.crop((left, top, left + size, top + size))
    return torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8).view(size, size, 3).permute(2, 0, 1)


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


def zoom(side):
    """The matrix Z, 48 x 48, by which ``Z.T @ x @ Z`` enlarges the central square of `side` pixels of x to the whole."""
    margin = (CROP_SIZE - side) // 2
    lines = F.interpolate(torch.eye(side)[None], size=CROP_SIZE, mode="linear")[0]
    return F.pad(lines, (0, 0, margin, CROP_SIZE - side - margin))


def logits_of(model, x, flip=False, views=(CROP_SIZE,)):
    """Logits of network inputs, the mean over several looks at each.

    Parameters
    ----------
    model : simpleconv3
    x : float tensor of shape (N, 3, 48, 48)
    flip : bool
        Look at the mirror image too.
    views : sequence of int
        Sides of the central squares to look at, enlarged to the whole; 48 is the whole.

    Returns
    -------
    float tensor of shape (N, nclass)
    """
    # products from the right, not slices and flips: OpenCV misreads those in an exported model
    looks = [x if side == CROP_SIZE else ((x @ (z := zoom(side).to(x))).transpose(2, 3) @ z).transpose(2, 3) for side in views]
    if flip:
        looks += [look @ MIRROR.to(x) for look in looks]
    if len(looks) == 1:
        return model(looks[0])
    logits = model(torch.cat(looks))  # one pass
    return logits.view(len(looks), -1, logits.shape[1]).mean(0)


class Probabilities(nn.Module):
    """What `predict` computes and `export_onnx` writes, from pixels on: a model with all that its ``about`` asks for.

    Parameters
    ----------
    model : simpleconv3
    """

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, levels):
        """Class probabilities, float tensor N x nclass, of grey levels N x 3 x 48 x 48, 0 to 255."""
        about = self.model.about
        logits = logits_of(self.model, normalize(levels), about.get("flip", False), about.get("views", [CROP_SIZE]))
        return (logits / about.get("temperature", 1.0)).softmax(1)


@torch.inference_mode()
def predict(model, crops):
    """Class probabilities of mouth crops.

    Parameters
    ----------
    model : simpleconv3
        In eval mode, as `load_model` returns it; its ``about`` may ask for mirror images and enlarged
        looks (``flip``, ``views``: see `logits_of`) and say by how much the logits are too sure (``temperature``).
    crops : sequence of PIL images or uint8 arrays (H, W, 3) in RGB, any sizes

    Returns
    -------
    float32 tensor of shape (len(crops), nclass) on the CPU, rows that sum to 1

    Raises
    ------
    ValueError
        `crops` is a single image.
    """
    if getattr(crops, "ndim", 4) == 3:  # whose rows would be taken for crops
        raise ValueError("crops is one image; predict takes a list of them")
    if not len(crops):
        return torch.empty(0, len(model.classes))
    batch = torch.stack([square(crop) for crop in crops]).to(model.fc3.weight.device)
    return Probabilities(model)(batch).cpu()


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
    levels, graph = torch.zeros(2, 3, CROP_SIZE, CROP_SIZE, device=model.fc3.weight.device), io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch recommends its newer exporter, which needs more packages
        torch.onnx.export(
            Probabilities(model).eval(), (levels,), graph, dynamo=False, opset_version=OPSET, input_names=["levels"],
            output_names=["probabilities"], dynamic_axes={"levels": {0: "N"}, "probabilities": {0: "N"}})
    graph = onnx.load_from_string(graph.getvalue())
    onnx.helper.set_model_props(graph, {
        "classes": json.dumps(model.classes, ensure_ascii=False), "input_size": str(CROP_SIZE), "channels": "RGB",
        "input": "grey levels, 0 to 255", "normalisation": f"in the graph, mean {MEAN} and std {STD} of levels / 255", "opset": str(OPSET)})
    atomic_write(path, lambda file: file.write(graph.SerializeToString()))


def atomic_write(path, write):
    """Call ``write(file)`` on a temporary file beside `path`, flush it to disk, then rename it to `path`.

    Whoever reads `path`, at any moment and after any crash, finds the old content or the new one, whole.
    """
    path = Path(path)
    temporary = path.with_name(f".{secrets.token_hex(8)}.tmp")
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with open(temporary, "xb") as file:
                write(file)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
        except BaseException:
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)
            raise
    if os.name == "posix":
        with contextlib.suppress(OSError):  # some network disks cannot flush a folder
            folder = os.open(path.parent, os.O_RDONLY)
            try:
                os.fsync(folder)
            finally:
                os.close(folder)


@contextlib.contextmanager
def writing(path):
    """Name the file in errors that come from writing it; a full disk's own message names none."""
    try:
        yield
    except OSError as error:
        if not error.strerror:  # one of ours, which says what there is to say
            raise
        raise OSError(f"{path}: cannot be written ({error.strerror}); mend that and run the same command again") from None
    except RuntimeError as error:  # what torch.save makes of a full disk
        reason = getattr(error.__context__, "strerror", None) or str(error).splitlines()[0]
        raise OSError(f"{path}: cannot be written ({reason}); mend that and run the same command again") from None


@contextlib.contextmanager
def locked(folder):
    """Hold a folder for this process alone. The system lets go of it when the process ends, however it ends.

    What killed runs left half-written there is removed.

    Raises
    ------
    BlockingIOError
        Another process holds it.
    """
    folder, path = Path(folder), Path(folder) / ".lock"
    with writing(path):
        folder.mkdir(parents=True, exist_ok=True)
        file = open(path, "ab")
    with file:
        try:
            if os.name == "nt":
                import msvcrt

                file.seek(1 << 30)  # beyond the end: Windows would let nobody read what is locked
                msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
            else:
                import fcntl

                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            raise BlockingIOError(f"{folder}: another run is at work there; wait for its end") from None
        except OSError:
            pass  # some network disks know no locks
        for part in folder.glob("." + "[0-9a-f]" * 16 + ".tmp"):
            part.unlink(missing_ok=True)
        yield


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
    path = Path(path)
    weights = {key: value.detach().cpu().contiguous() for key, value in net.state_dict().items()}
    about = {"classes": list(net.classes), "input_size": CROP_SIZE, "mean": MEAN, "std": STD, "channels": "RGB", **about}
    text = json.dumps(about, indent=2, ensure_ascii=False) + "\n"
    atomic_write(path, lambda file: torch.save(weights, file))
    atomic_write(path.with_suffix(".json"), lambda file: file.write(text.encode()))


def printable(text):
    """The text with control characters, and those that turn the direction of writing, as escapes."""
    return "".join(c if c.isprintable() or c in "\u200c\u200d" else ascii(c)[1:-1] for c in text)


def escape_output():
    """Print letters that the terminal, or Windows in a pipe, does not have as escapes instead of failing on them."""
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="backslashreplace")


def reason(error):
    """What an error of any kind says, in one printable line of at most 200 characters, or its name where it says nothing."""
    return printable(" ".join(str(error).split()))[:200] or type(error).__name__


def check_classes(names):
    """Raise a ValueError that names the first of the class names that no folder can have, or that there is twice."""
    seen = set()
    for i, name in enumerate(names):
        if not isinstance(name, str) or NO_CLASS_NAME.search(name):
            raise ValueError(f"class {i} is {ascii(name)[:40]}, which no folder can be called")
        if name in seen:
            raise ValueError(f"there are two classes {ascii(name)}")
        seen.add(name)


def check_views(views):
    """Raise a ValueError unless `views` is a list that `logits_of` can take."""
    if not isinstance(views, list) or not 0 < len(views) < 9 or not all(type(side) is int and 8 <= side <= CROP_SIZE for side in views):
        raise ValueError(f"views must be a list of up to 8 numbers from 8 to {CROP_SIZE}")


def read_saved(path, most):
    """What ``torch.save`` wrote, in a file that may come from a stranger: nothing is executed, memory is bounded.

    A tensor may still be a view of less memory than its shape says.

    Parameters
    ----------
    path : path-like
    most : int
        Bytes that the file may have.

    Raises
    ------
    ValueError, or almost anything else
        It is no such file, or a larger one.
    """
    with open(path, "rb") as file:
        data = file.read(most + 1)
    if len(data) > most:
        raise ValueError(f"larger than {most >> 20} MiB")
    if data.startswith(b"PK\3\4"):
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            entries = archive.infolist()
        # torch.save compresses nothing: entries that unpack to more than the file are a bomb
        if any(entry.compress_type for entry in entries) or sum(entry.file_size for entry in entries) > len(data):
            raise ValueError("a compressed archive")
    try:
        if b"bytearray\n" in data:  # torch.load lets a pickle ask for one of any size
            raise pickle.UnpicklingError
        return torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:  # whose message recommends weights_only=False
        raise ValueError("damaged, or holds more than tensors, such as a whole model") from None


def read_weights(path):
    """Tensors of a state dict that may come from a stranger, as `read_saved`: together at most `MAX_WEIGHTS`."""
    weights = {key.removeprefix("module."): value for key, value in read_saved(path, MAX_WEIGHTS).items()}
    for key, value in weights.items():
        if not (value.is_floating_point() or key.endswith("num_batches_tracked")):
            raise ValueError(f"{key} is {value.dtype}")
    # a tensor can be larger than what it is a view of
    if sum(4 * value.numel() for value in weights.values()) > MAX_WEIGHTS:
        raise ValueError(f"tensors of more than {MAX_WEIGHTS >> 20} MiB")
    return weights


def read_about(path, nclass):
    """The JSON file beside a model of `nclass` classes, as a dict whose ``classes``, ``flip``, ``views``
    and ``temperature`` are valid.

    Raises
    ------
    ValueError
        It does not fit, or is no such file. The message names it.
    """
    try:
        if not path.is_file():
            raise ValueError("it is no file")
        with open(path, "rb") as file:
            text = file.read(MAX_JSON + 1)
        if len(text) > MAX_JSON:
            raise ValueError(f"larger than {MAX_JSON >> 20} MiB")
        about = json.loads(text.decode())
        if not isinstance(about, dict) or not isinstance(about.get("classes"), list):
            raise ValueError("no list of classes")
        check_classes(about["classes"])
        check_views(about.get("views", [CROP_SIZE]))
        flip, temperature = about.get("flip", False), about.get("temperature", 1.0)
        if not isinstance(flip, bool):
            raise ValueError("flip must be true or false")
        if type(temperature) not in (int, float) or not 0.01 <= temperature <= 100:
            raise ValueError("temperature must be a number between 0.01 and 100")
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not the JSON file of a model ({printable(str(error))}); "
                         "remove it to load the weights without names") from None
    if len(about["classes"]) != nclass:
        raise ValueError(f"{path}: names {len(about['classes'])} classes, but the weights beside it have {nclass}")
    return about


def load_model(path, device="cpu"):
    """Read weights and, where there is one, the JSON file beside them. Both may come from a stranger.

    Parameters
    ----------
    path : path-like
        A state dict of `simpleconv3`: ours, the textbook's, or one saved from ``DataParallel``.
    device : str or torch.device

    Returns
    -------
    simpleconv3
        In eval mode. ``classes`` holds the class names (without a JSON file: `CLASSES` for a network
        of four classes, numbers for any other), ``about`` the whole content of the JSON file.

    Raises
    ------
    FileNotFoundError
        There is no such file.
    ValueError
        It is not a state dict of simpleconv3, or the JSON file does not fit it.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: {'not a file' if path.exists() else 'no such model'}; 'python train.py' makes one")
    try:
        weights = read_weights(path)
        if weights["fc3.weight"].shape[1:] != (128,):  # as many classes as it likes, for no weights at all
            raise ValueError("fc3.weight has another shape")
        if not len(weights["fc3.weight"]):
            raise ValueError("no classes")
        net = simpleconv3(len(weights["fc3.weight"]))
        net.load_state_dict(weights)
        for key, value in net.state_dict().items():
            if not value.isfinite().all() or key.endswith("running_var") and (value < 0).any():
                raise ValueError(f"{key} holds what is no weight: not finite, or a negative variance")
    except Exception as error:  # torch.load raises almost anything on a file that it did not write
        raise ValueError(f"{path}: not a state dict of simpleconv3 ({reason(error)}); 'python train.py' makes one") from None
    beside = path.with_suffix(".json")
    if beside != path and beside.exists():
        net.about = read_about(beside, len(net.classes))
        net.classes = tuple(net.about["classes"])
    return net.to(device).eval()


def layer_table(net):
    """Lines of text: every layer with its weights' shapes, output shape and number of parameters."""
    rows, hooks = [("layer", "kind", "output", "parameters")], []
    for name, layer in net.named_children():
        def note(layer, inputs, output, name=name):
            count = sum(p.numel() for p in layer.parameters())
            rows.append((name, type(layer).__name__, " x ".join(map(str, output.shape[1:])), f"{count:,}"))
        hooks.append(layer.register_forward_hook(note))
    training = net.training
    with torch.inference_mode():
        net.eval()(torch.zeros(1, 3, CROP_SIZE, CROP_SIZE, device=net.fc3.weight.device))
    net.train(training)
    for hook in hooks:
        hook.remove()
    rows.append(("total", "", "", f"{sum(p.numel() for p in net.parameters()):,}"))
    return [f"{a:<7}{b:<13}{c:>13}{d:>13}" for a, b, c, d in rows]


def main(argv=None):
    escape_output()
    description, *_, examples = __doc__.split("\n\n")
    parser = argparse.ArgumentParser(description=description, epilog=examples, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", type=Path, help="weights to show; without: a new four-class network")
    parser.add_argument("--export", type=Path, metavar="FILE",
                        help=f"write the model as ONNX, opset {OPSET}: RGB levels N x 3 x {CROP_SIZE} x {CROP_SIZE}, 0 to 255, to probabilities")
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
    print(*layer_table(net), sep="\n")
    print("classes:", printable(", ".join(net.classes)))
    for key, value in net.about.items():
        if key not in {"classes", "input_size", "mean", "std", "channels"}:
            print(printable(f"{key}: {json.dumps(value, ensure_ascii=False)}"))
    if args.export:
        print("exported:", printable(str(args.export)))


if __name__ == "__main__":
    main()
