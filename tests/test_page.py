"""The page of --save, --evaluate and --sort in Chromium, driven by its DevTools protocol."""

import itertools
import json
import os
import select
import shutil
import subprocess
import sys
import time

import cv2
import numpy as np
import pytest
from conftest import CHROMIUM, page_data
from PIL import Image

from net import load_model, save_model, simpleconv3
from predict import Card, annotate, main, predict_photos, write_page

pytestmark = pytest.mark.skipif(not CHROMIUM or os.name == "nt", reason="needs Chromium and its pipes")

KEYS = {"Enter": 13, "Escape": 27, "ArrowLeft": 37, "ArrowUp": 38, "ArrowRight": 39, "ArrowDown": 40}


class Browser:
    """One page in a headless Chromium, spoken to through a pair of pipes."""

    def __init__(self, profile):
        hears, self.out = os.pipe()
        self.input, says = os.pipe()
        flags = ["--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--window-size=1400,1000",
                 "--disable-background-networking", f"--user-data-dir={profile}", "--remote-debugging-pipe"]
        self.process = subprocess.Popen(
            ["bash", "-c", f'exec "$0" "$@" 3<&{hears} 4>&{says}', CHROMIUM, *flags, "about:blank"],
            pass_fds=(hears, says), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        os.close(hears)
        os.close(says)
        self.ids, self.session, self.heard, self.errors = itertools.count(1), {}, b"", []
        page = next(one for one in self.send("Target.getTargets")["targetInfos"] if one["type"] == "page")
        session = self.send("Target.attachToTarget", targetId=page["targetId"], flatten=True)["sessionId"]
        self.session = {"sessionId": session}
        self.send("Runtime.enable")
        self.send("Emulation.setFocusEmulationEnabled", enabled=True)

    def send(self, method, **params):
        number = next(self.ids)
        message = {"id": number, "method": method, "params": params} | self.session
        os.write(self.out, json.dumps(message).encode() + b"\0")
        while True:
            while b"\0" not in self.heard:
                assert select.select([self.input], [], [], 120)[0], f"no answer to {method}"
                self.heard += os.read(self.input, 1 << 20)
            line, self.heard = self.heard.split(b"\0", 1)
            answer = json.loads(line)
            if answer.get("method") == "Runtime.exceptionThrown":
                self.errors.append(answer["params"]["exceptionDetails"])
            if answer.get("id") == number:
                assert "error" not in answer, answer
                return answer["result"]

    def open(self, path):
        self.run("onbeforeunload = null")  # nobody is here to confirm that marks are lost
        self.send("Page.navigate", url=path.as_uri())
        self.wait(f"document.readyState == 'complete' && location.href == {json.dumps(path.as_uri())}")
        assert not self.errors

    def run(self, script):
        answer = self.send("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    def wait(self, script):
        for _ in range(1200):
            if self.run(script):
                return
            time.sleep(0.05)
        raise TimeoutError(script)

    def key(self, key, **more):
        more |= {"key": key, "windowsVirtualKeyCode": KEYS.get(key) or ord(key.upper())}
        text = {"Enter": "\r"}.get(key, key if len(key) == 1 else "")
        self.send("Input.dispatchKeyEvent", type="keyDown", text=text, **more)
        self.send("Input.dispatchKeyEvent", type="keyUp", **more)

    def mouse(self, selector, *kinds, across=0.5):
        """Mouse events, such as "Moved", on the first element of a selector, so far across its width."""
        box = self.run(f"document.querySelector({json.dumps(selector)}).getBoundingClientRect().toJSON()")
        for kind in kinds:
            self.send("Input.dispatchMouseEvent", type=f"mouse{kind}", button="left", clickCount=1,
                      x=box["left"] + across * box["width"], y=box["top"] + box["height"] / 2)

    def click(self, selector, **more):
        self.mouse(selector, "Moved", "Pressed", "Released", **more)

    def shown(self):
        return self.run("[...document.querySelectorAll('main .name')].map(one => one.textContent)")


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    browser = Browser(tmp_path_factory.mktemp("profile"))
    yield browser
    browser.send("Browser.close")
    browser.process.wait(60)


@pytest.fixture
def judged(tmp_path, orl, browser):
    """A page as of --evaluate, open: five photos of two classes, two contradicted, one without a face."""
    Image.fromarray(orl["s05_1"]).save(tmp_path / "face.png")
    rows = {"a/1.png": [0.9, 0.1], "a/2.png": [0.45, 0.55], "b/3.png": [0.8, 0.2], "b/4.png": [0.3, 0.7]}
    cards = [Card(name, tmp_path / "face.png", [np.array(row)], "", boxes=[(40, 70, 60, 90)], folder=name[0])
             for name, row in rows.items()]
    cards.append(Card("b/5.png", tmp_path / "face.png", [], "no face found", folder="b"))
    write_page(tmp_path / "page.html", cards, ("a", "b"), "five photos", {"only": "wrong", "order": "sure"})
    browser.open(tmp_path / "page.html")
    return browser


def test_the_page_begins_with_what_is_most_confidently_contradicted(judged):
    assert judged.shown() == ["3.png", "2.png"]
    assert judged.run("[...document.querySelectorAll('main p')].map(one => one.textContent).slice(0, 2)") == [
        "≠ a 80.0% ", "in b"]


def test_cells_of_the_matrix_filter_and_every_order_sorts(judged):
    cells = "[...document.querySelectorAll('table button')].map(one => one.textContent)"
    assert judged.run(cells) == [
        "all 5", "a 2", "b 2", "no face 1", "in a 2", "1", "1", "0", "in b 3", "1", "1", "1"]
    judged.click("table [data-folder='1'][data-guess='0']")
    assert judged.shown() == ["3.png"]
    judged.click("table [data-folder='1'][data-guess='0']")  # a second click takes it back
    assert judged.shown() == ["1.png", "3.png", "4.png", "2.png", "5.png"]  # the most certain first
    judged.click("table [data-folder=''][data-guess='1']")
    judged.run("form.order.value = 'doubt'; form.order.onchange()")
    assert judged.shown() == ["2.png", "4.png"]
    judged.click("table [data-folder='1'][data-guess='']")
    assert judged.shown() == ["4.png", "3.png", "5.png"]
    judged.click("form input[name=only]")
    assert judged.shown() == ["2.png", "3.png"] and judged.run("form.count.value") == "2 of 5"


def test_photos_are_marked_looked_at_and_listed_by_keyboard(judged):
    judged.click("table [data-folder=''][data-guess='']")
    judged.run("form.order.value = ''; form.order.onchange(); document.querySelector('figure').focus()")
    judged.key("ArrowRight")
    judged.key("x")
    judged.key("ArrowRight")
    judged.key("ArrowRight")
    judged.key("x", modifiers=8)  # with Shift: all from the last one to this
    judged.key("ArrowLeft")
    judged.key("x")
    judged.key("Enter")
    assert judged.run("large.open && large.querySelector('span').textContent") == "b/3.png"
    assert judged.run("[...large.querySelectorAll('li')].map(one => one.innerText.replace(/\\s/g, ' '))") == [
        "a 80.0%", "b 20.0%"]
    judged.key("ArrowRight")
    judged.key("ArrowRight")
    judged.key("x")  # the last photo
    judged.key("Escape")
    judged.wait("!large.open && document.activeElement.ariaLabel.startsWith('b/5.png')")
    judged.click("form button[name=list]")
    assert judged.run("names.querySelector('textarea').value") == "a/2.png \\\nb/4.png \\\nb/5.png"
    judged.click("dialog[open] input")
    assert judged.run("names.querySelector('textarea').value") == "a/2.png\nb/4.png\nb/5.png"


def test_only_what_is_in_view_is_built(tmp_path, browser):
    cards = [Card(f"{i}.jpg", None, [[i / 4000, 1 - i / 4000]], "") for i in range(4000)]
    write_page(tmp_path / "page.html", cards, ("a", "b"), "")
    browser.open(tmp_path / "page.html")
    assert browser.shown()[0] == "0.jpg" and len(browser.shown()) < 100
    browser.run("scrollTo(0, 1e9)")
    browser.wait("document.querySelector('main').textContent.includes('3999.jpg')")
    assert len(browser.shown()) < 100


def test_a_face_under_the_mouse_is_marked_in_its_group(model, two_faces, tmp_path, browser):
    main([str(two_faces), "--model", str(model), "--save", str(tmp_path / "out")])
    browser.open(tmp_path / "out" / "index.html")
    browser.wait("document.querySelectorAll('.face').length == 2")
    browser.mouse(".face:last-child", "Moved")
    [place] = browser.run("""[...document.querySelectorAll('.on')].map(one => {
        const area = one.getBoundingClientRect(), photo = one.parentNode.getBoundingClientRect()
        return [area.left - photo.left, area.right - photo.left].map(x => x / photo.width)})""")
    [card] = page_data(tmp_path / "out" / "index.html")["cards"]
    with Image.open(tmp_path / "out" / card["copy"]) as picture:
        assert np.allclose(place, np.array(card["boxes"][1])[[0, 2]] / picture.width, atol=0.01)


def test_a_click_on_the_strip_below_a_video_jumps_there(tmp_path, browser):
    av = pytest.importorskip("av")
    with av.open(str(tmp_path / "a #1.mp4"), "w") as file:
        stream = file.add_stream("libx264", rate=10)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        for i in range(40):
            frame = av.VideoFrame.from_ndarray(np.full((48, 64, 3), 5 * i, np.uint8), "rgb24")
            file.mux(stream.encode(frame))
        file.mux(stream.encode())
    strip = ((0.0, 1.0, 0), (1.0, 3.0, None), (3.0, 4.0, 1))
    card = Card("a.avi", "a #1.mp4", [[0.5, 0.5]], "", strip=strip, seconds=4.0)
    write_page(tmp_path / "page.html", [card], ("a", "b"), "")
    browser.open(tmp_path / "page.html")
    assert browser.run("document.querySelector('video').readyState") == 0  # nothing is loaded before
    browser.click(".strip", across=0.75)
    browser.wait("document.querySelector('video').readyState > 1")
    assert browser.run("document.querySelector('video').currentTime") == pytest.approx(3, abs=0.1)


HOSTILE = ("<script>alert(1)<!--", "\"'>&amp;", "\u5f20\u5634 #50%?")
NAMES = ["\u5f20\u5634 #1 50%.png", "a&lt;b.png", "<b>\"x'.png", "two\nlines\u2028.png", "c:d?e.png",
         "back\\slash.png", "no\udcffutf-8\x1b[2J.png", "\U0001f600 -$HOME.png",
         "script><script>alert(1)<!--.png"]  # in a folder whose name ends in <


@pytest.mark.skipif(sys.platform == "darwin", reason="macOS has no such file names")
def test_the_page_shows_every_photo_and_no_name_breaks_it_or_a_shell(orl, tmp_path, browser):
    net = simpleconv3(3)
    net.classes = HOSTILE
    save_model(net, tmp_path / "hostile.pt")
    folder = tmp_path / "in \udcfe<"
    folder.mkdir()
    for name in NAMES:
        Image.fromarray(orl["s05_1"]).save(tmp_path / "face.png")
        shutil.copy(tmp_path / "face.png", folder / name)
    (folder / "broken.jpg").write_bytes(b"\xff\xd8\xff")
    for flags, page in ((["--save", "out"], "out/index.html"), (["--sort", "sorted"], "sorted.html")):
        flags[1] = str(tmp_path / flags[1])
        main([str(folder), "--model", str(tmp_path / "hostile.pt"), *flags])
        cards = [card for card in page_data(tmp_path / page)["cards"] if "copy" in card]
        assert len(cards) == len(NAMES)
        browser.open(tmp_path / page)
        browser.wait("[...document.images].length > 7 && [...document.images].every(one => one.naturalWidth)")
        assert browser.run("document.scripts.length") == 2
        texts = browser.run("document.querySelector('table').innerText")
        assert all(name in texts for name in HOSTILE)
        browser.click("form button[name=all]")
        browser.click("form button[name=list]")
        listed = browser.run("names.querySelector('textarea').value")
        echo = subprocess.run(["bash", "-c", f"printf '%s\\0' {listed}"], capture_output=True).stdout
        marked = {card["source"] for card in page_data(tmp_path / page)["cards"]}
        assert {os.fsdecode(path) for path in echo.split(b"\0")[:-1]} == marked
        assert "http" not in (tmp_path / page).read_text("utf-8").replace(str(tmp_path), "")


def test_words_cover_no_face_and_no_other_word(orl, tmp_path):
    canvas = np.full((560, 900), 128, np.uint8)
    for i, name in enumerate(("s05_1", "s01_1", "s03_1", "s09_1", "s11_1", "s13_1")):
        x, y = 40 + i % 3 * 290 + 20 * (i > 2), 30 + i // 3 * 250
        canvas[y:y + 112, x:x + 92] = orl[name]
    Image.fromarray(canvas).save(tmp_path / "group.png")
    model = load_model()
    [result] = predict_photos([tmp_path / "group.png"], model)
    assert len(result.faces) == 6
    for least in (0, 360):
        picture = annotate(canvas, result.faces, result.probabilities, model.classes, least)
        before = Image.fromarray(canvas).convert("RGB").resize(picture.size, Image.Resampling.BICUBIC)
        changed = (np.asarray(picture) != np.asarray(before)).any(2)
        scale = picture.width / 900
        for face in result.faces:
            x0, y0, x1, y1 = (round(v * scale) for v in face.mouth)
            changed[y0 - 4:y1 + 5, x0 - 4:x1 + 5] = False  # its outline
        for face in result.faces:
            x0, y0, x1, y1 = (round(v * scale) for v in face.box)
            assert not changed[y0:y1, x0:x1].any()
        assert cv2.connectedComponents(changed.astype(np.uint8))[0] - 1 == 6
