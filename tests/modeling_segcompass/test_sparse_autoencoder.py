import json
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import AutoModel, PreTrainedConfig, PreTrainedModel

from segcompass.modeling_segcompass import sae_activations
from segcompass.modeling_segcompass.configuration_segcompass import SparseAutoencoderConfig
from segcompass.modeling_segcompass.modeling_sparse_autoencoder import SparseAutoencoder
from segcompass.modeling_segcompass.sae_activations import GROUP, features_at_once

D_IN, D_SAE = 16, 96
ROOT = Path(__file__).parents[2]
NEEDS_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


def build_sae(dtype=torch.float32, **kwargs):
    torch.manual_seed(0)
    sae = SparseAutoencoder(SparseAutoencoderConfig(d_in=D_IN, d_sae=D_SAE, layer=2, **kwargs)).to(dtype)
    with torch.no_grad():
        for parameter in (sae.b_enc, sae.b_dec):
            parameter.normal_(std=0.3)
        sae.W_dec.mul_(torch.linspace(0.5, 2, D_SAE)[:, None])
        sae.mean_active_activation.uniform_(1, 3)
        if hasattr(sae, "threshold"):
            sae.threshold.copy_(torch.linspace(0.2, 1.2, D_SAE))
    return sae


VARIANTS = [{}, {"activation": "topk", "k": 5}, {"activation": "batchtopk", "k": 5}, {"activation": "jumprelu"}]
VARIANTS += [{"activation": "matryoshka", "k": 5}]


@pytest.fixture
def z():
    return torch.randn(23, D_IN, generator=torch.Generator().manual_seed(1))


def test_fresh_atoms_have_norm_one_and_the_encoder_is_their_transpose():
    sae = SparseAutoencoder(SparseAutoencoderConfig(d_in=D_IN, d_sae=D_SAE))
    torch.testing.assert_close(sae.W_dec.norm(dim=1), torch.ones(D_SAE))
    assert torch.equal(sae.W_enc, sae.W_dec.T)
    assert not sae.b_enc.any() and not sae.b_dec.any()
    assert torch.equal(sae.mean_active_activation, torch.ones(D_SAE))


def test_forward_gives_eq_7_with_the_penalty_weighted_by_decoder_norms(z):
    sae = build_sae(l1_coefficient=0.7)
    output = sae(z)
    h = torch.clamp(z @ sae.W_enc + sae.b_enc, min=0)
    z_hat = h @ sae.W_dec + sae.b_dec
    mse = ((z - z_hat) ** 2).sum() / len(z)
    l1 = sum(h[:, j].sum() * sae.W_dec[j].norm() for j in range(D_SAE)) / len(z)
    torch.testing.assert_close(output.feature_acts, h)
    torch.testing.assert_close(output.reconstruction, z_hat)
    torch.testing.assert_close(output.mse, mse)
    torch.testing.assert_close(output.penalty, l1)
    torch.testing.assert_close(output.loss, mse + 0.7 * l1)
    assert output.l0.item() == pytest.approx((h != 0).sum().item() / len(z))


@pytest.mark.parametrize("shape", [(23,), (2, 3), ()])
def test_relu_gives_the_gradients_of_the_dense_computation(shape):
    """Its backward pass is written out; here autograd goes through dense products, a dead atom included."""
    sae = build_sae(torch.float64, l1_coefficient=0.7)
    with torch.no_grad():
        sae.W_dec[3] = 0
    z = torch.randn(*shape, D_IN, dtype=torch.float64, requires_grad=True)
    inputs = (z, sae.W_enc, sae.b_enc, sae.W_dec, sae.b_dec)
    output = sae(z)
    h = torch.clamp(z @ sae.W_enc + sae.b_enc, min=0)
    z_hat = h @ sae.W_dec + sae.b_dec
    loss = ((z - z_hat) ** 2).sum(-1).mean() + 0.7 * (h @ sae.W_dec.norm(dim=1)).mean()
    torch.testing.assert_close(output.active, (h > 0).sum(-1).float())
    torch.testing.assert_close(output.fired, (h > 0).view(-1, D_SAE).sum(0).float())
    weights = torch.randn_like(h)
    for ours, dense in (
        (output.loss, loss),
        (output.loss + (weights * output.feature_acts).sum(), loss + (weights * h).sum()),
        (output.penalty, (h @ sae.W_dec.norm(dim=1)).mean()),
        (output.feature_acts.sum() + output.reconstruction.sum(), h.sum() + z_hat.sum()),
    ):
        torch.testing.assert_close(ours, dense)
        for mine, reference in zip(
            torch.autograd.grad(ours, inputs, retain_graph=True, allow_unused=True, materialize_grads=True),
            torch.autograd.grad(dense, inputs, retain_graph=True, allow_unused=True, materialize_grads=True),
            strict=True,
        ):
            torch.testing.assert_close(mine, reference)


