"""Joint training of reasoning and masks (paper Eq. 6): TRL's GRPOTrainer with the segmentation losses in its forward.

GRPO itself - rollouts, advantages, clipping, KL - is TRL's and is not repeated here. Its methods are wrapped: a rollout
also carries image keys and mask targets; the no-grad scoring pass also decodes the masks that are rewarded; the one
training forward also gives the masks that are supervised. All of that happens by handing TRL a callable in place of
the model (`JointForward`), so TRL makes the calls it always makes. tests/trainers/test_trl_contract.py names what
this leans on.

One optimizer step, call by call; (TRL) is GRPOTrainer's method of that name, which makes the calls indented below it:

    training_step → (TRL), once per generation batch:
      _generate_and_score_completions → rollout_rows.decode_images, segmentation_batch → targets.mask_targets → (TRL)
        _generate → (TRL) → model.generate               its hidden states are kept: masks to reward come from them
        _get_per_token_logps_and_entropies → (TRL) → joint_forward.TrimmedForward    reference, old log-probabilities
        _calculate_rewards → reward_masks.decode_written or decode_in_a_pass → model.decode_masks
          → reward_masks.mask_predictions → rewards.mask_scores → matching.hungarian
          → (TRL) → each of args.reward_funcs            rewards.format_reward, rewards.mask_reward, ...
      → checks.check_rollout_policy                      with vLLM
    training_step → (TRL), every micro-batch:
      _compute_loss → (TRL) → joint_forward.JointForward → model.forward     log-probabilities and masks in one pass
        → losses.segmentation_loss → frame_targets, gather_pairs → matching.match_slots; each of losses.TERMS
    the optimizer of optimization.component_optimizer steps, on the schedule of optimization.one_cycle
    log → timing.PhaseTimer.read; the pictures of overlays.draw_overlays
"""

import copy
import logging
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from accelerate.utils import is_peft_model
from peft import PeftConfig, PeftModel
from PIL import Image
from torch import Tensor, nn
from transformers import PreTrainedModel
from trl import GRPOTrainer
from trl.models import prepare_deepspeed, prepare_fsdp

from segcompass.loaders.rows import leave_images_encoded
from segcompass.modeling_segcompass import SegCompassModel, SegCompassProcessor
from segcompass.modeling_segcompass.row_errors import check_prompt_lengths, naming_rows

from .checkpoints import WholeCheckpoints
from .checks import (
    check_adapters,
    check_arguments,
    check_before_training,
    check_kinds,
    check_loss,
    check_precision,
    check_rollout_policy,
)
from .closing import closed_generation, closing
from .grpo_config import SegCompassGRPOConfig
from .held_out import HeldOutMasks
from .image_features import ImageFeatures, open_image_features
from .joint_forward import (
    JointForward,
    TrimmedForward,
    adapters_of_the_reference,
    add_fused_head,
    mllm_replaced_by,
    with_cut_responses,
)
from .losses import LOG_PREFIX, segmentation_loss
from .optimization import component_optimizer, one_cycle, segmentation_modules
from .options import TRAINER_OPTIONS, refuse_options
from .overlays import draw_overlays
from .policy import freeze, is_quantized, restore_masters
from .reward_masks import decode_in_a_pass, decode_written, following_sae, mask_predictions
from .rewards import RewardFunction, find_rewards, format_reward
from .rollout_rows import Rollout, decode_images, segmentation_batch
from .timing import PhaseTimer
from .vllm_policy import policy_engine

logger = logging.getLogger(__name__)

ROLLOUTS = "rollouts_{}.pt"  # of one process, in each checkpoint
UNFORMATTED_ROLLOUTS = 20
"""After so many rollouts without one response of the right format a warning says what to do."""


