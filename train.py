"""Train a network on mouth crops: data/train and data/val to models/model.pt and curves in logs/.

    python train.py                              the textbook's recipe: 300 epochs, SGD, StepLR
    python train.py --recipe strong              better, in fewer epochs
    python train.py --recipe finetune            from trained weights: a few photos are enough
    python train.py --resume                     go on after Ctrl-C or a crash
    torchrun --nproc_per_node=2 -- train.py      the same on two processes or GPUs, or many machines

models/model.pt is a plain state dict of the kept epoch: the one with the best validation accuracy, or
the last one where the learning rate ends at zero. models/model.json beside it says everything else, and
models/model.png shows it.

To change what is trained: a network is a line in net.NETWORKS, a setting a line in SETTINGS, an augmentation
a function in VIEWS or LOOKS, a curve a line in `score`, an optimizer a line in `Learner`.
"""

import gc
import os
import time

BEGUN = time.perf_counter()
gc.disable()  # loading torch makes a million objects and no garbage; looking for it would take half a second
# Read when torch is loaded: how long a thread turns round and round before it sleeps while it waits for the
# others. At the default of 300,000 a busy machine's threads spend most of their time on that.
os.environ.setdefault("GOMP_SPINCOUNT", "300")

import argparse
import contextlib
import copy
import hashlib
import io
import itertools
import math
import pickle
import re
import shlex
import signal
import sys
import tempfile
import threading
import warnings
from datetime import datetime
from pathlib import Path, PureWindowsPath
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image
from torch import nn, optim
from torch.nn.parallel import DistributedDataParallel
from torch.optim.lr_scheduler import LambdaLR, StepLR
from torch.optim.swa_utils import AveragedModel
from torch.utils.data import DataLoader, Subset
from torch.utils.tensorboard import SummaryWriter
from torch.utils.tensorboard.summary import hparams
from torchvision.datasets import ImageFolder
from tqdm import tqdm

from net import (
    CROP_SIZE,
    NETWORKS,
    NO_CLASS_NAME,
    PRETRAINED,
    balanced,
    calibrate,
    calibration_error,
    check_classes,
    confusion_matrix,
    features,
    last_layer,
    load_model,
    new_network,
    normalize,
    printable,
    reason,
    reliability,
    save_model,
    scores_of,
    square,
)
from preprocess_lips import (
    SIGNALS,
    command_line,
    end_output,
    is_hidden,
    label_font,
    locked,
    own_cores,
    read_csv,
    read_photo,
    sweep,
    write_file,
)

gc.enable()
gc.freeze()  # what is loaded stays to the end, where looking through it would take another second

# --- recipes and settings


class Setting(NamedTuple):
    """A setting: parser, checks, checkpoints and the columns of --help follow from its line in `SETTINGS`."""

    name: str
    values: tuple  # of textbook, strong and finetune; what a checkpoint lacks is taken to be the first
    help: str
    type: object = float
    least: float = 0
    most: float = 1
    more: dict = {}  # other arguments of argparse's add_argument


def file_or_none(text):
    return None if text == "none" else Path(text)


INF = math.inf
# What --recipe sets; a flag of the same name overrides it. tests/bench/README.md says how they were found.
SETTINGS = (
    Setting("net", ("simpleconv3",) * 3, f"one of {', '.join(NETWORKS)}", str,
            more={"choices": NETWORKS, "metavar": "NAME"}),
    Setting("weights", (None, None, PRETRAINED), "file to start from, or none", file_or_none,
            more={"metavar": "FILE"}),
    Setting("epochs", (300, 100, 20), "passes over the training set", int, 1, INF),
    Setting("batch_size", (64, 64, 64), "over all processes", int, 1, INF),
    Setting("lr", (0.1, 0.1, 0.005), "highest learning rate", float, 1e-12, INF),
    Setting("momentum", (0.9, 0.9, 0.9), "of SGD; Nesterov's with one-cycle"),
    Setting("weight_decay", (0.0, 2e-3, 2e-3), "of SGD"),
    Setting("schedule", ("step", "one-cycle", "one-cycle"), "of the learning rate", str,
            more={"choices": ["step", "one-cycle"]}),
    Setting("step_size", (100, 100, 100), "epochs between drops, with step", int, 1, INF),
    Setting("gamma", (0.1, 0.1, 0.1), "and their factor", float, 0, INF),
    Setting("crop", ([0.08, 1.0], [0.4, 1.4], [0.4, 1.4]), "area of random crops", float, 0.001, 4,
            more={"nargs": 2, "metavar": ("LOW", "HIGH")}),
    Setting("shift", (0.0, 0.12, 0.12), "of large crops, in half sides"),
    Setting("flip", (True, True, True), "mirror half of the images", bool),
    Setting("rotate", (0.0, 15.0, 15.0), "turns up to this many degrees", float, 0, 180),
    Setting("colour", (0.0, 0.3, 0.3), "change of brightness, contrast ..."),
    Setting("grey", (0.0, 0.3, 0.3), "share that loses its colour to a tint"),
    Setting("smoothing", (0.0, 0.02, 0.02), "of the labels"),
    Setting("average", (0.0, 0.99, 0.99), "decay of an average of the weights"),
    Setting("mix", (1.0, 1.0, 0.5), "share of the new in what --weights know"),
    Setting("balance", (0.0, 0.5, 0.5), "how much more rare classes count", float, 0, 10),
    Setting("freeze_norm", (False, False, True), "keep batch norm's statistics", bool),
    Setting("keep", ("best", "last", "last"), "epoch that model.pt gets", str,
            more={"choices": ["best", "last"]}),
    Setting("amp", (False, False, False), "bfloat16: faster on hardware that has it, else much slower", bool),
    Setting("seed", (0, 0, 0), "of all that is random", int, 0, 2**31),
)
RECIPES = {recipe: {setting.name: setting.values[i] for setting in SETTINGS}
           for i, recipe in enumerate(("textbook", "strong", "finetune"))}

IMAGE_SIZE = 64  # side of the training images in memory; random crops are taken from them
MANY_IMAGES = 2000  # from here on, processes of their own decode them
RATIO = (3 / 4, 4 / 3)  # aspect ratio of the random crops
WARM_UP = 0.25  # share of a one-cycle run in which the learning rate rises
FEW_IMAGES = 20  # with fewer for validation some of all images are left out in turns, too
FEW_STEPS = 2000  # as long as that takes no more batches: seconds
CHECKPOINT = "checkpoint.pt"
SAVE_SECONDS = 20  # a kill costs at most this much training and the epoch that it hits