def test_penalty_is_not_gamed_by_moving_norm_from_activations_to_atoms(z):
    sae = build_sae()
    before = sae(z)
    with torch.no_grad():
        sae.W_enc.div_(10)
        sae.b_enc.div_(10)
        sae.W_dec.mul_(10)
    after = sae(z)
    torch.testing.assert_close(after.penalty, before.penalty)
    torch.testing.assert_close(after.loss, before.loss)


def test_topk_keeps_the_k_largest_and_has_no_penalty(z):
    sae = build_sae(activation="topk", k=5, l1_coefficient=0.7)
    dense = torch.relu(z @ sae.W_enc + sae.b_enc)
    output = sae(z)
    assert (output.feature_acts != 0).sum(1).max() <= 5
    torch.testing.assert_close(output.feature_acts.topk(5).values, dense.topk(5).values)
    torch.testing.assert_close(output.feature_acts, dense * (output.feature_acts != 0))
    assert torch.equal(output.loss, output.mse)
    assert output.l0.item() == 5


@pytest.mark.parametrize("activation", ["topk", "batchtopk"])
def test_kept_features_give_the_loss_and_gradients_of_the_dense_computation(activation):
    """The same loss from a dense mask, by autograd through dense products."""
    sae = build_sae(torch.float64, activation=activation, k=5).train()
    z = torch.randn(23, D_IN, dtype=torch.float64, requires_grad=True)
    inputs = (z, sae.W_enc, sae.b_enc, sae.W_dec, sae.b_dec)
    output = sae(z)
    h = torch.relu(z @ sae.W_enc + sae.b_enc)
    with torch.no_grad():
        smallest = h.topk(5).values[:, -1:] if activation == "topk" else h.flatten().topk(5 * 23).values[-1]
    h = h * (h >= smallest)
    z_hat = h @ sae.W_dec + sae.b_dec
    mse = ((z - z_hat) ** 2).sum(1).mean()
    torch.testing.assert_close(output.reconstruction, z_hat)
    torch.testing.assert_close(output.feature_acts, h)
    torch.testing.assert_close(output.loss, mse)
    torch.testing.assert_close(output.active, (h > 0).sum(1).float())
    torch.testing.assert_close(output.fired, (h > 0).sum(0).float())
    for ours, reference in zip(
        torch.autograd.grad(output.loss + output.feature_acts.square().sum(), inputs),
        torch.autograd.grad(mse + h.square().sum(), inputs),
        strict=True,
    ):
        torch.testing.assert_close(ours, reference)


@pytest.mark.parametrize("widths", [None, [1, 96], [10, 30, 96], [96]])
def test_matryoshka_fits_each_nested_dictionary_alone(widths):
    """Value and gradients of the mean over dense reconstructions from the first features only."""
    sae = build_sae(torch.float64, activation="matryoshka", k=5, nested_widths=widths).train()
    z = torch.randn(2, 11, D_IN, dtype=torch.float64, requires_grad=True)
    inputs = (z, sae.W_enc, sae.b_enc, sae.W_dec, sae.b_dec)
    output = sae(z)
    h = torch.relu(z @ sae.W_enc + sae.b_enc)
    h = h * (h >= h.detach().flatten().topk(5 * 22).values[-1])
    errors = []
    for width in widths or [3, 9, 21, 45, 96]:
        z_hat = h[..., :width] @ sae.W_dec[:width] + sae.b_dec
        errors.append(((z - z_hat) ** 2).sum(-1).mean())
    torch.testing.assert_close(output.feature_acts, h)
    torch.testing.assert_close(output.reconstruction, z_hat)
    torch.testing.assert_close(output.mse, errors[-1])
    torch.testing.assert_close(output.misfit, sum(errors) / len(errors))
    assert torch.equal(output.loss, output.misfit)
    for ours, reference in zip(
        torch.autograd.grad(output.loss, inputs), torch.autograd.grad(sum(errors) / len(errors), inputs), strict=True
    ):
        torch.testing.assert_close(ours, reference)


