import contextlib
import csv
import io
import os
import shutil
import struct
import subprocess
import sys
import unicodedata
import zlib
from collections import Counter
from pathlib import Path

import cv2
import numpy as np
import pytest
from conftest import ROOT, SHARED, shared, without_workers
from hostile import chunk
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageCms

import preprocess_lips
from preprocess_lips import (
    COLUMNS,
    MIN_FACE,
    Search,
    cut,
    locked,
    main,
    mouth_box,
    read_csv,
    read_photo,
    settle,
)

no_workers = pytest.mark.usefixtures("no_workers")
REAL_WORK, REAL_PHOTO = preprocess_lips.work, preprocess_lips.process_photo


def rows_of(crops):
    return {row["source"]: row for row in read_csv(crops / "manifest.csv")}


# --- reading photos


@pytest.mark.parametrize("mode", ["L", "LA", "RGB", "RGBA", "P", "CMYK", "1", "YCbCr"])
def test_every_mode_becomes_rgb_of_the_same_look(tmp_path, orl, mode):
    face = Image.fromarray(orl["s05_1"]).convert("RGB").convert(mode)
    name = {"CMYK": "x.jpg", "YCbCr": "x.jpg"}.get(mode, "x.png")
    face.save(tmp_path / name)
    photo = read_photo(tmp_path / name)
    assert photo.dtype == np.uint8 and photo.shape == (112, 92, 3)
    assert abs(photo.astype(int) - np.asarray(face.convert("RGB"))).mean() < 3


def test_16_bit_images_are_scaled_not_clipped(tmp_path, orl):
    deep = orl["s05_1"].astype(np.uint16) * 257
    Image.fromarray(deep).save(tmp_path / "deep.png")
    assert np.array_equal(read_photo(tmp_path / "deep.png")[..., 0], orl["s05_1"])


def test_what_is_transparent_becomes_white():
    file = io.BytesIO()
    Image.new("RGBA", (40, 40), (255, 0, 0, 0)).save(file, "PNG")
    assert (read_photo(file.getvalue()) == 255).all()


@pytest.mark.parametrize("bits", [10, 12, 14, 16])
@pytest.mark.parametrize("format", ["PNG", "TIFF"])
def test_levels_of_fewer_bits_than_their_file_has_are_not_black(orl, bits, format):
    file = io.BytesIO()
    deep = orl["s05_1"].astype(np.uint16) << (bits - 8)
    Image.fromarray(deep).save(file, format)
    assert abs(read_photo(file.getvalue())[..., 0].astype(int) - orl["s05_1"]).max() <= 1


def profile_of(*columns):
    """An ICC profile: sRGB's own, with the columns of its matrix to CIE XYZ under D50 replaced."""
    data = bytearray(ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes())
    for name, (x, y, z) in zip((b"rXYZ", b"gXYZ", b"bXYZ"), columns):
        at = data.index(name) + 4
        start, = struct.unpack(">I", data[at:at + 4])
        data[start + 8:start + 20] = struct.pack(">3i", *(round(v * 65536) for v in (x, y, z)))
    return bytes(data)


DISPLAY_P3 = profile_of((0.5151, 0.2412, -0.0011), (0.292, 0.6922, 0.0419), (0.1571, 0.0666, 0.7841))
SRGB = profile_of()


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("mode", ["RGB", "RGBA"])
def test_colours_of_telephones_become_srgb(format, mode):
    if mode == "RGBA" and format == "JPEG":
        pytest.skip("JPEGs are not transparent")

    def read(colour, profile):
        file = io.BytesIO()
        Image.new(mode, (64, 64), colour).save(file, format, icc_profile=profile, quality=100, lossless=True)
        return read_photo(file.getvalue())[32, 32].astype(int)

    lips = (200, 90, 100)
    assert abs(read(lips, DISPLAY_P3) - (216, 81, 97)).max() <= 4  # by the matrices of both spaces
    for profile in (None, SRGB, SRGB[:500], b"none", bytes(3000)):
        assert abs(read(lips, profile) - lips).max() <= 2
    assert abs(read((255, 255, 255), DISPLAY_P3) - 255).max() <= 1


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_honoured(tmp_path, orl, orientation):
    upright = Image.fromarray(orl["s05_1"])
    undo = {2: Image.FLIP_LEFT_RIGHT, 3: Image.ROTATE_180, 4: Image.FLIP_TOP_BOTTOM, 5: Image.TRANSPOSE,
            6: Image.ROTATE_90, 7: Image.TRANSVERSE, 8: Image.ROTATE_270}.get(orientation)
    exif = Image.Exif()
    exif[0x0112] = orientation
    (upright if undo is None else upright.transpose(undo)).save(tmp_path / "x.png", exif=exif)
    assert np.array_equal(read_photo(tmp_path / "x.png")[..., 1], orl["s05_1"])


@pytest.mark.parametrize("format", ["JPEG", "PNG", "BMP", "WEBP", "GIF", "TIFF", "PPM"])
def test_formats_are_known_by_content_not_by_name(tmp_path, orl, format):
    Image.fromarray(orl["s05_1"]).save(tmp_path / "x", format)
    (tmp_path / "x").rename(tmp_path / "photo.txt")
    assert read_photo(tmp_path / "photo.txt").shape == (112, 92, 3)


def ifd(*entries):
    """EXIF data as files hold them: entries of (tag, type, count, bytes)."""
    at, heads, tail = 8 + 2 + 12 * len(entries) + 4, b"", b""
    for tag, kind, count, data in sorted(entries):
        value = data.ljust(4, b"\0") if len(data) <= 4 else struct.pack("<I", at + len(tail))
        tail += data if len(data) > 4 else b""
        heads += struct.pack("<HHI", tag, kind, count) + value
    return b"II*\0\x08\0\0\0" + struct.pack("<H", len(entries)) + heads + bytes(4) + tail


UPSIDE_DOWN = (0x0112, 3, 1, b"\3\0")


@pytest.mark.parametrize(
    "tag", [0x010F, 0x0131, 0x0132, 0x011A, 0x8298, 0x8769, 0x8825, 0x9286, 0x927C, 0xA005, 700]
)
def test_metadata_of_any_kind_cost_no_pixels_and_hide_no_orientation(orl, tag):
    image = Image.fromarray(orl["s05_1"]).convert("RGB").rotate(180)
    lossless = np.asarray(image.rotate(180))
    for kind in (*range(19), 65535):
        for count in (0, 1, 3, 2**31 - 1):
            exif = ifd(UPSIDE_DOWN, (tag, kind, count, bytes(range(1, 25))[: min(count, 3) * 8]))
            for format in ("PNG", "JPEG", "WEBP") if count == 1 else ("PNG",):
                file = io.BytesIO()
                image.save(file, format, exif=b"Exif\0\0" * (format == "JPEG") + exif, quality=95)
                photo = read_photo(file.getvalue())
                assert np.abs(photo.astype(int) - lossless).mean() < (0.1 if format == "PNG" else 4), (
                    kind,
                    count,
                )


def test_orientations_that_are_none_leave_the_photo_as_it_is(orl):
    image = Image.fromarray(orl["s05_1"])
    for kind in (*range(19), 65535):
        for value in (bytes(8), b"\xff" * 8, b"x" * 8):
            file = io.BytesIO()
            image.save(file, "PNG", exif=ifd((0x0112, kind, 1, value)))
            assert np.array_equal(read_photo(file.getvalue())[..., 0], orl["s05_1"])


