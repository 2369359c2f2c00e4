"""How fast each part learns, and on which schedule (paper section 4.1 and appendix A.2).

One AdamW gives each component its own rate; one cycle without warm-up lowers them all together. Which parts learn at
all is decided in policy.py, or, with PEFT, by the adapters, which are checked here.
"""

from collections.abc import Mapping

import torch
from torch import nn
from torch.optim.lr_scheduler import OneCycleLR

SEGMENTATION_MODULES = ("query_codebook", "slot_mapper", "mask_decoder")


def check_adapters(model: nn.Module) -> None:
    """Refuse a PEFT model whose adapters leave what must learn frozen, or reach SAM or the SAE.

    The segmentation modules and the concentration token's embedding and output rows must learn. TRL's log-probabilities
    read the LM head's weight itself, which PEFT's token rows leave as it was while generation adds them: on the head
    they would make the policy that samples another than the one trained, so they are refused there.

    Raises:
        ValueError: naming the modules and the remedy.
    """
    learning = {part for name, p in model.named_parameters() if p.requires_grad for part in name.split(".")}
    frozen = [name for name in SEGMENTATION_MODULES if name not in learning]
    if frozen:
        raise ValueError(
            f"{', '.join(frozen)} would not learn; add modules_to_save={list(SEGMENTATION_MODULES)} to the PEFT config."
        )
    parameters = [name for name, p in model.named_parameters() if p.requires_grad]
    for module, remedy in (
        ("embed_tokens", "trainable_token_indices={'embed_tokens': [think_end_id, ref_token_id]}"),
        ("lm_head", "'lm_head' to modules_to_save"),
    ):
        if not any(module in name.split(".") for name in parameters):
            raise ValueError(
                f"the concentration token's row of {module} would not learn; add {remedy} in the PEFT config, or make "
                "it with trainers.policy.lora_config."
            )
    if any("lm_head.token_adapter" in name for name in parameters):
        raise ValueError(
            "the PEFT config trains single rows of lm_head, which sampling uses and the log-probabilities do not; put "
            "'lm_head' into modules_to_save instead."
        )
    reached = [name for name in ("image_encoder", "sae") if name in learning]
    if reached:
        raise ValueError(
            f"the PEFT config trains parts of {', '.join(reached)}, but SAM's encoder and the SAE stay frozen; "
            r"restrict target_modules to the MLLM, e.g. r'.*mllm\.model\.language_model\..*\.(q|v)_proj'."
        )


def parameter_groups(
    model: nn.Module,
    learning_rate: float,
    weight_decay: float,
    decayed: set[str],
    multipliers: Mapping[str, float],
) -> list[dict]:
    """Optimizer groups of the trainable parameters, one for each (rate, weight decay) pair.

    Args:
        model: the model as the optimizer will see it (plain, wrapped by PEFT, or sharded).
        learning_rate: the MLLM's rate.
        weight_decay: applied to the parameters named in `decayed`.
        decayed: names of the parameters that decay (no norms, no biases).
        multipliers: {module name: factor on learning_rate}; a parameter belongs to a module if the module's name is
            one component of its own.
    """
    groups: dict[tuple[float, bool], list] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            parts = name.split(".")
            multiplier = next((factor for module, factor in multipliers.items() if module in parts), 1.0)
            groups.setdefault((multiplier, name in decayed), []).append(parameter)
    return [
        {"params": params, "lr": learning_rate * multiplier, "weight_decay": weight_decay if decays else 0.0}
        for (multiplier, decays), params in groups.items()
    ]


def one_cycle(optimizer: torch.optim.Optimizer, total_steps: int, final_div_factor: float) -> OneCycleLR:
    """The falling half of one cycle: from each group's rate, along a cosine, to rate / `final_div_factor`.

    torch begins one step along the cosine, so a short run starts a little below the rate (2 % at 10 steps).
    """
    return OneCycleLR(
        optimizer,
        max_lr=[group["lr"] for group in optimizer.param_groups],
        total_steps=total_steps,
        pct_start=0.0,
        div_factor=1.0,
        final_div_factor=final_div_factor,
        cycle_momentum=False,  # cycling would overwrite AdamW's beta_1
    )
