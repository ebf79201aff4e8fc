"""Photos to mouth crops: find the largest face, its 68 landmarks, and cut out the mouth.

    python preprocess_lips.py                 data/raw/<class>/* to data/lips/<class>/*.jpg
    python preprocess_lips.py photos crops    the same for other folders

Every file in a class folder, at any depth, is tried as an image, whatever its name says. Crops are
128 x 128 JPEGs named after their photo's content; manifest.csv says for every photo what became of it,
preview.jpg shows crops of each class. A second run does only what is new. Faces are found from 40 pixels
on, in photos of over 4,000 pixels from 1 % of their longer side on; a photo may lie on its side.

Several machines with one disk can share the work: with RANK and WORLD_SIZE set, as torchrun and Slurm set
them, a process does its part and ends. The plain command, run once more, gathers all parts.

In other code:

    from preprocess_lips import LipCropper, read_photo
    for face in LipCropper()(read_photo("photo.jpg")):
        print(face.mouth, face.crop.shape)
"""

import argparse
import contextlib
import copy
import csv
import errno
import faulthandler
import functools
import hashlib
import importlib.util
import inspect
import io
import itertools
import json
import logging
import os
import re
import secrets
import signal
import stat
import sys
import threading
import time
import unicodedata
import warnings
import zlib
from collections import Counter, defaultdict, deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from multiprocessing import connection, get_context
from pathlib import Path
from typing import NamedTuple

import numpy as np
from filelock import FileLock, Timeout
from PIL import ExifTags, Image, ImageCms, ImageDraw, ImageFont, UnidentifiedImageError
from PIL.Image import Transpose
from tqdm import tqdm


class Later:
    """A module that is loaded where it is first used: most of these helpers need neither OpenCV nor dlib."""

    def __init__(self, name):
        self._name = name

    def __getattr__(self, attribute):
        try:
            globals()[self._name] = module = importlib.import_module(self._name)
        except ImportError as error:  # OpenCV needs libraries of a desktop, which slim containers lack
            raise ImportError(
                f"{self._name} cannot be loaded ({error}); 'pip install -r requirements.txt' brings it, on "
                "Debian and Ubuntu 'apt-get install libgl1 libglib2.0-0' what OpenCV needs") from None
        return getattr(module, attribute)


cv2, dlib = Later("cv2"), Later("dlib")

# What decides a crop, beside SEARCHES: after a change the next run makes all crops anew, see `settings`
REGION = slice(48, 68)  # the landmarks around which is cut: the mouth; slice(36, 48) are the eyes
CROP_MARGIN = 1.5  # side of the crop over the side of the landmarks' bounding square
CROP_SIDE = 128  # pixels
MIN_SIDE = 32  # photos with a shorter side hold no usable mouth
MIN_MOUTH = 12  # pixels, the least side of a mouth box that is worth enlarging to a crop
MIN_FACE = 40  # pixels; that size, or 1 % of a larger photo's longer side, is the least that is looked for
MAX_SIDE_RATIO = 10
DECODE_SIDE = 512  # pixels that the shorter side keeps where a JPEG is decoded at a fraction of its size
SEARCH_SIDE = 640  # pixels of the longer side in which all but small faces are searched
SMALL_SIDE = 1500  # pixels that the shorter side keeps where small faces are searched
FACE_SIDE = 120  # landmarks are looked for at this size of the face, whatever the photo's

# What a file from a stranger may cost. Photos that want more are unreadable.
MAX_PIXELS = 120_000_000  # the largest cameras and telephones make 108 million
MAX_BYTES = 4 * MAX_PIXELS  # of the file
MAX_SECONDS = 60  # for a photo in a worker process
MAX_MEMORY = 2 << 30  # bytes that a worker process takes beside what it starts with
MAX_PROFILE = 1 << 20  # bytes of a profile of colours; larger ones are for print
MAX_LOST = 0.05  # of the pixels of a file without its end
MAX_FRAMES = 100  # of an animation that begins with frames of one colour

NEEDED = ("source", "class", "status", "crop", "sha1", "bytes", "mtime_ns")
COLUMNS = (*NEEDED, "ctime_ns", "face", "mouth", "detector", "note", "settings")
# What becomes of a photo: `process_photo` says it, of copies `settle`. data/README.md explains each.
STATUSES = ("ok", "duplicate", "conflict", "no_face", "implausible", "too_small", "side_ratio", "unreadable")
MANIFEST = "manifest.csv"
JOURNAL = "manifest.csv.part"  # and the process's number: what is done, until the manifest says so


# --- reading a photo

