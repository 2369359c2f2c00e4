"""Checks before the first step and at each rollout: what training cannot use is refused, and why.

Each check raises with what it is, what it must be, and what to do. Knows nothing about how training is done.
"""

import inspect
import os
from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import TYPE_CHECKING, Any

import datasets
import pyarrow as pa
import pyarrow.compute as pc
import torch
from PIL import Image
from torch import nn
from transformers import PreTrainedModel, ProcessorMixin
from transformers.integrations import is_deepspeed_zero3_enabled
from trl import GRPOTrainer

from segcompass.loaders.identity import check_sample_ids
from segcompass.loaders.masks import has_pixels
from segcompass.loaders.reasoning_segmentation.run_lengths import checked_rle
from segcompass.modeling_segcompass.backbone import backbone_of
from segcompass.modeling_segcompass.image_encoder import check_frame
from segcompass.modeling_segcompass.tokens import PROBE, REF_TOKEN, THINK, THINK_END, check_response_tokens

from .optimization import segmentation_modules
from .policy import is_quantized, is_tied
from .rewards import RewardFunction, reward_name

if TYPE_CHECKING:  # the config imports what this file imports
    from .grpo_config import SegCompassGRPOConfig

ROW_COLUMNS = ("image", "image_id", "sample_id", "instruction", "masks", "height", "width")
CHECKED_ROWS = 2000  # whose masks are checked before the first step; the others when their turn comes
MAX_SAMPLING_GAP = 0.2  # nats per token between vLLM's and the trained policy's log-probabilities; bf16 alone is ~0.02


def check_carried_inputs(processor: Any) -> None:
    """Refuse a family of MLLMs with inputs that TRL does not hand on to its scoring passes.

    Args:
        processor: a SegCompassProcessor.

    Raises:
        ValueError: naming the inputs.
    """
    prompt = processor.apply_chat_template(processor.build_messages("it"), tokenize=False, add_generation_prompt=True)
    made = processor(images=[[Image.new("RGB", (64, 64))]], text=[prompt], return_tensors="pt")
    scoring = inspect.signature(GRPOTrainer._get_per_token_logps_and_entropies).parameters
    lost = sorted(set(made) - set(scoring))
    if lost:
        raise ValueError(
            f"the passes of an MLLM of type {processor.mllm_type!r} need {', '.join(lost)}, which TRL does not hand on "
            "from the rollout; train it with SegCompassSFTTrainer, or choose another MLLM (docs/families.md)."
        )


def check_before_training(
    model: Any,
    processor: Any,
    args: "SegCompassGRPOConfig",
    rewards: Sequence[RewardFunction],
    train_dataset: Any,
    eval_dataset: Any,
    ref_model: PreTrainedModel | None,
    with_adapters: bool,
) -> None:
    """All that joint training can refuse before TRL's trainer is built.

    Args:
        model: what the trainer was given as its model.
        processor: what the trainer was given as its processing class.
        args: the settings.
        rewards: the reward functions, in the order of their weights.
        train_dataset: the rows, or None.
        eval_dataset: the rows, a dict of such, or None.
        ref_model: the frozen MLLM for the KL term, if the user brings one.
        with_adapters: whether PEFT adapters are trained.

    Raises:
        TypeError: model or processor is of another kind.
        ValueError: anything else that does not fit.
    """
    check_model(model, processor)
    check_carried_inputs(processor)
    check_dataset(train_dataset)
    check_rows(train_dataset, eval_dataset, args)
    check_reward_weights(rewards, args.reward_weights)
    check_quantization(model, with_adapters)
    check_read_out(model, args)
    check_reference(args, ref_model, with_adapters)


# -- model and processor ----------------------------------------------------------------------------------------------


def check_arguments(args: Any, expected: type) -> None:
    """Refuse settings of another class: TRL's and transformers' lack the fields of ours.

    Args:
        args: what the trainer was given as its settings.
        expected: the config that it reads.

    Raises:
        TypeError: naming both classes.
    """
    if not isinstance(args, expected):
        raise TypeError(
            f"args is {type(args).__name__}; pass a {expected.__name__}, which has its fields and this trainer's."
        )


