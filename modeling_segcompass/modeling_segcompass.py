"""SegCompass: an MLLM's reasoning becomes sparse concepts, concepts become heatmaps, heatmaps become masks (Figure 2).

Read `SegCompassModel.decode_masks` with the paper in hand: e_k, E_sae, C, r_k, Q, K, S, (H_k, c_k), F_dec, in order.
One MLLM pass gives the logits, the concentration tokens' states and the SAE's input; `segment` reads the same states
out of generation itself, so nothing is run twice. With `concept_reading="grounded"` the concepts' own places are the
heatmaps (`grounded_reading.py`): only then does another path than the paper's lead to F_dec. Training losses beyond
the language loss live with the trainers.
"""

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForImageTextToText, GenerationMixin, PreTrainedModel
from transformers import initialization as init
from transformers.models.sam.modeling_sam import SamPositionalEmbedding

from .backbone import backbone_of
from .checkpoints import build_from_backbones, load_whole, put_sae, save_whole
from .concept_labels import read_labels
from .configuration_segcompass import SegCompassConfig
from .explanation import Explanation, check_request, explain_slot
from .finite import refuse_non_finite
from .generation_options import OUR_INPUTS, check_generation, one_generation_at_a_time, option
from .grounded_decoding import decode_grounded, lost_without
from .grounded_reading import GroundedReading
from .image_encoder import check_keys, encoder_of
from .interventions import QUERY_SOURCES, kept_sources, scale_vector, steer, without_heaviest
from .mask_decoder import MaskDecoder
from .modeling_sparse_autoencoder import SparseAutoencoder
from .old_names import read_old_shapes
from .outputs import SegCompassOutput
from .patch_boxes import boxes_of_tokens, has_area
from .query_codebook import Concepts, QueryCodebook
from .roomy_cache import roomy_cache
from .sa2va import predict_forward
from .shared_prompts import SharedPrompts, number_alike
from .slot_mapper import SlotMapper
from .states import ReasoningStates, StateRecorder, open_recorder
from .token_layout import (
    IMAGE,
    concept_token_mask,
    distance_to_slots,
    find_slots,
    last_labels,
    token_position_features,
    token_types,
)


