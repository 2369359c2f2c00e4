"""Damage to every kind of file, read by every public loader: nothing may load as other content without a word.

    python benchmarks/reliability/corruption.py [--quick]

A whole folder of each kind is made and, where the project does not do so by itself, signed as
`segcompass verify --sign` does. Then one of its files at a time is cut, emptied, deleted, overwritten, lengthened,
exchanged with another, or has a bit turned over, in its head and in its data; numbers become NaN, of another type or
shape, under a signature that fits. The loader reads the folder in a child process with limits. Silent is what loads,
differs from the whole, and neither an error nor a warning names the file (for damage under a fitting signature: what
loads and differs at all).
Keys of RESULT: corrupt_cases, corrupt_silent, errors, errors_naming_file, hangs, crashes, and by_kind.
"""

import hashlib
import json
import logging
import random
import shutil
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import numpy as np  # noqa: E402
import torch  # noqa: E402
from PIL import Image  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402

from benchmarks.reliability import writers  # noqa: E402
from benchmarks.reliability.children import each_in_child, options, say  # noqa: E402
from segcompass.journal import Journal  # noqa: E402
from segcompass.loaders import load_rows  # noqa: E402
from segcompass.loaders.identity import rows_digest  # noqa: E402
from segcompass.modeling_segcompass import SegCompassModel, SegCompassProcessor, SparseAutoencoder  # noqa: E402
from segcompass.modeling_segcompass.manifest import MANIFEST, sign  # noqa: E402
from segcompass.predictions import read_predictions  # noqa: E402
from segcompass.trainers.activation_cache import CachedActivations  # noqa: E402
from segcompass.trainers.checkpoints import whole_checkpoint  # noqa: E402
from segcompass.trainers.image_features import ImageFeatures  # noqa: E402
from segcompass.white_box import ConceptDictionary  # noqa: E402
from segcompass.white_box.concept_dictionary import ConceptEntry, Context  # noqa: E402
from tests.support.refer import ref, write_images, write_instances  # noqa: E402


@dataclass
class Kind:
    """A folder of one kind: how it is made and read, and how many cases each of its files gets."""

    make: Callable[[Path], Any]
    load: Callable[[Path], str]
    """a hash of everything that was read."""
    files: tuple[str, ...] = ("*",)
    """patterns of the files to damage."""
    cases: int = 40
    """for each file, in the full form."""


def digest(*parts: Any) -> str:
    """A hash of tensors, arrays, texts and plain data."""
    found = hashlib.sha256()
    for part in parts:
        if torch.is_tensor(part):
            part = part.detach().contiguous()
            found.update(f"{part.dtype} {tuple(part.shape)}".encode())
            found.update(part.reshape(-1).view(torch.uint8).numpy().tobytes())
        else:
            found.update(json.dumps(part, sort_keys=True, default=str).encode())
    return found.hexdigest()


# -- kinds -------------------------------------------------------------------------------------------------------------


def load_model(folder: Path) -> str:
    """Weights, configuration, tokens and settings of a model and its processor."""
    model, processor = SegCompassModel.from_pretrained(folder), SegCompassProcessor.from_pretrained(folder)
    state = [part for item in sorted(model.state_dict().items()) for part in item]
    fields = model.config.to_dict() | {"_name_or_path": None}
    tokens = processor.tokenizer("<think>a mug, by 2</think><REF_POS>", add_special_tokens=False)["input_ids"]
    return digest(*state, fields, processor.to_dict(), processor.chat_template, tokens, processor.tokenizer.get_vocab())


def make_sae(folder: Path, theirs: bool = False) -> None:
    """An autoencoder, in our layout or SAELens's."""
    writers.converted_sae(folder / "both")
    shutil.copytree(folder / "both" / ("theirs" if theirs else "ours"), folder, dirs_exist_ok=True)
    shutil.rmtree(folder / "both")
    if not (folder / MANIFEST).exists():
        sign(folder)


