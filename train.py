"""Train simpleconv3 on mouth crops: data/train and data/val to models/model.pt and curves in logs/.

    python train.py                              the textbook's recipe: 300 epochs, SGD, StepLR
    python train.py --recipe strong              better, in fewer epochs
    python train.py --recipe finetune            from trained weights: a few photos are enough
    python train.py --resume                     go on after Ctrl-C or a crash
    torchrun --nproc_per_node=2 -- train.py      the same on two processes or GPUs, or many machines

models/model.pt is a plain state dict of the kept epoch: the one with the best validation accuracy, or
the last one where the learning rate ends at zero. models/model.json beside it says everything else.
"""

import gc

gc.disable()  # loading torch makes a million objects and no garbage; looking for it would take half a second

import argparse
import contextlib
import copy
import errno
import functools
import hashlib
import io
import itertools
import math
import os
import pickle
import shlex
import signal
import sys
import tempfile
import threading
import time
import warnings
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime
from pathlib import Path, PureWindowsPath
from typing import NamedTuple

import filelock
import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import ExifTags, Image, ImageDraw, ImageFont, PngImagePlugin
from torch import nn, optim
from torch.nn.parallel import DistributedDataParallel
from torch.optim.lr_scheduler import LambdaLR, StepLR
from torch.optim.swa_utils import AveragedModel
from torch.utils.tensorboard import SummaryWriter
from torch.utils.tensorboard.summary import hparams
from torchvision.datasets import ImageFolder
from tqdm import tqdm

from net import (
    CROP_SIZE,
    NO_CLASS_NAME,
    PRETRAINED,
    check_classes,
    load_model,
    normalize,
    printable,
    reason,
    save_model,
    simpleconv3,
    square,
    write_file,
)

gc.enable()
gc.freeze()  # what is loaded stays to the end, where looking through it would take another second

# --- recipes

# What --recipe sets; a flag of the same name overrides it. tests/bench/README.md says how they were found.
RECIPES = {
    "textbook": dict(
        weights=None, epochs=300, batch_size=64, lr=0.1, momentum=0.9, weight_decay=0.0,
        schedule="step", step_size=100, gamma=0.1, crop=[0.08, 1.0], shift=0.0, flip=True, rotate=0.0,
        colour=0.0, grey=0.0, smoothing=0.0, average=0.0, balance=0.0, freeze_norm=False, keep="best"),
    "strong": dict(
        weights=None, epochs=100, batch_size=64, lr=0.1, momentum=0.9, weight_decay=2e-3,
        schedule="one-cycle", step_size=100, gamma=0.1, crop=[0.4, 1.4], shift=0.12, flip=True, rotate=15.0,
        colour=0.3, grey=0.3, smoothing=0.02, average=0.99, balance=0.5, freeze_norm=False, keep="last"),
}
RECIPES["finetune"] = RECIPES["strong"] | dict(weights=PRETRAINED, epochs=20, lr=0.005, freeze_norm=True)
SETTINGS = ("recipe", *RECIPES["textbook"], "seed", "amp")  # what --resume takes from the checkpoint

IMAGE_SIZE = 64  # side of the training images in memory; random crops are taken from them
RATIO = (3 / 4, 4 / 3)  # aspect ratio of the random crops
WARM_UP = 0.25  # share of a one-cycle run in which the learning rate rises
CALIBRATION_IMAGES = 200  # with fewer for validation a temperature would be fitted to chance
CALIBRATION_ERROR = 0.02  # up to here no temperature is needed
FEW_IMAGES = 20  # with fewer for validation some of all images are left out in turns, too
FEW_STEPS = 2000  # as long as that takes no more batches: seconds
CHECKPOINT = "checkpoint.pt"
SAVE_SECONDS = 20  # a kill costs at most this much training and the epoch that it hits


# --- data: every crop is decoded once, into one tensor


# folders that disk stations (NAS) and systems put between the images: thumbnails, bins, resource forks
OTHERS = ("@eadir", "@tmp", "@recycle", "#recycle", "#snapshot", "$recycle.bin", "__macosx", "lost+found")


def is_hidden(name):
    """Whether a file or folder is hidden or another program's own."""
    return name.startswith((".", "~$")) or name.lower() in OTHERS


def walk(folder):
    """Image files below a folder, sorted; links are followed, hidden names and circles of links are not."""
    suffixes, seen, found = Image.registered_extensions(), set(), []
    for place, folders, files in os.walk(folder, followlinks=True):
        real = os.path.realpath(place)
        folders[:] = [name for name in folders if not is_hidden(name) and real not in seen]
        if real not in seen:
            found += [os.path.join(place, name) for name in files
                      if not is_hidden(name) and os.path.splitext(name)[1].lower() in suffixes]
        seen.add(real)
    return sorted(found)


# what Pillow has to say about metadata must cost no image, nor break the progress bar
PngImagePlugin.MAX_TEXT_CHUNK = PngImagePlugin.MAX_TEXT_MEMORY = 2**28
warnings.filterwarnings("ignore", module="PIL")
# by EXIF orientation, what turns an image upright
UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180, 4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_270, 7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def load_crop(path):
    """A crop, upright and on white where it is transparent: RGB PIL image, of JPEGs smaller than the file."""
    with Image.open(path) as image:
        if image.format in ("EPS", "WMF"):  # Pillow has Ghostscript or Windows run them: they are programs
            raise ValueError(f"{image.format} is not read")
        if image.mode.startswith(("I", "F")):  # converted, it would be white
            raise ValueError("more than 8 bits a channel; save it with 8")
        image.draft("RGB", (IMAGE_SIZE, IMAGE_SIZE))  # JPEGs decode at a fraction of their size, much faster
        clear = image.has_transparency_data
        try:
            turn = UPRIGHT.get(image.getexif().get(ExifTags.Base.Orientation))
        except Exception:  # a damaged tag of no interest
            turn = None
        if clear:
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image.convert("RGBA"))
        image = image.convert("RGB")
        return image if turn is None else image.transpose(turn)


class CropFolder(ImageFolder):
    """torchvision's ImageFolder, without hidden files and folders and without classes that have no image."""

    def __init__(self, root):
        if not Path(root).is_dir():
            raise FileNotFoundError(f"{root}: no such folder; 'python split_train_val.py' makes it")
        super().__init__(root, loader=load_crop)

    def find_classes(self, directory):
        names = sorted(e.name for e in os.scandir(directory) if e.is_dir() and not is_hidden(e.name))
        self.paths = {name: paths for name in names if (paths := walk(os.path.join(directory, name)))}
        if not self.paths:
            raise FileNotFoundError(
                f"{directory}: no images in class folders; 'python split_train_val.py' makes them")
        return list(self.paths), {name: i for i, name in enumerate(self.paths)}

    def make_dataset(self, directory, class_to_idx, *_, **__):
        return [(path, i) for name, i in class_to_idx.items() for path in self.paths[name]]