# --- data: every crop is decoded once, into one tensor


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


class CropFolder(ImageFolder):
    """torchvision's ImageFolder, without hidden files and folders and without classes that have no image.

    Its items are pixels as `net.predict` sees them, uint8 arrays 3 x size x size, or the OSError of an image
    that cannot be decoded: raised in a worker of a DataLoader, it would come with a traceback.
    """

    def __init__(self, root, size):
        if not Path(root).is_dir():
            raise FileNotFoundError(f"{root}: no such folder; 'python split_train_val.py' makes it")
        super().__init__(root)
        self.size = size

    def find_classes(self, directory):
        names = sorted(e.name for e in os.scandir(directory) if e.is_dir() and not is_hidden(e.name))
        self.paths = {name: paths for name in names if (paths := walk(os.path.join(directory, name)))}
        if not self.paths:
            raise FileNotFoundError(
                f"{directory}: no images in class folders; 'python split_train_val.py' makes them")
        return list(self.paths), {name: i for i, name in enumerate(self.paths)}

    def make_dataset(self, directory, class_to_idx, *_, **__):
        return [(path, i) for name, i in class_to_idx.items() for path in self.paths[name]]

    def __getitem__(self, index):
        path = self.samples[index][0]
        try:
            return square(read_photo(path), self.size).numpy()
        except Exception as error:  # decoders raise almost anything
            why = getattr(error, "strerror", None) or error
            return OSError(f"{path}: unreadable: {why}; remove it and run the command again")


def free_memory():
    """Bytes of memory that can be had without swapping; infinite where the system does not tell."""
    with contextlib.suppress(OSError), open("/proc/meminfo") as file:
        return 1024 * int(re.search(r"MemAvailable: *(\d+)", file.read())[1])
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


def progress(things, what, unit, total=None):
    """The things, with a progress bar, or one line where there is no terminal."""
    if not sys.stderr.isatty():
        print(f"{what} ...", flush=True)
    return tqdm(things, what, total, unit=unit, leave=False, disable=None)


def load_images(crops, indices=None, folder="."):
    """Decode the images of a `CropFolder`, many of them on all cores: uint8 tensor N x 3 x size x size.

    `indices` says which (default: all). Where half of the free memory is too little, an unnamed file in
    `folder` takes them. Raises an OSError that names the image where one cannot be decoded.
    """
    indices = range(len(crops)) if indices is None else indices
    images = empty_images((len(indices), 3, crops.size, crops.size), folder)
    # lists of arrays come through pipes: for tensors a container's shared memory is often too small
    loader = DataLoader(Subset(crops, indices), 64, collate_fn=list,
                        num_workers=own_cores() if len(indices) >= MANY_IMAGES else 0)
    decoded = itertools.chain.from_iterable(loader)
    for i, image in enumerate(progress(decoded, f"reading {crops.root}", "image", len(indices))):
        if isinstance(image, OSError):
            raise image
        images[i] = image
    return torch.from_numpy(images)


class Data(NamedTuple):
    """What `load_data` returns. With several processes the tensors hold a share, the rest is of all."""

    classes: tuple  # of str, sorted
    images: torch.Tensor  # to train on: uint8 N x 3 x 64 x 64
    labels: torch.Tensor  # int64 N
    val_images: torch.Tensor  # uint8 N x 3 x 48 x 48
    val_labels: torch.Tensor  # int64 N
    val_paths: list  # of str
    counts: torch.Tensor  # training images of each class: int64
    sizes: dict  # number of images, "train" and "val"
    identity: str  # a hash of names and sizes of the files


def load_data(data, rank=0, world=1):
    """Read ``data/train`` and ``data/val``: `Data`.

    Of the images in random order, every `world`-th from `rank` on is loaded. Where that leaves a process one
    training image less, it gets another one twice: all must take the same number of steps. Raises an OSError
    where a folder is missing or empty or an image cannot be decoded, and a ValueError where there are fewer
    than two classes or a class is only on one side.
    """
    train, val = CropFolder(data / "train", IMAGE_SIZE), CropFolder(data / "val", CROP_SIZE)
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
    for folder in (train, val):
        if len(folder) < world:
            raise ValueError(f"{folder.root}: {len(folder)} images are too few for {world} processes; "
                             "start fewer")
        order = list(range(len(folder)))
        if world > 1:  # class by class, neighbours are alike: in random order every share holds all classes
            order = torch.randperm(len(folder), generator=torch.Generator().manual_seed(0)).tolist()
        share = order[rank::world]
        if folder is train and len(share) < math.ceil(len(folder) / world):
            share.append(share[0])
        tensors += [load_images(folder, share, data), torch.tensor(folder.targets)[share]]
    files = [(path, os.path.getsize(path)) for folder in (train, val) for path, _ in folder.samples]
    names = [(os.path.relpath(path, data), size) for path, size in files]
    identity = hashlib.sha1(repr(names).encode("utf-8", "surrogateescape")).hexdigest()
    counts = torch.bincount(torch.tensor(train.targets), minlength=len(classes))
    return Data(classes, *tensors, [val.samples[i][0] for i in share], counts,
                {"train": len(train), "val": len(val)}, identity)


# --- augmentation of a whole batch: where to look, one resampling for all of it, and how it looks


def random_crop(views, generator, settings):
    """Random crops of square images, by default distributed as torchvision's ``RandomResizedCrop``.

    The crop's share of the image's area is uniform between the two numbers of ``settings.crop``; over 1 it
    goes beyond the border. The logarithm of width over height is uniform in that of `RATIO`. A crop as large
    as the image is off its centre by up to ``settings.shift`` times half the side.
    """
    n, (low, high) = len(views), settings.crop
    u = torch.rand(n, 22, generator=generator, device=views.device)
    areas = low + (high - low) * u[:, :10]
    narrow, wide = math.log(RATIO[0]), math.log(RATIO[1])
    aspect = (narrow + (wide - narrow) * u[:, 10:20]).exp()
    half = torch.stack([(areas * aspect).sqrt(), (areas / aspect).sqrt()], 2)  # width and height
    # the first of ten tries that fits; the whole image where none does
    fits = (half <= 1).all(2) | (high > 1)
    first = fits.float().argmax(1)
    half = half.gather(1, first[:, None, None].expand(-1, 1, 2))[:, 0]
    half = torch.where(fits.any(1, keepdim=True), half, torch.ones_like(half))
    centre = (2 * u[:, 20:] - 1) * (1 - half).abs().clamp(min=settings.shift)
    return torch.cat([torch.diag_embed(half), centre[..., None]], 2)