def load_sae(folder: Path, theirs: bool = False) -> str:
    """Weights and configuration of an autoencoder."""
    sae = SparseAutoencoder.from_saelens(folder) if theirs else SparseAutoencoder.from_pretrained(folder)
    state = [part for item in sorted(sae.state_dict().items()) for part in item]
    return digest(*state, sae.config.to_dict() | {"_name_or_path": None})


def make_dictionary(folder: Path) -> None:
    """A dictionary of four concepts in an examination's folder, which is not signed."""
    context = Context("sample-1", 1.5, "response", "mug", "a mug by")
    kinds = {"image patch": 0.5, "instruction": 0.25, "response": 0.25}
    entries = [ConceptEntry(number, f"mug {number}", 0.1, 1.0 + number, kinds, [context]) for number in range(4)]
    ConceptDictionary(entries, 100, "scenes").save_pretrained(folder)


def load_dictionary(folder: Path) -> str:
    """A dictionary's entries."""
    dictionary = ConceptDictionary.from_pretrained(folder)
    if dictionary is None:
        raise FileNotFoundError(f"{folder} holds no concepts.json")
    return digest([entry.__dict__ for entry in dictionary.entries], dictionary.tokens, dictionary.source)


def make_checkpoint(folder: Path) -> None:
    """A checkpoint of the autoencoder's trainer."""
    writers.run_quietly("sae", folder / "run")
    shutil.copytree(folder / "run" / "checkpoint-2", folder, dirs_exist_ok=True)
    shutil.rmtree(folder / "run")


def load_checkpoint(folder: Path) -> str:
    """Whether a training would resume from it, and from what."""
    whole_checkpoint(str(folder), None)
    return digest({path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.glob("*")})


def load_cache(folder: Path) -> str:
    """All hidden states of a cache."""
    return digest(*(part for batch in CachedActivations(folder, 32, 64, 256) for part in batch))


def load_features(folder: Path) -> str:
    """All features of a cache."""
    features = ImageFeatures(folder, "an-encoder")
    pictures = [row["image"] for row in writers._pictures(8)]
    return digest(*features.inputs(pictures).values())


def make_journal(folder: Path) -> None:
    """A journal of twelve items."""
    writers.run_quietly("journal", folder)


def load_journal(folder: Path) -> str:
    """The items with which a resumed examination ends: lines that are lost are measured again."""
    writers.run_quietly("journal", folder)
    return digest(Journal(folder, {"run": 1}).records)


def make_predictions(folder: Path) -> None:
    """An evaluation's predictions."""
    writers.run_quietly("evaluate", folder / "run")
    shutil.copyfile(folder / "run" / "predictions.jsonl", folder / "predictions.jsonl")
    shutil.rmtree(folder / "run")


def load_predictions(folder: Path) -> str:
    """The predictions that would be scored."""
    names = json.loads((Path(writers.WORK["folder"]) / "names.json").read_text())
    return digest(read_predictions(folder / "predictions.jsonl", names))


def make_prepared(folder: Path) -> None:
    """A converted data set."""
    writers.run_quietly("prepare", folder)


def read_all(dataset: str, **options: Any) -> str:
    """All rows of a data set, with their images."""
    rows = load_rows(dataset, num_samples=None, **options)
    return digest(rows_digest(rows), [rows[name] for name in ("reasoning", "height", "width", "kind")])


