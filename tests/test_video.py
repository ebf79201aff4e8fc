"""Videos and the live window, with clips that are made from real faces."""

import ctypes
import json
import os
import shutil
import struct
import subprocess
import sys
import time
from collections import Counter
from fractions import Fraction

import cv2
import numpy as np
import pytest
from conftest import ROOT

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


def write_frames(path, times, size=(320, 240), codec="libx264", pixels="yuv420p", parts=1000, last=None):
    """Frames that grow brighter, each at its time (seconds, in so many parts); the last one lasts `last`."""
    av = pytest.importorskip("av")
    with av.open(str(path), "w") as file:
        options = {"libvpx": {"deadline": "realtime"}, "libx264": {"bf": "0"} if last else {}}
        stream = file.add_stream(codec, rate=30, options=options.get(codec, {}))
        stream.width, stream.height, stream.pix_fmt = *size, pixels
        stream.time_base = stream.codec_context.time_base = Fraction(1, parts)
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


def visible(folder):
    """The names in a folder, without the lock."""
    return {path.name for path in folder.iterdir()} - {".lock"}


def levels_of(path):
    """The mean level of each frame of a video, and its rate."""
    frames, rate = frames_of(path)
    return np.array([frame.mean() for frame in frames]), rate


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
    yellow = [((f[..., 2] > 180) & (f[..., 1] > 180) & (f[..., 0] < 110)).sum() for f in after]
    assert min(yellow[:HOLD]) > 300 and max(yellow[HOLD + 2:2 * HOLD]) < 50 and min(yellow[-10:]) > 300
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
        "zero.mp4  unreadable: an empty file",
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


@pytest.mark.parametrize("rate", [239.977, 59.94006, 142.857, 999.9, 0.5])
def test_copies_keep_rates_that_mpeg4_cannot_hold(predicted, blind, rate, tmp_path):
    write_frames(tmp_path / "clip.mp4", np.arange(30) / rate, parts=round(1000 * rate), last=1 / rate)
    predicted("clip.mp4", "--save", "named")
    levels, found = levels_of(tmp_path / "named" / "clip.mp4")
    assert (
        30 <= len(levels) <= 31
        and found == pytest.approx(rate, rel=1e-4)
        and (np.diff(levels)[:29] > 3).all()
    )


# 30, then 4, then 60 frames a second
TIMES = np.concatenate([np.arange(15) / 30, 0.5 + np.arange(5) / 4, 1.75 + np.arange(30) / 60])


@pytest.mark.parametrize("name", ["clip.mp4", "clip.mkv", "clip.webm"])
def test_frames_keep_their_times_where_the_rate_varies(predicted, blind, name, tmp_path):
    write_frames(tmp_path / name, TIMES, codec="libvpx" if name.endswith("webm") else "libx264")
    lines = [json.loads(line) for line in predicted(name, "--save", "named", "--json")]
    np.testing.assert_allclose([line["time"] for line in lines], TIMES, atol=0.002)
    before, _ = levels_of(tmp_path / name)
    after, rate = levels_of(tmp_path / "named" / "clip.mp4")
    assert len(before) == len(TIMES) and rate == pytest.approx(60, abs=3)
    assert len(after) / rate == pytest.approx(2.25, abs=0.1)
    shown = np.searchsorted(TIMES, np.arange(len(after)) / rate + 1e-3, side="right") - 1
    late = np.searchsorted(TIMES, np.arange(len(after)) / rate - 1.5 / rate, side="right") - 1
    assert (after > before[late.clip(0)] - 3).all() and (after < before[shown] + 7).all()
    assert "cut short" not in "".join(predicted(name))


def test_what_varies_a_little_is_copied_frame_by_frame(predicted, blind, tmp_path):
    times = np.arange(60) / 30 + np.random.default_rng(0).uniform(-0.004, 0.004, 60)
    write_frames(tmp_path / "clip.mkv", times - times[0])
    predicted("clip.mkv", "--save", "named")
    levels, rate = levels_of(tmp_path / "named" / "clip.mp4")
    assert len(levels) == 60 and rate == pytest.approx(30, abs=0.5) and (np.diff(levels) > 1).all()


