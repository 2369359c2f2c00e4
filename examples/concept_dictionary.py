"""Build the dictionary of a model's concepts, and score it where the truth is known.

    python examples/concept_dictionary.py --model examples/checkpoints/mini --output runs/dictionary
    python examples/concept_dictionary.py --model PATH --dataset FOLDER --split train --output runs/dictionary

Reads the SAE's activations on images, instructions and reference reasoning, and writes concepts.json and
dictionary.html. With `--save-to FOLDER` (the model's or the SAE's) concepts.json also goes there, where `segment.py`
finds its labels. On scenes, whose objects are known, it prints for each colour, shape and size the feature and
threshold that tell it best on the samples read, and their precision, recall and F1 on scenes of another split:
    scene  it fires on some image patch  <=>  some object of the scene has the attribute
    patch  it fires on an image patch    <=>  half of that patch or more shows such an object
    word   it fires on a word piece      <=>  the word is the attribute's name
Image patches come before the instruction, so no word can tell them anything. Resumes where it was cut off.
"""

import argparse
import base64
import io
import json
from functools import cache
from pathlib import Path

import numpy as np
import torch
from journal import Journal, weights_of
from segment import load, patch_extent
from tqdm import tqdm

from segcompass.loaders import load_rows
from segcompass.loaders.scenes import COLOURS, SHAPES, SIZES, scene_question
from segcompass.modeling_segcompass.concept_dictionary import PARTS, DictionaryBuilder, best_detectors
from segcompass.modeling_segcompass.token_layout import IMAGE, token_types
from segcompass.trainers.activations import layer_hidden_states

ATTRIBUTES = (*COLOURS, *SHAPES, *SIZES)
READINGS = ("scene", "patch", "word")
AROUND = 4  # word pieces shown on either side
SAVE_EVERY = 10  # batches


def parse(argv):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="SegCompass folder or Hub id")
    parser.add_argument("--dataset", default="scenes", help="'scenes' or a folder written by Dataset.save_to_disk")
    parser.add_argument("--split", default="train")
    parser.add_argument("--seed", type=int, default=5, help="of the scenes")
    parser.add_argument("--num-samples", type=int, default=600)
    parser.add_argument("--held-out-split", default="test", help="of the scenes that labels are scored on")
    parser.add_argument("--held-out-samples", type=int, default=300)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--contexts", type=int, default=6, help="strongest places kept of each feature")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--save-to", type=Path, help="also write concepts.json here")
    args = parser.parse_args(argv)
    for name in ("num_samples", "held_out_samples", "batch_size", "contexts"):
        if getattr(args, name) < 1:
            parser.error(f"--{name.replace('_', '-')} is {getattr(args, name)}; it must be at least 1.")
    return args


def main(argv=None):
    args = parse(argv)
    try:
        rows = load_rows(args.dataset, args.split, args.seed, args.num_samples)
    except (ValueError, KeyError, OSError) as error:
        raise SystemExit(f"cannot load split {args.split!r} of {args.dataset!r}: {error}") from error
    run = {name: str(value) for name, value in vars(args).items() if name not in ("output", "save_to")}
    Journal(args.output, {**run, "weights": weights_of(args.model)})
    model, processor = load(args.model)
    reader = Reader(model, processor)
    dictionary = build(args, reader, rows)
    dictionary.save_pretrained(args.output)
    if args.save_to:
        dictionary.save_pretrained(args.save_to)
    page = dictionary.to_html(pictures(rows, processor))
    (args.output / "dictionary.html").write_text(page, encoding="utf-8")
    live = sum(entry.density > 0 for entry in dictionary.entries)
    print(f"{live} of {len(dictionary.entries)} features fired on {dictionary.tokens} tokens")
    scores = None
    if args.dataset == "scenes":
        scores = score(args, reader)
        (args.output / "scores.json").write_text(json.dumps(scores, indent=2) + "\n")
        report(scores)
    print(f"wrote concepts.json and dictionary.html to {args.output}")
    return scores


# -- reading -----------------------------------------------------------------------------------------------------------


class Tokens:
    """The tokens of one sample that may fire concepts."""

    def __init__(self, sample, ids, parts, activations, grid):
        self.sample, self.ids, self.parts, self.activations, self.grid = sample, ids, parts, activations, grid