def test_matryoshka_without_nesting_is_batchtopk(z):
    nested, plain = (
        build_sae(activation=name, k=5, nested_widths=[D_SAE]).train()(z) for name in ("matryoshka", "batchtopk")
    )
    torch.testing.assert_close(nested.loss, plain.loss)
    torch.testing.assert_close(nested.reconstruction, plain.reconstruction)


def test_batchtopk_shares_k_per_token_over_the_batch_and_then_uses_a_threshold(z):
    sae = build_sae(activation="batchtopk", k=5).train()
    sae.threshold.zero_()
    dense = torch.relu(z @ sae.W_enc + sae.b_enc)
    output = sae(z)
    kept = dense.flatten().topk(5 * len(z)).values
    assert output.l0.item() == pytest.approx(5)
    assert output.active.unique().numel() > 1
    torch.testing.assert_close(sae.threshold, kept.min().expand(D_SAE))  # the first batch sets it
    before = sae.threshold.clone()
    sae(3 * z)
    assert (sae.threshold > before).all() and (sae.threshold < 2 * before).all()  # later ones move it a little
    before = sae.threshold.clone()
    sae.eval()
    torch.testing.assert_close(sae(z).feature_acts, dense * (dense > before))
    assert torch.equal(sae.threshold, before)


def test_a_token_is_encoded_alike_alone_and_in_a_batch(z):
    for options in VARIANTS:
        sae = build_sae(**options).train()  # a frozen SAE inside a training model is in training mode too
        torch.testing.assert_close(sae.encode(z)[3], sae.encode(z[3]))


def test_jumprelu_is_off_up_to_its_threshold_and_pays_for_each_active_feature(z):
    sae = build_sae(activation="jumprelu", l0_coefficient=0.3)
    pre = z @ sae.W_enc + sae.b_enc
    output = sae(z)
    h = pre * (pre > sae.threshold)
    torch.testing.assert_close(output.feature_acts, h)
    torch.testing.assert_close(output.loss, output.mse + 0.3 * (h > 0).sum(1).float().mean())


def test_jumprelu_thresholds_get_the_gradient_of_the_smoothed_loss():
    """With a window of pre-activations spread evenly, the estimate equals a finite difference of the true loss."""
    torch.manual_seed(0)
    sae = SparseAutoencoder(
        SparseAutoencoderConfig(d_in=1, d_sae=1, activation="jumprelu", l0_coefficient=0.1, bandwidth=0.02)
    ).double()
    with torch.no_grad():
        for parameter, value in ((sae.W_enc, 1.0), (sae.W_dec, 0.9), (sae.threshold, 0.7)):
            parameter.fill_(value)
    z = torch.linspace(0, 2, 40_001, dtype=torch.float64)[:, None]
    sae(z).loss.backward()
    estimate, losses = sae.threshold.grad.item(), []
    for threshold in (0.69, 0.71):
        with torch.no_grad():
            sae.threshold.fill_(threshold)
        losses.append(sae(z).loss.item())
    assert estimate == pytest.approx((losses[1] - losses[0]) / 0.02, rel=2e-2)


def test_feature_acts_are_left_out_when_not_asked_for(z):
    for options in VARIANTS:
        output = build_sae(**options)(z, output_feature_acts=False)
        assert output.feature_acts is None and output.reconstruction is not None


@pytest.mark.parametrize("options", VARIANTS)
def test_counts_say_where_and_how_often_features_are_active(z, options):
    output = build_sae(**options).eval()(z)
    on = (output.feature_acts > 0).float()
    torch.testing.assert_close(output.active, on.sum(1))
    torch.testing.assert_close(output.fired, on.sum(0))
    torch.testing.assert_close(output.l0.detach(), on.sum(1).mean())