def test_a_last_frame_lasts_until_the_end_but_not_for_ever(predicted, blind, tmp_path):
    write_frames(tmp_path / "still.mp4", np.arange(10) / 25, last=3)
    write_frames(tmp_path / "lost.mkv", [0, 0.04, 0.08, 0.12, 36_000])  # a stamp that is ten hours off
    out = predicted("still.mp4", "lost.mkv", "--save", "named")
    levels, rate = levels_of(tmp_path / "named" / "still.mp4")
    assert len(levels) / rate == pytest.approx(3.36, abs=0.1)
    levels, rate = levels_of(tmp_path / "named" / "lost.mp4")
    assert len(levels) < 510 and len(levels) / rate == pytest.approx(36_000, rel=0.01)
    assert "cut short" not in "".join(out)


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
    levels, rate = levels_of(tmp_path / "named" / "song.mp4")
    assert len(levels) <= 100 and len(levels) / rate == pytest.approx(2, abs=0.1)


@pytest.mark.skipif(os.name == "nt", reason="Windows has no such file names")
@pytest.mark.parametrize("name", ["12:30.mp4", "http:clip.mp4", "clip%02d.mp4", "-clip.mp4"])
def test_names_of_videos_are_not_taken_for_addresses(predicted, orl, name, tmp_path):
    write_clip(tmp_path / "x.mp4", orl, parts=PARTS[:1]).rename(tmp_path / name)
    assert "face 1  dark" in predicted("--save", "a:b", "--", name)[0]
    assert len(frames_of(tmp_path / "a:b" / name)[0]) == HOLD


@pytest.mark.parametrize("fault", ["refuses", "loses"])
def test_a_video_that_cannot_be_written_costs_itself_only(inside, model, orl, fault, tmp_path, monkeypatch):
    class Writer:
        """Refuses frames of 160 x 120, or loses them as OpenCV does when the disk is full."""

        def __init__(self, path, code, rate, size):
            self.bad, self.real = size == (160, 120), real(path, code, rate, size)

        def isOpened(self):
            return not (self.bad and fault == "refuses")

        def write(self, frame):
            if not self.bad:
                self.real.write(frame)

        def release(self):
            self.real.release()

    real = cv2.VideoWriter
    (tmp_path / "in").mkdir()
    write_frames(tmp_path / "in" / "a.mp4", np.arange(5) / RATE, size=(160, 120))
    write_clip(tmp_path / "in" / "b.mp4", orl, parts=PARTS[:1])
    monkeypatch.setattr(cv2, "VideoWriter", Writer)
    out = inside("predict.py", "in", "--save", "named", "--model", model, check=1).stdout
    said = (
        "cannot be written, 160 x 120 at 20.0 frames"
        if fault == "refuses"
        else "could not be written; is there room"
    )
    assert f"in/a.mp4  named/a.mp4 {said}" in out and "in/b.mp4  dark 100%" in out
    assert sorted(path.name for path in (tmp_path / "named").iterdir()) == ["b.mp4", "index.html"]
    page = (tmp_path / "named" / "index.html").read_text()
    assert f"named/a.mp4 {said}" in page and 'href="a.mp4"' not in page and 'href="b.mp4"' in page


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
    levels, rate = levels_of(tmp_path / "named" / "clip.mp4")
    assert len(levels) == 20 and rate == 20 and levels[-1] - levels[0] == pytest.approx(190, abs=10)


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere there is a screen")
def test_no_screen_is_one_line(inside, model, orl, tmp_path, monkeypatch):
    write_clip(tmp_path / "clip.mp4", orl, parts=[None])
    monkeypatch.setenv("DISPLAY", "")
    monkeypatch.setenv("WAYLAND_DISPLAY", "")
    error = inside("predict.py", "--camera", "clip.mp4", "--model", model, check=1).stderr
    assert error.count("\n") == 1 and "needs a screen" in error


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
            label = (seen[..., 2] > 180) & (seen[..., 1] > 180) & (seen[..., 0] < 110)
            bar = (np.abs(seen - (0, 120, 170)).max(2) < 60) & (np.arange(240) < 60)[:, None]
            return label.sum() > 300 and bar.sum() > 300
        assert _within(20, shown)
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
