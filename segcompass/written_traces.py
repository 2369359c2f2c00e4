"""Writes the reasoning traces that the cold start learns from: the work of `segcompass write-traces`.

Everything lands in one folder, which the trainers read as a data set: the rows that got a trace, as parquet files that
name their images; what became of each row, as a journal from which an interrupted run goes on; a report and a gallery.
"""

import io
import json
import random
import shutil
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from datasets import Dataset
from PIL import Image
from tqdm import tqdm

from segcompass.gallery import SIDE, sample_figure
from segcompass.journal import Journal
from segcompass.loaders.files import read_json
from segcompass.loaders.identity import rows_digest
from segcompass.loaders.mixing import HELD_OUT, mix_rows, note_held_out, read_parts
from segcompass.loaders.refcoco import SPLIT_BY
from segcompass.loaders.rows import check_reasoning, leave_images_encoded, row_image
from segcompass.loaders.surroundings import Surroundings, masks_alone, read_surroundings
from segcompass.modeling_segcompass.report_page import page, text
from segcompass.modeling_segcompass.whole_files import write_whole
from segcompass.trace_questions import (
    Check,
    clean_trace,
    draw_targets,
    fault_of_boxes,
    fault_of_position,
    fault_of_trace,
    position_question,
    with_thought,
    writing_question,
)
from segcompass.trace_teachers import BackboneTeacher, NoAnswer, ServerTeacher, Teacher
from segcompass.trace_templates import write_trace

UNANSWERED = 2
"""Batches in a row without a single answer after which a run stops."""
SHOWN = 24
"""Kept traces, and as many dropped ones, in the gallery."""


@dataclass
class Writing:
    """Which rows get traces, and from whom.

    Raises:
        ValueError: two teachers, or a server without the name of its model.

    Example:
        report = write_traces(Writing("refcoco", Path("data/traces"), root="REFER", image_dir="train2014"))
        print(report["kept"])
    """

    dataset: str
    """what `mix_rows` takes: one data set."""
    output: Path
    split: str = "train"
    root: str | None = None
    """see `load_rows`, as for the next three."""
    image_dir: str | None = None
    split_by: str | None = None
    unit: str = "sentence"
    num_samples: int | None = None
    """how many rows, drawn by the seed; None takes all."""
    seed: int = 0
    mllm: str | None = None
    """an MLLM to load as the teacher."""
    server: str | None = None
    """address of a server that speaks OpenAI's chat completions."""
    server_model: str | None = None
    """the name under which it serves the model."""
    check: Check = "position"
    """what the teacher must find by its trace, without the drawing: a part of the image, or a box."""
    batch_size: int = 16
    timeout: float = 120.0
    """seconds after which a request to the server is given up."""
    retries: int = 3
    max_tokens: int = 300

    def __post_init__(self):
        if self.mllm and self.server:
            raise ValueError("both --mllm and --server are given; choose who writes the traces.")
        if bool(self.server) != bool(self.server_model):
            raise ValueError(
                f"server is {self.server!r} and server_model {self.server_model!r}; a server needs the name under "
                "which it serves its model, as GET /v1/models lists it."
            )

    def teacher(self) -> Teacher | None:
        """Who is asked; None where annotations say enough."""
        if self.server:
            return ServerTeacher(
                self.server, str(self.server_model), self.batch_size, self.timeout, self.retries, self.max_tokens
            )
        return BackboneTeacher(self.mllm, self.max_tokens) if self.mllm else None