def random_flip(views, generator, settings):
    """Mirror every other image."""
    if not settings.flip:
        return views
    mirrored = torch.rand(len(views), generator=generator, device=views.device) < 0.5
    return torch.where(mirrored[:, None, None], views * views.new_tensor([-1, 1, 1]), views)


def random_turn(views, generator, settings):
    """Turn about the crop's centre, by up to ``settings.rotate`` degrees to either side."""
    if not settings.rotate:
        return views
    u = torch.rand(len(views), generator=generator, device=views.device)
    angles = (2 * u - 1) * math.radians(settings.rotate)
    cos, sin = angles.cos(), angles.sin()
    turns = torch.stack([torch.stack([cos, -sin], 1), torch.stack([sin, cos], 1)], 1)
    return torch.cat([turns @ views[:, :, :2], views[:, :, 2:]], 2)


def random_colour(images, generator, settings):
    """Change brightness, contrast and saturation, each by a factor from 1 - colour to 1 + colour.

    The share ``settings.grey`` of the images loses its colour and is tinted, each channel by such a factor: a
    network that sees only grey photos would answer to colour with whatever its first weights happened to be.
    """
    if not (settings.colour or settings.grey):
        return images
    u = torch.rand(len(images), 7, 1, 1, generator=generator, device=images.device)
    contrast, saturation, brightness, tint = (1 + settings.colour * (2 * u[:, :6] - 1)).split([1, 1, 1, 3], 1)
    loses = u[:, 6:] < settings.grey
    saturation, tint = saturation.masked_fill(loses, 0), tint.masked_fill(~loses, 1)
    red, green, blue = images.split(1, 1)
    luma = 0.299 * red + 0.587 * green + 0.114 * blue
    mean = luma.mean((2, 3), keepdim=True)
    images = luma.lerp(images, saturation)
    return mean.lerp(images, contrast).mul_(brightness * tint).clamp_(0, 255)


# Each takes and returns what part of its image the network sees, float N x 2 x 3: the affine map from the
# result's coordinates to the image's, both from -1 to 1. All are one resampling, which is why it is fast.
VIEWS = [random_crop, random_flip, random_turn]
# Each takes and returns pixels: float N x 3 x 48 x 48, 0 to 255. All get a torch.Generator and the settings.
LOOKS = [random_colour]


def augment(images, generator, settings):
    """Training images, uint8 N x 3 x 64 x 64, as the network sees them: float N x 3 x 48 x 48, -1 to 1.

    `generator` is a torch.Generator of the images' device, `settings` an argparse.Namespace of `SETTINGS`.
    """
    views = torch.eye(2, 3, device=images.device).expand(len(images), -1, -1)
    for change in VIEWS:
        views = change(views, generator, settings)
    pixels = resample(images, views)
    for change in LOOKS:
        pixels = change(pixels, generator, settings)
    return normalize(pixels)


def resample(images, views, size=CROP_SIZE):
    """Images as affine maps show them, see `VIEWS`; their border goes on: float N x 3 x size x size."""
    # what F.affine_grid computes, in half the time
    line = torch.linspace(-1 + 1 / size, 1 - 1 / size, size, device=views.device)[:, None]
    across, down, shift = (part[:, None, :, 0] for part in views.split(1, 2))
    grid = (down * line + shift)[:, :, None] + (across * line)[:, None]
    return F.grid_sample(images.float(), grid, padding_mode="border", align_corners=False)


# --- what learns, and how


def make_criterion(counts, balance, smoothing):
    """The loss: mean cross-entropy of logits N x nclass and labels N, samples weighted by their class.

    A class of which there are `counts[i]` training images, at least 1, weighs (mean count / its count) **
    `balance`: with 0 all samples count the same, with 1 all classes. nn.CrossEntropyLoss weighs the smoothed
    labels, too, and so smooths towards rare classes.
    """
    if not balance:
        return nn.CrossEntropyLoss(label_smoothing=smoothing)
    weights = (counts.sum() / (len(counts) * counts)).float() ** balance

    def criterion(logits, labels):
        losses = F.cross_entropy(logits, labels, label_smoothing=smoothing, reduction="none")
        return (losses * weights[labels]).sum() / weights[labels].sum()

    return criterion


def one_cycle(done):
    """Share of the highest learning rate when `done` (0 to 1) of a run is over: up and down along cosines."""
    if done < WARM_UP:
        return 0.04 + 0.96 * (1 - math.cos(math.pi * done / WARM_UP)) / 2
    return (1 + math.cos(math.pi * (min(done, 1) - WARM_UP) / (1 - WARM_UP))) / 2


def make_average(net, decay, start=(), mix=1.0):
    """Exponential moving average of a network's weights and statistics: AveragedModel.

    The n-th update keeps min(decay, n / (n + 10)) of it: a young average forgets faster. With a `start`, see
    `keep_start`, the share `mix` of the network and the rest of the start are averaged.
    """
    def update(averages, values, _):
        n = int(average.n_averaged)  # on the CPU, unlike the one that is handed over
        if averages[0].is_floating_point():
            values = torch._foreach_lerp(start, values, mix) if start else values
            torch._foreach_lerp_(averages, values, 1 - min(decay, n / (n + 10)))
        else:  # the number of batches that batch norm has seen
            torch._foreach_copy_(averages, values)

    average = AveragedModel(net, multi_avg_fn=update, use_buffers=True)
    average.n_averaged += 1  # at 0 the first update would be a copy
    return average


def keep_start(net, old, mix):
    """A copy of the weights and statistics that a network got from an old one: list of float tensors.

    Halfway back to them, it knows more of what the old one knew: after photos of a few people, or another
    idea of what a class means, much of that would be lost. After Wortsman et al. 2022, "Robust fine-tuning of
    zero-shot models". Empty where a class of the old one is gone, since that is another task.
    """
    if not old or mix == 1 or set(old.classes) - set(net.classes):
        return []
    tensors = itertools.chain(net.parameters(), net.buffers())
    return [tensor.detach().clone() for tensor in tensors if tensor.is_floating_point()]


