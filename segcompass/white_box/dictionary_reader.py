"""Reads what a concept dictionary is made from: a model's concepts on the tokens of image, instruction and reasoning.

`TokenReader` runs the MLLM up to the SAE's layer only, on reference reasoning; `build_dictionary` reads a data set with
it and survives interruptions. Knows nothing about what is true of the images: `image_truth` does.
"""

import base64
import io
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from datasets import Dataset
from tqdm import tqdm

from segcompass.modeling_segcompass import SegCompassModel, SegCompassProcessor
from segcompass.modeling_segcompass.patch_boxes import grid_shape, has_area
from segcompass.modeling_segcompass.token_layout import IMAGE, token_types
from segcompass.modeling_segcompass.whole_files import write_whole
from segcompass.trainers.activations import layer_hidden_states

from .concept_dictionary import TOKEN_KINDS, ConceptDictionary, Context, DictionaryBuilder

AROUND = 4  # word pieces shown on either side of a context
SAVE_EVERY = 10  # batches


class SampleTokens(NamedTuple):
    """The tokens of one sample that may fire concepts."""

    sample: str
    """the row's `sample_id`."""
    ids: list[int]
    """T token ids."""
    types: torch.Tensor
    """long (T,), IMAGE, INSTRUCTION or RESPONSE."""
    activations: torch.Tensor
    """float (T, d_sae), on the CPU."""
    states: torch.Tensor
    """float (T, d_π), hidden states at the SAE's layer, on the CPU."""
    boxes: torch.Tensor
    """float (P, 4), the part of the image that each image token shows, see `patch_boxes`; on the CPU."""

    @property
    def grid(self) -> tuple[int, int]:
        """(rows, columns) of the image tokens, where they are one grid. Raises ValueError."""
        return grid_shape(self.boxes)


class TokenReader:
    """Runs a model up to its SAE's layer and encodes every token of image, instruction and reference reasoning.

    Args:
        model: in evaluation mode.
        processor: the model's.

    Example:
        reader = TokenReader(*load("examples/checkpoints/mini"))
        for tokens in reader.read(list(load_scenes(split="train", seed=0, num_samples=8))):
            print(tokens.sample, (tokens.activations > 0).sum(1).float().mean())
    """

    def __init__(self, model: SegCompassModel, processor: SegCompassProcessor):
        self.model, self.processor = model, processor

    @torch.no_grad()
    def read(self, rows: list[dict[str, Any]]) -> Iterator[SampleTokens]:
        """Read one batch.

        Args:
            rows: of a data set, with `image`, `instruction` and `reasoning`.

        Yields:
            One SampleTokens per row.
        """
        inputs = self.processor(
            images=[row["image"] for row in rows],
            text=[row["instruction"] for row in rows],
            response=[self.processor.format_response(row["reasoning"] or "") for row in rows],
            image_encoder=False,
        ).to(self.model.device)
        ids = inputs["input_ids"]
        z = layer_hidden_states(self.model, dict(inputs), self.model.config.sae_config.layer)  # (B, T, d_π)
        may_fire = self.model.concept_token_mask(ids, inputs["attention_mask"])  # (B, T)
        types = token_types(ids, inputs["response_mask"], self.model.config.image_token_id)  # (B, T)
        counts = (types == IMAGE).sum(1).tolist()
        for place, row in enumerate(rows):
            chosen = may_fire[place]
            yield SampleTokens(
                sample=row["sample_id"],
                ids=ids[place, chosen].tolist(),
                types=types[place, chosen].cpu(),
                activations=self.model.sae.encode(z[place, chosen]).float().cpu(),
                states=z[place, chosen].float().cpu(),
                boxes=inputs["patch_boxes"][place, : counts[place]].cpu(),
            )

    def words(self, ids: list[int]) -> list[str]:
        """The text of each token by itself, without spaces around it.

        Args:
            ids: token ids.

        Returns:
            One text per token.
        """
        return [self.processor.tokenizer.decode([token]).strip() for token in ids]

    def spans(self, ids: list[int]) -> tuple[str, list[tuple[int, int]]]:
        """The text of tokens together, and where each stands in it.

        Args:
            ids: T token ids.

        Returns:
            The text, and (start, end) of each token.
        """
        decode = self.processor.tokenizer.decode
        ends = [0] + [len(decode(ids[: stop + 1], clean_up_tokenization_spaces=False)) for stop in range(len(ids))]
        return decode(ids, clean_up_tokenization_spaces=False), list(pairwise(ends))