def write_traces(run: Writing) -> dict[str, Any]:
    """Write the traces that are not written yet, then the rows, the report and the gallery.

    Args:
        run: what to write.

    Returns:
        The report: "rows", "kept", "dropped" (by reason), "teacher", ….

    Raises:
        ValueError: rows that cannot be loaded, an output folder of another run, a server that refuses its requests.
        OSError: an unreadable image, whose sample is named, or a server that answers nothing any more; what was
            written before is kept, and the command goes on from there when it is repeated.
    """
    rows = read_rows(run)
    run.output.mkdir(parents=True, exist_ok=True)
    noted = {"dataset": run.dataset, "rows": rows_digest(rows, images=False), "seed": run.seed}
    noted |= {"teacher": run.mllm or run.server_model or "annotations", "check": run.check if _asks(run) else None}
    journal = Journal(run.output / "traces" / run.split, noted)
    names = list(rows["sample_id"])
    left = [number for number, name in enumerate(names) if name not in journal.records]
    unanswered: list[str] = []
    with tqdm(total=len(names), initial=len(names) - len(left), unit="trace", dynamic_ncols=True) as bar:
        for records in (asked if _asks(run) else described)(run, rows, left, unanswered):
            journal.add(records)
            bar.update(len(records))
    return finish(run, rows, names, journal.records, unanswered)


def _asks(run: Writing) -> bool:
    return bool(run.mllm or run.server)


def read_rows(run: Writing) -> Dataset:
    """The rows that get traces, in the order of the data set, images encoded. Raises ValueError or OSError."""
    parts = read_parts(run.dataset)
    if len(parts) != 1 or parts[0].dataset != run.dataset:
        raise ValueError("traces are written for one data set at a time; run the command once for each.")
    named = {name: getattr(run, name) for name in ("root", "image_dir", "split_by", "unit")}
    part = {"dataset": run.dataset, **{name: value for name, value in named.items() if value is not None}}
    rows: Any = mix_rows([part], run.split, run.seed, run.num_samples).rows
    if not isinstance(rows, Dataset):
        raise ValueError(f"{run.dataset!r} streams its rows; save them first (Dataset.save_to_disk).")
    if rows[0]["image"] is None:
        raise ValueError(f"{run.dataset!r} has no images here; give --image-dir.")
    return leave_images_encoded(rows)


# -- from annotations --------------------------------------------------------------------------------------------------


def described(
    run: Writing, rows: Dataset, left: Sequence[int], unanswered: list[str]
) -> Iterator[list[dict[str, Any]]]:
    """Records of rows that annotations describe, in blocks.

    Args:
        run: what to write.
        rows: all rows.
        left: numbers of the rows without a record.
        unanswered: stays as it is.

    Yields:
        A block of records.
    """
    find = find_surroundings(run) if left else masks_alone
    plain = rows.remove_columns("image")
    for start in range(0, len(left), 1000):
        block = [plain[number] for number in left[start : start + 1000]]
        yield [_record(row, _own_trace(row) or write_trace(row, find(row), run.seed)) for row in block]


def find_surroundings(run: Writing) -> Surroundings:
    """What else is in the images, where annotations say so.

    Args:
        run: its data set is one of the RefCOCO family, or a folder that was converted from one.

    Returns:
        A function of rows; for other data sets it knows the masks alone.

    Raises:
        ValueError: an annotation file is damaged.
        OSError: an annotation file is missing.
    """
    name, root, split_by = run.dataset, run.root, run.split_by
    note = Path(run.dataset) / "prepared.json"
    if note.is_file():
        prepared = read_json(note)
        name, root, split_by = prepared["dataset"], run.root or prepared["root"], prepared["split_by"]
    if name in SPLIT_BY and root:
        return read_surroundings(root, name, split_by, run.split)
    return masks_alone


# -- from a teacher ----------------------------------------------------------------------------------------------------


def asked(run: Writing, rows: Dataset, left: Sequence[int], unanswered: list[str]) -> Iterator[list[dict[str, Any]]]:
    """Records of rows that a teacher wrote traces for, batch by batch.

    Args:
        run: what to write.
        rows: all rows.
        left: numbers of the rows without a record.
        unanswered: gets a reason for each row that the teacher did not answer; such a row has no record.

    Yields:
        A batch of records.

    Raises:
        OSError: the teacher answers nothing any more.
    """
    teacher = run.teacher() if left else None
    silent, answered = 0, 0
    for start in range(0, len(left) if teacher else 0, run.batch_size):
        batch = [rows[number] for number in left[start : start + run.batch_size]]
        records, failures = ask_teacher(teacher, batch, run.check)  # type: ignore[arg-type]
        unanswered += failures
        silent, answered = 0 if records else silent + 1, answered + len(records)
        yield records
        if silent == UNANSWERED:
            raise OSError(
                f"the teacher answered none of the last {silent} batches ({failures[-1]}); {len(left) - answered} "
                "rows are without a trace. Repeat the command to go on."
            )


