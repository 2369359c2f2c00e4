"""vLLM samples the responses: it holds the MLLM alone, under the MLLM's own names.

TRL builds the engine from `model.name_or_path` and sends it `model.named_parameters()`. A SegCompass folder is no
MLLM, so `export_policy` writes the MLLM (with the added tokens' rows) as vLLM reads it, and `PolicyEngine` sends only
what belongs there. A real vLLM needs a GPU; tests stand an engine with strict names in its place.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from accelerate import PartialState
from accelerate.utils import is_peft_model
from trl.generation.vllm_generation import VLLMGeneration
from trl.trainer import grpo_trainer

from segcompass.modeling_segcompass.backbone import backbone_of

from .checks import check_engine_prompts

PREFIX = "mllm."
SUPPRESSED = -100.0


def export_policy(model: Any, processor: Any, folder: str | Path) -> None:
    """Write a SegCompass model's MLLM, tokenizer and image processor as a plain transformers folder.

    Weights carry the Hub checkpoint's names. With `vllm_mode="server"`, serve this folder: `trl vllm-serve --model`.

    Args:
        model: a SegCompassModel.
        processor: its SegCompassProcessor.
        folder: made if absent.
    """
    folder = Path(folder)
    model.mllm.save_pretrained(folder)
    processor.tokenizer.save_pretrained(folder)
    backbone_of(model).save_processor(processor, folder)


class PolicyEngine(VLLMGeneration):
    """TRL's vLLM generation, which gets the MLLM's weights only.

    Raises:
        RuntimeError: after a sync that did not send exactly the MLLM's parameters.
    """

    def generate(self, prompts: list[list[int]], *args: Any, **kwargs: Any) -> tuple:
        """As TRL's; refuses an engine that read other prompts than it was given, above all other image tokens."""
        output = super().generate(prompts, *args, **kwargs)
        model: Any = self.model
        core = model.get_base_model() if is_peft_model(model) else model
        check_engine_prompts(prompts, output[0], core.config.image_token_id)
        return output

    def _iter_named_params(self):
        core = self.model.get_base_model() if is_peft_model(self.model) else self.model
        expected = {_plain(name) for name, _ in core.mllm.named_parameters()} - {None}
        sent = set()
        for name, parameter in super()._iter_named_params():
            owner, _, part = name.partition(".token_adapter.")
            if part == "weight":  # the embedding, into which PEFT has merged its trained rows
                name = f"{owner}.weight"
            elif part:
                continue
            if name.startswith(PREFIX):
                sent.add(name.removeprefix(PREFIX))
                yield name.removeprefix(PREFIX), parameter
        if sent != expected:
            differing = ", ".join(sorted(sent ^ expected)[:3])
            raise RuntimeError(
                f"vLLM was sent {len(sent)} tensors, the policy has {len(expected)} (differing: {differing} ...); it "
                "would sample from other weights than those trained."
            )


def _plain(name):
    """A parameter's name without PEFT's wrapping; None for an adapter's own parameter."""
    parts = name.split(".")
    if any(part.startswith(("lora_", "trainable_tokens_")) for part in parts):
        return None
    wrapping = ("base_layer", "original_module", "token_adapter", "modules_to_save", "default")
    return ".".join(part for part in parts if part not in wrapping)


@contextmanager
def policy_engine(model: Any, processor: Any, args: Any) -> Iterator[None]:
    """While open, a GRPOTrainer that is built with `args.use_vllm` builds a PolicyEngine of this model's MLLM.

    Image tokens are suppressed in the sampler (transformers' generation does so by itself): a sampled one would leave
    more image tokens than features.

    Args:
        model: a SegCompassModel, or a PeftModel around one.
        processor: its SegCompassProcessor.
        args: SegCompassGRPOConfig; its `generation_kwargs` gets the suppression.

    Yields:
        nothing.
    """
    core = model.get_base_model() if is_peft_model(model) else model
    bias = {core.config.image_token_id: SUPPRESSED}
    args.generation_kwargs = {"logit_bias": bias, **(args.generation_kwargs or {})}
    name = core.name_or_path
    if args.vllm_mode == "colocate":
        folder = Path(args.output_dir) / "policy"
        with PartialState().main_process_first():
            if PartialState().is_main_process:
                export_policy(core, processor, folder)
        core.name_or_path = str(folder)
    engine = grpo_trainer.VLLMGeneration
    grpo_trainer.VLLMGeneration = PolicyEngine  # type: ignore[misc]
    try:
        yield
    finally:
        grpo_trainer.VLLMGeneration, core.name_or_path = engine, name  # type: ignore[misc]
