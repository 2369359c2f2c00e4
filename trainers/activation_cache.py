"""Hidden states on disk: written once, whatever happens on the way, and read by any number of processes.

A cache is a folder of shards. Shard s holds the tokens of samples [s S, (s + 1) S) of the rows, without padding, with
their types, and is a pure function of those rows: who writes it, when, and after how many interruptions, changes
nothing. `shard-00000.safetensors` is written under another name, flushed and renamed; `shard-00000.json` follows with
its checksum and is what makes it count. `cache.json` says of what the cache is.

Gathering tokens anew in every pass costs one MLLM forward up to layer L; a cache costs 2 d_in bytes per token.
"""

import hashlib
import logging
from collections import Counter
from collections.abc import Callable
from contextlib import nullcontext
from itertools import islice
from pathlib import Path

import datasets
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.utils.data import IterableDataset
from tqdm import tqdm

from segcompass.loaders.folder_lock import folder_lock
from segcompass.modeling_segcompass.whole_files import read_signed_json, signed_json, write_whole

from .activations import (
    SPECIAL,
    batch_activations,
    keep_finite,
    mllm_of,
    model_special_tokens,
    process_share,
    shuffle_tokens,
)

logger = logging.getLogger(__name__)


LISTING = "shards.json"
"""Which shards there are, written when all of them are: one that is lost later is missed."""


