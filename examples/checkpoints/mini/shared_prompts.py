"""Prompts that begin alike are read once: eight questions about one image cost one reading of the image.

The first pass of a generation reads B prompts. Rows that show the same image have all image tokens in common, and some
words before and after them. Here that pass becomes two: one over what is common, a row for each image, and one over the
rest, all rows, on the key-value cache of the first. The states then stand as the one pass would have left them, token
for token, so nobody else notices; numbers differ as they do between batches, by the rounding of sums.

It is done where it is known to be right: attention from left to right alone, a cache that can be copied and cut, the
same computation in every row. Everywhere else nothing changes. Knows nothing of families.
"""

import inspect
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers import DynamicCache

from .backbone import PER_TOKEN_INPUTS, Backbone
from .generation_options import option
from .states import StateRecorder, open_recorder

WHOLE_PASS: dict[str, tuple[Any, ...]] = {
    "prefill_chunk_size": (None,),
    "output_hidden_states": (None, False),
    "output_attentions": (None, False),
    "return_dict_in_generate": (None, False),
}
"""Options of `generate`, and the values under which its first pass is over the prompts and nobody sees its cache."""


class Beginnings(NamedTuple):
    """Which tokens of B prompts of T tokens are read once for G images. P is the longest beginning, R the longest rest.

    Example:
        found = common_beginnings(input_ids, attention_mask, images, image_token_id)
        read_once = input_ids[found.firsts].gather(1, found.columns)
    """

    group: torch.Tensor
    """long (B,) in 0 ... G - 1: rows of one group begin alike."""
    firsts: torch.Tensor
    """long (G,), the row that is read for its group."""
    columns: torch.Tensor
    """long (G, P), where a beginning's tokens stand in that row; it ends in the last column."""
    begun: torch.Tensor
    """bool (G, P), False where a beginning is shorter."""
    left: torch.Tensor
    """bool (B, R), which of the last R columns of a prompt are its rest, in each row the last ones."""
    places: torch.Tensor
    """long (B, T), where each token of a prompt stands among P + R; padding stands anywhere."""


def common_beginnings(
    input_ids: torch.Tensor, attention_mask: torch.Tensor, images: Sequence[int], image_token_id: int
) -> Beginnings | None:
    """What prompts have in common, where their image tokens are in it and fewer tokens are to be read that way.

    Args:
        input_ids: long (B, T), padded on the left.
        attention_mask: (B, T), 0 at padding.
        images: of each row which image it shows: equal numbers, equal images.
        image_token_id: the MLLM's image token.

    Returns:
        Beginnings, or None where the prompts are better read each by itself.
    """
    batch, length = input_ids.shape
    used = attention_mask.bool().sum(1).tolist()
    rows = [row[length - count :] for row, count in zip(input_ids.tolist(), used, strict=True)]
    groups: dict[Any, list[int]] = {}
    for number, (row, image) in enumerate(zip(rows, images, strict=True)):
        groups.setdefault((image, *row[: _after_image(row, image_token_id)]), []).append(number)
    sizes = [_common([rows[number] for number in numbers]) for numbers in groups.values()]
    if any(size < len(key) - 1 for size, key in zip(sizes, groups, strict=True)):
        return None  # no token stands behind an image
    group, firsts = torch.empty(batch, dtype=torch.long), torch.tensor([numbers[0] for numbers in groups.values()])
    for number, numbers in enumerate(groups.values()):
        group[numbers] = number
    beginnings = torch.tensor(sizes)  # (G,), tokens
    rests = torch.tensor([len(row) for row in rows]) - beginnings[group]  # (B,), tokens
    longest, rest = int(beginnings.max()), int(rests.max())
    if len(firsts) * longest + batch * rest >= batch * length:
        return None
    ends = length - rests  # (B,), the column where a rest begins
    place = torch.arange(length) - ends[:, None]  # (B, T), from where the rest begins
    made = Beginnings(
        group=group,
        firsts=firsts,
        columns=(ends[firsts, None] - longest + torch.arange(longest)).clamp_min(0),
        begun=torch.arange(longest) >= longest - beginnings[:, None],
        left=torch.arange(rest) >= rest - rests[:, None],
        places=torch.where(place < 0, place + longest, torch.arange(length) - length + longest + rest).clamp_min(0),
    )
    return Beginnings(*(value.to(input_ids.device) for value in made))


def _after_image(row, image_token_id):
    """The number of tokens up to the last image token."""
    return len(row) - row[::-1].index(image_token_id) if image_token_id in row else 0


def _common(rows):
    """The number of tokens with which all rows begin, and after which each has one more."""
    most = min(map(len, rows)) - 1
    return next((place for place in range(most) if len({row[place] for row in rows}) > 1), most)


def number_alike(rows: Sequence[Sequence[torch.Tensor]]) -> list[int]:
    """Give equal rows equal numbers.

    Args:
        rows: tensors of B samples, of each as many.

    Returns:
        A number for each row: that of the first one equal to it.
    """
    values = [value for row in rows for value in row]
    if len(rows) < 2 or not values:
        return [0] * len(rows)
    each = [value.double().sum().to(values[0].device) for value in values]
    sums = torch.stack(each).view(len(rows), -1).tolist()  # one wait for the device
    numbers: list[int] = []
    seen: dict[Any, list[int]] = {}
    for number, row in enumerate(rows):
        key = (*sums[number], *(tuple(value.shape) for value in row))  # so that few are compared
        alike = seen.setdefault(key, [])
        first = next((n for n in alike if all(map(torch.equal, rows[n], row))), number)
        alike += [number] if first == number else []
        numbers.append(first)
    return numbers


