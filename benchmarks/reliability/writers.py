"""Everything of this project that writes files, as small runs: what the crash and kill harnesses interrupt.

Each writer is a function of a folder that does all of a command's work there, or goes on with what an earlier call
left.
The models are tiny and real; a writer that is never interrupted takes seconds. `compared` names the files that must
be the same bytes however often a run was interrupted.
"""

import hashlib
import json
import sys
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from io import StringIO
from pathlib import Path

import datasets
import torch
from PIL import Image
from transformers.utils import logging as transformers_logging

ROOT = Path(__file__).resolve().parents[2]
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

from segcompass.evaluation import Evaluation, evaluate  # noqa: E402
from segcompass.journal import Journal  # noqa: E402
from segcompass.loaders.image_text import image_text  # noqa: E402
from segcompass.modeling_segcompass import (  # noqa: E402
    SegCompassModel,
    SegCompassProcessor,
    SparseAutoencoder,
    SparseAutoencoderConfig,
)
from segcompass.modeling_segcompass.image_encoder import Frame  # noqa: E402
from segcompass.modeling_segcompass.manifest import MANIFEST  # noqa: E402
from segcompass.preparation import Conversion, prepare_data  # noqa: E402
from segcompass.trainers import (  # noqa: E402
    SegCompassSFTConfig,
    SegCompassSFTTrainer,
    SparseAutoencoderTrainer,
    SparseAutoencoderTrainerConfig,
)
from segcompass.trainers.activation_cache import cache_activations  # noqa: E402
from segcompass.trainers.checkpoints import alone_in_output, last_checkpoint  # noqa: E402
from segcompass.trainers.collator import ImageTextCollator  # noqa: E402
from segcompass.trainers.image_features import ImageFeatureWriter, image_key  # noqa: E402
from tests.support.grpo import make_trainer, scenes  # noqa: E402
from tests.support.scripted import Script, lively_segcompass  # noqa: E402
from tests.support.tiny import tiny_mllm, tiny_processor, tiny_segcompass  # noqa: E402

transformers_logging.disable_progress_bar()
QUIET = dict(save_strategy="steps", save_steps=1, report_to=[], disable_tqdm=True, use_cpu=True, seed=3, max_steps=3)
WORK: dict[str, str] = {}
"""Where a harness keeps what its writers read: `WORK["folder"]`, set by `work_in`."""
GOOD = "<think>a red ball</think>" + "<REF_POS>" * 3


def work_in(folder: Path) -> None:
    """Let the writers keep what they read, and the data sets they make, in a folder."""
    WORK["folder"] = str(folder / "shared")
    (folder / "shared").mkdir(exist_ok=True)
    datasets.config.HF_DATASETS_CACHE = str(folder / "cache")


def _train(trainer):
    """What `segcompass train` does."""
    with alone_in_output(trainer.args):
        trainer.train(last_checkpoint(trainer.args.output_dir))
        trainer.save_model()


def sft(folder: Path) -> None:
    """The cold start: three steps, each with a checkpoint."""
    model, processor = tiny_segcompass("llava", num_slots=3)
    rows = scenes(8).map(lambda row: {"reasoning": "a box"})
    args = SegCompassSFTConfig(output_dir=str(folder), per_device_train_batch_size=2, **QUIET)
    _train(SegCompassSFTTrainer(model, args, processor, train_dataset=rows))


def grpo(folder: Path) -> None:
    """Joint training; a rollout serves two steps, so that checkpoints 1 and 3 lie within one."""
    _train(make_trainer(folder, beta=0.0, steps_per_generation=4, **QUIET))


def sae(folder: Path) -> None:
    """An autoencoder on ready-made hidden states."""
    torch.manual_seed(0)
    model = SparseAutoencoder(SparseAutoencoderConfig(d_in=8, d_sae=16, activation="topk", k=4, layer=1))
    data = [torch.randn(32, 8, generator=torch.Generator().manual_seed(number)) for number in range(4)]
    _train(SparseAutoencoderTrainer(model, SparseAutoencoderTrainerConfig(str(folder), **QUIET), train_dataset=data))


def _model_folder() -> Path:
    """A tiny model on disk, made once."""
    folder = Path(WORK["folder"]) / "model"
    if not (folder / MANIFEST).exists():
        model, processor = lively_segcompass("llava", num_slots=3)
        model.save_pretrained(folder)
        processor.save_pretrained(folder)
    return folder


def evaluation(folder: Path) -> None:
    """`segcompass evaluate` on twelve scenes; the model is made to write a well-formed response."""
    model = _model_folder()
    load = SegCompassModel.from_pretrained
    tokenizer = SegCompassProcessor.from_pretrained(model).tokenizer

    def load_and_force(*args, **kwargs):
        loaded = load(*args, **kwargs)
        generate = loaded.mllm.generate

        def forced(input_ids, **inputs):
            return generate(
                input_ids=input_ids, logits_processor=[Script(tokenizer, [GOOD] * len(input_ids))], **inputs
            )

        loaded.mllm.generate = forced
        return loaded

    SegCompassModel.from_pretrained = load_and_force
    try:
        evaluate(Evaluation(folder, model=str(model), seed=3, num_samples=12, batch_size=2, threshold=0.0))
    finally:
        SegCompassModel.from_pretrained = load