def make_net(name, classes, old=None):
    """A network with random weights, or with those of an old one, as `net.load_model` returns it.

    The last layer's weights are taken for classes of the same name; other classes begin at random. Raises a
    ValueError where the old one is another kind of network.
    """
    net = new_network(name, classes)
    if not old:
        return net
    if old.network != name:
        raise ValueError(f"{old.path}: weights of {old.network}, but --net is {name}; "
                         f"add --net {old.network}, or --weights none to begin with random ones")
    last = last_layer(net)[0] + "."
    state, theirs = net.state_dict(), old.state_dict()
    for key, value in theirs.items():
        if not key.startswith(last):
            state[key] = value
        else:
            for i, label in enumerate(classes):
                if label in old.classes:
                    state[key][i] = value[old.classes.index(label)]
    net.load_state_dict(state)
    return net


class Learner:
    """A network and what trains it, as the settings say; ``judged`` is what is validated and kept.

    Parameters
    ----------
    settings : argparse.Namespace
    classes, counts : sequence of str, int tensor of shape (nclass,)
        Names, and number of training images of each.
    steps, batch_size : int
        Batches of an epoch, and images of a batch that this process takes.
    device : torch.device
    old : nn.Module, optional
        Network to start from.
    """

    def __init__(self, settings, classes, counts, steps, device, batch_size, old=None):
        torch.manual_seed(settings.seed)
        torch.backends.cudnn.deterministic = True  # on a GPU, too, the same seed gives the same bits
        self.settings, self.steps, self.device, self.batch_size = settings, steps, device, batch_size
        self.net = make_net(settings.net, classes, old).to(device)
        if settings.amp:
            self.net.to(memory_format=torch.channels_last)
        self.model = DistributedDataParallel(self.net) if dist.is_initialized() else self.net
        self.optimizer = optim.SGD(
            self.net.parameters(), settings.lr, settings.momentum, weight_decay=settings.weight_decay,
            nesterov=settings.schedule == "one-cycle" and settings.momentum > 0, fused=True)
        if settings.schedule == "step":
            self.scheduler = StepLR(self.optimizer, settings.step_size * steps, settings.gamma)
        else:
            total = steps * settings.epochs  # for OneCycleLR at least five
            self.scheduler = LambdaLR(self.optimizer, lambda step: one_cycle(step / total))
        self.start = keep_start(self.net, old, settings.mix)
        averaged = settings.average or settings.weights and settings.mix < 1
        self.average = make_average(
            self.net, settings.average, self.start, settings.mix) if averaged else None
        self.criterion = make_criterion(counts.to(device), settings.balance, settings.smoothing)
        self.judged = self.average.module if self.average else self.net

    def train_epoch(self, images, labels, generator):
        """One pass over the training set: (loss, accuracy), floats.

        They are means over the samples of all processes, as they were when each batch was seen. `images` and
        `labels` are uint8 N x 3 x 64 x 64 and int64 N; `generator` draws their order and what `augment` does.
        """
        self.model.train()
        for layer in self.model.modules() if self.settings.freeze_norm else ():
            if isinstance(layer, nn.BatchNorm2d):  # a few photos' statistics are worse than those of many
                layer.eval()
        sums = torch.zeros(3, device=images.device)  # loss, hits, samples; nothing in the loop waits for it
        order = torch.randperm(len(images), generator=generator, device=images.device)
        for batch in order.split(self.batch_size):
            inputs, target = augment(images.index_select(0, batch), generator, self.settings), labels[batch]
            with torch.autocast(images.device.type, torch.bfloat16, enabled=self.settings.amp):
                logits = self.model(inputs)
            loss = self.criterion(logits.float(), target)
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()
            self.scheduler.step()
            if self.average:
                self.average.update_parameters(self.model)
            with torch.no_grad():
                hits = (logits.argmax(1) == target).sum()
                sums += torch.stack([loss * len(batch), hits, sums.new_full((), len(batch))])
        if dist.is_initialized():
            dist.all_reduce(sums)
        loss, hits, n = sums.tolist()
        return loss / n, hits / n


# --- validation


@torch.inference_mode()
def logits_of(net, images, batch_size=128):
    """Logits, float tensor N x nclass, of images, N x 3 x 48 x 48, 0 to 255."""
    net.eval()
    return torch.cat([net(normalize(batch)) for batch in images.split(batch_size)])


@torch.inference_mode()
def evaluate(net, images, labels, batch_size=128):
    """Loss and predictions on validation images, uint8 N x 3 x 48 x 48, with labels, int64 N.

    Returns
    -------
    loss, matrix : float tensors, scalar and of shape (nclass, nclass)
        Sum over the samples and confusion matrix; over those of all processes where there are several.
    logits : float tensor of shape (N, nclass)
        Of this process's images.
    """
    logits = logits_of(net, images, batch_size)
    loss = F.cross_entropy(logits, labels, reduction="sum")
    matrix = confusion_matrix(logits.argmax(1), labels, logits.shape[1])
    if dist.is_initialized():
        dist.all_reduce(loss)
        dist.all_reduce(matrix)
    return loss, matrix, logits


def score(epoch, train_loss, train_acc, val_loss, matrix):
    """The scores of an epoch as `Run`, curves and model.json know them: dict of numbers."""
    return {
        "epoch": epoch, "train_loss": train_loss, "train_acc": train_acc,
        "val_loss": float(val_loss / matrix.sum()), "val_acc": float(matrix.trace() / matrix.sum()),
        "val_balanced": balanced(matrix),
    }


# --- curves and pictures


def evenly(n, most):
    """At most `most` of the indices 0 to n - 1, evenly spread: int64 tensor."""
    return torch.linspace(0, n - 1, min(n, most), dtype=torch.float64).long()