def make_jsonl(folder: Path) -> None:
    """Data of one's own, signed."""
    lines = []
    for number in range(3):
        Image.new("RGB", (28, 28), (10 * number, 90, 10)).save(folder / f"{number}.png")
        mask = np.zeros((28, 28), np.uint8)
        mask[3:9, 4:20] = 255
        Image.fromarray(mask).save(folder / f"mask{number}.png")
        lines.append({"image": f"{number}.png", "instruction": f"find mug {number}", "mask": f"mask{number}.png"})
    (folder / "mine.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    sign(folder)


def make_refer(folder: Path) -> None:
    """RefCOCO's original files, signed."""
    import pickle

    write_instances(folder / "refcoco")
    write_images(folder / "train2014")
    refs = [ref(1, 10, ["the left one", "left"]), ref(2, 11, ["a cup"]), ref(3, 14, ["it"])]
    (folder / "refcoco" / "refs(unc).p").write_bytes(pickle.dumps(refs))
    sign(folder)


def load_refer(folder: Path) -> str:
    """RefCOCO's rows."""
    return read_all("refcoco", split="val", root=folder, image_dir=folder / "train2014")


def make_reasonseg(folder: Path) -> None:
    """ReasonSeg's original files, signed."""
    for name in ("a", "b"):
        (folder / "val").mkdir(exist_ok=True, parents=True)
        Image.new("RGB", (32, 24), (9, 90, 10)).save(folder / "val" / f"{name}.jpg")
        shapes = [{"label": "target", "points": [[2, 2], [12, 2], [12, 9], [2, 9]], "shape_type": "polygon"}]
        content = {"text": ["the thing"], "is_sentence": True, "shapes": shapes}
        (folder / "val" / f"{name}.json").write_text(json.dumps(content))
    sign(folder)


def load_reasonseg(folder: Path) -> str:
    """ReasonSeg's rows."""
    return read_all("reasonseg", split="val", root=folder)


KINDS = {
    "model": Kind(writers.saved_model, load_model, cases=60),
    "sae": Kind(make_sae, load_sae, cases=100),
    "saelens": Kind(partial(make_sae, theirs=True), partial(load_sae, theirs=True), cases=80),
    "dictionary": Kind(make_dictionary, load_dictionary, cases=200),
    "checkpoint": Kind(make_checkpoint, load_checkpoint, cases=40),
    "activation_cache": Kind(writers.activation_cache, load_cache, ("*.json", "*.safetensors"), cases=30),
    "feature_cache": Kind(writers.feature_cache, load_features, ("*.json", "*.npy"), cases=40),
    "journal": Kind(make_journal, load_journal, ("*.json*",), cases=200),
    "predictions": Kind(make_predictions, load_predictions, cases=200),
    "prepared": Kind(make_prepared, lambda folder: read_all(str(folder), split="train"), cases=50),
    "jsonl": Kind(make_jsonl, lambda folder: read_all(str(folder / "mine.jsonl"), split="train"), cases=40),
    "refer": Kind(make_refer, load_refer, ("refcoco/*", MANIFEST), cases=60),
    "reasonseg": Kind(make_reasonseg, load_reasonseg, ("val/*", MANIFEST), cases=50),
}


# -- damage ------------------------------------------------------------------------------------------------------------


def damages(whole: bytes, others: list[bytes], draw: random.Random, count: int) -> Iterator[tuple[str, bytes | None]]:
    """Kinds of damage to one file, in an order that begins with one of each.

    Args:
        whole: the file.
        others: contents of the folder's other files.
        draw: where and what.
        count: how many.

    Yields:
        (what was done, the damaged content; None for a file that is gone).
    """
    head = min(len(whole), 200)

    def flip(place):
        return whole[:place] + bytes([whole[place] ^ 1 << draw.randrange(8)]) + whole[place + 1 :]

    def overwritten():
        place, size = draw.randrange(len(whole)), draw.choice((1, 16, 64))
        return whole[:place] + draw.randbytes(min(size, len(whole) - place)) + whole[place + size :]

    ways: list[tuple[str, Callable[[], bytes | None]]] = [
        ("a bit in its head", lambda: flip(draw.randrange(head))),
        ("a bit", lambda: flip(draw.randrange(len(whole)))),
        ("cut", lambda: whole[: draw.randrange(1, len(whole))]),
        ("overwritten", overwritten),
        ("gone", lambda: None),
        ("empty", lambda: b""),
        ("another file", lambda: draw.choice(others) if others else b"{}"),
        ("lengthened", lambda: whole + draw.randbytes(draw.choice((1, 8, 100)))),
        ("twice", lambda: whole + whole),
        ("zeros", lambda: bytes(len(whole))),
        ("a digit", lambda: _other_digit(whole, draw)),
        ("its line ends", lambda: whole.replace(b"\n", b"\r\n")),
    ]
    often = ways[:4] + [ways[10]]
    for number in range(count):
        name, way = ways[number] if number < len(ways) else often[number % len(often)]
        damaged = way() if whole else b"x"
        if damaged != whole:
            yield name, damaged


def _other_digit(whole, draw):
    """Another digit for one of a text's, so that it stays well formed."""
    places = [place for place, byte in enumerate(whole) if 48 <= byte < 58] if len(whole) < 1 << 20 else []
    if not places:
        return whole
    place = draw.choice(places)
    return whole[:place] + bytes([48 + (whole[place] - 47) % 10]) + whole[place + 1 :]


def under_a_fitting_signature(folder: Path) -> Iterator[tuple[str, str, Callable[[Path], None]]]:
    """Weights that no model of ours can have, in a folder that is then signed: (file, what, how)."""
    for path in sorted(folder.glob("*.safetensors")):
        tensors = load_file(path)
        names = [name for name, value in tensors.items() if value.is_floating_point() and value.numel() > 1]

        def changed(how, name, place, path=path):
            def change(copy):
                found = load_file(copy / path.name)
                value = found.pop(name)
                if how in ("NaN", "infinity"):
                    value.view(-1)[place % value.numel()] = float("nan" if how == "NaN" else "inf")
                    found[name] = value
                elif how == "whole numbers":
                    found[name] = value.to(torch.int32)
                elif how == "another shape":
                    found[name] = value.reshape(-1)[:-1].clone()
                elif how == "another name":
                    found[f"{name}_"] = value
                save_file(found, copy / path.name, {"format": "pt"})
                sign(copy)

            return change

        ways = ("NaN", "infinity", "whole numbers", "another shape", "another name", "absent")
        for number in range(12):
            name = names[number * 7 % len(names)]
            how = ways[number % len(ways)]
            yield path.name, f"{how} ({name})", changed(how, name, number * 31)


# -- reading -----------------------------------------------------------------------------------------------------------


class _Heard(logging.Handler):
    def __init__(self):
        super().__init__()
        self.text = ""

    def emit(self, record):
        self.text += record.getMessage() + "\n"


def listen(load: Callable[[Path], str], folder: Path) -> tuple[str | None, str, str]:
    """(hash of what was read or None, the error, everything that was warned)."""
    heard = _Heard()
    loggers = [logging.getLogger(), logging.getLogger("transformers")]
    for logger in loggers:
        logger.addHandler(heard)
    found, error = None, ""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            found = load(folder)
        except MemoryError:
            raise
        except BaseException as failure:
            error = f"{type(failure).__name__}: {failure} {' '.join(getattr(failure, '__notes__', ()))}"
    for logger in loggers:
        logger.removeHandler(heard)
    return found, error, heard.text + "\n".join(str(each.message) for each in caught)


def judge(file: str, whole: str, heard: tuple[str | None, str, str], fitting: bool) -> dict[str, Any]:
    """What a case shows."""
    found, error, warned = heard
    if error:
        return {"verdict": "error", "named": Path(file).name in error + warned, "said": error[:300]}
    if found == whole:
        return {"verdict": "the same"}
    if Path(file).name in warned and not fitting:
        return {"verdict": "warned"}
    return {"verdict": "SILENT", "said": warned[:300]}


def examine(name: str, kind: Kind, work: Path, journal: Journal, quick: bool, end: float) -> None:
    """All cases of a kind.

    Args:
        name: of the kind.
        kind: how it is made and read.
        work: folder to work in.
        journal: of the cases.
        quick: few cases.
        end: when to stop, on the monotonic clock.
    """
    source, copy = work / name / "whole", work / name / "copy"
    source.mkdir(parents=True)
    kind.make(source)
    if name == "predictions":
        lines = (source / "predictions.jsonl").read_text().splitlines()
        names = [json.loads(line)["sample_id"] for line in lines]
        (Path(writers.WORK["folder"]) / "names.json").write_text(json.dumps(names))
    shutil.copytree(source, copy)
    ((_, outcome),) = each_in_child([("", lambda: listen(kind.load, copy))], 120, 8000)
    assert outcome.kind == "done" and outcome.value[0], f"{name}: the whole folder cannot be read: {outcome}"
    whole = outcome.value[0]
    contents = {path: path.read_bytes() for path in sorted(source.rglob("*")) if path.is_file()}
    todo: list[tuple[str, str, bool, Callable[[], None]]] = []
    chosen = sorted({path for pattern in kind.files for path in source.glob(pattern) if path.is_file()})
    for path in chosen:
        file = path.relative_to(source).as_posix()
        if path.name == "README.md" or path.name.startswith("."):
            continue
        others = [content for other, content in contents.items() if other != path and content != contents[path]]
        draw = random.Random(f"{name} {file}")
        count = 2 if quick else kind.cases
        if path.suffix == ".py":  # copies of the code, many and alike
            count = 0 if quick else 6
        for number, (what, damaged) in enumerate(damages(contents[path], others, draw, count)):

            def lay(place=copy / file, damaged=damaged):
                place.unlink() if damaged is None else place.write_bytes(damaged)

            todo.append((f"{name} {file} {number} {what}", file, False, lay))
    if name in ("model", "sae", "saelens"):
        for number, (file, what, change) in enumerate(under_a_fitting_signature(source)):
            if not quick or number < 3:
                todo.append((f"{name} {file} signed {number} {what}", file, True, partial(change, copy)))
    todo = [case for case in todo if case[0] not in journal.records]

    def work_of(lay):
        def read():
            shutil.rmtree(copy)
            shutil.copytree(source, copy)
            lay()
            return listen(kind.load, copy)

        return read

    works = [(number, work_of(lay)) for number, (_, _, _, lay) in enumerate(todo)]
    for number, outcome in each_in_child(works, 60, 8000):
        case, file, fitting, _ = todo[number]
        if outcome.kind == "done":
            record = judge(file, whole, outcome.value, fitting)
        else:
            record = {"verdict": outcome.kind, "said": outcome.text[:300]}
        journal.add([{"sample_id": case, "kind": name, **record}])
        if record["verdict"] not in ("error", "the same", "warned") or record.get("named") is False:
            print(f"{record['verdict']}: {case}: {record.get('said', '')[:200]!r}", flush=True)
        if time.monotonic() > end:
            break


def main(argv: list[str] | None = None) -> dict:
    """Run the harness and return what its RESULT says."""
    args = options(__doc__, argv)
    journal = Journal(args.output / ("corruption_quick" if args.quick else "corruption"), {"quick": args.quick})
    with tempfile.TemporaryDirectory() as work:
        writers.work_in(Path(work))
        for name, kind in KINDS.items():
            if time.monotonic() < args.end:
                examine(name, kind, Path(work).resolve(), journal, args.quick, args.end)
    records = list(journal.records.values())

    def number(verdict, kind=None):
        return sum(each["verdict"] == verdict and kind in (None, each["kind"]) for each in records)

    verdicts = ("the same", "warned", "error", "SILENT", "hang", "crash", "memory")
    by = {kind: {verdict: number(verdict, kind) for verdict in verdicts if number(verdict, kind)} for kind in KINDS}
    return say(
        {
            "corrupt_cases": len(records),
            "corrupt_silent": number("SILENT"),
            "errors": number("error"),
            "errors_naming_file": sum(each.get("named", False) for each in records),
            "hangs": number("hang"),
            "crashes": number("crash") + number("memory"),
            "by_kind": by,
        }
    )


if __name__ == "__main__":
    main()