def build_dictionary(
    reader: TokenReader,
    rows: Dataset,
    source: str,
    partial: Path,
    contexts: int = 6,
    batch_size: int = 32,
    patch_words: Callable[[int, torch.Tensor], list[str]] | None = None,
) -> ConceptDictionary:
    """Read a data set and make the dictionary of what was read.

    Args:
        reader: of the model.
        rows: the data set.
        source: what the dictionary calls it.
        partial: file that what was read is kept in, so that an interrupted run resumes there.
        contexts: how many of the strongest places to keep of each feature.
        batch_size: rows read at a time.
        patch_words: (number of the row, boxes of its patches) -> what each image patch shows; None where it is unknown.

    Returns:
        The dictionary.

    Raises:
        ValueError: `partial` was written by another version of this project.
    """
    builder = DictionaryBuilder(reader.model.config.sae_config.d_sae, contexts)
    samples: list[tuple[str, list[int], list[int], torch.Tensor]] = []  # ..., token types, boxes
    if partial.exists():
        try:
            state = torch.load(partial, weights_only=True)
            builder.load_state_dict(state["builder"])
            samples = state["samples"]
        except KeyError as error:
            raise ValueError(f"{partial} was written by another version ({error} is missing); delete it.") from error
    done = len(samples)
    with tqdm(total=len(rows), initial=done, unit="sample", dynamic_ncols=True) as bar:
        for start in range(done, len(rows), batch_size):
            batch = [rows[index] for index in range(start, min(start + batch_size, len(rows)))]
            for tokens in reader.read(batch):
                builder.add(tokens.activations, tokens.types)
                samples.append((tokens.sample, tokens.ids, tokens.types.tolist(), tokens.boxes))
            if start // batch_size % SAVE_EVERY == SAVE_EVERY - 1 or len(samples) == len(rows):
                _save_whole(partial, {"builder": builder.state_dict(), "samples": samples})
            bar.update(len(batch))
    starts = np.cumsum([0] + [len(ids) for _, ids, *_ in samples])

    def describe(place: int) -> dict[str, Any]:
        number = int(np.searchsorted(starts, place, side="right")) - 1
        sample, ids, types, boxes = samples[number]
        token = int(place - starts[number])
        if types[token] == IMAGE:
            patch = types[:token].count(IMAGE)
            return {
                "sample": sample,
                "part": TOKEN_KINDS[IMAGE],
                "text": patch_words(number, boxes)[patch] if patch_words else "",
                "around": _place(boxes, patch),
                "box": boxes[patch].tolist() if has_area(boxes[patch]) else None,
            }
        text = [position for position, kind in enumerate(types) if kind != IMAGE]
        here = text.index(token)
        window = [ids[position] for position in text[max(0, here - AROUND) : here + AROUND + 1]]
        return {
            "sample": sample,
            "part": TOKEN_KINDS[types[token]],
            "text": reader.words(ids[token : token + 1])[0],
            "around": reader.processor.tokenizer.decode(window),
        }

    return builder.finish(describe, source)


def _place(boxes: torch.Tensor, patch: int) -> str:
    """Where a patch is: "row r, column c", or in percent of the image where patches are no single grid."""
    if not has_area(boxes[patch]):
        return "no patch"
    try:
        row, column = divmod(patch, grid_shape(boxes)[1])
    except ValueError:
        left, top, right, bottom = (round(100 * edge) for edge in boxes[patch].tolist())
        return f"{left}-{right} % across, {top}-{bottom} % down"
    return f"row {row}, column {column}"


def _save_whole(path: Path, state: dict[str, Any]) -> None:
    """Write a file that is never seen half written."""
    write_whole(path, lambda part: torch.save(state, part))


def patch_pictures(rows: Dataset, side: int = 72) -> Callable[[Context], str | None]:
    """Pictures for `ConceptDictionary.to_html`: an image patch with its neighbours.

    Args:
        rows: the data set that the dictionary was made from.
        side: of a picture in pixels.

    Returns:
        Context -> data URL of a JPEG; None for a word.
    """
    places = {name: place for place, name in enumerate(rows["sample_id"])}

    def picture(context: Context) -> str | None:
        if context.box is None:
            return None
        image = rows[places[context.sample]]["image"].convert("RGB")
        left, top, right, bottom = np.array(context.box) * [*image.size, *image.size]
        across, down = right - left, bottom - top
        crop = image.crop([round(n) for n in (left - across, top - down, right + across, bottom + down)])
        file = io.BytesIO()
        crop.resize((side, side)).save(file, format="JPEG", quality=60)
        return "data:image/jpeg;base64," + base64.b64encode(file.getvalue()).decode("ascii")

    return picture
