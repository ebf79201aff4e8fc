"""Train simpleconv3 on mouth crops: data/train and data/val to models/model.pt and curves in logs/.

    python train.py                                   the textbook's recipe: 300 epochs, SGD, StepLR
    python train.py --epochs 40 --lr 0.05             shorter, gentler
    python train.py --resume                          go on after Ctrl-C or a crash, bit for bit on a CPU
    torchrun --nproc_per_node=2 -- train.py           the same on two processes or GPUs, or many machines
    tensorboard --logdir logs                         the curves

All crops are decoded once, to 64 x 64, and live in memory: 12 KiB an image (a set that would not fit in
half of the free memory lives in a file under data/cache). models/model.pt is a plain state dict, that of
the epoch with the best validation accuracy; models/model.json beside it says everything else.
"""

import argparse
import contextlib
import copy
import hashlib
import io
import itertools
import math
import operator
import os
import shlex
import signal
import stat
import sys
import threading
import time
import warnings
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime
from pathlib import Path, PureWindowsPath

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont, ImageOps
from torch.nn.parallel import DistributedDataParallel
from torch.optim.sgd import sgd
from torch.utils.tensorboard import SummaryWriter
from torch.utils.tensorboard.summary import Summary, hparams
from tqdm import tqdm

from net import (
    CROP_SIZE, MAX_WEIGHTS, NO_CLASS_NAME, atomic_write, check_classes, check_views, escape_output, locked, logits_of, normalize, printable, read_saved, reason,
    save_model, simpleconv3, square)

IMAGE_SIZE = 64  # side of the training images in memory; random crops are taken from them
RATIO = (3 / 4, 4 / 3)  # aspect ratio of the random crops
CHECKPOINT = "checkpoint.pt"

# What a file from a stranger may cost. While it is decoded a pixel takes up to 8 bytes, in WebP 16, in JPEG 2000 20:
# at the largest size half a GiB, 1 and 1.3, for each core.
MAX_SIDE = 8192  # pixels, width and height of an image
MAX_BYTES = 4 * MAX_SIDE**2  # of its file
MAX_CHECKPOINT = 4 * MAX_WEIGHTS  # bytes: weights, their average, the best ones and the momentum
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)  # what Pillow warns of is refused

# What --recipe sets; any flag of the same name overrides it. tests/bench/README.md says how strong was found.
RECIPES = {
    "textbook": dict(
        epochs=300, batch_size=64, lr=0.1, momentum=0.9, weight_decay=0.0, schedule="step", step_size=100, gamma=0.1,
        crop=0.08, rotate=0.0, colour=0.0, grey=0.0, smoothing=0.0, average=0.0, balance=0.0, flip=False, views=[CROP_SIZE]),
    "strong": dict(
        epochs=100, batch_size=64, lr=0.1, momentum=0.9, weight_decay=2e-3, schedule="one-cycle", step_size=100, gamma=0.1,
        crop=0.6, rotate=15.0, colour=0.3, grey=0.3, smoothing=0.05, average=0.99, balance=0.5, flip=True, views=[48, 44, 40]),
}
WARM_UP = 0.25  # share of a one-cycle run in which the learning rate rises
MAX_CALIBRATION_ERROR = 0.05  # beyond it a temperature is fitted on the validation images
SAVE_SECONDS = 20  # a kill costs at most this much training


def list_images(folder):
    """Images of an ImageFolder: sorted list of (path, class name)."""
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: no such folder; 'python split_train_val.py' makes it")
    suffixes = Image.registered_extensions()
    found = [
        (path, place.name)
        for place in sorted(folder.iterdir()) if place.is_dir() and not place.name.startswith(".")
        for path in sorted(place.rglob("*"))
        if path.suffix.lower() in suffixes and not any(part.startswith(".") for part in path.relative_to(place).parts)
    ]
    if not found:
        raise FileNotFoundError(f"{folder}: no images in class folders; 'python split_train_val.py' makes them")
    return found


def free_memory():
    """Bytes of memory that can be had without swapping; infinite where the system does not tell."""
    try:
        with open("/proc/meminfo") as file:
            return next(1024 * int(line.split()[1]) for line in file if line.startswith("MemAvailable"))
    except (OSError, StopIteration):
        pass
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2
    except (AttributeError, ValueError, OSError):
        return float("inf")


def load_images(paths, size, cache, name="images"):
    """Decode images on all cores.

    Parameters
    ----------
    paths : list of Path
    size : int
        Side of the results: shorter side resized to it, central square kept.
    cache : Path
        Holds the file that takes the images where they do not fit in half of the free memory. It is
        used again as long as the images' names, sizes and times are the same; others of `name` are removed.
    name : str
        Of the file's folder, and shown at the progress bar.

    Returns
    -------
    uint8 tensor of shape (len(paths), 3, size, size)

    Raises
    ------
    OSError
        An image cannot be decoded, or is larger than `MAX_SIDE` or `MAX_BYTES`; the message names it.
    """
    shape, target = (len(paths), 3, size, size), None
    if math.prod(shape) > free_memory() / 2:
        about = [(str(path), (state := path.stat()).st_size, state.st_mtime_ns) for path in paths]
        target = cache / name / f"{hashlib.sha1(repr((about, size)).encode('utf-8', 'surrogateescape')).hexdigest()[:16]}.u8"
    for old in (cache / name).glob("*.u8"):
        if old != target:
            old.unlink()
    if not target:
        images = np.empty(shape, np.uint8)
        decode(paths, images, name)
        return torch.from_numpy(images)

    def fill(file):
        if hasattr(os, "posix_fallocate"):  # a disk that is full says so now, not by a fatal signal later
            os.posix_fallocate(file.fileno(), 0, math.prod(shape))
        else:
            file.truncate(math.prod(shape))
        images = np.memmap(file.name, np.uint8, "r+", shape=shape)
        decode(paths, images, name)
        images.flush()

    if not target.is_file():
        with locked(target.parent):
            atomic_write(target, fill)
    return torch.from_numpy(np.memmap(target, np.uint8, "r+", shape=shape))


