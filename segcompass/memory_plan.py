"""Plans a training's memory without weights: the work of `segcompass plan-memory`.

Parameters are counted on the meta device, at the backbones' real dimensions. Activations are what autograd saves when
one decoder block and the segmentation modules run there, at the recipe's longest sequence; the LM head and the
fragmentation of the allocator are estimates (below, as constants). Nothing here was compared with a GPU.
"""

from pathlib import Path
from typing import Any

import torch
import yaml
from torch import nn

from segcompass.modeling_segcompass import SegCompassConfig, SegCompassModel, SparseAutoencoderConfig
from segcompass.modeling_segcompass.backbone_files import read_config
from segcompass.published_backbones import PUBLISHED, backbone_configs
from segcompass.shipped import MODEL as SMALL
from segcompass.shipped import RECIPES
from segcompass.trainers import SegCompassGRPOConfig
from segcompass.trainers.optimization import SEGMENTATION_MODULES
from segcompass.trainers.policy import freeze, lora_config
from segcompass.trainers.sae_estimate import estimate_sae_training

STRATEGIES = ("ddp", "zero2", "fsdp2", "zero3")
MASTER, GRADIENT, MOMENTS, COMPUTE = 4, 4, 8, 2  # bytes per parameter: float32, float32, two of Adam's, bfloat16
FOUR_BIT = 0.5 + 4 / 64  # bytes per parameter: half a byte, and a float32 scale for each 64
HEAD_CHUNK = 2048  # positions whose logits exist at once, float32, with their gradient
PATCHES = 1024  # image tokens that a grounded read-out maps to keys, at most
SELECTION = 3 * 4 * 2**25  # the SAE's chunk of activations, its running maximum and a temporary, float32
RESERVE = 0.10  # share of a GPU left to the allocator, NCCL and CUDA
GB = 1e9
COMPONENTS: tuple[str, ...] = ("mllm vision", "mllm language", "mllm head", "image_encoder", "sae")
COMPONENTS += (*SEGMENTATION_MODULES, "grounded_reading")


def recipe_config(path: Path) -> SegCompassConfig:
    """The configuration a recipe trains: of its own backbones, or of those that its folder's sft.yaml names.

    Args:
        path: the recipe.

    Returns:
        A SegCompassConfig with placeholders for token ids. The small model's stages that were not run yet have the
        sizes of the one that ships.

    Raises:
        ValueError: the recipe's model does not exist yet, and no sft.yaml names its backbones.
    """
    recipe = yaml.safe_load(path.read_text())
    source = recipe
    if _is_small(path) and not Path(recipe.get("mllm", path)).exists():
        return SegCompassConfig.from_pretrained(SMALL)
    if "mllm" not in recipe:
        if (Path(recipe["model"]) / "config.json").exists():
            return SegCompassConfig.from_pretrained(recipe["model"])
        if _is_small(path):
            return SegCompassConfig.from_pretrained(SMALL)
        beside = path.with_name("sft.yaml")
        if not beside.exists():
            raise ValueError(
                f"{path}: {recipe['model']!r} does not exist yet and no {beside} names its backbones; train the stages "
                "before this one first."
            )
        source = yaml.safe_load(beside.read_text())
    mllm, image_encoder = backbone_configs(source["mllm"], source["image_encoder"])
    fields = dict(source.get("model_config") or {})
    sae = SparseAutoencoderConfig(**fields.pop("sae_config"))
    tokens = {"ref_token_id": mllm.get_text_config().vocab_size - 1, "think_end_id": 5, "think_id": 4}  # placeholders
    return SegCompassConfig(
        mllm_config=mllm,
        image_encoder_config=image_encoder,
        sae_config=sae,
        attn_implementation="sdpa",
        **tokens,
        **fields,
    )


def _is_small(path: Path) -> bool:
    """Whether a recipe is one of the small model's, whose sizes are known before any stage has run."""
    return path.is_relative_to(RECIPES) and path.parent.name.startswith(SMALL.name)


def recipe_choices(training: dict[str, Any]) -> dict[str, Any]:
    """What a recipe says of adapters and 4 bits.

    Args:
        training: the recipe's fields.

    Returns:
        "lora_rank" and "four_bit" for `plan`.

    Raises:
        ValueError: 4 bits without adapters, which no trainer accepts.
    """
    adapted, four_bit = bool(training.get("use_peft")), bool(training.get("load_in_4bit"))
    if four_bit and not adapted:
        raise ValueError("the recipe sets load_in_4bit without use_peft; only adapters can train beside 4-bit weights.")
    return {"lora_rank": training.get("lora_r", 16) if adapted else 0, "four_bit": four_bit}


