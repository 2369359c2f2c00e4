"""The grounded read-out: words choose concepts, and the places where these fire in the image are the heatmap.

    H_k(p) = b + |a| Σ_j w_kj relu(ĥ_j(p) - mean ĥ_j)        a sum of named contributions, exact, in patch positions
    H_k(q) = scale Σ_p A(q, p) H_k(p) + shift                A's rows sum to 1: exact in the image encoder's grid too

    s_kj = γ min(2, t_kj) min(2, m_j) + (t_k U Vᵀ)_j + β_j (+ B_kj at places)

Each slot attends to the words of the conclusion (α); t_k are its words' relative concept strengths, m_j is how far j
stands out on the image. A concept is chosen when it fires on the slot's words and stands out on the image: the heaviest
few share the slot, looks and places apart. Where two parts of the image look like what is meant, places have more of
the slot, for only they can tell which. U Vᵀ leads from words' concepts to patches', at places or everywhere. No
concentration token's state is read. `concept_reading="grounded"` puts this in the place of query codebook and slot
mapper; the mask decoder stays. Knows nothing about tokens' ids, training or names of concepts.
"""

from typing import Any, NamedTuple

import torch
from torch import nn
from transformers import initialization as init

from .modeling_sparse_autoencoder import SparseAutoencoder
from .old_names import with_vectors

MAX_WORD_STRENGTH = 5.0  # ĥ of a word is cut here: one outlier must not outweigh the other words
DECODER_CONFIDENCE = 3.0  # logit that the mask decoder is given: what a slot shows is its heatmap's affair alone
ENOUGH = 2.0  # beyond twice the usual strength a concept fires no more surely
SLOT_KEY_WIDTH = 64
GUIDE_WIDTH = 32
MAX_ELEMENTS = 2**23  # about how many numbers the search over all concepts holds at once
HIGHEST_PATCHES = 4  # whose mean the confidence reads
THERE = 0.4  # of the greatest: from there on all looks of a slot count as there
ONE_THING = 0.15  # of the frame's side: looks whose places scatter by more (standard deviation) are of several things
ABSENT = 0.02  # strength, of a look's greatest, that counts as none
LEAST = 1e-6  # of a map: what is equal everywhere leaves less by rounding


class WordReading(NamedTuple):
    """What the slots read in the conclusion. B samples, K slots, R words."""

    shares: torch.Tensor
    """α: float (B, K, R), how much of slot k is word i; a slot's shares sum to 1 (0 without words)."""
    phrases: torch.Tensor
    """g: float (B, R, d_sae), relative strength of each concept at a word together with those before it."""
    strengths: torch.Tensor
    """t: float (B, K, d_sae), the phrases' strengths weighted by the shares."""


class PatchReading(NamedTuple):
    """A read-out in patch positions. B samples, K slots, P patches."""

    words: WordReading
    logits: torch.Tensor
    """s: float (B, K, d_sae), what the words say for each concept."""
    weights: torch.Tensor
    """w: float (B, K, d_sae), the few concepts that share each slot."""
    maps: torch.Tensor
    """|a| relu(ĥ_j(p) - mean ĥ_j): float (B, P, d_sae), at least 0."""
    heatmaps: torch.Tensor
    """H_k: float (B, K, P) logits."""
    confidences: torch.Tensor
    """c_k: float (B, K) logits."""


