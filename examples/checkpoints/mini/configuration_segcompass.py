"""Configurations of SegCompass and of its sparse autoencoder. They build with no network and no weights."""

from collections.abc import Sequence
from typing import Any

from transformers import AutoConfig, PreTrainedConfig

from .image_encoder import DEFAULT_ENCODER, IMAGE_VIEWS, Frame, encoder_of
from .old_names import EARLIER_DEFAULTS, with_new_names
from .sae_activations import SAE_ACTIVATIONS
from .saved_folders import own_config

CONCEPT_READINGS = ("feature", "token", "grounded")
GROUNDED_MAPS = ("all", "places")


class SparseAutoencoderConfig(PreTrainedConfig):
    """Shape and origin of a sparse autoencoder (section 3.2).

    Args:
        d_in: width of the hidden states it reads, d_π (4096 LLaVA-1.5-7B, 5120 13B, 3584 Qwen2.5-VL-7B).
        d_sae: number of dictionary atoms (65,536 in the paper).
        activation: which pre-activations become features, a name in `sae_activations.SAE_ACTIVATIONS`. "relu": every
            positive one, made few by Eq. 7's penalty. "topk": the `k` largest positive ones of each token. "batchtopk":
            in training the `k` N largest of a batch of N tokens, afterwards those above the threshold that this
            amounted to. "matryoshka": the same, with nested dictionaries that are each fitted alone. "jumprelu": those
            above a threshold that is learned for each feature, made few by a penalty on their number.
        k: features that a token keeps with "topk", and on average with "batchtopk" and "matryoshka".
        l1_coefficient: α of Eq. 7 ("relu" only); the penalty is weighted by the norm of each decoder row.
        backbone: model id of the MLLM whose hidden states it was trained on, or None when untrained.
        layer: L, counted so that the input is the output of the L-th decoder block, `hidden_states[L]`.
        l0_coefficient: price of one active feature ("jumprelu" only).
        bandwidth: width of the window around a threshold from which the threshold learns ("jumprelu" only).
        dataset: what its hidden states were gathered from, or None when unknown.
        token_window: most tokens a sample had when they were gathered, or None when unknown.
        backbone_revision: commit of the backbone on the Hub, or None when unknown.
        nested_widths: features of each nested dictionary ("matryoshka" only), ascending to `d_sae`; None takes 1/32,
            3/32, 7/32, 15/32 and all of them.
        **kwargs: other fields of `PreTrainedConfig`, and fields that an activation of one's own reads.

    Raises:
        ValueError: a field is out of range, or no activation has that name.

    Example:
        >>> config = SparseAutoencoderConfig(d_in=3584, d_sae=65536, activation="topk", k=64, layer=13)
        >>> sae = SparseAutoencoder(config)
    """

    model_type = "segcompass_sae"

    def __init__(
        self,
        d_in: int = 4096,
        d_sae: int = 65536,
        activation: str = "relu",
        k: int = 64,
        l1_coefficient: float = 5.0,
        backbone: str | None = None,
        layer: int = 16,
        l0_coefficient: float = 1.0,
        bandwidth: float = 0.5,
        dataset: str | None = None,
        token_window: int | None = None,
        backbone_revision: str | None = None,
        nested_widths: list[int] | None = None,
        **kwargs: Any,
    ):
        for name, value in (("d_in", d_in), ("d_sae", d_sae), ("k", k), ("layer", layer)):
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} is {value!r}; it must be an integer of at least 1.")
        if activation not in SAE_ACTIVATIONS:
            raise ValueError(f"activation is {activation!r}; choose one of {tuple(SAE_ACTIVATIONS)}.")
        for name, coefficient in (("l1_coefficient", l1_coefficient), ("l0_coefficient", l0_coefficient)):
            if coefficient < 0:
                raise ValueError(f"{name} is {coefficient}; a penalty is 0 or more.")
        if bandwidth <= 0:
            raise ValueError(f"bandwidth is {bandwidth}; it must be positive.")
        self.d_in = d_in
        self.d_sae = d_sae
        self.activation = activation
        self.k = k
        self.l1_coefficient = l1_coefficient
        self.l0_coefficient = l0_coefficient
        self.bandwidth = bandwidth
        self.backbone = backbone
        self.backbone_revision = backbone_revision
        self.layer = layer
        self.dataset = dataset
        self.token_window = token_window
        self.nested_widths = nested_widths
        super().__init__(**kwargs)
        SAE_ACTIVATIONS[activation].check_config(self)

    @classmethod
    def get_config_dict(cls, pretrained_model_name_or_path: Any, **kwargs: Any) -> tuple[dict[str, Any], dict]:
        """As transformers', of an SAE's folder or a whole SegCompass model's; any other is refused."""
        fields, kwargs = super().get_config_dict(pretrained_model_name_or_path, **kwargs)
        if fields.get("model_type") == SegCompassConfig.model_type:
            fields = fields.get("sae_config", {})
        return own_config(pretrained_model_name_or_path, fields, cls.model_type), kwargs


