"""Features as the files that Neuronpedia imports: one folder per SAE, JSON lines, the large ones compressed.

    release.jsonl, model.jsonl, sourceset.jsonl, source.jsonl     what it is, by whom
    features/batch-0.jsonl.gz         per feature: density, greatest activation, words it promotes, its direction
    activations/batch-0.jsonl.gz      per context of a feature: the sample's tokens and the feature's value at each
    explanations/batch-0.jsonl.gz     per feature with a label: the label

Field names are those of the columns they are imported into. What is not measured here (histograms, correlations) is
left empty, as the format allows. Image patches are tokens like "[patch 3,4]", and of them only those on which the
feature fires. What detects and steers has no place in the format: `dashboard.html` and `features.json` have it.
"""

import gzip
import hashlib
import json
import re
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from datasets import Dataset

from segcompass.modeling_segcompass.token_layout import IMAGE
from segcompass.modeling_segcompass.whole_files import write_whole

from .dashboard import FeatureCard
from .dictionary_reader import SampleTokens, TokenReader

CREATOR = "CREATOR_ID"
"""Stands for the id of whoever imports the files, which their instance of Neuronpedia knows."""


def export_features(
    folder: Path,
    reader: TokenReader,
    rows: Dataset,
    cards: Sequence[FeatureCard],
    *,
    repo_id: str,
    source: str,
    batch_size: int = 32,
) -> None:
    """Write the files.

    Args:
        folder: made if it does not exist.
        reader: of the model.
        rows: those that the dictionary was made from.
        cards: the features to write.
        repo_id: the SAE's repository on the Hub, or a name; it also names model, set and release.
        source: what the rows are.
        batch_size: rows read at a time.

    Raises:
        ValueError: a context is of a sample that the rows do not have.
    """
    config = reader.model.config.sae_config
    name = re.sub(r"[^a-z0-9_-]+", "-", repo_id.split("/")[-1].lower()).strip("-") or "sae"
    model_id, set_name = f"{name}-mllm", f"{name}-{config.d_sae}"
    layer = f"{config.layer - 1}-{set_name}"  # blocks are counted from 0 there
    now = datetime.now(UTC).isoformat(timespec="seconds")
    place = {"modelId": model_id, "layer": layer}
    common = {"creatorId": CREATOR, "createdAt": now}
    owner = repo_id.split("/")[0] if "/" in repo_id else ""
    description = f"{config.d_sae} features of decoder block {config.layer}"
    language = reader.model.config.get_text_config()
    _write(
        folder / "release.jsonl",
        [{"name": name, "description": name, "descriptionShort": name, "urls": [], "creatorName": owner, **common}],
    )
    about = {"displayNameShort": name, "displayName": name, "instruct": True, "owner": owner, "updatedAt": now}
    size = {"layers": language.num_hidden_layers, "neuronsPerLayer": language.intermediate_size}
    _write(folder / "model.jsonl", [{"id": model_id, **about, **size, **common}])
    of_set = {"name": set_name, "modelId": model_id, "description": description, "releaseName": name}
    _write(folder / "sourceset.jsonl", [{**of_set, "creatorName": owner, "urls": [], **common}])
    noted = {"hfRepoId": repo_id if "/" in repo_id else None, "dataset": source, "num_prompts": len(rows)}
    _write(folder / "source.jsonl", [{"id": layer, "modelId": model_id, "setName": set_name, **noted, **common}])
    directions = reader.model.sae.W_dec.detach().float().cpu()
    features = [
        {
            **place,
            "index": str(card.entry.index),
            "sourceSetName": set_name,
            "maxActApprox": card.entry.contexts[0].strength if card.entry.contexts else 0.0,
            "frac_nonzero": card.entry.density,
            "pos_str": [text for text, _ in card.promotes],
            "pos_values": [round(value, 4) for _, value in card.promotes],
            "neg_str": [text for text, _ in card.demotes],
            "neg_values": [round(value, 4) for _, value in card.demotes],
            "hasVector": True,
            "vector": [round(value, 5) for value in directions[card.entry.index].tolist()],
            "hookName": f"blocks.{config.layer - 1}.hook_resid_post",
            **common,
        }
        for card in cards
    ]
    _write(folder / "features" / "batch-0.jsonl.gz", features)
    labels = [
        {
            "id": _id(layer, card.entry.index, "label"),
            **place,
            "index": str(card.entry.index),
            "description": card.entry.label,
            "authorId": CREATOR,
            "createdAt": now,
            "updatedAt": now,
        }
        for card in cards
        if card.entry.label
    ]
    _write(folder / "explanations" / "batch-0.jsonl.gz", labels)
    _write(
        folder / "activations" / "batch-0.jsonl.gz",
        [{**place, **common, **found} for found in _activations(reader, rows, cards, layer, batch_size)],
    )


