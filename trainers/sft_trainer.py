"""The cold start: supervised training of reasoning and masks together, one forward, one backward.

A plain transformers Trainer whose loss is the language loss on the reference trace plus Eq. 6's segmentation terms.
With `lambda_s = lambda_c = 0` it trains the language alone and leaves out every mask computation.
"""

import inspect
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from accelerate.utils import is_peft_model
from peft import PeftConfig, get_peft_model
from torch import Tensor, nn
from transformers import Trainer, TrainingArguments

from segcompass.loaders.rows import leave_images_encoded
from segcompass.modeling_segcompass import SegCompassModel, SegCompassProcessor

from .alignment import AlignmentTargets, WordKind, alignment_loss, any_word
from .checkpoints import WholeCheckpoints, check_pushing
from .checks import (
    check_adapters,
    check_arguments,
    check_dataset,
    check_loss,
    check_model,
    check_precision,
    check_quantization,
    check_read_out,
)
from .collator import SegCompassCollator
from .constant_prefix import constant_prefix
from .grounded_losses import shared_slots
from .held_out import HeldOutMasks
from .image_features import open_image_features
from .losses import LOG_PREFIX, LossWeights, erasure_loss, segmentation_loss
from .optimization import RateMultipliers, check_fp16, check_warmup, component_optimizer
from .options import OPTIONS, refuse_options
from .policy import freeze

SOFT_SHARE = 0.5
"""Share of the steps in which every concept that fires shares a slot of a new grounded read-out, before the heaviest
few do. With these alone from the first step on, a slot keeps those it happens to begin with (dev/log.md)."""


def response_logits(mllm: nn.Module, labels: Tensor) -> int:
    """How many last tokens need logits, so that each token of the responses is predicted: most are the prompt's.

    Args:
        mllm: transformers' model.
        labels: long (B, T), -100 outside the responses.

    Returns:
        That many; 0, all of them, where this MLLM cannot leave any out.
    """
    if "logits_to_keep" not in inspect.signature(type(mllm).forward).parameters:
        return 0
    first = int((labels != -100).any(0).int().argmax())
    return labels.shape[1] - max(0, first - 1)


@dataclass
class SegCompassSFTConfig(LossWeights, RateMultipliers, TrainingArguments):
    """Training arguments plus the segmentation objective's.

    Example:
        >>> args = SegCompassSFTConfig("runs/sft", learning_rate=1e-5, num_erased_concepts=5)
    """

    query_source: Literal["both", "tokens", "concepts"] = field(
        default="both",
        metadata={
            "help": "What queries are built from: 'both', the concentration tokens and the concepts; 'tokens' alone, "
            "while there is no trained SAE; or 'concepts' alone."
        },
    )
    token_dropout: float = field(
        default=0.0, metadata={"help": "Share of samples whose queries are built from concepts alone."}
    )
    num_erased_concepts: int = field(
        default=0,
        metadata={"help": "How many of a slot's heaviest concepts are taken away in a second decoding. 0 makes none."},
    )
    lambda_e: float = field(
        default=0.3,
        metadata={"help": "Weight of the erasure loss: without those concepts the slot's mask should be gone."},
    )
    lambda_align: float = field(
        default=0.0,
        metadata={
            "help": "Weight of the alignment term: words and the patches that they name get similar states at the "
            "SAE's layer. Needs rows with phrases, and train_below_sae_layer."
        },
    )
    train_below_sae_layer: bool = field(
        default=False,
        metadata={"help": "Whether the decoder blocks up to the SAE's layer learn. A trained SAE then drifts."},
    )
    train_vision_tower: bool = field(
        default=False,
        metadata={"help": "Whether the MLLM's vision tower learns. For one that starts from random weights."},
    )
    train_image_encoder: bool = field(
        default=False,
        metadata={"help": "Whether the image encoder learns. For one that starts from random weights."},
    )
    image_features: str | None = field(
        default=None,
        metadata={
            "help": "Folder that `segcompass precompute-features` wrote. Without it images are encoded as they come."
        },
    )
    eval_masks: bool = field(
        default=False,
        metadata={
            "help": "Whether an evaluation also segments its rows: metrics, format share, slots found. The commands "
            "set it where they have an eval_dataset."
        },
    )
    remove_unused_columns: bool = field(
        default=False, metadata={"help": "Must stay False, because the collator needs every column."}
    )

    def __post_init__(self):
        super().__post_init__()
        check_pushing(self)
        check_warmup(self)
        check_fp16(self)
        refuse_options(self, OPTIONS)