def build(config: SegCompassConfig, lora_rank: int = 0, train_below_sae_layer: bool = False) -> Any:
    """The model on the meta device, frozen as the trainers freeze it, or with adapters.

    Args:
        config: of the model.
        lora_rank: rank of adapters; 0 trains the weights themselves.
        train_below_sae_layer: whether the decoder blocks up to the SAE's layer learn.

    Returns:
        A SegCompassModel, or a PeftModel around one.
    """
    if config.think_id is None:  # saved before it was kept; which row it is does not matter to a plan
        config.think_id = config.think_end_id
    with torch.device("meta"):
        model = SegCompassModel(config)
    if not lora_rank:
        freeze(model, train_below_sae_layer=train_below_sae_layer)
        return model
    from peft import get_peft_model

    with torch.device("meta"):
        return get_peft_model(model, lora_config(model, r=lora_rank))


def four_bit_parameters(model: Any) -> int:
    """How many of the MLLM's weights 4-bit loading packs: those of its linear layers, but not the LM head's.

    Args:
        model: on the meta device, maybe with adapters.

    Returns:
        Their number.
    """
    core = model.get_base_model() if hasattr(model, "get_base_model") else model
    packed = 0
    for name, module in core.mllm.named_modules():
        if isinstance(module, nn.Linear) and "lora_" not in name and "lm_head" not in name:
            packed += module.weight.numel()
    return packed


def component(name: str, vision: tuple[str, ...]) -> str:
    """Which part of the model a parameter belongs to; `vision` are the names of the MLLM's vision parts in it."""
    parts = name.split(".")
    for part in (*SEGMENTATION_MODULES, "grounded_reading", "image_encoder", "sae"):
        if part in parts:
            return part
    if "lm_head" in parts:
        return "mllm head"
    return "mllm vision" if any(f"mllm.{part}." in name for part in vision) else "mllm language"


def count(model: Any) -> dict[str, tuple[int, int]]:
    """component -> (all parameters, trainable ones)."""
    core = model.get_base_model() if hasattr(model, "get_base_model") else model
    vision = core.backbone.vision_names(core.mllm)
    counts: dict[str, tuple[int, int]] = {}
    for name, parameter in model.named_parameters():
        part = component(name, vision)
        total, learning = counts.get(part, (0, 0))
        counts[part] = (total + parameter.numel(), learning + parameter.numel() * parameter.requires_grad)
    return counts


class SavedBytes:
    """What autograd keeps for the backward pass of whatever runs within, in bytes, without parameters.

    Args:
        module: whose parameters are not counted.

    Example:
        with SavedBytes(linear) as saved:
            linear(torch.ones(3, 4))
        print(saved.bytes)
    """

    def __init__(self, module: nn.Module):
        self.parameters = {id(p) for p in module.parameters()}
        self.bytes = 0
        self.seen: set[int] = set()

    def __enter__(self):
        self.hooks = torch.autograd.graph.saved_tensors_hooks(self._pack, lambda tensor: tensor)
        self.hooks.__enter__()
        return self

    def __exit__(self, *error):
        self.hooks.__exit__(*error)

    def _pack(self, tensor):
        base = tensor if tensor._base is None else tensor._base
        if id(base) not in self.parameters and id(base) not in self.seen:
            self.seen.add(id(base))
            self.keep = [*getattr(self, "keep", []), base]  # so that no id is used twice
            self.bytes += base.numel() * base.element_size()
        return tensor