def _pictures(count):
    return [
        {"image": Image.new("RGB", (28, 28), (10 * number, 90, 10)), "text": f"find mug {number}"}
        for number in range(count)
    ]


class _Rows(list):
    def select(self, indices):
        return _Rows(self[index] for index in indices)


def activation_cache(folder: Path) -> None:
    """Hidden states of twelve samples in six shards."""
    torch.manual_seed(0)
    processor = tiny_processor("llava")
    mllm, collate = tiny_mllm("llava", processor), ImageTextCollator(processor, image_text)
    rows = _Rows(_pictures(12))
    cache_activations(folder, mllm, rows, collate, 2, {}, samples_per_batch=2, samples_per_shard=2)


def feature_cache(folder: Path) -> None:
    """Features of eight images in four shards."""
    writer = ImageFeatureWriter(folder, "an-encoder", Frame(32), shard_size=2)
    for number, row in enumerate(_pictures(8)):
        if (key := image_key(row["image"])) not in writer:
            writer.add(key, torch.full((4, 8, 8), float(number)))
    writer.close()


def _jsonl() -> Path:
    """Data of one's own: nine images with masks."""
    path = Path(WORK["folder"]) / "mine.jsonl"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        lines = []
        for number, row in enumerate(_pictures(9)):
            row["image"].save(path.with_name(f"{number}.png"))
            lines.append({"image": f"{number}.png", "instruction": row["text"], "polygons": [[2, 2, 12, 2, 12, 20]]})
        path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def preparation(folder: Path) -> None:
    """`segcompass prepare-data` into three files, images within."""
    prepare_data(Conversion(str(_jsonl()), folder, split=["train"], images="bytes", rows_per_file=3))


def saved_model(folder: Path) -> None:
    """A model and its processor, saved and signed."""
    model, processor = tiny_segcompass("llava", num_slots=3)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)


def converted_sae(folder: Path) -> None:
    """An autoencoder as a folder of ours and of SAELens's layout."""
    torch.manual_seed(0)
    config = SparseAutoencoderConfig(d_in=8, d_sae=16, activation="topk", k=4, layer=1)
    autoencoder = SparseAutoencoder(config)
    autoencoder.save_saelens(folder / "theirs")
    autoencoder.save_pretrained(folder / "ours")


def journal(folder: Path) -> None:
    """An examination's journal: twelve items."""
    items = Journal(folder, {"run": 1})
    for number in range(12):
        if f"sample-{number}" not in items.records:
            items.add([{"sample_id": f"sample-{number}", "iou": number / 7}])


WRITERS: dict[str, Callable[[Path], None]] = {
    "sft": sft,
    "grpo": grpo,
    "sae": sae,
    "evaluate": evaluation,
    "activation_cache": activation_cache,
    "feature_cache": feature_cache,
    "prepare": preparation,
    "saved_model": saved_model,
    "converted_sae": converted_sae,
    "journal": journal,
}

CHOICE = {"nargs": "+", "choices": list(WRITERS), "help": "some of the writers; default: all"}
"""What argparse needs to know of the option --writers."""


def run_quietly(name: str, folder: Path) -> None:
    """Run a writer without what it prints."""
    with redirect_stdout(StringIO()), redirect_stderr(StringIO()):
        WRITERS[name](folder)


def result(name: str, folder: Path) -> dict[str, str]:
    """What a writer left, as relative path -> hash of its content; times are left out."""
    found = {}
    for path in sorted(folder.rglob("*")):
        relative = path.relative_to(folder).as_posix()
        if not path.is_file() or path.name.startswith(".") or relative.startswith("runs/"):
            continue
        content = path.read_bytes()
        if name == "evaluate" and relative == "predictions.jsonl":
            lines = [json.loads(line) for line in content.decode().splitlines()]
            kept = [{key: value for key, value in line.items() if key not in ("seconds", "checksum")} for line in lines]
            content = json.dumps(kept).encode()
        found[relative] = hashlib.sha256(content).hexdigest()
    return found


def compared(name: str, folders: list[Path]) -> set[str]:
    """Which files two runs that nobody interrupted leave alike: those that must be so after an interruption too.

    Args:
        name: of the writer.
        folders: of finished runs.

    Returns:
        Relative paths; the weights, the metrics and the shards are among them, or the harness would compare nothing.

    Raises:
        ValueError: nothing that matters is alike.
    """
    first, second = (result(name, folder) for folder in folders)
    alike = {path for path in first if second.get(path) == first[path]}
    needed = ("model.safetensors", "metrics.json", "shard-00000.npy", "shard-00000.safetensors", "items.jsonl")
    needed += ("train-00000-of-00003.parquet", "ours/model.safetensors")
    if not alike & set(needed):
        raise ValueError(f"{name}: two runs are not alike in what matters: {sorted(first)} against {sorted(second)}.")
    return alike