class Curves:
    """What TensorBoard shows of a `Run`: scalars every epoch; what takes longer about ten times a run.

    With several processes the first one writes. Scalars are then those of all images; the precision-recall
    curves and the projector show its own share. After a resumption what comes after ``run.epoch`` is dropped.
    """

    def __init__(self, run, net, sample, images, labels):
        """`sample` is network inputs as training sees them; images and labels are those of validation."""
        self.run, self.net, self.images, self.labels = run, net, images, labels
        self.names = [printable(name) for name in run.classes]
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
        """Write an epoch's curves: of each score, see `score`, and of what the network `judged` made of it.

        `rate` is the learning rate with which the epoch began, `matrix` the confusion matrix; `logits` are
        those of this process's validation images.
        """
        epoch, epochs, add = scores["epoch"], self.run.settings["epochs"], self.writer
        for name in scores.keys() - {"epoch"}:
            add.add_scalar(f"data/{name.replace('_', '')}", scores[name], epoch)
        add.add_scalar("learning rate", rate, epoch)
        for name, recall in zip(self.names, (matrix.diagonal() / matrix.sum(1)).tolist()):
            add.add_scalar(f"recall/{name}", recall, epoch)
        if epoch % math.ceil(epochs / 10) and epoch != epochs:
            return
        for key in ("val_acc", "val_balanced", "val_loss"):
            add.add_scalar(f"run/best_{key}", self.run.best[key], epoch)
        add.add_scalar("run/seconds", self.run.seconds, epoch)
        probabilities = logits.softmax(1)
        for i, name in enumerate(self.names):
            add.add_pr_curve(f"precision and recall/{name}", self.labels == i, probabilities[:, i], epoch)
        for name, parameter in self.net.named_parameters():
            values = parameter.detach().flatten()
            # 10,000 of a million weights show the same histogram in a hundredth of the time
            some = values[evenly(len(values), 10_000).to(values.device)]
            add.add_histogram(name.replace(".", "/"), some, epoch, bins=60)
        if epoch == epochs:
            self.project(judged, probabilities, epoch)
            add.file_writer.add_summary(self.done, epoch)

    @torch.inference_mode()
    def project(self, judged, probabilities, epoch, most=1000):
        """Write the features of at most `most` validation images for TensorBoard's projector."""
        chosen = evenly(len(self.images), most).to(self.images.device)
        images = self.images[chosen]
        confidence, predicted = probabilities[chosen].max(1)
        triples = zip(self.labels[chosen].tolist(), predicted.tolist(), confidence.tolist())
        rows = [(self.names[true], self.names[ours], f"{sure:.3f}", "yes" if ours == true else "no")
                for true, ours, sure in triples]
        self.writer.add_embedding(features(judged, normalize(images)), rows, images / 255, epoch, "features",
                                  ["true", "predicted", "probability", "right"])


def draw_sheet(history, kept, matrix, probabilities, images, labels, paths, classes):
    """One picture of a run: curves, confusion matrix, reliability, surest mistakes: uint8 array H x W x 3.

    `history` has the scores of all epochs; all but the curves is of the weights of epoch `kept`: matrix
    (nclass x nclass, rows true), probabilities (N x nclass), images (uint8 N x 3 x 48 x 48), labels, paths.
    """
    import matplotlib  # here: it takes half a second to load
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.font_manager import FontProperties, fontManager

    names = [name if len(name) < 16 else name[:14] + "…" for name in map(printable, classes)]
    family = ["DejaVu Sans"]
    font, _ = label_font("".join(names), 10)  # one that has the letters
    if isinstance(path := getattr(font, "path", None), str):
        fontManager.addfont(path)
        family.append(FontProperties(fname=path).get_name())
    with matplotlib.rc_context({"font.family": family, "font.size": 9, "axes.titlesize": 10}):
        figure = Figure((13, 9), layout="constrained")
        top, bottom = figure.subfigures(2, 1, height_ratios=(1, 2))
        left, right = bottom.subfigures(1, 2, width_ratios=(1, 1))
        loss, accuracy, trust = top.subplots(1, 3)
        draw_curves(loss, history, kept, "loss")
        draw_curves(accuracy, history, kept, "acc")
        draw_reliability(trust, probabilities, labels)
        draw_matrix(left.subplots(), matrix, names)
        draw_mistakes(right, probabilities, images, labels, paths, names)
        canvas = FigureCanvasAgg(figure)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of letters that no font here has
            canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3]


def draw_curves(axes, history, kept, name):
    """Loss or accuracy over the epochs, in training and validation, the kept epoch marked."""
    epochs = [scores["epoch"] for scores in history]
    for part in ("train", "val"):
        axes.plot(epochs, [scores[f"{part}_{name}"] for scores in history], ".-", label=part)
    axes.axvline(kept, color="grey", linestyle=":", label=f"kept: epoch {kept}")
    axes.set_title({"loss": "loss", "acc": "accuracy"}[name] + " by epoch")
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)


def draw_reliability(axes, probabilities, labels):
    """How often the model is right against how sure it is; on the dotted line both agree."""
    sure, right, count = reliability(probabilities, labels).cpu()
    there = count > 0
    axes.plot([0, 1], [0, 1], ":", color="grey")
    axes.bar(sure[there] / count[there], right[there] / count[there], 0.05, alpha=0.6)
    axes.set(xlim=(0, 1.03), ylim=(0, 1.03), xlabel="probability of the named class",
             title=f"how much is right; calibration error {calibration_error(probabilities, labels):.1%}")
    axes.grid(alpha=0.3)


def draw_matrix(axes, matrix, names):
    """Counts and shares of true classes (rows) and predicted ones (columns)."""
    matrix, n = matrix.cpu(), range(len(names))
    share = matrix / matrix.sum(1, keepdim=True).clamp(min=1)
    axes.imshow(share, "Blues", vmin=0, vmax=1)
    for i, j in itertools.product(n, n) if len(names) <= 12 else ():
        axes.text(j, i, f"{int(matrix[i, j])}\n{share[i, j]:.0%}", ha="center", va="center",
                  color="white" if share[i, j] > 0.5 else "black")
    if len(names) <= 60:
        axes.set_xticks(n, names, rotation=30 if len(names) <= 6 else 90, ha="right")
        axes.set_yticks(n, names)
    axes.set(title=f"{matrix.trace() / matrix.sum():.1%} of {int(matrix.sum()):,} are right",
             xlabel="predicted", ylabel="true")


