"""Joint training of reasoning and masks (paper Eq. 6): TRL's GRPOTrainer with the segmentation losses in its forward.

GRPO itself - rollouts, advantages, clipping, KL - is TRL's and is not repeated here. Four of its methods are wrapped:
a rollout also carries image keys and mask targets; the no-grad scoring pass also decodes the masks that are rewarded;
the one training forward also gives the masks that are supervised. All of that happens by handing TRL a callable in
place of the model (`_JointForward`), so TRL makes the calls it always makes. tests/trainers/test_trl_contract.py
names what this leans on.
"""

import copy
from contextlib import contextmanager
from dataclasses import dataclass, field

import datasets
import torch
from accelerate.utils import is_peft_model
from torch import nn
from torch.distributed.fsdp import register_fsdp_forward_method
from transformers import PreTrainedModel, ProcessorMixin
from trl import GRPOTrainer
from trl.models import prepare_deepspeed, prepare_fsdp
from trl.models.utils import disable_gradient_checkpointing
from trl.trainer.utils import add_fused_lm_head, pad

from .grpo_config import SegCompassGRPOConfig
from .losses import segmentation_loss
from .optimization import check_adapters, one_cycle, parameter_groups
from .policy import freeze
from .rewards import make_format_reward, mask_reward, mask_scores
from .targets import mask_targets, valid_extent

ROW_COLUMNS = ("image", "image_id", "sample_id", "instruction", "masks", "height", "width")
REF_TOKEN = "<REF_POS>"


class _JointForward:
    """Called by TRL as if it were the model: adds the segmentation inputs of the rows at hand, keeps the outputs."""

    def __init__(self, model, image_embeddings, reshaped_input_sizes, **flags):
        self.model, self.flags = model, flags
        self.image_embeddings, self.reshaped_input_sizes = image_embeddings, reshaped_input_sizes
        self.outputs, self.done = [], 0

    def __call__(self, **inputs):
        rows = slice(self.done, self.done + len(inputs["input_ids"]))
        output = self.model(
            **inputs,
            image_embeddings=torch.stack(self.image_embeddings[rows]),
            reshaped_input_sizes=self.reshaped_input_sizes[rows],
            **self.flags,
        )
        self.done = rows.stop
        self.outputs.append(output)
        if output.log_probs is None:  # without the LM head; TRL reads the field all the same
            output.log_probs = output.pred_logits.new_zeros(len(inputs["input_ids"]), 1)
        return output


@dataclass
class _Rollout:
    """One generation batch while TRL generates and scores it."""

    segmentation: dict
    """what joins TRL's batch: image_embeddings, mask_targets (lists of B tensors), reshaped_input_sizes (B, 2)."""
    scoring_inputs: tuple = ()
    """the tensors of TRL's last scoring pass: (positional arguments after the model, keyword arguments)."""
    scored: _JointForward | None = field(default=None)
    """the pass that decoded the masks to reward."""


