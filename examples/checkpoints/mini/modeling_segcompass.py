"""SegCompass: an MLLM's reasoning becomes sparse concepts, concepts become heatmaps, heatmaps become masks (Figure 2).

Read `SegCompassModel.decode_masks` with the paper in hand: e_k, E_sae, C, r_k, Q, K, S, (H_k, c_k), F_dec, in order.
One MLLM pass gives the logits, the concentration tokens' states and the SAE's input; `segment` reads the same states
out of generation itself, so nothing is run twice. Training losses beyond the language loss live with the trainers.
"""

from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from types import SimpleNamespace

import torch
from torch import nn
from transformers import (
    AutoModelForImageTextToText,
    GenerationMixin,
    PreTrainedModel,
    SamVisionModel,
)
from transformers import initialization as init
from transformers.models.sam.modeling_sam import SamPositionalEmbedding
from transformers.quantizers import AutoQuantizationConfig
from transformers.utils import ModelOutput

from .configuration_segcompass import SegCompassConfig, SparseAutoencoderConfig
from .explanation import explain_slot
from .mask_decoder import MaskDecoder
from .modeling_sparse_autoencoder import SparseAutoencoder
from .old_names import OLD_WEIGHTS
from .pipeline_segcompass import CUSTOM_PIPELINES
from .query_codebook import IMAGE, INSTRUCTION, RESPONSE, Concepts, QueryCodebook, token_position_features
from .sam_weights import read_sam, start_mask_decoder
from .slot_mapper import SlotMapper

QUERY_SOURCES = ("both", "tokens", "concepts")
AUTO_MAP = {
    "AutoConfig": "configuration_segcompass.SegCompassConfig",
    "AutoModel": "modeling_segcompass.SegCompassModel",
    "AutoModelForImageTextToText": "modeling_segcompass.SegCompassModel",
    "AutoProcessor": "processing_segcompass.SegCompassProcessor",
}
PARTS = {"mllm": AutoModelForImageTextToText, "image_encoder": SamVisionModel, "sae": SparseAutoencoder}
HUB_KEYWORDS = ("cache_dir", "force_download", "local_files_only", "token")
# Only the MLLM is quantised: these are small, or their output is a mask's edge. The head is named as by default.
UNQUANTIZED = ("lm_head", "image_encoder", "sae", "query_codebook", "slot_mapper", "image_positions", "mask_decoder")


@dataclass
class SegCompassOutput(ModelOutput):
    """What a forward pass or `segment` returns. B samples, K = K_s slots, T tokens, M concepts, an h x w key grid."""

    loss: torch.Tensor | None = None
    """language loss, a scalar, when labels were given."""
    loss_dict: dict | None = None
    """the parts of `loss` by name, detached."""
    logits: torch.Tensor | None = None
    """float (B, T, vocabulary)."""
    past_key_values: object | None = None
    """the MLLM's key-value cache."""
    hidden_states: tuple | None = None
    """the MLLM's hidden states, when `output_hidden_states=True`."""
    pred_masks: torch.Tensor | None = None
    """float (B, K, 4h, 4w), mask logits on SAM's padded square frame."""
    pred_logits: torch.Tensor | None = None
    """float (B, K), confidence logits c_k."""
    heatmaps: torch.Tensor | None = None
    """float (B, K, h, w), heatmap logits H_k."""
    slot_mask: torch.Tensor | None = None
    """bool (B, K), True where the slot's concentration token was found in the response."""
    concept_indices: torch.Tensor | None = None
    """long (B, M), the SAE features that became concept tokens."""
    concept_values: torch.Tensor | None = None
    """float (B, M), their strengths h_j; 0 marks padding."""
    concept_weights: torch.Tensor | None = None
    """float (B, K, M), how much each concept weighs in each slot; a slot's weights sum to 1."""
    concept_activations: torch.Tensor | None = None
    """float (B, T, M), h_j at each token."""
    token_types: torch.Tensor | None = None
    """long (B, T), IMAGE, INSTRUCTION or RESPONSE of `query_codebook`; with concepts."""
    patch_grid: torch.Tensor | None = None
    """long (B, 2), (rows, columns) of the image tokens; with concepts."""
    sequences: torch.Tensor | None = None
    """long (B, T), prompt and response; `segment` adds the last token it wrote."""
    prompt_length: int | None = None
    """number of prompt tokens (padding included) in `sequences`."""
    reshaped_input_sizes: torch.Tensor | None = None
    """long (B, 2), (H, W) of the image inside SAM's frame."""
    erased: object | None = None
    """SegCompassOutput without the heaviest concepts, with `num_erased_concepts`."""
    erased_slots: torch.Tensor | None = None
    """bool (B, K), the slots whose heaviest concepts `erased` lacks."""
    log_probs: torch.Tensor | None = None
    """float (B, T - 1), log-probabilities of the labels, with `fused_lm_head=True`."""
    entropy: torch.Tensor | None = None
    """float (B, T - 1), with `fused_lm_head=True`."""
    aux_loss: torch.Tensor | None = None
    """kept for trainers that ask for a router loss; always None."""