def _activations(
    reader: TokenReader, rows: Dataset, cards: Sequence[FeatureCard], layer: str, batch_size: int
) -> Iterable[dict[str, Any]]:
    """One record per feature and sample among its contexts, feature by feature."""
    wanted: dict[str, list[int]] = {}
    for card in cards:
        for sample in dict.fromkeys(context.sample for context in card.entry.contexts):
            wanted.setdefault(sample, []).append(card.entry.index)
    places = {name: place for place, name in enumerate(rows["sample_id"])}
    missing = sorted(wanted.keys() - places.keys())
    if missing:
        raise ValueError(
            f"the dictionary has a context of sample {missing[0]!r}, which the rows do not have; take the rows that it "
            "was made from."
        )
    records: dict[int, list[dict[str, Any]]] = {card.entry.index: [] for card in cards}
    order = sorted(wanted, key=places.__getitem__)
    for start in range(0, len(order), batch_size):
        names = order[start : start + batch_size]
        for name, tokens in zip(names, reader.read([rows[places[name]] for name in names]), strict=True):
            texts = _texts(reader, tokens)
            for index in wanted[name]:
                records[index].append({"id": _id(layer, index, name), **_record(texts, tokens, index)})
    for card in cards:
        yield from sorted(records[card.entry.index], key=lambda record: -record["maxValue"])


def _record(texts: list[str], tokens: SampleTokens, index: int) -> dict[str, Any]:
    values = [round(value, 4) for value in tokens.activations[:, index].tolist()]
    kept = [place for place, kind in enumerate(tokens.types.tolist()) if kind != IMAGE or values[place] > 0]
    values = [values[place] for place in kept]
    return {
        "index": str(index),
        "tokens": [texts[place] for place in kept],
        "values": values,
        "maxValue": max(values),
        "maxValueTokenIndex": values.index(max(values)),
        "minValue": min(values),
        "dataSource": tokens.sample,
    }


def _texts(reader: TokenReader, tokens: SampleTokens) -> list[str]:
    """Each token's text with the space before it; of an image token its place."""
    decode = reader.processor.tokenizer.decode
    try:
        columns = tokens.grid[1]
    except ValueError:  # patches of several sizes: they are counted
        columns = None
    texts, patch, before = [], 0, None
    for token, kind in zip(tokens.ids, tokens.types.tolist(), strict=True):
        if kind == IMAGE:
            texts.append(f"[patch {patch // columns},{patch % columns}]" if columns else f"[patch {patch}]")
            patch += 1
            continue
        start = "" if before is None else decode([before])
        texts.append(decode([token] if before is None else [before, token])[len(start) :])
        before = token
    return texts


def _id(layer: str, index: int, name: str) -> str:
    """An id that is the same each time: 24 letters and digits, beginning with c."""
    return "c" + hashlib.sha256(f"{layer}/{index}/{name}".encode()).hexdigest()[:23]


def _write(path: Path, lines: Iterable[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
    if path.suffix == ".gz":
        write_whole(path, lambda part: Path(part).write_bytes(gzip.compress(text.encode(), mtime=0)))
    else:
        write_whole(path, text)