class Grounding(NamedTuple):
    """The exact account of grounded heatmaps, in `SegCompassOutput.grounding`. M concepts, see `concept_indices`.

    Example:
        outputs = model.segment(**inputs)
        parts = outputs.grounding.on_patches(sample=0, slot=0)                     # (M, P), one map per concept
        parts.sum(0) + outputs.grounding.offset                                    # = patch_heatmaps[0, 0]
    """

    weights: torch.Tensor
    """w: float (B, K, M), after steering."""
    maps: torch.Tensor
    """|a| relu(ĥ_j(p) - mean ĥ_j): float (B, P, M), 0 at patches that are not of the image."""
    patch_heatmaps: torch.Tensor
    """H_k: float (B, K, P) logits in patch positions."""
    patch_mask: torch.Tensor
    """bool (B, P), the patches that lie on the image."""
    patch_xy: torch.Tensor
    """float (B, P, 2), (x, y) of the patches' centres on F_enc's frame, which is 1 wide and 1 high."""
    upsampling: torch.Tensor
    """A: float (B, h, w, P), at least 0; each cell's row sums to 1 over the patches."""
    offset: torch.Tensor
    """b, a scalar: H_k where no concept fires."""
    key_scale: torch.Tensor
    """scale, a scalar."""
    key_shift: torch.Tensor
    """shift, a scalar."""
    word_positions: torch.Tensor
    """long (B, R), the conclusion's words in `sequences`."""
    word_mask: torch.Tensor
    """bool (B, R), False where a sample has fewer words."""
    word_shares: torch.Tensor
    """α: float (B, K, R)."""
    word_logits: torch.Tensor
    """float (B, K, R, M), what each word adds to s_kj; with `logit_bias` the sum over words is s_kj."""
    logit_bias: torch.Tensor
    """float (B, K, M), the part of s_kj that no word gave."""

    def on_patches(self, sample: int, slot: int) -> torch.Tensor:
        """Each concept's contribution in patch positions.

        Args:
            sample: place in the batch.
            slot: k.

        Returns:
            float (M, P); their sum plus `offset` is `patch_heatmaps[sample, slot]`.
        """
        return (self.weights[sample, slot] * self.maps[sample]).mT

    def on_keys(self, sample: int, slot: int) -> torch.Tensor:
        """Each concept's contribution to the heatmap in the image encoder's grid.

        Args:
            sample: place in the batch.
            slot: k.

        Returns:
            float (M, h, w); their sum plus `key_offset` is `heatmaps[sample, slot]`.
        """
        parts = self.on_patches(sample, slot)  # (M, P)
        with torch.autocast(parts.device.type, enabled=False):
            return self.key_scale * torch.einsum("hwp,mp->mhw", self.upsampling[sample], parts)

    @property
    def key_offset(self) -> torch.Tensor:
        """The heatmap in the image encoder's grid where no concept fires, a scalar."""
        return self.key_scale * self.offset + self.key_shift


class GuidedUpsampling(nn.Module):
    """A(q, p): from patches to the image encoder's grid. Rows sum to 1, so what is linear in the patches stays so.

    Args:
        config: SegCompassConfig.

    Example:
        upsampling = GuidedUpsampling(config)
        weights = upsampling(keys, patch_xy, patch_size, patch_mask)            # (B, h, w, P)
        heatmaps = torch.einsum("bhwp,bkp->bkhw", weights, patch_heatmaps)
    """

    def __init__(self, config: Any):
        super().__init__()
        self.query = nn.Linear(config.key_channels, GUIDE_WIDTH)
        self.key = nn.Linear(config.key_channels, GUIDE_WIDTH)
        self.log_sigma = nn.Parameter(torch.empty(1))

    def forward(
        self, keys: torch.Tensor, patch_xy: torch.Tensor, patch_size: torch.Tensor, patch_mask: torch.Tensor
    ) -> torch.Tensor:
        """Which patches each cell is read from: near ones whose image keys resemble its own.

        Args:
            keys: float (B, d_k, h, w), image keys K.
            patch_xy: float (B, P, 2), (x, y) of the patches' centres on the frame, which is 1 wide and 1 high.
            patch_size: float (B, P or 1, 2), the patches' width and height there, above 0.
            patch_mask: bool (B, P), the patches that lie on the image, at least one per sample.

        Returns:
            float32 (B, h, w, P), at least 0; sums to 1 over the patches, and is 0 where `patch_mask` is False.
        """
        height, width = keys.shape[-2:]
        # bilinear: the mean of the four cells around a patch's centre
        grid = 2 * patch_xy[:, None].to(keys.dtype) - 1  # (B, 1, P, 2)
        at_patches = nn.functional.grid_sample(keys, grid, padding_mode="border", align_corners=False)[:, :, 0]
        likeness = self.query(keys.flatten(2).mT) @ self.key(at_patches.mT).mT * GUIDE_WIDTH**-0.5  # (B, h·w, P)
        xy, size = patch_xy.float(), patch_size.float()
        across = (torch.arange(width, device=keys.device) + 0.5) / width  # (w,)
        down = (torch.arange(height, device=keys.device) + 0.5) / height  # (h,)
        across = ((across[:, None] - xy[:, None, :, 0]) / size[:, None, :, 0]).square()  # (B, w, P), in patches
        down = ((down[:, None] - xy[:, None, :, 1]) / size[:, None, :, 1]).square()  # (B, h, P)
        distance = down[:, :, None] + across[:, None]  # (B, h, w, P)
        scores = likeness.float().view_as(distance) - distance * torch.exp(-2 * self.log_sigma.float()) / 2
        return scores.masked_fill(~patch_mask[:, None, None], float("-inf")).softmax(-1)