def draw_mistakes(figure, probabilities, images, labels, paths, names, columns=5, rows=4):
    """The wrong predictions, the surest first, each with its classes and the name of its file."""
    confidence, predicted = probabilities.max(1)
    wrong = (predicted != labels).nonzero()[:, 0]
    worst = wrong[confidence[wrong].argsort(descending=True)][:columns * rows].tolist()
    figure.suptitle(f"{len(wrong):,} of {len(labels):,} are wrong" + "; the surest first" * bool(worst))
    for axes in figure.subplots(rows, columns).flat:
        axes.axis("off")
        if worst:
            i = worst.pop(0)
            axes.imshow(images[i].permute(1, 2, 0).cpu())
            axes.set_title(f"{names[int(predicted[i])]} {confidence[i]:.0%}\ntrue: {names[int(labels[i])]}\n"
                           f"{printable(Path(paths[i]).name)[-22:]}", fontsize=7)


# --- the run


class Run:
    """What a training run writes: the kept model, and a checkpoint to resume from.

    The state is held in memory and goes to the disk every `SAVE_SECONDS` and at the end, however it comes.
    """

    def __init__(self, args, data):
        self.device = torch.device(args.device).type
        self.classes, self.sizes, self.identity = data.classes, data.sizes, data.identity
        self.models, self.logs = args.models, args.logs
        self.settings = {"recipe": args.recipe} | {s.name: getattr(args, s.name) for s in SETTINGS}
        self.settings["weights"] = args.weights and str(args.weights)
        self.seconds, self.history, self.state = 0.0, [], None
        self.saved_epoch, self.saved_at = None, -SAVE_SECONDS
        name = f"{datetime.now():%Y-%m-%d_%H-%M-%S}_{args.recipe}"
        # two runs may begin within a second
        places = (args.logs / (f"{name}_{i}" if i > 1 else name) for i in itertools.count(1))
        self.log_dir = next(place for place in places if not place.exists())

    epoch = property(lambda self: len(self.history), doc="Epochs done.")
    last = property(lambda self: self.history[-1])
    best = property(lambda self: max(self.history, key=lambda one: (one["val_acc"], -one["val_loss"])))
    kept = property(lambda self: self.last if self.settings["keep"] == "last" else self.best)

    def record(self, scores, learner, logits, labels, matrix):
        """Note a finished epoch, with what ``learner.judged`` gave; returns whether it is the best."""
        self.history.append(scores)
        # copies: a state_dict refers to the tensors that training changes
        if self.kept is scores:
            kept = {"kept": copy.deepcopy(learner.judged.state_dict()), "confusion": matrix.int().tolist(),
                    "calibration": calibrate(logits, labels)}
        else:
            kept = {key: self.state[key] for key in ("kept", "confusion", "calibration")}
        self.state = kept | {
            "model": copy.deepcopy(learner.net.state_dict()),
            "average": copy.deepcopy(learner.average.state_dict()) if learner.average else None,
            "start": learner.start,
            "optimizer": copy.deepcopy(learner.optimizer.state_dict()["state"]),  # the momentum
            "history": self.history, "seconds": self.seconds, "classes": list(self.classes),
            "data": self.identity, "settings": self.settings, "log_dir": self.log_dir.name,
            "device": self.device,
        }
        if time.perf_counter() - self.saved_at > SAVE_SECONDS:
            self.save()
        return self.best is scores

    def restore(self, state, learner):
        """Go on from what `read_checkpoint` read; the learner is brought to where it was.

        Raises almost anything where something is missing, or of another kind or shape.
        """
        learner.net.load_state_dict(state["model"])
        if learner.average:
            learner.average.load_state_dict(state["average"])
        learner.start[:] = [tensor.to(learner.device) for tensor in state["start"]]
        # neither the groups' settings nor the scheduler come from the checkpoint: flags may have changed them
        groups = learner.optimizer.state_dict()["param_groups"]
        learner.optimizer.load_state_dict({"state": state["optimizer"], "param_groups": groups})
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of a scheduler that steps before its optimizer
            for _ in range(len(state["history"]) * learner.steps):
                learner.scheduler.step()
        self.state, self.history, self.seconds = state, state["history"], state["seconds"]
        self.log_dir = self.logs / state["log_dir"]
        self.kept_net()  # these raise where something is damaged
        sum(sum(scores.values()) for scores in self.history) + float(self.summary()["temperature"])

    def kept_net(self):
        """The network of the kept epoch."""
        net = new_network(self.settings["net"], self.classes)
        net.load_state_dict(self.state["kept"])
        return net

    def summary(self):
        """What model.json says of the run, beside what `save_model` knows: dict."""
        return self.state["calibration"] | {
            "kept": self.settings["keep"], "best": self.best, "last": self.last,
            "scores": scores_of(self.state["confusion"], self.classes), "images": self.sizes,
            "settings": self.settings, "seconds": round(self.seconds, 1), "torch": torch.__version__,
            "command": shlex.join(["python", Path(sys.argv[0]).name, *sys.argv[1:]]),
            "log": str(self.log_dir)}

    def save(self):
        """Write models/checkpoint.pt, model.pt and model.json, if an epoch has ended since the last time."""
        if not self.state or self.saved_epoch == self.epoch:
            return
        checkpoint = io.BytesIO()
        torch.save(self.state, checkpoint)
        write_file(self.models / CHECKPOINT, checkpoint.getvalue())
        save_model(self.kept_net(), self.models / "model.pt", **self.summary())
        self.saved_epoch, self.saved_at = self.epoch, time.perf_counter()

    def draw(self, curves, data):
        """Write models/model.png, and the same into the curves."""
        images, labels = curves.images, curves.labels
        logits = logits_of(self.kept_net().to(images.device), images)
        sheet = draw_sheet(self.history, self.kept["epoch"], torch.tensor(self.state["confusion"]).float(),
                           (logits / self.state["calibration"]["temperature"]).softmax(1), images, labels,
                           data.val_paths, self.classes)
        curves.writer.add_image("how well the kept weights do", sheet, self.epoch, dataformats="HWC")
        png = io.BytesIO()
        Image.fromarray(sheet).save(png, "PNG")
        write_file(self.models / "model.png", png.getvalue())


