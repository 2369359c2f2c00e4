"""Building a SegCompass model from its parts, and saving and loading it: what stands behind the model's methods."""

import logging
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

from transformers import AutoModelForImageTextToText, PreTrainedModel
from transformers import initialization as init
from transformers.quantizers import AutoQuantizationConfig

from .backbone import backbone_of
from .configuration_segcompass import SegCompassConfig, SparseAutoencoderConfig
from .family_check import check_family, check_parts
from .image_encoder import check_frame, load_image_encoder
from .modeling_sparse_autoencoder import SparseAutoencoder
from .old_names import OLD_FIELDS, OLD_PARTS, OLD_WEIGHTS, with_new_names
from .pipeline_segcompass import CUSTOM_PIPELINES
from .sae_origin import Origin, check_origin, origin_of
from .sam_weights import start_mask_decoder
from .saved_folders import HUB_KEYWORDS, check_given, check_loaded, check_saved, signing_saved
from .tokens import give_rows
from .weights import check_finite

logger = logging.getLogger(__name__)

AUTO_MAP = {
    "AutoConfig": "configuration_segcompass.SegCompassConfig",
    "AutoModel": "modeling_segcompass.SegCompassModel",
    "AutoModelForImageTextToText": "modeling_segcompass.SegCompassModel",
    "AutoProcessor": "processing_segcompass.SegCompassProcessor",
}
SUBMODELS = ("mllm", "image_encoder", "sae")
"""The parts that have weights of their own before there is a SegCompass model."""
# Only the MLLM is quantised: these are small, or their output is a mask's edge. The head is named as by default.
UNQUANTIZED = (
    *("lm_head", "image_encoder", "sae", "query_codebook", "slot_mapper", "grounded_reading"),
    *("image_positions", "mask_decoder"),
)


