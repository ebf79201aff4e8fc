"""Train simpleconv3 on mouth crops: data/train and data/val to models/model.pt and curves in logs/.

    python train.py                                   the textbook's recipe: 300 epochs, SGD, StepLR
    python train.py --epochs 40 --lr 0.05             shorter, gentler
    python train.py --resume                          go on after Ctrl-C or a crash, bit for bit on a CPU
    torchrun --nproc_per_node=2 train.py              the same on two processes or GPUs, or many machines
    tensorboard --logdir logs                         the curves

All crops are decoded once, to 64 x 64, and live in memory: 12 KiB an image (a set that would not fit in
half of the free memory lives in a file under data/cache). models/model.pt is a plain state dict, that of
the epoch with the best validation accuracy; models/model.json beside it says everything else.
"""

import argparse
import hashlib
import json
import os
import shlex
import sys
import time
import warnings
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from torch.nn.parallel import DistributedDataParallel
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from net import CROP_SIZE, atomic_write, normalize, save_model, simpleconv3, square

IMAGE_SIZE = 64  # side of the training images in memory; random crops are taken from them
SCALE, RATIO = (0.08, 1.0), (3 / 4, 4 / 3)  # area and aspect ratio of the random crops
CHECKPOINT = "checkpoint.pt"
SAVE_SECONDS = 20  # a kill costs at most this much training