def decode(paths, images, name):
    """Decode images on all cores into `images`, uint8 array of shape (len(paths), 3, size, size); see `load_images`."""
    def load(some):
        for i in some:
            try:
                about = os.stat(paths[i])
                if not stat.S_ISREG(about.st_mode) or about.st_size > MAX_BYTES:  # pipes and devices may never end
                    raise ValueError(f"no regular file of up to {MAX_BYTES >> 20} MiB")
                with Image.open(paths[i]) as image:
                    if max(image.size) > MAX_SIDE:
                        raise ValueError(f"{image.width} x {image.height} pixels, of which {MAX_SIDE} are read")
                    if image.format in ("EPS", "WMF"):  # Pillow has Ghostscript or Windows run them: they are programs
                        raise ValueError(f"{image.format} is not read")
                    if image.mode.startswith(("I", "F")):  # converted, it would be white
                        raise ValueError("more than 8 bits a channel; save it with 8")
                    image.draft("RGB", (IMAGE_SIZE, IMAGE_SIZE))  # JPEGs decode at a fraction of their size, several times as fast
                    ImageOps.exif_transpose(image, in_place=True)
                    if image.has_transparency_data:
                        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image.convert("RGBA"))
                    images[i] = square(image, images.shape[3]).numpy()
            except Exception as error:  # decoders raise almost anything
                raise OSError(f"{paths[i]}: not a readable image ({error}); remove it and run the command again") from None
        return len(some)

    batches = [range(i, min(i + 64, len(paths))) for i in range(0, len(paths), 64)]
    with ThreadPoolExecutor(os.cpu_count()) as pool, tqdm(total=len(paths), desc=name, unit="image", leave=False, disable=None) as bar:
        try:
            for done in pool.map(load, batches):
                bar.update(done)
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def load_data(data, rank=0, world=1):
    """Read ``data/train`` and ``data/val``.

    Parameters
    ----------
    data : Path
    rank, world : int
        Of the images in random order, every `world`-th from `rank` on is loaded.

    Returns
    -------
    classes : tuple of str
    train, val : pairs of tensors
        Images, uint8 N x 3 x 64 x 64 and N x 3 x 48 x 48, and labels, int64 N.

    Raises
    ------
    OSError
        A folder is missing or empty, or an image cannot be decoded.
    ValueError
        There are fewer than two classes, or a class is only on one side.
    """
    parts = {part: list_images(data / part) for part in ("train", "val")}
    names = {part: {label for _, label in files} for part, files in parts.items()}
    for part, other in (("train", "val"), ("val", "train")):
        only = sorted(names[part] - names[other])
        if only:
            raise ValueError(f"{data / part}: class {only[0]} is not in {data / other}; "
                             "give it two or more crops and run 'python split_train_val.py' again")
    classes = tuple(sorted(names["train"]))
    check_classes(classes)  # now, not when the trained model is loaded
    if len(classes) < 2:
        raise ValueError(f"{data / 'train'}: only one class, {classes[0]}; a classifier needs two or more folders of photos")
    loaded = []
    for part, size in (("train", IMAGE_SIZE), ("val", CROP_SIZE)):
        files = parts[part]
        # class by class, neighbours are alike: shuffle, so that every rank's share holds all classes
        order = torch.randperm(len(files), generator=torch.Generator().manual_seed(0)).tolist() if world > 1 else range(len(files))
        share = [files[i] for i in order][rank::world]
        if not share:
            raise ValueError(f"{data / part}: {len(files)} images are too few for {world} processes; start fewer")
        labels = torch.tensor([classes.index(label) for _, label in share])
        name = part if world == 1 else f"{part}{rank}"
        loaded.append((load_images([path for path, _ in share], size, data / "cache", name), labels))
    return classes, *loaded


def identify(data):
    """Which images there are in ``data/train`` and ``data/val``, a hash of their names and sizes: str."""
    files = [(part, label, path.name, path.stat().st_size) for part in ("train", "val") for path, label in list_images(data / part)]
    return hashlib.sha1(repr(files).encode("utf-8", "surrogateescape")).hexdigest()


def random_boxes(n, generator, smallest=0.08):
    """Random crops of a square image, distributed as torchvision's ``RandomResizedCrop``.

    Parameters
    ----------
    n : int
    generator : torch.Generator
        Its device is the result's.
    smallest : float
        The crop's share of the image's area is uniform between this and 1; the logarithm of width over
        height is uniform in that of `RATIO`.

    Returns
    -------
    float tensor of shape (n, 4)
        Centre x, centre y, half width, half height; the image spans -1 to 1.
    """
    u = torch.rand(n, 22, generator=generator, device=generator.device)
    area = smallest + (1 - smallest) * u[:, :10]
    low, high = np.log(RATIO[0]), np.log(RATIO[1])
    aspect = (low + (high - low) * u[:, 10:20]).exp()
    half = torch.stack([(area * aspect).sqrt(), (area / aspect).sqrt()], 2)
    # the first of ten tries that fits; the whole image where none does
    fits = (half <= 1).all(2)
    first = fits.float().argmax(1)
    half = half.gather(1, first[:, None, None].expand(-1, 1, 2))[:, 0]
    half = torch.where(fits.any(1, keepdim=True), half, torch.ones_like(half))
    centre = (2 * u[:, 20:] - 1) * (1 - half)
    return torch.cat([centre, half], 1)


def resample(images, boxes, angles=None, size=CROP_SIZE):
    """Cut boxes out of images and scale them to squares, in one bilinear pass.

    Parameters
    ----------
    images : uint8 tensor of shape (N, 3, H, W), H and W equal
    boxes : float tensor of shape (N, 4)
        As `random_boxes` makes them; a negative half width mirrors.
    angles : float tensor of shape (N,), optional
        Radians by which the boxes are turned about their centres; beyond the image its border continues.
    size : int

    Returns
    -------
    float32 tensor of shape (N, 3, size, size), values 0 to 255
    """
    line = torch.linspace(-1 + 1 / size, 1 - 1 / size, size, device=boxes.device)
    x = (boxes[:, 2:3] * line)[:, None, :]
    y = (boxes[:, 3:4] * line)[:, :, None]
    if angles is not None:
        cos, sin = angles.cos()[:, None, None], angles.sin()[:, None, None]
        x, y = x * cos - y * sin, x * sin + y * cos
    x, y = x + boxes[:, 0, None, None], y + boxes[:, 1, None, None]
    grid = torch.stack([x.expand(-1, size, -1), y.expand(-1, -1, size)], 3)
    return F.grid_sample(images.float(), grid, padding_mode="border", align_corners=False)