@pytest.mark.parametrize("shape", [(3, 4, D_IN), (D_IN,)])
def test_encode_and_decode_take_any_leading_dimensions(shape):
    sae = build_sae(activation="topk", k=5)
    z = torch.randn(shape)
    h = sae.encode(z)
    assert h.shape == (*shape[:-1], D_SAE)
    assert sae.decode(h).shape == shape


def test_half_precision_hidden_states_are_computed_in_the_weights_dtype(z):
    sae = build_sae()
    assert sae.encode(z.bfloat16()).dtype == torch.float32
    torch.testing.assert_close(sae.encode(z.bfloat16()), sae.encode(z.bfloat16().float()))


@pytest.mark.parametrize("options", [VARIANTS[0], *VARIANTS[2:]])
def test_selected_features_equal_the_dense_path_in_value_and_gradient(options):
    sae = build_sae(torch.float64, **options)
    z = torch.randn(11, D_IN, dtype=torch.float64, requires_grad=True)
    indices = torch.tensor([7, 0, 95, 31])
    upstream = torch.randn(11, 4, dtype=torch.float64)
    inputs = (z, sae.W_enc, sae.b_enc)
    selected, dense = sae.encode_selected(z, indices), sae.encode(z)[:, indices]
    torch.testing.assert_close(selected, dense, rtol=1e-12, atol=1e-12)
    for ours, reference in zip(
        torch.autograd.grad(selected, inputs, upstream), torch.autograd.grad(dense, inputs, upstream), strict=True
    ):
        torch.testing.assert_close(ours, reference, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("options", VARIANTS)
def test_selected_features_of_each_sample_are_those_of_the_dense_code(options):
    sae = build_sae(torch.float64, **options)
    z = torch.randn(2, 11, D_IN, dtype=torch.float64)
    mask = torch.rand(2, 11) > 0.2
    indices = torch.stack([torch.randperm(D_SAE)[:7] for _ in range(2)])
    dense = sae.encode(z)
    strongest, smallest = sae.max_over_tokens(z, mask, max_elements=2 * D_SAE * 3)
    # where features do not compete, the search may be in half precision
    torch.testing.assert_close(strongest, (dense * mask[..., None]).amax(1), atol=5e-2, rtol=5e-2)
    selected = sae.encode_selected(z, indices, smallest)
    for row in range(2):
        torch.testing.assert_close(selected[row], dense[row][:, indices[row]], rtol=1e-12, atol=1e-12)


def test_a_gpu_searches_features_in_whole_groups_and_a_cpu_as_many_as_fit():
    for tokens in (1, 16 * 690, 2**20):
        on_gpu = features_at_once(2**23, tokens, on_gpu=True)
        assert on_gpu % GROUP == 0 and on_gpu >= GROUP
        assert on_gpu <= max(GROUP, 2**23 // tokens) < on_gpu + GROUP
        assert features_at_once(2**23, tokens, on_gpu=False) == 2**23 // tokens
    assert features_at_once(4, 5, on_gpu=False) == 1


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=NEEDS_GPU)])
def test_the_search_in_groups_finds_what_the_search_of_all_at_once_finds(monkeypatch, device):
    sae = build_sae().to(device)
    z, mask = torch.randn(2, 11, D_IN, device=device), torch.rand(2, 11, device=device) > 0.2
    monkeypatch.setattr(sae_activations, "features_at_once", lambda *args: D_SAE)
    whole, _ = sae.max_over_tokens(z, mask)
    monkeypatch.setattr(sae_activations, "features_at_once", features_at_once)
    monkeypatch.setattr(sae_activations, "GROUP", 32)
    in_groups, _ = sae.max_over_tokens(z, mask, max_elements=2 * 11 * 50)  # 50 features, or 32 of them
    torch.testing.assert_close(in_groups, whole, atol=2e-2, rtol=2e-2)  # half precision
    with torch.no_grad():
        dense = (sae.encode(z) * mask[..., None]).amax(1)
    torch.testing.assert_close(in_groups, dense, atol=5e-2, rtol=5e-2)