def check_dataset(dataset: Any) -> None:
    """Refuse several splits where one is trained on.

    Args:
        dataset: what the trainer was given as its training data.

    Raises:
        TypeError: naming the splits.
    """
    if isinstance(dataset, Mapping):
        names = ", ".join(map(repr, dataset))
        raise TypeError(
            f"train_dataset is a {type(dataset).__name__} with the splits {names}; pass one of them, such as "
            f"dataset[{next(iter(dataset), 'train')!r}]."
        )


def check_model(model: Any, processor: Any) -> None:
    """Refuse what is no SegCompass model with its own processor.

    Args:
        model: what the trainer was given as its model; a model from before `<think>`'s id was kept is told it.
        processor: what the trainer was given as its processing class.

    Raises:
        TypeError: one of them is of another kind.
        ValueError: they disagree on the number of slots, on the tokens of a response or on how the MLLM sees an image;
            or the tokenizer does not find these tokens, or decoding strips them.
    """
    check_kinds(model, processor)
    config, tokenizer = model.config, processor.tokenizer
    remedy = (
        "build the model with SegCompassModel.from_backbones(..., processor=processor) or load both from one folder."
    )
    if config.think_id is None:
        config.think_id = tokenizer.convert_tokens_to_ids(THINK)
    for token, name in ((REF_TOKEN, "ref_token_id"), (THINK_END, "think_end_id"), (THINK, "think_id")):
        number, rows = tokenizer.convert_tokens_to_ids(token), config.get_text_config().vocab_size
        if number is None or number == tokenizer.unk_token_id or number != getattr(config, name) or number >= rows:
            raise ValueError(
                f"the processor's id of {token} is {number}, the model's is {getattr(config, name)}, of {rows} rows; "
                f"{remedy}"
            )
        if token not in tokenizer.decode([number], skip_special_tokens=True):
            raise ValueError(
                f"{token} is a special token of this tokenizer, so TRL would strip it from every response and the "
                "format reward would stay 0; add it with tokenizer.add_tokens, as SegCompassProcessor does."
            )
    check_response_tokens(tokenizer, processor.format_response(PROBE), processor.num_slots)
    view = backbone_of(processor).image_view(processor.image_processor)
    if view != config.image_view:
        raise ValueError(
            f"the processor shows the MLLM an image as {view!r}, the model was built for {config.image_view!r}; "
            f"{remedy}"
        )


def check_kinds(model: Any, processor: Any) -> None:
    """Refuse what is no SegCompass model, a path above all, or no processor with as many slots.

    Args:
        model: what the trainer was given as its model.
        processor: what the trainer was given as its processing class.

    Raises:
        TypeError: one of them is of another kind.
        ValueError: they disagree on the number of slots, or on where an image lies in the image encoder's input.
    """
    config = getattr(model, "config", None)
    if getattr(config, "model_type", None) != "segcompass":
        given = f"{model!r}, a path" if isinstance(model, str | os.PathLike) else type(model).__name__
        raise TypeError(
            f"model is {given}; pass a SegCompassModel (SegCompassModel.from_pretrained(path), or from_backbones to "
            "build one)."
        )
    if not (
        isinstance(processor, ProcessorMixin)
        and hasattr(processor, "num_slots")
        and hasattr(processor, "encoder_image_processor")
    ):
        raise TypeError(f"processing_class is {type(processor).__name__}; pass the model's SegCompassProcessor.")
    check_slots(config, processor)
    check_frame(config, processor.encoder_image_processor)


def check_slots(config: Any, processor: Any) -> None:
    """Refuse a processor that asks for another number of concentration tokens than the model has slots.

    Args:
        config: the model's SegCompassConfig.
        processor: a SegCompassProcessor.

    Raises:
        ValueError: with both numbers.
    """
    if processor.num_slots != config.num_slots:
        raise ValueError(
            f"the processor asks for {processor.num_slots} concentration tokens, but the model has {config.num_slots} "
            "slots; build both with the same num_slots."
        )


