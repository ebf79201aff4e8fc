"""Seconds an epoch: the textbook's loop, train.py, and the network alone on ready batches, in one run.

    python tests/bench/train_speed.py              13,577 + 1,509 crops of 128 x 128, about 4 minutes
    python tests/bench/train_speed.py --amp        the same, and train.py once more with its --amp
    python tests/bench/train_speed.py --busy       train.py alone and beside a busy loop on every core
    python tests/bench/train_speed.py --growth     how train.py's time and memory grow with the images
    python tests/bench/train_speed.py --logging    what TensorBoard's curves and pictures cost of a whole run

The crops are smooth noise: the time does not depend on what they show. Each measurement is a process of
its own; they take turns, and medians are printed. Run it on a quiet machine.
"""

import argparse
import contextlib
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from PIL import Image

sys.path[:0] = [str(Path(__file__).resolve().parents[2]), str(Path(__file__).resolve().parent)]


def make_crops(data, n):
    """n crops in data/train and data/val, nine to one, four classes."""
    rng = np.random.default_rng(0)
    for i in range(n):
        folder = data / ("val" if i % 10 == 0 else "train") / "abcd"[i // 10 % 4]
        folder.mkdir(parents=True, exist_ok=True)
        noise = Image.fromarray(rng.integers(0, 256, (12, 12, 3), dtype=np.uint8))
        noise.resize((128, 128), Image.Resampling.BICUBIC).save(folder / f"{i}.jpg", quality=95)


def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def textbook(data, epochs):
    from textbook import folders, train_textbook

    times = [0, *(seconds for seconds, *_ in train_textbook(*folders(data), 4, epochs))]
    return {"epoch": min(np.diff(times))}


def ours(data, epochs, mapped=False, amp=False):
    import torch

    import train

    imported = peak()
    if mapped:
        train.free_memory = lambda: 0
    with tempfile.TemporaryDirectory() as folder:
        where = f"--data {data} --device cpu --logs {folder}/logs --models {folder}/models"
        args = train.parse_args(where.split() + ["--amp"] * amp)
        decode, load = [], train.load_data

        def load_data(*args):
            start = time.perf_counter()
            loaded = load(*args)
            decode.append(time.perf_counter() - start)
            return loaded

        train.load_data = load_data
        marks, real = [time.perf_counter()], train.Run.record

        def record(*args):
            marks.append(time.perf_counter())  # a whole epoch: training, validation, log and best weights
            if len(marks) > epochs:
                raise KeyboardInterrupt
            return real(*args)

        train.Run.record = record
        with contextlib.suppress(KeyboardInterrupt):  # the default recipe, but only its first epochs
            train.train(args)
    return {
        "epoch": min(np.diff(marks[1:])),
        "decode": decode[0],
        "peak": peak(),
        "imported": imported,
        "torch": torch.__version__,
    }


def mapped(data, epochs):
    return ours(data, epochs, mapped=True)


def amp(data, epochs):
    return ours(data, epochs, amp=True)


def logging(data, epochs):
    """Seconds that training waits for its curves, that the thread which writes them takes, and of the run."""
    from tensorboard.summary.writer.event_file_writer import _AsyncWriterThread

    import train

    spent = {"waits": 0.0, "writer": 0.0}

    def timed(cls, name, key, clock):
        real = getattr(cls, name)

        def method(*args):
            start = clock()
            try:
                return real(*args)
            finally:
                spent[key] += clock() - start

        setattr(cls, name, method)

    timed(train.SummaryWriter, "close", "waits", time.perf_counter)
    for name in ("__init__", "add_epoch"):
        timed(train.Curves, name, "waits", time.perf_counter)
    timed(_AsyncWriterThread, "run", "writer", time.thread_time)
    with tempfile.TemporaryDirectory() as folder:
        where = f"--data {data} --device cpu --logs {folder}/logs --models {folder}/models"
        args = train.parse_args(where.split())
        spent["run"] = train.train(args).seconds + spent["waits"]
    return spent


def network(data, epochs):
    import torch
    import torch.nn.functional as F

    from net import simpleconv3

    steps, checks = (-(-sum(1 for _ in (data / part).glob("*/*")) // 64) for part in ("train", "val"))
    net = simpleconv3(4)
    optimizer = torch.optim.SGD(net.parameters(), 0.1, 0.9, fused=True)
    images, labels = torch.randn(64, 3, 48, 48), torch.randint(0, 4, (64,))
    times = []
    for _ in range(epochs):
        start = time.perf_counter()
        net.train()
        for _ in range(steps):
            loss = F.cross_entropy(net(images), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        net.eval()
        with torch.inference_mode():
            for _ in range(checks):
                net(images)
        times.append(time.perf_counter() - start)
    return {"epoch": min(times)}


def measure(part, data, epochs, *more):
    done = subprocess.run(
        [sys.executable, __file__, "--part", part, "--data", str(data), "--epochs", str(epochs), *more],
        capture_output=True,
        text=True,
    )
    if done.returncode:
        sys.exit(done.stderr)
    return json.loads(done.stdout.splitlines()[-1])


def beside_busy_loops(data):
    """Seconds an epoch of train.py while another process keeps each core busy."""
    loops = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(os.cpu_count())]
    try:
        return measure("ours", data, 4)["epoch"]
    finally:
        for loop in loops:
            loop.kill()


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--images", type=int, default=15086, metavar="N", help="(default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=3, metavar="N", help="(default: %(default)s)")
    parser.add_argument("--amp", action="store_true", help="time train.py with and without its --amp")
    parser.add_argument("--busy", action="store_true", help="time train.py beside busy loops, too")
    parser.add_argument(
        "--growth", action="store_true", help="1x, 4x and 16x of 2,000 images, in memory and mapped"
    )
    parser.add_argument(
        "--logging", action="store_true", help="the default recipe's 300 epochs on 400 and on 800 images"
    )
    parser.add_argument(
        "--part", choices=["textbook", "ours", "amp", "mapped", "network", "logging"], help=argparse.SUPPRESS
    )
    parser.add_argument("--data", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--epochs", type=int, default=3, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.part:
        result = globals()[args.part](args.data, args.epochs)
        print("\n" + json.dumps({k: v if isinstance(v, str) else float(v) for k, v in result.items()}))
        return
    print(f"{os.cpu_count()} cores")
    with tempfile.TemporaryDirectory() as folder:
        if args.busy:
            data = Path(folder)
            make_crops(data, 2000)
            pairs = [(measure("ours", data, 4)["epoch"], beside_busy_loops(data)) for _ in range(args.rounds)]
            alone, busy = map(statistics.median, zip(*pairs))
            print(f"an epoch of 1,800 crops: {alone:.2f} s alone, {busy:.2f} s beside busy loops, "
                  f"{statistics.median(b / a for a, b in pairs):.1f} times as long")
            return
        if args.growth:
            print(f"{'images':>8}{'s/epoch':>10}{'peak MB':>10}{'mapped s/epoch':>16}{'peak MB':>10}")
            for n in (2000, 8000, 32000):
                data = Path(folder) / str(n)
                make_crops(data, n)
                rounds = [(measure("ours", data, 4), measure("mapped", data, 4)) for _ in range(args.rounds)]
                row = [
                    statistics.median(r[i][key] for r in rounds) for i in (0, 1) for key in ("epoch", "peak")
                ]
                print(f"{n:8}{row[0]:10.2f}{row[1]:10.0f}{row[2]:16.2f}{row[3]:10.0f}", flush=True)
            return
        if args.logging:
            for n in (400, 800):
                data = Path(folder) / str(n)
                make_crops(data, n)
                rounds = [measure("logging", data, 300) for _ in range(args.rounds)]
                waits, writer, run = (
                    statistics.median(r[key] for r in rounds) for key in ("waits", "writer", "run")
                )
                share = statistics.median((r["waits"] + r["writer"]) / r["run"] for r in rounds)
                print(
                    f"{n:,} images: training waits {waits:.2f} s for its curves, which another thread takes "
                    f"{writer:.2f} s to write, "
                    f"of {run:.1f} s: {share:.1%} at most",
                    flush=True,
                )
            return
        data = Path(folder)
        make_crops(data, args.images)
        epochs = {"textbook": 2, "ours": 4, **({"amp": 4} if args.amp else {}), "network": 3}
        rounds = [{part: measure(part, data, n) for part, n in epochs.items()} for _ in range(args.rounds)]

        def median(part, key):
            return statistics.median(r[part][key] for r in rounds)

        def ratio(part, other):
            return statistics.median(r[part]["epoch"] / r[other]["epoch"] for r in rounds)

        for part in epochs:
            print(f"{part:9} {median(part, 'epoch'):6.2f} s an epoch")
        print(f"train.py is {ratio('textbook', 'ours'):.2f} times as fast as the textbook's loop and takes "
              f"{ratio('ours', 'network'):.2f} times what the network alone takes")
        if args.amp:
            print(f"with --amp it takes {ratio('amp', 'ours'):.2f} times what it takes without; "
                  f"peak memory {median('amp', 'peak'):.0f} MB")
        print(
            f"decoding {args.images:,} crops {median('ours', 'decode'):.1f} s; "
            f"peak memory {median('ours', 'peak'):.0f} MB, "
            f"of which {median('ours', 'imported'):.0f} MB are there once torch is imported"
        )


if __name__ == "__main__":
    main()
