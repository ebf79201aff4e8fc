"""Videos and the live window, with clips that are made from real faces."""

import ctypes
import functools
import http.server
import json
import os
import shutil
import struct
import subprocess
import sys
import threading
import time
from collections import Counter
from fractions import Fraction

import cv2
import numpy as np
import pytest
from conftest import CHROMIUM, ROOT
from PIL import Image, ImageColor

import predict
import preprocess_lips
import train
from net import load_model
from predict import predict_video

RATE, HOLD = 20, 20  # frames a second, and frames that a face stays
PARTS = (("s05_1", 0.5), None, ("s01_1", 1.0))  # a dark face, nothing, a bright one


@pytest.fixture(scope="module")
def model(mouths):
    """A model that tells dark mouths from bright ones."""
    folders = [f"--data={mouths / 'data'}", f"--models={mouths / 'seen'}", f"--logs={mouths / 'logs'}"]
    train.main(["--epochs", "12", "--lr", "0.02", "--device", "cpu", *folders])
    return mouths / "seen" / "model.pt"


@pytest.fixture
def predicted(model, inside):
    """What predict.py prints in the test's folder, as lines: predicted("clip.mp4", "--json")."""
    return lambda *args: inside("predict.py", "--model", model, *args).stdout.splitlines()


@pytest.fixture
def blind(monkeypatch):
    """Nothing is searched in frames that show nothing, which would take longer than all else."""
    monkeypatch.setattr(preprocess_lips, "SEARCHES", ())