def check_read_out(model: Any, args: Any) -> None:
    """Refuse, for a grounded model, what only the attention read-out has.

    Args:
        model: a SegCompassModel, or a PeftModel around one.
        args: the settings of the cold start or of joint training.

    Raises:
        ValueError: one of them is set to another value than its default (or, of `query_source`, "concepts").
    """
    names = ("query_source", "token_dropout", "query_codebook_lr_multiplier", "slot_mapper_lr_multiplier")
    asked = {field.name: (getattr(args, field.name), field.default) for field in fields(args) if field.name in names}
    given = {name: value for name, (value, usual) in asked.items() if value not in (usual, "concepts")}
    if model.grounded and given:
        raise ValueError(
            f"{', '.join(f'{name}={value!r}' for name, value in given.items())} is for the attention read-out, but "
            "this model's is grounded, which reads no concentration token and has no query codebook or slot mapper "
            "(grounded_reading_lr_multiplier is its rate); leave it out, or build the model with "
            "concept_reading='feature'."
        )


def check_quantization(model: nn.Module, with_adapters: bool) -> None:
    """Refuse to train a quantised MLLM whole.

    Args:
        model: a SegCompassModel, or a PeftModel around one.
        with_adapters: whether PEFT adapters are trained.

    Raises:
        ValueError: its weights are of 4 or 8 bits and there are no adapters.
    """
    if is_quantized(model) and not with_adapters:
        raise ValueError(
            "the MLLM is quantised, and its weights of 4 or 8 bits cannot be trained; pass peft_config="
            "segcompass.trainers.policy.lora_config(model), or load the model without quantization_config."
        )


def check_precision(model: nn.Module) -> None:
    """Refuse trainable weights of half precision.

    Args:
        model: the model as it will be trained.

    Raises:
        ValueError: naming the first such weight.
    """
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and parameter.dtype in (torch.float16, torch.bfloat16):
            raise ValueError(
                f"{name} is trained in {parameter.dtype}, which rounds AdamW's small steps away (and float16 has no "
                "gradient scaler); load the model with dtype='float32' and set bf16=True for autocast."
            )


def check_adapters(model: nn.Module) -> None:
    """Refuse a PEFT model whose adapters leave what must learn frozen, or reach the image encoder or the SAE.

    The segmentation modules and the concentration token's embedding and output rows must learn. TRL's log-probabilities
    read the LM head's weight itself, which PEFT's token rows leave as it was while generation adds them: on the head
    they would make the policy that samples another than the one trained, so they are refused there. A head that is the
    embedding's own matrix shares its rows, and is read with them.

    Args:
        model: the PeftModel.

    Raises:
        ValueError: naming the modules and the remedy.
    """
    parameters = [name for name, p in model.named_parameters() if p.requires_grad]
    learning = {part for name in parameters for part in name.split(".")}
    modules = segmentation_modules(model)
    frozen = [name for name in modules if name not in learning]
    if frozen:
        raise ValueError(
            f"{', '.join(frozen)} would not learn; add modules_to_save={list(modules)} to the PEFT config."
        )
    for module, remedy in (
        ("embed_tokens", "trainable_token_indices={'embed_tokens': [think_end_id, ref_token_id]}"),
        ("lm_head", "'lm_head' to modules_to_save"),
    ):
        if module not in learning and not (module == "lm_head" and is_tied(model)):
            raise ValueError(
                f"the concentration token's row of {module} would not learn; add {remedy} in the PEFT config, or make "
                "it with segcompass.trainers.policy.lora_config."
            )
    if not is_tied(model) and any("lm_head.token_adapter" in name for name in parameters):
        raise ValueError(
            "the PEFT config trains single rows of lm_head, which sampling uses and the log-probabilities do not; put "
            "'lm_head' into modules_to_save instead."
        )
    reached = [name for name in ("image_encoder", "sae") if name in learning]
    if reached:
        raise ValueError(
            f"the PEFT config trains parts of {', '.join(reached)}, but the image encoder and the SAE stay frozen; "
            r"restrict target_modules to the MLLM, e.g. r'.*mllm\.model\.language_model\..*\.(q|v)_proj'."
        )