def cache_activations(
    folder: str | Path,
    model: nn.Module,
    rows: datasets.Dataset | datasets.IterableDataset,
    collate: Callable[[list[dict]], dict],
    layer: int,
    description: dict,
    samples_per_batch: int = 8,
    samples_per_shard: int = 128,
    max_gb: float = 100.0,
    dtype: torch.dtype = torch.bfloat16,
    on_nonfinite: str = "stop",
) -> Counter:
    """Write the hidden states of all rows, or resume where an earlier call was cut off.

    Several processes (torch.distributed) write different shards; another number of them may resume.

    Args:
        folder: of the cache; made if there is none.
        model: a SegCompass model or a bare transformers MLLM, on its device.
        rows: a `datasets.Dataset` or `datasets.IterableDataset`, whose order must not change between calls.
        collate: list of rows -> a batch as the processor gives it (`ImageTextCollator`).
        layer: L, the decoder block to read, from 1.
        description: what the hidden states depend on (backbone, data set, ...), kept in `cache.json`; a folder whose
            description differs is refused.
        samples_per_batch: rows the MLLM reads at a time. It and `samples_per_shard` are part of the description.
        samples_per_shard: rows in a shard; what a kill can cost. A shard is held in memory while it is gathered.
        max_gb: size at which writing stops, in 10^9 bytes; what is written stays and can be trained on.
        dtype: of the stored hidden states: bfloat16, float16 or float32.
        on_nonfinite: "stop" at a batch with NaN or infinite hidden states, or "skip" it.

    Returns:
        Counter over the whole cache: `samples`, `tokens`, `bytes`, `shards`, and the skipped samples by reason.
        `capped` is 1 if the limit was reached before the rows ended.

    Raises:
        ValueError: the folder holds another cache; no rows; non-finite hidden states with "stop".
        OSError: the disk is full; finished shards are kept, and the call can be repeated. Or another run is writing the
            cache; it is named.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    rank, processes = process_share()
    with folder_lock(folder) if rank == 0 else nullcontext():
        wait_for_all()  # the lock is there before anybody writes
        _claim(
            folder / "cache.json",
            description
            | {
                "layer": layer,
                "d_in": mllm_of(model).config.get_text_config().hidden_size,
                "dtype": str(dtype).removeprefix("torch."),
                "samples_per_batch": samples_per_batch,
                "samples_per_shard": samples_per_shard,
            },
        )
        special = model_special_tokens(model)
        model.eval()
        capped = False
        with tqdm(desc="caching", unit="shard", disable=rank > 0, dynamic_ncols=True) as bar:
            for index, part in enumerate(_parts(rows, samples_per_shard, folder, rank, processes)):
                if part is None:  # written before, or another process's
                    bar.update()
                    continue
                sizes = [path.stat().st_size for path in folder.glob("shard-*.safetensors")]
                used = sum(sizes)
                if used + max(sizes, default=0) > max_gb * 1e9:
                    capped = True
                    logger.warning(
                        "%s holds %.2f GB and the limit is %.2f GB: caching stops. Train on what is there, or repeat "
                        "the command with a higher max_gb to resume.",
                        *(folder, used / 1e9, max_gb),
                    )
                    break
                chunks: list[tuple[torch.Tensor, torch.Tensor]] = []
                report: Counter = Counter()
                for start in range(0, len(part), samples_per_batch):
                    inputs = collate(part[start : start + samples_per_batch])
                    report.update(inputs.get("skipped", ()))
                    if "input_ids" not in inputs:
                        continue
                    z, types = batch_activations(model, inputs, layer, special, keep_special=True)
                    first = index * samples_per_shard + start
                    if keep_finite(z, f"the batch of samples {first} to {first + samples_per_batch - 1}", on_nonfinite):
                        report["samples"] += len(inputs["input_ids"])
                        chunks.append((z.to(dtype).cpu(), types.cpu()))
                    else:
                        report["not finite"] += len(inputs["input_ids"])
                _write_shard(folder, index, chunks, report)
                bar.update()
                bar.set_postfix(GB=f"{used / 1e9:.2f}")
        wait_for_all()
        total: Counter = Counter()
        for shard in _shards(folder):
            total.update(read_signed_json(shard.with_suffix(".json"))["report"])
            total["shards"] += 1
            total["bytes"] += shard.stat().st_size
        if not total["tokens"]:
            raise ValueError(
                f"no token was cached in {folder}: the rows are empty or every sample was skipped ({dict(total)}); "
                "give other rows."
            )
        if rank == 0:
            names = [shard.name for shard in _shards(folder)]
            write_whole(folder / LISTING, signed_json({"shards": names}) + "\n")
        total["capped"] = int(capped)
        return total


class CachedActivations(IterableDataset):
    """Reads a cache as `SparseAutoencoderTrainer` wants it: shuffled batches with token types, pass after pass.

    Shards come in another order every pass, pass n from seed + n, and their tokens are mixed in a buffer. Processes
    share the shards, whatever number of them wrote. Each shard's checksum is compared when it is first read.

    Args:
        folder: of the cache.
        d_in: width to expect, or None.
        batch_size: tokens per batch; the last one of a pass may be smaller.
        buffer_size: tokens mixed with one another, at least `2 * batch_size`.
        seed: of the first pass.
        shards: which to read, as a slice of the list of shards (to hold some out).
        keep_special: also yield special tokens.

    Raises:
        ValueError: there is no cache, it is empty, has another width, or a shard is damaged.
    """

    def __init__(
        self,
        folder: str | Path,
        d_in: int | None = None,
        batch_size: int = 2048,
        buffer_size: int = 32768,
        seed: int = 0,
        shards: slice = slice(None),
        keep_special: bool = False,
    ):
        self.folder = Path(folder)
        if not (self.folder / "cache.json").exists():
            raise ValueError(f"{folder} holds no cache.json; write a cache there with cache_activations.")
        self.description = read_signed_json(self.folder / "cache.json")
        if d_in is not None and self.description["d_in"] != d_in:
            raise ValueError(
                f"{folder} holds hidden states of width {self.description['d_in']}, but {d_in} were asked for; use the "
                "cache of this backbone."
            )
        found = _shards(self.folder)
        if (self.folder / LISTING).exists():
            listed = read_signed_json(self.folder / LISTING).get("shards", [])
            missing = sorted({*listed} - {shard.name for shard in found})
            if missing:
                raise ValueError(
                    f"{self.folder} lacks {len(missing)} of its {len(listed)} shards or their .json, the first "
                    f"{missing[0]} and {Path(missing[0]).with_suffix('.json')}; repeat the caching command, which "
                    "writes them again and keeps all others."
                )
        else:
            logger.warning("%s has no %s: caching was not finished, and a part is read.", self.folder, LISTING)
        self.shards = found[shards]
        if not self.shards:
            raise ValueError(f"{folder} holds no finished shard (of those asked for); repeat the caching command.")
        self.batch_size = batch_size
        self.buffer_size = buffer_size
        self.seed = seed
        self.keep_special = keep_special
        self.passes = 0
        self._checked: set[Path] = set()

    def set_epoch(self, epoch: int) -> None:
        """Make the next pass pass number `epoch`, whose shuffling it then has."""
        self.passes = epoch

    def __iter__(self):
        seed = self.seed + self.passes
        self.passes += 1
        order = torch.randperm(len(self.shards), generator=torch.Generator().manual_seed(seed)).tolist()
        rank, processes = process_share()
        if processes > len(self.shards):
            raise ValueError(
                f"{self.folder} has {len(self.shards)} shards for {processes} processes; use fewer processes, or write "
                "smaller shards (samples_per_shard)."
            )
        chunks = (self._read(self.shards[index]) for index in order[rank::processes])
        yield from shuffle_tokens(chunks, self.batch_size, self.buffer_size, seed)

    def _read(self, path):
        if path not in self._checked:
            expected = read_signed_json(path.with_suffix(".json"))["sha256"]
            found = _checksum(path)
            if found != expected:
                raise ValueError(
                    f"{path} was truncated or altered: its SHA-256 is {found[:12]}…, {expected[:12]}… was written; "
                    f"delete it and {path.with_suffix('.json').name} and repeat the caching command, which writes it "
                    "again and keeps all others."
                )
            self._checked.add(path)
        shard = load_file(path)
        z, types = shard["hidden_states"].float(), shard["token_types"]
        if self.keep_special:
            return z, types
        keep = types != SPECIAL
        return z[keep], types[keep]


def _parts(rows, samples_per_shard, folder, rank, processes):
    """For each shard its rows, or None where there is nothing to do. Rows of finished shards are not decoded twice."""

    def wanted(index):
        return index % processes == rank and not _shard(folder, index).with_suffix(".json").exists()

    if hasattr(rows, "select"):
        for index, start in enumerate(range(0, len(rows), samples_per_shard)):
            stop = min(start + samples_per_shard, len(rows))
            yield [rows[place] for place in range(start, stop)] if wanted(index) else None
        return
    stream, index = iter(rows), 0
    while part := list(islice(stream, samples_per_shard)):
        yield part if wanted(index) else None
        index += 1


def wait_for_all() -> None:
    """Every process of the run comes here before any goes on."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.barrier()