def build_from_backbones(
    model_class: type, mllm: Any, image_encoder: Any, sae: Any, processor: Any, dtype: Any, config: dict[str, Any]
) -> Any:
    """The body of `SegCompassModel.from_backbones`, which says what the arguments are."""
    config = with_new_names(config, OLD_FIELDS | OLD_PARTS)
    if "image_encoder" in config:  # given under its old name
        if image_encoder is not None:
            raise ValueError("both sam= and image_encoder= (its new name) are given; keep image_encoder= only.")
        image_encoder = config.pop("image_encoder")
    if image_encoder is None:
        raise ValueError("no image encoder was given; pass image_encoder=<model id, folder, .pth file or model>.")
    if isinstance(mllm, str):
        asked = {"dtype": dtype, "output_loading_info": True, "ignore_mismatched_sizes": True}  # `check_loaded` refuses
        loaded: Any = AutoModelForImageTextToText.from_pretrained(mllm, **asked)
        mllm, info = loaded
        check_loaded(mllm, info, mllm.config._name_or_path, unexpected=False)
    check_parts(mllm, processor, backbone_of(mllm))
    image_encoder, decoder_weights = load_image_encoder(image_encoder, dtype=dtype)
    if isinstance(sae, str):
        sae = SparseAutoencoder.from_pretrained(sae, dtype=dtype)
    origin = origin_of(mllm.config)
    if sae is not None:
        given = config.get("sae_config") or {}
        for name, value in (given if isinstance(given, dict) else {}).items():
            if (trained := getattr(sae.config, name, None)) != value:
                raise ValueError(
                    f"sae_config has {name}={value!r}, but the SAE that is given has {trained!r}; leave sae_config "
                    "out, or give the SAE that it describes."
                )
        config["sae_config"] = sae.config
        check_origin(sae.config, origin)
        check_finite(sae, "the SAE")
    elif "sae_config" not in config:
        text = mllm.config.get_text_config()
        config["sae_config"] = SparseAutoencoderConfig(
            d_in=text.hidden_size,
            layer=max(1, text.num_hidden_layers // 2),
            backbone=origin.name,
            backbone_revision=origin.revision,
        )
    if processor is not None:
        if config.get("num_slots", processor.num_slots) != processor.num_slots:
            raise ValueError(
                f"num_slots={config['num_slots']!r}, but the processor writes {processor.num_slots} concentration "
                "tokens; leave it out, and make the processor with SegCompassProcessor.from_backbones(..., num_slots=) "
                "(`train sft --processor_config '{\"num_slots\": 4}'`)."
            )
        config = {**processor.model_tokens(), "num_slots": processor.num_slots, **config}
        give_rows(mllm, processor.tokenizer, processor.new_tokens)
    whole = SegCompassConfig(
        mllm_config=mllm.config,
        image_encoder_config=image_encoder.config,
        attn_implementation=mllm.config._attn_implementation,
        **config,
    )
    if processor is not None:
        check_frame(whole, processor.encoder_image_processor)
    model = model_class(whole, mllm=mllm, image_encoder=image_encoder, sae=sae)
    _log_start(model.mask_decoder, start_mask_decoder(model, decoder_weights), type(image_encoder).__name__)
    if processor is not None:
        check_family(model, processor)
    return model


def _log_start(mask_decoder, started, encoder_name):
    """Say what the mask decoder starts from: a warning unless all but the confidence, which is ours, is SAM's."""
    names = [f"mask_decoder.{name}" for name, _ in mask_decoder.named_parameters()]
    new = [name for name in names if name not in started]
    if len(new) == len(names):
        logger.warning("the mask decoder starts from nothing: %s brings none of its own that fits.", encoder_name)
        return
    partly = any(not name.startswith("mask_decoder.confidence.") for name in new)
    logger.log(
        logging.WARNING if partly else logging.INFO,
        "the mask decoder starts from that of %s; %d of its %d tensors are new: %s.",
        encoder_name,
        len(new),
        len(names),
        ", ".join(new[:6]) + (", ..." if len(new) > 6 else ""),
    )


def put_sae(model: Any, sae: Any) -> None:
    """The body of `SegCompassModel.load_sae`."""
    if isinstance(sae, str):
        sae = SparseAutoencoder.from_pretrained(sae)
    for name in ("d_in", "d_sae", "layer"):
        ours, theirs = getattr(model.config.sae_config, name), getattr(sae.config, name)
        if ours != theirs:
            raise ValueError(
                f"the SAE has {name}={theirs}, this model was built for {ours}; train one for it, or build a model "
                "around this SAE with from_backbones."
            )
    ours = model.config.sae_config
    check_origin(sae.config, Origin(ours.backbone, ours.backbone_revision), origin_of(model.config.mllm_config))
    check_finite(sae, "the SAE")
    model.sae = sae.to(model.device)
    model.config.sae_config = sae.config
    model.freeze_encoders()


def load_whole(load: Callable, path: Any, args: tuple, output_loading_info: bool, keywords: dict[str, Any]) -> Any:
    """The body of `SegCompassModel.from_pretrained`.

    Args:
        load: transformers' own `from_pretrained` of the model's class.
        path: folder or Hub id, or None with `config` and `state_dict` among the keywords.
        args: further positional arguments of `load`.
        output_loading_info: also return transformers' report on the weights.
        keywords: keyword arguments of `load`.

    Returns:
        the model, or the model and the report.

    Raises:
        ValueError: see `SegCompassModel.from_pretrained`.
    """
    if path is None:
        check_given(keywords)
    else:
        check_saved(path, keywords)
    hub = {name: keywords[name] for name in HUB_KEYWORDS if name in keywords}
    keywords.setdefault("key_mapping", OLD_WEIGHTS)
    config = keywords.get("config")
    if not isinstance(config, SegCompassConfig):
        of_config = {name: keywords[name] for name in ("revision", "subfolder") if keywords.get(name) is not None}
        config = SegCompassConfig.from_pretrained(path, **hub, **of_config)
    references = config.references or {}
    if keywords.get("quantization_config") is not None:
        keywords["quantization_config"] = spare_from_quantization(keywords["quantization_config"])
    for name in ("device_map", "quantization_config"):
        if references and keywords.get(name) is not None:
            raise ValueError(
                f"{name} needs a checkpoint that carries its weights whole, but this one refers to "
                f"{', '.join(references)}; load it without, save_pretrained it, and load that."
            )
    with init.no_init_weights() if references else nullcontext():
        keywords["ignore_mismatched_sizes"] = True  # `check_loaded` refuses them, and names the file
        model, info = load(path, *args, output_loading_info=True, **keywords)
    loading = {name: keywords[name] for name in ("dtype", "attn_implementation") if name in keywords}
    for part, where in references.items():
        loaded = load_submodel(config, part, where["repo_id"], revision=where["revision"], **hub, **loading)
        getattr(model, part).load_state_dict(loaded.state_dict())
        info["missing_keys"] = {key for key in info["missing_keys"] if not key.startswith(f"{part}.")}
    check_loaded(model, info, path)
    unheld = {"sae": "the SAE", "grounded_reading": "the grounded read-out"}  # only a forward pass brings weights back
    away = [unheld[part] for part, held in model.named_children() if part in unheld and _is_away(held)]
    if away:
        kept = (*unheld, "image_positions")
        places = {name: "cpu" if name in kept else "disk" for name, _ in model.named_children()}
        raise ValueError(
            f"device_map left no memory for {' and '.join(away)}, which cannot be offloaded (their steps are methods); "
            f"raise max_memory, or name a device for each part, such as device_map={places}."
        )
    model.config.references = None  # it is whole now, and is saved whole
    model.freeze_encoders()
    return (model, info) if output_loading_info else model


def _is_away(part):
    return any(weight.is_meta for weight in part.parameters())


def load_submodel(config: Any, part: str, repo_id: str, **keywords: Any) -> Any:
    """A part of a model, by the model's configuration, from a repository of its own.

    Args:
        config: SegCompassConfig.
        part: a name in SUBMODELS.
        repo_id: folder or Hub id.
        **keywords: as of transformers' `from_pretrained`.

    Returns:
        the part, a model of its own.

    Raises:
        ValueError: the repository lacks weights of the part, or holds numbers that are not finite.
    """
    if part == "image_encoder":
        return load_image_encoder(repo_id, **keywords)[0]
    part_class: Any = AutoModelForImageTextToText if part == "mllm" else SparseAutoencoder
    keywords["ignore_mismatched_sizes"] = True  # `check_loaded` refuses them, and names the file
    loaded, info = part_class.from_pretrained(repo_id, output_loading_info=True, **keywords)
    check_loaded(loaded, info, repo_id, unexpected=False)
    return loaded


def save_whole(
    model: PreTrainedModel, save: Callable, folder: Any, args: tuple, references: Any, keywords: dict[str, Any]
) -> None:
    """The body of `SegCompassModel.save_pretrained`; `save` is transformers' own, bound to the model."""
    with signing_saved(folder, keywords):
        _save_unsigned(model, save, folder, args, references, keywords)


def _save_unsigned(model, save, folder, args, references, keywords):
    keywords["save_original_format"] = False
    model.config.auto_map = dict(AUTO_MAP)
    model.config.custom_pipelines = CUSTOM_PIPELINES
    if references:
        state_dict = model.state_dict() if keywords.get("state_dict") is None else keywords["state_dict"]
        keywords["state_dict"] = {key: w for key, w in state_dict.items() if key.split(".")[0] not in references}
    try:
        model.config.references = checked_references(references)
        save(folder, *args, **keywords)
    finally:
        model.config.references = None


def checked_references(references: dict[str, dict[str, str]] | None) -> dict[str, dict[str, str]] | None:
    """The references as they are, or None; raises ValueError for an unknown part or a revision that is not named."""
    for part, where in (references or {}).items():
        if part not in SUBMODELS or not where.get("repo_id") or not where.get("revision"):
            raise ValueError(
                f"references[{part!r}] is {where!r}; name one of {SUBMODELS} with its repo_id and revision."
            )
    return references or None


def spare_from_quantization(quantization_config: Any) -> Any:
    """The quantisation config (or its dict form) with everything but the MLLM among the modules it leaves alone."""
    if isinstance(quantization_config, dict):
        quantization_config = AutoQuantizationConfig.from_dict(quantization_config)
    for field in ("llm_int8_skip_modules", "modules_to_not_convert", "skip_modules"):
        if hasattr(quantization_config, field):
            named = getattr(quantization_config, field) or []
            setattr(quantization_config, field, [*named, *(name for name in UNQUANTIZED if name not in named)])
    return quantization_config