class SegCompassModel(PreTrainedModel, GenerationMixin):
    """The MLLM policy π_θ, SAM's encoder F_enc, the SAE and the segmentation modules between them."""

    config_class = SegCompassConfig
    base_model_prefix = ""
    main_input_name = "input_ids"
    input_modalities = ("image", "text")
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_flash_attn = True

    def __init__(self, config, mllm=None, image_encoder=None, sae=None):
        super().__init__(config)
        self.mllm = AutoModelForImageTextToText.from_config(config.mllm_config) if mllm is None else mllm
        self.image_encoder = (
            SamVisionModel._from_config(config.image_encoder_config) if image_encoder is None else image_encoder
        )
        self.sae = SparseAutoencoder(config.sae_config) if sae is None else sae
        self.query_codebook = QueryCodebook(config)
        self.slot_mapper = SlotMapper(config)
        self.image_positions = SamPositionalEmbedding(
            SimpleNamespace(scale=1.0, num_pos_feats=config.image_encoder_config.output_channels // 2)
        )
        self.mask_decoder = MaskDecoder(config)
        self._states = None
        language_model = self.mllm.model.language_model
        language_model.layers[config.sae_config.layer - 1].register_forward_hook(self._keep_sae_input)
        language_model.register_forward_hook(self._keep_last_hidden)
        self.post_init()
        # What sharding wraps: post_init gathers classes that this model may not have, which accelerate refuses.
        units = {*(self._no_split_modules or ()), type(language_model.layers[0]).__name__}
        self._no_split_modules = sorted(units & {type(module).__name__ for module in self.modules()})
        self.generation_config = self.mllm.generation_config
        self.freeze_encoders()

    def freeze_encoders(self):
        """The SAE, SAM's encoder and the positional code never learn (appendix A.1)."""
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
        elif isinstance(module, MaskDecoder):
            init.normal_(module.mask_token, std=std)
        elif isinstance(module, SamPositionalEmbedding):
            init.normal_(module.positional_embedding, std=1.0)

    # -- reading the MLLM's states ----------------------------------------------------------------------------------

    def _keep_sae_input(self, module, inputs, output):
        if self._states is not None:
            self._states["z"].append(output[0] if isinstance(output, tuple) else output)

    def _keep_last_hidden(self, module, inputs, output):
        if self._states is not None:
            self._states["last"].append(output.last_hidden_state)

    @contextmanager
    def reading_states(self):
        """While open, every MLLM pass leaves its layer-L and last hidden states in the yielded dict's lists "z" and
        "last", and `generate` leaves under "written" what `decode_masks` takes, but for the image."""
        self._states = {"z": [], "last": []}
        try:
            yield self._states
        finally:
            self._states = None

    # -- the paper's path --------------------------------------------------------------------------------------------

    def get_image_embeddings(self, encoder_pixel_values):
        """K = F_enc(x_img), to be shared by many questions: float (B, 3, S, S) -> (B, d_k, h, w)."""
        return self.image_encoder(encoder_pixel_values.to(self.image_encoder.dtype)).last_hidden_state

    def find_slots(self, input_ids, response_mask):
        """Locate the first K_s concentration tokens of the response, after `</think>`.

        Args:
            input_ids: long (B, T); response_mask: bool (B, T), True at response tokens.

        Returns:
            positions long (B, K_s) (0 where missing) and slot_mask bool (B, K_s).
        """
        if self.config.ref_token_id is None or self.config.think_end_id is None:
            raise ValueError(
                "config.ref_token_id and config.think_end_id are None, so concentration tokens cannot be found; build "
                "the model with SegCompassModel.from_backbones(..., processor=processor) or set both ids."
            )
        thought = ((input_ids == self.config.think_end_id) & response_mask).cumsum(1) > 0
        found = (input_ids == self.config.ref_token_id) & response_mask & thought
        rank = found.cumsum(1) - 1
        slots = torch.arange(self.config.num_slots, device=input_ids.device)
        hit = found[:, None] & (rank[:, None] == slots[:, None])  # (B, K_s, T)
        return hit.int().argmax(-1), hit.any(-1)

    def decode_masks(
        self,
        input_ids,
        attention_mask,
        response_mask,
        z,
        last_hidden,
        image_embeddings,
        reshaped_input_sizes=None,
        image_grid_thw=None,
        concept_scale=None,
        query_source="both",
    ):
        """From hidden states to masks: Eq. 2 to 5.

        Args:
            input_ids: long (B, T); attention_mask: (B, T), 0 at padding; response_mask: bool (B, T).
            z: float (B, T, d_π) at the SAE's layer; last_hidden: float (B, T, d_π).
            image_embeddings: float (B, d_k, h, w) or (1, d_k, h, w) when all questions share one image.
            reshaped_input_sizes: long (B, 2), the image's (H, W) inside SAM's frame; None = the whole frame.
            concept_scale: {feature index: factor on h_j}, or all factors, float (B, d_sae) or (d_sae,).
            query_source: "both", or "tokens" / "concepts" to build the queries from e_k or r_k alone.
        """
        if query_source not in QUERY_SOURCES:
            raise ValueError(f"query_source is {query_source!r}; choose one of {QUERY_SOURCES}.")
        batch = len(input_ids)
        positions, slot_mask = self.find_slots(input_ids, response_mask)

        # e_k: the concentration tokens' embeddings, in the segmentation modules' dtype (the MLLM's may be lower)
        rows = torch.arange(batch, device=input_ids.device)[:, None]
        e = last_hidden[rows, positions].masked_fill(~slot_mask[..., None], 0)
        e = e.to(self.query_codebook.codebook.dtype)

        # E_sae, C, r_k: concepts of image, instruction and reasoning
        types = patches = None
        if query_source == "tokens":
            concepts = Concepts(e.new_zeros(*e.shape[:2], self.config.d_c))
        else:
            types, patches = self.token_layout(input_ids, response_mask, image_grid_thw)
            concepts = self.query_codebook(
                self.sae,
                z,
                self.concept_tokens(input_ids, attention_mask),
                self._where(types, patches, attention_mask, positions, slot_mask),
                self._scale_vector(concept_scale, z),
            )

        # Q, K, S, (H_k, c_k)
        keys = image_embeddings.to(e.dtype).expand(batch, -1, -1, -1)
        grid = keys.shape[-2:]
        image_positions = self._image_positions(grid).to(e.dtype)
        valid = self._valid_cells(reshaped_input_sizes, grid, batch, e.device)
        keep_tokens, keep_concepts = self._kept_sources(query_source, batch, e)
        heatmaps, confidences = self.slot_mapper(
            e, concepts.representations, keys + image_positions, valid, keep_tokens, keep_concepts
        )

        # M̂ = F_dec(K, (H_k, c_k))
        masks = self.mask_decoder(keys, image_positions, heatmaps, confidences, valid)
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
            patch_grid=patches,
            sequences=input_ids,
            reshaped_input_sizes=reshaped_input_sizes,
        )

    def concept_tokens(self, input_ids, attention_mask):
        """The tokens that may fire concepts, no padding and no special tokens: bool (B, T)."""
        special = torch.tensor(self.config.special_token_ids, dtype=input_ids.dtype, device=input_ids.device)
        return attention_mask.bool() & ~torch.isin(input_ids, special)

    def token_layout(self, input_ids, response_mask, image_grid_thw=None):
        """What each token is, long (B, T) IMAGE, INSTRUCTION or RESPONSE, and the image tokens' (rows, columns)."""
        is_image = input_ids == self.config.image_token_id
        types = torch.where(response_mask, RESPONSE, INSTRUCTION).masked_fill(is_image, IMAGE)
        count = is_image.sum(1).clamp_min(1)
        if image_grid_thw is not None:
            columns = image_grid_thw[:, 2] // self.config.mllm_config.vision_config.spatial_merge_size
        else:
            columns = count.float().sqrt().round().long()
        return types, torch.stack([count // columns, columns], 1)

    def _where(self, types, patches, attention_mask, positions, slot_mask):
        order = ((types == IMAGE).cumsum(1) - 1).clamp_min(0)
        height, width = patches[:, :1], patches[:, 1:]
        xy = torch.stack([(order % width + 0.5) / width, (order // width + 0.5) / height], -1)
        steps = torch.arange(types.shape[1], device=types.device)
        last = (attention_mask * steps).amax(1)
        end = torch.where(slot_mask[:, 0], positions[:, 0], last)[:, None]
        return token_position_features(types, xy, (end - steps).clamp_min(0).to(xy.dtype))

    def _scale_vector(self, concept_scale, z):
        d_sae = self.config.sae_config.d_sae
        if isinstance(concept_scale, torch.Tensor):
            if concept_scale.shape not in ((d_sae,), (len(z), d_sae)):
                raise ValueError(
                    f"concept_scale has shape {tuple(concept_scale.shape)}; it holds a factor of each of the "
                    f"{d_sae} concepts, ({d_sae},) or ({len(z)}, {d_sae}), or is a dict {{index: factor}}."
                )
            if not (concept_scale.isfinite() & (concept_scale >= 0)).all():
                raise ValueError("concept_scale holds factors that are negative or not finite; use 0 or more.")
            return concept_scale.to(z.device, z.dtype)
        if not concept_scale:
            return None
        scale = z.new_ones(d_sae)
        for index, factor in concept_scale.items():
            if not 0 <= index < d_sae:
                raise ValueError(f"concept {index} is out of range; this SAE has concepts 0 to {d_sae - 1}.")
            if not 0 <= factor < float("inf"):
                raise ValueError(f"the factor of concept {index} is {factor}; it must be finite and at least 0.")
            scale[index] = factor
        return scale

    @torch.no_grad()
    def _without_heaviest(self, output, count):
        """Factors float (B, d_sae) that switch off each confident slot's heaviest concepts, and those slots (B, K)."""
        if output.concept_weights is None:
            raise ValueError("num_erased_concepts needs concepts; use query_source='both' or 'concepts'.")
        sure = output.pred_logits.masked_fill(~output.slot_mask, float("-inf"))
        slots = (sure >= 0) | (sure == sure.amax(1, keepdim=True))
        slots = slots & output.slot_mask
        heaviest = output.concept_weights.topk(min(count, output.concept_weights.shape[-1]), dim=-1).indices
        heaviest = output.concept_indices[:, None].expand_as(output.concept_weights).gather(2, heaviest)
        off = torch.zeros(*slots.shape, self.config.sae_config.d_sae, device=slots.device)
        off.scatter_(2, heaviest, slots[..., None].expand_as(heaviest).to(off.dtype))
        return 1 - off.amax(1), slots

    def _image_positions(self, grid):
        y, x = (torch.arange(side, device=self.image_positions.positional_embedding.device) for side in grid)
        y, x = torch.meshgrid((y + 0.5) / grid[0], (x + 0.5) / grid[1], indexing="ij")
        return self.image_positions(torch.stack([x, y], -1)).permute(2, 0, 1)[None]

    def _valid_cells(self, reshaped_input_sizes, grid, batch, device):
        if reshaped_input_sizes is None:
            return torch.ones(batch, *grid, dtype=torch.bool, device=device)
        sides = torch.tensor(grid, device=device)
        extent = (reshaped_input_sizes.to(device) * sides / self.config.image_encoder_config.image_size).ceil()
        rows, columns = (torch.arange(side, device=device) for side in grid)
        return (rows < extent[:, :1])[:, :, None] & (columns < extent[:, 1:])[:, None]

    def _kept_sources(self, query_source, batch, like):
        if query_source != "both":
            kept = like.new_full((batch,), 1.0)
            return (kept, kept * 0) if query_source == "tokens" else (kept * 0, kept)
        probability = self.config.token_dropout
        if self.training and torch.is_grad_enabled() and probability > 0:
            return (torch.rand(batch, device=like.device) >= probability).to(like.dtype), None
        return None, None

    # -- the transformers face ---------------------------------------------------------------------------------------

    def forward(
        self,
        input_ids=None,
        attention_mask=None,
        pixel_values=None,
        encoder_pixel_values=None,
        image_embeddings=None,
        original_sizes=None,
        reshaped_input_sizes=None,
        labels=None,
        response_mask=None,
        mask_rows=None,
        concept_scale=None,
        query_source="both",
        num_erased_concepts=0,
        fused_lm_head=False,
        skip_lm_head=False,
        output_hidden_states=None,
        return_dict=True,
        **mllm_inputs,
    ):
        """One MLLM pass over prompt and response: language loss or log-probabilities, and masks.

        Args:
            input_ids, attention_mask: long (B, T).
            pixel_values (and `image_grid_thw`, `mm_token_type_ids` for Qwen2.5-VL): the MLLM's image.
            encoder_pixel_values: float (B, 3, S, S), or image_embeddings: float (B, d_k, h, w) from
                `get_image_embeddings`. With neither, only the language part runs.
            original_sizes: accepted and ignored, so that a processor's output can be passed whole.
            reshaped_input_sizes: long (B, 2), the image's (H, W) inside SAM's frame.
            labels: long (B, T), -100 outside the response.
            response_mask: bool (B, T), response positions; taken from labels when absent.
            mask_rows: list of int, decode masks of these samples only; image_embeddings and reshaped_input_sizes then
                belong to these.
            concept_scale, query_source: see `decode_masks`.
            num_erased_concepts: decode a second time without this many of the heaviest concepts of each confident
                slot (of the most confident one, when none is); the result is `erased`. Training uses
                it to make concepts necessary.
            fused_lm_head: the MLLM carries TRL's fused head: return log_probs and entropy instead of logits.
            skip_lm_head: run the backbone only; no logits, no language loss.

        Raises:
            ValueError: masks are asked for without labels or response_mask; bad intervention or query source.
        """
        wants_masks = encoder_pixel_values is not None or image_embeddings is not None
        if response_mask is None and labels is not None:
            response_mask = labels != -100
        if wants_masks and response_mask is None:
            raise ValueError(
                "masks need to know where the response is: pass labels or response_mask (the processor makes both "
                "when given response=...), or call model.segment(...) to let the model write the response."
            )
        if attention_mask is None and input_ids is not None:
            attention_mask = torch.ones_like(input_ids)
        inputs = dict(input_ids=input_ids, attention_mask=attention_mask, pixel_values=pixel_values, **mllm_inputs)
        inputs = {name: value for name, value in inputs.items() if value is not None}
        with self.reading_states() as states:
            if skip_lm_head:
                inputs["use_cache"] = False
                inputs.pop("logits_to_keep", None)
                policy = self.mllm.model(**inputs)
            elif fused_lm_head:
                policy = self.mllm(**inputs, labels=labels, fused_lm_head=True)
            else:
                policy = self.mllm(**inputs, labels=labels, output_hidden_states=output_hidden_states)
        output = SegCompassOutput()
        if wants_masks:
            if image_embeddings is None:
                image_embeddings = self.get_image_embeddings(encoder_pixel_values)
            grid = mllm_inputs.get("image_grid_thw")
            rows = slice(None) if mask_rows is None else mask_rows
            read = (
                input_ids[rows],
                attention_mask[rows],
                response_mask[rows],
                states["z"][0][rows],
                states["last"][0][rows],
                image_embeddings,
                reshaped_input_sizes,
                None if grid is None else grid[rows],
            )
            output = self.decode_masks(*read, concept_scale, query_source)
            if num_erased_concepts:
                scale, output.erased_slots = self._without_heaviest(output, num_erased_concepts)
                output.erased = self.decode_masks(*read, scale, query_source)
        for name in ("loss", "logits", "past_key_values", "log_probs", "entropy", "aux_loss"):
            if getattr(policy, name, None) is not None:
                output[name] = getattr(policy, name)
        if output_hidden_states:
            output.hidden_states = policy.hidden_states
        if output.loss is not None:
            output.loss_dict = {"language": output.loss.detach()}
        return output if return_dict else output.to_tuple()

    def generate(self, inputs=None, **kwargs):
        """Write the response with the MLLM: ids long (B, T), like any transformers model."""
        for name in ("encoder_pixel_values", "image_embeddings", "original_sizes", "reshaped_input_sizes", "labels"):
            kwargs.pop(name, None)
        if inputs is not None:
            kwargs["input_ids"] = inputs
        output = self.mllm.generate(**kwargs)
        if self._states is not None:
            self._states["written"] = self._read_back(getattr(output, "sequences", output), **kwargs)
        return output

    def _read_back(self, sequences, input_ids, attention_mask=None, image_grid_thw=None, **ignored):
        if attention_mask is None:
            attention_mask = torch.ones_like(input_ids)
        z, last_hidden = torch.cat(self._states["z"], 1), torch.cat(self._states["last"], 1)
        read = sequences[:, : z.shape[1]]  # the last token was written, but never read back
        written = self._written(read[:, input_ids.shape[1] :])
        return {
            "input_ids": read,
            "attention_mask": torch.cat([attention_mask, written.to(attention_mask.dtype)], 1),
            "response_mask": torch.cat([torch.zeros_like(attention_mask, dtype=torch.bool), written], 1),
            "z": z,
            "last_hidden": last_hidden,
            "image_grid_thw": image_grid_thw,
        }

    def segment(self, input_ids, concept_scale=None, query_source="both", **inputs):
        """Reason about the image, then decode masks from the states that generation left behind.

        Args:
            input_ids and other inputs: see `reason`; concept_scale, query_source: see `decode_masks`.

        Returns:
            SegCompassOutput with `sequences` (B, T) and `prompt_length`. A response without concentration tokens has
            an empty `slot_mask` and so no mask.

        Raises:
            ValueError: neither encoder_pixel_values nor image_embeddings; beams or several sequences per prompt.
        """
        sequences, states = self.reason(input_ids, **inputs)
        with torch.no_grad():
            output = self.decode_masks(**states, concept_scale=concept_scale, query_source=query_source)
        output.sequences = sequences
        output.prompt_length = input_ids.shape[1]
        return output

    @torch.no_grad()
    def reason(
        self,
        input_ids,
        attention_mask=None,
        encoder_pixel_values=None,
        image_embeddings=None,
        original_sizes=None,
        reshaped_input_sizes=None,
        do_sample=False,
        **kwargs,
    ):
        """Write the response and keep what masks are decoded from, so that they can be decoded again and again.

        Args:
            input_ids, attention_mask, pixel_values, ...: a processor's output for images and instructions.
            encoder_pixel_values or image_embeddings, reshaped_input_sizes: see `forward`.
            do_sample: greedy when False. Other keywords go to `generate` (`max_new_tokens`, `streamer`, ...).

        Returns:
            sequences, long (B, T), and the states, a dict of the arguments of `decode_masks`.

        Raises:
            ValueError: neither encoder_pixel_values nor image_embeddings; beams or several sequences per prompt.
        """
        if encoder_pixel_values is None and image_embeddings is None:
            raise ValueError("segment needs the image: pass encoder_pixel_values or image_embeddings.")
        for name in ("num_beams", "num_return_sequences"):
            if kwargs.get(name, 1) != 1:
                raise ValueError(f"{name} is {kwargs[name]}; segment follows one sequence per prompt, use {name}=1.")
        if kwargs.get("max_new_tokens") is None and kwargs.get("max_length") is None:
            kwargs["max_new_tokens"] = self.config.max_response_length
        with self.reading_states() as states:
            sequences = self.generate(input_ids=input_ids, attention_mask=attention_mask, do_sample=do_sample, **kwargs)
        if image_embeddings is None:
            image_embeddings = self.get_image_embeddings(encoder_pixel_values)
        image = {"image_embeddings": image_embeddings, "reshaped_input_sizes": reshaped_input_sizes}
        return sequences, {**states["written"], **image}

    def explain(self, outputs, slot=0, sample=0, top=10, labels=None, processor=None):
        """Say which concepts made a slot's mask, and from which words and patches: see `explanation.explain_slot`."""
        return explain_slot(outputs, slot, sample, top, labels, processor, self.config.image_encoder_config.image_size)

    def predict_forward(
        self,
        image=None,
        text=None,
        processor=None,
        tokenizer=None,
        past_text="",
        mask_prompts=None,
        video=None,
        threshold=0.5,
    ):
        """Answer as Sa2VA models do, so that programs written for that family run with this one.

        Args:
            image: one image; text: the instruction, with or without a leading "<image>".
            processor: this model's SegCompassProcessor (also accepted as `tokenizer`).
            past_text, mask_prompts, video: must stay empty; this model reads one image and one instruction.
            threshold: confidence from which a slot is kept.

        Returns:
            {"prediction": the response, ending in one "[SEG]" for each mask, "prediction_masks": list of bool arrays
            (1, H, W), one for each instance}. The list is empty when nothing is found.

        Raises:
            ValueError: no processor, a conversation, mask prompts or a video.
        """
        for name, value in (("past_text", past_text), ("mask_prompts", mask_prompts), ("video", video)):
            if value:
                raise ValueError(f"{name} is not supported: this model reads one image and one instruction.")
        processor = processor if processor is not None else tokenizer
        if not hasattr(processor, "post_process_instance_segmentation"):
            raise ValueError(
                f"processor is {type(processor).__name__}; pass AutoProcessor.from_pretrained(<this model>, "
                "trust_remote_code=True)."
            )
        text = text.removeprefix("<image>") if isinstance(text, str) else text
        inputs = processor(images=image, text=text, return_tensors="pt").to(self.device)
        outputs = self.segment(**inputs)
        result = processor.post_process_instance_segmentation(outputs, threshold, target_sizes=inputs["original_sizes"])
        masks = [mask[None].cpu().numpy() for mask in result[0]["masks"]]
        response = outputs.sequences[0, outputs.prompt_length :]
        response = response[response != self.config.ref_token_id]
        answer = processor.decode(response, skip_special_tokens=True).strip()
        return {"prediction": answer + "[SEG]" * len(masks), "prediction_masks": masks}

    def _written(self, response):
        """True up to and including the end-of-sequence token: bool (B, T_response)."""
        eos = self.generation_config.eos_token_id
        if eos is None:
            return torch.ones_like(response, dtype=torch.bool)
        ended = torch.isin(response, torch.as_tensor(eos, device=response.device).flatten())
        return (ended.cumsum(1) - ended.int()) == 0

    def get_input_embeddings(self):
        return self.mllm.get_input_embeddings()

    def set_input_embeddings(self, value):
        self.mllm.set_input_embeddings(value)

    def get_output_embeddings(self):
        return self.mllm.get_output_embeddings()

    def set_output_embeddings(self, value):
        self.mllm.set_output_embeddings(value)

    def resize_token_embeddings(self, *args, **kwargs):
        return self.mllm.resize_token_embeddings(*args, **kwargs)

    # -- building, saving, loading -----------------------------------------------------------------------------------

    @classmethod
    def from_backbones(cls, mllm, image_encoder, sae=None, processor=None, dtype="float32", **config):
        """Build a fresh model from an MLLM, a SAM vision encoder and, if there is one, a trained SAE.

        Args:
            mllm, image_encoder, sae: model ids, folders, or loaded models; `image_encoder` also an original
                segment-anything `.pth` file. A whole SAM gives the mask decoder its start where shapes match. Without
                `sae` an untrained one is made.
            processor: a SegCompassProcessor; its new tokens get embedding rows (the mean of the others), and its
                token ids enter the config.
            dtype: of the parts loaded here. Training needs float32 master weights, under autocast if it is to be fast;
                "auto" keeps each checkpoint's own.
            config: fields of SegCompassConfig; `sae_config` shapes a new SAE.

        Raises:
            ValueError: an SAE of another width, layer or backbone.
        """
        if isinstance(mllm, str):
            mllm = AutoModelForImageTextToText.from_pretrained(mllm, dtype=dtype)
        image_encoder, sam_weights = read_sam(image_encoder, dtype)
        if isinstance(sae, str):
            sae = SparseAutoencoder.from_pretrained(sae, dtype=dtype)
        name = mllm.config._name_or_path or None
        if sae is not None:
            config["sae_config"] = sae.config
            if sae.config.backbone and name and sae.config.backbone != name:
                raise ValueError(
                    f"the SAE was trained on {sae.config.backbone!r}, but the MLLM is {name!r}; load an SAE of this "
                    "backbone, or set sae.config.backbone=None to overrule."
                )
        elif "sae_config" not in config:
            text = mllm.config.get_text_config()
            config["sae_config"] = SparseAutoencoderConfig(
                d_in=text.hidden_size, layer=max(1, text.num_hidden_layers // 2), backbone=name
            )
        if processor is not None:
            config = {**processor.model_tokens(), "num_slots": processor.num_slots, **config}
            if len(processor.tokenizer) > mllm.get_input_embeddings().num_embeddings:
                mllm.resize_token_embeddings(len(processor.tokenizer), mean_resizing=True)
        config = SegCompassConfig(
            mllm_config=mllm.config,
            image_encoder_config=image_encoder.config,
            attn_implementation=mllm.config._attn_implementation,
            **config,
        )
        model = cls(config, mllm=mllm, image_encoder=image_encoder, sae=sae)
        start_mask_decoder(model, sam_weights)
        return model

    def load_sae(self, sae):
        """Put a trained SAE (model, folder or Hub id) in place of this model's.

        Raises:
            ValueError: it has another width or layer than the model was built for.
        """
        if isinstance(sae, str):
            sae = SparseAutoencoder.from_pretrained(sae)
        for name in ("d_in", "d_sae", "layer"):
            ours, theirs = getattr(self.config.sae_config, name), getattr(sae.config, name)
            if ours != theirs:
                raise ValueError(
                    f"the SAE has {name}={theirs}, this model was built for {ours}; train one for it, or build a model "
                    "around this SAE with from_backbones."
                )
        self.sae = sae.to(self.device)
        self.config.sae_config = sae.config
        self.freeze_encoders()

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *args, output_loading_info=False, **kwargs):
        """Load a saved model; unlike transformers' default, missing or unexpected weights are an error.

        A checkpoint whose config names `references` holds only its own weights: the parts it refers to are loaded from
        their repositories, at the revisions noted when it was saved. `quantization_config` quantises the MLLM only.

        Raises:
            ValueError: the checkpoint lacks weights of this model or holds others; `device_map` or
                `quantization_config` with a checkpoint that refers to its parts; a `device_map` that offloads the SAE.
        """
        hub = {name: kwargs[name] for name in HUB_KEYWORDS if name in kwargs}
        kwargs.setdefault("key_mapping", OLD_WEIGHTS)
        config = kwargs.get("config")
        if not isinstance(config, SegCompassConfig):
            of_config = {name: kwargs[name] for name in ("revision", "subfolder") if kwargs.get(name) is not None}
            config = SegCompassConfig.from_pretrained(pretrained_model_name_or_path, **hub, **of_config)
        references = config.references or {}
        if kwargs.get("quantization_config") is not None:
            kwargs["quantization_config"] = spare_from_quantization(kwargs["quantization_config"])
        for name in ("device_map", "quantization_config"):
            if references and kwargs.get(name) is not None:
                raise ValueError(
                    f"{name} needs a checkpoint that carries its weights whole, but this one refers to "
                    f"{', '.join(references)}; load it without, save_pretrained it, and load that."
                )
        with init.no_init_weights() if references else nullcontext():
            model, info = super().from_pretrained(
                pretrained_model_name_or_path, *args, output_loading_info=True, **kwargs
            )
        loading = {name: kwargs[name] for name in ("dtype", "attn_implementation") if name in kwargs}
        for part, where in references.items():
            loaded = PARTS[part].from_pretrained(where["repo_id"], revision=where["revision"], **hub, **loading)
            getattr(model, part).load_state_dict(loaded.state_dict())
            info["missing_keys"] = {key for key in info["missing_keys"] if not key.startswith(f"{part}.")}
        wrong = {name: sorted(map(str, info[name])) for name in ("missing_keys", "unexpected_keys", "mismatched_keys")}
        if any(wrong.values()):
            told = "; ".join(f"{name}: {len(keys)} ({', '.join(keys[:3])} ...)" for name, keys in wrong.items() if keys)
            raise ValueError(
                f"{pretrained_model_name_or_path} does not match this model ({told}); nothing was loaded. Use the "
                "folder that save_pretrained wrote, with its own config.json."
            )
        if any(weight.is_meta for weight in model.sae.parameters()):
            raise ValueError(
                "device_map left no memory for the SAE, which cannot be offloaded (its encoder is read by columns); "
                'name a device for it, as in device_map={"sae": "cpu", ...}, or raise max_memory.'
            )
        model.config.references = None  # it is whole now, and is saved whole
        model.freeze_encoders()
        return (model, info) if output_loading_info else model

    def save_pretrained(self, save_directory, *args, references=None, **kwargs):
        """As transformers', with our own key names (resuming a Trainer needs them) and the code beside the weights.

        Args:
            references: {"mllm" | "image_encoder" | "sae": {"repo_id", "revision"}}, parts to leave out of the weights
                because they are kept elsewhere, unchanged. Loading fetches them from there.

        Raises:
            ValueError: a reference to another part, or without a revision.
        """
        kwargs["save_original_format"] = False
        self.config.auto_map = dict(AUTO_MAP)
        self.config.custom_pipelines = CUSTOM_PIPELINES
        if references:
            state_dict = self.state_dict() if kwargs.get("state_dict") is None else kwargs["state_dict"]
            kwargs["state_dict"] = {key: w for key, w in state_dict.items() if key.split(".")[0] not in references}
        try:
            self.config.references = checked_references(references)
            super().save_pretrained(save_directory, *args, **kwargs)
        finally:
            self.config.references = None


def checked_references(references):
    """The references as they are, or None; raises ValueError for an unknown part or a revision that is not named."""
    for part, where in (references or {}).items():
        if part not in PARTS or not where.get("repo_id") or not where.get("revision"):
            raise ValueError(
                f"references[{part!r}] is {where!r}; name one of {tuple(PARTS)} with its repo_id and revision."
            )
    return references or None


def spare_from_quantization(quantization_config):
    """The quantisation config (or its dict form) with everything but the MLLM among the modules it leaves alone."""
    if isinstance(quantization_config, dict):
        quantization_config = AutoQuantizationConfig.from_dict(quantization_config)
    for field in ("llm_int8_skip_modules", "modules_to_not_convert", "skip_modules"):
        if hasattr(quantization_config, field):
            named = getattr(quantization_config, field) or []
            setattr(quantization_config, field, [*named, *(name for name in UNQUANTIZED if name not in named)])
    return quantization_config


SegCompassConfig.register_for_auto_class()
SegCompassModel.register_for_auto_class("AutoModel")
