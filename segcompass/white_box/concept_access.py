"""How a model's read-out uses its concepts: what is shown of them, and masks made again under a `Change`.

One class per `concept_reading`, in `READINGS`; another read-out is examined by another class and a line there. Knows
nothing about data sets or what is true of an image.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import torch

from segcompass.modeling_segcompass import SegCompassModel
from segcompass.modeling_segcompass.grounded_reading import DECODER_CONFIDENCE
from segcompass.modeling_segcompass.patch_boxes import grid_shape, has_area
from segcompass.modeling_segcompass.query_codebook import Concepts
from segcompass.modeling_segcompass.states import ReasoningStates
from segcompass.modeling_segcompass.token_layout import IMAGE

from .criteria import Change
from .decoding import decode

HANDED = 3.0
"""Factor on a concept that gets the weight of others, where a read-out's weights cannot be set."""


class ConceptMeans(NamedTuple):
    """Each concept's mean content over the samples in which it was read."""

    value: torch.Tensor
    """float (d_sae,), strength."""
    place: torch.Tensor
    """float (d_sae, positions), where it fired, as `token_position_features` says it."""


class PlaceMeans(NamedTuple):
    """Each concept's mean map over the samples in which it was chosen."""

    maps: torch.Tensor
    """float (d_sae, rows * columns)."""
    grid: tuple[int, int]
    """rows and columns."""

    def on(self, grid: tuple[int, int]) -> torch.Tensor:
        """The maps on another grid of patches, float (d_sae, patches)."""
        return _on_grid(self.maps[None], self.grid, grid)[0]


def _on_grid(maps: torch.Tensor, grid: tuple[int, int], other: tuple[int, int]) -> torch.Tensor:
    """Maps (B, M, patches of a grid) on another grid of the same extent."""
    if grid == other:
        return maps
    return torch.nn.functional.interpolate(maps.unflatten(2, grid), size=other, mode="bilinear").flatten(2)


def _patches(outputs: Any) -> torch.Tensor:
    """float (patches, 4): the boxes of the first sample's patches, without what pads a batch and the ends of rows."""
    boxes = outputs.patch_boxes[0]
    return boxes[has_area(boxes)]


@contextmanager
def _changed_tokens(codebook: Any, change: Callable[..., Any]) -> Iterator[None]:
    """While open, the codebook's concept tokens are `change(indices, activations, token_positions)`."""

    def concept_tokens(sae, z, may_fire, token_positions, scale=None):
        indices, smallest = codebook.select(sae, z, may_fire, scale)
        activations = codebook.activate(sae, z, may_fire, indices, smallest, scale)
        values, places, activations = change(indices, activations, token_positions.to(activations.dtype))
        tokens = values[..., None] * codebook.codebook[indices] + codebook.where(places)  # (B, M, d_c)
        return tokens, values > 0, Concepts(None, indices, values, None, activations)

    codebook.concept_tokens = concept_tokens
    try:
        yield
    finally:
        del codebook.concept_tokens


