"""simpleconv3, the network, and what travels with it: class names, sizes, normalisation, loading.

    python net.py                      the layer table of the four-class network
    python net.py models/model.pt      the same for trained weights, with their classes and scores

In other code:

    from net import load_model, predict
    model = load_model("models/model.pt")
    probabilities = predict(model, [crop])        # crop: a mouth, any size, RGB
    print(model.classes[probabilities[0].argmax()])
"""

import argparse
import json
import os
import secrets
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn

CLASSES = ("0none", "1pouting", "2smile", "3openmouth")
CROP_SIZE = 48  # side of the network's input in pixels
MEAN = STD = 0.5  # of every RGB channel, on a scale of 0 to 1


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
        self.classes = tuple(CLASSES) if nclass == len(CLASSES) else tuple(map(str, range(nclass)))

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
    image = image.convert("RGB")
    width, height = image.size
    short = min(width, height)
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
    return images.float().mul_(1 / (255 * STD)).sub_(MEAN / STD)


def logits_of(model, x, flip=False):
    """Logits of network inputs N x 3 x 48 x 48; with `flip`, the mean of those of the mirror images too."""
    return (model(x) + model(x.flip(3))) / 2 if flip else model(x)


@torch.inference_mode()
def predict(model, crops):
    """Class probabilities of mouth crops.

    Parameters
    ----------
    model : simpleconv3
        In eval mode, as `load_model` returns it; its ``about`` may ask for mirror images (``flip``) and
        say by how much the logits are too sure (``temperature``).
    crops : sequence of PIL images or uint8 arrays (H, W, 3) in RGB, any sizes

    Returns
    -------
    float32 tensor of shape (len(crops), nclass) on the CPU, rows that sum to 1
    """
    if not len(crops):
        return torch.empty(0, len(model.classes))
    device = model.fc3.weight.device
    batch = torch.stack([square(crop) for crop in crops]).to(device)
    logits = logits_of(model, normalize(batch), model.about.get("flip", False))
    return (logits / model.about.get("temperature", 1.0)).softmax(1).cpu()


def atomic_write(path, write):
    """Call ``write(file)`` on a temporary file beside `path`, flush it to disk, then rename it to `path`.

    Whoever reads `path`, at any moment and after any crash, finds the old content or the new one, whole.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{secrets.token_hex(8)}.tmp")
    try:
        with open(temporary, "xb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


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


def load_model(path, device="cpu"):
    """Read weights and, where there is one, the JSON file beside them.

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
        raise FileNotFoundError(f"{path}: no such model; 'python train.py' makes one")
    try:
        weights = torch.load(path, map_location="cpu", weights_only=True)
        weights = {key.removeprefix("module."): value for key, value in weights.items()}
        nclass = len(weights["fc3.weight"])
        net = simpleconv3(nclass)
        net.load_state_dict(weights)
    except Exception as error:  # torch.load raises almost anything on a file that it did not write
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise ValueError(f"{path}: not a state dict of simpleconv3 ({reason}); 'python train.py' makes one") from None
    beside = path.with_suffix(".json")
    if beside != path and beside.is_file():
        try:
            net.about = json.loads(beside.read_text("utf-8"))
            net.classes = tuple(str(name) for name in net.about["classes"])
        except (ValueError, TypeError, KeyError):
            raise ValueError(f"{beside}: not the JSON file of a model; remove it to load {path.name} without names") from None
        if len(net.classes) != nclass:
            raise ValueError(f"{beside}: names {len(net.classes)} classes, but {path.name} has {nclass}")
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
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", type=Path, help="weights to show; without: a new four-class network")
    args = parser.parse_args(argv)
    try:
        net = load_model(args.model) if args.model else simpleconv3(len(CLASSES))
    except (OSError, ValueError) as error:
        sys.exit(f"error: {error}")
    print(f"input: N x 3 x {CROP_SIZE} x {CROP_SIZE}, RGB, (x / 255 - {MEAN}) / {STD}")
    print(*layer_table(net), sep="\n")
    print("classes:", ", ".join(net.classes))
    for key, value in net.about.items():
        if key not in {"classes", "input_size", "mean", "std", "channels"}:
            print(f"{key}: {json.dumps(value, ensure_ascii=False)}")


if __name__ == "__main__":
    main()