class Reader:
    """Runs a model up to its SAE's layer and encodes every token of image, instruction and reference reasoning."""

    def __init__(self, model, processor):
        self.model, self.processor = model, processor

    @torch.no_grad()
    def __call__(self, rows):
        """Yields Tokens, one a row; activations (T, d_sae) on the CPU."""
        responses = [self.processor.format_response(row["reasoning"] or "") for row in rows]
        inputs = self.processor(
            images=[row["image"] for row in rows],
            text=[row["instruction"] for row in rows],
            response=responses,
            image_encoder=False,
        ).to(self.model.device)
        z = layer_hidden_states(self.model, inputs, self.model.config.sae_config.layer)
        keep = self.model.concept_token_mask(inputs["input_ids"], inputs["attention_mask"])
        config = self.model.config
        types = token_types(inputs["input_ids"], inputs["response_mask"], config.image_token_id)
        grids = self.model.backbone.patch_grid(config.mllm_config, inputs["input_ids"], inputs)
        for place, row in enumerate(rows):
            chosen = keep[place]
            activations = self.model.sae.encode(z[place, chosen]).float().cpu()
            ids, parts = inputs["input_ids"][place, chosen].tolist(), types[place, chosen].cpu()
            yield Tokens(row["sample_id"], ids, parts, activations, tuple(grids[place].tolist()))


def build(args, reader, rows):
    """The dictionary of the rows. What was read is kept in partial.pt, so that a killed run goes on."""
    builder = DictionaryBuilder(reader.model.config.sae_config.d_sae, args.contexts)
    told, done, partial = [], 0, args.output / "partial.pt"
    if partial.exists():
        state = torch.load(partial, weights_only=True)
        builder.load_state_dict(state["builder"])
        told, done = state["told"], state["done"]
    with tqdm(total=len(rows), initial=done, unit="sample", dynamic_ncols=True) as bar:
        for start in range(done, len(rows), args.batch_size):
            batch = [rows[index] for index in range(start, min(start + args.batch_size, len(rows)))]
            for number, tokens in enumerate(reader(batch), start):
                builder.add(tokens.activations, tokens.parts)
                told.append([tokens.sample, tokens.ids, tokens.parts.tolist(), list(tokens.grid), number])
            done = start + len(batch)
            if start // args.batch_size % SAVE_EVERY == SAVE_EVERY - 1 or done == len(rows):
                save_whole(partial, {"builder": builder.state_dict(), "told": told, "done": done})
            bar.update(len(batch))
    starts = np.cumsum([0] + [len(ids) for _, ids, *_ in told])
    scenes = args.dataset == "scenes"

    def describe(place):
        which = int(np.searchsorted(starts, place, side="right")) - 1
        sample, ids, parts, grid, number = told[which]
        at = int(place - starts[which])
        if parts[at] == IMAGE:
            patch = sum(part == IMAGE for part in parts[:at])
            row, column = divmod(patch, grid[1])
            seen = patch_words(args.split, args.seed, number, tuple(grid))[patch] if scenes else ""
            cell = [row, column, *grid]
            return {
                "sample": sample,
                "part": "image",
                "text": seen,
                "around": f"row {row}, column {column}",
                "cell": cell,
            }
        text = [position for position, part in enumerate(parts) if part != IMAGE]
        here = text.index(at)
        around = reader.processor.tokenizer.decode([ids[p] for p in text[max(0, here - AROUND) : here + AROUND + 1]])
        word = reader.processor.tokenizer.decode([ids[at]]).strip()
        return {"sample": sample, "part": PARTS[parts[at]], "text": word, "around": around}

    return builder.finish(describe, f"{args.dataset}, split {args.split}, {len(rows)} samples")


def save_whole(path, state):
    """Write a file that is never seen half written."""
    torch.save(state, path.with_suffix(".new"))
    path.with_suffix(".new").replace(path)


# -- what is true of a scene -------------------------------------------------------------------------------------------