@pytest.mark.parametrize("options", VARIANTS)
@pytest.mark.parametrize("max_active", [3, 9, D_SAE])
def test_sparse_pairs_are_the_strongest_features_of_the_dense_code(z, options, max_active):
    sae = build_sae(**options)
    indices, values = sae.encode_sparse(z, max_active, chunk_size=10)
    dense = sae.encode(z)
    assert indices.shape == values.shape == (len(z), max_active) and indices.dtype == torch.long
    torch.testing.assert_close(values, dense.topk(max_active).values)
    assert (values.diff(dim=1) <= 0).all()
    active = values > 0
    torch.testing.assert_close(values[active], dense.gather(1, indices)[active])
    assert not indices[~active].any()
    if max_active == D_SAE:
        torch.testing.assert_close(torch.zeros_like(dense).scatter_add(1, indices, values), dense)


def test_sparse_pairs_carry_no_gradient(z):
    assert not build_sae().encode_sparse(z.requires_grad_(), 4)[1].requires_grad


def test_sparse_pairs_of_no_tokens_are_empty():
    indices, values = build_sae().encode_sparse(torch.zeros(0, D_IN), 4)
    assert indices.shape == values.shape == (0, 4)


@pytest.mark.parametrize("max_active", [0, D_SAE + 1])
def test_asking_for_more_features_than_there_are_is_refused(z, max_active):
    with pytest.raises(ValueError, match=rf"max_active is {max_active}.*{D_SAE} features.*choose"):
        build_sae().encode_sparse(z, max_active)


@pytest.mark.parametrize(
    "call",
    [
        lambda sae, z: sae(z),
        lambda sae, z: sae.encode(z),
        lambda sae, z: sae.encode_selected(z, torch.tensor([0])),
        lambda sae, z: sae.encode_sparse(z, 3),
    ],
)
def test_hidden_states_of_another_width_are_refused(call):
    with pytest.raises(ValueError, match="17 wide.*reads 16.*layer 2 of tiny/backbone"):
        call(build_sae(backbone="tiny/backbone"), torch.zeros(2, 17))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"activation": "gelu"}, "activation is 'gelu'; choose one of"),
        ({"activation": "topk", "k": 97}, "k is 97, but the SAE has 96 features"),
        ({"activation": "batchtopk", "k": 97}, "k is 97, but the SAE has 96 features"),
        ({"activation": "matryoshka", "nested_widths": [8, 4, 96]}, r"nested_widths is \[8, 4, 96\]; they must grow"),
        ({"activation": "matryoshka", "nested_widths": [8, 64]}, "to d_sae=96, the whole dictionary"),
        ({"activation": "matryoshka", "nested_widths": [0, 96]}, "from at least 1"),
        ({"k": 0}, "k is 0"),
        ({"l0_coefficient": -1.0}, "l0_coefficient is -1.0"),
        ({"bandwidth": 0.0}, "bandwidth is 0.0; it must be positive"),
    ],
)
def test_impossible_configurations_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        SparseAutoencoderConfig(d_in=D_IN, d_sae=D_SAE, **options)


@pytest.mark.parametrize("options", VARIANTS)
def test_saving_and_loading_is_exact(z, tmp_path, options):
    sae = build_sae(backbone="tiny/backbone", **options)
    sae.save_pretrained(tmp_path)
    loads = [SparseAutoencoder.from_pretrained(tmp_path) for _ in range(2)]
    for loaded in loads:
        assert loaded.state_dict().keys() == sae.state_dict().keys() >= {"mean_active_activation"}
        assert all(torch.equal(value, sae.state_dict()[name]) for name, value in loaded.state_dict().items())
        assert torch.equal(loaded.eval()(z).loss, sae.eval()(z).loss)
        assert (loaded.config.backbone, loaded.config.layer) == ("tiny/backbone", 2)
        assert loaded.config.activation == sae.config.activation


class OuterConfig(PreTrainedConfig):
    model_type = "outer_of_sae"
    sub_configs = {"sae_config": SparseAutoencoderConfig}

    def __init__(self, sae_config=None, **kwargs):
        self.sae_config = SparseAutoencoderConfig(**sae_config) if isinstance(sae_config, dict) else sae_config
        super().__init__(**kwargs)


class Outer(PreTrainedModel):
    config_class = OuterConfig

    def __init__(self, config):
        super().__init__(config)
        self.sae = SparseAutoencoder(config.sae_config)
        self.head = nn.Linear(D_IN, 2)
        self.post_init()


