"""Draws an evaluation's best, worst and random samples into one HTML page that needs no other file."""

import base64
import io
import random
from html import escape
from pathlib import Path

import numpy as np
from datasets import Dataset
from PIL import Image

from segcompass.loaders.masks import decode_mask
from segcompass.loaders.reasoning_segmentation.reasoning_segmentation import sample_iou
from segcompass.loaders.rows import row_image
from segcompass.modeling_segcompass.whole_files import write_whole

PREDICTED, WANTED, IGNORED = (255, 140, 0), (0, 200, 255), (128, 128, 128)
SIDE = 320

PAGE = """<!doctype html><html lang="en"><meta charset="utf-8"><title>{title}</title><style>
body {{ font: 15px/1.4 system-ui, sans-serif; margin: 2rem; max-width: 90rem; }}
section {{ display: grid; grid-template-columns: repeat(auto-fill, minmax(20rem, 1fr)); gap: 1.5rem; }}
figure {{ margin: 0; }} img {{ width: 100%; image-rendering: auto; }} figcaption {{ overflow-wrap: anywhere; }}
code {{ color: #555; }} b.swatch {{ display: inline-block; width: 1em; height: 1em; vertical-align: -.1em; }}
</style><h1>{title}</h1><p>{legend}</p>{sections}</html>
"""


def write_gallery(path: Path, rows: Dataset, records: list[dict], protocol: str, title: str, count: int = 12) -> None:
    """Write the page.

    Args:
        path: the HTML file.
        rows: with the columns image, masks, ignore, instruction.
        records: of the same samples in the same order, with "slots" and pixel counts.
        protocol: whose IoU ranks them; samples it leaves out are not shown among best and worst.
        title: heading.
        count: samples per section.
    """
    ious = {index: sample_iou(record, protocol) for index, record in enumerate(records)}
    ranked = sorted((i for i in ious if ious[i] is not None), key=lambda i: (ious[i], records[i]["U"]))
    drawn = random.Random(0).sample(range(len(records)), min(count, len(records)))
    chosen = {"Best": ranked[::-1][:count], "Worst": ranked[:count], "Random": sorted(drawn)}
    sections = "".join(
        f"<h2>{name}</h2><section>{''.join(_card(rows[i], records[i], ious[i]) for i in indices)}</section>"
        for name, indices in chosen.items()
    )
    names = {"predicted": PREDICTED, "wanted (outline)": WANTED, "ignored": IGNORED}
    legend = " &nbsp; ".join(
        f'<b class="swatch" style="background: rgb{colour}"></b> {name}' for name, colour in names.items()
    )
    write_whole(path, PAGE.format(title=escape(title), legend=legend, sections=sections))


def _card(row: dict, record: dict, iou: float | None) -> str:
    """One sample as an HTML figure."""
    verdict = "left out by the protocol" if iou is None else f"IoU {iou:.3f}"
    scores = ", ".join(f"{slot['score']:.2f}" for slot in record["slots"] if "score" in slot)
    lines = [
        f"<strong>{verdict}</strong> <code>{escape(record['sample_id'])}</code>",
        escape(row["instruction"]),
        f"<em>{escape(record.get('text') or '')}</em>",
        f"{len(record['slots'])} masks" + (f", confidence {scores}" if scores else ""),
    ]
    picture = base64.b64encode(_picture(row, record)).decode("ascii")
    image = f'<img alt="{escape(row["instruction"])}" src="data:image/jpeg;base64,{picture}">'
    return f"<figure>{image}<figcaption>{'<br>'.join(lines)}</figcaption></figure>"


def _picture(row: dict, record: dict) -> bytes:
    """JPEG bytes of the image under its masks."""
    height, width = row["height"], row["width"]
    scale = SIDE / max(height, width)
    size = (max(1, round(width * scale)), max(1, round(height * scale)))

    def shown(rles):
        mask = Image.fromarray(decode_mask(rles, height, width))
        return np.asarray(mask.resize(size, Image.Resampling.NEAREST))

    pixels = np.asarray(row_image(row).resize(size), dtype=np.float32)
    predicted = shown([slot["segmentation"] for slot in record["slots"]])
    ignored = shown([row["ignore"]] if row.get("ignore") else [])
    for mask, colour in ((ignored, IGNORED), (predicted, PREDICTED)):
        pixels = np.where(mask[..., None], 0.5 * pixels + 0.5 * np.array(colour, np.float32), pixels)
    pixels[_outline(shown(row["masks"]))] = WANTED
    file = io.BytesIO()
    Image.fromarray(pixels.astype(np.uint8)).save(file, format="JPEG", quality=85)
    return file.getvalue()


def _outline(mask: np.ndarray) -> np.ndarray:
    """The pixels of a mask that touch its outside, two pixels wide."""
    inner = mask
    for _ in range(2):
        padded = np.pad(inner, 1)
        inner = inner & padded[:-2, 1:-1] & padded[2:, 1:-1] & padded[1:-1, :-2] & padded[1:-1, 2:]
    return mask & ~inner