def _claim(path, description):
    """Write cache.json, or compare with the one that is there."""
    if path.exists():
        theirs = read_signed_json(path)
        for name in description.keys() | theirs.keys():
            if theirs.get(name) != description.get(name):
                raise ValueError(
                    f"{path.parent} holds a cache with {name}={theirs.get(name)!r}, but {description.get(name)!r} is "
                    "asked for; choose another folder, or delete that one."
                )
        return
    write_whole(path, signed_json(description) + "\n")


def _shard(folder, index):
    return folder / f"shard-{index:05d}.safetensors"


def _shards(folder):
    """The finished shards, in order."""
    return sorted(path for path in folder.glob("shard-*.safetensors") if path.with_suffix(".json").exists())


def _write_shard(folder, index, chunks, report):
    path = _shard(folder, index)
    z = torch.cat([z for z, _ in chunks]) if chunks else torch.zeros(0, 1)
    types = torch.cat([types for _, types in chunks]) if chunks else torch.zeros(0, dtype=torch.uint8)
    report["tokens"] = len(z)
    write_whole(path, lambda part: save_file({"hidden_states": z, "token_types": types}, part))
    record = {"sha256": _checksum(path), "report": dict(report)}
    write_whole(path.with_suffix(".json"), signed_json(record) + "\n")


def _checksum(path):
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