# -- reference and rewards --------------------------------------------------------------------------------------------


def check_reference(args: "SegCompassGRPOConfig", ref_model: PreTrainedModel | None, with_adapters: bool) -> None:
    """Refuse a reference that cannot be made, or that cannot make the masks to reward.

    Args:
        args: the settings.
        ref_model: the frozen MLLM for the KL term, if the user brings one.
        with_adapters: whether PEFT adapters are trained.

    Raises:
        ValueError: masks of the reference are asked for and it is not the trainer's own copy of the MLLM, or DeepSpeed
            ZeRO-3 leaves nothing to copy.
    """
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


def check_reward_weights(rewards: Sequence[RewardFunction], weights: Sequence[float] | None) -> None:
    """Refuse weights that are not one per reward.

    Args:
        rewards: the reward functions.
        weights: their weights; None weighs them all alike.

    Raises:
        ValueError: with the weights and the rewards' names.
    """
    if weights is not None and len(weights) != len(rewards):
        raise ValueError(
            f"reward_weights is {list(weights)}, but the rewards are {', '.join(map(reward_name, rewards))}; give one "
            "weight for each, in that order."
        )


def check_loss(parts: Mapping[str, Any]) -> None:
    """Refuse to learn from NaN or infinity: one step would spread it over all weights, and the log would not show it.

    Under fp16 a gradient that overflows is no fault, the gradient scaler leaves that step out; the loss is not scaled.

    Args:
        parts: the loss and what it is made of, tensors of one number, by name.

    Raises:
        ValueError: naming the parts that are not finite.
    """
    values = {name: value.detach().float() for name, value in parts.items()}
    finite = torch.stack(list(values.values())).isfinite()
    if finite.all():
        return
    wrong = ", ".join(f"{name}={value.item()}" for name, value in values.items() if not value.isfinite())
    raise ValueError(
        f"the loss is not finite ({wrong}), and a step on it would spoil every weight; nothing was learned from it. "
        "Lower the learning rate, clip gradients (max_grad_norm), or train in float32 or bfloat16, not float16."
    )


def check_rollout_policy(batch: Mapping[str, Any]) -> None:
    """vLLM must sample from the policy that is trained: compare the log-probabilities both give the same tokens.

    Generation with transformers uses the trained model itself and leaves nothing to compare.

    Args:
        batch: TRL's generated and scored batch.

    Raises:
        RuntimeError: they differ by more than `MAX_SAMPLING_GAP` nats per token, on average.
    """
    sampled, old = batch.get("sampling_per_token_logps"), batch.get("old_per_token_logps")
    if sampled is None or old is None:
        return
    mask = batch["completion_mask"].bool() & ~sampled.isnan()
    gap = (sampled - old)[mask].abs().mean().item() if mask.any() else 0.0
    if gap > MAX_SAMPLING_GAP:
        raise RuntimeError(
            f"vLLM's log-probabilities differ from the trained policy's by {gap:.3f} nats per token, more than "
            f"{MAX_SAMPLING_GAP}: it samples from other weights. Check that its model is this run's MLLM "
            "(segcompass.trainers.vllm_policy.export_policy) and that the sampling temperature is the trainer's."
        )