def _content(activations: torch.Tensor, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Strength (B, M) and mean place (B, M, positions) of concepts from their activations (B, T, M)."""
    return activations.amax(1), (activations.mT @ positions) / activations.sum(1).clamp_min(1e-6)[..., None]


class AttentionReading:
    """The paper's path: concept tokens (one per SAE feature) that encoder blocks gather into slots.

    The map that is shown is that of `model.explain`: activations at the image's patches, less their mean, by weight.

    Args:
        model: in evaluation mode, with `concept_reading="feature"`.
        states: of one sample.
        means: from `gather_means`.

    Example:
        means = AttentionReading.gather_means(model, batches)
        reading = AttentionReading(model, single_sample(states, 0), means)
        masks = reading.masks(0, [Change(), Change(silent="image")])
    """

    def __init__(self, model: SegCompassModel, states: ReasoningStates, means: ConceptMeans):
        self.model, self.states, self.means = model, states, means
        outputs: Any = decode(model, states)
        self.outputs = outputs
        self.indices = outputs.concept_indices[0].cpu().numpy()
        self.weights = outputs.concept_weights[0].float().cpu().numpy()
        self.active = (outputs.concept_values[0] > 0).cpu().numpy()
        self.fired = self.indices[self.active]
        self.on_image = outputs.token_types[0] == IMAGE  # (T,)
        self.patch_boxes = _patches(outputs)

    @staticmethod
    @torch.no_grad()
    def gather_means(model: SegCompassModel, batches: Iterator[dict[str, Any]]) -> ConceptMeans:
        """Read samples, teacher-forced, and take the mean of every concept's content.

        Args:
            model: in evaluation mode.
            batches: inputs of the model's forward, with an image and a response.

        Returns:
            The means; of concepts that were never selected, those of all others together.
        """
        d_sae = model.config.sae_config.d_sae
        count, value, place = torch.zeros(d_sae, 1), torch.zeros(d_sae, 1), torch.zeros(())

        def listen(indices, activations, positions):
            nonlocal place
            strengths, places = _content(activations, positions)
            if place.dim() == 0:
                place = torch.zeros(d_sae, places.shape[-1])
            fired = strengths > 0  # (B, M)
            chosen = indices[fired].cpu()
            count.index_add_(0, chosen, torch.ones(len(chosen), 1))
            value.index_add_(0, chosen, strengths[fired].float().cpu()[:, None])
            place.index_add_(0, chosen, places[fired].float().cpu())
            return strengths, places, activations

        with _changed_tokens(model.query_codebook, listen):
            for inputs in batches:
                model(**inputs)
        total = count.sum().clamp_min(1)
        mean_value = torch.where(count > 0, value / count.clamp_min(1), value.sum() / total)[:, 0]
        return ConceptMeans(mean_value, torch.where(count > 0, place / count.clamp_min(1), place.sum(0) / total))

    def shown(self, weights: np.ndarray) -> np.ndarray:
        """See `criteria.Reading`."""
        shows = has_area(self.outputs.patch_boxes[0]).cpu()
        fired = self.outputs.concept_activations[0][self.on_image].float().cpu()
        fired = fired[shows[: len(fired)]].numpy()  # (patches, M)
        return np.maximum(fired - fired.mean(0), 0) @ weights

    def sum_error(self, slot: int) -> float:
        """See `criteria.Reading`: the shown map, over the heatmap's grid, is no account of the heatmap's logits."""
        rows, columns = grid_shape(self.outputs.patch_boxes[0])
        shown = torch.from_numpy(self.shown(self.weights[slot])).reshape(1, 1, rows, columns).float()
        heatmap = self.outputs.heatmaps[0, slot].float().cpu()
        shown = torch.nn.functional.interpolate(shown, size=heatmap.shape, mode="bilinear")[0, 0]
        return float((shown - heatmap).abs().max())

    @torch.no_grad()
    def masks(self, slot: int, changes: Sequence[Change]) -> torch.Tensor:
        """See `criteria.Reading`."""
        rows = {
            name: value.expand(len(changes), *value.shape[1:])
            for name, value in self.states._asdict().items()
            if value is not None
        }
        states = self.states._replace(**rows)
        # only this sample's concepts, so that no other takes the place of one that is switched off
        scale = states.z.new_zeros(len(changes), self.model.config.sae_config.d_sae)  # (V, d_sae)
        scale[:, torch.from_numpy(self.indices[self.active]).to(scale.device)] = 1
        averaged = torch.zeros_like(scale, dtype=torch.bool)  # (V, d_sae)
        heard = torch.ones(len(changes), states.z.shape[1], dtype=torch.bool, device=scale.device)  # (V, T)
        for row, change in enumerate(changes):
            scale[row, list(change.off)] = 0
            scale[row, list(change.to)] = HANDED
            averaged[row, list(change.mean)] = True
            if change.silent:
                heard[row] = ~self.on_image if change.silent == "image" else self.on_image

        def change_content(indices, activations, positions):
            activations = activations * heard[..., None]
            values, places = _content(activations, positions)
            replaced = averaged.gather(1, indices) & (values > 0)  # (V, M)
            value = self.means.value.to(values)[indices]
            place = self.means.place.to(places)[indices]
            return (
                torch.where(replaced, value, values),
                torch.where(replaced[..., None], place, places),
                activations,
            )

        with _changed_tokens(self.model.query_codebook, change_content):
            outputs: Any = decode(self.model, states, concept_scale=scale)
        sure = outputs.pred_logits[:, slot] >= 0  # (V,)
        return (outputs.pred_masks[:, slot] > 0) & sure[:, None, None]  # (V, 4h, 4w)


class PlacesReading:
    """The grounded read-out, whose heatmaps are sums of concepts' places. What is shown are the contributions.

    Here `move`, `content` and `shown` hold by construction: they guard the code and are no evidence.

    Args:
        model: in evaluation mode, with `concept_reading="grounded"`.
        states: of one sample.
        means: from `gather_means`.

    Example:
        means = PlacesReading.gather_means(model, batches)
        reading = PlacesReading(model, single_sample(states, 0), means)
        masks = reading.masks(0, [Change(), Change(off=(4711,), to=(12,))])
    """

    def __init__(self, model: SegCompassModel, states: ReasoningStates, means: PlaceMeans):
        self.model, self.states, self.means = model, states, means
        outputs: Any = decode(model, states)
        self.outputs = outputs
        self.indices = outputs.concept_indices[0].cpu().numpy()
        self.weights = outputs.concept_weights[0].float().cpu().numpy()
        self.active = (outputs.concept_values[0] > 0).cpu().numpy()
        on_image = outputs.token_types[0] == IMAGE  # (T,)
        self.fired = (model.sae.encode(states.z[0, on_image]) > 0).any(0).nonzero()[:, 0].cpu().numpy()
        self.patch_boxes = _patches(outputs)

    @staticmethod
    @torch.no_grad()
    def gather_means(model: SegCompassModel, batches: Iterator[dict[str, Any]]) -> PlaceMeans:
        """Read samples, teacher-forced, and take the mean of every concept's map, on the first sample's grid.

        Args:
            model: in evaluation mode.
            batches: inputs of the model's forward, with an image and a response.

        Returns:
            The means; 0 for concepts that were never chosen.

        Raises:
            ValueError: there are no samples.
        """
        d_sae = model.config.sae_config.d_sae
        count, maps, grid = torch.zeros(d_sae, 1), None, (0, 0)
        for inputs in batches:
            outputs: Any = model(**inputs)
            indices = outputs.concept_indices.cpu()  # (B, M)
            found = outputs.grounding.maps.mT.float().cpu()  # (B, M, patches)
            chosen = (outputs.concept_values > 0).cpu()
            grids = [grid_shape(boxes) for boxes in outputs.patch_boxes]
            if maps is None:
                grid = grids[0]
                maps = torch.zeros(d_sae, grid[0] * grid[1])
            if set(grids) != {grid}:  # smaller grids of a batch are padded at the end
                parts = zip(found, grids, strict=True)
                found = torch.cat([_on_grid(each[None, :, : mine[0] * mine[1]], mine, grid) for each, mine in parts])
            maps.index_add_(0, indices[chosen], found[chosen])
            count.index_add_(0, indices[chosen], torch.ones(int(chosen.sum()), 1))
        if maps is None:
            raise ValueError("there are no samples to take concepts' means of; give at least one batch.")
        return PlaceMeans(maps / count.clamp_min(1), grid)

    def shown(self, weights: np.ndarray) -> np.ndarray:
        """See `criteria.Reading`."""
        maps = self.outputs.grounding.maps[0]  # (image tokens, M)
        shows = has_area(self.outputs.patch_boxes[0])[: len(maps)]
        return maps[shows].float().cpu().numpy() @ weights

    def sum_error(self, slot: int) -> float:
        """See `criteria.Reading`."""
        grounding = self.outputs.grounding
        total = grounding.on_keys(0, slot).sum(0) + grounding.key_offset  # (h, w)
        return float((total - self.outputs.heatmaps[0, slot]).detach().abs().max())

    @torch.no_grad()
    def masks(self, slot: int, changes: Sequence[Change]) -> torch.Tensor:
        """See `criteria.Reading`."""
        return torch.stack([self._mask(slot, change) for change in changes])

    def _mask(self, slot, change):
        if change.mean or change.silent:
            return self._mask_of(slot, change)
        freed = float(self.weights[slot, np.isin(self.indices, change.off)].sum())
        outputs: Any = self.model.decode_masks(
            **self.states._asdict(),
            concept_scale=dict.fromkeys(change.off, 0.0) or None,
            concept_add=dict.fromkeys(change.to, freed / len(change.to)) if change.to else None,
        )
        return (outputs.pred_masks[0, slot] > 0) & (outputs.pred_logits[0, slot] >= 0)

    def _mask_of(self, slot, change):
        """The mask of changed places, or of no words; the confidence, which has no part in it, stays."""
        grounding, model = self.outputs.grounding, self.model
        maps = grounding.maps[0].mT.clone()  # (M, patches)
        replaced = torch.from_numpy(np.isin(self.indices, change.mean)).to(maps.device)
        if replaced.any():
            grid = grid_shape(self.outputs.patch_boxes[0])
            shows = has_area(self.outputs.patch_boxes[0]).nonzero()[:, 0]
            mean = self.means.on(grid).to(maps)[self.outputs.concept_indices[0][replaced]]
            maps[replaced.nonzero()[:, :1], shows] = mean
        weights = grounding.weights[0, slot] * (0 if change.silent else 1)  # without words nothing is chosen
        heat = weights @ maps + grounding.offset  # (patches,)
        heat = grounding.key_scale * (grounding.upsampling[0] @ heat) + grounding.key_shift  # (h, w)
        keys = self.states.image_embeddings.to(heat)
        positions = model.key_positions(keys.shape[-2:]).to(keys)
        cell_mask = model.cell_mask(keys, self.states.reshaped_input_sizes)
        confidence = torch.full((1, 1), DECODER_CONFIDENCE, device=keys.device, dtype=keys.dtype)
        mask = model.mask_decoder(keys, positions, heat[None, None].to(keys.dtype), confidence, cell_mask)[0, 0]
        return (mask > 0) & (self.outputs.pred_logits[0, slot] >= 0)


READINGS: dict[str, Any] = {"feature": AttentionReading, "grounded": PlacesReading}
"""concept_reading -> the class that examines it."""


def reading_of(model: SegCompassModel) -> Any:
    """The class that examines a model.

    Args:
        model: any.

    Returns:
        One of `READINGS`.

    Raises:
        ValueError: there is none for its `concept_reading`.
    """
    kind = model.config.concept_reading
    if kind not in READINGS:
        raise ValueError(
            f"the model's concept_reading is {kind!r}; the criteria can examine {', '.join(map(repr, READINGS))}. "
            "Examine such a model, or add a class to READINGS in segcompass/white_box/concept_access.py."
        )
    return READINGS[kind]