def jitter(images, generator, strength, grey):
    """Change brightness, contrast and saturation, each by a factor between 1 - strength and 1 + strength.

    Images that lose their colour are tinted, each channel by such a factor: a network that never sees but grey
    photos would answer to colour with whatever its first weights happened to be.

    Parameters
    ----------
    images : float tensor of shape (N, 3, H, W), values 0 to 255
    generator : torch.Generator
    strength : float
    grey : float
        Share of the images that lose their colour.
    """
    u = torch.rand(len(images), 7, 1, 1, generator=generator, device=images.device)
    contrast, saturation, brightness, tint = (1 + strength * (2 * u[:, :6] - 1)).split([1, 1, 1, 3], 1)
    loses = u[:, 6:] < grey
    saturation, tint = saturation.masked_fill(loses, 0), tint.masked_fill(~loses, 1)
    red, green, blue = images.split(1, 1)
    luma = 0.299 * red + 0.587 * green + 0.114 * blue
    mean = luma.mean((2, 3), keepdim=True)
    images = luma.lerp(images, saturation)
    return mean.lerp(images, contrast).mul(brightness * tint).clamp(0, 255)


def augment(images, generator, args):
    """Random crops, flips and what else the recipe asks for: uint8 N x 3 x 64 x 64 to network input N x 3 x 48 x 48."""
    n, device = len(images), images.device
    boxes = random_boxes(n, generator, args.crop)
    flip = torch.rand(n, generator=generator, device=device) < 0.5
    boxes[:, 2] = torch.where(flip, -boxes[:, 2], boxes[:, 2])
    angles = None
    if args.rotate:
        angles = (2 * torch.rand(n, generator=generator, device=device) - 1) * (args.rotate * np.pi / 180)
    pixels = resample(images, boxes, angles)
    if args.colour or args.grey:
        pixels = jitter(pixels, generator, args.colour, args.grey)
    return normalize(pixels)


class Average:
    """Exponential moving average of a network's weights and statistics; young averages forget faster."""

    def __init__(self, net, decay):
        self.net = copy.deepcopy(net)
        self.decay, self.steps = decay, 0

    @torch.no_grad()
    def update(self, net):
        self.steps += 1
        decay = min(self.decay, self.steps / (self.steps + 10))
        ours, theirs = self.net.state_dict(), net.state_dict()
        keys = [key for key, value in ours.items() if value.is_floating_point()]
        torch._foreach_lerp_([ours[key] for key in keys], [theirs[key] for key in keys], 1 - decay)


def class_weights(counts, power):
    """Weights of the classes in the loss: (mean count / count) ** power, so that rare classes count more.

    Parameters
    ----------
    counts : int tensor of shape (nclass,), at least 1
    power : float
        0: all equal; 1: every class counts the same in sum.

    Returns
    -------
    float tensor of shape (nclass,)
    """
    return (counts.sum() / (len(counts) * counts)).float() ** power


def one_cycle_factor(done):
    """Share of the highest learning rate when `done` (0 to 1) of a run is over: up and down along cosines."""
    if done < WARM_UP:
        return 0.04 + 0.96 * (1 - math.cos(math.pi * done / WARM_UP)) / 2
    return (1 + math.cos(math.pi * (min(done, 1) - WARM_UP) / (1 - WARM_UP))) / 2