class SegCompassGRPOTrainer(GRPOTrainer):
    """GRPO on the responses and supervised segmentation on their masks, one forward and one backward.

    The rewards are `format_reward` and `mask_reward`, weighted by `args.reward_weights`; `reward_funcs` may add more
    (then give a weight for each). Rows follow the project's schema (image, image_id, sample_id, instruction, masks,
    height, width, ...); the prompt is the processor's, unless a row brings its own `prompt`.

    Args:
        model: a SegCompassModel, or a PeftModel around one. Without PEFT, `policy.freeze` decides what learns.
        reward_funcs: further TRL reward functions.
        args: SegCompassGRPOConfig.
        train_dataset, eval_dataset: `datasets.Dataset` or `IterableDataset` of such rows.
        processing_class: the model's SegCompassProcessor.
        ref_model: the frozen MLLM for the KL term; None copies `model.mllm` as it is now. Needed with DeepSpeed
            ZeRO-3, which has already partitioned the model's weights.
        peft_config: adapters, with modules_to_save for the segmentation modules.
        kwargs: GRPOTrainer's (callbacks, optimizers, ...).

    Raises:
        TypeError: model or processing_class is of another kind.
        ValueError: processor and model disagree, rows lack columns, the dataset is smaller than one generation batch,
            or the adapters miss the segmentation modules.
    """

    _name = "SegCompass"
    _tag_names = ["trl", "grpo", "segcompass"]
    _paper = {
        "title": "SegCompass: Exploring Interpretable Alignment with Sparse Autoencoders for Enhanced Reasoning "
        "Segmentation",
        "id": None,
        "citation": "",
    }

    def __init__(
        self,
        model,
        reward_funcs=None,
        args: SegCompassGRPOConfig | None = None,
        train_dataset=None,
        eval_dataset=None,
        processing_class=None,
        *,
        ref_model: PreTrainedModel | None = None,
        peft_config=None,
        **kwargs,
    ):
        args = SegCompassGRPOConfig("SegCompass-GRPO") if args is None else args
        with_adapters = peft_config is not None or is_peft_model(model)
        _check_model(model, processing_class)
        _check_rows(train_dataset, eval_dataset, args)
        if args.reward_mask_source == "reference" and (with_adapters or ref_model is not None):
            raise ValueError(
                "reward_mask_source='reference' needs the trainer's own copy of the MLLM, which adapters (whose "
                "reference also restores the initial segmentation modules) and ref_model= replace; set "
                "reward_mask_source='policy'."
            )
        if not with_adapters:
            freeze(model, below_sae_layer=not args.train_below_sae_layer)
        more_rewards = reward_funcs if isinstance(reward_funcs, list) else [reward_funcs] if reward_funcs else []

        self._rollout: _Rollout | None = None
        beta = args.beta
        if not with_adapters:
            args.beta = 0.0  # or TRL would load a whole second model by name; ours is made below
        try:
            super().__init__(
                model,
                reward_funcs=[make_format_reward(model.config.num_slots, REF_TOKEN), mask_reward, *more_rewards],
                args=args,
                train_dataset=_leave_images_encoded(train_dataset),
                eval_dataset=_leave_images_encoded(eval_dataset),
                processing_class=processing_class,
                peft_config=peft_config,
                **kwargs,
            )
        finally:
            args.beta = beta
        if with_adapters:
            check_adapters(self.model)
        elif beta != 0.0:
            self._make_reference(ref_model, beta)
        self.core.__dict__.pop("forward", None)  # TRL's fused head sits on the composite; it belongs on the MLLM
        self._add_fused_head(self.core.mllm)

    @property
    def core(self):
        """The SegCompassModel inside DDP, FSDP, DeepSpeed and PEFT wrappers."""
        model = self.accelerator.unwrap_model(self.model)
        return model.get_base_model() if is_peft_model(model) else model

    def _add_fused_head(self, mllm):
        add_fused_lm_head(mllm, temperature=self.temperature, outputs=("log_probs", "entropy"))

    def _make_reference(self, ref_model, beta):
        core = self.core
        if ref_model is None:
            # The MLLM's hooks are methods of the composite: the memo keeps them there instead of copying it whole.
            ref_model = copy.deepcopy(core.mllm, {id(core): core})
        ref_model.requires_grad_(False).eval()
        self._add_fused_head(ref_model)
        if self.is_deepspeed_enabled:
            ref_model = prepare_deepspeed(ref_model, self.accelerator)
        elif self.is_fsdp_enabled:
            ref_model = prepare_fsdp(ref_model, self.accelerator)
        else:
            ref_model = self.accelerator.prepare_model(ref_model, evaluation_mode=True)
        self.ref_model, self.beta = ref_model, beta

    # -- optimizer and schedule ---------------------------------------------------------------------------------------

    def create_optimizer(self, model=None):
        """AdamW with each component's own rate."""
        if self.optimizer is None:
            model = self.model if model is None else model
            groups = parameter_groups(
                model,
                self.args.learning_rate,
                self.args.weight_decay,
                set(self.get_decay_parameter_names(model)),
                {
                    "query_codebook": self.args.query_codebook_lr_multiplier,
                    "slot_mapper": self.args.slot_mapper_lr_multiplier,
                    "mask_decoder": self.args.mask_decoder_lr_multiplier,
                },
            )
            optimizer_class, settings = self.get_optimizer_cls_and_kwargs(self.args, model)
            self.optimizer = optimizer_class(groups, **settings)
        return self.optimizer

    def create_scheduler(self, num_training_steps, optimizer=None):
        """One cycle without warm-up."""
        if self.lr_scheduler is None:
            optimizer = self.optimizer if optimizer is None else optimizer
            self.lr_scheduler = one_cycle(optimizer, num_training_steps, self.args.final_div_factor)
            self._created_lr_scheduler = True
        return self.lr_scheduler

    # -- rollout ------------------------------------------------------------------------------------------------------

    def _generate_and_score_completions(self, inputs):
        rows = _decode_images(inputs)
        rows = [{"prompt": self.processing_class.build_messages(row["instruction"]), **row} for row in rows]
        self._rollout = _Rollout(self._segmentation_batch(rows))
        try:
            return {**super()._generate_and_score_completions(rows), **self._rollout.segmentation}
        finally:
            self._rollout = None

    def _segmentation_batch(self, rows):
        """Image keys and mask targets of the rows; the G responses of a prompt share theirs."""
        config = self.core.config
        images = {_image_key(row): row["image"] for row in rows}
        embedded = dict(zip(images, self.embed_images(list(images.values())), strict=True))
        targets = {}
        for row in rows:
            if (key := _sample_key(row)) not in targets:
                target = mask_targets(
                    row["masks"], row["height"], row["width"], config.sam_config.image_size, 4 * config.key_grid
                )
                targets[key] = target.to(self.accelerator.device)
        embeddings, sizes = zip(*(embedded[_image_key(row)] for row in rows), strict=True)
        return {
            "image_embeddings": list(embeddings),
            "reshaped_input_sizes": torch.stack(sizes),
            "mask_targets": [targets[_sample_key(row)] for row in rows],
        }

    @torch.no_grad()
    def embed_images(self, images: list) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """SAM's features of each image; override to read a cache.

        Args:
            images: N distinct PIL images.

        Returns:
            N pairs, on the device: image keys (d_k, h, w), and (H, W) inside SAM's frame, long (2,).
        """
        core, device = self.core, self.accelerator.device
        if "get_image_embeddings" not in vars(core):
            register_fsdp_forward_method(core, "get_image_embeddings")  # gathers the weights under FSDP2, else nothing
        pairs = []
        for start in range(0, len(images), self.args.per_device_train_batch_size):
            inputs = self.processing_class.sam_inputs(images[start : start + self.args.per_device_train_batch_size])
            with self.accelerator.autocast():
                embeddings = core.get_image_embeddings(inputs["sam_pixel_values"].to(device))
            pairs += zip(embeddings, inputs["reshaped_input_sizes"].to(device), strict=True)
        return pairs

    def _joint_forward(self, model, segmentation, **flags):
        return _JointForward(model, segmentation["image_embeddings"], segmentation["reshaped_input_sizes"], **flags)

    def _get_per_token_logps_and_entropies(self, model, *args, **kwargs):
        rollout = self._rollout
        if rollout is None:  # the training forward
            return super()._get_per_token_logps_and_entropies(model, *args, **kwargs)
        rollout.scoring_inputs = (args, kwargs)
        if self.args.reward_mask_source == "reference":
            if model is not self.ref_model:
                return super()._get_per_token_logps_and_entropies(model, *args, **kwargs)
            rollout.scored = self._joint_forward(self.model, rollout.segmentation)
            with self._mllm_replaced_by(self.ref_model):
                return super()._get_per_token_logps_and_entropies(rollout.scored, *args, **kwargs)
        if model is self.model and not _adapters_disabled(model):  # old log-probabilities: masks come with them
            model = rollout.scored = self._joint_forward(model, rollout.segmentation)
        return super()._get_per_token_logps_and_entropies(model, *args, **kwargs)

    @contextmanager
    def _mllm_replaced_by(self, mllm):
        """The current segmentation modules read another MLLM's states, inside the wrapped forward as ever."""
        core = self.core
        own, core.mllm = core.mllm, mllm
        try:
            yield
        finally:
            core.mllm = own

    @torch.no_grad()
    def _calculate_rewards(self, inputs, prompts, completions, completion_ids_list):
        rollout = self._rollout
        if rollout.scored is None:  # TRL made no pass with the policy: make one, without the LM head
            args, kwargs = rollout.scoring_inputs or self._scoring_inputs(prompts, completion_ids_list)
            rollout.scored = self._joint_forward(self.model, rollout.segmentation, skip_lm_head=True)
            with disable_gradient_checkpointing(self.model, self.args.gradient_checkpointing_kwargs):
                super()._get_per_token_logps_and_entropies(rollout.scored, *args, **kwargs)
        scores, targets = [], rollout.segmentation["mask_targets"]
        for output in rollout.scored.outputs:
            rows = slice(len(scores), len(scores) + len(output.pred_masks))
            scores += mask_scores(output, targets[rows], self._valid(output, rollout.segmentation, rows))
        inputs = [{**row, "mask_score": score} for row, score in zip(inputs, scores, strict=True)]
        return super()._calculate_rewards(inputs, prompts, completions, completion_ids_list)

    def _scoring_inputs(self, prompts, completion_ids_list):
        """What TRL's scoring pass would be given, for a rollout (on-policy, beta 0) where it makes none."""
        device = self.accelerator.device
        inputs = self.processing_class.apply_chat_template(
            prompts,
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
            processor_kwargs={"padding": True, "padding_side": "left"},
            **self.chat_template_kwargs,
        )
        inputs = {name: torch.as_tensor(value).to(device) for name, value in inputs.items()}
        completions = [torch.tensor(ids, device=device) for ids in completion_ids_list]
        ids = pad(completions, padding_value=self._tokenizer.pad_token_id, padding_side="right")
        mask = pad([torch.ones_like(row) for row in completions], padding_value=0, padding_side="right")
        input_ids = torch.cat([inputs.pop("input_ids"), ids], 1)
        attention_mask = torch.cat([inputs.pop("attention_mask"), mask], 1)
        if "mm_token_type_ids" in inputs:
            inputs["mm_token_type_ids"] = torch.cat([inputs["mm_token_type_ids"], torch.zeros_like(ids)], 1)
        batch_size = self.args.per_device_train_batch_size
        if not self.model.training:
            batch_size = self.args.per_device_eval_batch_size
        inputs.update(batch_size=batch_size, num_images=[1] * len(prompts))
        return (input_ids, attention_mask, ids.shape[1]), inputs

    def _valid(self, output, segmentation, rows=slice(None)):
        """The unpadded part of the mask frame, in its cells: long (B, 2)."""
        sizes = segmentation["reshaped_input_sizes"][rows]
        return valid_extent(sizes, self.core.config.sam_config.image_size, output.pred_masks.shape[-1])

    # -- loss ---------------------------------------------------------------------------------------------------------

    def _compute_loss(self, model, inputs):
        forward = self._joint_forward(model, inputs)
        grpo_loss = super()._compute_loss(forward, inputs)
        (output,) = forward.outputs  # the one training forward
        segmentation, parts = segmentation_loss(
            output.pred_masks,
            output.heatmaps,
            output.pred_logits,
            output.slot_mask,
            inputs["mask_targets"],
            self._valid(output, inputs),
            lambda_s=self.args.lambda_s,
            lambda_c=self.args.lambda_c,
            lambda_d=self.args.lambda_d,
        )
        mode = "train" if self.model.training else "eval"
        # TRL's loss comes divided by the accumulation steps (loss_is_scaled_for_ga), and Trainer divides no further.
        accumulation = self.current_gradient_accumulation_steps if mode == "train" else 1
        logged = {f"seg/{name}": value for name, value in parts.items()}
        logged["grpo_loss"] = grpo_loss.detach() * accumulation
        means = self.accelerator.gather(torch.stack(list(logged.values())).float()[None]).nanmean(0).tolist()
        for name, mean in zip(logged, means, strict=True):
            self._metrics[mode][name].append(mean)
        return grpo_loss + segmentation / accumulation