def read_checkpoint(path):
    """The state that `Run.save` wrote: dict. Nothing in it is executed, nor leads out of the folder of logs.

    Raises a FileNotFoundError where there is none, a ValueError where it is something else, or damaged.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no run to resume; start one without --resume")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        if "history" not in state and "log_dir" in state:
            raise ValueError("an earlier version of train.py wrote it")
        state["log_dir"] = PureWindowsPath(state["log_dir"]).name  # which knows the separators of all systems
        if NO_CLASS_NAME.search(state["log_dir"]):
            raise ValueError("its curves were in no folder of their own")
        check_classes(state["classes"])
        settings = state["settings"]
        if gone := settings.keys() - {"recipe", *RECIPES["textbook"]}:
            raise ValueError(f"begun with --{min(gone).replace('_', '-')}, which train.py no longer knows")
        # one that was made before a setting came has what the textbook's recipe has: nothing of it
        state["settings"] = RECIPES["textbook"] | {"recipe": settings["recipe"], **settings}
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
    before = [signal.signal(one, lambda *_: caught.append(1)) for one in SIGNALS]
    try:
        yield
    finally:
        for one, handler in zip(SIGNALS, before):
            signal.signal(one, handler)
    if caught:
        raise KeyboardInterrupt


def join_processes(device, batch_size):
    """Join the processes that torchrun started: (rank, number of processes, torch.device of this one)."""
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    device = torch.device(device)
    # a container's share of the machine may be less than the cores that torch counts
    torch.set_num_threads(min(torch.get_num_threads(), own_cores()))
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
    run, judged, curves = Run(args, data), learner.judged, None
    if state:
        resume(run, state, learner, args)
    if rank == 0:
        print(f"{data.sizes['train']:,} training and {data.sizes['val']:,} validation images of "
              f"{len(data.classes)} classes ({printable(', '.join(data.classes))}) "
              f"in {time.perf_counter() - start:.1f} s; {args.net} on {device}"
              + (f", {world} processes" if world > 1 else "")
              + (f"; resuming after epoch {run.epoch} of {args.epochs}" if state else ""), flush=True)
        if old:
            compare(args.weights, old, data)
        some = images[evenly(len(images), 64).to(device)]
        sample = augment(some, torch.Generator(device).manual_seed(0), args)
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
                    better = run.record(scores, learner, logits, val_labels, matrix)
                    tqdm.write(epoch_line(scores, args.epochs, data.sizes, times, better), file=sys.stdout)
                    sys.stdout.flush()  # line by line into files and pipes, too
                    curves.add_epoch(scores, rate, matrix, logits, judged)
    finally:
        bar.close()
        if rank == 0:
            with uninterrupted():
                try:
                    run.save()
                    if run.history:
                        run.draw(curves, data)
                finally:
                    with contextlib.suppress(OSError):  # a full disk, which another error names
                        curves.writer.close()
    return run


def compare(path, old, data):
    """Say what weights to start from make of the training images, and which of their classes have none."""
    common = [name for name in data.classes if name in old.classes]
    lost = ", ".join(name for name in old.classes if name not in common)
    if not common:
        return
    some = evenly(len(data.images), 2000)
    whole = torch.eye(2, 3).expand(len(some), -1, -1)
    named = logits_of(old, resample(data.images[some], whole)).argmax(1)
    told = []
    for name in common:
        mine = named[data.labels[some] == data.classes.index(name)] == old.classes.index(name)
        other = " (if it means something else here, give it another name)" * (mine.float().mean() < 0.5)
        told.append(f"{mine.sum()} of {len(mine)} {name}{other}")
    print(printable(f"{path} names as filed: {', '.join(told)}"
                    + f"; it also names {lost}: without images the new model will not" * bool(lost)))


def resume(run, state, learner, args):
    """Bring run and learner to where a checkpoint's run ended.

    Raises a ValueError where the checkpoint is damaged, or the run to resume was another one.
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


