"""Name the expression of every mouth in photos, videos or a camera's view, with train.py's weights.

    python predict.py photo.jpg                     one line a face
    python predict.py holiday/ --save named         annotated copies of photos and videos, and a page of them
    python predict.py clip.mp4                      one line for every change, with the time
    python predict.py --camera 0                    a live window
    python predict.py crops/ --crops --json         mouth crops instead of photos, one JSON object a line
    python predict.py --evaluate data/val --crops   accuracy on a folder of class folders
    python predict.py crawled/ --sort data/raw      photos into folders by class, the doubtful ones apart

In other code:

    from net import load_model
    from predict import predict_photos, predict_video
    model = load_model()
    for result in predict_photos(["photo.jpg"], model):
        print(result.faces, result.probabilities)
    for moment in predict_video("clip.mp4", model):
        print(moment.time, moment.numbers, moment.probabilities)
"""

import argparse
import contextlib
import functools
import gc
import glob
import io
import itertools
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from collections import Counter, deque
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction
from pathlib import Path
from typing import NamedTuple
from urllib.parse import quote

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageSequence
from tqdm import tqdm

from net import PRETRAINED, confusion_matrix, default_model, load_model, predict, scores_of
from preprocess_lips import (
    HEIC,
    MAX_FRAMES,
    MAX_PIXELS,
    NO_CLASSES,
    Face,
    Later,
    LipCropper,
    cascade_detector,
    command_line,
    cores,
    cv2,
    font_hint,
    is_heic,
    is_hidden,
    label_font,
    locked,
    printable,
    read_photo,
    replacing,
    sweep,
    temporary,
    text_table,
    write_file,
    writing,
)

# read when OpenCV is loaded: of a missing camera it would say the same in a dozen lines
os.environ.setdefault("OPENCV_LOG_LEVEL", "SILENT")
av = Later("av")  # after OpenCV, whose windows freeze where PyAV's libxcb is loaded first

BATCH = 32  # photos whose faces go through the network together
NO_FACE = "no face found"  # the error of a photo that is readable

PIPE = "pipes are not read; write it to a file, and name that"
UNPACK, ARCHIVES = "an archive; unpack it, and name the folder", ".zip .tar .gz .tgz .7z .rar".split()
VIDEOS = frozenset(".3gp .avi .flv .m2ts .m4v .mkv .mov .mp4 .mpeg .mpg .ogv .webm .wmv".split())
NO_VIDEO = "not a video that can be decoded"
NO_VIDEOS = ("image2", "_pipe", "bin", "idf", "adf", "tty")  # FFmpeg's names for photos, and text
ANSWER = 20  # seconds in which an address must answer
TICK = Fraction(1, 30_000)  # seconds, the unit of the frames' times in copies
X264 = {"preset": "veryfast", "crf": "20", "flags": "+frame_duration"}
BT709 = LIMITED = 1  # FFmpeg's numbers for colours of HD, which browsers would guess for large videos only
COPIED = ("aac", "mp3", "opus")  # sound that browsers play within MP4; any other becomes AAC
SEARCH_EVERY = 6  # frames of a video, and in one after SEARCH_AFTER; in between, known faces are followed
SEARCH_AFTER = 0.4  # seconds
SMOOTHING = 0.25  # share of the newest frame in the probabilities of a face in a video
PATIENCE = 15  # frames for which a face that is out of sight keeps its number
LEAD = 0.1  # by which a label must beat the one printed before to be a change

SURE = 0.95  # least probability with which --sort trusts a label; tests/bench/README.md says what it gives
SORTED = ".sorted"  # in the folder of --sort: a line of JSON for each photo that has been sorted
HEAD = re.compile(r"^[01]\.\d{3}(-[^_]+)?_")  # begins the names of sorted photos

MIN_SAVED = 360  # pixels; smaller photos are enlarged before they are annotated
MOST_ENLARGED = 2560  # pixels to which the longer side of photos with small faces is enlarged at most
LEAST_WORDS = 13  # pixels of the smallest letters
WORDS = 6  # widths of letters that a face's words take, or heights

EXAMPLES = """examples:
  python predict.py photo.jpg clip.mp4 holiday/ --save named
  python predict.py --camera 0
"""

TEMPLATE = Path(__file__).resolve().with_name("data") / "page.html"

load_cropper = functools.cache(LipCropper)  # takes as long as forty photos; threads may share it
load_font = functools.cache(label_font)  # takes longer than drawing with it


# --- photos


class Result(NamedTuple):
    """What became of one photo."""

    source: Path
    faces: list  # of preprocess_lips.Face, largest first
    probabilities: np.ndarray  # float32, faces x classes, rows sum to 1
    error: str  # empty, or why there is no face


def predict_photos(sources, model, crops=False, workers=None, largest=False):
    """Find and classify the mouths in photos; yields a `Result` for each source (path), in their order.

    The model is in eval mode, as `net.load_model` returns it. With `crops` the images are mouth crops, each
    classified whole; with `largest` only the largest face of a photo counts. Of an animation it is the first
    frame that has a face. So many `workers` (threads, one a core) find faces while the network runs.
    """
    sources = [sources] if isinstance(sources, (str, Path)) else sources
    sources = [Path(source) for source in sources]
    workers = min(workers or cores(), len(sources)) or 1
    cropper = None if crops else load_cropper()

    def find(source):
        try:
            if crops:
                crop = read_photo(source)
                box = (0, 0, crop.shape[1], crop.shape[0])
                faces = [Face(box, None, box, crop, "")]
            else:
                faces = cropper.find(source, largest).faces
                for _, frame, _ in itertools.islice(() if faces else animation(source), MAX_FRAMES):
                    if faces := cropper(frame, largest):
                        break
        except OSError as error:
            way_out = PIPE if str(source) == "-" else UNPACK if source.suffix.lower() in ARCHIVES else ""
            return Result(source, [], None, f"unreadable: {way_out or error.strerror or error}")
        return Result(source, faces, None, "" if faces else NO_FACE)

    with ThreadPoolExecutor(workers) as pool:
        waiting, ahead = deque(), deque(sources)
        while ahead or waiting:
            while ahead and len(waiting) < BATCH + 2 * workers:
                waiting.append(pool.submit(find, ahead.popleft()))
            results = [waiting.popleft().result() for _ in range(min(BATCH, len(waiting)))]
            rows = predict(model, [face.crop for result in results for face in result.faces]).numpy()
            for result in results:
                n = len(result.faces)
                yield result._replace(probabilities=rows[:n])
                rows = rows[n:]