class SegCompassConfig(PreTrainedConfig):
    """Everything needed to build a SegCompass model with no network.

    Args:
        mllm_config: configuration of the MLLM policy π_θ (`llava`, `qwen2_5_vl`), or its dict.
        image_encoder_config: configuration of the image encoder F_enc (docs/encoders.md lists the kinds), or its dict.
        sae_config: configuration of the sparse autoencoder E_sae; its `layer` says which hidden states it reads.
        num_slots: K_s, the number of concentration tokens and of slots.
        d_c: width of the concept representations r_k.
        num_concepts: M, how many concepts of a sample become concept tokens.
        concept_reading: "grounded", the default, makes the heatmap an exact sum of concepts' places, see
            `grounded_reading.py`; the fields of query codebook and slot mapper are not used. "feature" makes one token
            of each selected SAE feature (Eq. 4); "token" makes one token of each MLLM token, the sum of its features'
            codes. These two are the paper's attention path.
        codebook_layers: depth of the query codebook's encoder.
        codebook_heads: attention heads of its blocks.
        slot_heads: N_h of the slot mapper (Eq. 5).
        slot_head_dim: d_h of the slot mapper (Eq. 5).
        decoder_layers: depth of the mask decoder's two-way transformer (Eq. 3).
        decoder_heads: attention heads of its blocks.
        decoder_mlp_dim: hidden width of its feed-forward layers.
        ref_token_id: id of the concentration token in the MLLM's vocabulary; None until a processor's tokens are known.
        think_end_id: id of `</think>`; None until a processor's tokens are known.
        think_id: id of `<think>`; None until a processor's tokens are known.
        special_token_ids: ids whose hidden states never enter the concept path (BOS, separators, concentration tokens).
        sentence_end_ids: ids after which a new sentence begins (full stops, line ends, `<think>`); "grounded" reads the
            reasoning's last sentence.
        image_view: how the MLLM sees the image, a name in `image_encoder.IMAGE_VIEWS`; "grounded" lays its patches over
            the image encoder's frame by it.
        grounded_rank: rank of the map U Vᵀ from words' concepts to patches' ("grounded"); 0 leaves it out.
        grounded_map: which concepts the map leads to ("grounded"): "places" for an SAE in which words and patches share
            concepts of looks, "all" where they share none.
        look_concepts: how many concepts of a slot say what is meant ("grounded").
        place_concepts: how many say where ("grounded").
        place_share: ρ, the share of a slot that the places have, in [0, 1) ("grounded").
        tied_place_share: what they have where the slot's looks are there over more than one thing covers, in
            [place_share, 1) ("grounded"); None is `place_share`.
        phrase_window: a word is read together with the phrase_window - 1 words before it ("grounded").
        place_spread: a concept whose mean map covers a smaller share of the image than this is a place, in [0, 1]
            ("grounded").
        token_dropout: probability, in training, that a sample's queries are built without e_k, so that the concepts
            must carry the mask.
        max_response_length: tokens `segment` may write when the caller names no limit.
        initializer_range: standard deviation of new embeddings and queries.
        references: {"mllm" | "image_encoder" | "sae": {"repo_id", "revision"}}, parts whose weights this checkpoint
            leaves to other repositories; None when it carries them whole.
        **kwargs: fields of every configuration; names of earlier versions are understood.

    Raises:
        ValueError: a value out of range, or an SAE that does not fit the MLLM.

    Example:
        config = SegCompassConfig(mllm_config={"model_type": "llava"}, num_slots=4)
        config.key_grid, config.key_channels, config.frame.side  # 64, 256, 1024
        model = SegCompassModel(config)
    """

    model_type = "segcompass"
    # Not `sub_configs_defaults`, which transformers before 5.21 lacks: `__init__` makes them, in every version alike.
    sub_configs = {  # type: ignore[assignment]
        "mllm_config": AutoConfig,
        "image_encoder_config": AutoConfig,
        "sae_config": SparseAutoencoderConfig,
    }
    auto_map = {}  # type: ignore[var-annotated]  # an annotation would make it a field

    def __init__(
        self,
        mllm_config: Any = None,
        image_encoder_config: Any = None,
        sae_config: Any = None,
        num_slots: int = 6,
        d_c: int = 512,
        num_concepts: int = 256,
        concept_reading: str = "grounded",
        codebook_layers: int = 2,
        codebook_heads: int = 8,
        slot_heads: int = 4,
        slot_head_dim: int = 64,
        decoder_layers: int = 2,
        decoder_heads: int = 8,
        decoder_mlp_dim: int = 2048,
        ref_token_id: int | None = None,
        think_end_id: int | None = None,
        think_id: int | None = None,
        special_token_ids: Sequence[int] = (),
        sentence_end_ids: Sequence[int] = (),
        image_view: str = "whole",
        grounded_rank: int = 64,
        grounded_map: str = "all",
        look_concepts: int = 3,
        place_concepts: int = 2,
        place_share: float = 0.25,
        tied_place_share: float | None = None,
        phrase_window: int = 5,
        place_spread: float = 0.53,
        token_dropout: float = 0.0,
        max_response_length: int = 2000,
        initializer_range: float = 0.02,
        references: dict[str, dict[str, str]] | None = None,
        **kwargs: Any,
    ):
        renamed = {"image_encoder_config": image_encoder_config, "references": references}
        kwargs = with_new_names({**kwargs, **{name: value for name, value in renamed.items() if value is not None}})
        self.mllm_config = _part(mllm_config, "llava")
        self.image_encoder_config = _part(kwargs.pop("image_encoder_config", None), DEFAULT_ENCODER)
        if sae_config is None or isinstance(sae_config, dict):
            sae_config = SparseAutoencoderConfig(**sae_config or {})
        self.sae_config: Any = sae_config
        if concept_reading not in CONCEPT_READINGS:
            raise ValueError(f"concept_reading is {concept_reading!r}; choose one of {CONCEPT_READINGS}.")
        if image_view not in IMAGE_VIEWS:
            raise ValueError(f"image_view is {image_view!r}; choose one of {IMAGE_VIEWS}.")
        for name, count, least in (
            ("num_slots", num_slots, 1),
            ("d_c", d_c, 1),
            ("num_concepts", num_concepts, 1),
            ("codebook_layers", codebook_layers, 0),
            ("codebook_heads", codebook_heads, 1),
            ("slot_heads", slot_heads, 1),
            ("slot_head_dim", slot_head_dim, 1),
            ("decoder_layers", decoder_layers, 0),
            ("decoder_heads", decoder_heads, 1),
            ("decoder_mlp_dim", decoder_mlp_dim, 1),
            ("max_response_length", max_response_length, 1),
            ("grounded_rank", grounded_rank, 0),
            ("look_concepts", look_concepts, 1),
            ("place_concepts", place_concepts, 0),
            ("phrase_window", phrase_window, 1),
        ):
            if not isinstance(count, int) or count < least:
                raise ValueError(f"{name} is {count!r}; it must be an integer of at least {least}.")
        tied_place_share = place_share if tied_place_share is None else tied_place_share
        if grounded_map not in GROUNDED_MAPS:
            raise ValueError(f"grounded_map is {grounded_map!r}; choose one of {GROUNDED_MAPS}.")
        if not 0 <= place_share <= tied_place_share < 1 or not 0 <= place_spread <= 1:
            raise ValueError(
                f"place_share is {place_share}, tied_place_share {tied_place_share} and place_spread {place_spread}; "
                "they are shares, the first from 0 up to the second, which is below 1, the third from 0 to 1."
            )
        if d_c % codebook_heads:
            raise ValueError(f"d_c={d_c} is not divisible by codebook_heads={codebook_heads}.")
        self.num_slots = num_slots
        self.d_c = d_c
        self.num_concepts = num_concepts
        self.concept_reading = concept_reading
        self.codebook_layers = codebook_layers
        self.codebook_heads = codebook_heads
        self.slot_heads = slot_heads
        self.slot_head_dim = slot_head_dim
        self.decoder_layers = decoder_layers
        self.decoder_heads = decoder_heads
        self.decoder_mlp_dim = decoder_mlp_dim
        self.ref_token_id = ref_token_id
        self.think_end_id = think_end_id
        self.think_id = think_id
        self.special_token_ids = list(special_token_ids)
        self.sentence_end_ids = list(sentence_end_ids)
        self.image_view = image_view
        self.grounded_rank = grounded_rank
        self.grounded_map = grounded_map
        self.look_concepts = look_concepts
        self.place_concepts = place_concepts
        self.place_share = place_share
        self.tied_place_share = tied_place_share
        self.phrase_window = phrase_window
        self.place_spread = place_spread
        self.token_dropout = token_dropout
        self.max_response_length = max_response_length
        self.initializer_range = initializer_range
        self.references = kwargs.pop("references", None)
        super().__init__(**kwargs)
        self.check_sae(self.sae_config)

    @classmethod
    def get_config_dict(cls, pretrained_model_name_or_path: Any, **kwargs: Any) -> tuple[dict[str, Any], dict]:
        """As transformers', but a folder without config.json, or with another model's, is refused."""
        fields, kwargs = super().get_config_dict(pretrained_model_name_or_path, **kwargs)
        return own_config(pretrained_model_name_or_path, fields, cls.model_type), kwargs

    @classmethod
    def from_json_file(cls, json_file: Any) -> Any:
        """As transformers', by `from_dict`."""
        return cls.from_dict(cls._dict_from_json_file(json_file))

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """As transformers', and reads what earlier versions saved."""
        fields = {**EARLIER_DEFAULTS, **with_new_names(config_dict)}
        fields.pop("tie_word_embeddings", None)
        return super().from_dict(fields, **kwargs)  # the MLLM's own configuration says whether it is tied

    def to_dict(self) -> dict[str, Any]:
        """As transformers', with `tie_word_embeddings`: PEFT looks for it here."""
        return {**super().to_dict(), "tie_word_embeddings": self.tie_word_embeddings}

    def check_sae(self, sae_config: SparseAutoencoderConfig) -> None:
        """Refuse an SAE of another width than the MLLM's, or of a layer that it lacks. Raises ValueError."""
        text = self.mllm_config.get_text_config()
        if sae_config.d_in != text.hidden_size:
            raise ValueError(
                f"the SAE reads hidden states of width {sae_config.d_in}, but the MLLM's are {text.hidden_size} wide; "
                "train or load an SAE of this backbone."
            )
        if sae_config.layer > text.num_hidden_layers:
            raise ValueError(
                f"the SAE reads layer {sae_config.layer}, but the MLLM has {text.num_hidden_layers} decoder blocks; "
                f"choose a layer from 1 to {text.num_hidden_layers}."
            )

    def get_text_config(self, *args: Any, **kwargs: Any) -> PreTrainedConfig:
        """The language model's configuration."""
        return self.mllm_config.get_text_config(*args, **kwargs)

    @property
    def tie_word_embeddings(self) -> bool:
        """Whether the MLLM's embedding and LM head are one matrix, as its own configuration says."""
        return self.mllm_config.tie_word_embeddings

    @tie_word_embeddings.setter
    def tie_word_embeddings(self, tie: bool) -> None:
        self.mllm_config.tie_word_embeddings = tie

    @property
    def image_token_id(self) -> int:
        """The MLLM's image token, which stands once per image token in `input_ids`."""
        return self.mllm_config.image_token_id

    @property
    def key_grid(self) -> int:
        """Side of the (square) grid of image keys K: 64 for SAM at 1024 pixels."""
        return encoder_of(self).key_grid(self.image_encoder_config)

    @property
    def key_channels(self) -> int:
        """d_k, the width of the image keys K: 256 for SAM."""
        return encoder_of(self).channels(self.image_encoder_config)

    @property
    def frame(self) -> Frame:
        """Where an image lies in the image encoder's square input."""
        return encoder_of(self).frame(self.image_encoder_config)


def _part(config, default_type):
    """A part's configuration from its dict; None gives the default of a kind, and a configuration is left as it is."""
    if config is None or isinstance(config, dict):
        return AutoConfig.for_model(**{"model_type": default_type, **(config or {})})
    return config