# -- rows -------------------------------------------------------------------------------------------------------------


def _image_key(row):
    return row.get("dataset"), row["image_id"]


def _sample_key(row):
    return row.get("dataset"), row["sample_id"]


def _leave_images_encoded(dataset):
    """TRL fetches a generation batch at every micro-step and drops most of them: decode an image only when used."""
    if isinstance(dataset, dict):
        return {name: _leave_images_encoded(part) for name, part in dataset.items()}
    feature = (getattr(dataset, "features", None) or {}).get("image")
    plain = getattr(dataset, "format", None) is None or dataset.format["type"] is None
    if isinstance(feature, datasets.Image) and feature.decode and plain:
        return dataset.cast_column("image", datasets.Image(mode=feature.mode, decode=False))
    return dataset


def _decode_images(rows):
    """Rows with PIL images, each image decoded once. Raises ValueError when an image is not of its row's size."""
    decoder, images, decoded = datasets.Image(), {}, []
    for row in rows:
        key = _image_key(row)
        if key not in images:
            image = row["image"]
            images[key] = decoder.decode_example(image) if isinstance(image, dict) else image
            if images[key].size != (row["width"], row["height"]):
                raise ValueError(
                    f"the image of sample {row['sample_id']!r} is {images[key].size} (width, height), but its row says "
                    f"({row['width']}, {row['height']}); masks and image must be of one size."
                )
        decoded.append({**row, "image": images[key]})
    return decoded