def as_json(result, classes, numbers=None, **where):
    """The objects of --json for a photo or a frame: one a face, or one that says why there is none."""
    where = {"source": str(result.source), **where}
    if result.error:
        return [where | {"face": None, "error": result.error}]
    return [
        where | {
            "face": number,
            "box": list(face.box),
            "mouth": list(face.mouth),
            "label": classes[row.argmax()],
            "probability": round(float(row.max()), 4),
            "probabilities": {name: round(float(p), 4) for name, p in zip(classes, row)},
        }
        for number, face, row in zip(numbers or itertools.count(1), result.faces, result.probabilities)
    ]


def json_line(value):
    """JSON that is exact and safe to print: only ASCII where the terminal would not show all of it."""
    text = json.dumps(value, ensure_ascii=False)
    encoding = sys.stdout.encoding or "utf-8"
    return text if printable(text).encode(encoding, "replace").decode(encoding) == text else json.dumps(value)


def say(text, aside=False):
    """Print a line that no name can break; aside: on standard error, where it is in no program's way."""
    print(printable(text), file=sys.stderr if aside else sys.stdout)


def show(one, args):
    """Print an object of `as_json` above the progress bar, as it is with --json and otherwise in words."""
    words = f"face {one['face']}  {one['label']}  {one['probability']:.1%}" if one["face"] else one["error"]
    tqdm.write(json_line(one) if args.json else printable(f"{one['source']}  {words}"))


