"""The masks that are rewarded: decoded from what generation left behind, or in one pass without the LM head.

Also follows the SAE in that pass: how much of its input's variance it explains, which falls if training moves the
input. `trainer` is the SegCompassGRPOTrainer throughout.
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.distributed.fsdp import register_fsdp_forward_method
from trl import GRPOTrainer
from trl.models.utils import disable_gradient_checkpointing
from trl.trainer.utils import pad

from segcompass.modeling_segcompass.states import ReasoningStates

from .joint_forward import JointForward
from .rewards import MaskPrediction, mask_scores
from .rollout_rows import Rollout

if TYPE_CHECKING:  # the trainer imports this file
    from .grpo_trainer import SegCompassGRPOTrainer

SAE_TOKENS = 128  # enough to follow the SAE's explained variance


def decode_written(
    trainer: "SegCompassGRPOTrainer", segmentation: dict[str, Any], written: ReasoningStates
) -> list[Any]:
    """The masks of the responses, micro-batch by micro-batch, from the states that generation left behind.

    Args:
        trainer: the trainer.
        segmentation: the rollout's image keys and sizes.
        written: the states as generation left them, without the image.

    Returns:
        One SegCompassOutput per micro-batch.
    """
    core = trainer.core
    if "decode_masks" not in vars(core):
        register_fsdp_forward_method(core, "decode_masks")
    log_explained_variance(trainer, written.z, core.concept_token_mask(written.input_ids, written.attention_mask))
    batch_size, outputs = trainer.scoring_batch_size, []
    for start in range(0, len(written.z), batch_size):
        rows = slice(start, start + batch_size)
        image = {
            "image_embeddings": torch.stack(segmentation["image_embeddings"][rows]),  # (rows, d_k, h, w)
            "reshaped_input_sizes": segmentation["reshaped_input_sizes"][rows],
            "patch_boxes": segmentation["patch_boxes"][rows],
        }
        states = written.rows(rows).trimmed()._replace(**image)
        with trainer.accelerator.autocast():
            outputs.append(core.decode_masks(**states._asdict()))
    return outputs


def decode_in_a_pass(
    trainer: "SegCompassGRPOTrainer", rollout: Rollout, prompts: list, completion_ids: list[list[int]]
) -> list[Any]:
    """The masks of the responses from a teacher-forced pass: TRL's own, or one more without the LM head.

    Args:
        trainer: the trainer.
        rollout: the pass is kept as its `scored`.
        prompts: B conversations with their images.
        completion_ids: the token ids of the B responses.

    Returns:
        One SegCompassOutput per micro-batch.
    """
    if rollout.scored is None:
        args, kwargs = rollout.scoring_inputs or scoring_inputs(trainer, prompts, completion_ids)
        rollout.scored = JointForward(trainer.model, rollout.segmentation, skip_lm_head=True)
        settings: Any = trainer.args.gradient_checkpointing_kwargs
        with disable_gradient_checkpointing(trainer.model, settings), following_sae(trainer, rollout.scored):
            GRPOTrainer._get_per_token_logps_and_entropies(trainer, rollout.scored, *args, **kwargs)
    return rollout.scored.outputs


def scoring_inputs(
    trainer: "SegCompassGRPOTrainer", prompts: list, completion_ids: list[list[int]]
) -> tuple[tuple, dict[str, Any]]:
    """What TRL's scoring pass would be given, for a rollout (on-policy, beta 0) where it makes none.

    Args:
        trainer: the trainer.
        prompts: B conversations with their images.
        completion_ids: the token ids of the B responses.

    Returns:
        The arguments of `_get_per_token_logps_and_entropies` after the model: positional ones and keywords.
    """
    device = trainer.accelerator.device
    chat_template_kwargs: Any = trainer.chat_template_kwargs
    inputs = trainer.processing_class.apply_chat_template(
        prompts,
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        processor_kwargs={"padding": True, "padding_side": "left"},
        **chat_template_kwargs,
    )
    inputs = {name: torch.as_tensor(value).to(device) for name, value in inputs.items()}
    completions = [torch.tensor(ids, device=device) for ids in completion_ids]
    ids = pad(completions, padding_value=trainer._tokenizer.pad_token_id, padding_side="right")  # (B, T_response)
    mask = pad([torch.ones_like(row) for row in completions], padding_value=0, padding_side="right")
    input_ids = torch.cat([inputs.pop("input_ids"), ids], 1)  # (B, T)
    attention_mask = torch.cat([inputs.pop("attention_mask"), mask], 1)  # (B, T)
    trainer.core.backbone.append_text(inputs, ids.shape[1])
    inputs.update(batch_size=trainer.scoring_batch_size, num_images=[1] * len(prompts))
    pixels = inputs.get("pixel_values")
    if pixels is not None and pixels.dim() == 4 and len(pixels) != len(prompts):  # tiles, as TRL counts them
        counts = (input_ids == trainer.core.config.image_token_id).sum(1)
        tiles = trainer.core.backbone.split_rows(pixels, counts)
        inputs["num_tiles"] = None if tiles is None else [len(part) for part in tiles]
    return (input_ids, attention_mask, ids.shape[1]), inputs


def mask_predictions(trainer: "SegCompassGRPOTrainer", rollout: Rollout, outputs: list[Any]) -> list[MaskPrediction]:
    """What the mask rewards read, one per response.

    Args:
        trainer: the trainer.
        rollout: it holds the targets.
        outputs: one SegCompassOutput per micro-batch, B samples together.

    Returns:
        B predictions, on the device; their tensors are views of the outputs'.
    """
    frame = trainer.core.config.frame
    predictions: list[MaskPrediction] = []
    for output in outputs:
        rows = slice(len(predictions), len(predictions) + len(output.pred_masks))
        targets: Sequence[Tensor] = rollout.segmentation["mask_targets"][rows]
        sizes = rollout.segmentation["reshaped_input_sizes"][rows]
        extent = frame.valid_extent(sizes, output.pred_masks.shape[-1])  # (rows, 2)
        scores = mask_scores(output, targets, extent)
        samples = (output.pred_masks, output.pred_logits, output.slot_mask, targets, extent, scores)
        predictions += [MaskPrediction(*sample) for sample in zip(*samples, strict=True)]
    return predictions


@contextmanager
def following_sae(trainer: "SegCompassGRPOTrainer", forward: JointForward) -> Iterator[None]:
    """Log the SAE's explained variance at some tokens of the first pass made while this is open.

    Args:
        trainer: the trainer.
        forward: what makes the pass.

    Yields:
        Nothing.
    """
    seen: list[Tensor] = []

    def keep(module, args, output):
        if not seen:
            seen.append(output[0] if isinstance(output, tuple) else output)

    core = trainer.core
    block = core.backbone.blocks(core.mllm)[core.config.sae_config.layer - 1]
    hook = block.register_forward_hook(keep)
    try:
        yield
    finally:
        hook.remove()
    if seen and forward.first is not None:
        log_explained_variance(trainer, seen[0], core.concept_token_mask(*forward.first))


def log_explained_variance(trainer: "SegCompassGRPOTrainer", z: Tensor, may_fire: Tensor) -> None:
    """Log the share of the SAE's input's variance that its reconstruction explains, at tokens that concepts come from.

    Padding and special tokens are left out: an attention sink among them has most of the variance and hides the rest.

    Args:
        trainer: the trainer.
        z: float (B, T, d_π), the SAE's input.
        may_fire: bool (B, T), as the model's `concept_token_mask`.
    """
    sae, z = trainer.core.sae, z[may_fire]  # (n, d_π)
    with torch.autocast(z.device.type, enabled=False):
        z = z[:: max(1, len(z) // SAE_TOKENS)].to(sae.W_enc.dtype)
        explained = torch.full((), math.nan, device=z.device)
        if len(z):
            residual = z - sae.decode(sae.encode(z))
            explained = 1 - residual.var(0, correction=0).sum() / z.var(0, correction=0).sum()
    mean = trainer.accelerator.gather(explained.float().reshape(1)).nanmean().item()
    if not math.isnan(mean):
        trainer.log_mean("sae/explained_variance", mean)