def activation_bytes(model: Any, batch: int, length: int) -> tuple[int, int]:
    """What autograd saves for a micro-batch of the longest sequences.

    Args:
        model: on the meta device, maybe with adapters.
        batch: sequences at once.
        length: tokens of each.

    Returns:
        Bytes of one decoder block, and of the segmentation modules.
    """
    core = model.get_base_model() if hasattr(model, "get_base_model") else model
    config, text = core.config, core.config.get_text_config()
    meta: dict[str, Any] = dict(device="meta", dtype=torch.bfloat16)
    block = core.backbone.blocks(core.mllm)[-1].to(torch.bfloat16)
    head = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    x = torch.empty(batch, length, text.hidden_size, requires_grad=True, **meta)
    rotary = tuple(torch.empty(batch, length, head, **meta) for _ in range(2))
    with SavedBytes(block) as of_block:
        block(x, position_embeddings=rotary)

    grid, width = config.key_grid, config.key_channels
    meta["dtype"] = torch.float32  # under autocast part of it is half as large
    e = torch.empty(batch, config.num_slots, text.hidden_size, requires_grad=True, **meta)
    r = torch.empty(batch, config.num_slots, config.d_c, requires_grad=True, **meta)
    keys = torch.empty(batch, width, grid, grid, **meta)
    valid = torch.ones(batch, grid, grid, dtype=torch.bool, device="meta")
    with SavedBytes(core) as of_masks:
        if core.grounded:
            heatmaps, confidences = keys.new_empty(batch, config.num_slots, grid, grid), e[..., 0].float()
        else:
            heatmaps, confidences = core.slot_mapper(e, r, keys, valid)
        core.mask_decoder(keys, keys[:1], heatmaps, confidences, valid)
    if core.grounded:  # as in the first half of a cold start: every feature shares a slot
        features, slots = config.sae_config.d_sae, config.num_slots
        concepts = 4 * batch * features * (5 * PATCHES + 4 * length + 12 * slots)  # maps, codes, weights, gradients
        concepts += 4 * 4 * batch * grid * grid * PATCHES  # from patches to keys
        return of_block.bytes, of_masks.bytes + concepts
    concepts = batch * length * min(config.num_concepts, config.sae_config.d_sae) * 4 * 4  # h_j(z_t) and its masks
    concepts += batch * config.num_concepts * text.hidden_size * 4  # gathered columns of W_enc
    return of_block.bytes, of_masks.bytes + concepts