def list_images(folder):
    """Images of an ImageFolder: sorted list of (path, class name)."""
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: no such folder; 'python split_train_val.py' makes it")
    suffixes = Image.registered_extensions()
    found = [
        (path, place.name)
        for place in sorted(folder.iterdir()) if place.is_dir() and not place.name.startswith(".")
        for path in sorted(place.rglob("*")) if path.suffix.lower() in suffixes and not path.name.startswith(".")
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
        Folder for the file that takes the images where they do not fit in half of the free memory. It is
        used again as long as the images' names, sizes and times are the same; others of `name` are removed.
    name : str
        Of the cached file, and shown at the progress bar.

    Returns
    -------
    uint8 tensor of shape (len(paths), 3, size, size)

    Raises
    ------
    OSError
        An image cannot be decoded; the message names it.
    """
    shape, target, temporary = (len(paths), 3, size, size), None, None
    if np.prod(shape, dtype=float) > free_memory() / 2:
        about = [(str(path), (state := path.stat()).st_size, state.st_mtime_ns) for path in paths]
        target = cache / f"{name}-{hashlib.sha1(repr((about, size)).encode('utf-8', 'surrogateescape')).hexdigest()[:16]}.u8"
    for old in cache.glob(f"{name}-*"):
        if old != target:
            old.unlink()
    if target and target.is_file():
        return torch.from_numpy(np.memmap(target, np.uint8, "r+", shape=shape))
    if target:
        cache.mkdir(parents=True, exist_ok=True)
        temporary = target.with_suffix(".part")
        images = np.memmap(temporary, np.uint8, "w+", shape=shape)
    else:
        images = np.empty(shape, np.uint8)

    def load(i):
        try:
            with Image.open(paths[i]) as image:
                image.draft("RGB", (2 * size, 2 * size))  # large JPEGs decode at a fraction of their size
                images[i] = square(image, size).numpy()
        except Exception as error:  # decoders raise almost anything
            raise OSError(f"{paths[i]}: not a readable image ({error}); remove it and run the command again") from None

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        try:
            for _ in tqdm(pool.map(load, range(len(paths))), total=len(paths), desc=name, unit="image", leave=False, disable=None):
                pass
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    if target:
        images.flush()
        temporary.replace(target)
    return torch.from_numpy(images)


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
    if len(classes) < 2:
        raise ValueError(f"{data / 'train'}: only one class, {classes[0]}; a classifier needs two or more folders of photos")
    loaded = []
    for part, size in (("train", IMAGE_SIZE), ("val", CROP_SIZE)):
        files = parts[part]
        # class by class, neighbours are alike: shuffle, so that every rank's share holds all classes
        order = torch.randperm(len(files), generator=torch.Generator().manual_seed(0)).tolist() if world > 1 else range(len(files))
        share = [files[i] for i in order][rank::world]
        labels = torch.tensor([classes.index(label) for _, label in share])
        name = part if world == 1 else f"{part}{rank}"
        loaded.append((load_images([path for path, _ in share], size, data / "cache", name), labels))
    return classes, *loaded


def random_boxes(n, generator, scale=SCALE, ratio=RATIO, device="cpu"):
    """Random crops of a square image, distributed as torchvision's ``RandomResizedCrop``.

    Parameters
    ----------
    n : int
    generator : torch.Generator
    scale : (float, float)
        Range of the crop's share of the image's area; uniform.
    ratio : (float, float)
        Range of width over height; uniform in its logarithm.
    device : str or torch.device

    Returns
    -------
    float tensor of shape (n, 4)
        Centre x, centre y, half width, half height; the image spans -1 to 1.
    """
    u = torch.rand(n, 22, generator=generator, device=device)
    area = scale[0] + (scale[1] - scale[0]) * u[:, :10]
    low, high = np.log(ratio[0]), np.log(ratio[1])
    aspect = (low + (high - low) * u[:, 10:20]).exp()
    half = torch.stack([(area * aspect).sqrt(), (area / aspect).sqrt()], 2)
    # the first of ten tries that fits; the whole image where none does
    fits = (half <= 1).all(2)
    first = fits.float().argmax(1)
    half = half.gather(1, first[:, None, None].expand(-1, 1, 2))[:, 0]
    half = torch.where(fits.any(1, keepdim=True), half, torch.ones_like(half))
    centre = (2 * u[:, 20:] - 1) * (1 - half)
    return torch.cat([centre, half], 1)


def resample(images, boxes, size=CROP_SIZE):
    """Cut boxes out of images and scale them to squares, in one bilinear pass.

    Parameters
    ----------
    images : uint8 tensor of shape (N, 3, H, W)
    boxes : float tensor of shape (N, 4)
        As `random_boxes` makes them; a negative half width mirrors.
    size : int

    Returns
    -------
    float32 tensor of shape (N, 3, size, size), values 0 to 255
    """
    line = torch.linspace(-1 + 1 / size, 1 - 1 / size, size, device=boxes.device)
    x = boxes[:, None, 0:1] + boxes[:, None, 2:3] * line
    y = boxes[:, None, 1:2] + boxes[:, None, 3:4] * line
    grid = torch.stack([x.expand(-1, size, -1), y.transpose(1, 2).expand(-1, -1, size)], 3)
    return F.grid_sample(images.float(), grid, padding_mode="border", align_corners=False)


def augment(images, generator):
    """A random crop and, for every other image, a flip: uint8 N x 3 x 64 x 64 to network input N x 3 x 48 x 48."""
    boxes = random_boxes(len(images), generator, device=images.device)
    flip = torch.rand(len(images), generator=generator, device=images.device) < 0.5
    boxes[:, 2] = torch.where(flip, -boxes[:, 2], boxes[:, 2])
    return normalize(resample(images, boxes))


def train_epoch(net, images, labels, optimizer, scheduler, batch_size, generator):
    """One pass over the training set.

    Returns
    -------
    float tensor of 3
        Sums over the samples of the loss and of the correct predictions, and the number of samples.
        On the device: nothing here waits for it.
    """
    net.train()
    sums = torch.zeros(3, device=images.device)
    order = torch.randperm(len(images), generator=generator, device=images.device)
    for batch in order.split(batch_size):
        target = labels[batch]
        logits = net(augment(images[batch], generator))
        loss = F.cross_entropy(logits, target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        scheduler.step()
        with torch.no_grad():
            sums += torch.stack([loss * len(batch), (logits.argmax(1) == target).sum(), sums.new_tensor(len(batch))])
    return sums


@torch.inference_mode()
def evaluate(net, images, labels, batch_size=512):
    """Loss and predictions on validation images, uint8 N x 3 x 48 x 48.

    Returns
    -------
    sums : float tensor of 3
        As `train_epoch` returns it.
    logits : float tensor of shape (N, nclass)
    """
    net.eval()
    logits = torch.cat([net(normalize(batch)) for batch in images.split(batch_size)])
    sums = torch.stack([
        F.cross_entropy(logits, labels, reduction="sum"),
        (logits.argmax(1) == labels).sum(),
        torch.tensor(len(labels), device=labels.device),
    ])
    return sums, logits


def confusion_matrix(predicted, labels, nclass):
    """Counts, int64 nclass x nclass: rows are true classes, columns predicted ones."""
    return torch.bincount(labels.cpu() * nclass + predicted.cpu(), minlength=nclass**2).view(nclass, nclass)


def draw_matrix(matrix, classes, cell=84):
    """A confusion matrix as a picture: uint8 array H x W x 3; rows true, columns predicted."""
    names = [name if name.isascii() else f"class {i}" for i, name in enumerate(classes)]
    font = ImageFont.load_default(14)
    left = 24 + int(max(font.getlength(name) for name in names))
    side = cell * len(names)
    picture = Image.new("RGB", (left + side + 12, side + 56), "white")
    draw = ImageDraw.Draw(picture)
    draw.text((8, 8), "true (rows), predicted (columns)", "grey", font)
    share = matrix / matrix.sum(1, keepdim=True).clamp(min=1)
    for i, name in enumerate(names):
        y = 52 + i * cell
        draw.text((8, y + cell / 2), name, "black", font, "lm")
        short = name if font.getlength(name) < cell - 4 else name[:8] + "."
        draw.text((left + i * cell + cell / 2, 46), short, "black", font, "ms")
        for j in range(len(names)):
            x, depth = left + j * cell, float(share[i, j])
            fill = tuple(round(255 - depth * (255 - c)) for c in (31, 98, 168))
            draw.rectangle((x, y, x + cell - 2, y + cell - 2), fill)
            ink = "white" if depth > 0.5 else "black"
            draw.text((x + cell / 2, y + cell / 2 - 8), str(int(matrix[i, j])), ink, font, "mm")
            draw.text((x + cell / 2, y + cell / 2 + 12), f"{depth:.0%}", ink, font, "mm")
    return np.asarray(picture)


class Run:
    """What a training run writes: curves, the best model, and a checkpoint to resume from.

    The state is held in memory and goes to the disk every `SAVE_SECONDS` and at the end, however it comes.
    """

    def __init__(self, args, classes, sizes):
        self.args, self.classes, self.sizes = args, classes, sizes
        self.epoch = 0  # epochs done
        self.seconds = 0.0
        self.best = self.best_weights = self.last = self.state = None
        self.log_dir = str(args.logs / datetime.now().strftime("%Y-%m-%d_%H-%M-%S"))
        self.unsaved = False
        self.saved_at = -SAVE_SECONDS

    def record(self, net, optimizer, scheduler, scores):
        """Note a finished epoch. Returns whether it is the best so far."""
        self.epoch, self.last = scores["epoch"], scores
        weights = {key: value.clone() for key, value in net.state_dict().items()}
        better = self.best is None or (scores["val_acc"], -scores["val_loss"]) > (self.best["val_acc"], -self.best["val_loss"])
        if better:
            self.best, self.best_weights = scores, weights
        momentum = optimizer.state_dict()
        momentum["state"] = {i: {k: v.clone() if torch.is_tensor(v) else v for k, v in s.items()}
                             for i, s in momentum["state"].items()}
        settings = {key: str(value) if isinstance(value, Path) else value for key, value in vars(self.args).items()}
        self.state = {
            "net": weights, "best_net": self.best_weights, "optimizer": momentum, "scheduler": scheduler.state_dict(),
            "epoch": self.epoch, "best": self.best, "last": self.last, "seconds": self.seconds,
            "classes": list(self.classes), "args": settings, "log_dir": self.log_dir,
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
            net, self.args.models / "model.pt", best=self.best, last=self.last, images=self.sizes,
            settings=settings, seconds=round(self.seconds, 1), torch=torch.__version__,
            command=shlex.join(["python", Path(sys.argv[0]).name, *sys.argv[1:]]), log=self.log_dir)
        self.unsaved = False
        self.saved_at = time.perf_counter()

    def restore(self, state, net, optimizer, scheduler):
        net.load_state_dict(state["net"])
        optimizer.load_state_dict(state["optimizer"])
        scheduler.load_state_dict(state["scheduler"])
        self.state, self.epoch, self.seconds = state, state["epoch"], state["seconds"]
        self.best, self.last, self.best_weights = state["best"], state["last"], state["best_net"]
        self.log_dir = state["log_dir"]


def read_checkpoint(path):
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no run to resume; start one without --resume")
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch.load raises almost anything
        raise ValueError(f"{path}: damaged ({type(error).__name__}); start again without --resume") from None


def train(args):
    """Train as the command line says; see the parser for the settings. Returns the `Run`."""
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    device = torch.device(args.device)
    if device.type != "cpu" and world > 1:
        device = torch.device(device.type, int(os.environ["LOCAL_RANK"]))
    if world > 1 and not dist.is_initialized():
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    if args.batch_size % world:
        raise ValueError(f"--batch-size {args.batch_size}: must be a multiple of the {world} processes that share it")
    resumed = read_checkpoint(args.models / CHECKPOINT) if args.resume else None

    start = time.perf_counter()
    classes, train_set, val_set = load_data(args.data, rank, world)
    if resumed and tuple(resumed["classes"]) != classes:
        raise ValueError(f"{args.models / CHECKPOINT}: was trained on {', '.join(resumed['classes'])}, "
                         f"but {args.data} holds {', '.join(classes)}; start again without --resume")
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
    optimizer = torch.optim.SGD(net.parameters(), args.lr, args.momentum, weight_decay=args.weight_decay, fused=True)
    share = args.batch_size // world
    steps = -(-len(images) // share)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, args.step_size * steps, args.gamma)
    run = Run(args, classes, sizes)
    if resumed:
        run.restore(resumed, net, optimizer, scheduler)
    model = DistributedDataParallel(net) if world > 1 else net

    log = None
    if rank == 0:
        print(f"{sizes['train']:,} training and {sizes['val']:,} validation images of {len(classes)} classes "
              f"({', '.join(classes)}) in {time.perf_counter() - start:.1f} s; on {device}"
              + (f", {world} processes" if world > 1 else "") + (f"; resuming after epoch {run.epoch}" if resumed else ""))
        log = SummaryWriter(run.log_dir, purge_step=run.epoch + 1 if resumed else None)
        if not resumed:
            sample = augment(images[torch.linspace(0, len(images) - 1, 64).long()], torch.Generator(device).manual_seed(0))
            log.add_images("augmented training crops", sample / 2 + 0.5, 0)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # add_graph traces, which torch calls deprecated
                log.add_graph(net, sample[:1])
    bar = tqdm(range(run.epoch + 1, args.epochs + 1), initial=run.epoch, total=args.epochs, unit="epoch", disable=None if rank == 0 else True)
    try:
        for epoch in bar:
            lr = scheduler.get_last_lr()[0]
            # seeded by epoch and rank, so that a resumed run draws what an undisturbed one would have
            generator = torch.Generator(device).manual_seed((args.seed * 100_003 + epoch) * 4_099 + rank)
            times = [time.perf_counter()]
            sums = [train_epoch(model, images, labels, optimizer, scheduler, share, generator)]
            if world > 1:
                dist.all_reduce(sums[0])
            train_loss, train_acc, train_n = sums[0].tolist()
            times.append(time.perf_counter())
            val_sums, logits = evaluate(net, val_images, val_labels)
            if world > 1:
                dist.all_reduce(val_sums)
            val_loss, val_acc, val_n = val_sums.tolist()
            times.append(time.perf_counter())
            scores = {"epoch": epoch, "train_loss": train_loss / train_n, "train_acc": train_acc / train_n,
                      "val_loss": val_loss / val_n, "val_acc": val_acc / val_n}
            if not np.isfinite(scores["train_loss"]):
                raise ValueError(f"epoch {epoch}: the loss is no longer a number; try a lower --lr than {args.lr:g}")
            run.seconds += times[2] - times[0]
            if rank:
                continue
            better = run.record(net, optimizer, scheduler, scores)
            tqdm.write(
                f"epoch {epoch:3}/{args.epochs}  train loss {scores['train_loss']:.4f} acc {scores['train_acc']:7.2%}"
                f" {train_n / (times[1] - times[0]):7,.0f}/s  val loss {scores['val_loss']:.4f}"
                f" acc {scores['val_acc']:7.2%} {val_n / (times[2] - times[1]):7,.0f}/s{'  best' if better else ''}", file=sys.stdout)
            for tag in ("train_loss", "train_acc", "val_loss", "val_acc"):
                log.add_scalar(f"data/{tag.replace('_', '')}", scores[tag], epoch)
            log.add_scalar("learning rate", lr, epoch)
            if epoch % max(1, args.epochs // 10) == 0 or epoch == args.epochs:
                matrix = confusion_matrix(logits.argmax(1), val_labels, len(classes))
                log.add_image("confusion matrix", draw_matrix(matrix, classes), epoch, dataformats="HWC")
                for name, weights in net.named_parameters():
                    log.add_histogram(name.replace(".", "/"), weights, epoch)
    finally:
        bar.close()
        if rank == 0:
            run.save()
            log.close()
    return run


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=300, metavar="N", help="(default: %(default)s)")
    parser.add_argument("--batch-size", type=int, default=64, metavar="N", help="over all processes (default: %(default)s)")
    parser.add_argument("--lr", type=float, default=0.1, metavar="LR", help="learning rate at the start (default: %(default)s)")
    parser.add_argument("--momentum", type=float, default=0.9, metavar="M", help="(default: %(default)s)")
    parser.add_argument("--weight-decay", type=float, default=0.0, metavar="W", help="(default: %(default)s)")
    parser.add_argument("--step-size", type=int, default=100, metavar="N",
                        help="epochs after which the learning rate drops (default: %(default)s)")
    parser.add_argument("--gamma", type=float, default=0.1, metavar="G", help="and by which factor (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="(default: %(default)s)")
    parser.add_argument("--device", default=None, help="cpu, cuda, mps ... (default: the accelerator where there is one)")
    parser.add_argument("--data", type=Path, default=Path("data"), help="holds train/ and val/ (default: %(default)s)")
    parser.add_argument("--logs", type=Path, default=Path("logs"), help="for TensorBoard, one folder a run (default: %(default)s)")
    parser.add_argument("--models", type=Path, default=Path("models"), help="for model.pt and model.json (default: %(default)s)")
    parser.add_argument("--resume", action="store_true",
                        help=f"go on from <models>/{CHECKPOINT} with that run's settings, but for those given here")
    args = parser.parse_args(argv)
    if args.resume:
        stored = read_checkpoint(args.models / CHECKPOINT)["args"]
        paths = {"data", "logs", "models"}
        parser.set_defaults(**{key: Path(value) if key in paths else value for key, value in stored.items() if key != "resume"})
        args = parser.parse_args(argv)
    for name in ("epochs", "batch_size", "step_size"):
        if getattr(args, name) < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1")
    if args.device is None:
        args.device = torch.accelerator.current_accelerator().type if torch.accelerator.is_available() else "cpu"
    return args


def main(argv=None):
    try:
        run = train(parse_args(argv))
    except KeyboardInterrupt:
        sys.exit("\ninterrupted: all finished epochs are saved; 'python train.py --resume' goes on")
    except (OSError, ValueError) as error:
        sys.exit(f"error: {error}")
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
    if int(os.environ.get("RANK", 0)) == 0:
        best = run.best
        print(f"best: {best['val_acc']:.2%} of {run.sizes['val']:,} validation images, epoch {best['epoch']}; "
              f"last: {run.last['val_acc']:.2%}; {run.seconds:.0f} s of training")
        print(f"weights in {run.args.models / 'model.pt'}, the rest in {run.args.models / 'model.json'}; "
              f"curves: tensorboard --logdir {run.args.logs}")


if __name__ == "__main__":
    main()
