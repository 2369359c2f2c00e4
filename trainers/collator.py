"""From rows of a data set to one training batch: model inputs with the response appended, and mask targets."""

import logging
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from PIL import Image

from segcompass.loaders.rows import check_reasoning, row_image
from segcompass.modeling_segcompass.images import read_image

from .alignment import AlignmentTargets
from .checks import check_masks
from .image_features import ImageFeatures
from .targets import mask_targets

logger = logging.getLogger(__name__)


class SegCompassCollator:
    """Collates rows of the shared schema for supervised training.

    Args:
        processor: a SegCompassProcessor.
        mask_side: side of the mask logits, four times the key grid; None leaves out all that masks need.
        image_features: the cache to read the image encoder's features from; None makes the encoder's pixels.
        alignment: makes the targets of the alignment term; None leaves them out.

    Example:
        >>> collate = SegCompassCollator(processor, mask_side=4 * model.config.key_grid)
        >>> batch = collate([rows[0], rows[1]])
        >>> outputs = model(**{name: value for name, value in batch.items() if name != "mask_targets"})
    """

    def __init__(
        self,
        processor: Any,
        mask_side: int | None = None,
        image_features: ImageFeatures | None = None,
        alignment: AlignmentTargets | None = None,
    ):
        self.processor = processor
        self.alignment = alignment
        self.mask_side = mask_side
        self.image_features = image_features

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> Any:
        """Collate rows.

        Args:
            rows: B rows with `reasoning` and, where masks are wanted, `masks`, `height` and `width`.

        Returns:
            The model's inputs (see the processor), `mask_targets`, a list of B tensors (G_i, s, s) in [0, 1],
            and with `alignment` also `alignment_targets`, an `Alignment`.

        Raises:
            ValueError: a row without reasoning, which supervised training needs, or whose reasoning, masks or image
                cannot serve.
            OSError: an image that cannot be read.
        """
        for row in rows:
            if not (row.get("reasoning") or "").strip():
                raise ValueError(
                    f"row {row.get('sample_id')!r} has no reasoning; supervised training imitates a trace, so fill the "
                    "column 'reasoning' or train with SegCompassGRPOTrainer, which needs none."
                )
            try:
                check_reasoning(row["reasoning"])
                self.processor.check_response(row["reasoning"])
            except ValueError as error:
                raise ValueError(f"row {row.get('sample_id')!r}: {error}") from error
            if self.mask_side is not None:
                check_masks(row)
        images = [row_image(row) for row in rows]
        batch = self.processor(
            images=images,
            text=[row["instruction"] for row in rows],
            response=[self.processor.format_response(row["reasoning"]) for row in rows],
            image_encoder=self.mask_side is not None and self.image_features is None,
        )
        if self.alignment is not None:
            batch["alignment_targets"] = self.alignment(rows, batch)
        if self.mask_side is None:
            return batch
        if self.image_features is not None:
            batch.update(self.image_features.inputs(images))
        batch["mask_targets"] = [
            mask_targets(row["masks"], row["height"], row["width"], self.processor.frame, self.mask_side)
            for row in rows
        ]
        return batch


class ImageTextCollator:
    """Collates image-text(-response) rows of any form (`loaders.image_text`) into inputs of the MLLM alone.

    A row that cannot be used is left out, counted by reason in the batch's `skipped` (a Counter) and logged.

    Args:
        processor: a SegCompassProcessor.
        read: row -> {"image", "text", "response", "reasoning"}; raises ValueError for a row without them.
        token_window: most tokens a sample may have, image and response included.

    Example:
        >>> collate = ImageTextCollator(processor, read)
        >>> inputs = collate(rows)
        >>> skipped = inputs.pop("skipped")
    """

    def __init__(
        self,
        processor: Any,
        read: Callable[[Mapping[str, Any]], dict[str, Any]],
        token_window: int = 3400,
    ):
        self.processor = processor
        self.read = read
        self.token_window = token_window

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """Collate the rows that can be used.

        Args:
            rows: rows that `read` understands.

        Returns:
            The model's inputs (see the processor, `image_encoder=False`) and `skipped`; only `skipped` if no row is
            usable.
        """
        skipped: Counter[str] = Counter()
        images, texts, responses = [], [], []
        for row in rows:
            try:
                row = self.read(row)
                image = open_image(row["image"])
                prompt = self.processor.prompt_text(row["text"])
                self.processor.check_response(f"{row['response'] or ''} {row['reasoning'] or ''}")
            except (ValueError, OSError) as error:
                reason = "image does not open" if isinstance(error, OSError) else "no image or usable text"
                skipped[reason] += 1
                logger.warning("a sample is skipped, %s: %s", reason, error)
                continue
            response = row["response"]
            if response is None and row["reasoning"]:
                response = self.processor.format_response(row["reasoning"])
            words = len(self.processor.tokenizer(f"{prompt}{response or ''}")["input_ids"])
            if words > self.token_window:
                skipped["too long"] += 1
                logger.warning("a sample is skipped, too long: its text has %d tokens", words)
                continue
            images.append(image)
            texts.append(row["text"])
            responses.append(response)
        if not images:
            return {"skipped": skipped}
        batch = self._fitting(images, texts, responses, skipped)
        batch["skipped"] = skipped
        return batch

    def _fitting(self, images, texts, responses, skipped):
        """Process the samples; those that turn out longer than the window are left out."""
        some = any(response is not None for response in responses)
        limit, self.processor.max_prompt_length = self.processor.max_prompt_length, float("inf")
        try:
            batch = dict(
                self.processor(
                    images=images,
                    text=texts,
                    response=[response or "" for response in responses] if some else None,
                    image_encoder=False,
                )
            )
        finally:
            self.processor.max_prompt_length = limit
        if some:  # a row without response was given an end token alone
            alone = [place for place, response in enumerate(responses) if response is None]
            batch["attention_mask"][alone] *= ~batch["response_mask"][alone]
        fits = (batch["attention_mask"].sum(1) <= self.token_window).tolist()
        if all(fits):
            return batch
        skipped["too long"] += fits.count(False)
        logger.warning("%d samples are skipped, longer than %d tokens", fits.count(False), self.token_window)
        kept = [place for place, fit in enumerate(fits) if fit]
        if not kept:
            return {}
        return self._fitting(*([part[place] for place in kept] for part in (images, texts, responses)), skipped)


def open_image(image: Any) -> Image.Image:
    """An image in any form that `read_image` reads -> upright PIL RGB. Raises OSError."""
    try:
        return read_image(image)
    except ValueError as error:
        raise OSError(str(error)) from error