def free_memory():
    """Bytes of memory that can be had without swapping; infinite where the system does not tell."""
    try:
        with open("/proc/meminfo") as file:
            available = next(line for line in file if line.startswith("MemAvailable"))
            return 1024 * int(available.split()[1])
    except (OSError, StopIteration):
        return math.inf


def empty_images(shape, folder):
    """A uint8 array in memory, or in an unnamed file in `folder` if half of the free memory is too little."""
    if math.prod(shape) <= free_memory() / 2:
        return np.empty(shape, np.uint8)
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            if hasattr(os, "posix_fallocate"):  # a full disk says so now, not by a fatal signal later
                os.posix_fallocate(file.fileno(), 0, math.prod(shape))
            return np.memmap(file, np.uint8, "w+", shape=shape)
    except OSError as error:
        raise OSError(f"{folder}: no room for {math.prod(shape) >> 20} MiB of images, which the memory "
                      f"is too small for ({error.strerror})") from None


def load_images(paths, size, folder, name="images"):
    """Decode images on all cores.

    Parameters
    ----------
    paths : list of path-like
    size : int
        Side of the results: the shorter side is resized to it, the central square kept.
    folder : path-like
        Where an unnamed file takes the images that do not fit in half of the free memory.
    name : str
        Shown at the progress bar.

    Returns
    -------
    uint8 tensor of shape (len(paths), 3, size, size)

    Raises
    ------
    OSError
        An image cannot be decoded; the message names it.
    """
    images = empty_images((len(paths), 3, size, size), folder)

    def decode(some):
        for i in some:
            try:
                images[i] = square(load_crop(paths[i]), size).numpy()
            except Exception as error:  # decoders raise almost anything
                raise OSError(f"{paths[i]}: not a readable image ({error}); "
                              "remove it and run the command again") from None
        return len(some)

    batches = [range(i, min(i + 64, len(paths))) for i in range(0, len(paths), 64)]
    with (ThreadPoolExecutor(os.cpu_count()) as pool,
          tqdm(total=len(paths), desc=name, unit="image", leave=False, disable=None) as bar):
        try:
            for done in pool.map(decode, batches):
                bar.update(done)
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    return torch.from_numpy(images)


class Data(NamedTuple):
    """What `load_data` returns. With several processes the tensors hold a share, the rest is of all."""

    classes: tuple  # of str, sorted
    images: torch.Tensor  # to train on: uint8 N x 3 x 64 x 64
    labels: torch.Tensor  # int64 N
    val_images: torch.Tensor  # uint8 N x 3 x 48 x 48
    val_labels: torch.Tensor  # int64 N
    counts: torch.Tensor  # training images of each class: int64
    sizes: dict  # number of images, "train" and "val"
    identity: str  # a hash of names and sizes of the files


def load_data(data, rank=0, world=1):
    """Read ``data/train`` and ``data/val``.

    Parameters
    ----------
    data : Path
    rank, world : int
        Of the images in random order, every `world`-th from `rank` on is loaded. Where that leaves a
        process one training image less, it gets another one twice: all must take the same number of steps.

    Returns
    -------
    Data

    Raises
    ------
    OSError
        A folder is missing or empty, or an image cannot be decoded.
    ValueError
        There are fewer than two classes, or a class is only on one side.
    """
    train, val = CropFolder(data / "train"), CropFolder(data / "val")
    for here, there in ((train, val), (val, train)):
        for name in sorted(set(here.classes) - set(there.classes)):
            n = here.targets.count(here.class_to_idx[name])
            raise ValueError(
                f"{here.root}: all {n} crops of class {name} are here, none in {there.root}; "
                + ("they belong together, so add photos of other people or places" if n > 1 else
                   "give it two or more crops") + " and run 'python split_train_val.py' again")
    classes = tuple(train.classes)
    check_classes(classes)  # now, not when the trained model is loaded
    if len(classes) < 2:
        raise ValueError(f"{train.root}: only one class, {classes[0]}; "
                         "a classifier needs two or more folders of photos")
    tensors = []
    for folder, size in ((train, IMAGE_SIZE), (val, CROP_SIZE)):
        if len(folder) < world:
            raise ValueError(f"{folder.root}: {len(folder)} images are too few for {world} processes; "
                             "start fewer")
        samples = folder.samples
        if world > 1:  # class by class, neighbours are alike: in random order every share holds all classes
            order = torch.randperm(len(folder), generator=torch.Generator().manual_seed(0)).tolist()
            samples = [samples[i] for i in order]
        share = samples[rank::world]
        if folder is train and len(share) < math.ceil(len(folder) / world):
            share.append(share[0])
        paths, labels = zip(*share)
        tensors += [load_images(paths, size, data, Path(folder.root).name), torch.tensor(labels)]
    files = [(path, os.path.getsize(path)) for folder in (train, val) for path, _ in folder.samples]
    names = [(os.path.relpath(path, data), size) for path, size in files]
    identity = hashlib.sha1(repr(names).encode("utf-8", "surrogateescape")).hexdigest()
    counts = torch.bincount(torch.tensor(train.targets), minlength=len(classes))
    return Data(classes, *tensors, counts, {"train": len(train), "val": len(val)}, identity)


# --- augmentation: random crops, turns and colours of a whole batch, with one resampling


