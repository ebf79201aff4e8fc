"""Frames a second of predict.py's live path: decode, find or follow faces, classify, draw, show.

    python tests/bench/video_speed.py PHOTOS [--model models/model.pt]

PHOTOS is a folder of photos with large faces. Clips of 640 x 480 are made from them, in which they sway;
their frame rate is so high that the window, where there is a screen, never waits for the next frame's time.
"""

import argparse
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

import cv2
import numpy as np
import torch

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(ROOT))

from net import load_model, simpleconv3  # noqa: E402
from predict import Window, annotate, draw_bars, list_inputs, predict_video  # noqa: E402
from preprocess_lips import LipCropper, cores, read_photo  # noqa: E402


def write_clip(path, photos, side, frames):
    """Photos (none: an empty room) side by side, `side` pixels wide, swaying."""
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter_fourcc(*"MJPG"), 1000, (640, 480))
    faces = [
        cv2.cvtColor(cv2.resize(photo, (side, side), interpolation=cv2.INTER_AREA), cv2.COLOR_RGB2BGR)
        for photo in photos
    ]
    rng = np.random.default_rng(0)
    room = cv2.resize(
        rng.integers(60, 180, (12, 16, 3), dtype=np.uint8), (640, 480), interpolation=cv2.INTER_CUBIC
    )
    for i in range(frames):
        frame = room.copy()
        for k, face in enumerate(faces):
            x = round((k + 0.5) * 640 / len(faces) - side / 2 + 20 * np.sin(i / 8))
            y = round(240 - side / 2 + 10 * np.cos(i / 11))
            frame[y:y + side, x:x + side] = face
        writer.write(frame)
    writer.release()


def measure(clip, model, window):
    """Frames a second, and the share of frames in which every face that some frame has is found."""
    start, counts = time.perf_counter(), []
    live = Window("bench") if window else None
    start = time.perf_counter()
    for moment in predict_video(clip, model):
        if live:
            live.show(moment, model.classes)
        else:
            picture = annotate(moment.frame, moment.faces, moment.probabilities, model.classes, 0,
                               moment.numbers)
            draw_bars(picture, moment.probabilities[0] if moment.faces else None, model.classes, 0)
        counts.append(len(moment.faces))
    return len(counts) / (time.perf_counter() - start), statistics.mean(n == max(counts) for n in counts)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("photos", type=Path)
    parser.add_argument("--model", type=Path, help="(default: untrained weights)")
    parser.add_argument("--rounds", type=int, default=3, metavar="N", help="(default: %(default)s)")
    parser.add_argument(
        "--frames", type=int, default=300, metavar="N", help="of each clip (default: %(default)s)"
    )
    args = parser.parse_args()
    torch.set_num_threads(1)  # as predict.py does
    model = load_model(args.model) if args.model else simpleconv3(4).eval()
    photos = [read_photo(file) for file, _ in list_inputs([args.photos])[0][:4]]
    window = bool(os.environ.get("DISPLAY")) or sys.platform != "linux"
    print(f"{cores()} cores, 640 x 480, {'with' if window else 'without'} a window")
    with tempfile.TemporaryDirectory() as folder:
        for name, shown, side in (
            ("one large face", photos[:1], 260),
            ("one small face", photos[:1], 110),
            ("two faces", photos[:2], 220),
            ("four faces", photos[:4], 115),
            ("no face", [], 0),
        ):
            clip = Path(folder) / f"{name}.avi"
            write_clip(clip, shown, side, args.frames)
            rates, found = zip(*(measure(clip, model, window) for _ in range(args.rounds)))
            print(f"{name:15} {statistics.median(rates):5.0f} frames/s (least {min(rates):.0f}), "
                  f"the same number of faces in {found[0]:.0%}", flush=True)
        frame = next(predict_video(Path(folder) / "one large face.avi", model)).frame
        cropper, start = LipCropper(), time.perf_counter()
        for _ in range(30):
            cropper(frame)
        each = (time.perf_counter() - start) / 30 * 1e3
        print(f"for comparison: searching the large face in every frame takes {each:.0f} ms a frame alone")


if __name__ == "__main__":
    main()