class GroundedReading(nn.Module):
    """Words -> concepts -> places -> heatmaps and confidences, each step a method.

    `forward` reads codes, such as cached ones, without any MLLM; `ground` reads hidden states. For counterfactual
    training `weigh` takes the logits of places from elsewhere than those of looks.

    Args:
        config: SegCompassConfig, for `grounded_rank`, `grounded_map`, `look_concepts`, `place_concepts`,
            `place_share`, `tied_place_share`, `phrase_window` and `place_spread`.

    Example:
        reading = GroundedReading(config)
        read = reading(word_codes, word_states, word_mask, patch_codes, patch_mask, patch_xy)
        other = reading.weigh(read.logits[[1]], fires, place_logits=read.logits[[0]])   # another's looks, own places
    """

    spread: torch.Tensor

    def __init__(self, config: Any):
        super().__init__()
        rank, d_sae, slots = config.grounded_rank, config.sae_config.d_sae, config.num_slots
        width = config.get_text_config().hidden_size
        self.look_concepts = min(config.look_concepts, d_sae)
        self.place_concepts = min(config.place_concepts, d_sae)
        self.place_share, self.tied_place_share = config.place_share, config.tied_place_share
        self.place_spread, self.maps_places_only = config.place_spread, config.grounded_map == "places"
        self.soft = False
        """True shares a slot among all concepts that fire, not the heaviest few: for the first steps of training."""
        self.word_norm = nn.LayerNorm(width)
        self.word_key = nn.Linear(width, SLOT_KEY_WIDTH)
        self.slot_queries = nn.Parameter(torch.empty(slots, SLOT_KEY_WIDTH))
        self.end_bias = nn.Parameter(torch.empty(slots))
        """what a slot's attention adds per log(1 + words that follow)."""
        self.reach = nn.Parameter(torch.empty(config.phrase_window))
        """κ: σ(κ_o) of what a word says is heard o words later."""
        # single numbers are vectors of one: FSDP shards no scalars
        self.same_concept = nn.Parameter(torch.empty(1))  # γ
        self.word_side: Any = nn.Parameter(torch.empty(d_sae, rank)) if rank else None  # U
        self.patch_side: Any = nn.Parameter(torch.empty(d_sae, rank)) if rank else None  # V
        self.concept_bias = nn.Parameter(torch.empty(d_sae))  # β
        self.slot_bias = nn.Parameter(torch.empty(slots, d_sae))  # B, read at places only
        self.gain = nn.Parameter(torch.empty(1))  # a
        self.offset = nn.Parameter(torch.empty(1))  # b
        self.confidence_concepts = nn.Parameter(torch.empty(d_sae))  # u
        self.confidence_map = nn.Parameter(torch.empty(2))  # v_1, v_2
        self.confidence_bias = nn.Parameter(torch.empty(1))  # v_0
        self.upsampling = GuidedUpsampling(config)
        self.key_scale = nn.Parameter(torch.empty(1))
        self.key_shift = nn.Parameter(torch.empty(1))
        self.register_buffer("spread", torch.ones(d_sae))

    @torch.no_grad()
    def init_weights(self) -> None:
        """The start of training. Until `spread` is measured, every concept counts as a look."""
        init.normal_(self.slot_queries, std=0.5)
        if self.word_side is not None:
            init.normal_(self.word_side, std=0.03)
            init.normal_(self.patch_side, std=0.1)
        for zero in (self.end_bias, self.concept_bias, self.slot_bias, self.confidence_concepts):
            init.zeros_(zero)
        init.zeros_(self.confidence_bias)
        init.zeros_(self.key_shift)
        init.constant_(self.same_concept, 3.0)
        init.constant_(self.gain, 3.0)
        init.constant_(self.offset, -2.0)
        init.constant_(self.confidence_map, 0.5)
        init.constant_(self.key_scale, 1.0)
        init.constant_(self.upsampling.log_sigma, -0.5)
        start = torch.tensor([3.0, 2.0, 1.5, 1.0])[: len(self.reach)]
        init.copy_(self.reach, torch.cat([start, torch.full((len(self.reach) - len(start),), -2.0)]))
        init.ones_(self.spread)

    def _load_from_state_dict(self, state_dict, prefix, *args, **kwargs):
        with_vectors(state_dict, prefix)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    @property
    def is_place(self) -> torch.Tensor:
        """The concepts that say where, bool (d_sae,): their mean map covers little of the image."""
        return self.spread < self.place_spread

    # -- words -------------------------------------------------------------------------------------------------------

    def read_words(self, codes: torch.Tensor, states: torch.Tensor, word_mask: torch.Tensor) -> WordReading:
        """Let each slot read the conclusion.

        Args:
            codes: float (B, R, d_sae), relative strengths h_j / usual_j at the words, in order.
            states: float (B, R, d_π), the words' last hidden states.
            word_mask: bool (B, R), True at words; they come first.

        Returns:
            WordReading.
        """
        codes = codes.clamp(max=MAX_WORD_STRENGTH) * word_mask[..., None]
        heard = self.reach.sigmoid()
        phrases = codes * heard[0]  # (B, R, d_sae)
        for back in range(1, min(len(heard), codes.shape[1])):
            earlier = nn.functional.pad(codes[:, :-back] * heard[back], (0, 0, back, 0))
            phrases = torch.maximum(phrases, earlier)
        scores = self.slot_queries @ self.word_key(self.word_norm(states)).mT * self.slot_queries.shape[1] ** -0.5
        follow = (word_mask.sum(1, keepdim=True) - 1 - torch.arange(codes.shape[1], device=codes.device)).clamp_min(0)
        scores = scores.float() + self.end_bias[:, None] * follow.float().log1p()[:, None]  # (B, K, R)
        shares = scores.masked_fill(~word_mask[:, None], torch.finfo(scores.dtype).min).softmax(-1)
        shares = (shares * word_mask[:, None]).to(codes.dtype)
        return WordReading(shares, phrases, shares @ phrases)

    def concept_logits(self, strengths: torch.Tensor, salience: torch.Tensor) -> torch.Tensor:
        """s, what words and image together say for each concept.

        Args:
            strengths: float (B, K, d_sae), t_k.
            salience: float (B, d_sae), m, how far each concept stands out on the image; no gradient goes through it.

        Returns:
            float (B, K, d_sae).
        """
        logits = self.same_concept * strengths.clamp(max=ENOUGH) * salience.clamp(max=ENOUGH)[:, None]
        if self.word_side is not None:
            mapped = (strengths @ self.word_side) @ self.patch_side.mT
            logits = logits + (mapped * self.is_place if self.maps_places_only else mapped)
        return logits + self._logit_bias()

    def _logit_bias(self):
        return self.concept_bias + self.slot_bias * self.is_place  # (K, d_sae)

    # -- concepts ----------------------------------------------------------------------------------------------------

    def weigh(
        self,
        look_logits: torch.Tensor,
        fires: torch.Tensor,
        place_logits: torch.Tensor | None = None,
        place_share: torch.Tensor | float | None = None,
    ) -> torch.Tensor:
        """Share each slot among the heaviest looks and, for ρ of it, the heaviest places.

        Args:
            look_logits: float (..., d_sae), read at looks.
            fires: bool (..., d_sae), the concepts that fire somewhere on the image; it broadcasts.
            place_logits: float (..., d_sae), read at places; None takes `look_logits`.
            place_share: ρ, in [0, 1), a number or float (..., 1); None takes the configuration's, as without a tie.

        Returns:
            float (..., d_sae), at least 0; sums to 1 where both groups have a concept that fires.
        """
        place_logits = look_logits if place_logits is None else place_logits
        place_share = self.place_share if place_share is None else place_share
        places = self._share(place_logits, fires & self.is_place, self.place_concepts)
        return (1 - place_share) * self._looks(look_logits, fires) + place_share * places

    @property
    def minds_ties(self) -> bool:
        """Whether ties change anything, so that they are looked for."""
        return self.tied_place_share > self.place_share

    def _looks(self, logits, fires):
        return self._share(logits, fires & ~self.is_place, self.look_concepts)

    def _heaviest_looks(self, logits, fires):
        """Shares, of what these have together, and features of each slot's heaviest looks, (B, K, n) each."""
        shares, features = self._looks(logits, fires).topk(self.look_concepts, dim=-1)
        return shares / shares.sum(-1, keepdim=True).clamp_min(LEAST), features

    @torch.no_grad()
    def share_of_places(self, looks: torch.Tensor, patch_xy: torch.Tensor, patch_mask: torch.Tensor) -> torch.Tensor:
        """ρ_tied where looks are there over more of the image than one thing covers, else ρ.

        Args:
            looks: float (B, K, P) in [0, 1], L_k = how far all looks of the slot are there, see `all_present`.
            patch_xy: float (B, P, 2), (x, y) of the patches' centres on the frame, which is 1 wide and 1 high.
            patch_mask: bool (B, P), the patches that lie on the image.

        Returns:
            float (B, K, 1), `tied_place_share` where the patches with L_k of at least 0.4 of its maximum, weighted by
            L_k, have a standard deviation above 0.15 in the direction in which they scatter most, else `place_share`.
        """
        looks = (looks * patch_mask[:, None]).float()
        looks = looks * (looks >= THERE * looks.amax(-1, keepdim=True))  # (B, K, P)
        shares, xy = looks / looks.sum(-1, keepdim=True).clamp_min(LEAST), patch_xy.float()
        middle = (shares[..., None] * xy[:, None]).sum(-2, keepdim=True)  # (B, K, 1, 2)
        x, y = (xy[:, None] - middle).unbind(-1)  # (B, K, P)
        xx, yy, xy = (shares * x * x).sum(-1), (shares * y * y).sum(-1), (shares * x * y).sum(-1)  # (B, K)
        widest = (xx + yy) / 2 + torch.hypot((xx - yy) / 2, xy)  # the greater eigenvalue of the covariance
        tied = widest[..., None] > ONE_THING**2
        return torch.where(tied, self.tied_place_share, self.place_share)

    def _share(self, logits, allowed, count):
        logits = logits.float().masked_fill(~allowed, float("-inf"))
        if self.soft:
            heaviest, places = logits, torch.arange(logits.shape[-1], device=logits.device).expand_as(logits)
        else:
            heaviest, places = logits.topk(count, dim=-1)  # (..., count)
        found = heaviest.isfinite()
        shares = heaviest.masked_fill(~found, torch.finfo(heaviest.dtype).min).softmax(-1) * found
        return torch.zeros_like(logits).scatter(-1, places, shares)

    # -- places ------------------------------------------------------------------------------------------------------

    def concept_maps(self, codes: torch.Tensor, patch_mask: torch.Tensor) -> torch.Tensor:
        """|a| relu(ĥ_j(p) - mean ĥ_j): what a concept does everywhere says nothing about a place.

        Args:
            codes: float (B, P, M), relative strengths at the patches.
            patch_mask: bool (B, P), the patches that lie on the image.

        Returns:
            float32 (B, P, M), at least 0, and 0 at other patches.
        """
        return self.gain.float().abs() * centred(codes, patch_mask)

    def heat(self, weights: torch.Tensor, maps: torch.Tensor) -> torch.Tensor:
        """H_k(p) = b + Σ_j w_kj maps_j(p).

        Args:
            weights: float (B, K, M).
            maps: float (B, P, M), from `concept_maps`.

        Returns:
            float32 (B, K, P) logits.
        """
        with torch.autocast(maps.device.type, enabled=False):
            return weights.float() @ maps.float().mT + self.offset.float()

    def confidence(self, strengths: torch.Tensor, heatmaps: torch.Tensor, patch_mask: torch.Tensor) -> torch.Tensor:
        """c_k = u · t_k + v_1 max H_k + v_2 (mean of the four greatest H_k) + v_0, from named concepts too.

        Args:
            strengths: float (B, K, d_sae), t_k.
            heatmaps: float (B, K, P), H_k.
            patch_mask: bool (B, P), the patches that lie on the image.

        Returns:
            float (B, K) logits.
        """
        highest = heatmaps.masked_fill(~patch_mask[:, None], float("-inf"))
        highest = highest.topk(min(HIGHEST_PATCHES, highest.shape[-1]), dim=-1).values  # (B, K, 4)
        found = highest.isfinite()
        mean = highest.masked_fill(~found, 0).sum(-1) / found.sum(-1).clamp_min(1)
        shown = torch.stack([highest[..., 0].masked_fill(~found[..., 0], 0), mean], -1)  # (B, K, 2)
        return (
            strengths @ self.confidence_concepts
            + shown.to(strengths.dtype) @ self.confidence_map
            + (self.confidence_bias)
        )

    # -- the whole ---------------------------------------------------------------------------------------------------

    def forward(
        self,
        word_codes: torch.Tensor,
        word_states: torch.Tensor,
        word_mask: torch.Tensor,
        patch_codes: torch.Tensor,
        patch_mask: torch.Tensor,
        patch_xy: torch.Tensor,
    ) -> PatchReading:
        """Read codes, such as cached ones, without an MLLM; dense in d_sae.

        Args:
            word_codes: float (B, R, d_sae), relative strengths h_j / usual_j at the conclusion's words.
            word_states: float (B, R, d_π), the words' last hidden states.
            word_mask: bool (B, R), True at words; they come first.
            patch_codes: float (B, P, d_sae), relative strengths at the patches.
            patch_mask: bool (B, P), the patches that lie on the image.
            patch_xy: float (B, P, 2), (x, y) of the patches' centres on the frame, which is 1 wide and 1 high.

        Returns:
            PatchReading.
        """
        words = self.read_words(word_codes, word_states, word_mask)
        salience = centred(patch_codes, patch_mask).amax(1).detach()  # (B, d_sae)
        maps = self.concept_maps(patch_codes, patch_mask)
        logits = self.concept_logits(words.strengths, salience.to(words.strengths.dtype))
        fires = (salience > 0)[:, None]  # (B, 1, d_sae)
        share = None
        if self.minds_ties:
            looks, columns = self._heaviest_looks(logits, fires)
            chosen = maps.gather(2, columns.flatten(1)[:, None].expand(-1, maps.shape[1], -1))  # (B, P, K · n)
            share = self.share_of_places(all_present(chosen, looks), patch_xy, patch_mask)
        weights = self.weigh(logits, fires, place_share=share)
        heatmaps = self.heat(weights, maps)
        confidences = self.confidence(words.strengths, heatmaps, patch_mask)
        return PatchReading(words, logits, weights, maps, heatmaps, confidences)

    def ground(
        self,
        sae: SparseAutoencoder,
        word_z: torch.Tensor,
        word_states: torch.Tensor,
        word_mask: torch.Tensor,
        patch_z: torch.Tensor,
        patch_mask: torch.Tensor,
        patch_xy: torch.Tensor,
        steering: Any = None,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
        """Read hidden states; of the patches' codes only the columns of concepts with a weight are held: all if `soft`.

        Args:
            sae: the frozen SAE.
            word_z: float (B, R, d_π), the conclusion's words at the SAE's layer.
            word_states: float (B, R, d_π), the same words' last hidden states.
            word_mask: bool (B, R), True at words; they come first.
            patch_z: float (B, P, d_π), the patches at the SAE's layer.
            patch_mask: bool (B, P), the patches that lie on the image.
            patch_xy: float (B, P, 2), (x, y) of the patches' centres on the frame, which is 1 wide and 1 high.
            steering: interventions.Steering on the weights, or None.

        Returns:
            Indices of the M concepts with a weight, long (B, M), heaviest first; confidences (B, K); the concepts'
            activations h_j, at words float (B, R, M) and at patches (B, P, M), one after the other (B, R + P, M); and
            the fields of Grounding that need no image keys and no positions.
        """
        with torch.autocast(patch_z.device.type, enabled=False):  # a sum is exact in one precision only
            return self._ground(sae, word_z, word_states, word_mask, patch_z, patch_mask, patch_xy, steering)

    def _ground(self, sae, word_z, word_states, word_mask, patch_z, patch_mask, patch_xy, steering):
        dtype = self.concept_bias.dtype
        usual = sae.mean_active_activation.clamp_min(1e-6)
        word_h = sae.encode(word_z) * word_mask[..., None]  # (B, R, d_sae)
        words = self.read_words((word_h / usual).to(dtype), word_states.to(dtype), word_mask)
        salience, smallest = _stand_out(sae, patch_z, patch_mask)  # (B, d_sae), (B, P)
        salience = (salience / usual).to(dtype)
        fires = salience > 0
        logits, strengths = self.concept_logits(words.strengths, salience), words.strengths
        share = None
        if self.minds_ties:
            looks, columns = self._heaviest_looks(logits, fires[:, None])
            maps = sae.encode_selected(patch_z, columns.flatten(1), smallest) / usual[columns.flatten(1)][:, None]
            share = self.share_of_places(all_present(centred(maps, patch_mask), looks), patch_xy, patch_mask)
        weights = self.weigh(logits, fires[:, None], place_share=share)  # (B, K, d_sae)
        count = len(self.slot_queries) * (self.look_concepts + self.place_concepts)
        if steering is not None:
            weights, strengths = steering.apply(weights, strengths, fires)
            count += steering.features_added
        count = weights.shape[-1] if self.soft else min(count, weights.shape[-1])
        indices = weights.detach().amax(1).topk(count, dim=-1).indices  # (B, M)
        columns = indices[:, None]  # (B, 1, M)
        weights = weights.gather(2, columns.expand(-1, weights.shape[1], -1))  # (B, K, M)

        if self.soft:  # all of them: no copy of W_enc's columns is needed
            patch_h = sae.encode(patch_z).gather(2, columns.expand(-1, patch_z.shape[1], -1))
        else:
            patch_h = sae.encode_selected(patch_z, indices, smallest)
        patch_h = patch_h * patch_mask[..., None]  # (B, P, M)
        maps = self.concept_maps(patch_h / usual[columns], patch_mask)
        heatmaps = self.heat(weights, maps)
        confidences = self.confidence(strengths, heatmaps, patch_mask)
        activations = torch.cat([word_h.gather(2, columns.expand(-1, word_h.shape[1], -1)), patch_h], 1).detach()
        account = dict(
            weights=weights,
            maps=maps,
            patch_heatmaps=heatmaps,
            patch_mask=patch_mask,
            offset=self.offset.float()[0],
            key_scale=self.key_scale.float()[0],
            key_shift=self.key_shift.float()[0],
            word_mask=word_mask,
            word_shares=words.shares,
            word_logits=self._word_logits(words, salience, indices),
            logit_bias=self._logit_bias()[:, indices].transpose(0, 1).detach(),  # (B, K, M)
        )
        return indices, confidences, activations, account

    @torch.no_grad()
    def _word_logits(self, words, salience, indices):
        """What each word adds to s_kj of the M concepts, float (B, K, R, M): a capped sum is shared in proportion."""
        of_words = indices[:, None].expand(-1, words.phrases.shape[1], -1)  # (B, R, M)
        of_slots = indices[:, None].expand(-1, words.strengths.shape[1], -1)  # (B, K, M)
        said = words.phrases.gather(2, of_words)  # (B, R, M)
        cap = (ENOUGH / words.strengths.gather(2, of_slots).clamp_min(1e-6)).clamp(max=1)  # (B, K, M)
        cap = self.same_concept * cap * salience.gather(1, indices).clamp(max=ENOUGH)[:, None]
        logits = words.shares[..., None] * said[:, None] * cap[:, :, None]  # (B, K, R, M)
        if self.word_side is not None:
            mapped = (words.phrases @ self.word_side) @ self.patch_side[indices].mT  # (B, R, M)
            if self.maps_places_only:
                mapped = mapped * self.is_place[indices][:, None]
            logits = logits + words.shares[..., None] * mapped[:, None]
        return logits

    def to_keys(self, heatmaps: torch.Tensor, upsampling: torch.Tensor) -> torch.Tensor:
        """Heatmaps in the image encoder's grid: float (B, K, P) and A (B, h, w, P) -> float32 (B, K, h, w)."""
        with torch.autocast(heatmaps.device.type, enabled=False):
            raised = torch.einsum("bhwp,bkp->bkhw", upsampling.float(), heatmaps.float())
            return self.key_scale.float() * raised + self.key_shift.float()


@torch.no_grad()
def _stand_out(sae, z, token_mask):
    """max_p h_j - mean_p h_j over the marked tokens, float (B, d_sae), and each token's smallest activation (B, P)."""
    salience, smallest = [], z.new_zeros(token_mask.shape, dtype=sae.W_enc.dtype)
    step = max(1, MAX_ELEMENTS // sae.config.d_sae)
    for row, marked in enumerate(token_mask):
        at = marked.nonzero()[:, 0]
        total = highest = sae.W_enc.new_zeros(sae.config.d_sae)
        for part in at.split(step):
            h = sae.encode(z[row, part])  # (n, d_sae)
            total, highest = total + h.sum(0), torch.maximum(highest, h.amax(0))
            smallest[row, part] = h.masked_fill(h <= 0, torch.finfo(h.dtype).max).amin(1)
        mean = total / max(1, len(at))
        # equal everywhere, but for rounding, is not standing out
        salience.append((highest - mean).masked_fill(highest - mean <= 1e-5 * highest, 0))
    return torch.stack(salience), smallest


def centred(codes: torch.Tensor, patch_mask: torch.Tensor) -> torch.Tensor:
    """relu(ĥ_j(p) - mean ĥ_j), the mean over the image's patches.

    Args:
        codes: float (B, P, M), relative strengths at the patches.
        patch_mask: bool (B, P), the patches that lie on the image.

    Returns:
        float32 (B, P, M), at least 0, and 0 at other patches.
    """
    inside = patch_mask[..., None].to(torch.float32)  # (B, P, 1)
    codes = codes.float() * inside
    mean = codes.sum(1, keepdim=True) / inside.sum(1, keepdim=True).clamp_min(1)
    return torch.relu(codes - mean) * inside


def all_present(maps: torch.Tensor, shares: torch.Tensor) -> torch.Tensor:
    """L_k(p) = Π_j max(0.02, maps_j(p) / max_p maps_j)^share_j: a look that is not there outweighs the others.

    Args:
        maps: float (B, P, K · n), at least 0, the maps of each slot's n looks, slot by slot.
        shares: float (B, K, n), of the slot; they sum to 1, or to 0 for a slot without looks.

    Returns:
        float (B, K, P) in [0, 1]; 0 where none of the slot's looks is there, be it for rounding.
    """
    there = (maps / maps.amax(1, keepdim=True).clamp_min(LEAST)).clamp_min(ABSENT)  # (B, P, K · n)
    there = (there.unflatten(2, shares.shape[1:]).log() * shares[:, None]).sum(-1).exp()  # (B, P, K)
    some = ((maps > LEAST).unflatten(2, shares.shape[1:]) & (shares > 0)[:, None]).any(-1)  # (B, P, K)
    return (there * some).mT


def concept_spread(mean_maps: torch.Tensor) -> torch.Tensor:
    """Over which share of the image each concept is at home: looks are wide, places narrow.

    Args:
        mean_maps: float (P, d_sae), the mean of `centred` at P places of the frame, over many images.

    Returns:
        float (d_sae,) in (0, 1], exp(entropy) / P of each concept's map; 1 for a concept that never fired. It goes into
        `GroundedReading.spread`.
    """
    total = mean_maps.sum(0)
    p = mean_maps / total.clamp_min(1e-12)
    entropy = -(p * p.clamp_min(1e-12).log()).sum(0)
    return torch.where(total > 0, entropy.exp() / len(mean_maps), torch.ones_like(total))
