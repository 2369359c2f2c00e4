"""The cold start: supervised training of reasoning and masks together, one forward, one backward.

A plain transformers Trainer whose loss is the language loss on the reference trace plus Eq. 6's segmentation terms.
With `lambda_s = lambda_c = 0` it trains the language alone and leaves out every mask computation.
"""

from dataclasses import dataclass, field

import torch
from transformers import Trainer, TrainingArguments

from .collator import SegCompassCollator
from .image_features import open_image_features
from .losses import erasure_loss, segmentation_loss
from .optimization import SEGMENTATION_MODULES, parameter_groups
from .policy import freeze
from .targets import valid_extent


@dataclass
class SegCompassSFTConfig(TrainingArguments):
    """Training arguments plus the segmentation objective's."""

    lambda_s: float = field(default=1.0, metadata={"help": "weight of the segmentation loss (Eq. 6)"})
    lambda_c: float = field(default=0.2, metadata={"help": "weight of the confidence loss (Eq. 6)"})
    lambda_d: float = field(default=0.6, metadata={"help": "weight of the dice loss inside the segmentation loss"})
    query_source: str = field(
        default="both", metadata={"help": "'both', or 'tokens' while there is no trained SAE: queries from e_k alone"}
    )
    token_dropout: float = field(
        default=0.0, metadata={"help": "share of samples whose queries are built from concepts alone"}
    )
    segmentation_lr_multiplier: float = field(
        default=1.0, metadata={"help": "rate of codebook, slot mapper and decoder relative to the rest's"}
    )
    num_erased_concepts: int = field(
        default=0, metadata={"help": "heaviest concepts of a slot to take away in a second decoding; 0 = none"}
    )
    lambda_e: float = field(
        default=0.3, metadata={"help": "weight of the erasure loss: without those concepts the mask should be gone"}
    )
    train_below_sae_layer: bool = field(
        default=False, metadata={"help": "train decoder blocks up to the SAE's layer; a trained SAE then drifts"}
    )
    train_vision_tower: bool = field(
        default=False, metadata={"help": "train the MLLM's vision tower (for one made from nothing)"}
    )
    train_image_encoder: bool = field(
        default=False, metadata={"help": "train SAM's encoder (for one made from nothing)"}
    )
    image_features: str | None = field(
        default=None,
        metadata={"help": "folder that examples/precompute_image_features.py wrote; None encodes images as they come"},
    )
    remove_unused_columns: bool = field(default=False, metadata={"help": "the collator needs every column"})


class SegCompassSFTTrainer(Trainer):
    """Trains a SegCompassModel on rows with reasoning and masks."""

    def __init__(self, model, args, processing_class, **kwargs):
        if processing_class.num_slots != model.config.num_slots:
            raise ValueError(
                f"the processor asks for {processing_class.num_slots} concentration tokens, the model has "
                f"{model.config.num_slots} slots; build both with the same num_slots."
            )
        model.config.token_dropout = args.token_dropout
        freeze(
            model,
            train_below_sae_layer=args.train_below_sae_layer,
            train_vision_tower=args.train_vision_tower,
            train_image_encoder=args.train_image_encoder,
        )
        self.with_masks = args.lambda_s > 0 or args.lambda_c > 0
        features = None
        if args.image_features and self.with_masks:
            if args.train_image_encoder:
                raise ValueError(
                    f"image_features={args.image_features!r} are of the encoder as it is now, but "
                    "train_image_encoder=True changes it; set one of them only."
                )
            features = open_image_features(args.image_features, model, processing_class)
        mask_side = 4 * model.config.key_grid if self.with_masks else None
        collator = SegCompassCollator(processing_class, mask_side, features)
        super().__init__(model=model, args=args, processing_class=processing_class, data_collator=collator, **kwargs)
        self.model_accepts_loss_kwargs = False
        self._parts = {}

    def create_optimizer(self, model=None):
        """AdamW with the segmentation modules' own rate."""
        if self.optimizer is None:
            model = self.model if model is None else model
            groups = parameter_groups(
                model,
                self.args.learning_rate,
                self.args.weight_decay,
                set(self.get_decay_parameter_names(model)),
                dict.fromkeys(SEGMENTATION_MODULES, self.args.segmentation_lr_multiplier),
            )
            optimizer_class, settings = self.get_optimizer_cls_and_kwargs(self.args, model)
            self.optimizer = optimizer_class(groups, **settings)
        return self.optimizer

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """Language loss + λ_s·(BCE + λ_D·dice) + λ_c·confidence BCE (+ λ_e·erasure); the parts are logged."""
        targets = inputs.pop("mask_targets", None)
        outputs = model(
            **inputs,
            query_source=self.args.query_source,
            num_erased_concepts=self.args.num_erased_concepts * self.with_masks,
        )
        loss, parts = outputs.loss, {}
        if self.with_masks:
            image_size = self.processing_class.encoder_image_processor.size["longest_edge"]
            valid = valid_extent(inputs["reshaped_input_sizes"], image_size, outputs.pred_masks.shape[-1])
            segmentation, parts = segmentation_loss(
                outputs.pred_masks,
                outputs.heatmaps,
                outputs.pred_logits,
                outputs.slot_mask,
                targets,
                valid,
                lambda_s=self.args.lambda_s,
                lambda_c=self.args.lambda_c,
                lambda_d=self.args.lambda_d,
            )
            loss = loss + segmentation
            if outputs.erased is not None:
                erased = outputs.erased
                erasure, more = erasure_loss(
                    outputs.pred_masks,
                    erased.pred_masks,
                    erased.heatmaps,
                    erased.pred_logits,
                    outputs.erased_slots,
                    valid,
                )
                loss, parts = loss + self.args.lambda_e * erasure, {**parts, **more}
        for name, value in {"language": outputs.loss, **parts}.items():
            self._parts.setdefault(name, []).append(value.detach().float())
        return (loss, outputs) if return_outputs else loss

    def log(self, logs, *args, **kwargs):
        if "loss" in logs and self._parts:
            logs |= {name: round(torch.stack(values).nanmean().item(), 4) for name, values in self._parts.items()}
            self._parts = {}
        super().log(logs, *args, **kwargs)