def test_inside_another_model_it_initialises_itself():
    sae = Outer(OuterConfig(sae_config=SparseAutoencoderConfig(d_in=D_IN, d_sae=D_SAE))).sae
    torch.testing.assert_close(sae.W_dec.norm(dim=1), torch.ones(D_SAE))
    assert torch.equal(sae.W_enc, sae.W_dec.T)


def test_inside_another_model_it_is_loaded_exactly(tmp_path):
    torch.manual_seed(0)
    outer = Outer(OuterConfig(sae_config=SparseAutoencoderConfig(d_in=D_IN, d_sae=D_SAE)))
    outer.sae.load_state_dict(build_sae().state_dict())
    outer.save_pretrained(tmp_path)
    loaded = Outer.from_pretrained(tmp_path)
    assert all(torch.equal(value, outer.state_dict()[name]) for name, value in loaded.state_dict().items())


NAMES = ["W_enc", "b_enc", "W_dec", "b_dec", "mean_active_activation", "threshold"]


@pytest.mark.parametrize("name", NAMES)
def test_a_weight_missing_from_the_folder_is_an_error_that_names_it(name, tmp_path):
    sae = build_sae(activation="jumprelu")
    sae.save_pretrained(tmp_path, state_dict={key: w for key, w in sae.state_dict().items() if key != name})
    with pytest.raises(ValueError, match=rf"does not match this model \(missing_keys: 1 \({name}"):
        SparseAutoencoder.from_pretrained(tmp_path)


def test_a_folder_with_other_weights_is_refused(tmp_path):
    sae = build_sae()
    sae.save_pretrained(tmp_path, state_dict={"foo": torch.zeros(1)})
    with pytest.raises(ValueError, match="missing_keys: 5 .*unexpected_keys: 1 .foo"):
        SparseAutoencoder.from_pretrained(tmp_path)
    sae.save_pretrained(tmp_path, state_dict={**sae.state_dict(), "extra": torch.zeros(1)})
    with pytest.raises(ValueError, match="unexpected_keys: 1 .extra"):
        SparseAutoencoder.from_pretrained(tmp_path)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_number_that_is_not_finite_is_an_error_that_names_its_tensor(name, value, tmp_path):
    sae = build_sae(activation="jumprelu")
    sae.state_dict()[name].view(-1)[3] = value
    sae.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=f"holds NaN or infinity in 1 tensors .{name}"):
        SparseAutoencoder.from_pretrained(tmp_path)


def test_a_folder_without_configuration_or_with_another_models_is_refused_at_once(tmp_path, monkeypatch):
    build_sae().save_pretrained(tmp_path)
    monkeypatch.setattr(SparseAutoencoder, "__init__", None)  # nothing is built
    with pytest.raises(ValueError, match="holds a 'segcompass' model, where 'segcompass_sae' is needed"):
        SparseAutoencoder.from_pretrained(ROOT / "examples" / "checkpoints" / "mini")
    (tmp_path / "config.json").unlink()
    with pytest.raises(OSError, match=r"holds no config\.json"):
        SparseAutoencoder.from_pretrained(tmp_path)
    with pytest.raises(OSError, match=r"holds no config\.json"):
        SparseAutoencoderConfig.from_pretrained(tmp_path)


def test_configurations_written_before_the_newer_fields_load_unchanged(z, tmp_path):
    sae = build_sae(activation="topk", k=5)
    sae.save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    config = json.loads(path.read_text())
    for name in ("l0_coefficient", "bandwidth", "dataset", "token_window", "nested_widths"):
        del config[name]
    path.write_text(json.dumps(config))
    loaded = SparseAutoencoder.from_pretrained(tmp_path)
    assert torch.equal(loaded.encode(z), sae.encode(z))


def test_it_loads_from_a_subfolder_and_through_auto_classes(z, tmp_path):
    sae = build_sae(activation="jumprelu", dataset="scenes", token_window=160)
    sae.save_pretrained(tmp_path / "sae")
    for loaded in (
        SparseAutoencoder.from_pretrained(tmp_path, subfolder="sae"),
        AutoModel.from_pretrained(tmp_path, subfolder="sae"),
    ):
        assert torch.equal(loaded.encode(z), sae.encode(z))
        assert (loaded.config.dataset, loaded.config.token_window) == ("scenes", 160)
