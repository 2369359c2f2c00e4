"""From rows of a data set to one training batch: model inputs with the response appended, and mask targets."""

from .targets import mask_targets


class SegCompassCollator:
    """Collates rows of the shared schema for supervised training.

    Args:
        processor: a SegCompassProcessor.
        mask_side: side of the mask logits, four times the key grid; None leaves out all that masks need.
        image_features: an `ImageFeatures` cache to read SAM's features from; None makes SAM's pixels.
    """

    def __init__(self, processor, mask_side=None, image_features=None):
        self.processor = processor
        self.mask_side = mask_side
        self.image_features = image_features
        self.frame = processor.sam_image_processor.size["longest_edge"]

    def __call__(self, rows):
        """rows -> model inputs (see the processor) and `mask_targets`, a list of (G_i, s, s) float in [0, 1].

        Raises:
            ValueError: a row without reasoning, which supervised training needs.
        """
        for row in rows:
            if not row.get("reasoning"):
                raise ValueError(
                    f"row {row.get('sample_id')!r} has no reasoning; supervised training imitates a trace, so fill the "
                    "column 'reasoning' or train with SegCompassGRPOTrainer, which needs none."
                )
        batch = self.processor(
            images=[row["image"] for row in rows],
            text=[row["instruction"] for row in rows],
            response=[self.processor.format_response(row["reasoning"]) for row in rows],
            sam=self.mask_side is not None and self.image_features is None,
        )
        if self.mask_side is None:
            return batch
        if self.image_features is not None:
            batch.update(self.image_features.inputs([row["image"] for row in rows]))
        batch["mask_targets"] = [
            mask_targets(row["masks"], row["height"], row["width"], self.frame, self.mask_side) for row in rows
        ]
        return batch
