"""Draws an evaluation's best, worst and random samples into one HTML page that needs no other file."""

import base64
import io
import random
from pathlib import Path

import numpy as np
from datasets import Dataset
from PIL import Image

from segcompass.loaders.masks import decode_mask
from segcompass.loaders.reasoning_segmentation.reasoning_segmentation import sample_iou
from segcompass.loaders.rows import row_image
from segcompass.modeling_segcompass.palette import IGNORED, PREDICTED, WANTED
from segcompass.modeling_segcompass.report_page import page, text
from segcompass.modeling_segcompass.whole_files import write_whole

SIDE = 320


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
        f"<h2>{name}</h2><div class='grid'>{''.join(_card(rows[i], records[i], ious[i]) for i in indices)}</div>"
        for name, indices in chosen.items()
    )
    names = {"predicted": PREDICTED, "wanted (outline)": WANTED, "ignored": IGNORED}
    legend = " &nbsp; ".join(
        f'<span class="swatch" style="background: rgb{colour}"></span> {name}' for name, colour in names.items()
    )
    write_whole(path, page(title, sections, legend))


def _card(row: dict, record: dict, iou: float | None) -> str:
    """One sample as an HTML figure."""
    verdict = "left out by the protocol" if iou is None else f"IoU {iou:.3f}"
    scores = ", ".join(f"{slot['score']:.2f}" for slot in record["slots"] if "score" in slot)
    count = len(record["slots"])
    lines = [
        f"<strong>{verdict}</strong> <code>{text(record['sample_id'])}</code>",
        text(row["instruction"]),
        f"<em>{text(record.get('text') or '')}</em>",
        f"{count} mask{'s' * (count != 1)}" + (f", confidence {scores}" if scores else ""),
    ]
    return sample_figure(_picture(row, record), row["instruction"], lines)


def sample_figure(jpeg: bytes, instruction: str, lines: list[str]) -> str:
    """A sample's picture above what is said of it, for a `grid` of the page.

    Args:
        jpeg: the picture.
        instruction: what was asked, for those who cannot see the picture.
        lines: markup, whose texts are escaped.

    Returns:
        Markup.
    """
    link = f"data:image/jpeg;base64,{base64.b64encode(jpeg).decode('ascii')}"
    caption = "<br>".join(lines)
    return f'<figure><img alt="{text(instruction)}" src="{link}"><figcaption>{caption}</figcaption></figure>'


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