def predict_files(files, model, crops, largest=False):
    """`predict_photos` with a progress bar, and a warning where a few crops are not square or hold a face."""

    def is_photo(file):
        with contextlib.suppress(OSError):
            photo = read_photo(file)
            small = cv2.resize(cv2.cvtColor(photo, cv2.COLOR_RGB2GRAY), (256, 256))
            faces = cascade_detector("default", None).detectMultiScale(small, 1.1, 4, minSize=(100, 100))
            return len(faces) > 0 or max(photo.shape[:2]) > 1.2 * min(photo.shape[:2])
        return False

    some = files[::-(-len(files) // 8)] if crops and files else []
    if some and 4 * sum(map(is_photo, some)) >= len(some):  # one mouth in sixty looks like a face
        say(f"{some[0]} and others look like whole photos, of which --crops makes nonsense: leave it out",
            aside=True)
    results, quiet = predict_photos(files, model, crops, largest=largest), None if len(files) > 1 else True
    return tqdm(results, total=len(files), unit="photo", leave=False, disable=quiet)


def print_photos(files, model, args, copies):
    """Predict photos (pairs of `list_inputs`), print lines, save copies if asked; yield a Card for each."""
    for result, (file, relative) in zip(predict_files([file for file, _ in files], model, args.crops), files):
        for one in as_json(result, model.classes):
            show(one, args)
        copy, boxes = None, []
        if copies and result.error in ("", NO_FACE):
            copy, photo = copies.name(relative, ".jpg"), read_photo(file)
            picture = annotate(photo, result.faces, result.probabilities, model.classes)
            save_jpeg(picture, copies.folder / copy)
            if len(result.faces) > 1:
                boxes = [np.multiply(face.box, picture.width / photo.shape[1]) for face in result.faces]
        yield Card(file, copy, list(result.probabilities), result.error, boxes=boxes)


# --- video


class Moment(NamedTuple):
    """One frame of a video."""

    time: float  # seconds since the start
    frame: np.ndarray  # uint8, H x W x 3, RGB
    numbers: list  # of the faces, from 1; a face keeps its number as long as it is followed
    faces: list  # of preprocess_lips.Face
    probabilities: np.ndarray  # float32, faces x classes, smoothed over some frames; rows sum to 1

    @property
    def largest(self):
        """The probabilities of the largest face; None where there is none."""
        sides = [face.box[2] - face.box[0] for face in self.faces]
        return self.probabilities[np.argmax(sides)] if sides else None


def predict_video(source, model):
    """Classify the mouths in every frame of a video, each face with a number that it keeps.

    The source is a path, the address of a video or stream, a camera's number, or a `Video`. Yields a `Moment`
    for each frame that can be decoded; raises an OSError that says why where it cannot be opened. Faces are
    searched in every sixth frame, in one after 0.4 seconds and when one is lost, and followed in between.
    """
    cropper = load_cropper()
    known = {}  # number: (face, probabilities, frames since it was seen)
    new, searched = itertools.count(1), 0.0
    for i, (now, frame) in enumerate(source if isinstance(source, Video) else Video(source)):
        seen = {}
        for number, (face, _, missed) in known.items():
            face = None if missed else cropper.follow(frame, face.landmarks)
            if face and not any(same_face(face, other) for other in seen.values()):
                seen[number] = face
        lost = any(number not in seen for number, (_, _, missed) in known.items() if not missed)
        if lost or i % SEARCH_EVERY == 0 or now - searched >= SEARCH_AFTER:
            searched = now
            places = {number: face for number, (face, _, _) in known.items()} | seen
            for face in cropper(frame):
                number = next((n for n, place in places.items() if same_face(face, place)), None) or next(new)
                seen[number] = places[number] = face

        rows = predict(model, [face.crop for face in seen.values()]).numpy()
        for (number, face), row in zip(seen.items(), rows):
            before = known[number][1] if number in known else row
            known[number] = face, before + SMOOTHING * (row - before), 0
        for number in known.keys() - seen.keys():
            face, row, missed = known.pop(number)
            if missed < PATIENCE:
                known[number] = face, row, missed + 1

        numbers = sorted(seen)
        smooth = np.array([known[number][1] for number in numbers]).reshape(-1, rows.shape[1])
        yield Moment(now, frame, numbers, [seen[number] for number in numbers], smooth)


def same_face(a, b):
    """Whether faces of the same or of neighbouring frames are one: mouths less than half a face apart."""
    apart = np.subtract(a.mouth[:2], b.mouth[:2]) + np.subtract(a.mouth[2:], b.mouth[2:])
    return np.hypot(*apart) / 2 < (b.box[2] - b.box[0]) / 2


class Video:
    """A video, stream or camera, to be iterated once: seconds since its start, and frame.

    Frames are uint8 arrays of shape (H, W, 3), RGB, upright, all as large as the first. `frames` and
    `seconds` are how long the video says that it is, 0 if it does not; `lasts` are the seconds for which the
    newest frame is shown; `packets` gather the `sound` that is read between the frames. An OSError says why
    it cannot be opened, or that it has no frame.
    """

    def __init__(self, source, sound=False):
        self.source, self.frames, self.seconds, self.lasts, self.rate = source, 0, 0.0, 0.0, 25
        self.sound, self.packets = None, deque(maxlen=None if sound else 0)
        readers = [camera_frames] if isinstance(source, int) else [animation, self._decode]
        for read in readers[is_address(source):]:
            self._pictures = read(source)
            if first := next(self._pictures, None):
                self._pictures = itertools.chain([first], self._pictures)
                return
        raise OSError("not one frame can be decoded")

    def __iter__(self):
        now = 0.0
        for seconds, frame, lasts in self._pictures:
            now, self.lasts = max(now, seconds), lasts  # stamps go back where recordings were joined
            yield now, frame

    def _decode(self, source):
        far = is_address(source)
        name = source if far else str(Path(source).resolve())  # FFmpeg takes 12:30.mp4 for an address
        try:
            file = av.open(name, timeout=ANSWER if far else None, metadata_errors="replace")
        except av.FFmpegError as error:
            why = {av.error.InvalidDataError: NO_VIDEO, av.error.ExitError: f"no answer in {ANSWER} s"}
            raise OSError(why.get(type(error), error.strerror)) from None
        picture, heard = file.streams.best("video"), file.streams.best("audio")
        if not picture or not picture.codec_context or file.format.name.endswith(NO_VIDEOS):
            raise OSError("photos are not fetched: download it, and name the file" if far else NO_VIDEO)
        picture.thread_type = "AUTO"
        self.sound, self.rate = heard if heard and heard.codec_context else None, picture.average_rate or 25
        start = None if file.start_time is None else file.start_time / av.time_base
        length = (picture.duration or 0) * picture.time_base or (file.duration or 0) / av.time_base
        self.seconds = float(max(length, picture.frames / self.rate))  # of a cut AVI the first is a guess
        cover = picture.disposition & av.stream.Disposition.attached_pic  # of a song
        self.frames = 1 if cover else picture.frames or round(length * self.rate)
        size, now, convert = None, 0.0, av.video.reformatter.VideoReformatter().reformat
        with contextlib.suppress(av.FFmpegError):  # what breaks off has ended
            for packet in file.demux([picture, self.sound] if self.sound else picture):
                if packet.stream is not picture:
                    self.packets.append(packet)
                    continue
                try:
                    frames = packet.decode()
                except av.FFmpegError:  # damage costs its frames only
                    continue
                for frame in frames:
                    if not size:
                        wide = float(picture.sample_aspect_ratio or 1)
                        size = round(frame.width * (wide if 0.2 < wide < 5 else 1)), frame.height
                        self.begin = (frame.time or 0.0) if start is None else start
                    now = now + self.lasts if frame.time is None else frame.time - self.begin
                    lasts = float(frame.duration * frame.time_base if frame.duration else 1 / self.rate)
                    pixels = convert(frame, *size, "rgb24", threads=1).to_ndarray()
                    yield now, np.ascontiguousarray(np.rot90(pixels, round(frame.rotation / 90))), lasts


def camera_frames(number):
    """Seconds since the start, frame, and the seconds that it lasts, of a camera."""
    camera, start = cv2.VideoCapture(number), time.perf_counter()
    if not camera.isOpened():
        raise OSError("no such camera, or another program uses it")
    while (read := camera.read())[0]:
        # cameras stamp their frames in ways of their own
        yield time.perf_counter() - start, cv2.cvtColor(read[1], cv2.COLOR_BGR2RGB), 1 / 25


def animation(path):
    """The same of a GIF, WebP or AVIF; nothing of any other file."""
    now = 0.0
    with contextlib.suppress(Exception), Image.open(path) as image:  # decoders raise almost anything
        fits = image.format in ("GIF", "WEBP", "AVIF") and np.prod(image.size) <= MAX_PIXELS
        for each in ImageSequence.Iterator(image) if fits else ():
            white = Image.new("RGBA", each.size, "white")
            frame = np.asarray(Image.alpha_composite(white, each.convert("RGBA")).convert("RGB"))
            lasts = each.info.get("duration", 0) / 1000  # which WebP has only now
            lasts = lasts if lasts > 0.01 else 0.1  # as browsers do
            yield now, frame, lasts
            now += lasts


class NotWritten(OSError):
    """An annotated copy of a video cannot be written."""


class VideoCopy:
    """An annotated copy that browsers play, H.264 in MP4: frames keep their times, and the sound is kept.

    Nothing is at `target` before all is added; `close` it in any case. Methods raise `NotWritten`.
    """

    def __init__(self, target, video, size):
        self.target, self.video, self.waiting, self.part = target, video, None, temporary(target.resolve())
        with self._writing():
            target.parent.mkdir(parents=True, exist_ok=True)
            self.file = av.open(str(self.part), "w", "mp4", {"movflags": "+faststart"})
            self.picture = self.file.add_stream("libx264", min(video.rate, 240), X264)
            self.picture.width, self.picture.height = (side + side % 2 for side in size)
            context, self.encoders = self.picture.codec_context, [self.picture]
            context.time_base, context.color_range = TICK, LIMITED
            context.colorspace = context.color_primaries = context.color_trc = BT709
            if video.sound and video.sound.codec_context.codec.canonical_name in COPIED:
                self.sound = self.file.add_stream_from_template(video.sound)
            elif video.sound:
                self.sound = self.file.add_stream("aac")
                self.encoders.append(self.sound)

    def add(self, picture, seconds):
        """Add a frame (PIL image; None: that was all) and its time, until which the one before it lasts."""
        with self._writing():
            stamp = round(seconds / TICK)
            if self.waiting:
                stamp = max(stamp, self.waiting.pts + 1)
                self.waiting.duration = stamp - self.waiting.pts
                self.file.mux(self.picture.encode(self.waiting))
            while self.video.packets:
                self._add_sound(self.video.packets.popleft())
            if picture:
                self.waiting = av.VideoFrame.from_image(picture)
                self.waiting.pts, self.waiting.time_base = stamp, TICK
                self.waiting.colorspace, self.waiting.color_range = BT709, LIMITED
                return
            for stream in self.encoders:
                self.file.mux(stream.encode())
            self.file.close()
            self.part.replace(self.target)

    def close(self):
        with contextlib.suppress(av.FFmpegError):
            self.file.close()
        self.part.unlink(missing_ok=True)

    def _add_sound(self, packet):
        late = round(self.video.begin / packet.time_base)
        with contextlib.suppress(av.error.InvalidDataError, av.error.ArgumentError):  # what is damaged
            if packet.dts is not None:
                packet.pts, packet.dts = packet.pts - late, packet.dts - late
            if self.sound in self.encoders:
                for frame in packet.decode():
                    self.file.mux(self.sound.encode(frame))
            elif packet.dts is not None:
                packet.stream = self.sound
                self.file.mux(packet)

    @contextlib.contextmanager
    def _writing(self):
        try:
            yield
        except (OSError, av.FFmpegError) as error:
            raise NotWritten(f"{self.target} cannot be written ({error.strerror})") from None


class Changes:
    """Words for a video: a line where a face comes, changes its label, or goes."""

    def __init__(self, source):
        self.source, self.frame = source, 0
        self.last = {}  # number of a face: its label, time and frame

    def lines(self, now, faces):
        """The lines for the next frame, of objects of `as_json`."""
        self.frame += 1
        for one in faces if "label" in faces[0] else ():
            number, label = one["face"], self.last.get(one["face"], (None,))[0]
            if one["probability"] > one["probabilities"].get(label, -1) + LEAD:
                label = one["label"]
                yield self._line(now, number, f"{label}  {one['probability']:.1%}")
            self.last[number] = label, now, self.frame
        for number, (_, seen, frame) in list(self.last.items()):
            if self.frame - frame > PATIENCE:
                yield self._line(seen, number, "gone")
                del self.last[number]

    def _line(self, now, number, what):
        return printable(f"{self.source}  {int(now // 60)}:{now % 60:05.2f}  face {number}  {what}")


def print_video(video, relative, model, args, copies, window=None):
    """Predict an open video, print it, and save a copy and a poster if asked; return its `Card`."""
    labels, turns, changes, n, end, cut = Counter(), [], Changes(video.source), 0, 0.0, False
    name, poster = (copies.name(relative, ".mp4") if copies else None), None
    copy = first = None
    bar = tqdm(total=video.frames or None, unit="frame", leave=False, disable=True if window else None)
    with bar, contextlib.ExitStack() as stack:
        try:
            for moment in predict_video(video, model):
                faces, rows = moment.faces, moment.probabilities
                result = Result(video.source, faces, rows, "" if faces else NO_FACE)
                found = as_json(result, model.classes, moment.numbers, time=round(moment.time, 3))
                for line in map(json_line, found) if args.json else changes.lines(moment.time, found):
                    tqdm.write(line)
                n, end = n + 1, moment.time + video.lasts
                labels.update(one.get("label", "") for one in found)
                top = int(moment.largest.argmax()) if faces else None
                if not turns or turns[-1][1] != top:
                    turns.append((moment.time, top))
                if copies:
                    picture = annotate(moment.frame, faces, rows, model.classes, 0, moment.numbers)
                    if not copy:
                        copy = VideoCopy(copies.folder / name, video, picture.size)
                        stack.enter_context(contextlib.closing(copy))
                    copy.add(picture, moment.time)
                    first = first or (picture if faces else None)
                bar.update()
                if window and not window.show(moment, model.classes):
                    break
            else:
                cut = n < 0.9 * video.frames and end < 0.9 * video.seconds  # some formats only estimate these
                end = end if cut else max(end, video.seconds)
        except KeyboardInterrupt:  # which is how a camera or a stream ends
            if isinstance(video.source, Path) or not n:
                raise
        if copy:
            copy.add(None, end)
    if first:
        poster = copies.name(relative, ".jpg")
        save_jpeg(first, copies.folder / poster)
    if cut:
        say(f"{video.source}  cut short or damaged: {n} of {video.frames} frames can be decoded", args.json)
    if not args.json:
        counts = labels.most_common()
        shares = (f"{label or 'no face'} {count / labels.total():.0%}" for label, count in counts)
        say(f"{video.source}  {', '.join(shares)}")
    rows = [[labels[name] / labels.total() for name in model.classes]] if labels.keys() - {""} else []
    strip = [(start, until, top) for (start, top), (until, _) in zip(turns, [*turns[1:], (end, None)])]
    return Card(video.source, name, rows, "" if rows else NO_FACE, poster, strip, end)


def print_videos(files, model, args, copies):
    """Predict videos and print a line for every change; otherwise as `print_photos`."""
    live = args.camera and not args.json
    if live and not (live := has_screen()):
        say("no screen for a window, so only lines; Ctrl-C ends", aside=True)
    for source, relative in files:
        try:
            video = Video(source, sound=bool(copies))
        except OSError as problem:
            card = Card(source, None, [], f"unreadable: {problem.strerror or problem}")
        else:
            window = Window(f"{source} - q quits") if live else None
            try:
                card = print_video(video, relative, model, args, copies, window)
            except NotWritten as problem:
                card = Card(source, None, [], str(problem))
        if card.error not in ("", NO_FACE):
            show({"source": str(source), "face": None, "error": card.error}, args)
        yield card


# --- camera


def has_screen():
    """Whether a window can be opened. Where not, OpenCV ends the process, so another one tries."""
    probe = [sys.executable, "-c", "import cv2; cv2.namedWindow('probe')"]
    return sys.platform != "linux" or not subprocess.run(probe, capture_output=True).returncode


class Window:
    """The live window."""

    def __init__(self, title):
        self.title, self.start, self.shown = title, 0.0, deque(maxlen=30)  # when the last frames came

    def show(self, moment, classes):
        """Show a frame when its time has come; returns whether to go on."""
        now = time.perf_counter()
        if not self.shown:
            height, width = moment.frame.shape[:2]
            flags = cv2.WINDOW_NORMAL | cv2.WINDOW_KEEPRATIO | getattr(cv2, "WINDOW_GUI_NORMAL", 0)
            cv2.namedWindow(self.title, flags)
            cv2.resizeWindow(self.title, width, height)
            self.start = now
        self.shown.append(now)
        rate = (len(self.shown) - 1) / max(now - self.shown[0], 0.001)
        picture = annotate(moment.frame, moment.faces, moment.probabilities, classes, 0, moment.numbers)
        draw_bars(picture, moment.largest, classes, rate)
        cv2.imshow(self.title, cv2.cvtColor(np.asarray(picture), cv2.COLOR_RGB2BGR))
        # files play at their own speed; a camera's frames are always due
        early = self.start + moment.time - time.perf_counter()
        key = cv2.waitKey(round(1000 * min(max(early, 0.001), 0.5)))
        try:
            return key not in (ord("q"), 27) and cv2.getWindowProperty(self.title, cv2.WND_PROP_VISIBLE) >= 1
        except cv2.error:  # Qt says so when the last window is gone
            return False


# --- evaluation


def evaluate(pairs, classes):
    """Scores of the true and the predicted class (pairs of int) of some images: dict.

    ``images``, ``accuracy``, ``balanced_accuracy`` (mean of the recalls of the classes that occur),
    ``classes`` (as `net.scores_of` gives them) and ``confusion`` (rows true, columns predicted).
    """
    truth, guesses = torch.tensor(pairs).T
    matrix = confusion_matrix(guesses, truth, len(classes))
    hits = matrix.diagonal()
    return {
        "images": len(pairs),
        "accuracy": round(float(hits.sum() / len(pairs)), 4),
        "balanced_accuracy": round(float((hits / matrix.sum(1)).nanmean()), 4),
        "classes": scores_of(matrix, classes),
        "confusion": matrix.int().tolist(),
    }


def evaluate_folder(folder, model, crops):
    """Score a model on a folder of class folders: the scores, and a `Card` for each photo.

    The scores are those of `evaluate`, ``skipped``, the number of photos without a face, and
    ``contradicted``, those whose folder the model contradicts, most confident first: wrong labels are among
    them. Raises a FileNotFoundError where there are no photos, and a ValueError where a folder is none of the
    model's classes or no photo has a face.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: no such folder")
    no_classes = set(NO_CLASSES) - set(model.classes)  # what --sort could not place
    files = [(file, path) for file, path in list_inputs([folder])[0]
             if len(path.parts) > 1 and path.parts[0] not in no_classes]
    if not files:
        raise FileNotFoundError(f"{folder}: no photos in class folders")
    if unknown := sorted({path.parts[0] for _, path in files} - set(model.classes)):
        names = ", ".join(model.classes)
        raise ValueError(f"{folder}: holds {unknown[0]}, which is none of the model's classes ({names})")
    cards = []
    for result, (file, path) in zip(predict_files([file for file, _ in files], model, crops), files):
        boxes = [] if crops else [face.mouth for face in result.faces[:1]]
        cards.append(Card(file, file.absolute(), list(result.probabilities[:1]), result.error, boxes=boxes,
                          folder=path.parts[0]))
    seen = [(card, int(card.rows[0].argmax())) for card in cards if card.rows]
    if not seen:
        hint = "" if crops else "; if they are mouth crops, add --crops"
        raise ValueError(f"{folder}: no face in any of {len(files)} photos{hint}")
    contradicted = sorted((
        {"source": str(card.source), "folder": card.folder, "label": model.classes[guess],
         "probability": round(float(card.rows[0][guess]), 4)}
        for card, guess in seen if card.folder != model.classes[guess]
    ), key=lambda one: -one["probability"])
    scores = evaluate([(model.classes.index(card.folder), guess) for card, guess in seen], model.classes)
    return scores | {"skipped": len(cards) - len(seen), "contradicted": contradicted}, cards


def print_evaluation(args, model):
    """Score the model on the folder of --evaluate and print it; with --save make a page of it."""
    page = args.save and own_page(args.save / "evaluation.html")
    scores, cards = evaluate_folder(args.evaluate, model, args.crops)
    skipped = f"; {scores['skipped']} without a face or unreadable" if scores["skipped"] else ""
    summary = (f"accuracy {scores['accuracy']:.1%}, balanced accuracy {scores['balanced_accuracy']:.1%} "
               f"on {scores['images']} images{skipped}")
    if args.json:
        print(json_line(scores))
    else:
        names, keys = list(map(printable, scores["classes"])), ("precision", "recall", "f1")
        rows = [[name, one["images"], *("-" if one[key] is None else f"{one[key]:.1%}" for key in keys)]
                for name, one in zip(names, scores["classes"].values())]
        confusion = [[name, *row] for name, row in zip(names, scores["confusion"])]
        print(text_table(["class", "images", *keys], rows),
              text_table(["true \\ predicted", *names], confusion), summary, sep="\n\n")
        if scores["contradicted"]:
            print("\nmost confidently contradicted (wrong labels are among them; --save DIR shows them all):")
        for one in scores["contradicted"][:8]:
            say(f"  {one['source']}  {one['label']} {one['probability']:.1%}")
    if page:
        start = {"only": "wrong" if scores["contradicted"] else "", "order": "sure"}
        write_page(page, cards, model.classes, f"{args.evaluate}: {summary}", start)
        say(f"all photos to look through: {page}", args.json)


# --- sorting


class Tray:
    """The folder of --sort: copies of photos or hard links, and a record, so that none is sorted twice."""

    def __init__(self, folder, link):
        self.folder, self.link = folder, link
        self.rows = {}  # of photos that were sorted, by the folded names of their copies, moved since or not
        if (folder / SORTED).is_file():
            for line in (folder / SORTED).read_text("utf-8", "replace").splitlines():
                with contextlib.suppress(ValueError):  # an empty line, or one cut short by a kill
                    row = json.loads(line)
                    self.rows[row["copy"].casefold()] = row
        self.stamps = {row["source"]: (row["bytes"], row["mtime_ns"]) for row in self.rows.values()}
        sweep(folder, *(path for path in folder.iterdir() if path.is_dir()))

    def has(self, photo):
        """Whether this photo was sorted before, as it is; its copy may have been moved or deleted since."""
        about = photo.stat()
        return self.stamps.get(str(photo.resolve())) == (about.st_size, about.st_mtime_ns)

    def add(self, photo, one, label, p):
        """Copy a photo, of which `as_json` says `one`, to a folder; its name begins with the probability.

        In unsure/ the likeliest class comes next, without underscores: `HEAD` must know where it ends.
        """
        stem, head = HEAD.sub("", photo.stem), "" if p is None else f"{int(1000 * p) / 1000:.3f}"
        likeliest = "" if p is None or label == one["label"] else one["label"].replace("_", "-")[:40]
        for n in itertools.count(1):
            start = "-".join(filter(None, [head, likeliest, str(n) if n > 1 else ""]))
            copy = Path(label, file_name(start + "_" if start else "", stem, photo.suffix))
            target = self.folder / copy
            if copy.as_posix().casefold() in self.rows:
                continue
            if not target.exists() or target.read_bytes() == photo.read_bytes():  # placed, but a kill came
                break
        if not target.exists():
            self._place(photo, target)
        about = photo.stat()
        row = one | {"source": str(photo.resolve()), "bytes": about.st_size, "mtime_ns": about.st_mtime_ns,
                     "copy": copy.as_posix()}
        with writing(self.folder / SORTED), open(self.folder / SORTED, "a", encoding="utf-8") as record:
            record.write("\n" + json.dumps(row))  # after what a kill cut short
        self.rows[row["copy"].casefold()] = row
        return target

    def cards(self, classes):
        """A `Card` for each copy that is still in the folder, moved within it since or not, sorted."""
        files = (path for path in self.folder.glob("*/*") if not any(map(is_hidden, path.parts[-2:])))
        here = {path.relative_to(self.folder).as_posix(): path for path in files}
        places = [here.pop(row["copy"], None) for row in self.rows.values()]
        moved = {path.name: path for path in here.values()}
        for place, row in zip(places, self.rows.values()):
            place = place or moved.pop(Path(row["copy"]).name, None)
            if place and "face" in row:  # which records of earlier versions lack
                rows = [[row["probabilities"].get(name, 0) for name in classes]] if row["face"] else []
                boxes = [row["mouth"]] if row["face"] else []
                yield Card(place, place.absolute(), rows, row.get("error", ""), boxes=boxes,
                           folder=place.parent.name)

    def _place(self, photo, target):
        with replacing(target) as part:
            os.link(photo.resolve(), part) if self.link else shutil.copy2(photo, part)


def sort_photos(args, model):
    """Copy the photos of all inputs into the folders of --sort, by their largest faces, and sum up."""
    if set(NO_CLASSES) & set(model.classes):
        names = " or ".join(NO_CLASSES)
        raise ValueError(f"{model.path}: has a class {names}, where --sort puts what has none")
    for path in args.inputs:
        if args.sort.resolve() in (path.resolve(), *path.resolve().parents):
            raise ValueError(f"{path}: lies in {args.sort}, where sorted photos go; name another folder")
    files = list({file.resolve(): file for file, _ in list_inputs(args.inputs, skip=args.sort)[0]}.values())
    page = own_page(Path(f"{args.sort}.html"))  # beside the folder, in which later steps would count it
    counts, unreadable, (unsure, no_face) = Counter(), [], NO_CLASSES
    with locked(args.sort / ".lock"):
        tray = Tray(args.sort, args.link)
        new = [file for file in files if not (file.is_file() and tray.has(file))]
        try:
            for result in predict_files(new, model, args.crops, largest=True):
                [one] = as_json(result, model.classes)
                if result.error in ("", NO_FACE):
                    p = float(result.probabilities.max()) if result.faces else None
                    label = no_face if p is None else one["label"] if p >= args.sure else unsure
                    one["sorted"] = str(tray.add(result.source, one, label, p))
                    counts[label] += 1
                else:
                    unreadable.append(result.source)
                if args.json or "sorted" not in one:
                    show(one, args)
        finally:  # a page of what was done before Ctrl-C
            cards = sorted(tray.cards(model.classes))
            about = f"{args.sort}: {len(cards)} sorted photos"
            write_page(page, cards, model.classes, about, {"order": "doubt"})
    if not args.json:
        print_sorted(args, model, counts, len(files) - len(new), len(unreadable), page)
    if set(unreadable) & set(args.inputs):
        sys.exit(1)


def print_sorted(args, model, counts, before, unreadable, page):
    """What went where, and what to do next."""
    if counts:
        rows = [[printable(name), counts[name]] for name in (*model.classes, *NO_CLASSES)]
        print(text_table(["folder", "photos"], rows, "left"))
    done = f"{counts.total()} photos {'linked' if args.link else 'copied'} to {args.sort}"
    done += f", {before} left alone since they were sorted before" if before else ""
    done += f", {unreadable} left out since they cannot be read" if unreadable else ""
    script = "split_train_val.py" if args.crops else "preprocess_lips.py"
    say(done)
    say(f"Look at {page}, or into the folders, where names begin with the probability, so the doubtful come "
        "first: move what is wrong, or delete it.")
    say(f"Then: {shlex.join(['python', script, str(args.sort)])} "
        f"(what is left in {' and '.join(NO_CLASSES)} is in no class)")


# --- pictures and page

# Okabe and Ito's colours that the colour-blind tell apart, but for those too dark for black letters
PALETTE = ("#56b4e9", "#e69f00", "#009e73", "#cc79a7", "#f0e442", "#d55e00", "#bbbbbb")


def annotate(photo, faces, probabilities, classes, least=MIN_SAVED, numbers=None):
    """A copy of the photo with every mouth's box, expression and probability, and its number among several.

    The photo is a uint8 array of shape (H, W, 3), RGB, or (H, W), the copy a PIL image; faces and their
    probabilities are as in a `Result`, their numbers begin at 1 where none are given. The words are as large
    as the faces allow, and cover no face and no other word where there is room; where many find none, they
    are cut to the number. Small photos are enlarged until their longer side has `least` pixels, and those of
    small faces until the words can be read; with 0 no photo is.
    """
    numbers = list(numbers or range(1, len(faces) + 1))
    many = len(faces) > 1 or numbers > [1]
    widths = [face.box[2] - face.box[0] for face in faces]
    longer = max(photo.shape[:2])
    words = WORDS * LEAST_WORDS / min(widths, default=longer)
    scale = max(1.0, least / longer, min(words, MOST_ENLARGED / longer)) if least else 1.0
    photo = Image.fromarray(photo).convert("RGB")
    if scale > 1:
        photo = photo.resize([round(side * scale) for side in photo.size], Image.Resampling.BICUBIC)
    draw = ImageDraw.Draw(photo)
    side = min(photo.size)
    line = max(2, side // 300)
    # what words keep off, and how much they do; chins may reach out of boxes
    mouths = scale * np.array([face.mouth for face in faces]).reshape(-1, 4)
    heads = scale * np.array([face.box for face in faces]).reshape(-1, 4)
    heads = np.hstack([np.minimum(heads, mouths)[:, :2], np.maximum(heads, mouths)[:, 2:]])
    taken = [(*head, 1) for head in heads] + [(*mouth, 20) for mouth in mouths]
    for face, head, row, number, width in zip(faces, heads, probabilities, numbers, widths):
        label = int(row.argmax())
        colour = PALETTE[label % len(PALETTE)]
        box = [min(max(v * scale, 0), length - 1) for v, length in zip(face.mouth, 2 * photo.size)]
        draw.rectangle((box[0] - 1, box[1] - 1, box[2] + 1, box[3] + 1), outline="black", width=line + 2)
        draw.rectangle(box, outline=colour, width=line)
        large = int(min(max(side // 20, 15), max(width * scale / WORDS, LEAST_WORDS)))
        large = large if large < 20 else large // 4 * 4  # or a video's words would never rest
        name, percent = f"{number}: " * many + classes[label], f" {row.max():.0%}"
        tries = [(large, name, percent)]  # the last one stays where nothing is free
        tries += [(LEAST_WORDS, name, percent), (LEAST_WORDS, str(number), "")] if many else []
        for size, name, percent in tries:
            font, name = load_font(name, size)
            width, height = round(font.getlength(name + percent)) + 8, size + 6
            (x, y), covered = free_place(width, height, head, taken, photo.size)
            if not covered:
                break
        taken.append((x, y, x + width, y + height, 20))
        draw.rectangle((x, y, x + width - 1, y + height - 1), colour, "black")
        draw.text((x + 4, y + 3 + size * 0.4), name + percent, "black", font, anchor="lm")
    return photo


def free_place(width, height, face, taken, size):
    """The place (x, y) for words near a face (a box) that covers least, and how much it covers.

    `taken` has (left, top, right, bottom, weight) of what is better not covered, `size` is the picture's.
    """
    left, top, right, bottom = face
    xs = (left + right - width) / 2, left, right - width
    places = [(x, y) for y in (bottom + 2, top - height - 2) for x in xs]
    places += [(x, y) for x in (right + 2, left - width - 2)
               for y in (bottom - height, (top + bottom - height) / 2, top)]
    places += [(x, y) for y in (bottom + 4 + height, top - 2 * height - 4) for x in xs]
    places += [(x, y) for y in (top, bottom - height) for x in xs[1:]]  # on the face itself
    places = np.clip(np.round(places), 0, np.maximum(np.subtract(size, (width, height)), 0)).astype(int)
    taken = np.array(taken)
    overlap = (np.minimum(places[:, None] + (width, height), taken[:, 2:4])
               - np.maximum(places[:, None], taken[:, :2])).clip(0).prod(2) @ taken[:, 4]
    return tuple(places[overlap.argmin()].tolist()), overlap.min()


def draw_bars(picture, row, classes, rate):
    """Draw a face's probabilities (None: no face) and the frames a second into the corner of a picture."""
    draw = ImageDraw.Draw(picture, "RGBA")
    size = max(14, min(picture.size) // 32)
    step, width = size + 8, max(picture.width // 4, 10 * size)
    digits, _ = load_font("0", size)
    draw.rectangle((0, 0, width + 12, (len(classes) + 1) * step + 8), (0, 0, 0, 150))
    shares = [0] * len(classes) if row is None else row
    for y, name, p, colour in zip(itertools.count(6, step), classes, shares, itertools.cycle(PALETTE)):
        draw.rectangle((6, y, 6 + p * width, y + step - 4), colour + "90")
        font, name = load_font(name, size)
        draw.text((10, y + 1), name, "white", font)
        draw.text((width, y + 1), f"{p:.0%}", "white", digits, anchor="ra")
    text = f"{rate:.0f} frames/s" + ("  no face" if row is None else "")
    draw.text((10, 7 + len(classes) * step), text, "white", digits)


def save_jpeg(picture, path):
    jpeg = io.BytesIO()
    picture.save(jpeg, "JPEG", quality=92)
    write_file(path, jpeg.getvalue())


class Copies:
    """The folder of --save: annotated copies of `files` (as of `list_inputs`), and a page of them."""

    def __init__(self, folder, files):
        sweep(folder, *(path for path in folder.rglob("*") if path.is_dir()))
        self.folder, self.page = folder, own_page(folder / "index.html")
        places = [file.resolve() for file, _ in files if isinstance(file, Path)]
        self.originals = {place.parent for place in places}  # where nothing is written over
        self.used = {str(place).casefold() for place in places}  # a.JPG may be the same as a.jpg

    def name(self, relative, suffix):
        """Where below the folder a copy goes: over none of the inputs, and over no other copy."""
        for n in itertools.count(1):
            name = relative.with_name(file_name("", relative.stem, ("" if n == 1 else f"_{n}") + suffix))
            path = (self.folder / name).resolve()
            place = str(path).casefold()
            if place not in self.used and not (path.exists() and path.parent in self.originals):
                self.used.add(place)
                return name


class Card(NamedTuple):
    """What became of one photo or video, for the page."""

    source: Path
    copy: Path | None  # the picture or video that is shown, absolute or relative to the page
    rows: list  # probabilities of the classes, a row a face; of a video the shares of its frames
    error: str  # empty, or why there is no face
    poster: Path | None = None  # of a video: a frame with a face, relative to the page
    strip: list = ()  # and from when until when (seconds) the largest face has which class; None: no face
    seconds: float = 0.0  # and how long it is
    boxes: list = ()  # what to mark, a box (left, top, right, bottom) a face, in pixels of what is shown
    folder: str | None = None  # in which class folder, or other, it lies


def own_page(path):
    """`path`, which a page may replace. Raises ValueError where there is one of another origin."""
    if path.is_file() and b"<title>Expressions</title>" not in path.read_bytes():
        raise ValueError(f"{path}: is not of this program; move it, or name another folder")
    return path


def write_page(path, cards, classes, about, start=None):
    """Write a page to look through cards: data/page.html, filled with what its script reads.

    `about` is its heading, `start` what it shows first, as "only": "wrong", and "order": "doubt" or "sure".
    """

    def link(file):
        file = Path(os.path.abspath(path.parent / file))
        with contextlib.suppress(ValueError):  # on another of Windows' drives
            return quote(os.fsencode(Path(os.path.relpath(file, os.path.abspath(path.parent))).as_posix()))
        return file.as_uri()

    def entry(card):
        row = card._asdict() | {"source": str(card.source), "rows": np.round(card.rows, 4).tolist(),
                                "boxes": np.round(card.boxes).astype(int).tolist()}
        row |= {key: link(row[key]) for key in ("copy", "poster") if row[key]}
        return {key: value for key, value in row.items() if value}

    data = {"classes": classes, "colours": PALETTE, "about": about, "start": start,
            "windows": os.name == "nt", "cards": list(map(entry, cards))}
    # no name ends the script that holds it: but for < all is ASCII and quoted
    text = json.dumps(data, separators=(",", ":"), default=float).replace("<", "\\u003c")
    write_file(path, TEMPLATE.read_text("utf-8").replace("DATA", text, 1).encode())


# --- the command line


def file_name(start, stem, end):
    """A file's name of three parts, the middle one cut where a disk would refuse the whole."""
    while len(os.fsencode(start + stem + end)) > 255:
        stem = stem[:-1]
    return start + stem + end


def is_address(source):
    """Whether this is an address, such as rtsp://camera/1, and neither a path nor a camera's number."""
    return "://" in str(source)


def find_inputs(text):
    """What an argument names: a list of paths, one as a rule, or of an address (str)."""
    if is_address(text):
        return [text]
    found = [] if os.path.exists(text) else sorted(glob.glob(text, recursive=True))  # Windows leaves it to us
    return [Path(name) for name in found or [text]]


def kind_of(path, named=True):
    """What a file is by its content: "photo", "animation", "video" or "other file".

    The usual endings of photos are believed in folders (not `named`), and those of videos if all else fails.
    """
    ending = path.suffix.lower()
    photo = ending in HEIC or ending not in VIDEOS and Image.registered_extensions().get(ending) in Image.OPEN
    if photo and not named and ending not in (".gif", ".webp") or path.exists() and not path.is_file():
        return "photo"
    with contextlib.suppress(OSError), open(path, "rb") as file:
        data = file.read(4096)
        if data.startswith((b"\xff\xd8\xff", b"\x89PNG")) or is_heic(data):
            return "photo"
        if b"\0" in data:  # else it is text, which might name other files to FFmpeg
            with contextlib.suppress(Exception), Image.open(path) as image:  # anything may be raised
                frames = (frame for _, frame, _ in animation(path))
                first = next(frames, None)
                if any((frame != first).any() for frame in frames):
                    return "animation"
                if image.format != "MPEG":
                    return "photo"
            Video(path)
            return "video"
    return "video" if ending in VIDEOS else "photo" if named or photo else "other file"


def list_inputs(inputs, videos=False, skip=None):
    """The photos and, if asked, the videos that are named or in folders that are named, at any depth.

    Inputs are paths of files and folders, and videos' addresses (str) and cameras' numbers (int). Returns two
    lists of pairs: each file, and its path below its input. Animations are videos if asked for these, else
    photos. How many other files there are is said on standard error. The folder `skip` is left out where it
    lies within one that is searched. Raises a FileNotFoundError where a folder has none.
    """
    photos, films = [], []
    for path in inputs:
        if not isinstance(path, Path):  # named without what may be secret
            name = re.sub(r"[^\w-]+", "_", re.sub(r".*://(.*@)?|\?.*", "", str(path)))
            films.append((path, Path(name)))
            continue
        named, kinds = not path.is_dir(), {"photo": [], "video": [], "other file": []}
        left_out = skip.resolve() if skip and path.resolve() in skip.resolve().parents else None
        files = [path] if named else sorted(path.rglob("*"))
        for file in tqdm(files, unit="file", leave=False, disable=None, delay=1):
            below = Path(file.name) if named else file.relative_to(path)
            if not named and (any(map(is_hidden, below.parts)) or not file.is_file()
                              or left_out and left_out in file.resolve().parents):
                continue
            kind = kind_of(file, named)
            kinds[kind if kind in kinds else "video" if videos else "photo"].append((file, below))
        found = kinds.pop("photo"), kinds.pop("video") if videos else []
        photos += found[0]
        films += found[1]
        others = " and ".join(f"{len(files)} {kind}{'s' * (len(files) > 1)}"
                              for kind, files in kinds.items() if files)
        if not named and not any(found):
            text = f"{path}: no photos {'or videos ' * videos}in this folder"
            raise FileNotFoundError(text + f", but {others}" * bool(others))
        if others:
            say(f"{path}: left out {others}", aside=True)
    return photos, films


def print_inputs(args, model):
    """Predict all inputs, print what is found, and save copies and a page of them if asked."""
    photos, videos = list_inputs(args.inputs, videos=not args.crops, skip=args.save)
    cards, copies = [], None
    with locked(args.save / ".lock") if args.save else contextlib.nullcontext():
        if args.save:
            copies = Copies(args.save, photos + videos)
        try:
            cards.extend(print_photos(photos, model, args, copies))
            cards.extend(print_videos(videos, model, args, copies))
        finally:  # a page of what was done before Ctrl-C
            if copies:
                write_page(copies.page, cards, model.classes, ", ".join(map(str, args.inputs)))
    if not args.json:
        print_summary(cards[:len(photos)], cards[len(photos):], copies)
    failed = [card for card in cards if card.error not in ("", NO_FACE)]
    # their lines say why; in a folder, files that cannot be read are to be expected
    if any(card.source in args.inputs or not card.error.startswith("unreadable") for card in failed):
        sys.exit(1)


def print_summary(photos, videos, copies):
    """One line for all the cards of photos and of videos."""
    done = []
    if photos:
        faces, found = sum(len(card.rows) for card in photos), sum(not card.error for card in photos)
        done.append(f"{faces} face{'s' * (faces != 1)} in {found} of "
                    f"{len(photos)} photo{'s' * (len(photos) != 1)}")
    if len(videos) > 1:
        done.append(f"{sum(not card.error for card in videos)} of {len(videos)} videos have faces")
    if copies:
        done.append(f"annotated copies in {copies.folder}, look at {copies.page}")
    if done:
        say("; ".join(done))


def parse_args(argv):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], epilog=EXAMPLES,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("inputs", nargs="*", metavar="INPUT", help="photos, videos, folders of them, addresses of videos")
    add("--model", type=Path, metavar="FILE",
        help="weights (default: models/model.pt if it is there, else those that come with the project)")

    add = parser.add_argument_group("instead of inputs").add_argument
    add("--camera", metavar="SOURCE",
        help="show a camera (0 is the first), a video file or an address live in a window, given a screen; "
             "q, Esc or Ctrl-C ends")
    add("--evaluate", type=Path, metavar="DIR", help="score the model on photos in a folder of class folders")

    add = parser.add_argument_group("what the inputs are and what is made of them").add_argument
    add("--crops", action="store_true", help="the images are mouth crops, not photos; videos are left out")
    add("--json", action="store_true",
        help="print one JSON object a face and line (of videos: for every frame) instead of words; "
             "with --evaluate one for all")
    add("--save", type=Path, metavar="DIR",
        help="write annotated copies of photos and videos and a page of them, index.html, there; "
             "with --evaluate a page of its photos, evaluation.html")

    add = parser.add_argument_group("sorting").add_argument
    add("--sort", type=Path, metavar="DIR",
        help="copy photos by their largest face to DIR/<class>/, DIR/unsure/ or DIR/no_face/; page: DIR.html")
    add("--sure", type=float, default=SURE, metavar="P",
        help="least probability of a class, below which a photo is unsure (default: %(default)s)")
    add("--link", action="store_true", help="hard links instead of copies: no disk space, one file system")

    args = parser.parse_args(argv)
    if not (args.inputs or args.evaluate or args.camera):
        parser.error("name photos, videos or a folder, or --camera 0, or --evaluate DIR")
    if args.camera and (args.inputs or args.evaluate or args.crops or args.sort):
        parser.error("--camera goes with --model, --json and --save only")
    if not 0 <= args.sure <= 1:
        parser.error("--sure must be between 0 and 1")
    if not args.sort and (args.link or args.sure != SURE):
        parser.error("--sure and --link go with --sort DIR")
    if args.sort and (args.save or args.evaluate or not args.inputs):
        parser.error("--sort goes with photos or folders of them and with no other task, nor with --save")
    args.inputs = [one for text in args.inputs for one in find_inputs(text)]
    if args.camera:
        args.inputs = [int(args.camera)] if args.camera.isdecimal() else find_inputs(args.camera)
    if (args.sort or args.crops) and (far := next(filter(is_address, args.inputs), None)):
        parser.error(f"{far}: photos are not fetched from addresses; download them first")
    return args


def main(argv=None):
    args = parse_args(argv)
    with command_line("what was sorted or saved stays"):
        if hasattr(sys.stdout, "reconfigure"):
            sys.stdout.reconfigure(line_buffering=True)  # for programs that read lines as they come
        torch.set_num_threads(1)  # faces are found on all cores meanwhile
        cv2.setNumThreads(1)
        gc.freeze()  # what is loaded stays; to look for garbage in it at the end would take half a second
        model = load_model(args.model or default_model())  # without a path it would warn
        print_model(args, model)
        if args.evaluate:
            print_evaluation(args, model)
        if args.inputs:
            (sort_photos if args.sort else print_inputs)(args, model)


def print_model(args, model):
    """Say which weights were taken if none were named, and what is missing beside them."""
    if not args.model:
        what = ", which come with the project" if model.path == PRETRAINED else ""
        say(f"weights: {model.path}{what}", args.json)
    if args.save and (hint := font_hint(model.classes)):
        say(hint, aside=True)
    if not model.about:
        missing, names = model.path.with_suffix(".json"), ", ".join(model.classes)
        say(f"{missing} is missing: the classes are called {names}", aside=True)


if __name__ == "__main__":
    main()