def plan(
    config: SegCompassConfig,
    training: dict,
    strategy: str = "fsdp2",
    gpus: int = 8,
    gpu_memory: float = 80.0,
    lora_rank: int = 0,
    prompt_length: int = 1400,
    four_bit: bool = False,
) -> dict:
    """What each GPU holds, and how many responses it can generate at once.

    Args:
        config: of the model.
        training: the recipe's fields.
        strategy: one of `STRATEGIES`.
        gpus: how many there are.
        gpu_memory: of one of them, in GB.
        lora_rank: rank of adapters; 0 trains the weights themselves.
        prompt_length: tokens of image and instruction.
        four_bit: whether the MLLM's linear layers are of 4 bits, beside adapters.

    Returns:
        "counts": see `count`; "static", "update", "rollout": rows of (what, bytes on each GPU); "peak" and "room":
        bytes; "responses" and "responses_that_fit": how many are wanted at once, and for how many there is room.
    """
    model = build(config, lora_rank, training.get("train_below_sae_layer", False))
    packed = four_bit_parameters(model) if four_bit else 0
    counts = count(model)
    total, learning = (sum(part[index] for part in counts.values()) for index in (0, 1))
    mllm = sum(counts[name][0] for name in counts if name.startswith("mllm"))
    text = config.get_text_config()
    batch = training["per_device_train_batch_size"]
    grpo = "num_generations" in training
    length = prompt_length + (training.get("max_completion_length", 2000) if grpo else config.max_response_length)
    shard_all = gpus if strategy in ("fsdp2", "zero3") else 1
    shard_states = gpus if strategy != "ddp" else 1
    reference = grpo and training.get("beta", SegCompassGRPOConfig.beta) > 0 and not lora_rank

    block_bytes, segmentation_bytes = activation_bytes(model, batch, length)
    core = model.get_base_model() if lora_rank else model
    layer = sum(p.numel() for p in core.backbone.blocks(core.mllm)[-1].parameters())
    root = total - text.num_hidden_layers * layer - counts["mllm vision"][0] - counts["image_encoder"][0]
    gathered = 0 if shard_all == 1 else COMPUTE * (root + 2 * layer)
    static = [
        ("master weights", (MASTER * (total - packed) + FOUR_BIT * packed) / shard_all),
        ("reference MLLM", MASTER * mllm / shard_all if reference else 0),
        ("gradients", GRADIENT * learning / shard_states),
        ("optimizer states", MOMENTS * learning / shard_states),
        ("gathered in bf16: root group and two blocks", gathered),
    ]
    boundary = COMPUTE * batch * length * text.hidden_size * text.num_hidden_layers
    update = [
        (f"kept between {text.num_hidden_layers} checkpointed blocks", boundary),
        ("one block while it is recomputed", block_bytes),
        ("segmentation modules", segmentation_bytes),
        ("SAE selection", SELECTION),
        ("LM head, a chunk of logits and its gradient", 2 * 4 * HEAD_CHUNK * text.vocab_size),
    ]
    heads = text.num_key_value_heads * (getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads)
    response = 2 * COMPUTE * heads * text.num_hidden_layers * length
    steps = training.get("steps_per_generation") or training.get("gradient_accumulation_steps", 1)
    responses = batch * steps if grpo else 0
    rollout = [(f"key-value cache of {responses} responses of {length} tokens", response * responses)] if grpo else []
    held = sum(value for _, value in static)
    peak = held + max(sum(value for _, value in part) for part in (update, rollout or [("", 0)]))
    room = gpu_memory * GB * (1 - RESERVE)
    fit = int(max(0, room - held) // response)
    return {
        "counts": counts,
        "static": static,
        "update": update,
        "rollout": rollout,
        "peak": peak,
        "room": room,
        "responses": responses,
        "responses_that_fit": fit,
    }


def plan_sae(path: Path, gpu_memory: float = 80.0) -> dict[str, Any]:
    """What each process holds while an SAE trains.

    Args:
        path: an SAE recipe, whose `model` is a published MLLM or a folder.
        gpu_memory: of one GPU, in GB.

    Returns:
        "estimate": a SparseAutoencoderEstimate; "peak" and "room": bytes.

    Raises:
        ValueError: the recipe does not say how large the SAE is, or an MLLM that is not published here and cannot be
            reached.
    """
    training = yaml.safe_load(path.read_text(encoding="utf-8"))
    source = training["model"]
    if _is_small(path) and not Path(source).exists():
        source = SMALL
    config: Any = PUBLISHED[source]() if source in PUBLISHED else read_config(source, "model")
    whole = config.model_type == "segcompass"
    mllm = config.mllm_config if whole else config
    fields = config.sae_config.to_dict() if whole else {"layer": mllm.get_text_config().num_hidden_layers // 2}
    fields |= {name: training[name] for name in ("d_sae", "layer", "activation", "k") if training.get(name) is not None}
    if "d_sae" not in fields:
        raise ValueError("the recipe has no d_sae, and its model is no SegCompass model that has one; add it.")
    sae = SparseAutoencoderConfig(**{**fields, "d_in": mllm.get_text_config().hidden_size})
    estimate = estimate_sae_training(
        mllm,
        sae,
        samples=training.get("num_samples") or 100_000,
        epochs=training.get("num_train_epochs", 1),
        image_tokens=training.get("image_tokens", 576),
        text_tokens=training.get("text_tokens", 100),
        tokens_per_batch=training.get("tokens_per_batch", 4096),
        buffer_size=training.get("buffer_size", 32_768),
        tflops=training.get("tflops", 300.0),
        processes=training.get("processes", 1),
        bf16=training.get("bf16", True),
    )
    return {"estimate": estimate, "peak": estimate.memory_gb * GB, "room": gpu_memory * GB * (1 - RESERVE)}


def report_sae(result: dict[str, Any], title: str) -> None:
    """Print the plan of an SAE's training under a title."""
    estimate = result["estimate"]
    print(f"{title}\n")
    print(f"tokens in one pass  {estimate.tokens:>16,}")
    print(f"steps               {estimate.steps:>16,}")
    print(f"disk, if cached     {estimate.disk_gb:>16,.0f} GB")
    print(f"\npeak {estimate.memory_gb:.1f} GB of {result['room'] / GB:.1f} GB usable: ", end="")
    print("fits" if result["peak"] <= result["room"] else "does NOT fit")


def report(result: dict, title: str) -> None:
    """Print a plan under a title."""
    print(f"{title}\n")
    print(f"{'part':<18}{'parameters':>16}{'learning':>16}")
    for name in COMPONENTS:
        if name in result["counts"]:
            total, learning = result["counts"][name]
            print(f"{name:<18}{total:>16,}{learning:>16,}")
    for part in ("static", "update", "rollout"):
        print(f"\n{part}, GB per GPU")
        for name, value in result[part]:
            print(f"  {name:<52}{value / GB:>8.2f}")
    print(f"\npeak {result['peak'] / GB:.1f} GB of {result['room'] / GB:.1f} GB usable: ", end="")
    print("fits" if result["peak"] <= result["room"] else "does NOT fit")
    if result["responses"]:
        print(f"responses at once on a GPU: {result['responses']} wanted, {result['responses_that_fit']} fit")