class SegCompassGRPOTrainer(WholeCheckpoints, HeldOutMasks, GRPOTrainer):
    """GRPO on the responses and supervised segmentation on their masks, one forward and one backward.

    The rewards are those that `args.reward_funcs` names, then `reward_funcs`, weighted by `args.reward_weights`. Rows
    follow the project's schema (image, image_id, sample_id, instruction, masks, height, width, ...); the prompt is the
    processor's, unless a row brings its own `prompt`.

    Args:
        model: a SegCompassModel, or a PeftModel around one. Without PEFT, `policy.freeze` decides what learns.
        reward_funcs: further rewards, text or mask rewards (rewards.py says what they get): one or a list, each a
            function, a dotted path or a loaded reward model.
        args: SegCompassGRPOConfig.
        train_dataset: a `datasets.Dataset` or `IterableDataset` of such rows.
        eval_dataset: the same, or a dict of such.
        processing_class: the model's SegCompassProcessor.
        ref_model: the frozen MLLM for the KL term; None copies `model.mllm` as it is now. Needed with DeepSpeed
            ZeRO-3, which has already partitioned the model's weights.
        peft_config: adapters, with modules_to_save for the segmentation modules.
        **kwargs: GRPOTrainer's (callbacks, optimizers, ...).

    Raises:
        TypeError: model, args, processing_class, train_dataset or a reward is of another kind.
        ValueError: processor and model disagree, rows lack columns or masks of their image's size, the dataset is
            smaller than one generation batch, rewards and their weights are not equally many, the adapters miss the
            segmentation modules, trainable weights are of half precision, or the image features are another encoder's.

    Example:
        >>> args = SegCompassGRPOConfig("runs/grpo", max_steps=100)
        >>> trainer = SegCompassGRPOTrainer(model, args=args, train_dataset=rows, processing_class=processor)
        >>> trainer.train()
    """

    _name = "SegCompass"
    _tag_names = ["trl", "grpo", "segcompass"]
    _paper = {
        "title": "SegCompass: Exploring Interpretable Alignment with Sparse Autoencoders for Enhanced Reasoning "
        "Segmentation",
        "id": None,  # type: ignore[dict-item]  # the card then names no paper page
        "citation": "",
    }

    args: SegCompassGRPOConfig
    model: Any  # in the wrappers it trains in; `core` is what lies inside
    processing_class: Any  # a SegCompassProcessor; transformers' annotations allow everything
    lr_scheduler: Any

    def __init__(
        self,
        model: SegCompassModel | PeftModel,
        reward_funcs: str | RewardFunction | list[str | RewardFunction] | None = None,
        args: SegCompassGRPOConfig | None = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: SegCompassProcessor | None = None,
        *,
        ref_model: PreTrainedModel | None = None,
        peft_config: PeftConfig | None = None,
        **kwargs: Any,
    ):
        args = SegCompassGRPOConfig("SegCompass-GRPO") if args is None else args
        check_arguments(args, SegCompassGRPOConfig)
        check_kinds(model, processing_class)
        refuse_options(SimpleNamespace(**kwargs), TRAINER_OPTIONS)
        with_adapters = peft_config is not None or is_peft_model(model)
        further = reward_funcs if isinstance(reward_funcs, list) else [reward_funcs] if reward_funcs else []
        rewards: list[Any] = find_rewards([*args.reward_funcs, *further])
        check_before_training(
            model, processing_class, args, rewards, train_dataset, eval_dataset, ref_model, with_adapters
        )
        core: Any = model.get_base_model() if isinstance(model, PeftModel) else model
        if args.close_response:
            closing(core, args.max_completion_length or 0)  # refused here where there is no room
        self.image_features: ImageFeatures | None = None
        if args.image_features:
            self.image_features = open_image_features(args.image_features, core, processing_class)
        self.held_out_features = self.image_features
        core.config.token_dropout = args.token_dropout
        if not with_adapters:
            freeze(model, train_below_sae_layer=args.train_below_sae_layer)

        self._core: tuple[Any, Any] | None = None  # `self.model`, and the SegCompassModel in it
        self._rollout: Rollout | None = None
        self._response_lengths: Tensor | None = None  # of the training forward at hand, where TRL masks cut responses
        self._unformatted: int | None = 0  # rollouts in a row from the first without the format; None once one has it
        self._timer, self._timed_steps = PhaseTimer(counted=lambda: self.model.training), 0.0
        self._overlays: list[Image.Image] = []
        beta = args.beta
        quantized, trained = is_quantized(model), dict[str, Tensor]()
        if quantized and is_peft_model(model):
            trained = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
        engine = policy_engine(model, processing_class, args) if args.use_vllm else nullcontext()
        if not with_adapters:
            args.beta = 0.0  # or TRL would load a whole second model by name; ours is made below
        try:
            with engine:
                super().__init__(
                    model,
                    reward_funcs=rewards,
                    args=args,
                    train_dataset=leave_images_encoded(train_dataset),
                    eval_dataset=leave_images_encoded(eval_dataset),
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
        add_fused_head(self.core.mllm, self.temperature)
        if args.training_mode == "rl":  # nothing supervises them
            for name in segmentation_modules(self.core):
                getattr(self.core, name).requires_grad_(False)
        check_precision(self.model)

    @property
    def core(self) -> Any:
        """The SegCompassModel inside DDP, FSDP, DeepSpeed and PEFT wrappers; looked for once, it costs milliseconds."""
        if self._core is None or self._core[0] is not self.model:
            model = self.accelerator.unwrap_model(self.model)
            self._core = self.model, model.get_base_model() if is_peft_model(model) else model
        return self._core[1]

    @property
    def mode(self) -> str:
        """Whose metrics are being collected: "train" or "eval"."""
        return "train" if self.model.training else "eval"

    @property
    def scoring_batch_size(self) -> int:
        """Responses per micro-batch of the passes that score a rollout, as TRL has it."""
        return self.args.per_device_train_batch_size if self.model.training else self.args.per_device_eval_batch_size

    def _make_reference(self, ref_model: Any, beta: float) -> None:
        if ref_model is None:
            ref_model = copy.deepcopy(self.core.mllm)
        ref_model.requires_grad_(False).eval()
        add_fused_head(ref_model, self.temperature)
        if self.is_deepspeed_enabled:
            ref_model = prepare_deepspeed(ref_model, self.accelerator)
        elif self.is_fsdp_enabled:
            ref_model = prepare_fsdp(ref_model, self.accelerator)
        else:
            ref_model = self.accelerator.prepare_model(ref_model, evaluation_mode=True)
        self.ref_model, self.beta = ref_model, beta

    # -- optimizer and schedule ---------------------------------------------------------------------------------------

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """AdamW with each component's own rate."""
        if self.optimizer is None:
            self.optimizer = component_optimizer(self, model)
        return self.optimizer

    def create_scheduler(self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None) -> Any:
        """One cycle without warm-up, or what the arguments ask for instead."""
        if not self.args.one_cycle:
            return super().create_scheduler(num_training_steps, optimizer)
        if self.lr_scheduler is None:
            optimizer = self.create_optimizer() if optimizer is None else optimizer
            self.lr_scheduler = one_cycle(optimizer, num_training_steps, self.args.final_div_factor)
            self._created_lr_scheduler = True
        return self.lr_scheduler

    # -- rollout ------------------------------------------------------------------------------------------------------

    def _generate_and_score_completions(self, inputs):
        with self._timer.phase("images"):
            rows = decode_images(inputs)
            rows = [{"prompt": self.processing_class.build_messages(row["instruction"]), **row} for row in rows]
            images, samples = [row["image"] for row in rows], [row["sample_id"] for row in rows]
            self._rollout = Rollout(segmentation_batch(self, rows), images, samples)
        try:
            with self._timer.phase("scoring"):
                batch = super()._generate_and_score_completions(rows)
            check_rollout_policy(batch)
            return {**batch, **self._rollout.segmentation}
        finally:
            self._rollout = None

    def _generate(self, *args, **kwargs):
        closes: Any = nullcontext()
        if self.args.close_response:
            closes = closed_generation(self.core, self.max_completion_length)
        rollout = self._timer.phase("rollout")
        with rollout, self.core.reading_states() as recorder, self.accelerator.autocast(), closes as close:
            output = super()._generate(*args, **kwargs)
        if close is not None:
            prompt_ids, completion_ids, _, *rest = output
            output = (prompt_ids, completion_ids, [close.actions(ids) for ids in completion_ids], *rest)
        if self.args.mask_truncated_completions:
            lengths = [len(ids) for ids in output[1]]
            self._rollout.segmentation["response_lengths"] = torch.tensor(lengths, device=self.accelerator.device)
        if self.args.reward_mask_source == "policy":
            self._rollout.written = recorder.states
        return output

    def _tokenize_prompts(self, *args, **kwargs):
        output = super()._tokenize_prompts(*args, **kwargs)
        processor = self.processing_class
        with naming_rows(self._rollout.sample_ids):
            check_prompt_lengths(output[0], processor.max_prompt_length, processor.image_token_id)
        return output

    def _get_per_token_logps_and_entropies(self, model, input_ids, attention_mask, logits_to_keep, *args, **kwargs):
        rollout = self._rollout
        lengths = self._response_lengths if rollout is None else rollout.segmentation.get("response_lengths")
        attention_mask = with_cut_responses(attention_mask, logits_to_keep, lengths)
        args = (input_ids, attention_mask, logits_to_keep, *args)
        if rollout is None:  # the training forward
            return super()._get_per_token_logps_and_entropies(model, *args, **kwargs)
        rollout.scoring_inputs = (args, kwargs)
        from_reference = self.args.reward_mask_source == "reference"
        if model is self.ref_model or adapters_of_the_reference(model):
            with self._timer.phase("reference"):
                if model is not self.ref_model or not from_reference:
                    return super()._get_per_token_logps_and_entropies(TrimmedForward(model), *args, **kwargs)
                rollout.scored = JointForward(self.model, rollout.segmentation)
                with mllm_replaced_by(self.core, self.ref_model):
                    return super()._get_per_token_logps_and_entropies(rollout.scored, *args, **kwargs)
        # old log-probabilities of the policy: the masks to reward come with them, unless they come from elsewhere
        if from_reference or rollout.written is not None:
            return super()._get_per_token_logps_and_entropies(TrimmedForward(model), *args, **kwargs)
        rollout.scored = JointForward(model, rollout.segmentation)
        with following_sae(self, rollout.scored):
            return super()._get_per_token_logps_and_entropies(rollout.scored, *args, **kwargs)

    @torch.no_grad()
    def _calculate_rewards(self, inputs, prompts, completions, completion_ids_list):
        rollout = self._rollout
        if rollout.written is not None:
            outputs = decode_written(self, rollout.segmentation, rollout.written)
        else:
            outputs = decode_in_a_pass(self, rollout, prompts, completion_ids_list)
        predictions = mask_predictions(self, rollout, outputs)
        if self.log_completions and self.accelerator.is_main_process:
            self._overlays = draw_overlays(rollout.images, outputs[0], self.processing_class)
        scores = [prediction.score for prediction in predictions]
        rollout.segmentation["mask_scores"] = torch.tensor(scores, device=self.accelerator.device)  # (B,)
        slots = self.core.config.num_slots
        inputs = [
            {**row, "num_slots": slots, "predictions": prediction}
            for row, prediction in zip(inputs, predictions, strict=True)
        ]
        rewards = super()._calculate_rewards(inputs, prompts, completions, completion_ids_list)  # (all B, functions)
        if format_reward in self.reward_funcs:
            formatted = rewards[:, self.reward_funcs.index(format_reward)] > 0
            self.log_mean("format_share", formatted.float().mean().item())
            self._watch_format(bool(formatted.any()), len(formatted), completion_ids_list)
        return rewards

    def _watch_format(self, any_formatted, responses, completion_ids):
        if self._unformatted is None or not self.model.training:
            return
        self._unformatted = None if any_formatted else self._unformatted + 1
        if self._unformatted == UNFORMATTED_ROLLOUTS and self.accelerator.is_main_process:
            limit = self.args.max_completion_length
            cut = sum(len(ids) >= limit for ids in completion_ids) / len(completion_ids)
            logger.warning(
                "None of the %d responses of any of the first %d rollouts had the format (<think>...</think> and the "
                "concentration tokens), so that the format reward is 0 everywhere and teaches nothing. Train on "
                "reasoning traces first (segcompass train sft)%s.",
                responses,
                UNFORMATTED_ROLLOUTS,
                f", and raise max_completion_length={limit}: {cut:.0%} of the last responses were cut" if cut else "",
            )

    # -- loss ---------------------------------------------------------------------------------------------------------

    def _supervised_rows(self, scores: Tensor) -> list[int] | None:
        """The rows of a micro-batch whose masks are supervised, those of the best masks; None for all."""
        if self.args.supervised_fraction == 1.0:
            return None
        count = max(1, round(self.args.supervised_fraction * len(scores)))
        return scores.topk(count).indices.sort().values.tolist()

    def _compute_loss(self, model, inputs):
        self._response_lengths = inputs.get("response_lengths")
        if self.args.training_mode == "rl":
            grpo_loss = super()._compute_loss(TrimmedForward(model, self.core), inputs)
            check_loss({"grpo_loss": grpo_loss})
            return grpo_loss
        rows = self._supervised_rows(inputs["mask_scores"])
        forward = JointForward(model, inputs, rows=rows, core=self.core)
        grpo_loss = super()._compute_loss(forward, inputs)
        (output,) = forward.outputs  # the one training forward
        rows = list(range(len(output.pred_masks))) if rows is None else rows
        targets = [inputs["mask_targets"][row] for row in rows]
        frame, side = self.core.config.frame, output.pred_masks.shape[-1]
        extent = frame.valid_extent(inputs["reshaped_input_sizes"][rows], side)  # (rows, 2)
        segmentation, parts = segmentation_loss(output, targets, extent, self.args)
        check_loss({"grpo_loss": grpo_loss, "segmentation": segmentation})
        # TRL's loss comes divided by the accumulation steps (loss_is_scaled_for_ga), and Trainer divides no further.
        accumulation = self.current_gradient_accumulation_steps if self.mode == "train" else 1
        logged = {f"{LOG_PREFIX}{name}": value for name, value in parts.items()}
        logged["grpo_loss"] = grpo_loss.detach() * accumulation
        means = self.accelerator.gather(torch.stack(list(logged.values())).float()[None]).nanmean(0).tolist()
        for name, mean in zip(logged, means, strict=True):
            self.log_mean(name, mean)
        if self.args.training_mode == "seg":
            grpo_loss = 0.0 * grpo_loss  # not left out: DDP expects a gradient, if of zeros, of the LM head too
        return grpo_loss + segmentation / accumulation

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        """TRL's, timed."""
        with self._timer.phase("update"):
            loss = super().training_step(*args, **kwargs)
        self._timed_steps += 1 / self.current_gradient_accumulation_steps
        return loss

    # -- logs and checkpoints -----------------------------------------------------------------------------------------

    def log_mean(self, name: str, value: float) -> None:
        """Collect a value of this step; the log shows the mean since the last time.

        Args:
            name: the metric.
            value: the same in every process.
        """
        self._metrics[self.mode][name].append(value)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """TRL's, with the seconds of each phase per step, and pictures of the masks where completions are logged."""
        if self.model.training and self._timed_steps:
            for phase, seconds in self._timer.read().items():
                self.log_mean(f"seconds/{phase}", seconds / self._timed_steps)
            self._timed_steps = 0.0
        if self._overlays:
            folder = Path(self.args.output_dir or "") / "completions"
            folder.mkdir(parents=True, exist_ok=True)
            for number, overlay in enumerate(self._overlays):
                overlay.save(folder / f"overlay_{self.state.global_step:05d}_{number}.png")
            self._overlays = []
        super().log(logs, start_time)

    def save_beside(self, folder: Path) -> None:
        """Also the rollouts of this process that were made but not yet learned from."""
        super().save_beside(folder)
        settings: Any = self.args  # TRL fills in what its fields leave open
        between = self._step % (settings.steps_per_generation * self.num_iterations)
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
        """Also the rollouts that were made but not yet learned from, so that a resumed run continues exactly.

        Raises ValueError when the checkpoint lies within a rollout and was written by another number of processes.
        """
        super()._load_optimizer_and_scheduler(checkpoint)
        path = Path(checkpoint or "") / ROLLOUTS.format(self.accelerator.process_index)
        if checkpoint is None or not path.exists():
            return
        state = torch.load(path, map_location=self.accelerator.device, weights_only=True)
        if state["processes"] != self.accelerator.num_processes and state["rollouts"] is not None:
            raise ValueError(
                f"{checkpoint} holds rollouts of {state['processes']} processes, this run has "
                f"{self.accelerator.num_processes}; resume with as many, or, to draw new ones, delete "
                f"{path.parent}/rollouts_*.pt and sign what is left: segcompass verify {path.parent} --sign"
            )
        self._step, self._buffered_inputs = state["step"], state["rollouts"]
        self._total_train_tokens = state["total_train_tokens"]
        self._metrics["train"].update(state["metrics"])
