"""The query codebook equals a dense computation written out here, and its provenance is what it says."""

import pytest
import torch
from torch import nn

from segcompass.modeling_segcompass import SegCompassConfig, SparseAutoencoder, SparseAutoencoderConfig
from segcompass.modeling_segcompass.query_codebook import QueryCodebook
from segcompass.modeling_segcompass.token_layout import IMAGE, INSTRUCTION, RESPONSE, token_position_features

BATCH, TOKENS, WIDTH, FEATURES, SLOTS, SELECTED = 3, 17, 12, 60, 2, 10
READINGS = ("feature", "token")
ACTIVATIONS = ("relu", "topk")


def build(reading, activation, seed=0):
    torch.manual_seed(seed)
    text = {"hidden_size": WIDTH, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2}
    config = SegCompassConfig(
        mllm_config={"model_type": "llava", "text_config": text},
        sae_config=SparseAutoencoderConfig(d_in=WIDTH, d_sae=FEATURES, layer=1, activation=activation, k=6),
        num_slots=SLOTS,
        num_concepts=SELECTED,
        concept_reading=reading,
        d_c=8,
        codebook_heads=2,
    )
    sae, codebook = SparseAutoencoder(config.sae_config).double(), QueryCodebook(config).double()
    with torch.no_grad():
        sae.b_enc.copy_(0.3 * torch.randn(FEATURES) - 0.5)
        sae.mean_active_activation.copy_(torch.rand(FEATURES) + 0.5)
        for parameter in codebook.parameters():
            parameter.copy_(0.3 * torch.randn_like(parameter))
    return sae.requires_grad_(False), codebook


def sample(seed=0):
    generator = torch.Generator().manual_seed(seed)
    z = torch.randn(BATCH, TOKENS, WIDTH, generator=generator, dtype=torch.float64).requires_grad_()
    mask = torch.rand(BATCH, TOKENS, generator=generator) > 0.25
    types = torch.randint(0, 3, (BATCH, TOKENS), generator=generator)
    xy = torch.rand(BATCH, TOKENS, 2, generator=generator, dtype=torch.float64)
    distance = torch.arange(TOKENS, 0, -1, dtype=torch.float64).expand(BATCH, -1)
    return z, mask, token_position_features(types, xy, distance)


def attention_block(block, x, valid):
    """One pre-norm encoder block through PyTorch's own attention, on the valid elements of one sample."""
    x = x[valid]
    qkv = nn.functional.linear(block.attention_norm(x), block.qkv.weight, block.qkv.bias)
    q, k, v = (part.view(len(x), block.heads, -1).transpose(0, 1) for part in qkv.chunk(3, -1))
    attention = (q @ k.mT / q.shape[-1] ** 0.5).softmax(-1)
    x = x + block.out((attention @ v).transpose(0, 1).reshape(len(x), -1))
    return x + block.mlp_out(nn.functional.gelu(block.mlp_in(block.mlp_norm(x)))), attention.mean(0)


def dense(codebook, sae, z, mask, where):
    """Eq. 4 with every activation of every token held, sample by sample, without any of the shortcuts."""
    representations, weights = [], []
    for row in range(len(z)):
        h = torch.relu(z[row] @ sae.W_enc + sae.b_enc)
        if sae.config.activation == "topk":
            kept = h >= h.topk(sae.config.k, dim=-1).values[:, -1:]
            h = h * kept
        h = h * mask[row][:, None]  # (T, d_sae)
        selected = (h.amax(0) / sae.mean_active_activation).topk(SELECTED).indices
        outside = torch.ones(FEATURES, dtype=torch.bool).index_fill(0, selected, False)
        h = h.masked_fill(outside, 0)  # still (T, d_sae)
        if codebook.reading == "feature":
            place = (h.T @ where[row]) / h.sum(0).clamp_min(1e-6)[:, None]
            tokens, active = h.amax(0)[:, None] * codebook.codebook + codebook.where(place), h.amax(0) > 0
        else:
            tokens, active = h @ codebook.codebook + codebook.where(where[row]), mask[row] & (h > 0).any(1)
        x = torch.cat([codebook.slot_queries, tokens])
        valid = torch.cat([torch.ones(SLOTS, dtype=torch.bool), active])
        for block in codebook.blocks:
            x_valid, attention = attention_block(block, x, valid)
            x = torch.zeros_like(x).index_put((valid.nonzero()[:, 0],), x_valid)
        share = torch.zeros(SLOTS, len(tokens), dtype=z.dtype)
        share[:, active] = attention[:SLOTS, SLOTS:]
        if codebook.reading == "token":
            parts = h * codebook.codebook.norm(dim=1)
            share = share @ (parts / parts.sum(1, keepdim=True).clamp_min(1e-6))
        weights.append((share / share.sum(1, keepdim=True))[:, selected])
        representations.append(codebook.norm(x[:SLOTS]))
    return torch.stack(representations), torch.stack(weights)


def gradients(value, *leaves):
    probe = torch.linspace(-1, 1, value.numel(), dtype=value.dtype).view_as(value)
    return torch.autograd.grad((value * probe).sum(), leaves)


