"""Joint training of reasoning and masks (paper Eq. 6): TRL's GRPOTrainer with the segmentation losses in its forward.

GRPO itself - rollouts, advantages, clipping, KL - is TRL's and is not repeated here. Its methods are wrapped: a rollout
also carries image keys and mask targets; the no-grad scoring pass also decodes the masks that are rewarded; the one
training forward also gives the masks that are supervised. All of that happens by handing TRL a callable in place of
the model (`_JointForward`), so TRL makes the calls it always makes. tests/trainers/test_trl_contract.py names what
this leans on.
"""

import copy
import time
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path

import datasets
import torch
from accelerate.utils import is_peft_model
from torch import nn
from torch.distributed.fsdp import FSDPModule, register_fsdp_forward_method
from transformers import PreTrainedModel, ProcessorMixin
from transformers.integrations import is_deepspeed_zero3_enabled
from trl import GRPOTrainer
from trl.models import prepare_deepspeed, prepare_fsdp
from trl.models.utils import disable_gradient_checkpointing
from trl.trainer.utils import add_fused_lm_head, pad

from segcompass.modeling_segcompass.backbone import PER_TOKEN_INPUTS
from segcompass.modeling_segcompass.states import ReasoningStates

from .grpo_config import SegCompassGRPOConfig
from .image_features import open_image_features
from .losses import segmentation_loss
from .optimization import SEGMENTATION_MODULES, check_adapters, one_cycle, parameter_groups
from .overlays import draw_overlays
from .policy import freeze, is_quantized, restore_masters
from .rewards import make_format_reward, mask_reward, mask_scores
from .targets import mask_targets, valid_extent
from .vllm_policy import policy_engine

ROW_COLUMNS = ("image", "image_id", "sample_id", "instruction", "masks", "height", "width")
REF_TOKEN = "<REF_POS>"
ROLLOUTS = "rollouts_{}.pt"


SAE_TOKENS = 128  # enough to follow the SAE's explained variance
CHECKED_ROWS = 2000  # whose masks are checked before the first step; the others when their turn comes
MAX_SAMPLING_GAP = 0.2  # nats a token between vLLM's and the trained policy's log-probabilities; bf16 alone is ~0.02


class _TrimmedForward:
    """Called by TRL as if it were the model: leaves out the columns that are padding in every row at hand."""

    def __init__(self, model):
        self.model = model

    def __call__(self, **inputs):
        length = inputs["input_ids"].shape[1]
        used = inputs["attention_mask"].any(0).nonzero()[:, 0]
        start, stop = int(used[0]), int(used[-1]) + 1
        trimmed = {name: v[:, start:stop] if name in PER_TOKEN_INPUTS else v for name, v in inputs.items()}
        output = self.forward(trimmed)
        for name in ("log_probs", "entropy"):  # (B, stop - start - 1): back to the columns TRL knows
            value = getattr(output, name)
            if value is not None:
                setattr(output, name, nn.functional.pad(value, (start, length - stop)))
        return output

    def forward(self, inputs):
        return self.model(**inputs)


class _JointForward(_TrimmedForward):
    """Adds the segmentation inputs of the rows at hand, and keeps the outputs.

    `rows`: the rows of the one call that get masks, a list of int; None, all rows of however many calls.
    """

    def __init__(self, model, image_embeddings, reshaped_input_sizes, rows=None, **flags):
        super().__init__(model)
        self.flags, self.rows = flags, rows
        self.image_embeddings, self.reshaped_input_sizes = image_embeddings, reshaped_input_sizes
        self.outputs, self.done = [], 0

    def forward(self, inputs):
        batch = len(inputs["input_ids"])
        rows = list(range(self.done, self.done + batch)) if self.rows is None else self.rows
        output = self.model(
            **inputs,
            image_embeddings=torch.stack([self.image_embeddings[row] for row in rows]),
            reshaped_input_sizes=self.reshaped_input_sizes[rows],
            mask_rows=self.rows,
            **self.flags,
        )
        self.done += batch
        self.outputs.append(output)
        if output.log_probs is None:  # without the LM head; TRL reads the field all the same
            output.log_probs = output.pred_logits.new_zeros(batch, inputs["input_ids"].shape[1] - 1)
        return output