def test_texts_and_profiles_of_megabytes_cost_no_pixels(orl):
    file = io.BytesIO()
    Image.fromarray(orl["s05_1"]).save(file, "PNG")
    png, noise = file.getvalue(), os.urandom(1_500_000)
    letters = noise.hex().encode()
    for more in (
        chunk(b"tEXt", b"parameters\0" + letters),
        chunk(b"zTXt", b"prompt\0\0" + zlib.compress(letters)),
        chunk(b"iTXt", b"workflow\0\0\0\0\0" + letters),
        chunk(b"iTXt", b"workflow\0\1\0\0\0" + zlib.compress(letters)),
        chunk(b"iCCP", b"press\0\0" + zlib.compress(noise)),
        chunk(b"tEXt", b"Comment\0" + letters[:900_000]) * 80,
        chunk(b"zTXt", b"cut short"),
    ):
        for at in (33, len(png) - 12):  # before the pixels and after them
            assert np.array_equal(read_photo(png[:at] + more + png[at:])[..., 0], orl["s05_1"])


@pytest.mark.parametrize(
    "settings",
    [{}, {"progressive": True}, {"subsampling": 0}, {"restart_marker_blocks": 3}, {"optimize": True}],
    ids=str,
)
def test_of_jpegs_that_lack_their_end_those_with_nearly_all_pixels_are_taken(orl, cropper, settings):
    file, face = io.BytesIO(), Image.fromarray(orl["s05_1"]).convert("RGB").resize((368, 448))
    Image.composite(face, face.rotate(180), face.convert("L")).save(file, "JPEG", quality=90, **settings)
    data = file.getvalue()
    photo = read_photo(data).astype(int)
    for missing in (1, 2, 3, 10, 40):
        lost = abs(read_photo(data[:-missing]) - photo).max(2) > 16
        assert lost.mean() < 0.03 and not lost[:400].any()
        assert cropper.find(data[:-missing], largest=True).cut or missing < 3
    scans = [i for i in range(200, len(data)) if data[i:i + 2] in (b"\xff\xda", b"\xff\xc4")]
    for length in (*scans, *range(len(data) // 20, len(data) * 9 // 10, 997)):
        with contextlib.suppress(OSError):  # of a progressive one, the last bits alone may be missing
            assert (abs(read_photo(data[:length]) - photo).max(2) > 16).mean() < 0.03
    with pytest.raises(OSError, match="truncated"):
        read_photo(data[: len(data) // 2])


@no_workers
def test_photos_that_lack_their_end_are_counted(few, tmp_path, orl, capsys):
    Image.fromarray(orl["s07_1"]).save(few / "0none" / "x.jpg")
    (few / "0none" / "x.jpg").write_bytes((few / "0none" / "x.jpg").read_bytes()[:-2])
    main([str(few), str(tmp_path / "crops")])
    out, row = capsys.readouterr().out, rows_of(tmp_path / "crops")["0none/x.jpg"]
    assert "less than 5% of their pixels, and so taken as they are: 1 photos, such as 0none/x.jpg" in out
    assert row["status"] == "ok" and row["note"] == "cut short"


def test_nothing_that_pillow_says_of_odd_photos_reaches_the_terminal(orl, tmp_path):
    file, tiff = io.BytesIO(), io.BytesIO()
    Image.fromarray(orl["s05_1"]).save(file, "JPEG")
    Image.fromarray(orl["s05_1"]).convert("RGB").save(tiff, "TIFF")
    jpeg, tiff = file.getvalue(), tiff.getvalue()

    def segment(kind, data):
        return b"\xff" + kind + struct.pack(">H", len(data) + 2) + data

    mpf = ifd((0xB001, 4, 1, b"\2\0\0\0"), (0xB002, 7, 8, bytes(8)))
    odd = {
        "malformed mpo.jpg": jpeg[:2] + segment(b"\xe2", b"MPF\0" + mpf) + jpeg[2:],
        "cut exif.jpg": jpeg[:2]
        + segment(b"\xe1", b"Exif\0\0" + ifd(UPSIDE_DOWN, (700, 2, 99, b"x" * 9)))
        + jpeg[2:],
        "samples.tif": tiff.replace(struct.pack("<HHIH", 277, 3, 1, 3), struct.pack("<HHIH", 277, 3, 1, 99)),
        "cut.tif": tiff[:-40],
    }
    for name, data in odd.items():
        (tmp_path / name).write_bytes(data)
    code = (
        f"import sys; sys.path.insert(0, {str(ROOT)!r}); from preprocess_lips import read_photo\n"
        "for path in sys.argv[1:]:\n"
        "    try: print(read_photo(path).shape)\n"
        "    except OSError: print('unreadable')\n"
    )
    done = subprocess.run([sys.executable, "-c", code, *odd], cwd=tmp_path, capture_output=True, text=True)
    assert done.stderr == "" and done.stdout.splitlines() == 2 * ["(112, 92, 3)"] + 2 * ["unreadable"]


# --- cutting


@settings(max_examples=150, deadline=None)
@given(
    st.integers(-90, 90),
    st.integers(-90, 90),
    st.integers(1, 160),
    st.integers(1, 60),
    st.integers(1, 60),
    st.sampled_from([32, 128]),
)
def test_cut_gives_its_size_and_only_levels_of_the_image(left, top, side, width, height, size):
    image = np.random.default_rng(side).integers(80, 120, (height, width, 3), dtype=np.uint8)
    out = cut(image, (left, top, left + side, top + side), size)
    assert out.shape == (size, size, 3) and out.dtype == np.uint8
    if side >= size:  # no overshoot when shrinking; where the box is outside, the border's levels
        assert out.min() >= 80 and out.max() < 120


def test_a_box_inside_the_photo_is_cut_as_it_is():
    image = np.random.default_rng(0).integers(0, 256, (200, 300, 3), dtype=np.uint8)
    assert np.array_equal(cut(image, (50, 40, 178, 168), 128), image[40:168, 50:178])


def test_a_box_beyond_the_edge_replicates_the_border_and_keeps_its_centre():
    image = np.random.default_rng(0).integers(0, 256, (100, 100, 3), dtype=np.uint8)
    expected = cv2.copyMakeBorder(image, 0, 64, 0, 64, cv2.BORDER_REPLICATE)[36:164, 36:164]
    assert np.array_equal(cut(image, (36, 36, 164, 164), 128), expected)


def test_mouth_box_is_the_square_of_landmarks_48_to_67_times_one_and_a_half():
    landmarks = np.zeros((68, 2))
    landmarks[48:67] = (100, 200)
    landmarks[48], landmarks[67] = (80, 200), (120, 210)  # the last one counts
    assert mouth_box(landmarks) == (70, 175, 130, 235)


# --- finding faces


def test_all_sample_faces_are_found_and_mouths_lie_in_the_lower_half(orl, cropper):
    missed = []
    for name, face in orl.items():
        found = cropper(np.repeat(face[..., None], 3, 2), largest=True)
        if not found:
            missed.append(name)
            continue
        left, top, right, bottom = found[0].mouth
        assert 0.45 * 112 < (top + bottom) / 2 < 112, name
        assert found[0].crop.shape == (128, 128, 3)
    assert len(missed) <= 5, missed


def test_a_mouth_beyond_the_edge_of_a_photo_is_none(orl, cropper, monkeypatch):
    # without the searches for faces that are turned or small, which take most of the time
    monkeypatch.setattr(preprocess_lips, "SEARCHES", preprocess_lips.SEARCHES[:4])
    found = 0
    for name in sorted(orl)[::50]:
        photo = np.repeat(cv2.copyMakeBorder(orl[name], 30, 0, 30, 30, cv2.BORDER_REPLICATE)[..., None], 3, 2)
        for height in range(80, 142, 6):  # from the brows to the chin
            for face in cropper(photo[:height]):
                found += 1
                assert 0 <= face.mouth[1] + face.mouth[3] < 2 * height
    assert found > 20  # and half as many more, if those beyond the edge were not left out


def test_several_faces_come_largest_first_and_each_once(orl, cropper):
    canvas = np.full((500, 700, 3), 128, np.uint8)
    for name, size, x, y in (("s05_1", 3, 20, 60), ("s01_1", 2, 330, 100), ("s09_3", 1, 560, 150)):
        face = cv2.resize(orl[name], None, fx=size, fy=size)
        canvas[y:y + face.shape[0], x:x + face.shape[1]] = face[..., None]
    faces = cropper(canvas)
    centres = [(face.box[0] + face.box[2]) / 2 for face in faces]
    assert [20 < centres[0] < 296, 330 < centres[1] < 514, 560 < centres[2] < 652] == [True] * 3 and len(
        faces
    ) == 3
    widths = [face.box[2] - face.box[0] for face in faces]
    assert widths == sorted(widths, reverse=True)
    assert len(cropper(canvas, largest=True)) == 1


def test_large_jpegs_give_the_boxes_and_crops_of_the_whole_photo(orl, cropper, tmp_path):
    for side in (
        2400,
        4000,
    ):  # a mouth with enough pixels at a fraction of the size, and a small face far off
        canvas = np.full((side, side * 4 // 3, 3), 90, np.uint8)
        size = (1380, 1680) if side == 2400 else (460, 560)
        canvas[200:200 + size[1], 900:900 + size[0]] = cv2.resize(orl["s05_1"], size)[..., None]
        path = tmp_path / f"{side}.jpg"
        Image.fromarray(canvas).save(path, quality=95)
        found = cropper.find(path, largest=True)
        (face,), (width, height) = found.faces, found.size
        (whole,) = cropper(read_photo(path), largest=True)
        assert (width, height) == (side * 4 // 3, side)
        assert np.abs(np.subtract(face.mouth, whole.mouth)).max() < 0.05 * (whole.mouth[2] - whole.mouth[0])
        assert np.abs(face.crop.astype(int) - whole.crop).mean() < 12


def test_a_call_takes_what_is_at_hand_and_says_what_it_takes(orl, cropper, tmp_path):
    face = Image.fromarray(orl["s05_1"])
    face.save(path := tmp_path / "x.png")
    photo = read_photo(path)
    (expected,) = cropper(photo, largest=True)
    for one in (path, str(path), path.read_bytes(), face, face.convert("RGBA"), orl["s05_1"]):
        (found,) = cropper(one, largest=True)
        assert found.mouth == expected.mouth and np.array_equal(found.crop, expected.crop)
    for one in (None, [photo], photo / 255, photo.transpose(2, 0, 1), photo[:0], photo[..., :1]):
        with pytest.raises(ValueError, match=r"a photo is a file, a PIL image or uint8 .*, not (\w+) "):
            cropper(one)
    with pytest.raises(OSError, match="gone"):
        cropper("gone.jpg")


def test_turned_heads_are_found_and_their_landmarks_turn_back(orl, cropper):
    face = cv2.copyMakeBorder(orl["s05_1"], 60, 60, 60, 60, cv2.BORDER_REPLICATE)
    (upright,) = cropper(np.repeat(face[..., None], 3, 2), largest=True)
    height, width = face.shape
    for degrees in (-30, 30):
        matrix = cv2.getRotationMatrix2D((width / 2, height / 2), degrees, 1)
        turned = cv2.warpAffine(face, matrix, (width, height), borderMode=cv2.BORDER_REPLICATE)
        (found,) = cropper(np.repeat(turned[..., None], 3, 2), largest=True)
        expected = upright.landmarks[48:].mean(0) @ matrix[:, :2].T + matrix[:, 2]
        assert np.hypot(*(found.landmarks[48:].mean(0) - expected)) < 6


@shared("photos")
def test_most_tight_photos_of_other_people_are_found(cropper):
    files = sorted((SHARED / "photos").glob("*/*.jpg"))[::15]
    found = sum(bool(cropper(read_photo(file), largest=True)) for file in files)
    assert found >= 0.98 * len(files)


@shared("small_faces")
def test_mouths_are_not_noses_in_small_faces_cut_at_the_chin(cropper):
    with open(SHARED / "small_faces" / "labels.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    found, off = Counter(), 0
    rows = [*filter(lambda row: row["today"] != "right", rows),
            *[row for row in rows if row["today"] == "right"][::4]]
    for row in rows:
        for face in cropper.find(SHARED / "small_faces" / row["photo"], largest=True).faces:
            found[row["today"]] += 1
            off += not 0.68 < (face.mouth[1] + face.mouth[3]) / 128 < 0.98
    assert off <= 4 and found["right"] == 60 and found["none"] >= 44 and found["wrong"] >= 33


def test_another_detector_is_a_function_and_a_line_and_needs_no_second_look(orl, cropper, monkeypatch):
    photo = np.repeat(orl["s05_1"][..., None], 3, 2)
    (face,) = cropper(photo, largest=True)
    monkeypatch.setattr(preprocess_lips, "hog_detector", None)  # it is not asked
    mine = Search("mine", lambda image, search: ([np.array(face.box) * len(image) / 112], [0.9]), 96, 0, 0.5)
    monkeypatch.setattr(preprocess_lips, "SEARCHES", (mine,))
    (again,) = cropper(photo)
    assert again.detector == "mine" and np.abs(np.subtract(again.mouth, face.mouth)).max() < 8


def test_small_heads_on_bodies_are_found(orl, cropper):
    """A row of 13: heads pressed into ovals over plain bodies, faces of about 45 pixels."""
    canvas = cv2.GaussianBlur(np.random.default_rng(0).integers(0, 256, (900, 1288), np.uint8), (0, 0), 9)
    oval = cv2.GaussianBlur(cv2.ellipse(np.zeros((74, 60)), (30, 37), (26, 33), 0, 0, 360, 1, -1), (0, 0), 2)
    for i, name in enumerate(sorted(orl)[1:391:30]):
        x = 20 + 96 * i
        canvas[467:800, x - 12:x + 72] = 40 + 15 * i
        place = canvas[400:474, x:x + 60]
        place[:] = oval * cv2.resize(orl[name], (60, 74)) + (1 - oval) * place
    faces = cropper(np.repeat(canvas[..., None], 3, 2))
    columns = {((face.mouth[0] + face.mouth[2]) // 2 - 20) // 96 for face in faces}
    assert len(columns) >= 12 and all(437 < (face.mouth[1] + face.mouth[3]) / 2 < 474 for face in faces)


# --- the script


def test_every_file_has_a_row_and_every_crop_its_name(photos, monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    (photos / "0none" / "notes.jpg").write_text("<html>not a photo</html>")
    (photos / "0none" / "empty.png").write_bytes(b"")
    jpeg = io.BytesIO()
    Image.open(photos / "2smile" / "s05_1.png").convert("RGB").save(jpeg, "JPEG")
    (photos / "2smile" / "cut short.jpg").write_bytes(jpeg.getvalue()[: len(jpeg.getvalue()) // 2])
    Image.new("RGB", (400, 30)).save(photos / "0none" / "banner.png")
    Image.new("RGB", (30, 30)).save(photos / "0none" / "icon.png")
    Image.new("RGB", (300, 300), "green").save(photos / "2smile" / "meadow.webp")
    shutil.copy(photos / "2smile" / "s05_2.png", photos / "2smile" / "zz copy.gif")  # same bytes, same class
    shutil.copy(
        photos / "2smile" / "s05_3.png", photos / "0none" / "elsewhere.png"
    )  # same bytes, other class
    (photos / "0none" / "more").mkdir()
    (photos / "1pouting").mkdir()
    (photos / "0none" / "link").symlink_to(photos / "2smile")
    shutil.move(photos / "0none" / "s01_1.png", photos / "0none" / "more" / "Google_0001.jpeg")
    main(["--workers", "1"])
    rows = rows_of(tmp_path / "data" / "lips")
    files = [p.relative_to(photos).as_posix() for p in photos.rglob("*") if p.is_file() or p.is_symlink()]
    assert sorted(rows) == sorted(files)
    status = {source: row["status"] for source, row in rows.items()}
    assert {s: status[s] for s in status if status[s] != "ok"} == {
        "0none/notes.jpg": "unreadable",
        "0none/link": "unreadable",
        "0none/empty.png": "unreadable",
        "2smile/cut short.jpg": "unreadable",
        "0none/banner.png": "side_ratio",
        "0none/icon.png": "too_small",
        "2smile/meadow.webp": "no_face",
        "2smile/zz copy.gif": "duplicate",
        "2smile/s05_3.png": "conflict",
        "0none/elsewhere.png": "conflict",
    }
    crops = {
        p.relative_to(tmp_path / "data" / "lips").as_posix() for p in (tmp_path / "data" / "lips").glob("*/*")
    }
    assert crops == {f"{row['class']}/{row['crop']}" for row in rows.values() if row["status"] == "ok"}
    for row in rows.values():
        if row["status"] == "ok":
            assert row["crop"] == f"{row['class']}_{row['sha1'][:12]}.jpg"
            with Image.open(tmp_path / "data" / "lips" / row["class"] / row["crop"]) as crop:
                assert crop.size == (128, 128) and crop.format == "JPEG"
    with Image.open(tmp_path / "data" / "lips" / "preview.jpg") as preview:
        assert preview.width > 1000
    out = capsys.readouterr().out
    assert f"{Path('data/raw/1pouting')}: empty, so there is no class of this name" in out
    assert "conflict" in out and "total" in out and "data/lips/manifest.csv" in out.replace("\\", "/")
    assert "used in neither: 2 photos, such as 0none/elsewhere.png" in out


@no_workers
def test_a_second_run_does_only_what_is_new_and_forgets_what_is_gone(photos, capsys, tmp_path, orl):
    crops = tmp_path / "裁剪"
    main([str(photos), str(crops)])
    before = rows_of(crops)
    stamps = {p: p.stat().st_mtime_ns for p in crops.glob("*/*.jpg")}
    (photos / "0none" / "s01_1.png").unlink()
    Image.fromarray(orl["s07_1"]).save(photos / "0none" / "s07_1.png")
    capsys.readouterr()
    main([str(photos), str(crops)])
    assert "1 photos looked at" in capsys.readouterr().out
    after = rows_of(crops)
    assert set(before) - set(after) == {"0none/s01_1.png"} and set(after) - set(before) == {"0none/s07_1.png"}
    gone = crops / "0none" / before["0none/s01_1.png"]["crop"]
    assert not gone.exists()
    assert all(p.stat().st_mtime_ns == stamp for p, stamp in stamps.items() if p != gone)


@no_workers
def test_a_photo_replaced_by_another_of_its_size_and_time_is_noticed_and_a_touched_one_is_kept(
    few, tmp_path, capsys
):
    crops, photo, other = tmp_path / "crops", few / "0none" / "s01_1.png", few / "2smile" / "s03_1.png"
    data = max(photo.read_bytes(), other.read_bytes(), key=len)
    for path in (photo, other):  # of one size: what is behind a PNG's end does not count
        path.write_bytes(path.read_bytes().ljust(len(data), b"\0"))
    main([str(few), str(crops)])
    before, about = rows_of(crops), photo.stat()
    photo.write_bytes(other.read_bytes())
    os.utime(photo, ns=(about.st_atime_ns, about.st_mtime_ns))  # as cp -p, rsync and archives do
    other.unlink()
    for path in few.glob("2smile/*"):
        os.utime(path)
    if photo.stat().st_ctime_ns == about.st_ctime_ns:
        pytest.skip("this disk keeps no time of changes")
    capsys.readouterr()
    main([str(few), str(crops)])
    assert "1 photos looked at" in capsys.readouterr().out
    after = rows_of(crops)
    assert after["0none/s01_1.png"]["sha1"] == before["2smile/s03_1.png"]["sha1"]
    assert not (crops / "0none" / before["0none/s01_1.png"]["crop"]).exists()


@no_workers
def test_a_conflict_lasts_until_one_copy_is_removed(photos, tmp_path, capsys):
    crops = tmp_path / "crops"
    shutil.copy(photos / "0none" / "s01_1.png", photos / "2smile" / "wrong.png")
    main([str(photos), str(crops)])
    assert rows_of(crops)["0none/s01_1.png"]["status"] == "conflict"
    main([str(photos), str(crops)])
    assert (
        "0 photos looked at" in capsys.readouterr().out
    )  # a conflict that stays need not be looked at again
    assert (
        rows_of(crops)["0none/s01_1.png"]["status"]
        == rows_of(crops)["2smile/wrong.png"]["status"]
        == "conflict"
    )
    (photos / "2smile" / "wrong.png").unlink()
    main([str(photos), str(crops)])
    row = rows_of(crops)["0none/s01_1.png"]
    assert row["status"] == "ok" and (crops / "0none" / row["crop"]).is_file()


def test_an_interrupted_run_goes_on_where_it_stopped(photos, tmp_path, cropper, monkeypatch, capsys):
    crops, real, kept = tmp_path / "crops", preprocess_lips.run_parallel, []

    def stop_after_five(*args):
        for i, rows in enumerate(real(*args)):
            if i == 5:
                # a kill would leave that much
                kept.append((crops / "manifest.csv.part0").read_text().count("sha1"))
                raise KeyboardInterrupt
            yield rows

    monkeypatch.setattr(preprocess_lips, "BATCH", 1)
    monkeypatch.setattr(preprocess_lips, "run_parallel", stop_after_five)
    for _ in range(2):
        with pytest.raises(SystemExit, match="the same command goes on"):
            main([str(photos), str(crops), "--workers", "1"])
        with open(crops / "manifest.csv.part0", "a") as journal:
            journal.write('{"source": "0none/s01')  # a line that a kill cut short
    monkeypatch.undo()
    with without_workers(cropper):
        main([str(photos), str(crops)])
    assert kept == [5, 10] and "14 photos looked at" in capsys.readouterr().out and len(rows_of(crops)) == 24


@no_workers
def test_processes_of_one_job_share_the_photos_and_the_plain_command_gathers_them(photos, tmp_path, capsys):
    main([str(photos), str(tmp_path / "alone")])
    args = [str(photos), str(tmp_path / "shared"), "--workers", "1"]
    ranks = [
        subprocess.Popen(
            [sys.executable, str(ROOT / "preprocess_lips.py"), *args],
            env=os.environ | {"RANK": str(rank), "WORLD_SIZE": "2"},
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in (1, 0)
    ]
    out = [process.communicate(timeout=100)[0] for process in ranks]
    assert [process.returncode for process in ranks] == [0, 0]
    for part, said in zip((2, 1), out):
        assert f"part {part} of 2: 12 photos looked at" in said
        assert "the same command without RANK and WORLD_SIZE gathers them" in said
    assert not (tmp_path / "shared" / "manifest.csv").exists()
    capsys.readouterr()
    main(args)
    assert "0 photos looked at" in (said := capsys.readouterr().out) and "24 known from before" in said
    files = [{p.relative_to(tmp_path / name): p.read_bytes() for p in (tmp_path / name).rglob("*")
              if p.is_file() and not p.name.startswith(".lock")} for name in ("alone", "shared")]
    assert files[0] == files[1]


@no_workers
def test_parts_are_not_gathered_before_all_have_ended(photos, tmp_path):
    with (
        locked(tmp_path / "crops" / ".lock2"),
        pytest.raises(SystemExit, match="another run is at work there"),
    ):
        main([str(photos), str(tmp_path / "crops")])
    main([str(photos), str(tmp_path / "crops"), "--workers", "1"])


def deadly_photo(cropper, photos, source, label):
    if source == "0none/s02_2.png":
        os.kill(os.getpid(), 9)
    return REAL_PHOTO(cropper, photos, source, label)


def deadly_work(*args):
    preprocess_lips.process_photo = deadly_photo
    REAL_WORK(*args)


@no_workers
def test_a_photo_that_changes_after_another_process_has_done_it_is_done_again(photos, tmp_path, monkeypatch):
    for rank, world in ((1, 2), (0, 2), (0, 1)):
        monkeypatch.setenv("RANK", str(rank))
        monkeypatch.setenv("WORLD_SIZE", str(world))
        main([str(photos), str(tmp_path / "crops"), "--workers", "1"])
        for name in ("0none/s01_2.png", "2smile/s05_1.png"):  # one of either share
            os.utime(photos / name, (rank, world))
    assert {row["status"] for row in rows_of(tmp_path / "crops").values()} == {"ok"} and len(
        rows_of(tmp_path / "crops")
    ) == 24


def test_a_photo_that_kills_its_worker_costs_only_itself(photos, tmp_path, monkeypatch):
    monkeypatch.setattr("preprocess_lips.work", deadly_work)
    main([str(photos), str(tmp_path / "crops"), "--workers", "1"])
    status = {source: row["status"] for source, row in rows_of(tmp_path / "crops").items()}
    assert (
        status.pop("0none/s02_2.png") == "unreadable" and set(status.values()) == {"ok"} and len(status) == 23
    )


def test_settle_keeps_the_first_copy_whatever_the_order():
    def row(source):
        return dict.fromkeys(COLUMNS, "") | {
            "source": source,
            "class": source[0],
            "status": "ok",
            "crop": "x.jpg",
            "sha1": "abc",
        }

    assert [r["status"] for r in settle([row("a/2"), row("a/1")])] == ["ok", "duplicate"]
    assert [r["status"] for r in settle([row("b/1"), row("a/1"), row("a/2")])] == ["conflict"] * 3


@no_workers
def test_what_other_programs_leave_among_the_photos_is_no_class_and_no_photo(photos, tmp_path, capsys):
    for path in sorted(photos.glob("*/*"))[2:]:
        path.unlink()
    kept = [path.relative_to(photos).as_posix() for path in photos.glob("*/*")]
    face = (photos / kept[0]).read_bytes()
    for name in (
        "@eaDir/0none/SYNOPHOTO_THUMB_M.jpg",
        "0none/@eaDir/s01_1.png/SYNOPHOTO_THUMB_XL.jpg",
        "#recycle/0none/old.png",
        "@Recycle/x.png",
        "__MACOSX/0none/._s01_1.png",
        "$RECYCLE.BIN/a.png",
        "System Volume Information/a.png",
        "lost+found/a.png",
        "0none/._s01_1.png",
        "0none/.DS_Store",
        "0none/Thumbs.db",
        "0none/desktop.ini",
        "0none/Icon\r",
        "0none/deep/.@__thumb/s01_1.png",
        "Desktop.ini",
        "0none/.IMG_0001.HEIC.icloud",
        "0none/~$list.docx",
    ):
        (photos / name).parent.mkdir(parents=True, exist_ok=True)
        (photos / name).write_bytes(face)
    (photos / "2smile").rmdir()
    main([str(photos), str(tmp_path / "crops"), "--workers", "1"])
    assert sorted(rows_of(tmp_path / "crops")) == sorted(kept)
    out = capsys.readouterr().out
    assert "empty" not in out and "in no class" not in out


def laid_out(photos, folder, *places):
    """A folder with one photo, each another one, in every place."""
    for photo, place in zip(sorted(photos.glob("*/*")), places):
        (folder / place).mkdir(parents=True, exist_ok=True)
        shutil.copy(photo, folder / place)
    return folder


@no_workers
@pytest.mark.parametrize(
    "places",
    [
        ["Ann/0none", "Ann/2smile", "Bob/0none", "Bob/2smile", "Bob/2smile"],
        ["Ann/0none", "Ann/2smile", "Bob/2smile", "Bob/1pouting", "Cat/0none", "Cat/3openmouth"],
        [*(f"{day}/{label}" for day in ("2026-05-01", "2026-05-02") for label in "0123"), "2026-05-01"],
        ["train/0none", "train/2smile", "test/0none", "test/2smile"],
        ["unpacked/0none", "unpacked/2smile/more"],
    ],
    ids=["persons", "persons with some of the classes", "days", "parts of a set", "one folder around all"],
)
def test_folders_of_persons_in_place_of_classes_end_the_run(photos, tmp_path, capsys, places):
    import split_train_val

    raw, crops = laid_out(photos, tmp_path / "raw", *places), tmp_path / "crops"
    tops, classes = ({place.split("/")[part] for place in places if "/" in place} for part in (0, 1))
    (raw / places[0].split("/")[0] / ".DS_Store").touch()
    with pytest.raises(SystemExit, match="^error: [^\n]*; if those are the classes, add --level 2") as end:
        main([str(raw), str(crops)])
    assert "--level 1" in str(end.value) and all(name in str(end.value) for name in tops)
    assert not crops.exists()
    main([str(raw), str(crops), "--level", "1"])
    assert {row["class"] for row in rows_of(crops).values()} == tops
    main([str(raw), str(crops), "--level", "2"])
    rows, out = rows_of(crops), capsys.readouterr().out
    assert {row["class"] for row in rows.values()} == classes
    assert {path.parent.name for path in crops.glob("*/*.jpg")} == classes
    assert ("beside the class folders are in no class" in out) == (len(places) == 9)
    main([str(raw), str(crops), "--level", "2"])
    assert "0 photos looked at" in capsys.readouterr().out
    if len(tops) > 1:
        split_train_val.main([str(crops), str(tmp_path), "--group", "^([^/]+)/"])
        assert {row["group"] for row in read_csv(tmp_path / "split.csv")} == tops


@no_workers
@pytest.mark.parametrize(
    ("places", "said"),
    [
        (["0none/faces", "0none/neutral", "2smile/faces", "2smile/smiling", "2smile/teeth"], False),
        (["0none/faces", "2smile/faces", "2smile/teeth"], True),
        (["0none/2026-05-01", "0none/2026-05-02", "2smile/2026-05-01", "2smile/2026-05-02"], False),
        (["0none/google", "0none/bing", "2smile/bing", "2smile/google"], False),
        (["0none/train", "0none/val", "2smile/train", "2smile/val"], False),
        (["0none/boys", "0none/girls", "2smile", "2smile/boys", "2smile/girls"], False),
        (["0none/boys", "0none/girls", "2smile"], False),
        (["0none/neutral"], False),
    ],
)
def test_keywords_days_and_the_like_in_class_folders_are_no_classes(photos, tmp_path, capsys, places, said):
    main([str(laid_out(photos, tmp_path / "raw", *places)), str(tmp_path / "crops")])
    assert ("called the same: faces; if those" in capsys.readouterr().out) == said
    assert {row["class"] for row in rows_of(tmp_path / "crops").values()} == {
        place.split("/")[0] for place in places}


@pytest.mark.parametrize(
    "names",
    [["Smile", "smile"], ["ok", "ok "], [" lead", "lead"], ["1", "\uff11"], ["o", "o\u200b"], ["x.", "x"]],
)
def test_classes_whose_names_look_alike_end_the_run(photos, tmp_path, names):
    raw = laid_out(photos, tmp_path / "raw", *names, "other")
    if sorted(path.name for path in raw.iterdir()) != sorted([*names, "other"]):
        pytest.skip("this disk knows that they are one name")
    with pytest.raises(SystemExit, match="^error: [^\n]* differ only in case, spaces at the ends or") as end:
        main([str(raw), str(tmp_path / "crops")])
    assert all(ascii(name)[1:-1] in ascii(str(end.value)).replace("\\\\", "\\") for name in names)
    assert not (tmp_path / "crops").exists()


@no_workers
def test_class_names_with_accents_apart_and_together_are_one_class(photos, tmp_path):
    import split_train_val

    together, apart = "n\u00e9\u00e9", "ne\u0301e\u0301"
    for label, old in ((together, "0none"), (apart, "2smile")):
        for path in sorted((photos / old).glob("*"))[2:]:
            path.unlink()
        (photos / old).rename(photos / label)
    if len(list(photos.iterdir())) < 2:
        pytest.skip("this disk knows that they are one name")
    main([str(photos), str(tmp_path / "crops"), "--workers", "1"])
    rows = rows_of(tmp_path / "crops")
    assert {row["class"] for row in rows.values()} == {together} and len(rows) == 4
    assert [path.name for path in (tmp_path / "crops").iterdir() if path.is_dir()] == [together]
    for path in sorted((tmp_path / "crops" / together).iterdir())[:2]:  # as a Mac may hand them on
        (tmp_path / "crops" / apart).mkdir(exist_ok=True)
        path.rename(tmp_path / "crops" / apart / unicodedata.normalize("NFD", path.name))
    split_train_val.main([str(tmp_path / "crops"), str(tmp_path / "out")])
    assert {path.name for path in tmp_path.glob("out/*/*")} == {together}
    assert len(list(tmp_path.glob("out/*/*/*"))) == 4
    sources = {row["group"] for row in read_csv(tmp_path / "out" / "split.csv")}
    assert sources <= set(rows)  # the manifest's rows are found
    main([str(photos), str(tmp_path / "crops"), "--workers", "1"])
    split_train_val.main([str(tmp_path / "crops"), str(tmp_path / "out")])
    assert (
        len(list(tmp_path.glob("out/*/*/*"))) == 4
    )  # made anew under the other name, and still one crop a photo


@pytest.fixture
def few(photos):
    """The folder of photos with three of each class."""
    for folder in photos.iterdir():
        for path in sorted(folder.iterdir())[3:]:
            path.unlink()
    return photos


@no_workers
def test_crops_of_other_photos_are_not_removed_unless_that_is_asked_for(few, tmp_path, orl, capsys):
    crops, args = tmp_path / "crops", ["--workers", "1"]
    main([str(few), str(crops), *args])
    before = {path: path.read_bytes() for path in crops.rglob("*") if path.is_file()}
    others = tmp_path / "others" / "0none"
    others.mkdir(parents=True)
    for i in range(3):  # of the same names
        Image.fromarray(orl[f"s{i + 20}_1"]).save(others / f"s01_{i + 1}.png")
    with pytest.raises(
        SystemExit, match="^error: [^\n]*: of 6 crops there, 6 are not of photos in [^\n]* --replace$"
    ):
        main([str(others.parent), str(crops), *args])
    assert {path: path.read_bytes() for path in crops.rglob("*") if path.is_file()} == before
    for path in few.glob("*/*"):
        os.utime(path, (1, 1))  # copied to another disk: the same photos
    main([str(few), str(crops), *args])
    assert {path: path.read_bytes() for path in crops.glob("*/*")} == {
        path: before[path] for path in crops.glob("*/*")
    }
    (few / "0none" / "s01_1.png").unlink()
    capsys.readouterr()
    main([str(few), str(crops), *args])
    assert "crops removed: 1, such as 0none_" in capsys.readouterr().out
    main([str(others.parent), str(crops), *args, "--replace"])
    assert "crops removed: 5" in capsys.readouterr().out and len(list(crops.glob("*/*.jpg"))) == 3


@no_workers
def test_a_class_whose_photos_all_lie_in_another_one_too_is_named(few, tmp_path, capsys):
    shutil.copytree(few / "2smile", few / "teeth")
    (few / "unsure").mkdir()  # what predict.py --sort leaves, without a photo: not worth a word
    main([str(few), str(tmp_path / "crops"), "--workers", "1"])
    out = capsys.readouterr().out
    assert "teeth: none of its photos is used, so there is no such class" in out
    assert "used in neither: 6 photos, such as 2smile/" in out and "unsure" not in out


@no_workers
def test_a_preview_of_many_classes_keeps_a_height_that_viewers_draw_and_says_what_it_leaves_out(
    few, tmp_path, monkeypatch, capsys
):
    rows = [{"class": str(i), "status": "ok", "crop": "s01_1.png", "source": "x"} for i in range(600)]
    for i in range(600):
        (tmp_path / str(i)).symlink_to(few / "0none")
    assert 10_000 < preprocess_lips.contact_sheet(tmp_path, rows).height < 16_384
    main([str(few), str(tmp_path / "crops")])
    assert "at the first" not in capsys.readouterr().out
    monkeypatch.setattr(preprocess_lips, "SHEET_CLASSES", 1)
    main([str(few), str(tmp_path / "crops")])
    assert capsys.readouterr().out.endswith("preview.jpg, at the first 1 of 2 classes\n")


@no_workers
def test_without_a_font_for_a_class_name_a_line_says_what_to_install(few, tmp_path, monkeypatch, capsys):
    def none_there(font, *more, **others):
        if isinstance(font, str):  # a file of the system; Pillow's own font is there
            raise OSError
        return found(font, *more, **others)

    (few / "2smile").rename(few / "露齿")
    found = preprocess_lips.ImageFont.truetype
    monkeypatch.setattr(preprocess_lips.ImageFont, "truetype", none_there)
    main([str(few), str(tmp_path / "crops"), "--workers", "1"])
    assert "pictures show ? for letters of 露齿, which no font here has" in capsys.readouterr().out


@no_workers
def test_a_crop_moved_by_hand_stays_there_and_is_not_doubled(few, tmp_path, capsys):
    crops, args = tmp_path / "crops", ["--workers", "1"]
    main([str(few), str(crops), *args])
    row = rows_of(crops)["0none/s01_2.png"]
    (crops / "4other").mkdir()
    moved = {"2smile": "0none/s01_2.png", "4other": "2smile/s03_1.png"}
    for label, source in moved.items():
        row = rows_of(crops)[source]
        (crops / row["class"] / row["crop"]).rename(crops / label / row["crop"])
    for again in range(3):
        if again == 2:
            (crops / "manifest.csv").unlink()  # all photos are looked at again
        capsys.readouterr()
        main([str(few), str(crops), *args])
        out = capsys.readouterr().out
        assert f"{6 if again == 2 else 0} photos looked at" in out
        assert "crops in another class than their photos, which count there: 2" in out
        assert "such as that of 0none/s01_2.png" in out
        assert len(list(crops.glob("*/*.jpg"))) == 6
        assert {label: rows_of(crops)[source]["class"] for label, source in moved.items()} == {
            x: x for x in moved
        }
    (few / "0none" / "s01_2.png").unlink()
    main([str(few), str(crops), *args])
    assert len(list(crops.glob("*/*.jpg"))) == 5 and len(list((crops / "2smile").iterdir())) == 2


@no_workers
def test_a_crop_removed_by_hand_is_back_with_a_word_on_how_to_leave_it_out(few, tmp_path, capsys):
    crops, args = tmp_path / "crops", ["--workers", "1"]
    main([str(few), str(crops), *args])
    (crops / "0none" / rows_of(crops)["0none/s01_1.png"]["crop"]).unlink()
    main([str(few), str(crops), *args])
    said = "crops that somebody had removed and are there again: 1, such as that of 0none/s01_1.png; to leave"
    assert said in capsys.readouterr().out
    assert len(list(crops.glob("*/*.jpg"))) == 6


@no_workers
@pytest.mark.parametrize("how", ["another region", "another function", "another search"])
def test_all_crops_are_made_anew_after_a_change_of_what_decides_them(
    few, tmp_path, capsys, monkeypatch, how
):
    crops, args = tmp_path / "crops", ["--workers", "1"]
    main([str(few), str(crops), *args])
    before, first = rows_of(crops), {path: path.read_bytes() for path in crops.glob("*/*.jpg")}
    lines = (crops / "manifest.csv").read_text().splitlines()
    assert lines[0].endswith(",settings")  # of earlier versions, which did not have that column:
    (crops / "manifest.csv").write_text("".join(line.rsplit(",", 1)[0] + "\n" for line in lines))
    main([str(few), str(crops), *args])
    assert "0 photos looked at" in (out := capsys.readouterr().out.split("6 photos looked at")[-1])
    assert "looked at anew" not in out
    with monkeypatch.context() as patch:
        if how == "another region":
            patch.setattr(preprocess_lips, "REGION", slice(36, 48))
        elif how == "another function":
            patch.setattr(preprocess_lips, "mouth_box", lambda landmarks: (0, 0, 92, 92))
        else:
            patch.setattr(preprocess_lips, "SEARCHES", preprocess_lips.SEARCHES[:6])
        for again in range(2):
            main([str(few), str(crops), *args])
            out, after = capsys.readouterr().out, rows_of(crops)
            assert ("6 photos are looked at anew: what decides a crop has changed" in out) != again
            assert f"{0 if again else 6} photos looked at" in out
        assert {source: row["crop"] for source, row in after.items()} == {
            source: row["crop"] for source, row in before.items()
        }
        if how == "another region":  # the eyes, above the mouths
            for source, row in after.items():
                _, top, _, bottom = map(int, row["mouth"].split())
                assert (top + bottom) / 2 < int(before[source]["mouth"].split()[1])
        same = {path for path in first if path.read_bytes() == first[path]}
        assert same == (set(first) if how == "another search" else set())
        (few / "0none" / "s01_1.png").unlink()
        patch.setattr(preprocess_lips, "finish", lambda *args: sys.exit("interrupted"))
        patch.setattr(preprocess_lips, "MIN_MOUTH", 11)
        with pytest.raises(SystemExit):
            main([str(few), str(crops), *args])
    main([str(few), str(crops), *args])  # back to what it was: what the interrupted run did is done again
    assert {path: path.read_bytes() for path in crops.glob("*/*.jpg")} == {
        path: data for path, data in first.items() if path.name != before["0none/s01_1.png"]["crop"]
    }


def test_opencv_and_dlib_are_loaded_where_faces_are_looked_for_and_its_message_says_what_to_install(
    few, tmp_path
):
    (tmp_path / "cv2.py").write_text("raise ImportError('libGL.so.1: cannot open shared object file')")
    code = f"""if __name__ == "__main__":
        import sys
        sys.path[:0] = [{str(tmp_path)!r}, {str(ROOT)!r}]
        import preprocess_lips
        for photo in {str(few / "0none" / "s01_1.png")!r}, {str(few / "2smile" / "s03_1.png")!r}:
            assert preprocess_lips.read_photo(photo).shape == (112, 92, 3)
        assert not {{"cv2", "dlib", "torch"}} & {{*sys.modules}}
        preprocess_lips.main([{str(few)!r}, {str(tmp_path / "crops")!r}, "--workers", "1"])"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (
        done.returncode == 1
        and done.stderr.splitlines()[-1].startswith("error: cv2 cannot be loaded (libGL.so.1")
        and "'apt-get install libgl1 libglib2.0-0'" in done.stderr
        and "Traceback" not in done.stderr
    )


@pytest.mark.parametrize(
    ("files", "limit"),
    [
        ({"cpu.max": "150000 100000\n"}, 2),
        ({"cpu.max": "20000 100000\n"}, 1),
        ({"cpu/cpu.cfs_quota_us": "100000\n", "cpu/cpu.cfs_period_us": "100000\n"}, 1),
        ({"cpu.max": "max 100000\n"}, None),
        ({"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"}, None),
        ({"cpu.max": "900000000 100000\n"}, None),
        ({}, None),
    ],
)
def test_a_container_gets_as_many_workers_as_its_quota_of_cores(tmp_path, monkeypatch, files, limit):
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {*range(8)}, raising=False)
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    assert preprocess_lips.cores(tmp_path) == (limit or 8)


def test_names_are_printed_with_their_joiners_and_without_what_steers_a_terminal():
    assert preprocess_lips.printable("می\u200cخواهم 👩\u200d🔬 笑") == "می\u200cخواهم 👩\u200d🔬 笑"
    assert preprocess_lips.printable("a\x1b[2J\n\u202eb\udcff") == r"a\x1b[2J\n\u202eb\udcff"


def test_errors_name_the_folder_and_the_way_out(shell, inside, tmp_path):
    error = shell("preprocess_lips.py", check=1).stderr.replace("\\", "/")
    assert "error: data/raw: no such folder; put photos in" in error
    (tmp_path / "data" / "raw").mkdir(parents=True)
    assert "no photos in class folders" in inside("preprocess_lips.py", check=1).stderr
    assert "lies within" in inside("preprocess_lips.py", "data", "data/lips", check=1).stderr


# --- faces that are small, many, lying on their side, or not in the first frame


def placed(cropper, canvas, face, height, x, y):
    """Put an ORL face of that height into a canvas, and return the middle and side of its mouth's box."""
    (alone,) = cropper(np.repeat(cv2.resize(face, None, fx=4, fy=4)[..., None], 3, 2), largest=True)
    small = cv2.resize(face, (round(height * 92 / 112), height), interpolation=cv2.INTER_AREA)
    canvas[y:y + height, x:x + small.shape[1]] = small[..., None]
    left, top, right, bottom = np.array(alone.mouth) * height / (4 * 112)
    return np.array((x + (left + right) / 2, y + (top + bottom) / 2)), right - left


def centred(face, mouth, share=0.25):
    """Whether a mouth's box is centred on the true one, to a quarter of its side."""
    left, top, right, bottom = face.mouth
    return np.hypot(*(mouth[0] - ((left + right) / 2, (top + bottom) / 2))) < mouth[1] * share


def landscape(width, height):
    """Hills of grey, in which there is no face."""
    rng = np.random.default_rng(0)
    hills = cv2.resize(rng.integers(40, 200, (12, 16), dtype=np.uint8), (width, height))
    return np.repeat(hills[..., None], 3, 2)


@pytest.mark.parametrize("height", [80, 150])  # faces of about 50 and 95 pixels
def test_small_faces_are_found_in_photos_of_12_megapixels(orl, cropper, tmp_path, height):
    canvas = landscape(4000, 3000)
    mouth = placed(cropper, canvas, orl["s05_1"], height, 2900, 700)
    Image.fromarray(canvas).save(tmp_path / "x.jpg", quality=95)
    (face,) = cropper.find(tmp_path / "x.jpg", largest=True).faces
    assert centred(face, mouth)
    left, top, right, bottom = face.mouth
    there = cv2.resize(canvas[top:bottom, left:right], (128, 128), interpolation=cv2.INTER_CUBIC)
    assert abs(face.crop.astype(int) - there).mean() < 12  # cut from all pixels that the photo has


def test_a_group_is_found_whole_and_its_wall_yields_no_mouth(orl, cropper):
    canvas = landscape(1600, 1200)
    pieces = [face[:30, :30] for face in orl.values()]  # a wall of what is beside faces
    for i, piece in enumerate(pieces):
        x, y = 40 * (i % 40), 40 * (i // 40)
        canvas[y:y + 40, x:x + 40] = cv2.resize(piece, (40, 40))[..., None]
    assert not cropper(canvas)
    mouths = [placed(cropper, canvas, orl[f"s{person:02d}_1"], 110, 190 * (i % 8) + 40, 150 * (i // 8) + 450)
              for i, person in enumerate(range(1, 33))]
    faces = cropper(canvas)
    found = [sum(centred(face, mouth) for face in faces) for mouth in mouths]
    assert sum(n == 1 for n in found) >= 31 and max(found) == 1
    # one mouth under a moustache is taken to lie lower, nearer to the chin; none is anywhere else
    assert sum(any(centred(face, mouth, 0.5) for mouth in mouths) for face in faces) == len(faces) <= 32


def test_a_large_portrait_is_not_searched_for_small_faces(orl, cropper, tmp_path, monkeypatch):
    canvas = landscape(2400, 1800)
    placed(cropper, canvas, orl["s05_1"], 1400, 500, 300)
    Image.fromarray(canvas).save(tmp_path / "x.jpg")
    monkeypatch.setattr("preprocess_lips.read_photo", lambda source: pytest.fail("decoded whole"))
    for largest in (True, False):
        assert len(cropper.find(tmp_path / "x.jpg", largest).faces) == 1


@pytest.mark.parametrize("turn", [90, 180, 270])
def test_photos_on_their_side_give_upright_crops_and_boxes_in_the_photo(orl, cropper, turn):
    canvas = landscape(800, 600)
    mouth, side = placed(cropper, canvas, orl["s05_1"], 240, 500, 200)
    (upright,) = cropper(canvas, largest=True)
    height, width = canvas.shape[:2]
    for _ in range(turn // 90):  # a quarter, clockwise
        canvas = np.ascontiguousarray(np.rot90(canvas, -1))
        mouth, height, width = np.array((height - mouth[1], mouth[0])), width, height
    (face,) = cropper(canvas)
    assert face.detector == f"hog+{turn}" and centred(face, (mouth, side))
    followed = cropper.follow(canvas, face.landmarks)
    for one in (face, followed):
        assert centred(one, (mouth, side))
        shift, _ = cv2.phaseCorrelate(*(crop[..., 1].astype(float) for crop in (one.crop, upright.crop)))
        assert np.hypot(*shift) < 6
        assert abs(one.crop.astype(int) - upright.crop).mean() < 20


@pytest.mark.parametrize("format", ["GIF", "WEBP", "PNG", "TIFF"])
def test_of_animations_the_first_frame_that_is_not_of_one_colour_is_read(orl, format):
    black, face = Image.new("RGB", (92, 112)), Image.fromarray(orl["s05_1"]).convert("RGB")
    for frames in ([face, black], [black, Image.new("RGB", (92, 112), (3, 3, 3)), face, black], [black] * 3):
        file = io.BytesIO()
        frames[0].save(file, format, save_all=True, append_images=frames[1:], duration=40)
        expected = next((frame for frame in frames if frame is face), black)
        assert abs(read_photo(file.getvalue()).astype(int) - np.asarray(expected)).mean() < 6


def test_of_an_animation_without_end_only_some_frames_are_read(monkeypatch, orl):
    frames = [Image.new("RGB", (92, 112), (i % 2, 0, 0)) for i in range(9)]
    file = io.BytesIO()
    frames[0].save(file, "GIF", save_all=True, append_images=[*frames[1:], Image.fromarray(orl["s05_1"])])
    monkeypatch.setattr("preprocess_lips.MAX_FRAMES", 5)
    assert read_photo(file.getvalue()).max() < 5


def test_the_smallest_face_that_is_looked_for_is_in_the_help(capsys):
    with pytest.raises(SystemExit):
        main(["--help"])
    assert f"{MIN_FACE} pixels" in " ".join(capsys.readouterr().out.split())
