"""The page docs/own_data.md, run as it stands, in an empty folder; and each command of docs/reproduce.md is one."""

import json
import re
import shlex
from pathlib import Path

import numpy as np
import pycocotools.mask
import pytest
import yaml
from PIL import Image

from segcompass import cli
from segcompass.loaders import load_rows
from segcompass.modeling_segcompass.images import read_image
from segcompass.recipes import find_recipe
from segcompass.shipped import EXAMPLES

DOCS = Path(__file__).parents[1] / "docs"


def blocks(page):
    """(marker, language, code) of the marked code blocks of a page."""
    text = (DOCS / page).read_text(encoding="utf-8")
    return re.findall(r"^<!-- (.+?) -->\n```(\w+)\n(.*?)^```", text, re.M | re.S)


def commands(code):
    """The words of each command of a block."""
    return [shlex.split(line) for line in code.replace("\\\n", " ").splitlines() if line.strip()]


def test_the_page_runs_as_it_stands(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "examples").symlink_to(EXAMPLES)
    ran = 0
    for marker, language, code in blocks("own_data.md"):
        if not marker.startswith("run"):
            assert marker.startswith("not run here: needs")
            continue
        if language == "python":
            exec(compile(code, "own_data.md", "exec"), {})
        else:
            for program, *words in commands(code):
                assert program == "segcompass"
                cli.main(words)
                ran += 1
        printed = capsys.readouterr().out
        if expected := re.search("expect: (.+)", marker):
            assert expected[1] in printed
    assert ran == 9
    assert (tmp_path / "runs" / "mine-val" / "gallery.html").is_file()
    assert (tmp_path / "data" / "mine-traces" / "train-gallery.html").is_file()


def photographs(folder):
    """Photographs as people have them, a bright square in each, with its mask in a form of its own: the lines."""
    exif = Image.Exif()
    exif[0x0112] = 6
    lines = []
    for number, (name, size, change, options) in enumerate(
        [
            ("Küche am Morgen.JPG", (90, 160), lambda im: im.transpose(Image.Transpose.ROTATE_90), {"exif": exif}),
            ("24 MP (2).jpg", (6000, 4000), lambda im: im, {}),
            ("grau.jpeg", (120, 80), lambda im: im.convert("L"), {}),
            ("print cmyk.jpg", (120, 80), lambda im: im.convert("CMYK"), {}),
            ("scan.png", (120, 80), lambda im: Image.fromarray(np.array(im.convert("L")).astype(np.uint16) * 257), {}),
            ("durchsichtig.png", (120, 80), lambda im: im.convert("RGBA"), {}),
            ("猫 #1.webp", (120, 80), lambda im: im, {"lossless": True}),
        ]
    ):
        width, height = size
        box = (width // 4, height // 2, width // 2, height - height // 8)
        shown = Image.new("RGB", size, (40, 60, 50))
        shown.paste((250, 240, 230), box)
        change(shown).save(folder / name, **options)
        mask = np.zeros((height, width), dtype=bool)
        mask[box[1] : box[3], box[0] : box[2]] = True
        rle = pycocotools.mask.encode(np.asfortranarray(mask.astype(np.uint8)))
        rle["counts"] = rle["counts"].decode()
        Image.fromarray(mask).save(folder / f"Maske {number}.png")
        corners = [box[0], box[1], box[2], box[1], box[2], box[3], box[0], box[3]]
        form = ({"rle": rle}, {"mask": f"Maske {number}.png"}, {"polygons": [corners]})[number % 3]
        lines.append({"image": name, "instruction": "das helle Feld", "split": "train", **form})
    return lines


def test_photographs_as_people_have_them(tmp_path, monkeypatch, capsys):
    (tmp_path / "meine Fotos").mkdir()
    monkeypatch.chdir(tmp_path)
    lines = photographs(tmp_path / "meine Fotos")
    text = "\n".join(json.dumps(line, ensure_ascii=False) for line in lines)
    (tmp_path / "meine Fotos" / "meine.jsonl").write_text(text, encoding="utf-8")
    cli.main(["prepare-data", "meine Fotos/meine.jsonl", "--split", "train", "--output", "data/meine"])
    table = [line.split() for line in capsys.readouterr().out.splitlines()[-2:]]
    assert table[0][:3] == ["split", "rows", "images"] and table[1][:3] == [
        "train",
        "7",
        "7",
    ]  # no refs: nobody made any
    rows = load_rows("data/meine", "train", num_samples=None)
    assert list(rows["image_id"]) == [line["image"] for line in lines]
    for row in rows:
        grey = np.asarray(read_image(row["image"]).convert("L"))
        (rle,) = row["masks"]
        inside = pycocotools.mask.decode(rle).astype(bool)
        assert grey.shape == inside.shape == (row["height"], row["width"])
        assert ((grey > 128) == inside).mean() > 0.999, row["image_id"]  # JPEG blurs the edge by a pixel at most


@pytest.mark.parametrize("page", ["own_data.md", "reproduce.md"])
def test_commands_that_are_not_run_name_recipes_and_commands_that_exist(page):
    unmarked = re.findall(r"(?<! -->)\n```bash", (DOCS / page).read_text(encoding="utf-8"))
    assert not unmarked, "each block of commands says whether it is run"
    found = 0
    for marker, language, code in blocks(page):
        if language != "bash" or marker.startswith("run"):
            continue
        for words in commands(code):
            if "segcompass" not in words:
                assert words[0] in ("for", "done")
                continue
            words = words[words.index("segcompass") + 1 :]
            name = " ".join(words[: 2 if words[0] == "train" else 1])
            assert name in cli.COMMANDS, name
            found += 1
            for option in ("--config", "--recipe"):
                if option in words:
                    recipe = words[words.index(option) + 1].replace("MODEL", "llava-1.5-7b")
                    assert yaml.safe_load(find_recipe(recipe).read_text())
    assert found >= 3