# -- checks before the first step -------------------------------------------------------------------------------------


def _adapters_disabled(model: nn.Module) -> bool:
    """Whether this is PEFT's reference: the policy object itself with its adapters switched off."""
    if not is_peft_model(model):
        return False
    from peft.tuners.tuners_utils import BaseTunerLayer

    return any(module.disable_adapters for module in model.modules() if isinstance(module, BaseTunerLayer))


def _check_model(model, processor):
    config = getattr(model, "config", None)
    if getattr(config, "model_type", None) != "segcompass":
        raise TypeError(
            f"model is {type(model).__name__}; pass a SegCompassModel (SegCompassModel.from_pretrained(path), or "
            "from_backbones to build one)."
        )
    if not isinstance(processor, ProcessorMixin) or not hasattr(processor, "num_slots"):
        raise TypeError(f"processing_class is {type(processor).__name__}; pass the model's SegCompassProcessor.")
    if processor.num_slots != config.num_slots:
        raise ValueError(
            f"the processor asks for {processor.num_slots} concentration tokens, but the model has {config.num_slots} "
            "slots; build both with the same num_slots."
        )
    token = processor.tokenizer.convert_tokens_to_ids(REF_TOKEN)
    if token is None or token == processor.tokenizer.unk_token_id or token != config.ref_token_id:
        raise ValueError(
            f"the processor's id of {REF_TOKEN} is {token}, the model's is {config.ref_token_id}; build the model with "
            "SegCompassModel.from_backbones(..., processor=processor) or load both from one folder."
        )
    if REF_TOKEN not in processor.tokenizer.decode([token], skip_special_tokens=True):
        raise ValueError(
            f"{REF_TOKEN} is a special token of this tokenizer, so TRL would strip it from every response and the "
            "format reward would stay 0; add it with tokenizer.add_tokens, as SegCompassProcessor does."
        )


def _check_rows(train_dataset, eval_dataset, args):
    parts = eval_dataset if isinstance(eval_dataset, dict) else {"eval_dataset": eval_dataset}
    for name, dataset in {"train_dataset": train_dataset, **parts}.items():
        columns = getattr(dataset, "column_names", None)
        missing = [column for column in ROW_COLUMNS if columns is not None and column not in columns]
        if missing:
            raise ValueError(
                f"{name} has no column {', '.join(missing)}; rows need {', '.join(ROW_COLUMNS)}, as the loaders "
                "return them."
            )
    prompts = args.generation_batch_size // args.num_generations
    if isinstance(train_dataset, datasets.Dataset) and len(train_dataset) < prompts:
        raise ValueError(
            f"train_dataset has {len(train_dataset)} rows, but one generation batch needs {prompts} prompts "
            f"(generation_batch_size {args.generation_batch_size} / num_generations {args.num_generations}), so no "
            "step would be made; use more rows, or lower per_device_train_batch_size or gradient_accumulation_steps."
        )