def leave_some_out(args, folds=5):
    """Train on four fifths of all images and name the others, in turns: a confusion matrix over all images.

    A few validation images say next to nothing of how well a model does. Returns None where this would take
    more than `FEW_STEPS` batches.
    """
    large, small = ([CropFolder(args.data / part, size) for part in ("train", "val")]
                    for size in (IMAGE_SIZE, CROP_SIZE))
    labels, classes = torch.tensor([label for part in large for label in part.targets]), large[0].classes
    device = torch.device(args.device)
    steps = math.ceil((len(labels) - len(labels) // folds) / args.batch_size)
    if folds * args.epochs * steps > FEW_STEPS:
        return None
    large, small = (torch.cat([load_images(part) for part in some]).to(device) for some in (large, small))
    old = load_model(args.weights) if args.weights else None
    fold = torch.empty(len(labels), dtype=torch.long)
    fold[labels.argsort(stable=True)] = torch.arange(len(labels)) % folds  # each has its share of every class
    fold, labels = fold.to(device), labels.to(device)
    total = torch.zeros(len(classes), len(classes), device=device)
    for k in progress(range(folds), "leaving a fifth of all images out, in turns", "fold"):
        seen = fold != k
        counts = torch.bincount(labels[seen], minlength=len(classes))
        learner = Learner(args, classes, counts, steps, device, args.batch_size, old)
        for epoch in range(args.epochs):
            learner.train_epoch(large[seen], labels[seen], torch.Generator(device).manual_seed(epoch))
        total += evaluate(learner.judged, small[~seen], labels[~seen])[1]
    return total


def epoch_line(scores, epochs, sizes, times, better):
    """What is printed of an epoch."""
    return (f"epoch {scores['epoch']:3}/{epochs}"
            f"  train loss {scores['train_loss']:.4f} acc {scores['train_acc']:7.2%}"
            f" {sizes['train'] / times[0]:7,.0f}/s  val loss {scores['val_loss']:.4f}"
            f" acc {scores['val_acc']:7.2%} {sizes['val'] / times[1]:7,.0f}/s{'  best' if better else ''}")


# --- the command line


def shown(value):
    """A setting's value as --help shows it."""
    if isinstance(value, list):
        return " ".join(map(str, value))
    return {"True": "yes", "False": "no", "None": "none"}.get(str(value), getattr(value, "stem", str(value)))


def parse_args(argv=None):
    title, examples, *_ = __doc__.strip().split("\n\n")
    parser = argparse.ArgumentParser(
        usage="python train.py [options]", description=title,
        epilog=f"examples:\n{examples}",
        formatter_class=lambda prog: argparse.RawDescriptionHelpFormatter(prog, max_help_position=36))
    group = parser.add_argument_group(f"what --recipe sets, and a flag overrides ({' / '.join(RECIPES)})")
    for setting in SETTINGS:
        values = list(map(shown, setting.values))
        values = values if len(set(values)) > 1 else values[:1]
        kind = (dict(action=argparse.BooleanOptionalAction) if setting.type is bool else
                dict(type=setting.type, metavar={int: "N", float: "X"}.get(setting.type)))
        group.add_argument(f"--{setting.name.replace('_', '-')}", **kind | setting.more,
                           help=f"{setting.help} ({' / '.join(values)})")
    parser.add_argument("--recipe", choices=RECIPES, default="textbook", metavar="NAME",
                        help=f"{' / '.join(RECIPES)} (default: %(default)s)")
    parser.add_argument("--device", metavar="D", help="cpu, cuda, mps ... (default: the accelerator, if any)")
    for name, what in (("data", "holds train/ and val/"), ("logs", "for tensorboard --logdir"),
                       ("models", "for model.pt, model.json and model.png")):
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
        for name in ("recipe", "net", "average", "keep"):  # with another its scores would be another model's
            if getattr(args, name) != stored[name]:
                parser.error(f"--{name} {getattr(args, name)}: the run to resume was begun with "
                             f"{stored[name]}; start again without --resume")
    for setting in SETTINGS:
        flag, least, most = setting.name.replace("_", "-"), setting.least, setting.most
        value = getattr(args, setting.name)
        values = value if isinstance(value, list) else [value]
        if setting.type not in (int, float):
            continue
        if not all(least <= one <= most for one in values):  # not a number fails, too
            parser.error(f"--{flag} must be " + (f"at least {least}" if most == INF else
                                                 f"between {least} and {most}"))
        if values != sorted(values):
            parser.error(f"--{flag}: the smaller number first")
    there = [torch.accelerator.current_accelerator().type] if torch.accelerator.is_available() else []
    there.append("cpu")
    args.device = args.device or there[0]
    try:
        kind = torch.device(args.device).type
    except RuntimeError:  # no kind of device at all
        kind = None
    if kind not in there:
        parser.error(f"--device {printable(args.device)}: this machine has {' and '.join(there)}")
    return args


def main(argv=None):
    # TensorBoard's thread hands its errors on; they need not be shown twice
    threading.excepthook = lambda failed: (
        issubclass(failed.exc_type, OSError) or threading.__excepthook__(failed))
    args, few, begun, first = None, None, time.time(), int(os.environ.get("RANK", 0)) == 0
    with command_line(lambda: interrupted(args, begun)):
        try:
            args = parse_args(argv)
            with locked(args.models / ".lock") if first else contextlib.nullcontext():  # a job is one run
                sweep(*[args.models] * first)  # what killed runs left half-written
                run, start = train(args), time.perf_counter()
                if run.sizes["val"] < FEW_IMAGES and not dist.is_initialized():
                    few = leave_some_out(args)
            if first:
                report(args, run, few, time.perf_counter() - start)
        except BrokenPipeError:  # `| head` has seen enough: as after Ctrl-C
            end_output()
            raise KeyboardInterrupt from None
        except OSError as error:
            if error.strerror and not error.filename:  # from TensorBoard, which names no file
                raise OSError(f"{args.logs}: cannot be written ({error.strerror}); "
                              "mend that and go on with --resume") from None
            raise
        finally:
            if dist.is_initialized():
                dist.destroy_process_group()


def interrupted(args, begun):
    """What is said of a run that began at the time `begun` and was ended by Ctrl-C."""
    checkpoint = args and args.models / CHECKPOINT
    if not checkpoint or not checkpoint.is_file() or checkpoint.stat().st_mtime < begun:
        return "before an epoch was finished: nothing is saved"
    places = [word for flag in ("data", "logs", "models") if getattr(args, flag) != Path(flag)
              for word in (f"--{flag}", str(getattr(args, flag)))]
    again = printable(shlex.join(["python", "train.py", "--resume", *places]))
    return f"all finished epochs are saved; '{again}' goes on"


def report(args, run, few, spent):
    """Print what a finished run gave, what `leave_some_out` found in `spent` seconds, and where all lies."""
    kept, best, n = run.kept, run.best, run.sizes["val"]
    print(f"kept the {args.keep} epoch, {kept['epoch']}: {kept['val_acc']:.2%} of {n:,} validation images "
          f"(balanced over the classes {kept['val_balanced']:.2%}); best {best['val_acc']:.2%} in epoch "
          f"{best['epoch']}, last {run.last['val_acc']:.2%}")
    if best["val_acc"] - kept["val_acc"] > 2 * math.sqrt(best["val_acc"] * (1 - best["val_acc"]) / n) + 1 / n:
        print(f"epoch {best['epoch']} did far better than the last one, which is kept: try a lower --lr, "
              "or keep such an epoch with --keep best")
    if n < 100:
        print(f"one validation image more or less is {1 / n:.1%}: of so few, these figures say little")
    if few is not None:
        n, right = int(few.sum()), float(few.trace() / few.sum())
        likely = (right * n + 2) / (n + 4)  # the interval of 95 % of Agresti and Coull 1998
        most, name = few.sum(1).max(0)
        print(f"trained on four fifths of all {n} images in turns, it names {right:.1%} of the rest rightly, "
              f"give or take {2 * math.sqrt(likely * (1 - likely) / (n + 4)):.0%}; balanced over the classes "
              f"{balanced(few):.1%}; to say {printable(run.classes[name])} always is right on {most / n:.1%}")
    with contextlib.suppress(OSError, ValueError):  # there is none, or one of another split
        sources = [row["source"] for row in read_csv(args.data / "split.csv") if row["part"] == "train"]
        # not of unsure/, whose names say the likeliest class as well: somebody decided on these
        named = sum(bool(re.search(r"(^|/)[01]\.\d{3}(-\d+)?_[^/]*$", source)) for source in sources)
        if 2 * named > len(sources):
            print(f"{named:,} of {len(sources):,} training photos have names that --sort gave: unless you "
                  "looked through them, this says how far the model agrees with the weights that sorted them")
    print(f"weights in {args.models / 'model.pt'}, the rest in {args.models / 'model.json'}, "
          f"a picture of it in {args.models / 'model.png'}")
    print(f"curves: {shlex.join(['tensorboard', '--logdir', str(args.logs)])}")
    total = time.perf_counter() - BEGUN
    print(f"{total:.0f} s in all: {run.seconds:.0f} s of training, "
          + (f"{spent:.0f} s of leaving some out, " if few is not None else "")
          + f"{max(0, total - run.seconds - spent):.0f} s of starting, reading images, curves and saving")


if __name__ == "__main__":
    main()
