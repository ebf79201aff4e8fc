import re

import numpy as np
import pytest
from conftest import ROOT
from PIL import Image

from net import save_model, simpleconv3

READMES = {path.name: path.read_text("utf-8") for path in sorted(ROOT.glob("README*.md"))}


def blocks(text):
    """Fenced blocks without what follows a number sign: comments are in the reader's language."""
    return [
        [line.split("#")[0].rstrip() for line in block.splitlines()]
        for block in re.findall(r"^```.*?^```", text, re.S | re.M)
    ]


def table_figures(text):
    """For every row of a table the figures and code in it, sorted: languages put them in different places."""
    rows = [line for line in text.splitlines() if line.startswith("|")]
    return [sorted(re.findall(r"`[^`]*`|\d+(?:[.,]\d+)*", row)) for row in rows]


def test_the_two_languages_link_to_each_other():
    assert "(README.zh-CN.md)" in READMES["README.md"] and "(README.md)" in READMES["README.zh-CN.md"]


def test_the_two_languages_show_the_same_commands_and_code():
    assert blocks(READMES["README.md"]) == blocks(READMES["README.zh-CN.md"]) != []


def test_the_two_languages_give_the_same_figures_in_their_tables():
    assert table_figures(READMES["README.md"]) == table_figures(READMES["README.zh-CN.md"]) != []


@pytest.mark.parametrize("name", READMES)
def test_files_that_a_readme_links_to_exist(name):
    targets = re.findall(r"\]\(([^)#:]+)\)", READMES[name])
    assert targets and all((ROOT / target).exists() for target in targets)


@pytest.mark.parametrize(
    "script", ["net.py", "preprocess_lips.py", "split_train_val.py", "train.py", "predict.py"]
)
def test_help_fits_a_screen_and_ends_with_examples(inside, monkeypatch, script):
    monkeypatch.setenv("COLUMNS", "100")
    out = inside(script, "--help").stdout
    examples = [line for line in out.split("\n\n")[-1].splitlines()[1:] if f" {script}" in line]
    assert len(out.splitlines()) <= 45 and len(examples) >= 2


def test_options_that_the_readme_shows_exist(inside):
    shown = set(re.findall(r"python (\w+\.py)([^\n`#]*)", READMES["README.md"]))
    for script in {script for script, _ in shown if (ROOT / script).exists()}:
        known = inside(script, "--help").stdout
        for option in (
            option for one, rest in shown if one == script for option in re.findall(r"--[\w-]+", rest)
        ):
            assert option in known, (script, option)


def test_the_python_example_names_the_mouths_of_a_photo(orl, tmp_path, monkeypatch, capsys):
    code = next(
        block
        for block in re.findall(r"```python\n(.*?)```", READMES["README.md"], re.S)
        if "LipCropper" in block
    )
    save_model(simpleconv3(4), tmp_path / "models" / "model.pt")
    Image.fromarray(np.repeat(sorted(orl.items())[0][1][..., None], 3, 2)).save(tmp_path / "photo.jpg")
    monkeypatch.chdir(tmp_path)
    exec(code, {})
    assert re.fullmatch(r"\(\d+, \d+, \d+, \d+\) \d\w+ 0\.\d+\n", capsys.readouterr().out)