@pytest.mark.parametrize("reading", READINGS)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_selected_concepts_equal_the_dense_computation(reading, activation):
    sae, codebook = build(reading, activation)
    z, mask, where = sample()
    ours = codebook(sae, z, mask, where)
    representations, weights = dense(codebook, sae, z, mask, where)
    # float64 sums in another order: 1e-9 is far above rounding and far below any real difference
    torch.testing.assert_close(ours.representations, representations, atol=1e-9, rtol=0)
    torch.testing.assert_close(ours.weights, weights, atol=1e-9, rtol=0)
    leaves = (z, codebook.codebook, codebook.slot_queries, codebook.where.weight, codebook.blocks[0].qkv.weight)
    for name, mine, theirs in zip(
        ("z", "codebook", "slot_queries", "where", "qkv"),
        gradients(ours.representations, *leaves),
        gradients(representations, *leaves),
        strict=True,
    ):
        assert mine.abs().max() > 1e-3, f"no gradient reaches {name}"
        torch.testing.assert_close(mine, theirs, atol=1e-9, rtol=0, msg=f"gradient of {name} differs")


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_selection_in_chunks_equals_selection_at_once(activation):
    sae, codebook = build("feature", activation)
    z, mask, _ = sample()
    whole = codebook.select(sae, z, mask)
    chunked = codebook.select(sae, z, mask, max_elements=2 * BATCH * FEATURES)
    assert torch.equal(whole[0], chunked[0])
    if activation == "topk":
        torch.testing.assert_close(whole[1], chunked[1])


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_provenance_is_the_saes_own_activations(activation):
    sae, codebook = build("feature", activation)
    z, mask, where = sample()
    concepts = codebook(sae, z, mask, where)
    h = sae.encode(z) * mask[..., None]
    for row in range(BATCH):
        torch.testing.assert_close(concepts.activations[row], h[row][:, concepts.indices[row]], atol=1e-12, rtol=0)
    torch.testing.assert_close(concepts.values, concepts.activations.amax(1), atol=0, rtol=0)
    relative = concepts.values / sae.mean_active_activation[concepts.indices]
    assert (relative.diff(dim=1) <= 1e-12).all(), "strongest relative to its mean active activation first"


@pytest.mark.parametrize("reading", READINGS)
def test_concept_weights_of_a_slot_sum_to_one(reading):
    sae, codebook = build(reading, "relu")
    concepts = codebook(sae, *sample())
    torch.testing.assert_close(concepts.weights.sum(-1), torch.ones(BATCH, SLOTS, dtype=torch.float64))
    assert (concepts.weights[(concepts.values == 0)[:, None].expand_as(concepts.weights)] == 0).all()


@pytest.mark.parametrize("reading", READINGS)
def test_sample_without_active_concepts_is_finite_and_weighs_none(reading):
    sae, codebook = build(reading, "relu")
    z, mask, where = sample()
    concepts = codebook(sae, z, mask & False, where)
    assert concepts.representations.isfinite().all() and not concepts.weights.any() and not concepts.values.any()
    (gradient,) = torch.autograd.grad(concepts.representations.sum(), codebook.slot_queries)
    assert gradient.isfinite().all()


@pytest.mark.parametrize("reading", READINGS)
def test_masked_tokens_change_nothing(reading):
    sae, codebook = build(reading, "relu")
    z, mask, where = sample()
    first = codebook(sae, z, mask, where)
    second = codebook(sae, torch.where(mask[..., None], z, 100.0), mask, where)
    assert torch.equal(first.indices, second.indices)
    torch.testing.assert_close(first.representations, second.representations, atol=1e-12, rtol=0)
    assert not second.activations[~mask].any()


@pytest.mark.parametrize("reading", READINGS)
def test_scaling_a_concept_to_zero_equals_an_sae_without_it(reading):
    sae, codebook = build(reading, "relu")
    z, mask, where = sample()
    index = int(codebook(sae, z, mask, where).indices[0, 0])
    scale = torch.ones(FEATURES, dtype=torch.float64).index_fill(0, torch.tensor([index]), 0.0)
    scaled = codebook(sae, z, mask, where, scale)
    sae.b_enc[index] = -1e6
    without = codebook(sae, z, mask, where)
    torch.testing.assert_close(scaled.representations, without.representations, atol=1e-12, rtol=0)
    assert not scaled.values[scaled.indices == index].any()


def test_scaling_a_concept_scales_its_strength():
    sae, codebook = build("feature", "relu")
    z, mask, where = sample()
    before = codebook(sae, z, mask, where)
    index = before.indices[0, 3]
    scale = torch.ones(FEATURES, dtype=torch.float64).index_fill(0, index[None], 2.5)
    after = codebook(sae, z, mask, where, scale)
    torch.testing.assert_close(after.values[0][after.indices[0] == index], 2.5 * before.values[0, 3:4])


def test_position_features_distinguish_image_from_text():
    types = torch.tensor([[IMAGE, INSTRUCTION, RESPONSE]])
    near = token_position_features(types, torch.full((1, 3, 2), 0.2), torch.full((1, 3), 3.0))
    moved = token_position_features(types, torch.full((1, 3, 2), 0.7), torch.full((1, 3), 3.0))
    later = token_position_features(types, torch.full((1, 3, 2), 0.2), torch.full((1, 3), 9.0))
    assert (near != moved).any(-1).tolist() == [[True, False, False]]
    assert (near != later).any(-1).tolist() == [[False, True, True]]
    assert (near[0, 1] != near[0, 2]).any()