def ask_teacher(teacher: Teacher, batch: Sequence[dict], check: Check) -> tuple[list[dict[str, Any]], list[str]]:
    """Ask for the traces of a batch, and check them.

    Args:
        teacher: who is asked.
        batch: rows.
        check: what the teacher must find by its trace.

    Returns:
        Records of the rows that were answered, and a reason for each of the others.
    """
    records = [_record(row, trace) for row in batch if (trace := _own_trace(row))]
    batch = [row for row in batch if not _own_trace(row)]
    images = [row_image(row) for row in batch]
    if not batch:
        return records, []
    answers = teacher.ask([writing_question(row, image) for row, image in zip(batch, images, strict=True)])
    unanswered = [str(answer) for answer in answers if isinstance(answer, NoAnswer)]
    written = []
    for row, image, answer in zip(batch, images, answers, strict=True):
        if isinstance(answer, NoAnswer):
            continue
        trace = clean_trace(answer)
        if fault := fault_of_trace(trace):
            records.append(_record(row, trace, fault))
        else:
            written.append((row, image, trace))
    if not written:
        return records, unanswered
    for (row, _, trace), checked in zip(written, check_by(teacher, written, check), strict=True):
        if isinstance(checked, NoAnswer):
            unanswered.append(str(checked))
        else:
            records.append(_record(row, trace, *checked))
    return records, unanswered


def check_by(
    teacher: Teacher, written: Sequence[tuple[dict, Image.Image, str]], check: Check
) -> list[tuple[str | None, str] | NoAnswer]:
    """Let a teacher find the targets by its traces, in the plain images.

    Args:
        teacher: who is asked.
        written: rows, images and traces.
        check: what it must find.

    Returns:
        Why it does not find one (None if it does) and its answer, or why there is none.
    """
    if check == "box":
        located = teacher.locate([(image, with_thought(row, trace)) for row, image, trace in written])
        return [
            found if isinstance(found, NoAnswer) else (fault_of_boxes(row, found.text, found.readings), found.text)
            for (row, _, _), found in zip(written, located, strict=True)
        ]
    answers = teacher.ask([(image, position_question(row, trace)) for row, image, trace in written])
    return [
        answer if isinstance(answer, NoAnswer) else (fault_of_position(row, answer), answer)
        for (row, _, _), answer in zip(written, answers, strict=True)
    ]


def _own_trace(row: dict) -> str | None:
    """The trace that a row has already. Raises ValueError when it holds a marker."""
    trace = (row.get("reasoning") or "").strip()
    try:
        check_reasoning(trace)
    except ValueError as error:
        raise ValueError(f"sample {row['sample_id']!r}: {error}") from error
    return trace or None


def _record(row: dict, trace: str, fault: str | None = None, checked: str | None = None) -> dict[str, Any]:
    record = {"sample_id": row["sample_id"], "trace": trace, "dropped": fault}
    if fault is None and (marker := fault_of_marker(trace)):
        record["dropped"] = marker
    return record if checked is None else {**record, "check": checked[:300]}


def fault_of_marker(trace: str) -> str | None:
    """Why a trace from annotations is dropped: its instruction holds a marker. None where it does not."""
    try:
        check_reasoning(trace)
    except ValueError:
        return "it holds a marker of the response's frame"
    return None


# -- results -----------------------------------------------------------------------------------------------------------