def random_boxes(n, generator, area=(0.08, 1.0), shift=0.0):
    """Random crops of a square image, by default distributed as torchvision's ``RandomResizedCrop``.

    Parameters
    ----------
    n : int
    generator : torch.Generator
        Its device is the result's.
    area : pair of floats
        The crop's share of the image's area is uniform between the two; over 1 it goes beyond the border. The
        logarithm of width over height is uniform in that of `RATIO`.
    shift : float
        A crop as large as the image is off its centre by up to this share of half the side.

    Returns
    -------
    float tensor of shape (n, 4)
        Centre x, centre y, half width, half height; the image spans -1 to 1.
    """
    u = torch.rand(n, 22, generator=generator, device=generator.device)
    areas = area[0] + (area[1] - area[0]) * u[:, :10]
    low, high = np.log(RATIO[0]), np.log(RATIO[1])
    aspect = (low + (high - low) * u[:, 10:20]).exp()
    half = torch.stack([(areas * aspect).sqrt(), (areas / aspect).sqrt()], 2)
    # the first of ten tries that fits; the whole image where none does
    fits = (half <= 1).all(2) | (area[1] > 1)
    first = fits.float().argmax(1)
    half = half.gather(1, first[:, None, None].expand(-1, 1, 2))[:, 0]
    half = torch.where(fits.any(1, keepdim=True), half, torch.ones_like(half))
    centre = (2 * u[:, 20:] - 1) * (1 - half).abs().clamp(min=shift)
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

    Images that lose their colour are tinted, each channel by such a factor: a network that sees only grey
    photos would answer to colour with whatever its first weights happened to be.

    Parameters
    ----------
    images : float tensor of shape (N, 3, H, W), values 0 to 255
    generator : torch.Generator
    strength : float
    grey : float
        Share of the images that lose their colour.

    Returns
    -------
    float tensor of the same shape and range
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


def augment(images, generator, crop=(0.08, 1.0), shift=0.0, flip=True, rotate=0.0, colour=0.0, grey=0.0):
    """Training images as the network sees them.

    Parameters
    ----------
    images : uint8 tensor of shape (N, 3, 64, 64)
    generator : torch.Generator
    crop, shift : pair of floats, float
        Area and shift of the random crops; see `random_boxes`.
    flip : bool
        Mirror every other image.
    rotate : float
        Largest angle of the random turns in degrees.
    colour, grey : float
        See `jitter`.

    Returns
    -------
    float tensor of shape (N, 3, 48, 48), values -1 to 1
    """
    n, device = len(images), images.device
    boxes = random_boxes(n, generator, crop, shift)
    if flip:
        mirrored = torch.rand(n, generator=generator, device=device) < 0.5
        boxes[:, 2] = torch.where(mirrored, -boxes[:, 2], boxes[:, 2])
    angles = None
    if rotate:
        angles = (2 * torch.rand(n, generator=generator, device=device) - 1) * (rotate * np.pi / 180)
    pixels = resample(images, boxes, angles)
    if colour or grey:
        pixels = jitter(pixels, generator, colour, grey)
    return normalize(pixels)


# --- one epoch


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


def make_criterion(weights=None, smoothing=0.0):
    """The loss: mean cross-entropy of logits N x nclass and labels N, samples weighted by their class.

    nn.CrossEntropyLoss weighs the smoothed labels, too, and so smooths towards rare classes.
    """
    if weights is None:
        return nn.CrossEntropyLoss(label_smoothing=smoothing)

    def criterion(logits, labels):
        losses = F.cross_entropy(logits, labels, label_smoothing=smoothing, reduction="none")
        return (losses * weights[labels]).sum() / weights[labels].sum()

    return criterion


def one_cycle(done):
    """Share of the highest learning rate when `done` (0 to 1) of a run is over: up and down along cosines."""
    if done < WARM_UP:
        return 0.04 + 0.96 * (1 - math.cos(math.pi * done / WARM_UP)) / 2
    return (1 + math.cos(math.pi * (min(done, 1) - WARM_UP) / (1 - WARM_UP))) / 2


def make_scheduler(optimizer, schedule, steps, epochs, step_size, gamma):
    """The learning rate's scheduler, whose ``step()`` is called after every batch, `steps` times an epoch."""
    if schedule == "step":
        return StepLR(optimizer, step_size * steps, gamma)
    return LambdaLR(optimizer, lambda step: one_cycle(step / (steps * epochs)))


def make_average(net, decay):
    """Exponential moving average of a network's weights and statistics; a young average forgets faster.

    Parameters
    ----------
    net : nn.Module
    decay : float
        The n-th update keeps min(decay, n / (n + 10)) of the average.

    Returns
    -------
    AveragedModel
    """
    def update(averages, values, _):
        n = int(average.n_averaged)  # on the CPU, unlike the one that is handed over
        if averages[0].is_floating_point():
            torch._foreach_lerp_(averages, values, 1 - min(decay, n / (n + 10)))
        else:  # the number of batches that batch norm has seen
            torch._foreach_copy_(averages, values)

    average = AveragedModel(net, multi_avg_fn=update, use_buffers=True)
    average.n_averaged += 1  # at 0 the first update would be a copy
    return average


