"""Settings of the joint GRPO and segmentation training; the defaults are the paper's (section 4.1, appendix A.2)."""

from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from trl import GRPOConfig
from trl.import_utils import is_vllm_available

from segcompass.modeling_segcompass.generation_options import refuse_not_followed

from .checkpoints import check_pushing
from .losses import LossWeights
from .optimization import FINAL_DIV_FACTOR, RateMultipliers, check_fp16, check_warmup, rate_multiplier
from .options import GRPO_OPTIONS, OPTIONS, refuse_generation_options, refuse_options
from .rewards import find_rewards

TrainingMode = Literal["rl", "seg", "both"]
RewardMaskSource = Literal["policy", "reference"]


@dataclass
class SegCompassGRPOConfig(LossWeights, RateMultipliers, GRPOConfig):
    """TRL's GRPOConfig with the paper's values as defaults, and the segmentation half of Eq. 6.

    The paper's batch is 16 prompts x 8 responses on 8 devices: `per_device_train_batch_size=2,
    gradient_accumulation_steps=8`. Prompts are limited by `processor.max_prompt_length`. The schedule, one cycle
    without warm-up, is that of `lr_scheduler_type="cosine_with_min_lr"`; `warmup_steps`, another type and
    `lr_scheduler_kwargs` replace it by transformers' own. `mask_truncated_completions` leaves a response that was cut
    out of the GRPO term; its masks are rewarded and supervised like any other's.

    Example:
        >>> args = SegCompassGRPOConfig("runs/grpo", beta=0.04, lambda_focal=5.0)
        >>> args.reward_funcs.append("my_package.rewards.short_answer")
        >>> args.reward_weights.append(0.1)
    """

    learning_rate: float = field(default=2e-6, metadata={"help": "AdamW's learning rate for the MLLM."})
    weight_decay: float = field(default=0.01, metadata={"help": "AdamW's weight decay. Norms and biases do not decay."})
    max_grad_norm: float = field(default=1.0, metadata={"help": "Norm to which gradients are clipped."})
    num_generations: int | None = field(default=8, metadata={"help": "G, the number of responses per prompt."})
    max_completion_length: int | None = field(
        default=2000, metadata={"help": "Length of the longest response, in tokens."}
    )
    beta: float = field(default=0.2, metadata={"help": "Weight of the KL term. With 0 there is no reference model."})
    epsilon: float = field(default=0.2, metadata={"help": "Clip range of the probability ratio."})
    loss_type: str = field(
        default="grpo",
        metadata={"help": "How tokens are averaged. 'grpo', the mean over each response, is Eq. 10."},
    )
    use_bias_correction_kl: bool = field(
        default=False, metadata={"help": "Whether the KL term is corrected for the sampler. Eq. 11 has no correction."}
    )
    scale_rewards: str = field(
        default="group",
        metadata={"help": "What advantages are divided by. 'group' is the standard deviation of their group."},
    )
    reward_funcs: list[str] = field(
        default_factory=lambda: [
            "segcompass.trainers.rewards.format_reward",
            "segcompass.trainers.rewards.mask_reward",
        ],
        metadata={
            "help": "Dotted paths of the reward functions, of responses and of masks alike "
            "(package.module.function). segcompass.trainers.rewards says what a reward gets and returns."
        },
    )
    reward_weights: list[float] | None = field(
        default_factory=lambda: [0.3, 0.7],
        metadata={"help": "One weight for each of reward_funcs, in the same order."},
    )
    remove_unused_columns: bool | None = field(
        default=False, metadata={"help": "Must stay False, because masks and images are read from the rows."}
    )

    query_codebook_lr_multiplier: float = rate_multiplier("query codebook", 25.0)
    slot_mapper_lr_multiplier: float = rate_multiplier("slot mapper", 80.0)
    grounded_reading_lr_multiplier: float = rate_multiplier("grounded read-out", 80.0)
    mask_decoder_lr_multiplier: float = rate_multiplier("mask decoder", 10.0)
    lr_scheduler_type: str = field(
        default="cosine_with_min_lr",
        metadata={"help": "Learning rate schedule. This one falls along a cosine to 1 / final_div_factor."},
    )
    final_div_factor: float = field(
        default=FINAL_DIV_FACTOR, metadata={"help": "What every learning rate is divided by at the end (OneCycleLR)."}
    )

    training_mode: TrainingMode = field(
        default="both",
        metadata={
            "help": "What trains (Table 4). 'rl' drops the supervised terms, and the segmentation modules stay as "
            "they are. 'seg' drops the GRPO term, and reward and KL are only logged."
        },
    )
    supervised_fraction: float = field(
        default=1.0,
        metadata={
            "help": "Share of a micro-batch's responses whose masks are supervised, at least one: those with the best "
            "mask scores, so that a response that speaks of something else is not taught the truth's masks. "
            "The paper takes every response (1.0)."
        },
    )
    token_dropout: float = field(
        default=0.0,
        metadata={"help": "Share of samples whose queries are built from concepts alone. Not in the paper."},
    )
    image_features: str | None = field(
        default=None,
        metadata={
            "help": "Folder that `segcompass precompute-features` wrote. Without it images are encoded as they come."
        },
    )
    close_response: bool = field(
        default=False,
        metadata={
            "help": "Whether the sampler closes each response: once </think> or the length limit is reached, the "
            "concentration tokens and the end follow by force. They are no actions: GRPO's loss leaves them out. For a "
            "model without cold start, which writes none by itself."
        },
    )
    eval_masks: bool = field(
        default=False,
        metadata={
            "help": "Whether an evaluation also segments its rows: metrics, format share, slots found. The commands "
            "set it where they have an eval_dataset."
        },
    )
    reward_mask_source: RewardMaskSource = field(
        default="policy",
        metadata={
            "help": "Whose hidden states make the rewarded masks: 'policy', the model being trained, in one pass "
            "without the LM head; or 'reference', the frozen initial MLLM with the current segmentation modules, in "
            "the pass that the KL term makes anyway (the paper's wording)."
        },
    )
    train_below_sae_layer: bool = field(
        default=False,
        metadata={
            "help": "Whether the decoder blocks up to the SAE's layer learn. The paper does not say; the released code "
            "freezes them, which keeps the SAE's input close to what it was trained on. Ignored with PEFT."
        },
    )

    def __post_init__(self):
        super().__post_init__()
        check_pushing(self)
        check_warmup(self)
        check_fp16(self)
        for name, choices in (("training_mode", TrainingMode), ("reward_mask_source", RewardMaskSource)):
            if getattr(self, name) not in get_args(choices):
                raise ValueError(f"{name} is {getattr(self, name)!r}; choose one of {get_args(choices)}.")
        if not 0 < self.supervised_fraction <= 1:
            raise ValueError(
                f"supervised_fraction is {self.supervised_fraction}; choose a share above 0 and at most 1, or "
                "training_mode='rl' for no supervision."
            )
        if self.reward_mask_source == "reference" and self.beta == 0.0:
            raise ValueError(
                "reward_mask_source='reference' decodes masks in the reference pass, and beta=0 makes none; "
                "set beta above 0 or reward_mask_source='policy'."
            )
        find_rewards(self.reward_funcs)  # a path that leads nowhere is an error before a model is loaded
        refuse_options(self, {**OPTIONS, **GRPO_OPTIONS})
        if not self.use_vllm:  # whose sampler has options of other names, and leaves no states
            refuse_not_followed(self.generation_kwargs or {})
            refuse_generation_options(self.generation_kwargs)
        self._check_schedule()
        if self.use_vllm and self.close_response:
            raise ValueError(
                "close_response=True forces tokens while transformers samples, which vLLM does not let it do; set "
                "use_vllm=False, or train on traces first (segcompass train sft)."
            )
        if self.use_vllm and not is_vllm_available():
            raise ValueError(
                "use_vllm=True, but vLLM is not installed; pip install 'segcompass[vllm]' on a machine with a GPU, or "
                "set use_vllm=False to generate with transformers."
            )

    @property
    def one_cycle(self) -> bool:
        """Whether the schedule is the paper's: one cycle without warm-up."""
        return self.lr_scheduler_type == "cosine_with_min_lr" and not self.warmup_steps and not self._own_end

    @property
    def _own_end(self):
        """Whether lr_scheduler_kwargs say where the rate ends."""
        kwargs: Any = self.lr_scheduler_kwargs or {}
        return bool(kwargs) and kwargs != {"min_lr_rate": 1 / self.final_div_factor}

    def _check_schedule(self):
        falls = self.lr_scheduler_type == "cosine_with_min_lr"
        if falls and not self.lr_scheduler_kwargs:
            self.lr_scheduler_kwargs = {"min_lr_rate": 1 / self.final_div_factor}
        elif self.final_div_factor != FINAL_DIV_FACTOR and (not falls or self._own_end):
            raise ValueError(
                f"final_div_factor={self.final_div_factor} is the end of lr_scheduler_type='cosine_with_min_lr', and "
                f"lr_scheduler_type={self.lr_scheduler_type!r} with lr_scheduler_kwargs={self.lr_scheduler_kwargs} has "
                "one of its own; set one of them."
            )