def learning_rate(args, done):
    """The learning rate after `done` epochs, a float: one-cycle changes it with every step, step with every epoch."""
    if args.schedule == "one-cycle":
        return args.lr * one_cycle_factor(done / args.epochs)
    return args.lr * args.gamma ** (int(done) // args.step_size)


def train_epoch(net, images, labels, momentum, done, batch_size, generator, args, weights, average=None):
    """One pass over the training set.

    Parameters
    ----------
    net : simpleconv3, or one in DistributedDataParallel
    images, labels : uint8 tensor of shape (N, 3, 64, 64), int64 tensor of shape (N,)
    momentum : list of tensors
        SGD's, one for each parameter; changed in place.
    done : int
        Epochs before this one.
    weights : float tensor of shape (nclass,), or None
        Of the classes in the loss.

    Returns
    -------
    float tensor of 3
        Sums over the samples of the loss and of the correct predictions, and the number of samples.
        On the device: nothing here waits for it.
    """
    net.train()
    sums = torch.zeros(3, device=images.device)
    parameters = list(net.parameters())
    batches = torch.randperm(len(images), generator=generator, device=images.device).split(batch_size)
    for i, batch in enumerate(batches):
        target = labels[batch]
        logits = net(augment(images.index_select(0, batch), generator, args))
        loss = F.cross_entropy(logits, target, weights, label_smoothing=args.smoothing)
        net.zero_grad()
        loss.backward()
        # torch.optim.SGD calls the same, but imports torch's compiler first: a second and 146 MB
        with torch.no_grad():
            sgd(parameters, [p.grad for p in parameters], momentum, fused=True, lr=learning_rate(args, done + i / len(batches)),
                momentum=args.momentum, weight_decay=args.weight_decay, nesterov=args.schedule == "one-cycle",
                dampening=0.0, maximize=False)
        if average:
            average.update(net.module if isinstance(net, DistributedDataParallel) else net)
        with torch.no_grad():
            sums += torch.stack([loss * len(batch), (logits.argmax(1) == target).sum(), sums.new_full((), len(batch))])
    return sums


@torch.inference_mode()
def evaluate(net, images, labels, batch_size=128, **looks):
    """Loss and predictions on validation images, uint8 N x 3 x 48 x 48.

    Parameters
    ----------
    **looks
        ``flip`` and ``views``, as for `net.logits_of`.

    Returns
    -------
    loss : float tensor
        Sum over the samples.
    matrix : float tensor of shape (nclass, nclass)
        The confusion matrix: counts, rows are true classes, columns predicted ones.
    logits : float tensor of shape (N, nclass)
    """
    net.eval()
    logits = torch.cat([logits_of(net, normalize(batch), **looks) for batch in images.split(batch_size)])
    return F.cross_entropy(logits, labels, reduction="sum"), confusion_matrix(logits.argmax(1), labels, logits.shape[1]), logits


def confusion_matrix(predicted, labels, nclass):
    """Counts, float nclass x nclass: rows are true classes, columns predicted ones."""
    return torch.bincount(labels * nclass + predicted, minlength=nclass**2).view(nclass, nclass).float()


def calibration_error(probabilities, labels, bins=15):
    """Expected calibration error: mean distance of confidence and accuracy over bins of confidence.

    Parameters
    ----------
    probabilities : float tensor of shape (N, nclass), rows that sum to 1
    labels : int64 tensor of shape (N,)
    bins : int

    Returns
    -------
    float
        0 (as sure as right) to 1. After Guo et al. 2017, "On Calibration of Modern Neural Networks".
    """
    confidence, predicted = probabilities.max(1)
    place = (confidence * bins).long().clamp(max=bins - 1)
    gap = (predicted == labels).float() - confidence
    return float(torch.zeros(bins, device=gap.device).index_add(0, place, gap).abs().sum() / len(labels))


def fit_temperature(logits, labels):
    """The number by which logits must be divided so that their softmax fits the labels best: 0.2 to 5.

    From the same paper; the cross-entropy is computed for 200 temperatures and the best one taken.
    """
    logits, labels = logits.cpu(), labels.cpu()  # Apple's devices have no logspace
    temperatures = torch.logspace(-0.7, 0.7, 200)
    losses = torch.stack([F.cross_entropy(logits / t, labels) for t in temperatures])
    return float(temperatures[losses.argmin()])


def drawable(classes):
    """Class names in the letters of Pillow's own font."""
    return [name if name.isascii() else f"class {i}" for i, name in enumerate(map(printable, classes))]


def fitting(name, font, width):
    """The name, or as much of its beginning as fits into `width` pixels, and three dots."""
    while font.getlength(name) > width:
        name = name.removesuffix("...")[:-1] + "..."
    return name


def draw_matrix(matrix, classes, cell=84):
    """A confusion matrix as a picture: uint8 array H x W x 3; rows true, columns predicted."""
    names = drawable(classes)
    font = ImageFont.load_default(14)
    longest = int(max(font.getlength(name) for name in names))
    left, wide = 24 + longest, max(cell, min(longest + 12, 2 * cell))
    picture = Image.new("RGB", (left + wide * len(names) + 12, cell * len(names) + 56), "white")
    draw = ImageDraw.Draw(picture)
    draw.text((8, 8), "true (rows), predicted (columns)", "grey", font)
    matrix = matrix.cpu()
    share = matrix / matrix.sum(1, keepdim=True).clamp(min=1)
    for i, name in enumerate(names):
        y = 52 + i * cell
        draw.text((8, y + cell / 2), name, "black", font, "lm")
        draw.text((left + i * wide + wide / 2, 46), fitting(name, font, wide - 8), "black", font, "ms")
        for j in range(len(names)):
            x, depth = left + j * wide, float(share[i, j])
            fill = tuple(round(255 - depth * (255 - c)) for c in (31, 98, 168))
            draw.rectangle((x, y, x + wide - 2, y + cell - 2), fill)
            ink = "white" if depth > 0.5 else "black"
            draw.text((x + wide / 2, y + cell / 2 - 8), str(int(matrix[i, j])), ink, font, "mm")
            draw.text((x + wide / 2, y + cell / 2 + 12), f"{depth:.0%}", ink, font, "mm")
    return np.asarray(picture)


def draw_mistakes(images, labels, probabilities, classes, columns=6, rows=3, side=144):
    """The surest of the wrong predictions as a picture: uint8 array H x W x 3.

    Parameters
    ----------
    images : uint8 tensor of shape (N, 3, 48, 48)
    labels : int64 tensor of shape (N,)
    probabilities : float tensor of shape (N, nclass)
    classes : sequence of str
    columns, rows : int
        There are at most columns x rows images, the surest first.
    side : int
        Of an image in the picture, in pixels.
    """
    names, font = drawable(classes), ImageFont.load_default(14)
    confidence, predicted = probabilities.max(1)
    wrong = (predicted != labels).nonzero()[:, 0]
    worst = wrong[confidence[wrong].argsort(descending=True)][:columns * rows].tolist()
    width, height = side + 12, side + 46
    picture = Image.new("RGB", (columns * width + 12, max(1, -(-len(worst) // columns)) * height + 36), "white")
    draw = ImageDraw.Draw(picture)
    draw.text((12, 8), f"{len(wrong):,} of {len(labels):,} are wrong; the surest first", "grey", font)
    for place, i in enumerate(worst):
        x, y = 12 + place % columns * width, 36 + place // columns * height
        picture.paste(Image.fromarray(images[i].permute(1, 2, 0).cpu().numpy()).resize((side, side), Image.Resampling.BICUBIC), (x, y))
        for line, (name, more, ink) in enumerate((
                (names[int(predicted[i])], f"  {float(confidence[i]):.1%}", (178, 34, 34)), (names[int(labels[i])], "  is true", "black"))):
            draw.text((x, y + side + 3 + 18 * line), fitting(name, font, side - font.getlength(more)) + more, ink, font)
    return np.asarray(picture)


def evenly(n, most):
    """At most `most` of the indices 0 to n - 1, evenly spread: int64 tensor."""
    return torch.linspace(0, n - 1, min(n, most), dtype=torch.float64).long()


class Curves:
    """What TensorBoard shows of a run: scalars for every epoch; what takes longer about ten times a run, and at its end.

    With several processes the first one writes. Scalars and confusion matrix are then those of all images; the worst
    mistakes, the precision-recall curves and the projector show its own share of the validation images.

    Parameters
    ----------
    run : Run
        After a resumption its folder holds the curves up to ``run.epoch``; what was written there after it is dropped.
    net : simpleconv3
    sample : float tensor of shape (N, 3, 48, 48)
        Network inputs as training sees them.
    images, labels : uint8 tensor of shape (N, 3, 48, 48), int64 tensor of shape (N,)
        For validation.
    """

    def __init__(self, run, net, sample, images, labels):
        self.run, self.net, self.images, self.labels = run, net, images, labels
        self.names = [printable(name) for name in run.classes]
        # a browser has the letters that the pictures lack
        self.legend = "".join(f", {drawn} is {name}" for drawn, name in zip(drawable(run.classes), self.names) if drawn != name)
        self.writer = SummaryWriter(run.log_dir, purge_step=run.epoch + 1 if run.epoch else None, max_queue=1000)  # a short queue waits
        settings = {key: str(value) if isinstance(value, (bool, list)) else value for key, value in vars(run.args).items()
                    if key != "resume" and not isinstance(value, Path)}
        # add_hparams would put them into a run of their own; without the first, which lists columns, TensorBoard shows what differs
        _, begun, self.done = hparams(settings, {})
        if run.epoch:
            return
        self.writer.file_writer.add_summary(begun, 0)
        self.writer.add_custom_scalars({"curves": {
            "loss": ["Multiline", ["data/trainloss", "data/valloss"]],
            "accuracy": ["Multiline", ["data/trainacc", "data/valacc", "data/valbalanced"]],
            "recall of the classes": ["Multiline", ["recall/.*"]]}})
        self.writer.add_images("augmented training crops", sample / 2 + 0.5, 0)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch calls tracing deprecated
            # traced here, because add_graph would trace twice to compare, and load torch's distributed tensors for that: 2 seconds
            self.writer.add_graph(torch.jit.trace(net.eval(), sample[:1], check_trace=False), sample[:1])

    def epoch(self, scores, matrix, logits, judged):
        """Write an epoch's curves.

        Parameters
        ----------
        scores : dict
        matrix : float tensor of shape (nclass, nclass)
            Confusion matrix; rows are true classes.
        logits : float tensor of shape (N, nclass)
            Of the validation images.
        judged : simpleconv3
            That gave the logits.
        """
        epoch, args, add = scores["epoch"], self.run.args, self.writer
        for tag in ("train_loss", "train_acc", "val_loss", "val_acc", "val_balanced"):
            add.add_scalar(f"data/{tag.replace('_', '')}", scores[tag], epoch)
        add.add_scalar("learning rate", learning_rate(args, epoch - 1), epoch)
        for name, recall in zip(self.names, (matrix.diagonal() / matrix.sum(1)).tolist()):
            add.add_scalar(f"recall/{name}", recall, epoch)
        if epoch % math.ceil(args.epochs / 10) and epoch != args.epochs:
            return
        # TensorBoard's table of settings shows the first five tags: these
        for key in ("val_acc", "val_balanced", "val_loss"):
            add.add_scalar(f"best/{key}", self.run.best[key], epoch)
        add.add_scalar("best/seconds", self.run.seconds, epoch)
        probabilities = logits.softmax(1)
        self.show("confusion matrix", draw_matrix(matrix, self.run.classes), epoch)
        self.show("worst mistakes", draw_mistakes(self.images, self.labels, probabilities, self.run.classes), epoch)
        for i, name in enumerate(self.names):
            add.add_pr_curve(f"precision and recall/{name}", self.labels == i, probabilities[:, i], epoch)
        for name, parameter in self.net.named_parameters():
            values = parameter.detach().flatten()  # 10,000 show the same histogram as fc1's 1.4 million in a hundredth of the time
            add.add_histogram(name.replace(".", "/"), values[evenly(len(values), 10_000).to(values.device)], epoch, bins=60)
        if epoch == args.epochs:
            self.project(judged, probabilities)
            add.file_writer.add_summary(self.done, epoch)

    def show(self, tag, picture, epoch):
        """Write a picture, uint8 H x W x 3, as a JPEG: SummaryWriter.add_image makes a PNG, in ten times the time and twice the size."""
        jpeg = io.BytesIO()
        Image.fromarray(picture).save(jpeg, "JPEG", quality=85, subsampling=0)
        height, width, _ = picture.shape
        image = Summary.Image(height=height, width=width, colorspace=3, encoded_image_string=jpeg.getvalue())
        self.writer.file_writer.add_summary(Summary(value=[Summary.Value(tag=tag + self.legend, image=image)]), epoch)

    @torch.inference_mode()
    def project(self, judged, probabilities, most=1000):
        """Write the 128 features of at most `most` validation images for TensorBoard's projector.

        The files are as SummaryWriter.add_embedding makes them, in a tenth of its time and always in the same place.
        """
        chosen = evenly(len(self.images), most).to(self.images.device)
        images, folder = self.images[chosen], Path(self.run.log_dir)
        features = judged.features(normalize(images)).cpu().numpy()
        np.savetxt(folder / "features.tsv", features, "%.5g", "\t")
        confidence, predicted = probabilities[chosen].max(1)
        rows = ["true\tpredicted\tprobability\tright"] + [
            f"{self.names[true]}\t{self.names[ours]}\t{sure:.3f}\t{'yes' if ours == true else 'no'}"
            for true, ours, sure in zip(self.labels[chosen].tolist(), predicted.tolist(), confidence.tolist())]
        (folder / "labels.tsv").write_text("\n".join(rows) + "\n", "utf-8", newline="\n")
        n, columns, side = len(images), math.ceil(len(images) ** 0.5), images.shape[3]
        sprite = np.zeros((columns**2, side, side, 3), np.uint8)
        sprite[:n] = images.permute(0, 2, 3, 1).cpu().numpy()
        sprite = sprite.reshape(columns, columns, side, side, 3).swapaxes(1, 2).reshape(columns * side, columns * side, 3)
        Image.fromarray(sprite).save(folder / "sprite.png", compress_level=1)
        (folder / "projector_config.pbtxt").write_text(
            'embeddings { tensor_name: "features" tensor_path: "features.tsv" metadata_path: "labels.tsv"\n'
            f'  sprite {{ image_path: "sprite.png" single_image_dim: {side} single_image_dim: {side} }} }}\n', "utf-8")

    def close(self):
        self.writer.close()


class Run:
    """What a training run writes: curves, the best model, and a checkpoint to resume from.

    The state is held in memory and goes to the disk every `SAVE_SECONDS` and at the end, however it comes.
    """

    def __init__(self, args, classes, sizes, identity):
        self.args, self.classes, self.sizes, self.identity = args, classes, sizes, identity
        self.epoch = 0  # epochs done
        self.seconds = 0.0
        self.best = self.best_weights = self.last = self.state = None
        name = f"{datetime.now():%Y-%m-%d_%H-%M-%S}_{args.recipe}"
        places = (args.logs / (f"{name}_{i}" if i > 1 else name) for i in itertools.count(1))  # two may begin within a second
        self.log_dir = str(next(place for place in places if not place.exists()))
        self.unsaved = False
        self.saved_at = -SAVE_SECONDS

    def record(self, net, average, momentum, scores, logits, labels):
        """Note a finished epoch. Returns whether it is the best so far."""
        self.epoch, self.last = scores["epoch"], scores
        net = {key: value.clone() for key, value in net.state_dict().items()}
        weights = {key: value.clone() for key, value in average.net.state_dict().items()} if average else net
        better = self.best is None or (scores["val_acc"], -scores["val_loss"]) > (self.best["val_acc"], -self.best["val_loss"])
        if better:
            error, temperature = calibration_error(logits.softmax(1), labels), 1.0
            if error > MAX_CALIBRATION_ERROR:
                temperature = fit_temperature(logits, labels)
            self.best = scores | {"calibration_error": round(error, 4), "temperature": round(temperature, 4)}
            self.best_weights = weights
        settings = {key: str(value) if isinstance(value, Path) else value for key, value in vars(self.args).items()}
        self.state = {
            "net": net, "average": weights if average else None, "best_net": self.best_weights,
            "momentum": [buffer.clone() for buffer in momentum], "average_steps": average.steps if average else 0,
            "epoch": self.epoch, "best": self.best, "last": self.last, "seconds": self.seconds,
            "classes": list(self.classes), "args": settings, "log_dir": self.log_dir, "data": self.identity,
        }
        self.unsaved = True
        if time.perf_counter() - self.saved_at > SAVE_SECONDS:
            self.save()
        return better

    def save(self):
        """Write models/checkpoint.pt, model.pt and model.json, if an epoch has ended since the last time."""
        if not self.unsaved:
            return
        atomic_write(self.args.models / CHECKPOINT, lambda file: torch.save(self.state, file))
        net = simpleconv3(len(self.classes))
        net.load_state_dict(self.best_weights)
        net.classes = self.classes
        settings = {k: v for k, v in self.state["args"].items() if k not in {"resume", "data", "logs", "models", "device"}}
        save_model(
            net, self.args.models / "model.pt", flip=self.args.flip, views=self.args.views,
            temperature=self.best["temperature"], best=self.best, last=self.last, images=self.sizes,
            settings=settings, seconds=round(self.seconds, 1), torch=torch.__version__,
            command=shlex.join(["python", Path(sys.argv[0]).name, *sys.argv[1:]]), log=self.log_dir)
        self.unsaved = False
        self.saved_at = time.perf_counter()

    def restore(self, state, net, average, momentum):
        """Go on from what `read_checkpoint` read. Network, average and momentum are changed in place.

        Raises
        ------
        KeyError, or almost anything else
            Something is missing, or of another kind or shape.
        """
        for weights in (state["best_net"], state["net"]):
            net.load_state_dict(weights)
        if average:
            average.net.load_state_dict(state["average"])
            average.steps = state["average_steps"]
        for buffer, stored in zip(momentum, state["momentum"], strict=True):
            buffer.copy_(stored)
        self.state, self.epoch, self.seconds = state, operator.index(state["epoch"]), float(state["seconds"])
        self.best, self.last, self.best_weights = state["best"], state["last"], state["best_net"]
        for scores, key in itertools.product((self.best, self.last), ("epoch", "val_acc", "val_balanced", "val_loss")):
            float(scores[key])
        float(self.best["temperature"])
        self.log_dir = str(self.args.logs / state["log_dir"])
        self.unsaved = True  # a kill may have come between the checkpoint and the model


def read_checkpoint(path):
    """The state that `Run.save` wrote. It may come from a stranger: its ``log_dir`` is made the mere name of a folder."""
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no run to resume; start one without --resume")
    try:
        state = read_saved(path, MAX_CHECKPOINT)
        missing = {"args", "classes", "net", "momentum", "log_dir"} - set(state)
        if missing:
            raise ValueError(f"holds no {min(missing)}")
        check_classes(state["classes"])
        for key, value in {**RECIPES["textbook"], "recipe": "", "seed": 0, "device": ""}.items():
            if not isinstance(state["args"].get(key, value), type(value)):
                raise ValueError(f"its {key} is {reason(state['args'][key])}")
        check_views(state["args"].get("views", [CROP_SIZE]))
        state["log_dir"] = PureWindowsPath(state["log_dir"]).name  # which knows the separators of all systems
        if NO_CLASS_NAME.search(state["log_dir"]):
            raise ValueError("its curves were in no folder of their own")
        return state
    except Exception as error:  # torch.load raises almost anything
        raise ValueError(f"{path}: damaged ({reason(error)}); start again without --resume") from None


@contextlib.contextmanager
def uninterrupted():
    """Ctrl-C waits for the end of this block: within TensorBoard's queue it would make the end wait for ever."""
    if threading.current_thread() is not threading.main_thread():  # where signals never arrive
        yield
        return
    caught = []
    before = signal.signal(signal.SIGINT, lambda *_: caught.append(1))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
    if caught:
        raise KeyboardInterrupt


def train(args):
    """Train as the command line says; see the parser for the settings. Returns the `Run`."""
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    device = torch.device(args.device)
    if device.type != "cpu" and world > 1:
        local, there = int(os.environ["LOCAL_RANK"]), torch.accelerator.device_count()
        if local >= there:
            raise ValueError(f"--device {device.type}: this machine has {there}; start as many processes, or add --device cpu")
        device = torch.device(device.type, local)
    if world > 1 and not dist.is_initialized():
        dist.init_process_group(dist.get_default_backend_for_device(device.type))
    if args.batch_size % world:
        raise ValueError(f"--batch-size {args.batch_size}: must be a multiple of the {world} processes that share it")
    resumed = read_checkpoint(args.models / CHECKPOINT) if args.resume else None

    start = time.perf_counter()
    classes, train_set, val_set = load_data(args.data, rank, world)
    if resumed and tuple(resumed["classes"]) != classes:
        raise ValueError(f"{args.models / CHECKPOINT}: was trained on {', '.join(resumed['classes'])}, "
                         f"but {args.data} holds {', '.join(classes)}; start again without --resume")
    identity = identify(args.data)
    if resumed and resumed.get("data", identity) != identity:
        raise ValueError(f"{args.data}: holds other images than those of the run to resume; start again without --resume")
    images, labels, val_images, val_labels = (t.to(device) for t in (*train_set, *val_set))
    sizes = torch.tensor([len(images), len(val_images)], device=device)
    if world > 1:
        # every rank must take the same number of steps: short shares repeat a few of their images
        longest = sizes[:1].clone()
        dist.all_reduce(longest, dist.ReduceOp.MAX)
        dist.all_reduce(sizes)
        extra = torch.arange(int(longest)) % len(images)
        images, labels = images[extra], labels[extra]
    sizes = {"train": int(sizes[0]), "val": int(sizes[1])}

    torch.manual_seed(args.seed)
    net = simpleconv3(len(classes)).to(device)
    momentum = [torch.zeros_like(parameter) for parameter in net.parameters()]
    share = args.batch_size // world
    average = Average(net, args.average) if args.average else None
    run = Run(args, classes, sizes, identity)
    if resumed:
        try:
            run.restore(resumed, net, average, momentum)
            begun = resumed["args"]["epochs"]
        except Exception as error:
            raise ValueError(f"{args.models / CHECKPOINT}: damaged ({reason(error)}); start again without --resume") from None
        if args.schedule == "one-cycle" and args.epochs != begun:
            raise ValueError(f"--epochs {args.epochs}: a one-cycle run that was begun for {begun} epochs cannot be resumed for another number")
    judged = average.net if average else net  # what is validated and saved
    model = DistributedDataParallel(net) if world > 1 else net
    weights = None
    if args.balance:
        counts = torch.bincount(labels, minlength=len(classes))
        if world > 1:
            dist.all_reduce(counts)
        weights = class_weights(counts, args.balance)

    log = None
    if rank == 0:
        print(f"{sizes['train']:,} training and {sizes['val']:,} validation images of {len(classes)} classes "
              f"({printable(', '.join(classes))}) in {time.perf_counter() - start:.1f} s; on {device}"
              + (f", {world} processes" if world > 1 else "") + (f"; resuming after epoch {run.epoch} of {args.epochs}" if resumed else ""), flush=True)
        if run.epoch >= args.epochs:
            print("nothing is left to do" + ("; --epochs with a larger number goes on" if args.schedule == "step" else ""))
        sample = augment(images[evenly(len(images), 64).to(device)], torch.Generator(device).manual_seed(0), args)
        log = Curves(run, net, sample, val_images, val_labels)
    bar = tqdm(range(run.epoch + 1, args.epochs + 1), initial=run.epoch, total=args.epochs, unit="epoch", disable=None if rank == 0 else True)
    try:
        for epoch in bar:
            # seeded by epoch and rank, so that a resumed run draws what an undisturbed one would have
            generator = torch.Generator(device).manual_seed((args.seed * 100_003 + epoch) * 4_099 + rank)
            times = [time.perf_counter()]
            sums = train_epoch(model, images, labels, momentum, epoch - 1, share, generator, args, weights, average)
            if world > 1:
                dist.all_reduce(sums)
            train_loss, train_acc, train_n = sums.tolist()
            times.append(time.perf_counter())
            if world > 1:  # normalisation's statistics are each process's own: judge the first one's, which are saved
                for buffer in judged.buffers():
                    dist.broadcast(buffer, 0)
            val_loss, matrix, logits = evaluate(judged, val_images, val_labels, flip=args.flip, views=args.views)
            if world > 1:
                dist.all_reduce(val_loss)
                dist.all_reduce(matrix)
            val_n = sizes["val"]
            val_loss, recalls = float(val_loss), matrix.diagonal() / matrix.sum(1)
            times.append(time.perf_counter())
            scores = {"epoch": epoch, "train_loss": train_loss / train_n, "train_acc": train_acc / train_n,
                      "val_loss": val_loss / val_n, "val_acc": float(matrix.trace()) / val_n, "val_balanced": float(recalls.mean())}
            if not np.isfinite(scores["train_loss"] + scores["val_loss"]):
                raise ValueError(f"epoch {epoch}: the loss is no longer a number; try a lower --lr than {args.lr:g}")
            run.seconds += times[2] - times[0]
            if rank:
                continue
            with uninterrupted():
                better = run.record(net, average, momentum, scores, logits, val_labels)
                tqdm.write(
                    f"epoch {epoch:3}/{args.epochs}  train loss {scores['train_loss']:.4f} acc {scores['train_acc']:7.2%}"
                    f" {train_n / (times[1] - times[0]):7,.0f}/s  val loss {scores['val_loss']:.4f}"
                    f" acc {scores['val_acc']:7.2%} {val_n / (times[2] - times[1]):7,.0f}/s{'  best' if better else ''}", file=sys.stdout)
                sys.stdout.flush()  # into a file or a pipe, too, as they come
                log.epoch(scores, matrix, logits, judged)
    finally:
        bar.close()
        if rank == 0:
            with uninterrupted():
                with contextlib.suppress(OSError):  # a full disk; the error that is under way, or the next one, says so
                    log.close()
                run.save()
    return run


def parse_args(argv=None):
    title, examples, more = __doc__.strip().split("\n\n")
    parser = argparse.ArgumentParser(
        usage="python train.py [options]", description=f"{title}\n\n{more}", epilog=f"examples:\n{examples}",
        formatter_class=lambda prog: argparse.RawDescriptionHelpFormatter(prog, max_help_position=34))
    recipe = parser.add_argument_group("recipe: each flag overrides what --recipe sets; defaults for textbook / strong")

    def setting(flag, help, **more):
        values = [RECIPES[name][flag.strip("-").replace("-", "_")] for name in RECIPES]
        a, b = (" ".join(map(str, value)) if isinstance(value, list) else value for value in values)
        recipe.add_argument(flag, help=f"{help} ({a} / {b})", **more)

    recipe.add_argument("--recipe", choices=RECIPES, default="textbook",
                        help="as printed there, or better, in fewer epochs (default: %(default)s)")
    setting("--epochs", "passes over the training set", type=int, metavar="N")
    setting("--batch-size", "over all processes", type=int, metavar="N")
    setting("--lr", "highest learning rate", type=float, metavar="LR")
    setting("--momentum", "of SGD; Nesterov's with one-cycle", type=float, metavar="M")
    setting("--weight-decay", "of SGD", type=float, metavar="W")
    setting("--schedule", "of the learning rate", choices=["step", "one-cycle"])
    setting("--step-size", "epochs after which it drops, with step", type=int, metavar="N")
    setting("--gamma", "and by which factor", type=float, metavar="G")
    setting("--crop", "least share of the area that a random crop keeps", type=float, metavar="A")
    setting("--rotate", "random turns up to this many degrees", type=float, metavar="D")
    setting("--colour", "change of brightness, contrast, saturation", type=float, metavar="C")
    setting("--grey", "share of images that lose their colour to a tint", type=float, metavar="P")
    setting("--smoothing", "of the labels", type=float, metavar="S")
    setting("--average", "decay of a moving average of the weights; 0: none", type=float, metavar="D")
    setting("--balance", "rare classes count more; 1: all the same in sum", type=float, metavar="P")
    setting("--flip", "predict the mean of a crop and its mirror image", action=argparse.BooleanOptionalAction)
    setting("--views", "predict the mean of central squares of these sides", type=int, nargs="+", metavar="S")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="(default: %(default)s)")
    parser.add_argument("--device", default=None, help="cpu, cuda, mps ... (default: the accelerator, if any)")
    parser.add_argument("--data", type=Path, default=Path("data"), help="holds train/ and val/ (default: %(default)s)")
    parser.add_argument("--logs", type=Path, default=Path("logs"), help="for TensorBoard (default: %(default)s)")
    parser.add_argument("--models", type=Path, default=Path("models"), help="for model.pt and model.json (default: %(default)s)")
    parser.add_argument("--resume", action="store_true",
                        help=f"go on from <models>/{CHECKPOINT} with that run's settings")
    args = parser.parse_args(argv)
    parser.set_defaults(**RECIPES[args.recipe])
    args = parser.parse_args(argv)
    if args.resume:
        stored = read_checkpoint(args.models / CHECKPOINT)["args"]
        # where the run is written is said here, not in the checkpoint: it may have moved, or come from a stranger
        known = set(vars(args)) - {"resume", "data", "logs", "models"}
        parser.set_defaults(**{key: value for key, value in stored.items() if key in known})
        args = parser.parse_args(argv)
        for name in ("recipe", "average", "flip", "views"):  # without which its scores would be another model's
            if getattr(args, name) != stored.get(name, getattr(args, name)):
                parser.error(f"--{name} {getattr(args, name)}: the run to resume was begun with {stored[name]}; start again without --resume")
    for name in ("epochs", "batch_size", "step_size"):
        if getattr(args, name) < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1")
    for most, names in ((1, "crop colour grey smoothing average momentum weight_decay"), (10, "balance"), (180, "rotate"), (2**31, "seed"), (math.inf, "gamma")):
        for name in names.split():
            if not 0 <= getattr(args, name) <= most:  # nor not a number
                parser.error(f"--{name.replace('_', '-')} must be between 0 and {most}")
    if not args.lr > 0:
        parser.error("--lr must be more than 0")
    try:
        check_views(args.views)
    except ValueError as error:
        parser.error(f"--{error}")
    accelerator = [torch.accelerator.current_accelerator().type] if torch.accelerator.is_available() else []
    if args.device is None:
        args.device = (accelerator + ["cpu"])[0]
    try:
        kind = torch.device(args.device).type
    except RuntimeError:  # no kind of device at all
        kind = None
    if kind not in accelerator + ["cpu"]:
        parser.error(f"--device {printable(args.device)}: this machine has {' and '.join(accelerator + ['cpu'])}")
    return args


def main(argv=None):
    escape_output()
    # TensorBoard's thread hands its errors on; they need not be shown twice
    threading.excepthook = lambda failed: issubclass(failed.exc_type, OSError) or threading.__excepthook__(failed)
    args, begun = None, time.time()
    try:
        args = parse_args(argv)
        # the ranks of a job are one run: the first holds the folder for all
        with locked(args.models) if int(os.environ.get("RANK", 0)) == 0 else contextlib.nullcontext():
            run = train(args)
    except (KeyboardInterrupt, BrokenPipeError) as error:
        if isinstance(error, BrokenPipeError):  # `| head` has seen enough
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if not args or not (args.models / CHECKPOINT).is_file() or (args.models / CHECKPOINT).stat().st_mtime < begun:
            sys.exit("\ninterrupted before an epoch was finished: nothing is saved")
        places = [word for flag in ("data", "logs", "models") if args and getattr(args, flag) != Path(flag)
                  for word in (f"--{flag}", str(getattr(args, flag)))]
        again = printable(shlex.join(["python", "train.py", "--resume", *places]))
        sys.exit(f"\ninterrupted: all finished epochs are saved; '{again}' goes on")
    except (OSError, ValueError) as error:
        if getattr(error, "strerror", None) and not error.filename:  # from TensorBoard, which names no file
            error = f"{args.logs}: cannot be written ({error.strerror}); mend that and go on with --resume"
        sys.exit(f"error: {printable(str(error))}")
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
    if int(os.environ.get("RANK", 0)) == 0:
        best = run.best
        print(f"best: {best['val_acc']:.2%} of {run.sizes['val']:,} validation images (balanced over the classes {best['val_balanced']:.2%}), epoch {best['epoch']}; "
              f"last: {run.last['val_acc']:.2%}; {run.seconds:.0f} s of training")
        if run.sizes["val"] < 100:
            print(f"one validation image more or less is {1 / run.sizes['val']:.1%}: of so few, these figures say little")
        print(f"weights in {run.args.models / 'model.pt'}, the rest in {run.args.models / 'model.json'}; "
              f"curves: tensorboard --logdir {run.args.logs}")


if __name__ == "__main__":
    main()