def train_epoch(
        model, images, labels, optimizer, scheduler, batch_size, generator, augment, criterion, average=None,
        freeze_norm=False, amp=False):
    """One pass over the training set.

    Parameters
    ----------
    model : simpleconv3, or one in DistributedDataParallel
    images, labels : uint8 tensor of shape (N, 3, 64, 64), int64 tensor of shape (N,)
    optimizer, scheduler
        The scheduler steps after every batch.
    batch_size : int
        Of this process.
    generator : torch.Generator
        Draws the order of the images and what `augment` does to them.
    augment : callable
        Takes images and generator, returns network input.
    criterion : callable
        Takes logits and labels, returns the mean loss.
    average : AveragedModel, optional
        Updated after every batch.
    freeze_norm : bool
        Leave batch norm's statistics as they are; those of a few photos would be worse than those of many.
    amp : bool
        Compute in bfloat16 where that is safe.

    Returns
    -------
    (float, float)
        Loss and accuracy, means over the samples of all processes, as they were when each batch was seen.
    """
    model.train()
    for layer in model.modules() if freeze_norm else ():
        if isinstance(layer, nn.BatchNorm2d):
            layer.eval()
    sums = torch.zeros(3, device=images.device)  # loss, hits, samples; nothing in the loop waits for it
    for batch in torch.randperm(len(images), generator=generator, device=images.device).split(batch_size):
        inputs, target = augment(images.index_select(0, batch), generator), labels[batch]
        with torch.autocast(images.device.type, torch.bfloat16, enabled=amp):
            logits = model(inputs)
        loss = criterion(logits.float(), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        scheduler.step()
        if average:
            average.update_parameters(model)
        with torch.no_grad():
            hits = (logits.argmax(1) == target).sum()
            sums += torch.stack([loss * len(batch), hits, sums.new_full((), len(batch))])
    if dist.is_initialized():
        dist.all_reduce(sums)
    loss, hits, n = sums.tolist()
    return loss / n, hits / n


# --- validation


@torch.inference_mode()
def evaluate(net, images, labels, batch_size=128):
    """Loss and predictions on validation images.

    Parameters
    ----------
    net : simpleconv3
    images, labels : uint8 tensor of shape (N, 3, 48, 48), int64 tensor of shape (N,)
    batch_size : int

    Returns
    -------
    loss : float tensor
        Sum over the samples; over those of all processes where there are several.
    matrix : float tensor of shape (nclass, nclass)
        The confusion matrix: counts, rows are true classes, columns predicted ones; likewise.
    logits : float tensor of shape (N, nclass)
        Of this process's images.
    """
    net.eval()
    logits = torch.cat([net(normalize(batch)) for batch in images.split(batch_size)])
    loss = F.cross_entropy(logits, labels, reduction="sum")
    matrix = confusion_matrix(logits.argmax(1), labels, logits.shape[1])
    if dist.is_initialized():
        dist.all_reduce(loss)
        dist.all_reduce(matrix)
    return loss, matrix, logits


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


def calibrate(logits, labels):
    """Calibration error of logits, and the temperature that mends it where it is large: dict."""
    error = calibration_error(logits.softmax(1), labels)
    fit = len(labels) >= CALIBRATION_IMAGES and error > CALIBRATION_ERROR
    return {"calibration_error": round(error, 4),
            "temperature": round(fit_temperature(logits, labels), 4) if fit else 1.0}


# --- curves


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
    lines = max(1, math.ceil(len(worst) / columns))
    picture = Image.new("RGB", (columns * width + 12, lines * height + 36), "white")
    draw = ImageDraw.Draw(picture)
    draw.text((12, 8), f"{len(wrong):,} of {len(labels):,} are wrong; the surest first", "grey", font)
    for place, i in enumerate(worst):
        x, y = 12 + place % columns * width, 36 + place // columns * height
        image = Image.fromarray(images[i].permute(1, 2, 0).cpu().numpy())
        picture.paste(image.resize((side, side), Image.Resampling.BICUBIC), (x, y))
        texts = ((names[int(predicted[i])], f"  {float(confidence[i]):.1%}", (178, 34, 34)),
                 (names[int(labels[i])], "  is true", "black"))
        for line, (name, more, ink) in enumerate(texts):
            name = fitting(name, font, side - font.getlength(more))
            draw.text((x, y + side + 3 + 18 * line), name + more, ink, font)
    return np.asarray(picture)


def evenly(n, most):
    """At most `most` of the indices 0 to n - 1, evenly spread: int64 tensor."""
    return torch.linspace(0, n - 1, min(n, most), dtype=torch.float64).long()


class Curves:
    """What TensorBoard shows of a run: scalars every epoch; what takes longer about ten times a run.

    With several processes the first one writes. Scalars and confusion matrix are then those of all images;
    the worst mistakes, the precision-recall curves and the projector show its own share.

    Parameters
    ----------
    run : Run
        After a resumption its folder holds the curves up to ``run.epoch``; what comes after it is dropped.
    net : simpleconv3
    sample : float tensor of shape (N, 3, 48, 48)
        Network inputs as training sees them.
    images, labels : uint8 tensor of shape (N, 3, 48, 48), int64 tensor of shape (N,)
        For validation.
    """

    def __init__(self, run, net, sample, images, labels):
        self.run, self.net, self.images, self.labels = run, net, images, labels
        self.names = [printable(name) for name in run.classes]
        # in titles, for which a browser has the letters that the pictures lack
        renamed = [(drawn, name) for drawn, name in zip(drawable(run.classes), self.names) if drawn != name]
        self.legend = "".join(f", {drawn} is {name}" for drawn, name in renamed)
        purge = run.epoch + 1 if run.epoch else None
        # a short queue would make training wait
        self.writer = SummaryWriter(run.log_dir, purge_step=purge, max_queue=1000)
        # add_hparams would put the settings into a run of their own; without the first of the three
        # summaries, which lists columns, TensorBoard shows the settings in which runs differ
        settings = {key: str(value) if isinstance(value, bool | list | None) else value
                    for key, value in run.settings.items()}
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
            self.writer.add_graph(net.eval(), sample[:1])

    def add_epoch(self, scores, rate, matrix, logits, judged):
        """Write an epoch's curves.

        Parameters
        ----------
        scores : dict
        rate : float
            The learning rate with which the epoch began.
        matrix : float tensor of shape (nclass, nclass)
            Confusion matrix; rows are true classes.
        logits : float tensor of shape (N, nclass)
            Of the validation images.
        judged : simpleconv3
            That gave the logits.
        """
        epoch, epochs, add = scores["epoch"], self.run.settings["epochs"], self.writer
        for tag in ("train_loss", "train_acc", "val_loss", "val_acc", "val_balanced"):
            add.add_scalar(f"data/{tag.replace('_', '')}", scores[tag], epoch)
        add.add_scalar("learning rate", rate, epoch)
        for name, recall in zip(self.names, (matrix.diagonal() / matrix.sum(1)).tolist()):
            add.add_scalar(f"recall/{name}", recall, epoch)
        if epoch % math.ceil(epochs / 10) and epoch != epochs:
            return
        # TensorBoard's table of settings shows the first five tags: these
        for key in ("val_acc", "val_balanced", "val_loss"):
            add.add_scalar(f"best/{key}", self.run.best[key], epoch)
        add.add_scalar("best/seconds", self.run.seconds, epoch)
        probabilities = logits.softmax(1)
        mistakes = draw_mistakes(self.images, self.labels, probabilities, self.run.classes)
        matrix = draw_matrix(matrix, self.run.classes)
        add.add_image("confusion matrix" + self.legend, matrix, epoch, dataformats="HWC")
        add.add_image("worst mistakes" + self.legend, mistakes, epoch, dataformats="HWC")
        for i, name in enumerate(self.names):
            add.add_pr_curve(f"precision and recall/{name}", self.labels == i, probabilities[:, i], epoch)
        for name, parameter in self.net.named_parameters():
            values = parameter.detach().flatten()
            # 10,000 of fc1's 1.4 million show the same histogram in a hundredth of the time
            some = values[evenly(len(values), 10_000).to(values.device)]
            add.add_histogram(name.replace(".", "/"), some, epoch, bins=60)
        if epoch == epochs:
            self.project(judged, probabilities, epoch)
            add.file_writer.add_summary(self.done, epoch)

    @torch.inference_mode()
    def project(self, judged, probabilities, epoch, most=1000):
        """Write the 128 features of at most `most` validation images for TensorBoard's projector."""
        chosen = evenly(len(self.images), most).to(self.images.device)
        images = self.images[chosen]
        confidence, predicted = probabilities[chosen].max(1)
        triples = zip(self.labels[chosen].tolist(), predicted.tolist(), confidence.tolist())
        rows = [(self.names[true], self.names[ours], f"{sure:.3f}", "yes" if ours == true else "no")
                for true, ours, sure in triples]
        self.writer.add_embedding(
            judged.features(normalize(images)), rows, images / 255, epoch, "features",
            ["true", "predicted", "probability", "right"])


# --- the run


class Run:
    """What a training run writes: the kept model, and a checkpoint to resume from.

    The state is held in memory and goes to the disk every `SAVE_SECONDS` and at the end, however it comes.

    Parameters
    ----------
    args : argparse.Namespace
        See `parse_args`.
    data : Data
    """

    def __init__(self, args, data):
        self.device = torch.device(args.device).type
        self.classes, self.sizes, self.identity = data.classes, data.sizes, data.identity
        self.models, self.logs = args.models, args.logs
        self.settings = {key: getattr(args, key) for key in SETTINGS}
        self.settings["weights"] = args.weights and str(args.weights)
        self.epoch = 0  # epochs done
        self.seconds = 0.0
        self.best = self.last = self.state = None
        self.saved_epoch, self.saved_at = None, -SAVE_SECONDS
        name = f"{datetime.now():%Y-%m-%d_%H-%M-%S}_{args.recipe}"
        # two runs may begin within a second
        places = (args.logs / (f"{name}_{i}" if i > 1 else name) for i in itertools.count(1))
        self.log_dir = next(place for place in places if not place.exists())

    def record(self, scores, learner, logits, labels):
        """Note a finished epoch. Returns whether it is the best so far.

        Parameters
        ----------
        scores : dict
            As `score` returns it.
        learner : Learner
        logits : float tensor of shape (N, nclass)
            Of the validation images, by ``learner.judged``.
        labels : int64 tensor of shape (N,)
        """
        better = self.best is None or (
            (scores["val_acc"], -scores["val_loss"]) > (self.best["val_acc"], -self.best["val_loss"]))
        self.epoch, self.last, self.best = scores["epoch"], scores, scores if better else self.best
        keep = better or self.settings["keep"] == "last"
        # copies: a state_dict refers to the tensors that training changes
        model = copy.deepcopy(learner.net.state_dict())
        average = copy.deepcopy(learner.average.state_dict()) if learner.average else None
        weights = model
        if average:
            weights = {key[7:]: value for key, value in average.items() if key.startswith("module.")}
        self.state = {
            "kept": weights if keep else self.state["kept"],  # for model.pt
            "calibration": calibrate(logits, labels) if keep else self.state["calibration"],
            "model": model, "average": average,
            "optimizer": copy.deepcopy(learner.optimizer.state_dict()["state"]),  # the momentum
            "epoch": self.epoch, "seconds": self.seconds, "best": self.best, "last": self.last,
            "classes": list(self.classes), "data": self.identity, "settings": self.settings,
            "log_dir": self.log_dir.name, "device": self.device,
        }
        if time.perf_counter() - self.saved_at > SAVE_SECONDS:
            self.save()
        return better

    def restore(self, state, learner):
        """Go on from what `read_checkpoint` read; the learner is brought to where it was.

        Raises
        ------
        KeyError, or almost anything else
            Something is missing, or of another kind or shape.
        """
        learner.net.load_state_dict(state["model"])
        if learner.average:
            learner.average.load_state_dict(state["average"])
        # neither the groups' settings nor the scheduler come from the checkpoint: flags may have changed them
        groups = learner.optimizer.state_dict()["param_groups"]
        learner.optimizer.load_state_dict({"state": state["optimizer"], "param_groups": groups})
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of a scheduler that steps before its optimizer
            for _ in range(state["epoch"] * learner.steps):
                learner.scheduler.step()
        simpleconv3(len(self.classes)).load_state_dict(state["kept"])  # raises where it is damaged
        self.state, self.epoch, self.seconds = state, state["epoch"], state["seconds"]
        self.best, self.last, self.log_dir = state["best"], state["last"], self.logs / state["log_dir"]
        float(self.best["val_acc"] + self.last["val_acc"] + state["calibration"]["temperature"])

    def save(self):
        """Write models/checkpoint.pt, model.pt and model.json, if an epoch has ended since the last time."""
        if not self.state or self.saved_epoch == self.epoch:
            return
        checkpoint = io.BytesIO()
        torch.save(self.state, checkpoint)
        write_file(self.models / CHECKPOINT, checkpoint.getvalue())
        net = simpleconv3(len(self.classes))
        net.load_state_dict(self.state["kept"])
        net.classes = self.classes
        save_model(
            net, self.models / "model.pt", **self.state["calibration"], kept=self.settings["keep"],
            best=self.best, last=self.last, images=self.sizes, settings=self.settings,
            seconds=round(self.seconds, 1), torch=torch.__version__,
            command=shlex.join(["python", Path(sys.argv[0]).name, *sys.argv[1:]]), log=str(self.log_dir))
        self.saved_epoch, self.saved_at = self.epoch, time.perf_counter()


def read_checkpoint(path):
    """The state that `Run.save` wrote: dict. Nothing in it is executed, nor leads out of the folder of logs.

    Raises
    ------
    FileNotFoundError
        There is none.
    ValueError
        It is something else, or damaged.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no run to resume; start one without --resume")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        if "momentum" in state:  # those had their own SGD
            raise ValueError("an earlier version of train.py wrote it")
        state["log_dir"] = PureWindowsPath(state["log_dir"]).name  # which knows the separators of all systems
        if NO_CLASS_NAME.search(state["log_dir"]):
            raise ValueError("its curves were in no folder of their own")
        check_classes(state["classes"])
        state["settings"] = {key: state["settings"][key] for key in SETTINGS}
        return state
    except Exception as error:  # torch.load raises almost anything
        why = "no file of train.py" if isinstance(error, pickle.UnpicklingError) else reason(error)
        raise ValueError(f"{path}: damaged ({why}); start again without --resume") from None


@contextlib.contextmanager
def uninterrupted():
    """Ctrl-C waits for the end of this block: within TensorBoard's queue the end would wait for ever."""
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


def join_processes(device, batch_size):
    """Join the processes that torchrun started: (rank, number of processes, torch.device of this one)."""
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    device = torch.device(device)
    if world == 1:
        return rank, world, device
    if device.type != "cpu":
        local, there = int(os.environ["LOCAL_RANK"]), torch.accelerator.device_count()
        if local >= there:
            raise ValueError(f"--device {device.type}: this machine has {there}; "
                             "start as many processes, or add --device cpu")
        device = torch.device(device.type, local)
    if batch_size % world:
        raise ValueError(f"--batch-size {batch_size}: must be a multiple of the {world} processes sharing it")
    if not dist.is_initialized():
        dist.init_process_group(dist.get_default_backend_for_device(device.type))
    return rank, world, device


def make_net(classes, old=None):
    """A network with random weights, or with those of another one.

    The last layer's weights are taken for classes of the same name; other classes begin at random.

    Parameters
    ----------
    classes : sequence of str
    old : simpleconv3, optional
        As `net.load_model` returns it.
    """
    net = simpleconv3(len(classes))
    net.classes = tuple(classes)
    if old:
        state = net.state_dict() | {k: v for k, v in old.state_dict().items() if not k.startswith("fc3.")}
        for i, name in enumerate(classes):
            if name in old.classes:
                for key in ("fc3.weight", "fc3.bias"):
                    state[key][i] = old.state_dict()[key][old.classes.index(name)]
        net.load_state_dict(state)
    return net


class Learner:
    """A network and what trains it, as the settings say.

    Parameters
    ----------
    args : argparse.Namespace
    classes : sequence of str
    counts : int tensor of shape (nclass,)
        Training images of each class.
    steps : int
        Batches of an epoch.
    device : torch.device
    batch_size : int
        Images of a batch that this process takes.
    old : simpleconv3, optional
        Network to start from.
    """

    def __init__(self, args, classes, counts, steps, device, batch_size, old=None):
        torch.manual_seed(args.seed)
        self.net = make_net(classes, old).to(device)
        if args.amp:
            self.net.to(memory_format=torch.channels_last)
        self.steps = steps
        self.model = DistributedDataParallel(self.net) if dist.is_initialized() else self.net
        self.optimizer = optim.SGD(
            self.net.parameters(), args.lr, args.momentum, weight_decay=args.weight_decay,
            nesterov=args.schedule == "one-cycle" and args.momentum > 0, fused=True)
        self.scheduler = make_scheduler(
            self.optimizer, args.schedule, steps, args.epochs, args.step_size, args.gamma)
        self.average = make_average(self.net, args.average) if args.average else None
        self.judged = self.average.module if self.average else self.net  # what is validated and kept
        balance = class_weights(counts.to(device), args.balance) if args.balance else None
        self.criterion = make_criterion(balance, args.smoothing)
        self.augment = functools.partial(
            augment, crop=args.crop, shift=args.shift, flip=args.flip, rotate=args.rotate, colour=args.colour,
            grey=args.grey)
        self.batch_size, self.freeze_norm, self.amp = batch_size, args.freeze_norm, args.amp

    def train_epoch(self, images, labels, generator):
        """One pass over the training set; see `train_epoch`."""
        return train_epoch(
            self.model, images, labels, self.optimizer, self.scheduler, self.batch_size, generator,
            self.augment, self.criterion, self.average, self.freeze_norm, self.amp)


def train(args):
    """Train as the command line says; see `parse_args` for the settings. Returns the `Run`."""
    rank, world, device = join_processes(args.device, args.batch_size)
    state = read_checkpoint(args.models / CHECKPOINT) if args.resume else None
    start = time.perf_counter()
    data = load_data(args.data, rank, world)
    images, labels, val_images, val_labels = (tensor.to(device) for tensor in data[1:5])
    batch_size = args.batch_size // world
    steps = math.ceil(len(images) / batch_size)
    old = load_model(args.weights) if args.weights and not state else None  # resuming needs the file no more
    learner = Learner(args, data.classes, data.counts, steps, device, batch_size, old)
    run = Run(args, data)
    if state:
        resume(run, state, learner, args)
    curves, judged = None, learner.judged
    if rank == 0:
        print(f"{data.sizes['train']:,} training and {data.sizes['val']:,} validation images of "
              f"{len(data.classes)} classes ({printable(', '.join(data.classes))}) "
              f"in {time.perf_counter() - start:.1f} s; on {device}"
              + (f", {world} processes" if world > 1 else "")
              + (f"; resuming after epoch {run.epoch} of {args.epochs}" if state else ""), flush=True)
        lost = [name for name in old.classes if name not in data.classes] if old else []
        if lost and len(lost) < len(old.classes):
            print(printable(f"{args.weights} also names {', '.join(lost)}; "
                            "without images the new model will not"))
        some = images[evenly(len(images), 64).to(device)]
        sample = learner.augment(some, torch.Generator(device).manual_seed(0))
        curves = Curves(run, learner.net, sample, val_images, val_labels)
    bar = tqdm(range(run.epoch + 1, args.epochs + 1), initial=run.epoch, total=args.epochs, unit="epoch",
               disable=None if rank == 0 else True)
    try:
        for epoch in bar:
            # seeded by epoch and rank, so that a resumed run draws what an undisturbed one would have
            generator = torch.Generator(device).manual_seed((args.seed * 100_003 + epoch) * 4_099 + rank)
            rate, began = learner.optimizer.param_groups[0]["lr"], time.perf_counter()
            train_loss, train_acc = learner.train_epoch(images, labels, generator)
            trained = time.perf_counter()
            for buffer in judged.buffers() if world > 1 else ():
                dist.broadcast(buffer, 0)  # batch norm's statistics: the first process's are judged and saved
            val_loss, matrix, logits = evaluate(judged, val_images, val_labels)
            scores = score(epoch, train_loss, train_acc, val_loss, matrix)
            times = trained - began, time.perf_counter() - trained
            run.seconds += sum(times)
            if not math.isfinite(scores["train_loss"] + scores["val_loss"]):
                raise ValueError(f"epoch {epoch}: the loss is no longer a number; "
                                 f"try a lower --lr than {args.lr:g}")
            if rank == 0:
                with uninterrupted():
                    better = run.record(scores, learner, logits, val_labels)
                    tqdm.write(epoch_line(scores, args.epochs, data.sizes, times, better), file=sys.stdout)
                    sys.stdout.flush()  # line by line into files and pipes, too
                    curves.add_epoch(scores, rate, matrix, logits, judged)
    finally:
        bar.close()
        if rank == 0:
            with uninterrupted():
                with contextlib.suppress(OSError):  # a full disk, which the error under way or the next names
                    curves.writer.close()
                run.save()
    return run


def resume(run, state, learner, args):
    """Bring run and learner to where a checkpoint's run ended.

    Raises
    ------
    ValueError
        The checkpoint is damaged, or the run to resume was another one.
    """
    if tuple(state["classes"]) != run.classes:
        raise ValueError(f"{args.models / CHECKPOINT}: was trained on {', '.join(state['classes'])}, "
                         f"but {args.data} holds {', '.join(run.classes)}; start again without --resume")
    if state.get("data") != run.identity:
        raise ValueError(f"{args.data}: holds other images than those of the run to resume; "
                         "start again without --resume")
    try:
        run.restore(state, learner)
        begun = state["settings"]["epochs"]
    except Exception as error:
        raise ValueError(f"{args.models / CHECKPOINT}: damaged ({reason(error)}); "
                         "start again without --resume") from None
    if args.schedule == "one-cycle" and args.epochs != begun:
        raise ValueError(f"--epochs {args.epochs}: a one-cycle run that was begun for {begun} epochs "
                         "cannot be resumed for another number")
    if state["device"] != run.device:
        print(f"the run was begun on {state['device']}; it goes on on {run.device}")
    if run.epoch >= args.epochs:
        print("nothing is left to do"
              + ("; --epochs with a larger number goes on" if args.schedule == "step" else ""))


def score(epoch, train_loss, train_acc, val_loss, matrix):
    """The scores of an epoch as `Run`, curves and model.json know them: dict of numbers."""
    return {
        "epoch": epoch, "train_loss": train_loss, "train_acc": train_acc,
        "val_loss": float(val_loss / matrix.sum()), "val_acc": float(matrix.trace() / matrix.sum()),
        "val_balanced": float((matrix.diagonal() / matrix.sum(1)).mean()),
    }


def leave_some_out(args, folds=5):
    """Train on four fifths of all images and name the others, in turns.

    A few validation images say next to nothing of how well a model does.

    Parameters
    ----------
    args : argparse.Namespace
    folds : int

    Returns
    -------
    (float, int) or None
        Share of the images named rightly, and their number. None where it would take more than `FEW_STEPS`.
    """
    parts = [CropFolder(args.data / part) for part in ("train", "val")]
    samples = sorted((sample for part in parts for sample in part.samples), key=lambda sample: sample[1])
    n, classes = len(samples), parts[0].classes
    steps = math.ceil((n - n // folds) / args.batch_size)
    if folds * args.epochs * steps > FEW_STEPS:
        return None
    paths, labels = zip(*samples)
    device, hits = torch.device(args.device), 0
    old = load_model(args.weights) if args.weights else None
    labels = torch.tensor(labels, device=device)
    large, small = (load_images(paths, size, args.data).to(device) for size in (IMAGE_SIZE, CROP_SIZE))
    fold = torch.arange(n, device=device) % folds  # class by class, so each fold has its share of each
    for k in tqdm(range(folds), desc="leaving some out", unit="fold", leave=False, disable=None):
        seen = fold != k
        counts = torch.bincount(labels[seen], minlength=len(classes))
        learner = Learner(args, classes, counts, steps, device, args.batch_size, old)
        for epoch in range(args.epochs):
            learner.train_epoch(large[seen], labels[seen], torch.Generator(device).manual_seed(epoch))
        hits += int(evaluate(learner.judged, small[~seen], labels[~seen])[1].trace())
    return hits / n, n


def epoch_line(scores, epochs, sizes, times, better):
    """What is printed of an epoch."""
    return (f"epoch {scores['epoch']:3}/{epochs}"
            f"  train loss {scores['train_loss']:.4f} acc {scores['train_acc']:7.2%}"
            f" {sizes['train'] / times[0]:7,.0f}/s  val loss {scores['val_loss']:.4f}"
            f" acc {scores['val_acc']:7.2%} {sizes['val'] / times[1]:7,.0f}/s{'  best' if better else ''}")


# --- the command line


def parse_args(argv=None):
    title, examples, more = __doc__.strip().split("\n\n")
    parser = argparse.ArgumentParser(
        usage="python train.py [options]", description=f"{title}\n{more}", epilog=f"examples:\n{examples}",
        formatter_class=lambda prog: argparse.RawDescriptionHelpFormatter(prog, max_help_position=36))
    names = " / ".join(RECIPES)
    recipe = parser.add_argument_group(f"what --recipe sets, and a flag overrides ({names})")

    def setting(flag, help, **more):
        def show(value):
            if isinstance(value, list):
                return " ".join(map(str, value))
            if isinstance(value, Path):
                return value.stem
            return {"True": "yes", "False": "no", "None": "none"}.get(str(value), str(value))

        values = [show(recipe[flag.strip("-").replace("-", "_")]) for recipe in RECIPES.values()]
        shown = values[0] if len(set(values)) == 1 else " / ".join(values)
        recipe.add_argument(flag, help=f"{help} ({shown})", **more)

    yes_or_no = argparse.BooleanOptionalAction
    setting("--weights", "file to start from", type=Path, metavar="FILE")
    setting("--epochs", "passes over the training set", type=int, metavar="N")
    setting("--batch-size", "over all processes", type=int, metavar="N")
    setting("--lr", "highest learning rate", type=float, metavar="LR")
    setting("--momentum", "of SGD; Nesterov's with one-cycle", type=float, metavar="M")
    setting("--weight-decay", "of SGD", type=float, metavar="W")
    setting("--schedule", "of the learning rate", choices=["step", "one-cycle"])
    setting("--step-size", "epochs between drops, with step", type=int, metavar="N")
    setting("--gamma", "and their factor", type=float, metavar="G")
    setting("--crop", "area of random crops", type=float, nargs=2, metavar=("LOW", "HIGH"))
    setting("--shift", "of large crops, in half sides", type=float, metavar="S")
    setting("--flip", "mirror half of the images", action=yes_or_no)
    setting("--rotate", "turns up to this many degrees", type=float, metavar="D")
    setting("--colour", "change of brightness, contrast ...", type=float, metavar="C")
    setting("--grey", "share that loses its colour to a tint", type=float, metavar="P")
    setting("--smoothing", "of the labels", type=float, metavar="S")
    setting("--average", "decay of an average of the weights", type=float, metavar="D")
    setting("--balance", "how much more rare classes count", type=float, metavar="P")
    setting("--freeze-norm", "keep batch norm's statistics", action=yes_or_no)
    setting("--keep", "epoch that model.pt gets", choices=["best", "last"])
    parser.add_argument("--recipe", choices=RECIPES, default="textbook", metavar="NAME",
                        help=f"{names} (default: %(default)s)")
    parser.add_argument("--amp", action="store_true",
                        help="bfloat16: faster on hardware that has it, else much slower")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="(default: %(default)s)")
    parser.add_argument("--device", metavar="D", help="cpu, cuda, mps ... (default: the accelerator, if any)")
    for name, what in (("data", "holds train/ and val/"), ("logs", "for tensorboard --logdir"),
                       ("models", "for model.pt and model.json")):
        parser.add_argument(f"--{name}", type=Path, default=Path(name), metavar="DIR",
                            help=f"{what} (default: %(default)s)")
    parser.add_argument("--resume", action="store_true", help=f"go on from {CHECKPOINT}, with its settings")
    args = parser.parse_args(argv)
    parser.set_defaults(**RECIPES[args.recipe])
    args = parser.parse_args(argv)
    if args.resume:
        stored = read_checkpoint(args.models / CHECKPOINT)["settings"]
        parser.set_defaults(**stored)
        args = parser.parse_args(argv)
        for name in ("recipe", "average", "keep"):  # with another its scores would be another model's
            if getattr(args, name) != stored[name]:
                parser.error(f"--{name} {getattr(args, name)}: the run to resume was begun with "
                             f"{stored[name]}; start again without --resume")
    check_args(args, parser)
    return args


def check_args(args, parser):
    """End with a line of usage where a setting cannot work; choose the device where none is named."""
    for name in ("epochs", "batch_size", "step_size"):
        if getattr(args, name) < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1")
    if not 0 < args.crop[0] <= args.crop[1] <= 4:
        parser.error("--crop must be two numbers, the smaller first, over 0 and up to 4")
    for most, names in ((1, "shift colour grey smoothing average momentum weight_decay"),
                        (10, "balance"), (180, "rotate"), (2**31, "seed"), (math.inf, "gamma")):
        for name in names.split():
            if not 0 <= getattr(args, name) <= most:  # not a number fails, too
                parser.error(f"--{name.replace('_', '-')} must be between 0 and {most}")
    if not args.lr > 0:
        parser.error("--lr must be more than 0")
    there = [torch.accelerator.current_accelerator().type] if torch.accelerator.is_available() else []
    there.append("cpu")
    args.device = args.device or there[0]
    try:
        kind = torch.device(args.device).type
    except RuntimeError:  # no kind of device at all
        kind = None
    if kind not in there:
        parser.error(f"--device {printable(args.device)}: this machine has {' and '.join(there)}")


def main(argv=None):
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="backslashreplace")  # for terminals that lack the letters of a name
    # TensorBoard's thread hands its errors on; they need not be shown twice
    threading.excepthook = lambda failed: (
        issubclass(failed.exc_type, OSError) or threading.__excepthook__(failed))
    args, begun, first = None, time.time(), int(os.environ.get("RANK", 0)) == 0
    try:
        args = parse_args(argv)
        with locked(args.models) if first else contextlib.nullcontext():  # the processes of a job are one run
            run = train(args)
            alone = not dist.is_initialized()
            few = leave_some_out(args) if run.sizes["val"] < FEW_IMAGES and alone else None
    except (KeyboardInterrupt, BrokenPipeError) as error:
        if isinstance(error, BrokenPipeError):  # `| head` has seen enough
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit("\n" + interrupted(args, begun))
    except (OSError, ValueError) as error:
        if getattr(error, "strerror", None) and not error.filename:  # from TensorBoard, which names no file
            error = f"{args.logs}: cannot be written ({error.strerror}); mend that and go on with --resume"
        sys.exit(f"error: {printable(str(error))}")
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
    if first:
        report(args, run, few)


@contextlib.contextmanager
def locked(models):
    """Hold the folder of models for this process, and remove what killed runs left half-written there.

    Raises
    ------
    OSError
        Another process holds it, or it cannot be written.
    """
    lock = filelock.FileLock(models / ".lock", blocking=False)
    try:
        models.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    except filelock.Timeout:
        raise BlockingIOError(f"{models}: another run is at work there; wait for its end") from None
    except OSError as error:
        if error.errno not in (errno.ENOLCK, errno.EOPNOTSUPP):  # some network disks know no locks
            raise OSError(f"{lock.lock_file}: cannot be written ({error.strerror}); mend that") from None
    try:
        for part in models.glob("." + "[0-9a-f]" * 16 + ".tmp"):
            part.unlink(missing_ok=True)
        yield
    finally:
        lock.release()


def interrupted(args, begun):
    """What is said of a run that began at the time `begun` and was ended by Ctrl-C."""
    checkpoint = args and args.models / CHECKPOINT
    if not checkpoint or not checkpoint.is_file() or checkpoint.stat().st_mtime < begun:
        return "interrupted before an epoch was finished: nothing is saved"
    places = [word for flag in ("data", "logs", "models") if getattr(args, flag) != Path(flag)
              for word in (f"--{flag}", str(getattr(args, flag)))]
    again = printable(shlex.join(["python", "train.py", "--resume", *places]))
    return f"interrupted: all finished epochs are saved; '{again}' goes on"


def report(args, run, few):
    """Print what a finished run gave, with what `leave_some_out` found, and where it lies."""
    kept, n = run.last if args.keep == "last" else run.best, run.sizes["val"]
    print(f"kept the {args.keep} epoch, {kept['epoch']}: {kept['val_acc']:.2%} of {n:,} validation images "
          f"(balanced over the classes {kept['val_balanced']:.2%}); best {run.best['val_acc']:.2%} in epoch "
          f"{run.best['epoch']}, last {run.last['val_acc']:.2%}; {run.seconds:.0f} s of training")
    if n < 100:
        print(f"one validation image more or less is {1 / n:.1%}: of so few, these figures say little")
    if few:
        right, n = few
        likely = (right * n + 2) / (n + 4)  # the interval of 95 % of Agresti and Coull 1998
        print(f"trained on four fifths of all {n} images in turns, it names {right:.1%} of the rest rightly, "
              f"give or take {2 * math.sqrt(likely * (1 - likely) / (n + 4)):.0%}")
    print(f"weights in {args.models / 'model.pt'}, the rest in {args.models / 'model.json'}; "
          f"curves: tensorboard --logdir {args.logs}")


if __name__ == "__main__":
    main()