def check_engine_prompts(sent: Sequence[Sequence[int]], read: Sequence[Sequence[int]], image_token: int) -> None:
    """vLLM must read the prompts it was sent: it expands image tokens by itself, and another number is another image.

    Args:
        sent: token ids of each prompt, its image tokens expanded.
        read: what the engine says it read.
        image_token: the id of an image token.

    Raises:
        RuntimeError: naming the first prompt that differs, and how.
    """
    if len(sent) != len(read):
        raise RuntimeError(f"vLLM was sent {len(sent)} prompts and answers to {len(read)}; it follows none of them.")
    for number, (ours, theirs) in enumerate(zip(sent, read, strict=True)):
        if list(ours) != list(theirs):
            counts = list(ours).count(image_token), list(theirs).count(image_token)
            raise RuntimeError(
                f"prompt {number} has {len(ours)} tokens, {counts[0]} of them of the image; vLLM read {len(theirs)}, "
                f"{counts[1]} of the image. It would answer to another prompt than the one trained on: serve the "
                "folder that segcompass.trainers.vllm_policy.export_policy writes, with its processor and its limits "
                "on image pixels, or set use_vllm=False."
            )


# -- rows -------------------------------------------------------------------------------------------------------------


def check_rows(train_dataset: Any, eval_dataset: Any, args: "SegCompassGRPOConfig") -> None:
    """Refuse rows that training cannot use, as far as that can be seen without reading all of them.

    Args:
        train_dataset: a Dataset, an IterableDataset or None.
        eval_dataset: the same, or a dict of such.
        args: the settings; they say how many prompts one generation batch needs.

    Raises:
        ValueError: a column is missing, a mask cannot serve, a sample id repeats, or there are too few rows.
    """
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
                check_masks(row)
            check_sample_ids(dataset, name)
    settings: Any = args  # TRL fills in what its fields leave open
    prompts = settings.generation_batch_size // settings.num_generations
    if isinstance(train_dataset, datasets.Dataset) and len(train_dataset) < prompts:
        raise ValueError(
            f"train_dataset has {len(train_dataset)} rows, but one generation batch needs {prompts} prompts "
            f"(generation_batch_size {args.generation_batch_size} / num_generations {args.num_generations}), so no "
            "step would be made; use more rows, or lower per_device_train_batch_size or gradient_accumulation_steps."
        )


WRITE_TRACES = "write them with `segcompass write-traces`, and train on its folder"


def check_traces(rows: Any) -> None:
    """Refuse rows for the cold start of which one has no reasoning trace.

    Args:
        rows: a Dataset; what is streamed is checked when its turn comes.

    Raises:
        ValueError: with the number of such rows and the first sample.
    """
    if not isinstance(rows, datasets.Dataset):
        return
    if "reasoning" in rows.column_names:
        traces = rows.select_columns(["reasoning"]).with_format("arrow")[:].column("reasoning").cast(pa.string())
        empty = pc.fill_null(pc.equal(pc.utf8_trim_whitespace(traces), ""), True).to_numpy().nonzero()[0]
    else:
        empty = range(len(rows))
    if len(empty):
        first = rows.select_columns(["sample_id"])[int(empty[0])]["sample_id"] if "sample_id" in rows.features else None
        raise ValueError(
            f"{len(empty)} of {len(rows)} rows have no reasoning trace, such as sample {first!r}; the cold start "
            f"imitates traces: {WRITE_TRACES}."
        )


def check_masks(row: Mapping[str, Any]) -> None:
    """Refuse a row without masks, or with masks of another size than it says, damaged or without a pixel.

    Args:
        row: a row of the shared schema.

    Raises:
        ValueError: naming the sample and the sizes.
    """
    if row["masks"] is None:
        raise ValueError(
            f"sample {row['sample_id']!r} has masks=None; the mask reward and the supervised terms need them (an empty "
            "list says that nothing matches)."
        )
    size = [row["height"], row["width"]]
    for mask in row["masks"]:
        if list(mask["size"]) != size:
            raise ValueError(
                f"a mask of sample {row['sample_id']!r} is {list(mask['size'])} (height, width), but its image is "
                f"{size}; store masks at the image's own size."
            )
        try:
            empty = not has_pixels(checked_rle(mask))
        except ValueError as error:
            raise ValueError(f"a mask of sample {row['sample_id']!r} is damaged: {error}") from error
        if empty:
            raise ValueError(
                f"a mask of sample {row['sample_id']!r} has no pixel, and a mask without a pixel is no instance: leave "
                "it out, and give [] where nothing is meant."
            )