class SegCompassSFTTrainer(WholeCheckpoints, HeldOutMasks, Trainer):
    """Trains a SegCompassModel on rows with reasoning and masks.

    Args:
        model: a SegCompassModel with float32 weights.
        args: the settings.
        processing_class: the model's SegCompassProcessor.
        word_kind: what the words of phrases say, for the alignment term, see `AlignmentTargets`.
        peft_config: adapters, as `policy.lora_config` makes them; a PeftModel brings its own.
        **kwargs: Trainer's (train_dataset, eval_dataset, callbacks, ...).

    Raises:
        TypeError: model, args, processing_class or train_dataset is of another kind.
        ValueError: processor and model disagree, image features of an encoder that is to be trained, an alignment
            term with nothing to learn from it, trainable weights of half precision, a quantised MLLM without adapters,
            or adapters that leave out what must learn.

    Example:
        >>> args = SegCompassSFTConfig("runs/sft", max_steps=100)
        >>> trainer = SegCompassSFTTrainer(model, args, processor, train_dataset=load_scenes("train"))
        >>> trainer.train()
    """

    args: SegCompassSFTConfig
    processing_class: Any  # a SegCompassProcessor; transformers' annotation allows everything

    def __init__(
        self,
        model: SegCompassModel,
        args: SegCompassSFTConfig,
        processing_class: SegCompassProcessor,
        word_kind: WordKind = any_word,
        peft_config: PeftConfig | None = None,
        **kwargs: Any,
    ):
        check_arguments(args, SegCompassSFTConfig)
        accelerator: Any = args.accelerator_config  # an AcceleratorConfig, which TrainingArguments makes of the others
        if accelerator.dispatch_batches is None:  # with streamed rows it would cut a batch's patches short
            accelerator.dispatch_batches = False
        check_model(model, processing_class)
        processing_class.check_fits(model.config)
        check_dataset(kwargs.get("train_dataset"))
        check_read_out(model, args)
        model.config.token_dropout = args.token_dropout
        parts = ("train_below_sae_layer", "train_vision_tower", "train_image_encoder")
        learning = {name: getattr(args, name) for name in parts}
        adapted: Any = model if peft_config is None else get_peft_model(model, peft_config)
        check_quantization(model, is_peft_model(adapted))
        if not is_peft_model(adapted):
            freeze(model, **learning)
        elif any(learning.values()):
            raise ValueError(
                f"{', '.join(name for name in parts if learning[name])} is True, but with adapters only they and the "
                "segmentation modules learn; leave it out, or train without adapters."
            )
        else:
            check_adapters(adapted)
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
        alignment = None
        if args.lambda_align > 0:
            if not args.train_below_sae_layer:
                raise ValueError(
                    f"lambda_align={args.lambda_align} changes the states at the SAE's layer, but "
                    "train_below_sae_layer=False keeps them; set it to True, or lambda_align to 0."
                )
            alignment = AlignmentTargets(processing_class, word_kind)
        collator = SegCompassCollator(processing_class, mask_side, features, alignment)
        for name in ("train_dataset", "eval_dataset"):
            kwargs[name] = leave_images_encoded(kwargs.get(name))
        check_precision(adapted)
        super().__init__(model=adapted, args=args, processing_class=processing_class, data_collator=collator, **kwargs)
        self.model_accepts_loss_kwargs = False
        self._parts: dict[str, list[Tensor]] = {}
        self.held_out_features = features
        # β is 0 until a read-out has learned: one that has keeps its slots
        self.new_reading = model.grounded and not model.grounded_reading.concept_bias.any()

    def has_loss_on(self, rows: Any) -> bool:
        """Whether the rows have traces; those of benchmarks have none, and are only segmented."""
        first = next(iter(rows), None)
        return first is not None and bool((first.get("reasoning") or "").strip())

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """AdamW with the segmentation modules' own rates."""
        if self.optimizer is None:
            self.optimizer = component_optimizer(self, model)
        return self.optimizer

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: int | Tensor | None = None,
    ) -> Any:
        """Language loss + λ_s·(BCE + λ_D·dice) + λ_c·confidence BCE (+ λ_e·erasure, λ_align·alignment); all logged."""
        targets, alignment = inputs.pop("mask_targets", None), inputs.pop("alignment_targets", None)
        core: Any = self.accelerator.unwrap_model(model)
        core = core.get_base_model() if is_peft_model(core) else core
        early = self.state.global_step < SOFT_SHARE * self.state.max_steps
        shared = self.new_reading and model.training and early
        with constant_prefix(core, inputs["input_ids"]), shared_slots(core, shared):
            outputs = model(
                **inputs,
                query_source=self.args.query_source,
                # of a slot that all share, no mask goes with a few
                num_erased_concepts=self.args.num_erased_concepts * (self.with_masks and not shared),
                output_hidden_states=True if alignment is not None else None,
                use_cache=False,
                # whoever asks for the outputs gets all logits
                logits_to_keep=0 if return_outputs else response_logits(core.mllm, inputs["labels"]),
            )
        loss, parts = outputs.loss, dict[str, Tensor]()
        if self.with_masks:
            frame, side = self.processing_class.frame, outputs.pred_masks.shape[-1]
            extent = frame.valid_extent(inputs["reshaped_input_sizes"], side)  # (B, 2)
            segmentation, parts = segmentation_loss(outputs, targets, extent, self.args)
            loss = loss + segmentation
            if outputs.erased is not None:
                erasure, still_there = erasure_loss(outputs, extent)
                loss, parts = loss + self.args.lambda_e * erasure, {**parts, **still_there}
        aligned = {}
        if alignment is not None:
            states = outputs.hidden_states[core.config.sae_config.layer]  # (B, T, d)
            aligned["alignment"] = alignment_loss(states, alignment)
            loss = loss + self.args.lambda_align * aligned["alignment"]
        parts = {f"{LOG_PREFIX}{name}": value for name, value in parts.items()}
        logged = {"language": outputs.loss, **aligned, **parts}
        check_loss({"loss": loss, "language": outputs.loss, **aligned})
        for name, value in logged.items() if model.training else ():  # the log of a step holds no evaluation
            self._parts.setdefault(name, []).append(value.detach().float())
        return (loss, outputs) if return_outputs else loss

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Trainer's, with the mean of each part of the loss since the last time: of the processes' means."""
        if "loss" in logs and self._parts:
            means = torch.stack([torch.stack(values).nanmean() for values in self._parts.values()])  # (parts,)
            means = self.accelerator.gather(means[None]).nanmean(0).tolist()
            logs |= {name: round(mean, 4) for name, mean in zip(self._parts, means, strict=True)}
            self._parts = {}
        super().log(logs, *args, **kwargs)