def patch_shares(scene, grid):
    """Share of each patch that shows an object with each attribute: float (A, rows * columns)."""
    rows, columns = grid
    height, width = scene.image.shape[:2]
    shares = np.zeros((len(ATTRIBUTES), rows, columns))
    for thing, mask in zip(scene.objects, scene.masks, strict=True):
        covered = mask.reshape(rows, height // rows, columns, width // columns).mean((1, 3))
        for word in (thing.colour, thing.shape, thing.size):
            shares[ATTRIBUTES.index(word)] += covered
    return shares.reshape(len(ATTRIBUTES), -1)


@cache
def patch_words(split, seed, number, grid):
    """What each patch of a scene shows: "large red ball", or "ground" where nothing covers half of it."""
    scene, _ = scene_question(split, seed, number)
    shares = patch_shares(scene, grid)
    words = []
    for patch in range(shares.shape[1]):
        seen = {ATTRIBUTES[place] for place in np.flatnonzero(shares[:, patch] >= 0.5)}
        words.append(" ".join(word for table in (SIZES, COLOURS, SHAPES) for word in table if word in seen) or "ground")
    return words


def labelled(reader, split, seed, count, batch_size):
    """Activations and attributes of scenes: reading -> (float (N, d_sae), {attribute: bool (N,)})."""
    values = {reading: [] for reading in READINGS}
    truths = {reading: [] for reading in READINGS}
    rows = load_rows("scenes", split, seed, count)
    names = {word: place for place, word in enumerate(ATTRIBUTES)}
    for start in tqdm(range(0, count, batch_size), unit="batch", desc=f"{split} scenes", dynamic_ncols=True):
        batch = [rows[index] for index in range(start, min(start + batch_size, count))]
        for number, tokens in enumerate(reader(batch), start):
            scene, _ = scene_question(split, seed, number)
            image = tokens.activations[tokens.parts == IMAGE]
            shares = torch.from_numpy(patch_shares(scene, tokens.grid))
            values["scene"].append(image.amax(0, keepdim=True))
            truths["scene"].append((shares > 0).any(1)[None])
            clear = ((shares == 0) | (shares >= 0.5)).all(0)  # a patch that an object just touches is neither
            values["patch"].append(image[clear].half())
            truths["patch"].append((shares[:, clear] >= 0.5).T)
            text = tokens.parts != IMAGE
            words = [reader.processor.tokenizer.decode([i]).strip() for i in np.array(tokens.ids)[text.numpy()]]
            said = torch.zeros(len(words), len(ATTRIBUTES), dtype=torch.bool)
            for place, word in enumerate(words):
                if word in names:
                    said[place, names[word]] = True
            values["word"].append(tokens.activations[text].half())
            truths["word"].append(said)
    return {
        reading: (
            torch.cat(values[reading]).float(),
            dict(zip(ATTRIBUTES, torch.cat(truths[reading]).T, strict=True)),
        )
        for reading in READINGS
    }


def score(args, reader):
    """reading -> attribute -> Detector as a dict. What never, or always, holds in a set of scenes is left out."""
    chosen = labelled(reader, args.split, args.seed, args.num_samples, args.batch_size)
    held_out = labelled(reader, args.held_out_split, args.seed + 1, args.held_out_samples, args.batch_size)
    scores = {}
    for reading in READINGS:
        (values, truth), (other_values, other_truth) = chosen[reading], held_out[reading]
        told = [name for name in ATTRIBUTES if all(0 < t[name].float().mean() < 1 for t in (truth, other_truth))]
        truth, other_truth = ({name: table[name] for name in told} for table in (truth, other_truth))
        found = best_detectors(values, truth, other_values, other_truth) if told else {}
        scores[reading] = {name: detector._asdict() for name, detector in found.items()}
    return scores


def report(scores):
    print("\nF1 on held-out scenes (precision / recall) #feature")
    print(f"{'attribute':<10}" + "".join(f"{reading:<30}" for reading in READINGS))
    for name in ATTRIBUTES:
        print(f"{name:<10}" + "".join(f"{told_cell(scores[reading].get(name)):<30}" for reading in READINGS))
    for reading in READINGS:
        good = sum(cell["f1"] >= 0.8 for cell in scores[reading].values())
        print(f"{reading}: {good} of {len(ATTRIBUTES)} attributes with F1 >= 0.8")


def told_cell(cell):
    if cell is None:
        return "–"
    return f"{cell['f1']:.3f} ({cell['precision']:.2f} / {cell['recall']:.2f}) #{cell['index']}"


def pictures(rows, processor, side=72):
    """Context -> data URL of an image patch with its neighbours, None for words."""
    places = {name: place for place, name in enumerate(rows["sample_id"])}

    def picture(context):
        if context.part != "image":
            return None
        image = rows[places[context.sample]]["image"].convert("RGB")
        left, top, right, bottom = patch_extent(processor.image_processor, image)
        row, column, rows_, columns_ = context.cell
        step_x, step_y = (right - left) / columns_, (bottom - top) / rows_
        x, y = left + column * step_x, top + row * step_y
        crop = image.crop([round(n) for n in (x - step_x, y - step_y, x + 2 * step_x, y + 2 * step_y)])
        file = io.BytesIO()
        crop.resize((side, side)).save(file, format="JPEG", quality=60)
        return "data:image/jpeg;base64," + base64.b64encode(file.getvalue()).decode("ascii")

    return picture


if __name__ == "__main__":
    main()
