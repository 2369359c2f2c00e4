"""What TRL calls in place of the model: the same forward pass without shared padding, and with masks beside it.

TRL hands the model it is given one batch at a time and reads `log_probs`, `entropy` and `aux_loss` of what comes back
(tests/trainers/test_trl_contract.py). Knows nothing about rewards or losses.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from accelerate.utils import is_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import TrainableTokensWrapper
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from trl.trainer.utils import add_fused_lm_head

from segcompass.modeling_segcompass.backbone import PER_TOKEN_INPUTS

from .constant_prefix import constant_prefix


class TrimmedForward:
    """Called by TRL as if it were the model: leaves out the columns that are padding in every row at hand.

    Args:
        model: the policy or the reference, in whatever wrappers it trains.
        core: the SegCompassModel in it, where gradients are wanted: `constant_prefix` then spares some.

    Example:
        >>> forward = TrimmedForward(model)
        >>> GRPOTrainer._get_per_token_logps_and_entropies(trainer, forward, input_ids, attention_mask, length)
    """

    def __init__(self, model: nn.Module, core: Any = None):
        self.model, self.core = model, core

    def __call__(self, **inputs: Any) -> Any:
        """The model's output, with log-probabilities at the columns TRL knows."""
        length = inputs["input_ids"].shape[1]
        used = inputs["attention_mask"].any(0).nonzero()[:, 0]
        start, stop = int(used[0]), int(used[-1]) + 1
        trimmed = {name: v[:, start:stop] if name in PER_TOKEN_INPUTS else v for name, v in inputs.items()}
        spared = nullcontext() if self.core is None else constant_prefix(self.core, trimmed["input_ids"])
        with spared:
            output = self._call_model(trimmed)
        for name in ("log_probs", "entropy"):  # (B, stop - start - 1) -> (B, T - 1)
            value = getattr(output, name)
            if value is not None:
                setattr(output, name, nn.functional.pad(value, (start, length - stop)))
        return output

    def _call_model(self, inputs: dict[str, Any]) -> Any:
        return self.model(**inputs)


class JointForward(TrimmedForward):
    """Adds the segmentation inputs of the rows at hand, and keeps the outputs, masks among them.

    Args:
        model: the policy, in whatever wrappers it trains.
        segmentation: `image_embeddings`, B tensors (d_k, h, w), `reshaped_input_sizes`, long (B, 2), and `patch_boxes`,
            float (B, P, 4).
        rows: the rows of the one call that get masks; None, all rows of however many calls.
        core: as TrimmedForward's.
        **flags: further keywords of the model's forward, such as skip_lm_head=True.

    Example:
        >>> forward = JointForward(model, batch)
        >>> loss = GRPOTrainer._compute_loss(trainer, forward, batch)
        >>> (output,) = forward.outputs
    """

    def __init__(
        self,
        model: nn.Module,
        segmentation: Mapping[str, Any],
        rows: list[int] | None = None,
        core: Any = None,
        **flags: Any,
    ):
        super().__init__(model, core)
        self.flags, self.rows = flags, rows
        self.image_embeddings: list[Tensor] = segmentation["image_embeddings"]
        self.reshaped_input_sizes: Tensor = segmentation["reshaped_input_sizes"]
        self.patch_boxes: Tensor = segmentation["patch_boxes"]
        self.outputs: list[Any] = []
        self.first: tuple[Tensor, Tensor] | None = None  # ids and attention mask (B, t) of the first call
        self.done = 0

    def _call_model(self, inputs: dict[str, Any]) -> Any:
        batch = len(inputs["input_ids"])
        rows = list(range(self.done, self.done + batch)) if self.rows is None else self.rows
        output = self.model(
            **inputs,
            image_embeddings=torch.stack([self.image_embeddings[row] for row in rows]),  # (rows, d_k, h, w)
            reshaped_input_sizes=self.reshaped_input_sizes[rows],  # (rows, 2)
            patch_boxes=self.patch_boxes[rows],  # (rows, P, 4)
            mask_rows=self.rows,
            **self.flags,
        )
        self.first = self.first or (inputs["input_ids"], inputs["attention_mask"])
        self.done += batch
        self.outputs.append(output)
        if output.log_probs is None:  # without the LM head; TRL reads the field all the same
            output.log_probs = output.pred_logits.new_zeros(batch, inputs["input_ids"].shape[1] - 1)
        return output


@contextmanager
def mllm_replaced_by(core: Any, mllm: nn.Module) -> Iterator[None]:
    """While open, the current segmentation modules read another MLLM's states, inside the wrapped forward as ever.

    Args:
        core: a SegCompassModel.
        mllm: an MLLM of the same kind as its own.

    Yields:
        Nothing.
    """
    own, core.mllm = core.mllm, mllm
    try:
        yield
    finally:
        core.mllm = own


REFERENCE_ADAPTER = "ref"
"""What TRL calls its frozen copy of an adapter that the model brought along."""


def adapters_of_the_reference(model: nn.Module) -> bool:
    """Whether this is PEFT's reference: the policy object itself with its adapters off, or with the frozen copy active.

    Args:
        model: what TRL makes log-probabilities with.

    Returns:
        Whether it is so at the moment; False without adapters.
    """
    if not is_peft_model(model):
        return False
    layers = [module for module in model.modules() if isinstance(module, BaseTunerLayer)]
    return any(layer.disable_adapters or REFERENCE_ADAPTER in layer.active_adapters for layer in layers)


def with_cut_responses(attention_mask: Tensor, logits_to_keep: int, lengths: Tensor | None) -> Tensor:
    """Attention to the responses that `mask_truncated_completions` leaves out of the loss: their masks are read.

    Args:
        attention_mask: long (B, T), prompt and response; 0 in a whole response that TRL masked.
        logits_to_keep: columns of the responses.
        lengths: long (B,), tokens of each response; None leaves all as it is.

    Returns:
        long (B, T).
    """
    if lengths is None:
        return attention_mask
    columns = torch.arange(logits_to_keep, device=attention_mask.device)
    written = (columns < lengths.to(attention_mask.device)[:, None]).to(attention_mask.dtype)  # (B, logits_to_keep)
    return torch.cat([attention_mask[:, :-logits_to_keep], written], 1)


def add_fused_head(mllm: Any, temperature: float) -> None:
    """Give an MLLM TRL's fused head: with `fused_lm_head=True` it returns log-probabilities and entropy, not logits.

    Args:
        mllm: the MLLM, changed in place.
        temperature: what logits are divided by, as in sampling.
    """
    head = mllm.get_output_embeddings()
    if isinstance(head, TrainableTokensWrapper):  # it has a weight, the adapted one, and no bias, which TRL reads too
        head.register_parameter("bias", None)
    add_fused_lm_head(mllm, temperature=temperature, outputs=("log_probs", "entropy"))
    mllm.register_forward_pre_hook(_gather_head, with_kwargs=True)


def _gather_head(mllm: Any, args: tuple, kwargs: dict[str, Any]) -> None:
    """Under FSDP2 accelerate shards the LM head on its own, and TRL's fused head reads its weight without calling it:
    each process would then keep the gradient of its own rows alone. Gathered by FSDP, it gets everyone's."""
    head = mllm.get_output_embeddings()
    if kwargs.get("fused_lm_head") and isinstance(head, FSDPModule):
        head.unshard()