def finish(
    run: Writing, rows: Dataset, names: Sequence[str], records: dict[str, dict], unanswered: Sequence[str]
) -> dict[str, Any]:
    """Write SPLIT-00000-of-00001.parquet, SPLIT.json, the report and the gallery.

    Args:
        run: what was written.
        rows: all rows.
        names: their sample ids.
        records: what became of those that were done.
        unanswered: why others were not.

    Returns:
        The report.

    Raises:
        ValueError: no trace was kept.
        OSError: a file that cannot be written.
    """
    done = [number for number, name in enumerate(names) if name in records]
    kept = [number for number in done if not records[names[number]]["dropped"]]
    dropped = [number for number in done if records[names[number]]["dropped"]]
    report = {
        "dataset": run.dataset,
        "split": run.split,
        "teacher": run.mllm or run.server_model or "annotations",
        "rows": len(rows),
        "kept": len(kept),
        "dropped": dict(Counter(records[names[number]]["dropped"] for number in dropped).most_common()),
        "not answered": len(rows) - len(done),
        "last failure": unanswered[-1] if unanswered else None,
    }
    write_whole(run.output / f"{run.split}-report.json", json.dumps(report, indent=2) + "\n")
    write_gallery(run, rows, records, names, kept, dropped)
    if not kept:
        raise ValueError(f"no trace was kept: {report}. {run.output}/{run.split}-gallery.html shows what was written.")
    save_rows(run, rows, [(number, records[names[number]]["trace"]) for number in kept])
    return report


def save_rows(run: Writing, rows: Dataset, kept: Sequence[tuple[int, str]]) -> None:
    """Write the rows with their traces; images stay where they are, and those without a file are embedded.

    Args:
        run: what was written.
        rows: all rows.
        kept: (number of a row, its trace).
    """
    arrow = rows.with_format("arrow")

    def write(path):
        with pq.ParquetWriter(path, rows.features.arrow_schema) as writer:
            for start in range(0, len(kept), 1000):
                numbers, traces = zip(*kept[start : start + 1000], strict=True)
                table = arrow[list(numbers)]
                place = table.schema.get_field_index("reasoning")
                writer.write_table(table.set_column(place, "reasoning", pa.array(traces, pa.string())))

    write_whole(run.output / f"{run.split}-00000-of-00001.parquet", write)
    write_whole(run.output / f"{run.split}.json", json.dumps({"rows": len(kept)}, indent=2) + "\n")
    if run.dataset in SPLIT_BY:
        note_held_out(run.output, run.dataset, str(run.root), run.split_by)
    elif (beside := Path(run.dataset) / HELD_OUT).is_file():
        shutil.copyfile(beside, run.output / HELD_OUT)


def write_gallery(
    run: Writing,
    rows: Dataset,
    records: dict[str, dict],
    names: Sequence[str],
    kept: Sequence[int],
    dropped: Sequence[int],
) -> None:
    """Write SPLIT-gallery.html: kept and dropped traces beside their images, chosen by chance.

    Args:
        run: what was written.
        rows: all rows.
        records: what became of them.
        names: their sample ids.
        kept: numbers of rows.
        dropped: numbers of rows.
    """
    sections = ""
    for title, numbers in (("Kept", kept), ("Dropped", dropped)):
        chosen = sorted(random.Random(0).sample(list(numbers), min(SHOWN, len(numbers))))
        cards = "".join(_card(rows[number], records[names[number]]) for number in chosen)
        sections += f"<h2>{title}, {len(numbers):,}</h2><div class='grid'>{cards}</div>"
    title = f"Traces of {run.dataset} {run.split}, by {run.mllm or run.server_model or 'annotations'}"
    legend = "The red line is around the target; whoever checks a trace sees the image without it."
    write_whole(run.output / f"{run.split}-gallery.html", page(title, sections, legend))


def _card(row: dict, record: dict) -> str:
    image = draw_targets(row_image(row), row["masks"], rim=(255, 255, 255))
    image.thumbnail((SIDE, SIDE))
    file = io.BytesIO()
    image.save(file, format="JPEG", quality=85)
    lines = [f"<code>{text(record['sample_id'])}</code>", f"<strong>{text(row['instruction'])}</strong>"]
    lines.append(f"{len(row['masks']) or 'no'} target{'' if len(row['masks']) == 1 else 's'}")
    lines.append(f"<em>{text(record['trace'])}</em>")
    if record["dropped"]:
        lines.append(f"dropped: {text(record['dropped'])}")
    if record.get("check"):
        lines.append(f"checked: {text(record['check'])}")
    return sample_figure(file.getvalue(), row["instruction"], lines)