def write_clip(path, orl, codec="mp4v", parts=PARTS):
    """320 x 240: faces that move to and fro; a dark one, nothing, a bright one."""
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter_fourcc(*codec), RATE, (320, 240))
    assert writer.isOpened()
    for i in range(HOLD * len(parts)):
        frame = np.full((240, 320), 128, np.uint8)
        if parts[i // HOLD]:
            name, brightness = parts[i // HOLD]
            face = cv2.resize(orl[name], (164, 200))
            face = face // 2 if brightness < 1 else 255 - (255 - face) // 2
            x = 70 + round(20 * np.sin(i / 6))
            frame[20:220, x:x + 164] = face
        writer.write(cv2.cvtColor(frame, cv2.COLOR_GRAY2BGR))
    writer.release()
    return path


def frames_of(path):
    capture, frames = cv2.VideoCapture(str(path)), []
    while (read := capture.read())[0]:
        frames.append(read[1])
    return frames, capture.get(cv2.CAP_PROP_FPS)


def write_frames(
    path, times, size=(320, 240), codec="libx264", pixels="yuv420p", parts=1000, last=None, shape=None
):
    """Frames that grow brighter, each at its time (seconds, in so many parts); the last one lasts `last`."""
    av = pytest.importorskip("av")
    with av.open(str(path), "w") as file:
        options = {"libvpx": {"deadline": "realtime"}, "libx264": {"bf": "0"} if last else {}}
        stream = file.add_stream(codec, rate=30, options=options.get(codec, {}))
        stream.width, stream.height, stream.pix_fmt = *size, pixels
        stream.time_base = stream.codec_context.time_base = Fraction(1, parts)
        if shape:
            stream.codec_context.sample_aspect_ratio = shape
        packets = []
        for i, seconds in enumerate(times):
            level = 20 + 200 * i // len(times)
            frame = av.VideoFrame.from_ndarray(np.full((size[1], size[0], 3), level, np.uint8), "rgb24")
            frame.pts, frame.time_base = round(seconds * parts), stream.time_base
            packets += stream.encode(frame)
        packets += stream.encode()
        if last:
            packets[-1].duration = round(last * parts)
        file.mux(packets)
    return path


def add_sound(video, target, codec, late=0.0):
    """A copy of a video with two seconds of a tone, silent at first, that begins `late` seconds after it."""
    av = pytest.importorskip("av")
    with av.open(str(video)) as before, av.open(str(target), "w") as file:
        picture = file.add_stream_from_template(before.streams.video[0], opaque=True)
        sound = file.add_stream(codec, rate=48_000, layout="mono")
        for packet in before.demux(video=0):
            if packet.dts is not None:
                packet.stream = picture
                file.mux(packet)
        tone = 0.5 * np.sin(np.arange(96_000) / 20) * (np.arange(96_000) > 48_000 * late)
        for start in range(0, len(tone), 1024):
            level = tone[None, start:start + 1024]
            frame = av.AudioFrame.from_ndarray((level * 32_767).astype(np.int16), "s16", "mono")
            frame.sample_rate, frame.pts = 48_000, start
            file.mux(sound.encode(frame))
        file.mux(sound.encode())


def heard(path):
    """The samples of a video's sound (float array), and by how many seconds it begins after the picture."""
    av = pytest.importorskip("av")
    with av.open(str(path)) as file:
        late = -next(file.decode(video=0)).time
    with av.open(str(path)) as file:
        resampler, frames = av.AudioResampler("flt", "mono", 48_000), list(file.decode(audio=0))
        samples = [some.to_ndarray()[0] for frame in frames for some in resampler.resample(frame)]
        return np.concatenate(samples), late + frames[0].time


def length_of(path):
    """The seconds that a video says it lasts."""
    av = pytest.importorskip("av")
    with av.open(str(path)) as file:
        return file.duration / av.time_base


def stamped(path):
    """The time (seconds) and the mean level of each frame of a video."""
    av = pytest.importorskip("av")
    with av.open(str(path)) as file:
        return [(frame.time, frame.to_ndarray(format="gray").mean()) for frame in file.decode(video=0)]


def visible(folder):
    """The names in a folder, without the lock."""
    return {path.name for path in folder.iterdir()} - {".lock"}


def test_lines_tell_changes_and_the_copy_has_every_frame(inside, model, orl, tmp_path):
    write_clip(tmp_path / "clip.mp4", orl)
    out = inside("predict.py", "clip.mp4", "--model", model, "--save", "named").stdout.splitlines()
    lines = [line.split("  ") for line in out]
    assert all(line[0] == "clip.mp4" for line in lines[:-1])
    # the first face comes at once, is gone when it vanishes, and the second has another number
    assert lines[0][1:4] == ["0:00.00", "face 1", "dark"]
    assert ["clip.mp4", "0:00.95", "face 1", "gone"] in lines
    second = next(line for line in lines if line[2:] and line[2] == "face 2")
    assert second[3] == "bright" and 2.0 <= float(second[1].split(":")[1]) <= 2.3
    assert "no face 3" in lines[-2][1] and "named/index.html" in out[-1]

    before, _ = frames_of(tmp_path / "clip.mp4")
    after, rate = frames_of(tmp_path / "named" / "clip.mp4")
    assert len(after) == len(before) == 3 * HOLD and rate == RATE and after[0].shape == before[0].shape
    bgr = [ImageColor.getrgb(colour)[::-1] for colour in predict.PALETTE[:2]]  # of bright, dark
    words = [sum((abs(frame - np.array(colour)).max(2) < 30).sum() for colour in bgr) for frame in after]
    assert min(words[:HOLD]) > 300 and max(words[HOLD + 2:2 * HOLD]) < 50 and min(words[-10:]) > 300
    assert sorted(visible(tmp_path / "named")) == ["clip.jpg", "clip.mp4", "index.html"]


def test_json_has_an_object_a_face_and_frame(predicted, orl, tmp_path):
    write_clip(tmp_path / "clip.avi", orl, "MJPG")
    lines = [json.loads(line) for line in predicted("clip.avi", "--json")]
    assert [line["time"] for line in lines] == [round(i / RATE, 3) for i in range(3 * HOLD)]
    assert {line["label"] for line in lines[:HOLD]} == {"dark"}
    assert {line["label"] for line in lines[-10:]} == {"bright"}
    assert lines[HOLD + 5] == {
        "source": "clip.avi",
        "time": round((HOLD + 5) / RATE, 3),
        "face": None,
        "error": "no face found",
    }
    for line in lines[:HOLD]:
        assert line["face"] == 1 and sum(line["probabilities"].values()) == pytest.approx(1, abs=1e-3)


def test_a_moving_face_keeps_its_number_and_its_mouth_is_where_the_frame_shows_it(
    model, orl, cropper, tmp_path
):
    clip = write_clip(tmp_path / "clip.avi", orl, "MJPG", [("s05_1", 0.5)] * 2)
    moments = list(predict_video(clip, load_model(model)))
    assert [moment.numbers for moment in moments] == [[1]] * (2 * HOLD)
    assert Counter(moment.faces[0].detector for moment in moments)["followed"] > HOLD
    for moment in moments:
        alone = cropper(moment.frame, largest=True)[0].mouth
        side = moment.faces[0].mouth[2] - moment.faces[0].mouth[0]
        assert np.abs(np.subtract(alone, moment.faces[0].mouth)).max() < side / 4


def test_a_change_of_expression_comes_over_some_frames(model, orl, tmp_path):
    brighter = [("s05_1", 0.5), ("s05_1", 1.0)]  # the same face
    clip = write_clip(tmp_path / "clip.avi", orl, "MJPG", brighter)
    moments = list(predict_video(clip, load_model(model)))
    assert [moment.numbers for moment in moments] == [[1]] * (2 * HOLD)
    rows = np.array([moment.probabilities[0] for moment in moments])
    assert rows[HOLD - 1].argmax() != rows[-1].argmax() and np.abs(rows[-1] - rows[HOLD - 1]).max() > 0.6
    assert np.abs(np.diff(rows, axis=0)).max() < 0.26


def test_two_faces_have_two_numbers(model, orl, tmp_path):
    writer = cv2.VideoWriter(str(tmp_path / "two.avi"), cv2.VideoWriter_fourcc(*"MJPG"), RATE, (480, 240))
    for i in range(15):
        frame = np.full((240, 480, 3), 128, np.uint8)
        for x, name in ((40 + i, "s05_1"), (280 - i, "s01_1")):
            frame[20:220, x:x + 164] = cv2.resize(orl[name], (164, 200))[..., None]
        writer.write(frame)
    writer.release()
    moments = list(predict_video(str(tmp_path / "two.avi"), load_model(model)))
    assert [moment.numbers for moment in moments] == [[1, 2]] * 15
    left = [
        min(moment.numbers, key=lambda n: moment.faces[moment.numbers.index(n)].mouth[0])
        for moment in moments
    ]
    assert len(set(left)) == 1


ONE_PROCESS = f"""
import sys
sys.path.insert(0, {str(ROOT)!r})
import predict

for args in sys.argv[1:]:
    try:
        predict.main(args.split())
    except SystemExit as end:
        print(end.code, file=sys.stderr)
"""


def test_broken_videos_and_a_missing_camera_are_one_line_each(model, orl, tmp_path):
    clip = write_clip(tmp_path / "clip.mp4", orl, parts=[None]).read_bytes()
    (tmp_path / "zero.mp4").touch()
    (tmp_path / "text.mp4").write_text("no video\n" * 9)
    (tmp_path / "cut.mp4").write_bytes(clip[:len(clip) // 2])
    # a process of its own, as OpenCV is silent only where predict.py is loaded first
    shutil.copytree(model.parent, tmp_path / "models")
    calls = "zero.mp4 text.mp4 cut.mp4 none.mp4", "--camera 63 --json"
    done = subprocess.run([sys.executable, "-c", ONE_PROCESS, *calls], cwd=tmp_path,
                          capture_output=True, text=True, encoding="utf-8", timeout=240)
    assert done.stderr.splitlines() == ["1", "weights: models/model.pt", "1"]
    *lines, camera = done.stdout.splitlines()[1:]
    assert lines[:4] == [
        "zero.mp4  unreadable: not a video that can be decoded",
        "text.mp4  unreadable: not a video that can be decoded",
        "cut.mp4  unreadable: not a video that can be decoded",
        "none.mp4  unreadable: No such file or directory",
    ]
    why = "unreadable: no such camera, or another program uses it"
    assert json.loads(camera) == {"source": "63", "face": None, "error": why}


def test_what_a_cut_video_still_holds_is_predicted(predicted, orl, tmp_path):
    clip = write_clip(tmp_path / "clip.avi", orl, "MJPG").read_bytes()
    (tmp_path / "cut.avi").write_bytes(clip[:len(clip) // 2])
    lines = predicted("cut.avi")
    assert "face 1  dark" in lines[0] and f"of {3 * HOLD} frames can be decoded" in lines[-2]


def test_folders_hold_videos_beside_photos_and_inputs_are_never_written_over(predicted, orl, tmp_path):
    folder = tmp_path / "a # b"
    folder.mkdir()
    before = write_clip(folder / "clip.mp4", orl, parts=PARTS[:1]).read_bytes()
    cv2.imwrite(str(folder / "photo.jpg"), cv2.resize(orl["s01_1"], (184, 224)))
    photo = (folder / "photo.jpg").read_bytes()
    out = "\n".join(predicted(folder.name, "--save", folder.name))
    assert "clip.mp4  0:00.00  face 1  dark" in out and "1 face in 1 of 1 photo" in out
    assert (folder / "clip.mp4").read_bytes() == before and (folder / "photo.jpg").read_bytes() == photo
    assert visible(folder) == {
        "clip.mp4", "photo.jpg", "clip.jpg", "clip_2.mp4", "photo_2.jpg", "index.html"
    }
    crops = [json.loads(line) for line in predicted(folder.name, "--crops", "--json")]
    assert crops and all(line["source"].endswith(".jpg") for line in crops)


VARIES = np.concatenate([np.arange(15) / 30, 0.5 + np.arange(5) / 4, 1.75 + np.arange(30) / 60])
TIMES = {
    "varies.mp4": VARIES,
    "varies.webm": VARIES,
    "slow.mp4": np.arange(60) / 239.977,
    "shaky.mkv": (np.arange(60) + np.random.default_rng(0).uniform(0, 0.4, 60)) / 30,
    "lost.mkv": np.array([0, 0.04, 0.08, 0.12, 36_000]),  # a stamp that is ten hours off
}


@pytest.mark.parametrize("name", TIMES)
def test_copies_have_every_frame_at_its_own_time(predicted, blind, name, tmp_path):
    times = TIMES[name] - TIMES[name][0]
    write_frames(tmp_path / name, times, codec="libvpx" if name.endswith("webm") else "libx264", parts=90_000)
    out = predicted(name, "--save", "named", "--json")
    np.testing.assert_allclose([json.loads(line)["time"] for line in out], times, atol=0.002)
    before, after = stamped(tmp_path / name), stamped(tmp_path / "named" / f"{name.split('.')[0]}.mp4")
    np.testing.assert_allclose([seconds for seconds, _ in after], times, atol=0.002)
    np.testing.assert_allclose([level for _, level in after], [level for _, level in before], atol=4)


def test_a_last_frame_lasts_until_the_end(predicted, blind, tmp_path):
    write_frames(tmp_path / "still.mp4", np.arange(10) / 25, last=3)
    assert "cut short" not in "".join(predicted("still.mp4", "--save", "named"))
    assert length_of(tmp_path / "named" / "still.mp4") == pytest.approx(3.36, abs=0.01)


def test_copies_have_the_sound(predicted, blind, tmp_path):
    files = {"copied.mp4": "aac", "anew.mkv": "flac", "begins.ts": "aac"}  # the last one at 1.4 seconds
    write_frames(tmp_path / "mute.mp4", np.arange(50) / 25)
    for name, codec in files.items():
        add_sound(tmp_path / "mute.mp4", tmp_path / name, codec, late=0.2)
    predicted(*files, "--save", "named")
    for name in files:
        copy = tmp_path / "named" / f"{name.split('.')[0]}.mp4"
        assert length_of(copy) == pytest.approx(length_of(tmp_path / name), abs=0.04)
        (before, late), (after, late_too) = heard(tmp_path / name), heard(copy)
        same = name == "copied.mp4"
        assert np.array_equal(before, after) if same else abs(len(before) / len(after) - 1) < 0.02
        # the tone begins as long after the picture as there
        tone, tone_too = (np.flatnonzero(np.abs(sound) > 0.1)[0] / 48_000 for sound in (before, after))
        assert late_too + tone_too == pytest.approx(late + tone, abs=0.03)


def test_sizes_that_are_odd_and_pixels_that_are_no_squares(predicted, blind, tmp_path):
    write_frames(tmp_path / "odd.avi", np.arange(5) / 25, size=(161, 121), codec="mjpeg", pixels="yuvj444p")
    write_frames(tmp_path / "wide.mp4", np.arange(5) / 25, size=(180, 144), shape=Fraction(64, 45))
    predicted("odd.avi", "wide.mp4", "--save", "named")
    shapes = [frames_of(tmp_path / "named" / name)[0][-1].shape for name in ("odd.mp4", "wide.mp4")]
    assert shapes == [(122, 162, 3), (144, 256, 3)]


@pytest.mark.skipif(not CHROMIUM, reason="needs Chromium")
def test_browsers_play_copies(predicted, orl, tmp_path):
    write_clip(tmp_path / "mute.mp4", orl, "mp4v")
    add_sound(tmp_path / "mute.mp4", tmp_path / "clip.mp4", "aac")
    predicted("clip.mp4", "--save", "named")
    (tmp_path / "page.html").write_text("""<title>waiting</title><video muted preload="auto"></video><script>
        const video = document.querySelector("video"), name = location.hash.slice(1)
        video.oncanplaythrough = () => document.title = [
            video.videoWidth, video.videoHeight, video.webkitAudioDecodedByteCount > 0, video.duration].join()
        video.src = name
        </script>""")
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--virtual-time-budget=9000",
             "--disable-background-networking", f"--user-data-dir={tmp_path / 'profile'}", "--dump-dom"]
    titles = []
    for name in ("clip.mp4", "named/clip.mp4"):
        dom = subprocess.run([CHROMIUM, *flags, (tmp_path / "page.html").as_uri() + "#" + name],
                             capture_output=True, text=True, encoding="utf-8", timeout=120).stdout
        titles.append(dom.split("<title>")[1].split("</title>")[0])
    assert titles[0].startswith("0,0,")  # of MPEG-4 part 2, which OpenCV writes, there is but the sound
    assert titles[1].startswith("320,240,true,")
    assert float(titles[1].split(",")[3]) == pytest.approx(3, abs=1 / RATE)
    with pytest.importorskip("av").open(str(tmp_path / "named" / "clip.mp4")) as file:
        frame = next(file.decode(video=0))  # says how its colours are meant, which browsers would guess
        assert (frame.colorspace, frame.color_range, frame.color_primaries, frame.color_trc) == (1, 1, 1, 1)


def test_only_what_ends_far_before_its_end_is_called_cut_short(predicted, blind, tmp_path):
    write_frames(tmp_path / "slow.mkv", np.arange(60) / 20)  # whose head says 30 frames a second
    assert "cut short" not in "".join(predicted("slow.mkv"))
    clip = (tmp_path / "slow.mkv").read_bytes()
    (tmp_path / "slow.mkv").write_bytes(clip[:len(clip) // 2])
    assert "cut short or damaged" in "".join(predicted("slow.mkv"))


@pytest.mark.parametrize("codec, pixels", [("mjpeg", "yuvj420p"), ("png", "rgb24")])
def test_a_song_with_a_cover_is_no_damaged_video(predicted, blind, codec, pixels, tmp_path):
    av = pytest.importorskip("av")
    with av.open(str(tmp_path / "song.mp4"), "w") as file:
        sound, cover = file.add_stream("aac", rate=44100, layout="mono"), file.add_stream(codec, rate=1)
        cover.width, cover.height, cover.pix_fmt = 100, 100, pixels
        cover.disposition = av.stream.Disposition.attached_pic
        picture = av.VideoFrame.from_ndarray(np.full((100, 100, 3), 200, np.uint8), "rgb24")
        for packet in cover.encode(picture):
            packet.pts = packet.dts = 0
            file.mux(packet)
        for start in range(0, 2 * 44100, 1024):
            frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), "fltp", "mono")
            frame.sample_rate, frame.pts = 44100, start
            file.mux(sound.encode(frame))
    assert predicted("song.mp4", "--save", "named")[0] == "song.mp4  no face 100%"
    assert length_of(tmp_path / "named" / "song.mp4") == pytest.approx(2, abs=0.05)


@pytest.mark.skipif(os.name == "nt", reason="Windows has no such file names")
@pytest.mark.parametrize("name", ["12:30.mp4", "http:clip.mp4", "clip%02d.mp4", "-clip.mp4"])
def test_names_of_videos_are_not_taken_for_addresses(predicted, orl, name, tmp_path):
    write_clip(tmp_path / "x.mp4", orl, parts=PARTS[:1]).rename(tmp_path / name)
    assert "face 1  dark" in predicted("--save", "a:b", "--", name)[0]
    assert len(frames_of(tmp_path / "a:b" / name)[0]) == HOLD


@pytest.mark.skipif(os.name == "nt", reason="needs a limit on the size of files")
def test_a_video_that_cannot_be_written_costs_itself_only(inside, model, orl, tmp_path):
    import resource

    (tmp_path / "in").mkdir()
    code = cv2.VideoWriter_fourcc(*"MJPG")
    writer = cv2.VideoWriter(str(tmp_path / "in" / "a.avi"), code, RATE, (320, 240))
    for i in range(20):
        writer.write(np.random.default_rng(i).integers(0, 255, (240, 320, 3), np.uint8))
    writer.release()
    write_clip(tmp_path / "in" / "b.mp4", orl, parts=PARTS[:1])
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, limits[1]))  # a disk that is full from there on
    try:
        out = inside("predict.py", "in", "--save", "named", "--model", model, check=1).stdout
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "in/a.avi  named/a.mp4 cannot be written (File too large)" in out and "in/b.mp4  dark 100%" in out
    assert visible(tmp_path / "named") == {"b.jpg", "b.mp4", "index.html"}
    page = (tmp_path / "named" / "index.html").read_text()
    assert "named/a.mp4 cannot be written" in page
    assert '"copy":"a.mp4"' not in page and '"copy":"b.mp4"' in page


def test_what_a_killed_run_left_is_gone_after_the_next(predicted, blind, tmp_path, monkeypatch):
    import predict

    def stop(copy, picture, seconds):
        real(copy, picture, seconds)
        if seconds > 3:
            raise KeyboardInterrupt

    real = predict.VideoCopy.add
    (tmp_path / "in" / "deep").mkdir(parents=True)
    write_frames(tmp_path / "in" / "deep" / "clip.mp4", np.arange(99) / 25)
    (tmp_path / "named").mkdir()
    (tmp_path / "named" / ".mine.tmp").touch()
    with monkeypatch.context() as patch:  # as if it ended there
        patch.setattr(predict.VideoCopy, "add", stop)
        patch.setattr(predict.VideoCopy, "close", lambda self: None)
        with pytest.raises(AssertionError, match="interrupted"):
            predicted("in", "--save", "named")
    assert len(visible(tmp_path / "named" / "deep")) == 1
    predicted("in", "--save", "named")
    assert visible(tmp_path / "named" / "deep") == {"clip.mp4"} and ".mine.tmp" in visible(tmp_path / "named")
    with preprocess_lips.locked(tmp_path / "named" / ".lock"), pytest.raises(AssertionError, match="at work"):
        predicted("in", "--save", "named")


def test_the_page_gets_a_poster_and_what_the_largest_face_shows_when(
    inside, model, orl, tmp_path, monkeypatch
):
    import predict

    cards = []
    monkeypatch.setattr(predict, "write_page", lambda path, given, *_: cards.extend(given))
    write_clip(tmp_path / "clip.mp4", orl)
    cv2.imwrite(str(tmp_path / "clip.jpg"), np.zeros((99, 99), np.uint8))
    inside("predict.py", "clip.mp4", "clip.jpg", "--model", model, "--save", "named")
    card = cards[1]
    assert (str(card.copy), str(card.poster), card.seconds) == ("clip.mp4", "clip_2.jpg", 3 * HOLD / RATE)
    poster = cv2.imread(str(tmp_path / "named" / "clip_2.jpg"))
    assert poster.shape == (240, 320, 3) and (poster[..., 2] > poster[..., 0] + 80.0).sum() > 300
    classes = [top for _, _, top in card.strip]
    assert classes[:2] == [load_model(model).classes.index("dark"), None] and classes[-1] == 0
    assert card.strip[0][0] == 0 and card.strip[-1][1] == card.seconds
    assert all(one[1] == two[0] for one, two in zip(card.strip, card.strip[1:]))
    assert card.strip[0][1] == pytest.approx(HOLD / RATE, abs=0.06)


def test_kinds_are_told_by_content_and_what_is_left_out_is_counted(inside, model, blind, tmp_path):
    folder = tmp_path / "in"
    folder.mkdir()
    clip = write_frames(tmp_path / "x.mp4", np.arange(5) / 25)
    for name in ("clip", "clip.f4v", "clip.dat"):
        shutil.copy(clip, folder / name)
    Image.new("RGB", (99, 99), "green").save(folder / "photo", "JPEG")
    (folder / "notes.txt").write_text("0 1 2")
    (folder / "list.m3u8").write_text(f"#EXTM3U\n#EXTINF:1,\n{clip}\n#EXT-X-ENDLIST\n")
    (folder / "weights.bin").write_bytes(bytes(5000))
    (folder / "half.mp4").write_bytes(clip.read_bytes()[:500])
    done = inside("predict.py", "in", "--model", model, "--json")
    assert "in: left out 3 other files" in done.stderr
    found = Counter(json.loads(line)["source"].split("/")[-1] for line in done.stdout.splitlines())
    assert found == {"clip": 5, "clip.f4v": 5, "clip.dat": 5, "photo": 1, "half.mp4": 1}
    done = inside("predict.py", "in", "--model", model, "--sort", "sorted")
    assert "in: left out 4 videos and 3 other files" in done.stderr and "1 photos copied" in done.stdout
    (folder / "photo").rename(tmp_path / "photo")
    error = inside("predict.py", "in", "--model", model, "--sort", "sorted", check=1).stderr
    assert "error: in: no photos in this folder, but 4 videos and 3 other files" in error
    # named ones are what they are, whatever their ending says
    shutil.copy(clip, tmp_path / "clip.jpg")
    assert "clip.jpg  no face 100%" in inside("predict.py", "clip.jpg", "--model", model).stdout


@pytest.mark.parametrize("name", ["a.gif", "a.webp"])
def test_animations_are_videos_and_sorted_by_the_frame_with_a_face(inside, model, orl, name, tmp_path):
    nothing = Image.linear_gradient("L").resize((164, 200))
    face = [Image.fromarray(cv2.resize(orl["s05_1"], (164, 200)) // 2)]
    # the face comes after two seconds and stays for three
    nothing.save(tmp_path / name, save_all=True, append_images=face, duration=[2000, 3000])
    out = inside("predict.py", name, "--model", model, "--save", "named").stdout
    assert f"{name}  0:02.00  face 1  dark" in out
    assert length_of(tmp_path / "named" / "a.mp4") == pytest.approx(5, abs=0.01)
    inside("predict.py", name, "--model", model, "--sort", "sorted", "--sure", "0")
    assert len(list((tmp_path / "sorted" / "dark").iterdir())) == 1
    # frames that do not differ make a photo
    face[0].save(tmp_path / name, save_all=True, append_images=face, duration=99)
    assert "face 1  dark" in inside("predict.py", name, "--model", model).stdout.splitlines()[0]


@pytest.fixture
def served(tmp_path):
    """The address of a server of the test's folder."""
    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *args):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=tmp_path))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def test_addresses_of_videos_are_read_and_those_of_photos_refused(inside, model, blind, served, tmp_path):
    write_frames(tmp_path / "clip.mkv", np.arange(5) / 25)
    Image.new("RGB", (99, 99), "green").save(tmp_path / "face.jpg")
    names = "clip.mkv?a=b", "face.jpg", "none.mp4"
    out = inside("predict.py", *(f"{served}/{name}" for name in names), "--model", model, "--save", "named",
                 check=1).stdout
    assert f"{served}/clip.mkv?a=b  no face 100%" in out
    assert f"{served}/face.jpg  unreadable: photos are not fetched: download it, and name the file" in out
    assert f"{served}/none.mp4  unreadable: Server returned 404 Not Found" in out
    assert len(visible(tmp_path / "named")) == 2
    [copy] = (tmp_path / "named").glob("127_0_0_1_*_clip_mkv.mp4")
    nobody = "http://127.0.0.1:9/x.mp4"
    out = inside("predict.py", nobody, "--model", model, check=1).stdout
    assert f"{nobody}  unreadable: Connection refused" in out


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere there is a screen")
def test_cameras_and_streams_need_no_screen(inside, model, orl, served, tmp_path, monkeypatch):
    write_clip(tmp_path / "clip.avi", orl, "MJPG", parts=PARTS[:1])
    monkeypatch.setenv("DISPLAY", "")
    monkeypatch.setenv("WAYLAND_DISPLAY", "")
    flags = "--camera", f"{served}/clip.avi", "--model", model
    done = inside("predict.py", *flags)
    assert f"{served}/clip.avi  0:00.00  face 1  dark" in done.stdout and "no screen" in done.stderr
    done = inside("predict.py", *flags, "--json", "--save", "named")
    assert len([json.loads(line) for line in done.stdout.splitlines()]) == HOLD and not done.stderr
    [copy] = (tmp_path / "named").glob("*_clip_avi.mp4")
    assert len(frames_of(copy)[0]) == HOLD


def test_ctrl_c_ends_a_stream_and_keeps_its_copy(inside, model, orl, served, tmp_path, monkeypatch):
    import predict

    def annotate(frame, *args):
        done.append(frame)
        if len(done) == 5:
            raise KeyboardInterrupt
        return real(frame, *args)

    real, done = predict.annotate, []
    write_clip(tmp_path / "clip.avi", orl, "MJPG", parts=PARTS[:1])
    monkeypatch.setattr(predict, "annotate", annotate)
    out = inside("predict.py", f"{served}/clip.avi", "--model", model, "--save", "named").stdout
    [copy] = (tmp_path / "named").glob("*_clip_avi.mp4")
    assert "dark 100%" in out and len(frames_of(copy)[0]) == 4
    # of a file, which can be read again, there is no half copy
    done.clear()
    error = inside("predict.py", "clip.avi", "--model", model, "--save", "half", check=1).stderr
    assert "interrupted" in error and visible(tmp_path / "half") == {"index.html"}


def test_inputs_are_expanded_where_the_shell_does_not_and_pipes_and_archives_say_what_to_do(
    inside, model, tmp_path
):
    for name in ("a1.png", "a2.png", "[b].png"):
        Image.new("RGB", (99, 99), "green").save(tmp_path / name)
    out = inside("predict.py", "a*.png", "[b].png", "--model", model).stdout
    assert [line.split("  ")[0] for line in out.splitlines()[:3]] == ["a1.png", "a2.png", "[b].png"]
    shutil.make_archive(tmp_path / "photos", "zip", tmp_path, "a1.png")
    shutil.make_archive(tmp_path / "photos", "tar", tmp_path, "a1.png")
    out = inside("predict.py", "photos.zip", "photos.tar", "-", "c*.png", "--model", model, check=1).stdout
    assert out.splitlines()[:4] == [
        "photos.zip  unreadable: an archive; unpack it, and name the folder",
        "photos.tar  unreadable: an archive; unpack it, and name the folder",
        "-  unreadable: pipes are not read; write it to a file, and name that",
        "c*.png  unreadable: No such file or directory",
    ]


def test_a_resolution_that_changes_within_a_video(predicted, blind, tmp_path):
    first = write_frames(tmp_path / "a.ts", np.arange(20) / 20, parts=90_000).read_bytes()
    second = write_frames(
        tmp_path / "b.ts", 1.1 + np.arange(20) / 20, size=(640, 480), parts=90_000
    ).read_bytes()
    (tmp_path / "both.ts").write_bytes(first + second)
    lines = [json.loads(line) for line in predicted("both.ts", "--save", "named", "--json")]
    frames, rate = frames_of(tmp_path / "named" / "both.mp4")
    assert (
        len(lines) == 40 and len(frames) in (40, 41) and {frame.shape for frame in frames} == {(240, 320, 3)}
    )


def test_videos_that_say_how_they_were_held_are_upright(predicted, orl, tmp_path):
    upright, _ = frames_of(write_clip(tmp_path / "clip.mp4", orl, parts=PARTS[:1]))
    writer = cv2.VideoWriter(str(tmp_path / "held.mp4"), cv2.VideoWriter_fourcc(*"mp4v"), RATE, (240, 320))
    for frame in upright:
        writer.write(cv2.rotate(frame, cv2.ROTATE_90_COUNTERCLOCKWISE))
    writer.release()
    clip, one = bytearray((tmp_path / "held.mp4").read_bytes()), 1 << 16
    matrix = clip.index(b"tkhd") + 44
    quarter = struct.pack(">9i", 0, one, 0, -one, 0, 0, 320 * one, 0, 1 << 30)  # as telephones write it
    clip[matrix:matrix + 36] = quarter
    (tmp_path / "held.mp4").write_bytes(clip)
    assert "face 1  dark" in predicted("held.mp4", "--save", "named")[0]
    assert {frame.shape for frame in frames_of(tmp_path / "named" / "held.mp4")[0]} == {(240, 320, 3)}


def test_ten_bits_a_channel(predicted, blind, tmp_path):
    write_frames(tmp_path / "clip.mp4", np.arange(20) / 20, codec="libx265", pixels="yuv420p10le")
    assert len([json.loads(line) for line in predicted("clip.mp4", "--save", "named", "--json")]) == 20
    levels = [level for _, level in stamped(tmp_path / "named" / "clip.mp4")]
    assert len(levels) == 20 and levels[-1] - levels[0] == pytest.approx(190, abs=10)


@pytest.fixture(scope="module")
def screen():
    """The DISPLAY of an X server without a screen."""
    if not all(map(shutil.which, ("Xvfb", "xdotool", "import"))):
        pytest.skip("needs Xvfb, xdotool and ImageMagick")
    read, write = os.pipe()
    server = subprocess.Popen(["Xvfb", "-displayfd", str(write), "-noreset", "-screen", "0", "800x600x24"],
                              pass_fds=[write], stderr=subprocess.DEVNULL)
    os.close(write)
    with os.fdopen(read) as file:
        yield ":" + file.readline().strip()
    server.terminate()
    server.wait()


@pytest.mark.parametrize("how", ["q", "close"])
def test_the_live_window_shows_bars_and_ends(model, orl, tmp_path, screen, how):
    clip = write_clip(tmp_path / "clip.mp4", orl, parts=[("s05_1", 0.5)] * 60)
    env = os.environ | {"DISPLAY": screen}
    live = subprocess.Popen(
        [sys.executable, str(ROOT / "predict.py"), "--camera", str(clip), "--model", str(model)],
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        assert live.stdout.readline().split("  ")[1:4] == ["0:00.00", "face 1", "dark"]
        search = ["xdotool", "search", "--name", "q quits"]
        window = _within(20, lambda: subprocess.run(search, env=env, capture_output=True, text=True).stdout)

        def shown():
            png = subprocess.run(["import", "-window", "root", "png:-"], env=env, capture_output=True).stdout
            seen = cv2.imdecode(np.frombuffer(png, np.uint8), cv2.IMREAD_COLOR)[:240, :320].astype(int)
            label = np.abs(seen - ImageColor.getrgb(predict.PALETTE[1])[::-1]).max(2) < 30
            bar = (np.abs(seen - (0, 120, 170)).max(2) < 60) & (np.arange(240) < 60)[:, None]
            return label.sum() > 300 and bar.sum() > 300
        assert _within(60, shown)
        if how == "close":
            for one in window.split():
                _ask_to_close(screen, int(one))
        else:
            subprocess.run(
                ["xdotool", "windowfocus", window.split()[0], "key", how], env=env, stderr=subprocess.DEVNULL
            )
        _, err = live.communicate(timeout=20)
        assert live.returncode == 0 and not err
    finally:
        live.kill()


def _within(seconds, ask):
    end = time.monotonic() + seconds
    while not (answer := ask()) and time.monotonic() < end:
        time.sleep(0.2)
    return answer


def _ask_to_close(screen, window):
    """What a window manager does when someone clicks the cross: send WM_DELETE_WINDOW."""
    x = ctypes.CDLL("libX11.so.6")
    x.XOpenDisplay.restype = ctypes.c_void_p
    x.XInternAtom.restype = ctypes.c_ulong
    x.XInternAtom.argtypes = [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_int]
    x.XSendEvent.argtypes = [ctypes.c_void_p, ctypes.c_ulong, ctypes.c_int, ctypes.c_long, ctypes.c_void_p]
    x.XCloseDisplay.argtypes = [ctypes.c_void_p]
    display = x.XOpenDisplay(screen.encode())
    long, ulong = ctypes.c_long, ctypes.c_ulong
    client_message = 33
    # an XClientMessageEvent: type, serial, send_event, display, window, message_type, format, data
    event = (long * 24)()
    event[0], event[3], event[4] = client_message, display, window
    event[5], event[6] = x.XInternAtom(display, b"WM_PROTOCOLS", 0), 32
    event[7] = x.XInternAtom(display, b"WM_DELETE_WINDOW", 0)
    x.XSendEvent(display, ulong(window), 0, 0, event)
    x.XCloseDisplay(display)