class SegCompassModel(PreTrainedModel, GenerationMixin):
    """The MLLM policy π_θ, the image encoder F_enc, the SAE and the segmentation modules between them.

    Each call keeps its own states (`states.py`), so that calls from several threads at once do not mix; families whose
    MLLM notes something on itself while it generates (Qwen2.5-VL) generate for one thread at a time.

    Args:
        config: SegCompassConfig.
        mllm: the MLLM with its weights; None builds one from the config.
        image_encoder: the image encoder with its weights; None builds one from the config.
        sae: the sparse autoencoder with its weights; None builds one from the config.

    Example:
        model = SegCompassModel.from_pretrained(path).eval()
        outputs = model.segment(**processor(images=image, text="the mug nearest the sink"))
        explanation = model.explain(outputs, slot=0, processor=processor)
    """

    config_class = SegCompassConfig
    base_model_prefix = ""
    main_input_name = "input_ids"
    input_modalities = ("image", "text")  # type: ignore[assignment]
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_flash_attn = True
    _tied_weights_keys: Any = {}  # none but the MLLM's own, which PEFT then looks for in it

    def __init__(
        self,
        config: SegCompassConfig,
        mllm: PreTrainedModel | None = None,
        image_encoder: PreTrainedModel | None = None,
        sae: SparseAutoencoder | None = None,
    ):
        super().__init__(config)
        self.backbone = backbone_of(config)
        self.mllm: Any = AutoModelForImageTextToText.from_config(config.mllm_config) if mllm is None else mllm
        self.image_encoder: Any = (
            encoder_of(config).build(config.image_encoder_config) if image_encoder is None else image_encoder
        )
        self.sae = SparseAutoencoder(config.sae_config) if sae is None else sae
        self.grounded = config.concept_reading == "grounded"
        if self.grounded:
            self.grounded_reading = GroundedReading(config)
        else:
            self.query_codebook = QueryCodebook(config)
            self.slot_mapper = SlotMapper(config)
        self.image_positions = SamPositionalEmbedding(
            SimpleNamespace(scale=1.0, num_pos_feats=config.key_channels // 2)
        )
        self.mask_decoder = MaskDecoder(config)
        self.post_init()
        # What sharding wraps: post_init gathers classes that this model may not have, which accelerate refuses.
        units = {*(self._no_split_modules or ()), type(self.backbone.blocks(self.mllm)[0]).__name__}
        self._no_split_modules = sorted(units & {type(module).__name__ for module in self.modules()})
        self._can_compile_fullgraph = self.mllm._can_compile_fullgraph  # `generate`, with a static cache, is the MLLM's
        self._concept_labels: dict[int, str] | None = None
        self.freeze_encoders()

    @property
    def generation_config(self) -> Any:
        """The MLLM's: the one object that `generate` uses."""
        mllm = self._modules.get("mllm")
        return self.__dict__.get("_own_generation_config") if mllm is None else mllm.generation_config

    @generation_config.setter
    def generation_config(self, config: Any) -> None:
        mllm = self._modules.get("mllm")
        if mllm is None:  # transformers sets one before there is an MLLM
            self.__dict__["_own_generation_config"] = config
        else:
            mllm.generation_config = config

    @property
    def vocab_size(self) -> int:
        """The rows of the MLLM's vocabulary."""
        return self.config.get_text_config().vocab_size

    def __getstate__(self) -> dict[str, Any]:
        # transformers hooks the MLLM's modules with local functions, which cannot be pickled; it does so anew at the
        # next pass.
        for module in self.modules():
            for key, hook in list(module._forward_hooks.items()):
                if getattr(hook, "__module__", None) == "transformers.utils.output_capturing":
                    del module._forward_hooks[key]
            module.__dict__.pop("_output_capturing_hooks_installed", None)
        return self.__dict__

    def freeze_encoders(self) -> None:
        """The SAE, the image encoder and the positional code never learn (appendix A.1)."""
        for module in (self.sae, self.image_encoder, self.image_positions):
            module.requires_grad_(False)

    @torch.no_grad()
    def _init_weights(self, module):
        if isinstance(module, (nn.Linear, nn.Conv2d, nn.ConvTranspose2d)):
            # Not N(0, 0.02): through the slot mapper's many layers that leaves nothing of the signal at small widths.
            init.xavier_uniform_(module.weight)
            if module.bias is not None:
                init.zeros_(module.bias)
            return
        super()._init_weights(module)
        std = self.config.initializer_range
        if isinstance(module, QueryCodebook):
            init.normal_(module.codebook, std=std)
            init.normal_(module.slot_queries, std=std)
        elif isinstance(module, SlotMapper):
            init.constant_(module.map_bias, -1.8)  # heatmaps start near "nothing here"
        elif isinstance(module, GroundedReading):
            module.init_weights()
        elif isinstance(module, MaskDecoder):
            init.normal_(module.mask_token, std=std)
        elif isinstance(module, SamPositionalEmbedding):
            init.normal_(module.positional_embedding, std=1.0)

    # -- the paper's path --------------------------------------------------------------------------------------------

    def reading_states(self) -> StateRecorder:
        """A recorder, to be opened with `with`, of the states that the MLLM's passes in this thread leave.

        `generate` leaves in its `states` what `decode_masks` takes, but for the image.
        """
        block = self.backbone.blocks(self.mllm)[self.config.sae_config.layer - 1]
        return StateRecorder(self.mllm, block, self.backbone.language_model(self.mllm))

    def get_image_embeddings(self, encoder_pixel_values: torch.Tensor) -> torch.Tensor:
        """K = F_enc(x_img), to be shared by many questions: float (B, 3, S, S) -> (B, d_k, h, w)."""
        return check_keys(self.config, encoder_of(self.config).encode(self.image_encoder, encoder_pixel_values))

    def _image_keys(self, encoder_pixel_values, image_embeddings):
        """K of each sample; an image that several of them show is encoded once."""
        if image_embeddings is not None:
            return image_embeddings
        alike = number_alike([[pixels] for pixels in encoder_pixel_values])
        shown = sorted(set(alike))
        if len(shown) == len(alike):
            return self.get_image_embeddings(encoder_pixel_values)
        return self.get_image_embeddings(encoder_pixel_values[shown])[[shown.index(number) for number in alike]]

    def concept_token_mask(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        """The tokens that may fire concepts, no padding and no special tokens: bool (B, T)."""
        return concept_token_mask(input_ids, attention_mask, self.config.special_token_ids)

    def decode_masks(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        response_mask: torch.Tensor,
        z: torch.Tensor,
        last_hidden: torch.Tensor,
        image_embeddings: torch.Tensor,
        reshaped_input_sizes: torch.Tensor | None = None,
        patch_boxes: torch.Tensor | None = None,
        concept_scale: Mapping[int | str, float] | torch.Tensor | None = None,
        query_source: str = "both",
        concept_add: Mapping[int | str, float] | None = None,
        concept_replace: Mapping[int | str, int | str] | None = None,
    ) -> SegCompassOutput:
        """From hidden states to masks: Eq. 2 to 5.

        Args:
            input_ids: long (B, T), prompt and response.
            attention_mask: (B, T), 0 at padding.
            response_mask: bool (B, T), True at response tokens.
            z: float (B, T, d_π), hidden states at the SAE's layer.
            last_hidden: float (B, T, d_π), the last hidden states.
            image_embeddings: float (B, d_k, h, w) or (1, d_k, h, w) when all questions share one image.
            reshaped_input_sizes: long (B, 2), the image's (H, W) inside F_enc's frame; None = the whole frame.
            patch_boxes: float (B, P, 4), which part of the image each image token shows (`patch_boxes.py`); None = one
                square grid, as of LLaVA-1.5.
            concept_scale: {feature index or label: factor on h_j}, or all factors, float (B, d_sae) or (d_sae,): 0
                ablates a concept, other factors steer by it. Labels are those of `concept_labels`. In the grounded
                read-out the factor is on the concept's contribution, and no other concept takes its place.
            query_source: "both", or "tokens" / "concepts" to build the queries from e_k or r_k alone; the grounded
                read-out never reads e_k.
            concept_add: {feature index or label: weight that every slot gives it on top}; grounded only.
            concept_replace: {feature index or label: the one that takes over its weight}; grounded only.

        Returns:
            SegCompassOutput: masks, heatmaps, confidences, and the concepts behind them.

        Raises:
            ValueError: an unknown query source, factors that are no factors or have no concepts to scale, an unknown
                label, what only the other `concept_reading` can do; NaN or infinity in states or masks.
        """
        if query_source not in QUERY_SOURCES:
            raise ValueError(f"query_source is {query_source!r}; choose one of {QUERY_SOURCES}.")
        if query_source == "tokens" and (isinstance(concept_scale, torch.Tensor) or concept_scale):
            raise ValueError(
                "concept_scale is given with query_source='tokens', whose masks are made without concepts; use 'both' "
                "or 'concepts', or leave concept_scale out."
            )
        refuse_non_finite({"z": z, "last_hidden": last_hidden}, self, attention_mask)
        refuse_non_finite({"image_embeddings": image_embeddings}, self)
        if self.grounded:
            if query_source == "tokens":
                raise ValueError(
                    "query_source is 'tokens', but this model's read-out is grounded and reads no concentration "
                    "token's state; use 'both' or 'concepts'."
                )
            return decode_grounded(
                self,
                ReasoningStates(
                    input_ids,
                    attention_mask,
                    response_mask,
                    z,
                    last_hidden,
                    image_embeddings,
                    reshaped_input_sizes,
                    patch_boxes,
                ),
                concept_scale,
                concept_add,
                concept_replace,
            )
        if concept_add or concept_replace:
            raise ValueError(
                f"concept_add and concept_replace need concept_reading='grounded', this model has "
                f"{self.config.concept_reading!r}; use concept_scale."
            )
        batch = len(input_ids)
        positions, slot_mask = find_slots(input_ids, response_mask, self.config)  # (B, K_s)

        # e_k: the concentration tokens' embeddings, in the segmentation modules' dtype (the MLLM's may be lower)
        rows = torch.arange(batch, device=input_ids.device)[:, None]
        e = last_hidden[rows, positions].masked_fill(~slot_mask[..., None], 0)  # (B, K_s, d_π)
        e = e.to(self.query_codebook.codebook.dtype)

        # E_sae, C, r_k: concepts of image, instruction and reasoning
        types = None
        if query_source == "tokens":
            patch_boxes = None
            concepts = Concepts(e.new_zeros(*e.shape[:2], self.config.d_c))
        else:
            types = token_types(input_ids, response_mask, self.config.image_token_id)  # (B, T)
            if patch_boxes is None:
                patch_boxes = self.boxes_without_processor({"input_ids": input_ids}, reshaped_input_sizes)
            boxes = boxes_of_tokens(patch_boxes, types == IMAGE)  # (B, T, 4)
            image_xy, _, _ = self.config.frame.place_boxes(boxes, reshaped_input_sizes)  # as the image keys have theirs
            distance = distance_to_slots(attention_mask, positions, slot_mask).to(image_xy.dtype)  # (B, T)
            concepts = self.query_codebook(
                self.sae,
                z,
                self.concept_token_mask(input_ids, attention_mask),
                token_position_features(types, image_xy, distance, has_area(boxes)),
                scale_vector(concept_scale, z, self.config.sae_config.d_sae, self.labels_for(concept_scale)),
            )

        # Q, K, S, (H_k, c_k)
        keys = image_embeddings.to(e.dtype).expand(batch, -1, -1, -1)  # (B, d_k, h, w)
        key_positions = self.key_positions(keys.shape[-2:]).to(e.dtype)  # (1, d_k, h, w)
        cell_mask = self.cell_mask(keys, reshaped_input_sizes)  # (B, h, w)
        dropout = self.config.token_dropout if self.training and torch.is_grad_enabled() else 0.0
        keep_tokens, keep_concepts = kept_sources(query_source, e, dropout)
        heatmaps, confidences = self.slot_mapper(  # (B, K_s, h, w), (B, K_s)
            e, concepts.representations, keys + key_positions, cell_mask, keep_tokens, keep_concepts
        )

        # M̂ = F_dec(K, (H_k, c_k))
        masks = self.mask_decoder(keys, key_positions, heatmaps, confidences, cell_mask)  # (B, K_s, 4h, 4w)
        made = {"concept_values": concepts.values, "heatmaps": heatmaps, "pred_logits": confidences}
        refuse_non_finite({**made, "pred_masks": masks}, self)
        return SegCompassOutput(
            pred_masks=masks,
            pred_logits=confidences,
            heatmaps=heatmaps,
            slot_mask=slot_mask,
            concept_indices=concepts.indices,
            concept_values=concepts.values,
            concept_weights=concepts.weights,
            concept_activations=concepts.activations,
            token_types=types,
            patch_boxes=patch_boxes,
            sequences=input_ids,
            reshaped_input_sizes=reshaped_input_sizes,
        )

    def boxes_without_processor(
        self, inputs: Mapping[str, Any], reshaped_input_sizes: torch.Tensor | None, rows: list[int] | None = None
    ) -> torch.Tensor:
        """The `patch_boxes` of inputs that lack the processor's, where an image's tokens are one grid.

        Args:
            inputs: of the MLLM, `input_ids` among them.
            reshaped_input_sizes: long (B, 2), the image's (H, W) inside F_enc's frame; None = the whole frame.
            rows: of these samples only; the sizes then belong to these.

        Returns:
            float (B, P, 4).

        Raises:
            ValueError: of this family only the processor can say it.
        """
        seen = self.backbone.seen_boxes(self.config.mllm_config, inputs["input_ids"], inputs)
        seen = seen if rows is None else seen[rows]
        frame, corners = self.config.frame, seen.unflatten(2, (2, 2)).flatten(1, 2)  # (B, 2 P, 2)
        placed, _, _ = frame.place_patches(corners, reshaped_input_sizes, self.config.image_view)
        _, image, _ = frame.place_patches(corners, reshaped_input_sizes, "whole")
        boxes = (placed / image).unflatten(1, (-1, 2)).flatten(2)  # (B, P, 4)
        return boxes * has_area(seen)[..., None]

    @property
    def concept_labels(self) -> dict[int, str]:
        """{feature index: label} of the dictionary saved beside the model, {} without one. Can be set."""
        if self._concept_labels is None:
            folder, revision = self.config._name_or_path, getattr(self.config, "_commit_hash", None)
            d_sae = self.config.sae_config.d_sae
            self._concept_labels = read_labels(folder, d_sae, revision) if folder else {}
        return self._concept_labels

    @concept_labels.setter
    def concept_labels(self, labels: Mapping[int, str]) -> None:
        self._concept_labels = dict(labels)

    def labels_for(self, *asked: Any) -> dict[int, str] | None:
        """The labels, if any of the mappings `asked` names a concept by its label; read from disk only then."""
        named = [name for given in asked if isinstance(given, Mapping) for name in given]
        named += [name for given in asked if isinstance(given, Mapping) for name in given.values()]
        return self.concept_labels if any(isinstance(name, str) for name in named) else None

    def key_positions(self, grid: Sequence[int]) -> torch.Tensor:
        """The positional code of image keys on a grid of (h, w) cells, float (1, d_k, h, w)."""
        y, x = (torch.arange(side, device=self.image_positions.positional_embedding.device) for side in grid)
        y, x = torch.meshgrid((y + 0.5) / grid[0], (x + 0.5) / grid[1], indexing="ij")
        return self.image_positions(torch.stack([x, y], -1)).permute(2, 0, 1)[None]

    def cell_mask(self, keys: torch.Tensor, reshaped_input_sizes: torch.Tensor | None) -> torch.Tensor:
        """The cells of the keys' grid (keys: (B, d_k, h, w)) that show some of the image, bool (B, h, w)."""
        if reshaped_input_sizes is None:
            return torch.ones(len(keys), *keys.shape[-2:], dtype=torch.bool, device=keys.device)
        return self.config.frame.cell_mask(reshaped_input_sizes.to(keys.device), keys.shape[-1])

    # -- the transformers face ---------------------------------------------------------------------------------------

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        pixel_values: torch.Tensor | None = None,
        encoder_pixel_values: torch.Tensor | None = None,
        image_embeddings: torch.Tensor | None = None,
        original_sizes: torch.Tensor | None = None,
        reshaped_input_sizes: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        response_mask: torch.Tensor | None = None,
        mask_rows: list[int] | None = None,
        concept_scale: Mapping[int | str, float] | torch.Tensor | None = None,
        query_source: str = "both",
        concept_add: Mapping[int | str, float] | None = None,
        concept_replace: Mapping[int | str, int | str] | None = None,
        num_erased_concepts: int = 0,
        fused_lm_head: bool = False,
        skip_lm_head: bool = False,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        position_ids: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        past_key_values: Any = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        output_attentions: bool | None = None,
        image_grid_thw: torch.Tensor | None = None,
        mm_token_type_ids: torch.Tensor | None = None,
        patch_boxes: torch.Tensor | None = None,
        **mllm_inputs: Any,
    ) -> SegCompassOutput | tuple:
        """One MLLM pass over prompt and response: language loss or log-probabilities, and masks.

        Args:
            input_ids: long (B, T).
            attention_mask: long (B, T), 0 at padding; None = no padding.
            pixel_values: the MLLM's image, as its image processor makes it.
            encoder_pixel_values: float (B, 3, S, S), the image encoder's; without it and `image_embeddings` only the
                language part runs.
            image_embeddings: float (B, d_k, h, w) from `get_image_embeddings`, instead of `encoder_pixel_values`.
            original_sizes: accepted and ignored, so that a processor's output can be passed whole.
            reshaped_input_sizes: long (B, 2), the image's (H, W) inside F_enc's frame.
            labels: long (B, T), -100 outside the response.
            response_mask: bool (B, T), response positions; taken from labels when absent.
            mask_rows: decode masks of these samples only; image_embeddings, reshaped_input_sizes and patch_boxes then
                belong to these.
            concept_scale: see `decode_masks`.
            query_source: see `decode_masks`.
            concept_add: see `decode_masks`.
            concept_replace: see `decode_masks`.
            num_erased_concepts: decode a second time without this many of the heaviest concepts of each confident
                slot (of the most confident one, when none is); the result is `erased`. Training uses it to make
                concepts necessary.
            fused_lm_head: the MLLM carries TRL's fused head: return log_probs and entropy instead of logits.
            skip_lm_head: leave out the LM head; no logits, no language loss.
            output_hidden_states: also return the MLLM's hidden states; None = as the configuration says.
            return_dict: False returns a tuple; None = as the configuration says.
            position_ids: as the MLLM's.
            inputs_embeds: float (B, T, d_π) instead of input_ids, for the language part only.
            past_key_values: a key-value cache of earlier tokens, for the language part only.
            use_cache: also return the key-value cache.
            logits_to_keep: logits of the last so many tokens only, 0 = of all. With labels a number, and all labels are
                of tokens that these logits predict: the loss is the same, without the head over the prompt.
            output_attentions: also return the attention weights, under eager attention; None = as the configuration
                says.
            image_grid_thw: long (B, 3), of families such as Qwen2.5-VL.
            mm_token_type_ids: long (B, T), of families such as Qwen2.5-VL.
            patch_boxes: float (B, P, 4), see `decode_masks`; the processor makes them.
            **mllm_inputs: what else the MLLM takes.

        Returns:
            SegCompassOutput: what was asked for; the rest is None.

        Raises:
            ValueError: masks are asked for without labels or response_mask, or of a part of the tokens; bad
                intervention or query source; an input that this MLLM does not take; NaN or infinity.
        """
        wants_masks = encoder_pixel_values is not None or image_embeddings is not None
        if response_mask is None and labels is not None:
            response_mask = labels != -100
        if wants_masks and response_mask is None:
            raise ValueError(
                "masks need to know where the response is: pass labels or response_mask (the processor makes both "
                "when given response=...), or call model.segment(...) to let the model write the response."
            )
        if wants_masks and (input_ids is None or past_key_values is not None):
            wrong = "input_ids is None" if input_ids is None else "past_key_values is given"
            raise ValueError(
                f"{wrong}; masks need prompt and response in one pass: pass the processor's input_ids, whole, or leave "
                "encoder_pixel_values and image_embeddings out."
            )
        per_token = {"attention_mask": attention_mask, "labels": labels, "response_mask": response_mask}
        tokens = None if input_ids is None or past_key_values is not None else tuple(input_ids.shape)
        for name, value in per_token.items():
            if tokens is not None and value is not None and value.dim() == 2 and value.shape != tokens:
                raise ValueError(
                    f"{name} has shape {tuple(value.shape)}, input_ids {tokens}; give one value per token."
                )
        keeps_some = isinstance(logits_to_keep, torch.Tensor) or logits_to_keep != 0
        if keeps_some and labels is not None:
            labels = last_labels(labels, None if fused_lm_head else logits_to_keep)
        if attention_mask is None and input_ids is not None and past_key_values is None:
            attention_mask = torch.ones_like(input_ids)
        inputs = dict(
            input_ids=input_ids,
            attention_mask=attention_mask,
            pixel_values=pixel_values,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            past_key_values=past_key_values,
            use_cache=use_cache,
            logits_to_keep=logits_to_keep if keeps_some else None,
            output_attentions=self.config.output_attentions or None if output_attentions is None else output_attentions,
            image_grid_thw=image_grid_thw,
            mm_token_type_ids=mm_token_type_ids,
            **mllm_inputs,
        )
        inputs = {name: value for name, value in inputs.items() if value is not None}
        self.backbone.check_inputs(self.mllm, inputs)
        self.backbone.mark_response(inputs, response_mask)
        self._check_given(input_ids, pixel_values, encoder_pixel_values, inputs_embeds)
        if output_hidden_states is None and self.config.output_hidden_states:
            output_hidden_states = True
        with self.reading_states() as recorder:
            if skip_lm_head:
                inputs["use_cache"] = False
                inputs.pop("logits_to_keep", None)
                inputs["output_hidden_states"] = output_hidden_states
                policy = self.backbone.without_head(self.mllm)(**inputs)
            elif fused_lm_head:
                policy = self.mllm(**inputs, labels=labels, fused_lm_head=True)
            else:
                policy = self.mllm(**inputs, labels=labels, output_hidden_states=output_hidden_states)
        output = SegCompassOutput()
        if wants_masks:
            states = recorder.states_of_pass(input_ids, attention_mask, response_mask)
            if patch_boxes is None and query_source != "tokens":
                patch_boxes = self.boxes_without_processor(inputs, reshaped_input_sizes, mask_rows)
            states = (states if mask_rows is None else states.rows(mask_rows))._replace(
                patch_boxes=patch_boxes,
                image_embeddings=self._image_keys(encoder_pixel_values, image_embeddings),
                reshaped_input_sizes=reshaped_input_sizes,
            )
            asked = {"query_source": query_source, **states._asdict()}
            output = self.decode_masks(
                **asked, concept_scale=concept_scale, concept_add=concept_add, concept_replace=concept_replace
            )
            if num_erased_concepts:
                d_sae = self.config.sae_config.d_sae
                scale, output.erased_slots = without_heaviest(output, num_erased_concepts, d_sae)
                output.erased = self.decode_masks(**asked, concept_scale=scale)
        copied = (
            "loss",
            "logits",
            "past_key_values",
            "log_probs",
            "entropy",
            "aux_loss",
            "hidden_states",
            "attentions",
        )
        for name in copied:
            if getattr(policy, name, None) is not None:
                output[name] = getattr(policy, name)
        if output.loss is not None:
            output.loss_dict = {"language": output.loss.detach()}
        return output if (self.config.return_dict if return_dict is None else return_dict) else output.to_tuple()

    def _check_given(self, input_ids, pixel_values, encoder_pixel_values, inputs_embeds=None):
        """Refuse NaN and infinity in the inputs, by sample."""
        if isinstance(pixel_values, torch.Tensor) and input_ids is not None and len(pixel_values) > len(input_ids):
            counts = (input_ids == self.config.image_token_id).sum(1)
            images = self.backbone.split_rows(pixel_values, counts)  # patches or tiles of all images together
            if images is not None:
                pixel_values = torch.stack([image.abs().amax() for image in images])  # (B,), finite where an image is
        given = {"pixel_values": pixel_values, "encoder_pixel_values": encoder_pixel_values}
        refuse_non_finite({**given, "inputs_embeds": inputs_embeds})

    def generate(self, inputs: torch.Tensor | None = None, **kwargs: Any) -> Any:  # type: ignore[override]
        """Write the response with the MLLM: ids long (B, T), like any transformers model.

        Args:
            inputs: long (B, T), another name for input_ids.
            **kwargs: anything the processor returns, and transformers' options.

        Returns:
            What the MLLM's `generate` returns.

        Raises:
            ValueError: what cannot be right, see `generation_options.check_generation`.
        """
        boxes, sizes = kwargs.get("patch_boxes"), kwargs.get("reshaped_input_sizes")
        kwargs = {name: value for name, value in kwargs.items() if name not in OUR_INPUTS}
        if inputs is not None:
            kwargs["input_ids"] = inputs
        recorder = open_recorder(self.mllm)
        check_generation(kwargs, self.mllm, for_masks=recorder is not None)
        with one_generation_at_a_time(self.mllm) if self.backbone.notes_on_model else nullcontext():
            if recorder is not None:
                recorder.start_generation(whole_passes=option("use_cache", kwargs, self.mllm) is False)
                called = dict(kwargs)
                if option("cache_implementation", kwargs, self.mllm) is not None:
                    called["disable_compile"] = True  # a compiled pass would not call the recorder
                elif not recorder.whole_passes:
                    called |= roomy_cache(self.mllm)
                with SharedPrompts(self.mllm, self.backbone, recorder, called) as shared:
                    output = self.mllm.generate(**shared.keywords)
            else:
                output = self.mllm.generate(**kwargs)
        if recorder is not None:
            sequences = getattr(output, "sequences", output)
            ends = (option(name, kwargs, self.mllm) for name in ("eos_token_id", "pad_token_id"))
            prompt, mask = kwargs["input_ids"], kwargs.get("attention_mask")
            if (sequences[:, -1] == self.config.ref_token_id).any():
                self._read_whole(recorder, sequences, kwargs)
            states = recorder.states_of_generation(sequences, prompt, mask, *ends)
            if boxes is None and self.backbone.one_grid:  # in other families whoever decodes must have them
                boxes = self.boxes_without_processor({**kwargs, "input_ids": states.input_ids}, sizes)
            recorder.states = states._replace(patch_boxes=boxes)
        return output

    @torch.no_grad()
    def _read_whole(self, recorder, sequences, inputs):
        """One pass over sequences that end in a concentration token, which no pass of their generation has read."""
        recorder.start_generation(whole_passes=True)
        inputs = self.backbone.mllm_inputs(self.mllm, inputs)
        written = sequences.shape[1] - inputs["input_ids"].shape[1]
        mask = inputs.get("attention_mask")
        if mask is not None:
            inputs["attention_mask"] = torch.cat([mask, mask.new_ones(len(mask), written)], 1)
        self.backbone.append_text(inputs, written)
        of_generation = ("use_cache", "output_attentions", "output_hidden_states", "return_dict", "logits_to_keep")
        inputs = {name: value for name, value in inputs.items() if name not in of_generation}
        self.backbone.without_head(self.mllm)(**{**inputs, "input_ids": sequences}, use_cache=False)

    def segment(
        self,
        input_ids: torch.Tensor,
        concept_scale: Mapping[int | str, float] | torch.Tensor | None = None,
        query_source: str = "both",
        concept_add: Mapping[int | str, float] | None = None,
        concept_replace: Mapping[int | str, int | str] | None = None,
        steer_reasoning: bool = False,
        **inputs: Any,
    ) -> SegCompassOutput:
        """Reason about the image, then decode masks from the states that generation left behind.

        Args:
            input_ids: long (B, T), the prompts.
            concept_scale: see `decode_masks`.
            query_source: see `decode_masks`.
            concept_add: see `decode_masks`.
            concept_replace: see `decode_masks`.
            steer_reasoning: let factors, additions and replacements act while the response is written too, see
                `reason`; False leaves the response as it is.
            **inputs: the processor's other outputs and options, see `reason`.

        Returns:
            SegCompassOutput: with `sequences` (B, T) and `prompt_length`. A response without concentration tokens has
            an empty `slot_mask` and so no mask.

        Raises:
            ValueError: neither encoder_pixel_values nor image_embeddings; inputs that hold a response; an option of
                `generate` that masks cannot follow (docs/generation.md); NaN or infinity.
        """
        told: dict[str, Any] = dict(
            concept_scale=concept_scale, concept_add=concept_add, concept_replace=concept_replace
        )
        sequences, states = self.reason(input_ids, **inputs, **(told if steer_reasoning else {}))
        with torch.no_grad():
            output = self.decode_masks(**states._asdict(), **told, query_source=query_source)
        output.sequences = sequences
        output.prompt_length = input_ids.shape[1]
        return output

    @torch.no_grad()
    def reason(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        encoder_pixel_values: torch.Tensor | None = None,
        image_embeddings: torch.Tensor | None = None,
        original_sizes: torch.Tensor | None = None,
        reshaped_input_sizes: torch.Tensor | None = None,
        do_sample: bool | None = None,
        concept_scale: Mapping[int | str, float] | torch.Tensor | None = None,
        concept_add: Mapping[int | str, float] | None = None,
        concept_replace: Mapping[int | str, int | str] | None = None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, ReasoningStates]:
        """Write the response and keep what masks are decoded from, so that they can be decoded again and again.

        With factors, additions or replacements the MLLM reads image, instruction and its own words as if concepts
        fired otherwise: after the SAE's layer every hidden state gets the difference in decoder directions
        (`Steering.on_states`). The states that are kept are those before that change.

        Args:
            input_ids: long (B, T), the prompts.
            attention_mask: long (B, T), 0 at padding; None = no padding.
            encoder_pixel_values: float (B, 3, S, S), the image encoder's input.
            image_embeddings: float (B, d_k, h, w) from `get_image_embeddings`, instead of `encoder_pixel_values`.
            original_sizes: accepted and ignored, so that a processor's output can be passed whole.
            reshaped_input_sizes: long (B, 2), the image's (H, W) inside F_enc's frame; None = the whole frame.
            do_sample: None = as a `generation_config` argument says, and greedy without one.
            concept_scale: {feature index or label: factor on h_j}, or all factors, float (B, d_sae) or (d_sae,).
            concept_add: {feature index or label: what is added to h_j, in its mean active activations}.
            concept_replace: {feature index or label: the one that takes over its strength}.
            **kwargs: the MLLM's other inputs and options of `generate` (`max_new_tokens`, `streamer`, ...).

        Returns:
            tuple: sequences, long (B, T), and the ReasoningStates, for `decode_masks(**states._asdict())`.

        Raises:
            ValueError: neither encoder_pixel_values nor image_embeddings; inputs that hold a response; an option of
                `generate` that masks cannot follow (docs/generation.md); NaN or infinity.
        """
        if encoder_pixel_values is None and image_embeddings is None:
            raise ValueError("segment needs the image: pass encoder_pixel_values or image_embeddings.")
        if any(kwargs.pop(name, None) is not None for name in ("labels", "response_mask")):
            raise ValueError(
                "the inputs hold a response (labels, response_mask), and segment writes its own; call the processor "
                "without response=, or model(**inputs) for the masks of this response."
            )
        self._check_given(input_ids, kwargs.get("pixel_values"), encoder_pixel_values)
        given = kwargs.get("generation_config")
        if do_sample is None and getattr(given, "do_sample", None) is None:
            do_sample = False
        if do_sample is not None:
            kwargs["do_sample"] = do_sample
        lengths = ("max_new_tokens", "max_length")
        kwargs = {name: value for name, value in kwargs.items() if value is not None or name not in lengths}
        asked = [kwargs.get(name, getattr(given, name, None)) for name in lengths]
        if asked == [None, None] and self.generation_config.max_new_tokens is None:
            kwargs["max_new_tokens"] = self.config.max_response_length
        labels = self.labels_for(concept_scale, concept_add, concept_replace)
        like, d_sae = self.sae.W_enc.new_empty(len(input_ids), 0), self.config.sae_config.d_sae
        steering = steer(concept_scale, concept_add, concept_replace, like, d_sae, labels)
        with self.reading_states() as recorder:
            if steering is not None:
                recorder.steer = partial(steering.on_states, self.sae)
            output = self.generate(
                input_ids=input_ids, attention_mask=attention_mask, reshaped_input_sizes=reshaped_input_sizes, **kwargs
            )
        keys = self._image_keys(encoder_pixel_values, image_embeddings)
        states = recorder.states._replace(image_embeddings=keys, reshaped_input_sizes=reshaped_input_sizes)
        return getattr(output, "sequences", output), states

    def explain(
        self,
        outputs: SegCompassOutput,
        slot: int = 0,
        sample: int = 0,
        top: int = 10,
        labels: Mapping[int, str] | None = None,
        processor: Any = None,
        image_embeddings: torch.Tensor | None = None,
    ) -> Explanation:
        """Say which concepts made a slot's mask, and from which words and patches: see `explanation.explain_slot`.

        Args:
            outputs: SegCompassOutput whose queries were built from concepts.
            slot: k, from 0.
            sample: its place in the batch.
            top: how many concepts to list.
            labels: {feature index: label}; None takes `concept_labels`, if the read-out is grounded.
            processor: SegCompassProcessor, for the words' text.
            image_embeddings: float (B, d_k, h, w) or (1, d_k, h, w) that the masks were decoded with; says also what
                the mask loses without each concept, by one decoding per concept. Grounded read-outs only.

        Returns:
            Explanation.

        Raises:
            ValueError: what cannot be explained, see `explain_slot`; image_embeddings with another read-out.
        """
        if labels is None and self.grounded:
            labels = self.concept_labels
        side, padding = self.config.frame.side, self.generation_config.pad_token_id
        window = self.config.phrase_window
        lost = None
        if image_embeddings is not None:
            check_request(outputs, slot, sample, top)
            lost = self.lost_without(outputs, slot, sample, image_embeddings)
        return explain_slot(outputs, slot, sample, top, labels, processor, side, lost, padding, window)

    lost_without = lost_without
    predict_forward = predict_forward

    def get_input_embeddings(self) -> nn.Module:
        """The MLLM's token embeddings."""
        return self.mllm.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replace the MLLM's token embeddings."""
        self.mllm.set_input_embeddings(value)

    def get_output_embeddings(self) -> nn.Module:
        """The MLLM's LM head."""
        return self.mllm.get_output_embeddings()

    def set_output_embeddings(self, value: nn.Module) -> None:
        """Replace the MLLM's LM head."""
        self.mllm.set_output_embeddings(value)

    def resize_token_embeddings(self, *args: Any, **kwargs: Any) -> nn.Module:  # type: ignore[override]
        """As transformers', on the MLLM."""
        return self.mllm.resize_token_embeddings(*args, **kwargs)

    # -- building, saving, loading: checkpoints.py -------------------------------------------------------------------

    @classmethod
    def from_backbones(
        cls,
        mllm: str | PreTrainedModel,
        image_encoder: str | PreTrainedModel | None = None,
        sae: str | SparseAutoencoder | None = None,
        processor: Any = None,
        dtype: str | torch.dtype = "float32",
        **config: Any,
    ) -> "SegCompassModel":
        """Build a fresh model from an MLLM, an image encoder and, if there is one, a trained SAE.

        Args:
            mllm: model id, folder or loaded model.
            image_encoder: model id, folder, original segment-anything `.pth` file or loaded model (docs/encoders.md
                lists the kinds). A whole SAM, SAM-HQ, SAM 2 or SAM 3 gives the mask decoder its start where shapes
                match; otherwise it starts from nothing. The log says which.
            sae: model id, folder or loaded SAE; without it an untrained one is made.
            processor: a SegCompassProcessor; its new tokens get embedding rows (the mean of the others), and its
                token ids enter the config.
            dtype: of the parts loaded here. Training needs float32 master weights, under autocast if it is to be fast;
                "auto" keeps each checkpoint's own.
            **config: fields of SegCompassConfig; `sae_config` shapes a new SAE. Names of earlier versions (`sam=`)
                are understood.

        Returns:
            SegCompassModel: in training mode, with untrained segmentation modules.

        Raises:
            ValueError: no or an unknown image encoder, or a processor that prepares images for another; an SAE of
                another width, layer or backbone; an MLLM that cannot serve. With a processor it is tried on a generated
                image (`family_check.py`), which takes as long as some ten questions.
        """
        return build_from_backbones(cls, mllm, image_encoder, sae, processor, dtype, config)

    def load_sae(self, sae: str | SparseAutoencoder) -> None:
        """Put a trained SAE in place of this model's.

        Args:
            sae: folder, Hub id or loaded SAE.

        Raises:
            ValueError: it has another width or layer than the model was built for, was trained on another backbone, or
                holds numbers that are not finite.
        """
        put_sae(self, sae)

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: Any, *args: Any, output_loading_info: bool = False, **kwargs: Any
    ) -> Any:
        """Load a saved model; unlike transformers' default, missing or unexpected weights are an error.

        A checkpoint whose config names `references` holds only its own weights: the parts it refers to are loaded from
        their repositories, at the revisions noted when it was saved.

        Args:
            pretrained_model_name_or_path: folder or Hub id, or None with `config` and `state_dict`.
            *args: as transformers'.
            output_loading_info: also return transformers' report on the weights.
            **kwargs: as transformers' (`dtype`, `device_map`, `revision`, ...); `quantization_config` quantises the
                MLLM only.

        Returns:
            SegCompassModel: in evaluation mode; with `output_loading_info` a tuple of it and the report.

        Raises:
            ValueError: the folder is not what was saved (see `manifest`), or another model's; it lacks weights of this
                model or holds others, or numbers that are not finite; `device_map` or
                `quantization_config` with a checkpoint that refers to its parts; a `device_map` that offloads the SAE
                or the grounded read-out.
        """
        read_old_shapes(cls)
        load = super().from_pretrained
        return load_whole(load, pretrained_model_name_or_path, args, output_loading_info, kwargs)

    def save_pretrained(self, save_directory: Any, *args: Any, references: Any = None, **kwargs: Any) -> None:
        """As transformers', with our own key names (resuming a Trainer needs them) and the code beside the weights.

        Args:
            save_directory: made if absent.
            *args: as transformers'.
            references: {"mllm" | "image_encoder" | "sae": {"repo_id", "revision"}}, parts to leave out of the weights
                because they are kept elsewhere, unchanged. Loading fetches them from there.
            **kwargs: as transformers', but for `push_to_hub` and `save_original_format`.

        Raises:
            ValueError: a reference to another part, or without a revision; `push_to_hub`, which would upload the folder
                before it is signed; `save_original_format`.
        """
        save_whole(self, super().save_pretrained, save_directory, args, references, kwargs)


SegCompassConfig.register_for_auto_class()
SegCompassModel.register_for_auto_class("AutoModel")
