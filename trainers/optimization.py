"""How fast each part learns, and on which schedule (paper section 4.1 and appendix A.2).

One AdamW gives each component its own rate; one cycle without warm-up lowers them all together. Which parts learn at
all is decided in policy.py, or, with PEFT, by the adapters, which checks.py looks at.
"""

import copy
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.optim.lr_scheduler import OneCycleLR

FINAL_DIV_FACTOR = 6.7
"""What every rate of joint training is divided by at its end, by default (the paper's)."""

ROWS_HOOKS = "rows_hooks"
"""Attribute of an embedding of which some rows alone learn: the handles of the hooks that see to it."""

SEGMENTATION_MODULES = ("query_codebook", "slot_mapper", "mask_decoder")
GROUNDED_MODULES = ("grounded_reading", "mask_decoder")
"""The same of a model with `concept_reading="grounded"`."""


def segmentation_modules(model: Any) -> tuple[str, ...]:
    """The names of a model's segmentation modules, between the frozen parts and the masks.

    Args:
        model: SegCompassModel, maybe inside PEFT's wrapper.

    Returns:
        names of its attributes.
    """
    return GROUNDED_MODULES if model.config.concept_reading == "grounded" else SEGMENTATION_MODULES


def rate_multiplier(module: str, default: float = 1.0) -> Any:
    """A config's field: how many times the base learning rate a module learns with.

    Args:
        module: what the help calls it.
        default: the field's default.

    Returns:
        A dataclass field.
    """
    help_text = f"Learning rate of the {module}, as a multiple of learning_rate, which the MLLM has."
    return field(default=default, metadata={"help": help_text})


@dataclass
class RateMultipliers:
    """The learning rate of each segmentation module relative to the MLLM's. The configs of both trainers inherit it.

    Example:
        >>> rates = RateMultipliers(slot_mapper_lr_multiplier=80.0)
        >>> rates.rate_multipliers()["slot_mapper"]
        80.0
    """

    query_codebook_lr_multiplier: float = rate_multiplier("query codebook")
    slot_mapper_lr_multiplier: float = rate_multiplier("slot mapper")
    grounded_reading_lr_multiplier: float = rate_multiplier("grounded read-out")
    mask_decoder_lr_multiplier: float = rate_multiplier("mask decoder")

    def rate_multipliers(self) -> dict[str, float]:
        """The multiplier of each of `SEGMENTATION_MODULES` and `GROUNDED_MODULES`."""
        modules = dict.fromkeys((*SEGMENTATION_MODULES, *GROUNDED_MODULES))
        return {module: getattr(self, f"{module}_lr_multiplier") for module in modules}


def partly_frozen(model: nn.Module) -> set[str]:
    """Names of the weights of which some rows alone learn (`policy.freeze`): decay would move the others.

    Args:
        model: the model as the optimizer will see it.

    Returns:
        The names, as `named_parameters` has them.
    """
    return {
        f"{name}.weight" for name, module in model.named_modules(remove_duplicate=False) if hasattr(module, ROWS_HOOKS)
    }


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

    Returns:
        torch's parameter groups: dicts with `params`, `lr` and `weight_decay`.
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


def component_optimizer(trainer: Any, model: nn.Module | None = None) -> torch.optim.Optimizer:
    """The optimizer of a trainer whose arguments are `RateMultipliers`: AdamW with each component's own rate.

    Args:
        trainer: a transformers Trainer that has no optimizer yet.
        model: the model as the optimizer will see it; None takes the trainer's.

    Returns:
        The optimizer that the arguments name, over `parameter_groups`.

    Raises:
        ValueError: that optimizer makes groups of its own (GaLore, Apollo, LOMO and their like), or does not read
            `optim_args`.
    """
    model, args = trainer.model if model is None else model, trainer.args
    decayed = set(trainer.get_decay_parameter_names(model)) - partly_frozen(model)
    groups = parameter_groups(model, args.learning_rate, args.weight_decay, decayed, args.rate_multipliers())
    optimizer_class, settings = trainer.get_optimizer_cls_and_kwargs(args, model)
    if settings.keys() & {"params", "model", "optimizer_dict"}:
        raise ValueError(
            f"optim={args.optim!s} makes parameter groups of its own, without the components' learning rates; "
            "set optim='adamw_torch', or another that takes groups."
        )
    without = copy.copy(args)
    without.optim_args = None
    if args.optim_args and trainer.get_optimizer_cls_and_kwargs(without, model)[1] == settings:
        raise ValueError(
            f"optim_args={args.optim_args!r} changes nothing of optim={args.optim!s}, which reads fields of its own "
            "(adam_beta1, adam_beta2, adam_epsilon); leave it out."
        )
    return optimizer_class(groups, **settings)


def check_warmup(args: Any) -> None:
    """Refuse a warm-up that transformers leaves out without a word.

    Args:
        args: transformers' TrainingArguments.

    Raises:
        ValueError: `warmup_steps` with a schedule that has no warm-up.
    """
    if args.warmup_steps and args.lr_scheduler_type == "constant":
        raise ValueError(
            f"warmup_steps={args.warmup_steps} is not followed by lr_scheduler_type='constant'; use "
            "'constant_with_warmup', or warmup_steps=0."
        )


def check_fp16(args: Any) -> None:
    """Refuse float16 where there is no gradient scaler: small gradients would be lost without a word.

    Args:
        args: transformers' TrainingArguments.

    Raises:
        ValueError: `fp16` with `use_cpu`.
    """
    if args.fp16 and args.use_cpu:
        raise ValueError(
            "fp16=True needs a GPU's gradient scaler, which is unavailable with use_cpu=True; set bf16=True, or "
            "neither."
        )


class OneCycle(OneCycleLR):
    """torch's, but a state that is loaded brings its steps and not its length: resuming with more steps goes on.

    The rates are then those that the longer cycle has from there on.
    """

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on where another cycle over the same parameters was, possibly one of another length."""
        own = {name: self.__dict__[name] for name in ("total_steps", "_schedule_phases")}
        longer = state_dict.get("total_steps") != self.total_steps
        super().load_state_dict(state_dict)
        self.__dict__.update(own)
        if longer and self.last_epoch < self.total_steps:
            for group, rate in zip(self.optimizer.param_groups, self.get_lr(), strict=True):
                group["lr"] = rate
            self._last_lr = [group["lr"] for group in self.optimizer.param_groups]


def one_cycle(optimizer: torch.optim.Optimizer, total_steps: int, final_div_factor: float) -> OneCycle:
    """The falling half of one cycle: from each group's rate, along a cosine, to rate / `final_div_factor`.

    torch begins one step along the cosine, so a short run starts a little below the rate (2 % at 10 steps).

    Args:
        optimizer: its groups' rates are where the cycle begins.
        total_steps: optimizer steps of the whole training.
        final_div_factor: every rate ends divided by this, above 0.

    Returns:
        torch's scheduler.
    """
    return OneCycle(
        optimizer,
        max_lr=[group["lr"] for group in optimizer.param_groups],
        total_steps=total_steps,
        pct_start=0.0,
        div_factor=1.0,
        final_div_factor=final_div_factor,
        cycle_momentum=False,  # cycling would overwrite AdamW's beta_1
    )