class SharedPrompts:
    """While it is open, the first pass of the generation that a recorder follows reads common beginnings once.

    Args:
        mllm: the MLLM that will generate.
        backbone: its family.
        recorder: the open recorder of this thread.
        keywords: of the call to the MLLM's `generate`; with a cache of `roomy_cache` beginnings can be shared.

    Example:
        with SharedPrompts(model.mllm, model.backbone, recorder, inputs) as shared:
            sequences = model.mllm.generate(**shared.keywords)
    """

    def __init__(self, mllm: Any, backbone: Backbone, recorder: StateRecorder, keywords: Mapping[str, Any]):
        self.mllm, self.backbone, self.recorder = mllm, backbone, recorder
        self.keywords = dict(keywords)
        """what `generate` is called with: pictures that are read here are left out."""
        self._cache: Any = next((v for v in keywords.values() if isinstance(v, DynamicCache)), None)
        self._first_pass = True
        self._found = self._find()
        if self._found is not None:
            self.keywords = {name: value for name, value in self.keywords.items() if "pixel_values" not in name}

    def _find(self):
        """The beginnings, and the pictures that go with them in `_pictures`; None where the pass stays whole."""
        inputs = self.backbone.mllm_inputs(self.mllm, self.keywords)
        if not self._is_plain(inputs):
            return None
        ids, image_token = inputs["input_ids"], self.mllm.config.image_token_id
        pictures = {n: v for n, v in inputs.items() if isinstance(v, torch.Tensor) and n not in PER_TOKEN_INPUTS}
        try:
            rows = [
                self.backbone.select_rows({"input_ids": ids, **pictures}, [n], image_token) for n in range(len(ids))
            ]
        except ValueError:  # what belongs to which row cannot be told
            return None
        alike = number_alike([[row[name] for name in pictures] for row in rows])
        found = common_beginnings(ids, inputs["attention_mask"], alike, image_token)
        if found is not None:
            self._pictures = {n: torch.cat([rows[first][n] for first in found.firsts.tolist()]) for n in pictures}
        return found

    def _is_plain(self, inputs):
        """Whether this generation's first pass can be parted."""
        ids, mask = inputs.get("input_ids"), inputs.get("attention_mask")
        return (
            ids is not None
            and mask is not None
            and len(ids) > 1
            and bool((mask.diff(dim=1) >= 0).all())  # padded on the left alone
            and "pixel_values" in inputs
            and not {"position_ids", "inputs_embeds"} & set(inputs)
            and all(option(name, self.keywords, self.mllm) in values for name, values in WHOLE_PASS.items())
            and not self.mllm.training  # in which each row may drop other values
            and self.recorder.steer is None  # as may be steered in each row otherwise
            and not hasattr(self.mllm, "create_masks_for_generate")  # where a token sees what comes after it
            and self._cache is not None
            and "position_ids" in inspect.signature(self.mllm.forward).parameters  # or it would count columns
        )

    def __enter__(self) -> "SharedPrompts":
        self._hooks: list[Any] = []
        if self._found is not None:
            self._hooks.append(self.mllm.register_forward_pre_hook(self._before_pass, with_kwargs=True))
            self._hooks.append(self.mllm.register_forward_hook(self._after_pass))
        return self

    def __exit__(self, *error: object) -> None:
        for hook in self._hooks:
            hook.remove()

    def _before_pass(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> Any:
        """Before the first pass read the beginnings; the cache then holds P + R tokens where others believe in T."""
        if open_recorder(self.mllm) is not self.recorder:
            return None
        kwargs = dict(kwargs)
        if self._first_pass:
            kwargs = self._read_beginnings(kwargs)
        else:
            new = self._cache.get_seq_length() + kwargs["input_ids"].shape[1] - self._mask.shape[1]
            kwargs["attention_mask"] = nn.functional.pad(self._mask, (0, new), value=1)
        return args, kwargs

    def _read_beginnings(self, kwargs):
        """Read the beginnings, copy them to all rows, and return what the pass over the rest is called with."""
        found, batch = self._found, len(self._found.group)
        rest = {name: value for name, value in kwargs.items() if name not in (*self._pictures, "mm_encoder_outputs")}
        once = {**rest, **self._pictures}
        for name in {*PER_TOKEN_INPUTS, "position_ids"} - {"attention_mask"}:
            if rest.get(name) is None:
                continue
            value = kwargs[name].expand(*kwargs[name].shape[:-2], batch, -1)  # (..., B, T)
            filler = value[..., -1:] if name == "input_ids" else value.new_zeros(batch, 1)  # where there is no token
            begun = value[..., found.firsts[:, None], found.columns]  # (..., G, P)
            once[name] = torch.where(found.begun, begun, filler[found.firsts])
            rest[name] = torch.where(found.left, value[..., -found.left.shape[1] :], filler)  # (..., B, R)
        self._mask = torch.cat([found.begun[found.group], found.left], 1).long()  # (B, P + R)
        once["attention_mask"], rest["attention_mask"] = found.begun.long(), self._mask
        core = self.backbone.without_head(self.mllm)
        core(**self.backbone.mllm_inputs(core, once))
        for layer in self._cache.layers:
            layer.batch_select_indices(found.group.to(layer.keys.device))
        return rest

    def _after_pass(self, module: nn.Module, args: Any, output: Any) -> None:
        """After the first pass: the states of the prompts as one pass over them would have left them."""
        if not self._first_pass or open_recorder(self.mllm) is not self.recorder:
            return
        self._first_pass = False
        for kept in (self.recorder.z, self.recorder.last_hidden):
            once, rest = kept
            group, places = (index.to(rest.device) for index in (self._found.group, self._found.places))
            states = torch.cat([once[group], rest], 1)  # (B, P + R, d_π)
            kept[:] = [states[torch.arange(len(states), device=rest.device)[:, None], places]]  # (B, T, d_π)