@dataclass
class _Rollout:
    """One generation batch while TRL generates and scores it."""

    segmentation: dict
    """what joins TRL's batch: image_embeddings, mask_targets (lists of B tensors), reshaped_input_sizes (B, 2), and,
    once they are known, mask_scores (B,)."""
    written: ReasoningStates | None = None
    """what `decode_masks` takes, but for the image, of the responses as they were generated; None with vLLM."""
    scoring_inputs: tuple = ()
    """the tensors of TRL's last scoring pass: (positional arguments after the model, keyword arguments)."""
    scored: _JointForward | None = field(default=None)
    """the pass that decoded the masks to reward, where generation left no states."""
    images: list = field(default_factory=list)
    """the PIL image of each row, to be drawn on."""


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
        ValueError: processor and model disagree, rows lack columns or masks of their image's size, the dataset is
            smaller than one generation batch, the adapters miss the segmentation modules, trainable weights are of half
            precision, or the image features are another encoder's.
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
        if is_quantized(model) and not with_adapters:
            raise ValueError(
                "the MLLM is quantised, and its weights of 4 or 8 bits cannot be trained; pass peft_config="
                "trainers.policy.lora_config(model), or load the model without quantization_config."
            )
        if args.reward_mask_source == "reference" and (with_adapters or ref_model is not None):
            raise ValueError(
                "reward_mask_source='reference' needs the trainer's own copy of the MLLM, which adapters (whose "
                "reference also restores the initial segmentation modules) and ref_model= replace; set "
                "reward_mask_source='policy'."
            )
        if args.beta != 0.0 and ref_model is None and not with_adapters and is_deepspeed_zero3_enabled():
            raise ValueError(
                f"beta is {args.beta}, which needs a reference, and DeepSpeed ZeRO-3 has already partitioned the "
                "weights to copy; pass ref_model=<the MLLM, loaded again>, or set beta=0."
            )
        self.image_features = None
        if args.image_features:
            core = model.get_base_model() if is_peft_model(model) else model
            self.image_features = open_image_features(args.image_features, core, processing_class)
        model.config.token_dropout = args.token_dropout
        if not with_adapters:
            freeze(model, train_below_sae_layer=args.train_below_sae_layer)
        more_rewards = reward_funcs if isinstance(reward_funcs, list) else [reward_funcs] if reward_funcs else []

        self._rollout: _Rollout | None = None
        self._seconds, self._phases, self._timed_steps = {}, [], 0
        self._overlays = []
        beta = args.beta
        quantized, trained = is_quantized(model), {}
        if quantized and is_peft_model(model):
            trained = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
        engine = policy_engine(model, processing_class, args) if args.use_vllm else nullcontext()
        if not with_adapters:
            args.beta = 0.0  # or TRL would load a whole second model by name; ours is made below
        try:
            with engine:
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
        if quantized:
            restore_masters(self.model, trained)
        if with_adapters:
            check_adapters(self.model)
        elif beta != 0.0:
            self._make_reference(ref_model, beta)
        self.core.__dict__.pop("forward", None)  # TRL's fused head sits on the composite; it belongs on the MLLM
        self._add_fused_head(self.core.mllm)
        if args.training_mode == "rl":  # nothing supervises them
            for name in SEGMENTATION_MODULES:
                getattr(self.core, name).requires_grad_(False)
        _check_precision(self.model)

    @property
    def core(self):
        """The SegCompassModel inside DDP, FSDP, DeepSpeed and PEFT wrappers."""
        model = self.accelerator.unwrap_model(self.model)
        return model.get_base_model() if is_peft_model(model) else model

    def _add_fused_head(self, mllm):
        add_fused_lm_head(mllm, temperature=self.temperature, outputs=("log_probs", "entropy"))
        mllm.register_forward_pre_hook(_gather_head, with_kwargs=True)

    def _make_reference(self, ref_model, beta):
        core = self.core
        if ref_model is None:
            ref_model = copy.deepcopy(core.mllm)
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
        with self._timed("images"):
            rows = _decode_images(inputs)
            rows = [{"prompt": self.processing_class.build_messages(row["instruction"]), **row} for row in rows]
            self._rollout = _Rollout(self._segmentation_batch(rows), images=[row["image"] for row in rows])
        try:
            with self._timed("scoring"):
                batch = super()._generate_and_score_completions(rows)
            _check_rollout_policy(batch)
            return {**batch, **self._rollout.segmentation}
        finally:
            self._rollout = None

    def _generate(self, *args, **kwargs):
        with self._timed("rollout"), self.core.reading_states() as recorder:
            output = super()._generate(*args, **kwargs)
        if self.args.reward_mask_source == "policy":
            self._rollout.written = recorder.states
        return output

    def training_step(self, *args, **kwargs):
        with self._timed("update"):
            loss = super().training_step(*args, **kwargs)
        self._timed_steps += 1 / self.current_gradient_accumulation_steps
        return loss

    @contextmanager
    def _timed(self, phase):
        """Add the wall-clock seconds spent in here, but not in a phase inside it, to the phase."""
        self._phases.append(0.0)
        began = time.perf_counter()
        try:
            yield
        finally:
            elapsed = time.perf_counter() - began
            inner = self._phases.pop()
            if self.model.training:
                self._seconds[phase] = self._seconds.get(phase, 0.0) + elapsed - inner
            if self._phases:
                self._phases[-1] += elapsed

    def _segmentation_batch(self, rows):
        """Image keys and mask targets of the rows; the G responses of a prompt share theirs."""
        config = self.core.config
        images = {_image_key(row): row["image"] for row in rows}
        embedded = dict(zip(images, self.embed_images(list(images.values())), strict=True))
        targets = {}
        for row in rows:
            if (key := _sample_key(row)) not in targets:
                target = mask_targets(
                    row["masks"],
                    row["height"],
                    row["width"],
                    config.image_encoder_config.image_size,
                    4 * config.key_grid,
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
        """SAM's features of each image, encoded now or read from `args.image_features`.

        Args:
            images: N distinct PIL images.

        Returns:
            N pairs, on the device: image keys (d_k, h, w), and (H, W) inside SAM's frame, long (2,).
        """
        core, device = self.core, self.accelerator.device
        if self.image_features is not None:
            inputs = self.image_features.inputs(images)
            return [
                (embedding.to(device), size.to(device))
                for embedding, size in zip(inputs["image_embeddings"], inputs["reshaped_input_sizes"], strict=True)
            ]
        if "get_image_embeddings" not in vars(core):
            register_fsdp_forward_method(core, "get_image_embeddings")  # gathers the weights under FSDP2, else nothing
        pairs = []
        for start in range(0, len(images), self.args.per_device_train_batch_size):
            inputs = self.processing_class.encoder_inputs(images[start : start + self.args.per_device_train_batch_size])
            with self.accelerator.autocast():
                embeddings = core.get_image_embeddings(inputs["encoder_pixel_values"].to(device))
            pairs += zip(embeddings, inputs["reshaped_input_sizes"].to(device), strict=True)
        return pairs

    def _joint_forward(self, model, segmentation, **flags):
        return _JointForward(model, segmentation["image_embeddings"], segmentation["reshaped_input_sizes"], **flags)

    def _get_per_token_logps_and_entropies(self, model, *args, **kwargs):
        rollout = self._rollout
        if rollout is None:  # the training forward
            return super()._get_per_token_logps_and_entropies(model, *args, **kwargs)
        rollout.scoring_inputs = (args, kwargs)
        if model is self.ref_model or _adapters_disabled(model):
            with self._timed("reference"):
                if model is not self.ref_model or self.args.reward_mask_source != "reference":
                    reference = _TrimmedForward(model)
                    return super()._get_per_token_logps_and_entropies(reference, *args, **kwargs)
                rollout.scored = self._joint_forward(self.model, rollout.segmentation)
                with self._mllm_replaced_by(self.ref_model):
                    return super()._get_per_token_logps_and_entropies(rollout.scored, *args, **kwargs)
        # old log-probabilities of the policy: the masks to reward come with them, unless they come from elsewhere
        if self.args.reward_mask_source == "reference" or rollout.written is not None:
            return super()._get_per_token_logps_and_entropies(_TrimmedForward(model), *args, **kwargs)
        rollout.scored = self._joint_forward(model, rollout.segmentation)
        with self._following_sae():
            return super()._get_per_token_logps_and_entropies(rollout.scored, *args, **kwargs)

    @contextmanager
    def _following_sae(self):
        """Log the SAE's explained variance at some tokens of the first pass made in here."""
        core = self.core
        block = core.backbone.blocks(core.mllm)[core.config.sae_config.layer - 1]
        seen = []

        def keep(module, args, output):
            if not seen:
                seen.append(output[0] if isinstance(output, tuple) else output)

        hook = block.register_forward_hook(keep)
        try:
            yield
        finally:
            hook.remove()
        if seen:
            self._log_explained_variance(seen[0])

    def _log_explained_variance(self, z):
        sae, z = self.core.sae, z.flatten(0, 1)
        with torch.autocast(z.device.type, enabled=False):
            z = z[:: max(1, len(z) // SAE_TOKENS)].to(sae.W_enc.dtype)
            residual = z - sae.decode(sae.encode(z))
            explained = 1 - residual.var(0, correction=0).sum() / z.var(0, correction=0).sum()
        mean = self.accelerator.gather(explained.float().reshape(1)).mean().item()
        self._metrics["train" if self.model.training else "eval"]["sae/explained_variance"].append(mean)

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
        if rollout.written is not None:
            outputs = self._decode_written(rollout.written, rollout.segmentation)
        else:
            outputs = self._scored_outputs(prompts, completion_ids_list)
        scores, targets = [], rollout.segmentation["mask_targets"]
        for output in outputs:
            rows = slice(len(scores), len(scores) + len(output.pred_masks))
            scores += mask_scores(output, targets[rows], self._valid(output, rollout.segmentation, rows))
        if self.log_completions and self.accelerator.is_main_process:
            self._overlays = draw_overlays(rollout.images, outputs[0], self.processing_class)
        rollout.segmentation["mask_scores"] = torch.tensor(scores, device=self.accelerator.device)
        inputs = [{**row, "mask_score": score} for row, score in zip(inputs, scores, strict=True)]
        rewards = super()._calculate_rewards(inputs, prompts, completions, completion_ids_list)
        mode = "train" if self.model.training else "eval"
        self._metrics[mode]["format_share"].append((rewards[:, 0] > 0).float().mean().item())
        return rewards

    def _decode_written(self, written, segmentation):
        """The masks of the responses, micro-batch by micro-batch, from the states that generation left behind."""
        core = self.core
        if "decode_masks" not in vars(core):
            register_fsdp_forward_method(core, "decode_masks")
        self._log_explained_variance(written.z)
        batch_size, outputs = self._batch_size(), []
        for start in range(0, len(written.z), batch_size):
            rows = slice(start, start + batch_size)
            states = (
                written.rows(rows)
                .trimmed()
                ._replace(
                    image_embeddings=torch.stack(segmentation["image_embeddings"][rows]),
                    reshaped_input_sizes=segmentation["reshaped_input_sizes"][rows],
                )
            )
            with self.accelerator.autocast():
                output = core.decode_masks(**states._asdict())
            outputs.append(output)
        return outputs

    def _scored_outputs(self, prompts, completion_ids_list):
        """The masks of the responses from a teacher-forced pass: TRL's own, or one more without the LM head."""
        rollout = self._rollout
        if rollout.scored is None:
            args, kwargs = rollout.scoring_inputs or self._scoring_inputs(prompts, completion_ids_list)
            rollout.scored = self._joint_forward(self.model, rollout.segmentation, skip_lm_head=True)
            checkpointing = disable_gradient_checkpointing(self.model, self.args.gradient_checkpointing_kwargs)
            with checkpointing, self._following_sae():
                super()._get_per_token_logps_and_entropies(rollout.scored, *args, **kwargs)
        return rollout.scored.outputs

    def _batch_size(self):
        return self.args.per_device_train_batch_size if self.model.training else self.args.per_device_eval_batch_size

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
        self.core.backbone.append_text(inputs, ids.shape[1])
        inputs.update(batch_size=self._batch_size(), num_images=[1] * len(prompts))
        return (input_ids, attention_mask, ids.shape[1]), inputs

    def _valid(self, output, segmentation, rows=slice(None)):
        """The unpadded part of the mask frame, in its cells: long (B, 2)."""
        sizes = segmentation["reshaped_input_sizes"][rows]
        return valid_extent(sizes, self.core.config.image_encoder_config.image_size, output.pred_masks.shape[-1])

    # -- loss ---------------------------------------------------------------------------------------------------------

    def _supervised_rows(self, scores):
        """The rows of a micro-batch whose masks are supervised, those of the best masks; None for all."""
        if self.args.supervised_fraction == 1.0:
            return None
        count = max(1, round(self.args.supervised_fraction * len(scores)))
        return scores.topk(count).indices.sort().values.tolist()

    def _compute_loss(self, model, inputs):
        if self.args.training_mode == "rl":
            return super()._compute_loss(_TrimmedForward(model), inputs)
        rows = self._supervised_rows(inputs["mask_scores"])
        forward = self._joint_forward(model, inputs, rows=rows)
        grpo_loss = super()._compute_loss(forward, inputs)
        (output,) = forward.outputs  # the one training forward
        rows = list(range(len(output.pred_masks))) if rows is None else rows
        segmentation, parts = segmentation_loss(
            output.pred_masks,
            output.heatmaps,
            output.pred_logits,
            output.slot_mask,
            [inputs["mask_targets"][row] for row in rows],
            self._valid(output, inputs, rows),
            lambda_s=self.args.lambda_s,
            lambda_c=self.args.lambda_c,
            lambda_d=self.args.lambda_d,
            focal=self.args.focal,
            heatmap_dice=self.args.heatmap_dice,
        )
        mode = "train" if self.model.training else "eval"
        # TRL's loss comes divided by the accumulation steps (loss_is_scaled_for_ga), and Trainer divides no further.
        accumulation = self.current_gradient_accumulation_steps if mode == "train" else 1
        logged = {f"seg/{name}": value for name, value in parts.items()}
        logged["grpo_loss"] = grpo_loss.detach() * accumulation
        means = self.accelerator.gather(torch.stack(list(logged.values())).float()[None]).nanmean(0).tolist()
        for name, mean in zip(logged, means, strict=True):
            self._metrics[mode][name].append(mean)
        if self.args.training_mode == "seg":
            grpo_loss = 0.0 * grpo_loss  # not left out: DDP expects a gradient, if of zeros, of the LM head too
        return grpo_loss + segmentation / accumulation

    # -- logs and checkpoints -----------------------------------------------------------------------------------------

    def log(self, logs, start_time=None):
        if self.model.training and self._timed_steps:
            for phase, seconds in self._seconds.items():
                self._metrics["train"][f"seconds/{phase}"].append(seconds / self._timed_steps)
            self._seconds, self._timed_steps = {}, 0
        if self._overlays:
            folder = Path(self.args.output_dir) / "completions"
            folder.mkdir(parents=True, exist_ok=True)
            for number, overlay in enumerate(self._overlays):
                overlay.save(folder / f"overlay_{self.state.global_step:05d}_{number}.png")
            self._overlays = []
        super().log(logs, start_time)

    def _save_checkpoint(self, model, trial):
        super()._save_checkpoint(model, trial)
        folder = Path(self._get_output_dir(trial=trial)) / f"checkpoint-{self.state.global_step}"
        between = self._step % (self.args.steps_per_generation * self.num_iterations)
        torch.save(
            {
                "processes": self.accelerator.num_processes,
                "step": self._step,
                "rollouts": self._buffered_inputs if between else None,
                "total_train_tokens": self._total_train_tokens,
                "metrics": dict(self._metrics["train"]),
            },
            folder / ROLLOUTS.format(self.accelerator.process_index),
        )

    def _load_optimizer_and_scheduler(self, checkpoint):
        """Also the rollouts that were made but not yet learned from, so that a resumed run goes on exactly.

        Raises:
            ValueError: the checkpoint lies within a rollout and was written by another number of processes.
        """
        super()._load_optimizer_and_scheduler(checkpoint)
        path = Path(checkpoint or "") / ROLLOUTS.format(self.accelerator.process_index)
        if checkpoint is None or not path.exists():
            return
        state = torch.load(path, map_location=self.accelerator.device, weights_only=True)
        if state["processes"] != self.accelerator.num_processes and state["rollouts"] is not None:
            raise ValueError(
                f"{checkpoint} holds rollouts of {state['processes']} processes, this run has "
                f"{self.accelerator.num_processes}; resume with as many, or delete {path.parent}/rollouts_*.pt to draw "
                "new ones."
            )
        self._step, self._buffered_inputs = state["step"], state["rollouts"]
        self._total_train_tokens = state["total_train_tokens"]
        self._metrics["train"].update(state["metrics"])


def _gather_head(mllm, args, kwargs):
    """Under FSDP2 accelerate shards the LM head on its own, and TRL's fused head reads its weight without calling it:
    each process would then keep the gradient of its own rows alone. Gathered by FSDP, it gets everyone's."""
    head = mllm.get_output_embeddings()
    if kwargs.get("fused_lm_head") and isinstance(head, FSDPModule):
        head.unshard()


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
        _check_masks(row)
        decoded.append({**row, "image": images[key]})
    return decoded


# -- checks before the first step -------------------------------------------------------------------------------------


def _adapters_disabled(model: nn.Module) -> bool:
    """Whether this is PEFT's reference: the policy object itself with its adapters switched off."""
    if not is_peft_model(model):
        return False
    from peft.tuners.tuners_utils import BaseTunerLayer

    return any(module.disable_adapters for module in model.modules() if isinstance(module, BaseTunerLayer))


def _check_precision(model):
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and parameter.dtype in (torch.float16, torch.bfloat16):
            raise ValueError(
                f"{name} is trained in {parameter.dtype}, which rounds AdamW's small steps away (and float16 has no "
                "gradient scaler); load the model with dtype='float32' and set bf16=True for autocast."
            )


def _check_rollout_policy(batch):
    """vLLM must sample from the policy that is trained: compare the log-probabilities both give the same tokens.

    Generation with transformers uses the trained model itself and leaves nothing to compare.
    """
    sampled, old = batch.get("sampling_per_token_logps"), batch.get("old_per_token_logps")
    if sampled is None or old is None:
        return
    mask = batch["completion_mask"].bool() & ~sampled.isnan()
    gap = (sampled - old)[mask].abs().mean().item() if mask.any() else 0.0
    if gap > MAX_SAMPLING_GAP:
        raise RuntimeError(
            f"vLLM's log-probabilities differ from the trained policy's by {gap:.3f} a token, more than "
            f"{MAX_SAMPLING_GAP}: it samples from other weights. Check that its model is this run's MLLM "
            "(trainers.vllm_policy.export_policy) and that the sampling temperature is the trainer's."
        )


def _check_masks(row):
    """Raises ValueError when a row has no masks or masks of another size than it says."""
    if row["masks"] is None:
        raise ValueError(
            f"sample {row['sample_id']!r} has masks=None; the mask reward and the supervised terms need them (an empty "
            "list says that nothing matches)."
        )
    for mask in row["masks"]:
        if list(mask["size"]) != [row["height"], row["width"]]:
            raise ValueError(
                f"a mask of sample {row['sample_id']!r} is {list(mask['size'])} (height, width), but its image is "
                f"[{row['height']}, {row['width']}]; store masks at the image's own size."
            )


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
        if isinstance(dataset, datasets.Dataset):
            rows = dataset.select(range(min(CHECKED_ROWS, len(dataset))))
            for row in rows.select_columns(["sample_id", "masks", "height", "width"]):
                _check_masks(row)
    prompts = args.generation_batch_size // args.num_generations
    if isinstance(train_dataset, datasets.Dataset) and len(train_dataset) < prompts:
        raise ValueError(
            f"train_dataset has {len(train_dataset)} rows, but one generation batch needs {prompts} prompts "
            f"(generation_batch_size {args.generation_batch_size} / num_generations {args.num_generations}), so no "
            "step would be made; use more rows, or lower per_device_train_batch_size or gradient_accumulation_steps."
        )
