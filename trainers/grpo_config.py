"""Settings of the joint GRPO and segmentation training; the defaults are the paper's (section 4.1, appendix A.2)."""

from dataclasses import dataclass, field

from trl import GRPOConfig
from trl.import_utils import is_vllm_available

REWARD_MASK_SOURCES = ("policy", "reference")
TRAINING_MODES = ("rl", "seg", "both")


@dataclass
class SegCompassGRPOConfig(GRPOConfig):
    """TRL's GRPOConfig with the paper's values as defaults, and the segmentation half of Eq. 6.

    The paper's batch is 16 prompts x 8 responses on 8 devices: `per_device_train_batch_size=2,
    gradient_accumulation_steps=8`. Prompts are limited by `processor.max_prompt_length`. The schedule has no warm-up:
    `warmup_steps` and `lr_scheduler_type` are not read.
    """

    learning_rate: float = field(default=2e-6, metadata={"help": "AdamW's rate for the MLLM."})
    weight_decay: float = field(default=0.01, metadata={"help": "AdamW's weight decay; none on norms and biases."})
    max_grad_norm: float = field(default=1.0, metadata={"help": "Norm to which gradients are clipped."})
    num_generations: int | None = field(default=8, metadata={"help": "G, responses a prompt."})
    max_completion_length: int | None = field(default=2000, metadata={"help": "Longest response in tokens."})
    beta: float = field(default=0.2, metadata={"help": "Weight of the KL term; 0 does without a reference model."})
    epsilon: float = field(default=0.2, metadata={"help": "Clip range of the probability ratio."})
    loss_type: str = field(
        default="grpo", metadata={"help": "How tokens are averaged: 'grpo', a mean of each response, is Eq. 10."}
    )
    use_bias_correction_kl: bool = field(default=False, metadata={"help": "Eq. 11 has no such correction."})
    scale_rewards: str = field(default="group", metadata={"help": "Advantages are divided by their group's std."})
    reward_weights: list[float] | None = field(
        default_factory=lambda: [0.3, 0.7],
        metadata={"help": "Weights of the format reward, the mask reward, and then of each function in reward_funcs."},
    )
    remove_unused_columns: bool | None = field(
        default=False, metadata={"help": "Must stay False: masks and images are read from the rows."}
    )

    training_mode: str = field(
        default="both",
        metadata={
            "help": "Table 4: 'both'; 'rl' drops the supervised terms, and the segmentation modules stay as they are; "
            "'seg' drops the GRPO term, and reward and KL are only logged."
        },
    )
    supervised_fraction: float = field(
        default=1.0,
        metadata={
            "help": "Share of a micro-batch's responses whose masks are supervised, at least one: those whose masks "
            "were rewarded best, so that a response that speaks of something else is not taught the truth's masks. "
            "The paper (and 1.0) takes every response."
        },
    )
    token_dropout: float = field(
        default=0.0,
        metadata={"help": "Share of samples whose queries are built from concepts alone; not in the paper."},
    )
    image_features: str | None = field(
        default=None,
        metadata={"help": "Folder that examples/precompute_image_features.py wrote; None encodes images as they come."},
    )

    lambda_s: float = field(default=1.0, metadata={"help": "Weight of the mask terms, L_SEG, in Eq. 6."})
    lambda_c: float = field(default=0.2, metadata={"help": "Weight of the confidence term, L_CONF, in Eq. 6."})
    lambda_d: float = field(default=0.6, metadata={"help": "Weight of mask dice within L_SEG."})
    focal: float = field(default=0.0, metadata={"help": "Weight of a focal term within L_SEG; not in the paper."})
    heatmap_dice: float = field(default=0.0, metadata={"help": "Weight of heatmap dice in L_SEG; not in the paper."})
    query_codebook_lr_multiplier: float = field(default=25.0, metadata={"help": "Rate relative to the MLLM's."})
    slot_mapper_lr_multiplier: float = field(default=80.0, metadata={"help": "Rate relative to the MLLM's."})
    mask_decoder_lr_multiplier: float = field(default=10.0, metadata={"help": "Rate relative to the MLLM's."})
    final_div_factor: float = field(default=6.7, metadata={"help": "Every rate ends divided by this (OneCycleLR)."})
    reward_mask_source: str = field(
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
        if self.training_mode not in TRAINING_MODES:
            raise ValueError(f"training_mode is {self.training_mode!r}; choose one of {TRAINING_MODES}.")
        if not 0 < self.supervised_fraction <= 1:
            raise ValueError(
                f"supervised_fraction is {self.supervised_fraction}; choose a share above 0 and at most 1, or "
                "training_mode='rl' for no supervision."
            )
        if self.reward_mask_source not in REWARD_MASK_SOURCES:
            raise ValueError(f"reward_mask_source is {self.reward_mask_source!r}; choose one of {REWARD_MASK_SOURCES}.")
        if self.reward_mask_source == "reference" and self.beta == 0.0:
            raise ValueError(
                "reward_mask_source='reference' decodes masks in the reference pass, and beta=0 makes none; "
                "set beta above 0 or reward_mask_source='policy'."
            )
        unsupported = {
            "remove_unused_columns": "the trainer reads image, instruction and masks from the rows",
            "sync_ref_model": "the reference is a bare MLLM, not a second SegCompass model",
            "cast_lm_head_to_fp32": "the LM head belongs to model.mllm, which TRL does not look into",
        }
        for name, reason in unsupported.items():
            if getattr(self, name):
                raise ValueError(f"{name}=True is not supported: {reason}. Set {name}=False.")
        if self.use_vllm and not is_vllm_available():
            raise ValueError(
                "use_vllm=True, but vLLM is not installed; pip install 'segcompass[vllm]' on a machine with a GPU, or "
                "set use_vllm=False to generate with transformers."
            )
        if self.fp16 and self.use_cpu:
            raise ValueError(
                "fp16=True needs a GPU's gradient scaler, which use_cpu=True goes without; set bf16=True, or neither."
            )