SAME_COLOUR = 3  # levels by which a profile of colours may differ from sRGB and still count as that
ONE_COLOUR = 16  # levels: a frame with no more between its darkest and its brightest pixel shows nothing
HEIC = (".heic", ".heif", ".hif")  # what iPhones make
HEIC_BRANDS = (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1")  # as such files begin
try:  # Pillow reads them with its help; nothing else needs it
    import pillow_heif

    pillow_heif.register_heif_opener()
except ImportError:
    pillow_heif = None

# What Pillow has to say about odd metadata, or photos over 89 million pixels, would break the progress bar
warnings.filterwarnings("ignore", module="PIL")
logging.getLogger("PIL").addHandler(logging.NullHandler())

TURNS = {  # by EXIF orientation, what makes a photo upright
    2: Transpose.FLIP_LEFT_RIGHT, 3: Transpose.ROTATE_180, 4: Transpose.FLIP_TOP_BOTTOM,
    5: Transpose.TRANSPOSE, 6: Transpose.ROTATE_270, 7: Transpose.TRANSVERSE, 8: Transpose.ROTATE_90,
}


def read_photo(source):
    """Decode a file (path-like), or its content (bytes), to RGB, upright: uint8 array of shape (H, W, 3).

    EXIF orientation is applied; of an animation, the first frame that is not of one colour is taken; grey,
    palette, CMYK, 16-bit and floating-point images are converted, and what is transparent becomes white.
    Raises OSError where it cannot be read, is no image that Pillow knows, is damaged or cut short, or holds
    over `MAX_PIXELS`.
    """
    return _decode(source)[0]


def read_file(path):
    """The bytes of a regular file; pipes and devices, which may never end, are not opened.

    Raises OSError where it cannot be read, is no regular file, or holds over `MAX_BYTES`.
    """
    about = os.stat(path)
    if not stat.S_ISREG(about.st_mode):
        raise OSError("not a regular file")
    if about.st_size > MAX_BYTES:
        raise OSError(f"larger than {MAX_BYTES // 1_000_000} MB")
    with open(path, "rb") as file:
        return file.read(MAX_BYTES)


def _decode(source, least=None):
    """As `read_photo`, and the photo's true (width, height), and whether the file lacks its end.

    With `least`, a JPEG is decoded at the half, the quarter or the eighth of its size, as long as both
    sides keep that many pixels: a fraction of the time.
    """
    data = source if isinstance(source, bytes) else read_file(source)
    try:
        return *_pixels(data, least), False
    except OSError as error:
        if "truncated" not in str(error) or not data.startswith(b"\xff\xd8"):  # a JPEG
            raise
        # What the missing bytes decide becomes grey, or differs with other bytes in their place: of 255s a
        # marker would begin, as with the last two bytes, that of the end
        other = bytes(37 * i % 255 for i in range(255)) * (len(data) // 255 + 1)
        (photo, size), (other, _) = (_pixels(data + end + b"\xff\xd9", least) for end in (b"", other))
        lost = ((photo != other).any(2) | (photo == 128).all(2)).mean()
        scan = data[data.rfind(b"\xff\xda"):].ljust(520, b"\0")  # of the last one, what its header says
        if lost > MAX_LOST or scan[6 + 2 * scan[4]] < 63 or scan[7 + 2 * scan[4]] & 15:
            raise  # the latter: of a progressive JPEG, whole scans may be missing
        return photo, size, True


def _pixels(data, least):
    """As `_decode`, of a file that is whole."""
    try:
        plain, profile = without_text(data)
        with Image.open(io.BytesIO(plain)) as image:
            size = image.size
            if not 0 < size[0] * size[1] <= MAX_PIXELS:
                raise OSError(f"{size[0]} x {size[1]} pixels")
            if image.format in ("EPS", "WMF"):  # programs, which Pillow has Ghostscript or Windows run
                raise OSError(f"{image.format} is not read")
            if least:
                image.draft("RGB", (least, least))
            image.load()
            turn = to_srgb(profile or image.info.get("icc_profile"), image.mode)
            if turn:
                turn.apply_in_place(image)
            image = upright(image)
            if (image.width < image.height) != (size[0] < size[1]):
                size = size[::-1]
            pixels = _rgb(image)
            with contextlib.suppress(EOFError):  # the end of an animation
                for frame in range(1, MAX_FRAMES) if getattr(image, "is_animated", False) else ():
                    if np.ptp(pixels, (0, 1)).max() > ONE_COLOUR:
                        break
                    image.seek(frame)
                    pixels = _rgb(image)
            return pixels, size
    except UnidentifiedImageError:  # which names an object in memory
        if not pillow_heif and is_heic(data):
            raise OSError("HEIC; 'pip install pillow-heif', and it can be read") from None
        raise OSError("no image, or of a kind that Pillow does not know") from None
    except OSError:
        raise
    except Exception as error:  # decoders raise almost anything on hostile files
        raise OSError(f"not a readable image ({error})") from None


def is_heic(data):
    """Whether a file that begins with these bytes is HEIC, whatever its name says."""
    return data[4:8] == b"ftyp" and data[8:12] in HEIC_BRANDS


def without_text(data):
    """A PNG without its texts and colour profile, and the profile; any other file as it is, and b"".

    Image generators write megabytes of text, and profiles for print are as large: Pillow refuses either.
    """
    if not data.startswith(b"\x89PNG\r\n\x1a\n"):
        return data, b""
    chunks, profile, at = [data[:8]], b"", 8
    while at < len(data):
        kind, end = data[at + 4:at + 8], at + 12 + int.from_bytes(data[at:at + 4])
        if kind == b"iCCP":  # a name, two zeros, and the profile, compressed
            with contextlib.suppress(zlib.error):
                packed = data[at + 8:end - 4].partition(b"\0\0")[2]
                profile = zlib.decompressobj().decompress(packed, MAX_PROFILE)
        elif kind not in (b"tEXt", b"zTXt", b"iTXt"):
            chunks.append(memoryview(data)[at:end])
        at = end
    return b"".join(chunks), profile


@functools.lru_cache(32)
def to_srgb(profile, mode):
    """What turns colours of an ICC profile (bytes) to sRGB; None if they are that, or nobody can tell."""
    if not profile or mode not in ("RGB", "RGBA") or len(profile) > MAX_PROFILE:
        return None
    try:  # telephones and cameras have Display P3 or Adobe RGB; read as sRGB, both look pale
        theirs = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        turn = ImageCms.buildTransform(theirs, ImageCms.createProfile("sRGB"), mode, mode)
        colours = np.moveaxis(63 * np.indices((5, 5, 5), np.uint8), 0, -1).reshape(25, 5, 3)
        turned = turn.apply(Image.fromarray(colours).convert(mode)).convert("RGB")
        return turn if np.abs(np.subtract(turned, colours, dtype=int)).max() > SAME_COLOUR else None
    except Exception:  # damaged, or of another kind of colours
        return None


def upright(image):
    """A PIL image turned as its EXIF orientation says; other metadata, and broken ones, cost nothing."""
    try:
        turn = TURNS[int(image.getexif()[ExifTags.Base.Orientation])]
    except Exception:  # there is none, or it may be anything at all
        return image
    return image.transpose(turn)


def _rgb(image):
    """The pixels of a PIL image in any mode: uint8 array of shape (H, W, 3)."""
    if image.mode.startswith("I") or image.mode == "F":  # 16 and 32 bits: Pillow would clip, not scale
        grey = np.nan_to_num(np.array(image, dtype=np.float32), copy=False)
        if image.mode == "F":
            np.clip(grey, -1e30, 1e30, grey)
            grey -= grey.min()
            grey *= 255 / max(grey.max(), 1e-9)
        else:  # 12 bits of a medical or industrial camera, or more, by what is used of them
            grey /= (2 ** max(8, int(grey.max()).bit_length()) - 1) / 255
        return np.repeat(np.clip(grey, 0, 255, grey).astype(np.uint8)[..., None], 3, 2)
    if image.has_transparency_data:
        image = image if image.mode == "RGBA" else image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        return np.ascontiguousarray(np.asarray(image)[..., :3])
    if image.mode == "L":  # far faster than convert
        grey = np.asarray(image)
        return cv2.cvtColor(grey, cv2.COLOR_GRAY2RGB) if "cv2" in sys.modules else np.stack([grey] * 3, 2)
    return np.array(image if image.mode == "RGB" else image.convert("RGB"))


def unusable(size):
    """Why a photo of that (width, height) cannot hold a mouth, as a status; empty if it can."""
    if max(size) > MAX_SIDE_RATIO * min(size):
        return "side_ratio"
    return "too_small" if min(size) < MIN_SIDE else ""


# --- finding faces


def landmark_file():
    """Path of dlib's shape_predictor_68_face_landmarks.dat inside the package face_recognition_models."""
    # find_spec does not run the package, which would need pkg_resources
    spec = importlib.util.find_spec("face_recognition_models")
    folders = spec.submodule_search_locations if spec else []
    for folder in folders:
        path = Path(folder) / "models" / "shape_predictor_68_face_landmarks.dat"
        if path.is_file():
            return path
    raise FileNotFoundError("the landmark file is missing; 'pip install face_recognition_models' brings it")


class Face(NamedTuple):
    """One face of a photo. Boxes are (left, top, right, bottom) in pixels of the photo."""

    box: tuple  # the face, four ints
    landmarks: np.ndarray  # float, 68 x 2, (x, y)
    mouth: tuple  # the square that was cut out, four ints; may reach beyond the photo
    crop: np.ndarray  # uint8, 128 x 128 x 3, RGB; upright even if the photo lies on its side
    detector: str  # what found it, and by how many degrees, counter-clockwise, the photo was turned for it


class Found(NamedTuple):
    """What `LipCropper.find` sees in a file."""

    faces: list  # of Face, in pixels of the whole photo
    refused: int  # boxes that a cascade found and a check refused
    size: tuple  # width and height of the photo
    cut: bool  # whether the file lacks its end, and the photo at most `MAX_LOST` of its pixels


# Detectors keep state while they search, so each thread has its own.


@functools.cache
def cascade_detector(name, thread):
    """OpenCV's cascade of that name."""
    # read by Python: given a path that is not ASCII, OpenCV on Windows would load nothing and say nothing
    text = Path(cv2.data.haarcascades, f"haarcascade_frontalface_{name}.xml").read_text("utf-8")
    storage = cv2.FileStorage(text, cv2.FILE_STORAGE_READ | cv2.FILE_STORAGE_MEMORY)
    cascade = cv2.CascadeClassifier()
    cascade.read(storage.getFirstTopLevelNode())
    return cascade


@functools.cache
def hog_detector(thread=None):
    """dlib's HOG detector; without a thread the one to copy: another takes half a second, a copy 3 ms."""
    return copy.deepcopy(hog_detector()) if thread else dlib.get_frontal_face_detector()


def by_cascade(image, search):
    """Boxes (left, top, right, bottom) in a grey image, and for each how many windows agree on it."""
    low, high = (round(share * search.side) for share in search.faces)
    windows = cascade_detector(search.name, threading.get_ident()).detectMultiScale(
        image, search.step, 0, minSize=(low, low), maxSize=(high, high))
    # every window twice, because a group of one is never kept
    boxes, votes = cv2.groupRectangles(np.repeat(windows, 2, 0).tolist(), 2 * search.votes - 1)
    return [(x, y, x + w, y + h) for x, y, w, h in boxes], np.ravel(votes) / 2


def by_hog(image, search):
    """As `by_cascade`, but dlib's scores, which are above 0."""
    boxes, scores, _ = hog_detector(threading.get_ident()).run(image)
    return [as_cascade(box) for box in boxes], scores


def as_cascade(box):
    """A box of dlib's HOG detector, which lies lower and is smaller, as a cascade would draw it."""
    side = box.width() / 0.867  # medians over photos
    left, top = box.center().x - side / 2, box.center().y - 0.575 * side
    return left, top, left + side, top + side


class Search(NamedTuple):
    """One step of the chain by which faces are found. Lengths are shares of the image's longer side."""

    name: str  # in the manifest; of a cascade, its file's
    # called with the grey image, border and all, and this search: boxes (left, top, right, bottom) in pixels
    # of it, as square and large as a frontal cascade draws them, and votes, the surer the more
    detect: Callable
    side: int  # pixels to which the longer side is scaled; this and the smallest face set the time it takes
    border: float  # replicated border, without which tight faces are not found
    sure: float  # with as many votes, landmarks that look like a face's are believed
    faces: tuple = ()  # smallest and largest face
    step: float = 0  # between two sizes of face
    votes: int = 0  # least number of windows that agree
    fallback: bool = False  # only where no face was found before
    score: float | None = None  # what dlib's detector, which is sure from 0 on, must give in a second look
    turns: tuple = (0,)  # degrees by which the photo is turned, counter-clockwise


NEVER = float("inf")
LEAST_SHARE = 0.4  # no search is begun whose largest faces are smaller than this share of the largest found
# Large faces first: most photos are done there, in 3 ms. tests/bench/README.md says what each step brings.
SEARCHES = (
    # name, detect, side, border, sure, faces, step, votes
    Search("alt2", by_cascade, 48, 0.22, 5, (0.5, 1.5), 1.12, 2),
    Search("default", by_cascade, 96, 0.4, NEVER, (0.35, 1.6), 1.05, 2, fallback=True, score=-1),
    Search("alt2", by_cascade, 160, 0.15, NEVER, (0.15, 0.55), 1.15, 3, score=-0.3),
    Search("alt2", by_cascade, 250, 0, NEVER, (0.08, 0.18), 1.1, 1, score=-0.3),
    Search("alt2", by_cascade, 72, 0.4, NEVER, (0.4, 1.6), 1.1, 3, fallback=True, score=-0.3,
           turns=(-25, 25)),
    Search("hog", by_hog, 240, 0.3, NEVER, fallback=True, score=-0.3),
    Search("alt2", by_cascade, 500, 0, NEVER, (0.04, 0.08), 1.1, 1, score=-0.3),
    Search("alt2", by_cascade, 1000, 0, NEVER, (0.02, 0.04), 1.18, 1, score=-0.3),
    Search("hog", by_hog, 240, 0.3, NEVER, fallback=True, score=-0.3, turns=(90, 270, 180)),
    Search("hog", by_hog, 480, 0.1, NEVER, fallback=True, score=-0.3, turns=(90, 270, 180)),
    Search("alt2", by_cascade, 2000, 0, NEVER, (0.01, 0.02), 1.18, 1, score=-0.3),
)

# Landmarks from a single box may lie on the nose, where a chin is cut off or light comes from one side. In
# doubt they are looked for from two more, and two fits must agree. How the edges of these boxes (left, top,
# right, bottom) lie beside those of a cascade's, as shares of its side:
FITS = ((-0.02, 0.08, 0.02, 0.12), (-0.05, 0.025, 0.05, 0.125))
SAME_FIT = 0.12  # root mean square between two fits' landmarks, over the distance of the eyes
NEAR_NOSE = 0.35  # lips nearer to the nose's base, on average, over the distance of the eyes, may be it


class LipCropper:
    """Finds faces and cuts out their mouths.

    Loading takes about half a second (a landmark file of 100 MB), so make one and call it often; threads may
    share it. Raises FileNotFoundError where there is no landmark file, ValueError where it is damaged.
    """

    def __init__(self):
        cv2.setNumThreads(1)  # the caller's workers use the cores; OpenCV's own threads fight them
        path = landmark_file()
        try:
            self._predictor = dlib.shape_predictor(str(path))
        except RuntimeError as error:
            raise ValueError(f"{path}: not a file of landmarks ({error}); "
                             "'pip install --force-reinstall face_recognition_models' brings one") from None

    def __call__(self, photo, largest=False):
        """Find the faces of a photo: a list of `Face`, largest first, or with `largest` at most that one.

        The photo is a uint8 array of shape (H, W, 3), RGB, or (H, W), or a PIL image, taken as it lies; or
        a file (path-like) or its content (bytes), read as by `find`. Beside a large face, those of the far
        background are not looked for. Raises OSError as `read_photo`, and ValueError for anything else.
        """
        if isinstance(photo, (str, os.PathLike, bytes)):
            return self.find(photo, largest).faces
        if isinstance(photo, Image.Image):
            photo = _rgb(photo)
        if getattr(photo, "ndim", 0) == 2:
            photo = np.repeat(photo[..., None], 3, 2)
        kind, shape = getattr(photo, "dtype", type(photo).__name__), tuple(getattr(photo, "shape", ()))
        if kind != np.uint8 or len(shape) != 3 or shape[2] != 3 or 0 in shape:
            raise ValueError("a photo is a file, a PIL image or uint8 of shape (H, W, 3), RGB, "
                             f"not {kind} {shape or ''}")
        return self.look(photo, largest)[0]

    def look(self, photo, largest=False, size=None, finer=None, whole=None):
        """As a call, but returns ``(faces, refused)``: also how many boxes of a cascade a check refused.

        `photo` may be a small copy of a photo of `size`, (width, height), in whose pixels faces are given.
        ``finer()`` returns a larger one, in which small faces are searched, and ``whole()`` the photo itself,
        from which they are cut out.
        """
        size, whole = size or photo.shape[1::-1], whole or (lambda: photo)
        share = photo.shape[1] / size[0]
        coarse = _grey(photo, SEARCH_SIDE)
        fine = functools.cache(lambda: _grey((finer or whole)()))
        faces, refused = [], 0
        for search in SEARCHES:
            if faces and search.fallback:
                continue
            biggest = max((face.box[2] - face.box[0] for face in faces), default=0)
            if search.faces and search.faces[1] * max(size) < max(MIN_FACE, LEAST_SHARE * biggest):
                continue
            grey = coarse if search.side <= SEARCH_SIDE else fine()
            scale = max(grey.shape) / max(size)
            for turn in search.turns:
                image, back = _turned(grey, turn)
                for where, sure in self._search(image, search):
                    box = _box_in_photo(where, back, scale)
                    if any(_overlap(box, other.box) >= 0.3 for other in faces):
                        continue
                    landmarks = self._landmarks(image, where, sure, None if sure else search.score)
                    if landmarks is not None:
                        landmarks = (landmarks @ back[:, :2].T + back[:, 2]) / scale
                        mouth = mouth_box(landmarks)
                    if landmarks is None or not is_inside(size, mouth):
                        refused += 1
                        continue
                    enough = (mouth[2] - mouth[0]) * share >= CROP_SIDE
                    pixels = photo if enough else whole()
                    crop = cut(pixels, mouth_box(landmarks * pixels.shape[1] / size[0]), CROP_SIDE)
                    name = f"{search.name}{turn:+}" if turn else search.name
                    faces.append(Face(box, landmarks, mouth, _upright(crop, turn), name))
                    if largest:
                        return faces, refused
        return sorted(faces, key=lambda face: face.box[0] - face.box[2]), refused

    def find(self, source, largest=False):
        """As a call, of a file or its content, but returns `Found`: large JPEGs take a fraction of the time.

        Raises OSError as `read_photo`.
        """
        source = source if isinstance(source, bytes) else read_file(source)
        photo, size, cut = _decode(source, DECODE_SIDE)
        if unusable(size):
            return Found([], 0, size, cut)
        whole = functools.cache(lambda: read_photo(source) if photo.shape[1] < size[0] else photo)
        finer = (lambda: _decode(source, SMALL_SIDE)[0]) if min(size) >= 2 * SMALL_SIDE else whole
        return Found(*self.look(photo, largest, size, finer, whole), size, cut)

    def follow(self, photo, landmarks):
        """Find a face in the next frame of a video, from where it was, in a fraction of a search's time.

        The frame is a uint8 array of shape (H, W, 3), RGB; the landmarks, a float array of shape (68, 2), are
        those of the face in the frame before. Returns a `Face`, or None where there is no longer one, its
        mouth left the frame, or it went further than a third of its size.
        """
        # a head that lies on its side is followed in the frame turned upright
        down = landmarks[48:68].mean(0) - landmarks[36:48].mean(0)
        turn = -90 * round(np.degrees(np.arctan2(*down)) / 90)
        grey, back = _turned(_grey(photo), turn)
        there = cv2.invertAffineTransform(back)
        landmarks = landmarks @ there[:, :2].T + there[:, 2]
        # the box in which a search would have found them, by the medians over photos
        centre = landmarks.mean(0)
        side = 3.25 * np.sqrt(((landmarks - centre) ** 2).sum(1).mean())
        left, top = centre - (side / 2, 0.617 * side)
        box = (left, top, left + side, top + side)
        landmarks = self._landmarks(grey, box, True, -0.3, FACE_SIDE // 3)
        if landmarks is None:
            return None
        box, landmarks = _box_in_photo(box, back, 1), landmarks @ back[:, :2].T + back[:, 2]
        mouth = mouth_box(landmarks)
        if not is_inside(photo.shape[1::-1], mouth):
            return None
        return Face(box, landmarks, mouth, _upright(cut(photo, mouth, CROP_SIDE), turn), "followed")

    @staticmethod
    def _search(grey, search):
        """Boxes (left, top, right, bottom) of one search, largest first, each with whether it is sure."""
        scale = search.side / max(grey.shape)
        pad = round(search.border * search.side)
        small = cv2.copyMakeBorder(_scaled(grey, scale), pad, pad, pad, pad, cv2.BORDER_REPLICATE)
        try:
            boxes, votes = search.detect(small, search)
        except Exception as error:  # no fault of the photo, which an OSError here would be taken for
            raise ValueError(f"the search {search.name} in SEARCHES failed: {error!r}") from error
        found = sorted(zip(boxes, votes), key=lambda one: one[0][0] - one[0][2])
        return [(tuple((float(v) - pad) / scale for v in box), n >= search.sure) for box, n in found]

    def _landmarks(self, grey, box, sure, score=None, edge=FACE_SIDE // 6):
        """68 landmarks in pixels of `grey`, or None where box or landmarks make no face.

        With a `score` the box gets a second look, without the outer `edge` pixels of a patch twice as wide.
        """
        # the face at FACE_SIDE in the middle of a patch twice as wide
        side = max(2, round(2 * (box[2] - box[0])))
        left, top = round((box[0] + box[2] - side) / 2), round((box[1] + box[3] - side) / 2)
        patch = cut(grey, (left, top, left + side, top + side), 2 * FACE_SIDE)
        face = np.array([1, 1, 3, 3]) * (FACE_SIDE / 2)
        first, fits = face, []
        if score is not None:
            box, score = self._second_look(patch, score, edge)
            if box is None:
                return None
            first = box.left(), box.top(), box.right(), box.bottom()
            face, sure = np.array(as_cascade(box)), sure or score >= 0
        for box in (first, *(face + np.multiply(moves, face[2] - face[0]) for moves in FITS)):
            shape = self._predictor(patch, dlib.rectangle(*(round(float(v)) for v in box)))
            points = np.array([(p.x, p.y) for p in shape.parts()], dtype=float)
            eyes = np.hypot(*(points[42:48] - points[36:42]).mean(0))
            if sure and not fits and np.hypot(*(points[48:68] - points[33]).T).mean() > NEAR_NOSE * eyes:
                break
            same = [fit for fit in fits if np.sqrt(((fit - points) ** 2).sum(1).mean()) < SAME_FIT * eyes]
            if same:
                points = same[-1]
                break
            fits.append(points)
        else:
            return None
        if not plausible(points / FACE_SIDE - 0.5):
            return None
        return points * (side / (2 * FACE_SIDE)) + (left, top)

    @staticmethod
    def _second_look(patch, least, edge):
        """The face in the middle of a patch as dlib's HOG detector sees it: box and score, or twice None."""
        inner = np.ascontiguousarray(patch[edge:len(patch) - edge, edge:len(patch) - edge])
        for box, score, _ in zip(*hog_detector(threading.get_ident()).run(inner, 0, least)):  # the best first
            if (abs(box.center().x - len(inner) / 2) < FACE_SIDE / 3
                    and abs(box.center().y - len(inner) / 2) < FACE_SIDE / 3
                    and FACE_SIDE / 2 < box.width() < FACE_SIDE * 1.5):
                return dlib.translate_rect(box, dlib.point(edge, edge)), score
        return None, None


def plausible(landmarks):
    """Whether landmarks, float of shape (68, 2), make an upright face.

    They are in units of the detected face's side, from its left top corner.
    """
    eyes, nose, lips = landmarks[36:48], landmarks[33], landmarks[48:68]
    corners = np.hypot(*(landmarks[54] - landmarks[48]))
    centre = lips.mean(0)
    return bool(
        eyes[:, 1].mean() < nose[1] < centre[1]
        and 0.15 < centre[0] < 0.85 and 0.4 < centre[1] < 1.25
        and 0.1 < corners < 0.8
        and 0.2 < np.hypot(*(landmarks[45] - landmarks[36])) < 1
        and np.ptp(lips[:, 1]) < 0.6
    )


def _turned(image, degrees):
    """The image turned about its centre, and the 2 x 3 matrix that turns points (x, y) back."""
    if not degrees:
        return image, np.eye(2, 3)
    height, width = image.shape[:2]
    there = cv2.getRotationMatrix2D((width / 2, height / 2), degrees, 1)
    if degrees % 180 == 90:
        there[:, 2] += (height - width) / 2, (width - height) / 2
        height, width = width, height
    turned = cv2.warpAffine(image, there, (width, height), borderMode=cv2.BORDER_REPLICATE)
    return turned, cv2.invertAffineTransform(there)


def _box_in_photo(box, back, scale):
    """A box of a turned and scaled image in pixels of the photo, upright."""
    centre = back @ ((box[0] + box[2]) / 2, (box[1] + box[3]) / 2, 1)
    half = ((box[2] - box[0]) / 2, (box[3] - box[1]) / 2)
    return tuple(round(float(v) / scale) for v in (*(centre - half), *(centre + half)))


def _upright(crop, turn):
    """A crop of a photo that was turned by so many degrees to find the face, by the nearest quarter turn."""
    return np.ascontiguousarray(np.rot90(crop, round(turn / 90)))


def _overlap(a, b):
    """Intersection over the smaller of two boxes."""
    width = min(a[2], b[2]) - max(a[0], b[0])
    height = min(a[3], b[3]) - max(a[1], b[1])
    smaller = min((a[2] - a[0]) * (a[3] - a[1]), (b[2] - b[0]) * (b[3] - b[1]))
    return max(0, width) * max(0, height) / smaller


# --- the crop


def settings():
    """A fingerprint of what decides a crop, for the manifest."""
    decide = (REGION, CROP_MARGIN, CROP_SIDE, MIN_SIDE, MIN_MOUTH, MIN_FACE, MAX_SIDE_RATIO, DECODE_SIDE,
              SEARCH_SIDE, SMALL_SIDE, FACE_SIDE, LEAST_SHARE, SEARCHES, FITS, SAME_FIT, NEAR_NOSE, plausible,
              mouth_box, is_inside, cut)
    text = json.dumps(
        decide, default=lambda one: inspect.getsource(one) if inspect.isfunction(one) else repr(one))
    return hashlib.sha1(text.encode()).hexdigest()[:12]


def mouth_box(landmarks):
    """The square around the landmarks `REGION`: their bounding square's side x `CROP_MARGIN`, same centre.

    Of 68 landmarks (x, y) in pixels it gives (left, top, right, bottom), four ints.
    """
    low, high = landmarks[REGION].min(0), landmarks[REGION].max(0)
    side = max(1, round(float((high - low).max()) * CROP_MARGIN))
    left, top = np.round((low + high) / 2 - side / 2).astype(int).tolist()
    return left, top, left + side, top + side


def is_inside(size, mouth):
    """Whether the middle of a mouth's box is in a photo of that (width, height): landmarks go on beyond."""
    x, y = (mouth[0] + mouth[2]) / 2, (mouth[1] + mouth[3]) / 2
    return 0 <= x < size[0] and 0 <= y < size[1]


def cut(image, box, size):
    """Cut a box out of an image and scale it; where the box leaves the image the border is replicated.

    The image is a uint8 array of shape (H, W) or (H, W, 3), the box four ints (left, top, right, bottom), at
    least one pixel wide and high; the result is such an array of `size` x `size` pixels.
    """
    height, width = image.shape[:2]
    left, top, right, bottom = box
    # at least one row and column of the image, so that there is a border to replicate
    x0, y0 = min(max(left, 0), width - 1), min(max(top, 0), height - 1)
    inside = image[y0:max(bottom, y0 + 1), x0:max(right, x0 + 1)]
    side, shift_x, shift_y = right - left, x0 - left, y0 - top
    if side > size:  # shrink before padding: a border of thousands of pixels need never exist
        scale = size / side
        inside = _scaled(inside, scale)
        side, shift_x, shift_y = size, round(shift_x * scale), round(shift_y * scale)
    before_x, before_y = max(0, shift_x), max(0, shift_y)
    after_x = max(0, side - before_x - inside.shape[1])
    after_y = max(0, side - before_y - inside.shape[0])
    padded = cv2.copyMakeBorder(inside, before_y, after_y, before_x, after_x, cv2.BORDER_REPLICATE)
    padded = padded[:side, :side]
    return padded if side == size else cv2.resize(padded, (size, size), interpolation=cv2.INTER_CUBIC)


def _grey(photo, side=None):
    """A photo in shades of grey, scaled down to `side` pixels where its longer side has more."""
    if side and max(photo.shape) > side:
        photo = _scaled(photo, side / max(photo.shape))
    return cv2.cvtColor(photo, cv2.COLOR_RGB2GRAY)


def _scaled(image, scale):
    height, width = image.shape[:2]
    size = (max(1, round(width * scale)), max(1, round(height * scale)))
    # averaging areas costs ten times as much and hardly differs down to half the size
    return cv2.resize(image, size, interpolation=cv2.INTER_AREA if scale < 0.5 else cv2.INTER_LINEAR)


# --- a folder of photos, with workers that may die

# Folders and files of other programs, in small letters: thumbnails, recycle bins, notes of a desktop
OTHERS = {
    "@eadir", "@tmp", "@recycle", "@recently-snapshot", "#recycle", "#snapshot", "__macosx", "$recycle.bin",
    "recycler", "system volume information", "lost+found", "network trash folder", "temporary items",
    "desktop.ini", "thumbs.db", "ehthumbs.db", "icon\r",
}
NO_CLASSES = ("unsure", "no_face")  # folders of predict.py --sort, for what it does not name
# of folders within class folders: dates, parts of a data set, search engines
NO_CLASS = re.compile(r"\d[\d\W_]{3,}|train(ing)?|test(ing)?|val(id(ation)?)?|dev|google|bing|baidu", re.I)
AHEAD = 3  # photos that a worker has before it, so that it never waits for the next
BATCH = 16  # photos that go to the journal at once: flushing a folder takes longer than a photo


def is_hidden(name):
    """Whether a file or folder is hidden, or another program's own, and so neither a class nor a photo."""
    return name.startswith((".", "~$")) or name.lower() in OTHERS


def composed(name):
    """A name with its accents as Linux and Windows write them; Macs take them apart."""
    return unicodedata.normalize("NFC", name)


def class_folders(path, level=1):
    """The folders so many levels below a folder that are classes, or hold such, sorted."""
    if not level:
        return [path]
    return sorted(folder for parent in class_folders(path, level - 1) for folder in parent.iterdir()
                  if folder.is_dir() and not is_hidden(folder.name) and folder.name not in NO_CLASSES)


def list_photos(photos, level=1):
    """All files in the class folders below `photos`: sorted pairs (source relative to `photos`, class).

    A folder that cannot be opened, or is a link below a class folder, counts as a file, so that it does not
    vanish without a word.
    """
    found = []
    for folder in class_folders(photos, level):
        closed = []  # errors
        for place, folders, files in os.walk(folder, onerror=closed.append):
            place = Path(place)
            folders[:] = sorted(name for name in folders if not is_hidden(name))
            files += [name for name in folders if (place / name).is_symlink()]  # which may lead in circles
            found += [(place / name, folder) for name in files if not is_hidden(name)]
        found += [(Path(error.filename), folder) for error in closed]
    return sorted((path.relative_to(photos).as_posix(), composed(folder.name)) for path, folder in found)


def folded(name):
    """A name without what an eye or a disk may pass over: case, spaces at the ends, forms of letters."""
    name = unicodedata.normalize("NFKC", name).casefold()
    return "".join(c for c in name if c.isprintable()).strip(" .")


def check_classes(photos, sources, level):
    """Raise ValueError where names of classes look alike, or folders in class folders look like the classes.

    The latter only where `level` is None: nobody has said what is meant.
    """
    alike = defaultdict(set)
    for label in sources.values():
        alike[folded(label)].add(label)
    if twins := [", ".join(map(repr, sorted(names))) for names in alike.values() if len(names) > 1]:
        raise ValueError(f"{photos}: the classes {'; '.join(twins)} differ only in case, spaces at the ends "
                         "or forms of letters; put their photos into one folder, or give them other names")
    paths = [source.split("/") for source in sources]
    tops = sorted({path[0] for path in paths})
    inner = [path[:2] for path in paths if len(path) > 2 and not NO_CLASS.fullmatch(path[1])]
    owners = Counter(name for _, name in {(top, folded(name)) for top, name in inner})
    shared = [name for _, name in inner if owners[folded(name)] > 1 or len(tops) == 1]  # a photo each
    loose = sum(len(path) == 2 for path in paths)
    if level or not shared or 2 * len(shared) < len(paths) or 5 * loose >= len(paths):
        return
    names = sorted({folded(name): name for name in shared}.values())
    tops, these = (", ".join(some[:4]) + ", ..." * (len(some) > 4) for some in (tops, names))
    text = (f"{photos}: the folders in {tops} are called the same: {these}; if those are the classes, add "
            '--level 2, and for persons or days --group "^([^/]+)/" to split_train_val.py, which keeps each '
            "on one side; if they are not, add --level 1")
    if len(names) > 1:
        raise ValueError(text)
    print(printable(text))


def crop_name(label, sha1):
    while len(os.fsencode(label)) > 230:  # file names end at 255 bytes
        label = label[:-1]
    return f"{label}_{sha1[:12]}.jpg"


def identify(photos, source, label):
    """A photo's row as far as the file alone tells, with status `unreadable`, and its bytes or None."""
    row = dict.fromkeys(COLUMNS, "") | {"source": source, "class": label, "status": "unreadable"}
    row |= stamp(photos, source)
    with contextlib.suppress(OSError, MemoryError):
        data = read_file(photos / source)
        return row | {"sha1": hashlib.sha1(data).hexdigest()}, data
    return row, None


def process_photo(cropper, photos, source, label):
    """Look at the photo ``photos/source`` of class `label` and decide its fate; that of copies `settle` does.

    Returns its row of the manifest, a dict with `COLUMNS` as keys, and the crop of its largest face's mouth,
    the bytes of a JPEG, or None.
    """
    row, data = identify(photos, source, label)
    if data is None:
        return row, None
    try:
        faces, refused, size, cut = cropper.find(data, largest=True)
    except (OSError, MemoryError, cv2.error):
        return row | {"note": "HEIC" if not pillow_heif and is_heic(data) else ""}, None
    row["note"] = "cut short" if cut else ""
    if unusable(size):
        return row | {"status": unusable(size)}, None
    if not faces:
        return row | {"status": "implausible" if refused else "no_face"}, None
    face = faces[0]
    row |= {"face": " ".join(map(str, face.box)), "mouth": " ".join(map(str, face.mouth)),
            "detector": face.detector}
    if face.mouth[2] - face.mouth[0] < MIN_MOUTH:
        return row | {"status": "too_small"}, None
    row |= {"status": "ok", "crop": crop_name(label, row["sha1"])}
    _, jpeg = cv2.imencode(".jpg", face.crop[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, 95])
    return row, jpeg.tobytes()


def work(pipe, seconds):
    """The life of a worker process: it looks at the photos that come through the pipe."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # libtiff and others talk of what is odd in a photo
    try:
        cropper = LipCropper()
        limit_memory()
        pipe.send(None)  # from here on, a death is a photo's doing
        while True:
            task = pipe.recv()
            # ends this process even where a decoder never comes back to Python
            faulthandler.dump_traceback_later(seconds, exit=True)
            answer = process_photo(cropper, *task)
            faulthandler.cancel_dump_traceback_later()
            pipe.send(answer)
    except (EOFError, ConnectionError):  # the parent has ended, or been killed
        pass
    except Exception as error:  # not the photo's doing: the parent stops with it
        pipe.send(error)


def limit_memory():
    """Give this process `MAX_MEMORY` beside what it has, where the system can tell and limit it."""
    with contextlib.suppress(ImportError, OSError, ValueError):
        import resource

        now = int(Path("/proc/self/statm").read_text().split()[5]) * resource.getpagesize()
        _, highest = resource.getrlimit(resource.RLIMIT_DATA)
        resource.setrlimit(resource.RLIMIT_DATA, (now + MAX_MEMORY, highest))


class Worker:
    """A worker process, the pipe to it, and the photos that it has before it, in their order."""

    def __init__(self):
        # spawn: a worker forked from a process in which OpenCV has run threads waits forever
        context = get_context("spawn")
        self.pipe, other_end = context.Pipe()
        self.process = context.Process(target=work, args=(other_end, MAX_SECONDS), daemon=True)
        try:
            self.process.start()
        except RuntimeError:  # in a worker that runs again the script which started it, see `process_photos`
            sys.exit(1)
        other_end.close()  # only the worker holds it now, so that its death ends the pipe
        self.ready, self.tasks = False, deque()

    def give(self, task):
        self.tasks.append(task)
        with contextlib.suppress(ConnectionError):  # it is dead, which whoever waits for the answer sees
            self.pipe.send(task)

    def end(self):
        self.process.kill()  # it writes nothing, so nothing is left half done
        self.process.join()
        self.pipe.close()


def process_photos(tasks, workers):
    """Yield what `process_photo` returns for all tasks, (photos, source, label), as they finish.

    A photo whose worker dies, or is ended after `MAX_SECONDS`, is tried once more, after all others; if that
    happens again it is unreadable. The others cost nothing: a new one of the `workers` processes takes them
    on. Raises ChildProcessError where workers die without a photo.
    """
    waiting, tried = deque(tasks), set()
    crew = [Worker() for _ in range(min(workers, len(tasks)))]
    try:
        while waiting or any(worker.tasks for worker in crew):
            for worker in crew:
                while waiting and len(worker.tasks) < AHEAD:
                    worker.give(waiting.popleft())
            pipes = connection.wait([worker.pipe for worker in crew if worker.tasks])
            for i, worker in enumerate(crew):
                if worker.pipe not in pipes:
                    continue
                try:
                    answer = worker.pipe.recv()
                except (EOFError, OSError):  # it is dead
                    if not worker.ready:
                        raise ChildProcessError(
                            "workers die before they begin; is there enough memory? Try --workers 1. Your "
                            "own script must call this below 'if __name__ == \"__main__\":'") from None
                    worker.end()
                    crew[i] = Worker()
                    task, *others = worker.tasks
                    waiting.extendleft(reversed(others))
                    if task in tried:
                        yield identify(*task)[0], None
                    else:
                        tried.add(task)
                        waiting.append(task)
                    continue
                if isinstance(answer, Exception):
                    raise answer
                if worker.ready:
                    worker.tasks.popleft()
                    yield answer
                worker.ready = True
    finally:
        for worker in crew:
            worker.end()


def run_parallel(tasks, crops, workers, places):
    """As `process_photos`, but write the crops, and yield rows alone, some at a time, once the disk has them.

    A crop that `find_crops` has found in another class, where somebody moved it, stays there. Raises OSError
    where one cannot be written.
    """
    def save(row, jpeg):
        if jpeg:
            row["class"] = place_of(row, places) or row["class"]
            write_file(crops / row["class"] / row["crop"], jpeg, last=False)
        return row

    # flushing takes longer than writing: the disk does it while the workers look at the next photos
    with contextlib.closing(process_photos(tasks, workers)) as answers, ThreadPoolExecutor(4) as disk:
        under_way = (disk.submit(save, *answer) for answer in answers)
        while some := list(itertools.islice(under_way, BATCH)):
            rows = [one.result() for one in some]
            for label in {row["class"] for row in rows if row["crop"]}:
                sync_folder(crops / label)
            yield rows


# --- files that are whole or not there

TEMPORARY = "." + "[0-9a-f]" * 16 + ".tmp"  # a pattern for the names that `temporary` gives


def temporary(path):
    """A new name beside `path`, hidden and like no other's, which `sweep` knows."""
    return path.with_name(f".{secrets.token_hex(8)}.tmp")


def sweep(*folders):
    """Remove the temporary files that killed runs left in these folders; nobody may be writing there."""
    for folder in folders:
        for path in folder.glob(TEMPORARY):
            path.unlink(missing_ok=True)


@contextlib.contextmanager
def writing(path):
    """Name the file in errors that come from writing it; a full disk's own message names none."""
    try:
        yield
    except OSError as error:
        if not error.strerror:  # one of ours, which says what there is to say
            raise
        raise OSError(f"{path}: cannot be written ({error.strerror}); "
                      "the same command goes on from there once that is mended") from None


@contextlib.contextmanager
def replacing(path):
    """Yield a temporary name beside `path`; the file of that name, once whole, takes its place."""
    part = temporary(path)
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            yield part
            part.replace(path)
        finally:
            with contextlib.suppress(OSError):
                part.unlink(missing_ok=True)


def write_file(path, data, last=True):
    """Write bytes under a temporary name beside `path`, flush them to the disk and rename.

    Whoever reads `path`, at any moment and after any crash, finds the old content or the new one, whole.
    Where it is not the `last` file for its folder, the caller flushes the new names, all at once. Raises
    OSError, which names the file, where it cannot be written.
    """
    path = Path(path)
    with replacing(path) as part, open(part, "xb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    if last:
        sync_folder(path.parent)


def sync_folder(folder):
    """Flush names to the disk: that of a renamed file may be lost although its content is not."""
    if os.name == "posix":
        with contextlib.suppress(OSError), contextlib.ExitStack() as end:  # network disks may not be able to
            handle = os.open(folder, os.O_RDONLY)
            end.callback(os.close, handle)
            os.fsync(handle)


@contextlib.contextmanager
def locked(path):
    """Hold the lock file `path` for this process alone, until it ends, however it ends.

    Raises BlockingIOError where another one holds it.
    """
    lock = FileLock(path, blocking=False)
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            lock.acquire()
        except Timeout:
            raise BlockingIOError(f"{path.parent}: another run is at work there; wait for its end") from None
        except OSError as error:
            if error.errno not in (errno.ENOLCK, errno.EOPNOTSUPP):  # some network disks know no locks
                raise
    try:
        yield
    finally:
        lock.release()


# --- the manifest


def read_csv(path, needed=(), remedy="restore it, or remove it and run the same command again"):
    """The rows of a CSV file as dicts, in which what is missing is empty; none where there is no file.

    Spreadsheets may have saved it: with a byte order mark, in UTF-16, with semicolons or tabs, with other
    ends of lines. Raises ValueError, with the `remedy`, where it is no CSV file, a `needed` column is
    missing, or a spreadsheet has saved it in letters that nobody can tell.
    """
    if not path.is_file():
        return []
    data = path.read_bytes()
    wide = data.startswith((b"\xff\xfe", b"\xfe\xff"))
    try:
        text = data.decode("utf-16") if wide else data.decode("utf-8-sig", "surrogateescape")
        first = re.match(r"[^\r\n]*", text)[0]
        delimiter = max(",;\t", key=first.count)
        reader = csv.DictReader(io.StringIO(text, newline=""), delimiter=delimiter, restval="")
        rows = [defaultdict(str, {key: value.removeprefix("'") for key, value in row.items() if key})
                for row in reader]
    except (UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"{path}: not a CSV file, or damaged ({error}); {remedy}") from None
    if missing := set(needed).difference(reader.fieldnames or ()):
        raise ValueError(f"{path}: has no column {min(missing)}; {remedy}")
    as_written = data.startswith(f"{first}\n".encode("utf-8", "surrogateescape")) and delimiter == ","
    if not as_written and re.search("[\udc80-\udcff]", text):
        raise ValueError(f"{path}: another program has saved it in letters other than UTF-8; {remedy}")
    return rows


def write_csv(path, columns, rows):
    """Write dicts with `columns` as keys, whole or not at all; names that are not UTF-8 keep their bytes.

    Spreadsheets run what begins with = + - @ or a tab, and change what looks like a date, a long number or
    one with zeros before it. Such texts get an apostrophe, which `read_csv` takes away again, as do those
    that begin with one.
    """
    def safe(cell):
        number = re.fullmatch(r"0|[1-9]\d{,14}|(-?\d+ )+-?\d+", cell)  # boxes are several
        risky = re.match(r"[=+\-@\t\r\n']|[\d.,:/ eE+-]+$", cell)
        return f"'{cell}" if risky and not number else cell

    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    quoting = csv.writer(text, lineterminator="\n", quoting=csv.QUOTE_ALL)
    writer.writerow(columns)
    for row in rows:
        cells = [safe(str(row[column])) for column in columns]
        # Python before 3.13 leaves a carriage return bare, which ends the row for the reader
        (quoting if any("\r" in cell for cell in cells) else writer).writerow(cells)
    write_file(path, text.getvalue().encode("utf-8", "surrogateescape"))


def read_journals(crops):
    """The rows of all journals: what unfinished runs and the parts of a job have done."""
    rows = []
    for path in sorted(crops.glob(f"{JOURNAL}*")):
        for line in path.read_text("utf-8", "replace").splitlines():
            with contextlib.suppress(ValueError):  # a line cut short by a kill is a photo to do again
                rows.append(defaultdict(str, {key: str(value) for key, value in json.loads(line).items()}))
    return rows


def is_name(text):
    """Whether a text names something in a folder, not a way out of it."""
    return text not in ("", "..") and Path(text).name == text


def photo_class(row):
    """The folder of a row's photo after which its crop is named, its class; "" where the crop is not ours."""
    folders = composed(row["source"]).split("/")[:-1]
    return next((label for label in folders if row["crop"] == crop_name(label, row["sha1"])), "")


def is_ours(row):
    """Whether this script made a row's crop, and may remove it: a manifest may come from anywhere."""
    return is_name(row["class"]) and is_name(row["crop"]) and photo_class(row) != ""


def find_crops(crops):
    """For the name of each crop the class folders in which it lies."""
    places = defaultdict(set)
    for path in crops.glob("*/*.jpg"):
        places[path.name].add(path.parent.name)
    return places


def place_of(row, places):
    """The class folder of a row's crop, its photo's or one to which a hand moved it; "" without a crop."""
    folders = places.get(row["crop"], ())
    return photo_class(row) if photo_class(row) in folders else min(folders, default="")


def worth_a_try(row, photos):
    """Whether a photo that could not be read now can: permissions, or what is installed, may have changed."""
    path = photos / row["source"]
    if row["sha1"]:
        return pillow_heif and row["note"] == "HEIC"
    return os.access(path, os.R_OK) and os.path.isfile(path) and os.path.getsize(path) <= MAX_BYTES


def stamp(photos, source):
    """Size and times of a photo, as columns of its row; empty texts if it cannot be asked."""
    about = None
    with contextlib.suppress(OSError):
        about = (photos / source).stat()
    # the last, of a change of any kind, no copying program sets
    fields = {"bytes": "st_size", "mtime_ns": "st_mtime_ns", "ctime_ns": "st_ctime_ns"}
    return {column: str(getattr(about, field, "")) for column, field in fields.items()}


def known_rows(before, sources, photos, places, now):
    """What of the rows `before`, the manifest's and the journals', still holds: dict of source to row.

    The photo and the settings, `now`, must be the same, and its crop be there, perhaps moved to another class
    by hand. Rows of earlier versions name no settings: they hold.
    """
    rows = {}
    for row in tqdm(before, "comparing", unit="photo", delay=2, disable=None):
        source, label = row["source"], sources.get(row["source"])
        rows.pop(source, None)  # its crop may have been replaced since
        if not label or row["settings"] not in ("", now):
            continue
        marks = stamp(photos, source)
        if any(row[key] != mark for key, mark in marks.items()) and (  # touched, copied, or another one?
                row["bytes"] != marks["bytes"] or identify(photos, source, label)[0]["sha1"] != row["sha1"]):
            continue
        place = row["class"] if row["status"] == "conflict" else place_of(row, places) if is_ours(row) else ""
        if not row["crop"]:
            place = label
        elif row["crop"] != crop_name(label, row["sha1"]):  # that of another level
            continue
        if place:
            rows[source] = row | marks | {"class": place, "settings": now}
    conflicts = {source for source, row in rows.items() if row["status"] == "conflict"}
    # a conflict lasts as long as both copies are there
    return {row["source"]: row for row in settle(rows.values())
            if row["status"] == "conflict" or row["source"] not in conflicts}


def settle(rows):
    """Give exact copies their final status; returns the rows, which it changes, by source.

    Of photos with the same content in one class the first is `ok` and the others are `duplicate`; the same
    content in two classes is a `conflict` and belongs to neither.
    """
    rows = sorted(rows, key=lambda row: row["source"])
    copies = defaultdict(list)
    for row in rows:
        if row["crop"]:
            copies[row["sha1"]].append(row)
    for same in copies.values():
        conflict = len({row["class"] for row in same}) > 1
        for row in same:
            row["status"] = "conflict" if conflict else "ok" if row is same[0] else "duplicate"
    return rows


def part_of_job():
    """This process's number and how many there are: (0, 1) but where RANK and WORLD_SIZE say otherwise."""
    return int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


def check_folder(before, photos, crops, places):
    """Raise ValueError where most crops would be removed, their photos not being there, or being others."""
    made = [row for row in before if row["status"] == "ok" and is_ours(row) and place_of(row, places)]
    gone = [row for row in made if stamp(photos, row["source"])["bytes"] != row["bytes"]]
    if 2 * len(gone) > len(made):
        raise ValueError(f"{crops}: of {len(made)} crops there, {len(gone)} are not of photos in {photos}, "
                         f"such as that of {gone[0]['source']}, and would be removed; name another folder "
                         "for the crops, or add --replace")


def preprocess(photos, crops, workers, replace=False, level=None):
    """Bring the folder `crops` up to date with that of `photos`; what earlier runs did is kept.

    `workers` processes look at the photos. `level` says how deep the class folders lie, 1 where they lie in
    `photos`; without it that is so, unless it looks otherwise. What was made of other photos is removed, but
    most of the crops only with `replace`.

    Returns ``(rows, new, notes)``: the manifest, a list of dicts; how many photos this process looked at;
    lines about crops made before. With RANK and WORLD_SIZE in the environment it does its part only, leaves a
    journal and returns None for the manifest.

    Raises FileNotFoundError where there are no photos, and ValueError where the manifest is damaged, most
    crops were made of other photos, or as `check_classes`.
    """
    sources = dict(list_photos(photos, level or 1))
    if not sources:
        raise FileNotFoundError(f"{photos}: no photos in class folders; put them in "
                                f"{photos}/{'*/' * ((level or 1) - 1)}<class>/, one folder a class")
    check_classes(photos, sources, level)
    rank, world = part_of_job()
    journal = crops / f"{JOURNAL}{rank}"
    with contextlib.ExitStack() as locks:
        parts = sorted(crops.glob(".lock[0-9]*")) if world == 1 else []  # nobody gathers what is not done
        for path in (crops / (".lock" if world == 1 else f".lock{rank}"), *parts):
            locks.enter_context(locked(path))
        before = read_csv(crops / MANIFEST, NEEDED)
        places = find_crops(crops)
        if not replace:
            check_folder(before, photos, crops, places)
        now = settings()
        earlier = [row for row in before if not worth_a_try(row, photos)] + read_journals(crops)
        rows = known_rows(earlier, sources, photos, places, now)
        changed = {row["source"] for row in earlier if row["settings"] not in ("", now)}
        if others := changed & (sources.keys() - rows.keys()):
            print(f"{len(others)} photos are looked at anew: what decides a crop has changed")
        tasks = [(photos, *item) for item in list(sources.items())[rank::world] if item[0] not in rows]
        with writing(journal), open(journal, "a", encoding="utf-8") as log:
            log.write("\n")  # ends what a kill cut short
            with tqdm(total=len(tasks), unit="photo", disable=None if tasks and not rank else True) as bar:
                for some in run_parallel(tasks, crops, workers, places):
                    rows |= {row["source"]: row | {"settings": now} for row in some}
                    log.write("".join(json.dumps(rows[row["source"]]) + "\n" for row in some))
                    log.flush()
                    bar.update(len(some))
        if world > 1:
            return None, len(tasks), []
        final = settle(rows.values())
        return final, len(tasks), finish(crops, before, final, places)


def finish(crops, before, final, places):
    """Write the manifest and remove what is stale; returns lines about crops gone, back or elsewhere."""
    ok = [row for row in final if row["status"] == "ok"]
    stale = {(row["class"], row["crop"]) for row in (*before, *final) if is_ours(row)}
    stale -= {(row["class"], row["crop"]) for row in ok}
    for label, name in stale:
        (crops / label / name).unlink(missing_ok=True)
    removed = [name for label, name in stale if label in places.get(name, ())]
    had = {row["crop"] for row in before if row["status"] == "ok" and is_ours(row)} - places.keys()
    back = [row["source"] for row in ok if row["crop"] in had]
    moved = [row["source"] for row in ok if row["class"] != photo_class(row)]
    write_csv(crops / MANIFEST, COLUMNS, final)
    for path in crops.glob(f"{JOURNAL}*"):
        path.unlink(missing_ok=True)
    sweep(crops, *(path for path in crops.iterdir() if path.is_dir()))
    return [
        *counted("crops removed: {n}, such as {one}; their photos are gone, have changed, or lie in two "
                 "classes", removed),
        *counted("crops that somebody had removed and are there again: {n}, such as that of {one}; "
                 "to leave one out, remove its photo", back),
        *counted("crops in another class than their photos, which count there: {n}, such as that of {one}",
                 moved),
    ]


# --- the contact sheet


FONTS = ("NotoSansCJK-Regular.ttc", "wqy-microhei.ttc", "wqy-zenhei.ttc", "msyh.ttc", "PingFang.ttc",
         "Hiragino Sans GB.ttc", "DroidSansFallbackFull.ttf", "DejaVuSans.ttf", "Arial Unicode.ttf")


def label_font(text, size):
    """A font that has the letters of `text`, and the text to draw with it.

    Pillow's own font knows Latin letters only; without one of `FONTS` others become question marks.
    """
    for name in FONTS if not text.isascii() else ():
        with contextlib.suppress(OSError):
            other = ImageFont.truetype(name, size)
            missing = bytes(other.getmask("\U0010fffe"))
            if all(bytes(other.getmask(letter)) != missing for letter in text):
                return other, text
    return ImageFont.load_default(size), text.encode("latin-1", "replace").decode("latin-1")


def font_hint(names):
    """What to say where pictures cannot show some of these names, a line; empty where they can."""
    lacking = [name for name in names if label_font(name, 18)[1] != name]
    return (f"pictures show ? for letters of {', '.join(lacking)}, which no font here has; "
            "on Debian: apt install fonts-wqy-microhei") if lacking else ""


SHEET_CLASSES = 60  # of 242 lines each: viewers draw up to 16,384


def contact_sheet(crops, rows, columns=14, side=90):
    """One picture: of the first `SHEET_CLASSES` classes two rows of crops each, with their photos' names."""
    by_class = defaultdict(list)
    for row in rows:
        if row["status"] == "ok":
            by_class[row["class"]].append(row)
    high, band = side + 16, 2 * (side + 16) + 30
    shown = sorted(by_class.items())[:SHEET_CLASSES]
    sheet = Image.new("RGB", (columns * side, band * len(shown)), "white")
    draw = ImageDraw.Draw(sheet)
    for i, (label, some) in enumerate(shown):
        font, text = label_font(f"{label}  ({len(some)})", 18)
        draw.text((6, i * band + 4), text, fill="black", font=font)
        n = min(len(some), 2 * columns)
        for k, row in enumerate(some[k * len(some) // n] for k in range(n)):
            x, y = k % columns * side, i * band + 28 + k // columns * high
            with Image.open(crops / label / row["crop"]) as crop:
                sheet.paste(crop.resize((side, side)), (x, y))
            font, name = label_font(Path(row["source"]).stem, 10)
            while font.getlength(name) > side - 4:  # names often differ at their ends
                name = name[1:]
            draw.text((x + 2, y + side), name, "grey", font)
    return sheet


# --- the command line


def cores(cgroup=Path("/sys/fs/cgroup")):
    """The number of CPU cores that this process may use, by its affinity and by its container's quota."""
    count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    for files in ("cpu.max",), ("cpu/cpu.cfs_quota_us", "cpu/cpu.cfs_period_us"):  # of cgroup v2 and v1
        with contextlib.suppress(OSError, ValueError):  # they are not there, or say "max"
            quota, period = (int(word) for file in files for word in (cgroup / file).read_text().split())
            count = min(count, max(1, -(-quota // period))) if quota > 0 else count
    return count


def own_cores():
    """The cores that there are for this process, which torchrun may have started beside others."""
    return max(1, cores() // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))


def printable(text):
    """A text with control characters, and those that turn the direction of writing, as escapes."""
    return "".join(c if c.isprintable() or c in "\u200c\u200d" else ascii(c)[1:-1] for c in str(text))


def end_output():
    """Print nothing more: who read it, such as `head`, has seen enough and gone."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


# Ctrl-C; the end of a job, by Slurm or Docker; a closed terminal
SIGNALS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]


@contextlib.contextmanager
def command_line(after_interrupt):
    """Within, errors and `SIGNALS` end the program with one line, and no terminal is too poor for a name.

    `after_interrupt` is what that line says of what was done, or a function that returns it.
    """
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="backslashreplace")
    for one in SIGNALS if threading.current_thread() is threading.main_thread() else ():
        if signal.getsignal(one) == signal.SIG_DFL:  # nohup has SIGHUP ignored
            signal.signal(one, signal.default_int_handler)
    try:
        yield
    except KeyboardInterrupt:
        sys.exit(f"\ninterrupted: {after_interrupt() if callable(after_interrupt) else after_interrupt}")
    except BrokenPipeError:
        end_output()
    except (ImportError, OSError, ValueError) as error:
        sys.exit(f"error: {printable(error)}")


def text_table(headers, rows, others="right"):
    """Rows of cells below headers, as text: the first column to the left, the others to that side."""
    from tabulate import tabulate  # here: it takes 0.2 s to load, which predict.py seldom needs

    return tabulate(rows, headers, "plain", disable_numparse=True,
                    colalign=("left", *[others] * (len(headers) - 1)))


def class_table(rows, column, values, total):
    """Text: how many rows of each class there are, in `total`, and how many have which value in a column."""
    counts = Counter((row["class"], row[column]) for row in rows)
    classes = sorted({label for label, _ in counts})
    lines = []
    for name, labels in (*((label, [label]) for label in classes), ("total", classes)):
        cells = [sum(counts[label, value] for label in labels) for value in values]
        lines.append([printable(name), sum(cells), *cells])
    return text_table(("class", total, *values), lines)


def counted(text, things):
    """A list of one line that says of things how many there are, {n}, and the first, {one}; [] if none."""
    return [text.format(n=len(things), one=min(things))] if things else []


def report(photos, rows, level):
    """Print the table of `rows`, and what a user may have overlooked in the folder of photos."""
    sources = defaultdict(list)
    for row in rows:
        sources[row["status"]].append(row["source"])
        sources[row["note"]].append(row["source"])
    print(class_table(rows, "status", [s for s in STATUSES if s == "ok" or s in sources], "photos"))
    beside = sorted(path for n in range(level) for folder in class_folders(photos, n)
                    for path in folder.iterdir() if not is_hidden(path.name))
    classes = {row["class"] for row in rows}
    lines = [
        *counted("{n} files beside the class folders are in no class, such as {one}",
                 [path for path in beside if path.is_file()]),
        *counted("in two classes, and so used in neither: {n} photos, such as {one}; all folders here are "
                 "classes, so keep those of another task elsewhere", sources["conflict"]),
        *counted(f"cut short by less than {MAX_LOST:.0%} of their pixels, and so taken as they are: "
                 "{n} photos, such as {one}", sources["cut short"]),
        *(f"{name}: none of its photos is used, so there is no such class"
          for name in sorted(classes - {row["class"] for row in rows if row["status"] == "ok"})),
        *(f"{folder}: no class; move photos from there to the classes, or leave them" for folder in beside
          if folder.is_dir() and folder.name in NO_CLASSES and any(folder.iterdir())),
        *(f"{folder}: empty, so there is no class of this name" for folder in class_folders(photos, level)
          if composed(folder.name) not in classes),
        font_hint(sorted(classes)),
        *counted("{n} of the unreadable ones are HEIC, which 'pip install pillow-heif' and the same command "
                 "again would read", sources["HEIC"]),
    ]
    print(*(printable(line) + "\n" for line in lines if line), sep="", end="")


def build_parser():
    title, examples, *more = __doc__.strip().split("\n\n")
    parser = argparse.ArgumentParser(
        description="\n\n".join([title, *more[:2]]), epilog=f"examples:\n{examples}",
        formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("photos", nargs="?", type=Path, default=Path("data/raw"),
                        help="folder with one folder of photos a class (default: %(default)s)")
    parser.add_argument("crops", nargs="?", type=Path, default=Path("data/lips"),
                        help="where the crops go, in the same class folders (default: %(default)s)")
    parser.add_argument("--workers", type=int, metavar="N",
                        default=own_cores(),
                        help="processes (default: one a core, here %(default)s)")
    parser.add_argument("--level", type=int, choices=(1, 2, 3), metavar="N",
                        help="how deep the class folders lie: 1 for PHOTOS/<class>/, 2 for "
                        "PHOTOS/<person>/<class>/ (default: 1, but nothing is done where it looks like 2)")
    parser.add_argument("--replace", action="store_true",
                        help="remove the crops of an earlier folder of photos, where most are")
    return parser


def main(argv=None):
    args = build_parser().parse_args(argv)
    photos, crops = args.photos, args.crops
    with command_line("what is done is kept; the same command goes on from there"):
        if not photos.is_dir():
            raise FileNotFoundError(f"{photos}: no such folder; put photos in {photos}/<class>/, or name one")
        if crops.resolve().is_relative_to(photos.resolve()):
            raise ValueError(f"{crops}: lies within {photos}, and the next run would take the crops "
                             "for photos; name another folder")
        landmark_file()
        start = time.perf_counter()
        workers = min(max(1, args.workers), 61)  # Windows waits for no more
        rows, new, notes = preprocess(photos, crops, workers, args.replace, args.level)
        done = f"{new} photos looked at in {time.perf_counter() - start:.1f} s"
        if rows is None:
            rank, world = part_of_job()
            print(f"part {rank + 1} of {world}: {done}; once all parts are done, the same command "
                  "without RANK and WORLD_SIZE gathers them")
            return
        report(photos, rows, args.level or 1)
        print(*map(printable, notes), f"{done}, {len(rows) - new} known from before", sep="\n")
        classes = len({row["class"] for row in rows if row["status"] == "ok"})
        if not classes:
            raise ValueError(f"{photos}: not one photo gave a mouth; {crops / MANIFEST} says why")
        sheet = io.BytesIO()
        contact_sheet(crops, rows).save(sheet, "JPEG", quality=88)
        write_file(crops / "preview.jpg", sheet.getvalue())
        shown = f", at the first {SHEET_CLASSES} of {classes} classes" if classes > SHEET_CLASSES else ""
        print(printable(f"crops in {crops}/<class>/, every photo's fate in {crops / MANIFEST}, "
                        f"a look at them in {crops / 'preview.jpg'}{shown}"))


if __name__ == "__main__":
    main()
