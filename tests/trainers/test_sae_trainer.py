import math

import pytest
import torch
from torch.utils.data import IterableDataset

from modeling_segcompass.configuration_segcompass import SparseAutoencoderConfig
from modeling_segcompass.modeling_sparse_autoencoder import SparseAutoencoder
from trainers.sae_trainer import (
    SparseAutoencoderTrainer,
    SparseAutoencoderTrainerConfig,
    evaluate_sae,
    measure_usual_strength,
    take_tokens,
)

D_IN, D_SAE, ATOMS = 16, 64, 32
TOPK = {"activation": "topk", "k": 4}


class Mixtures(IterableDataset):
    """Sums of 3 of 32 atoms, of any scale, around a dense offset; every pass gives the same batches."""

    def __init__(self, batches=100, batch_size=256, scale=1.0, offset=0.0, seed=0):
        generator = torch.Generator().manual_seed(7)
        self.atoms = torch.nn.functional.normalize(torch.randn(ATOMS, D_IN, generator=generator), dim=1)
        self.offset = offset * torch.randn(D_IN, generator=generator)
        self.batches, self.batch_size, self.scale, self.seed = batches, batch_size, scale, seed

    def __iter__(self):
        generator = torch.Generator().manual_seed(self.seed)
        for _ in range(self.batches):
            active = torch.rand(self.batch_size, ATOMS, generator=generator).argsort(dim=1) < 3
            strength = 1 + torch.rand(self.batch_size, ATOMS, generator=generator)
            yield self.scale * ((active * strength) @ self.atoms + self.offset)


def build_sae(**kwargs):
    torch.manual_seed(0)
    return SparseAutoencoder(SparseAutoencoderConfig(d_in=D_IN, d_sae=D_SAE, **kwargs))


def build_trainer(tmp_path, sae, data=None, **kwargs):
    options = dict(
        output_dir=str(tmp_path),
        max_steps=300,
        learning_rate=1e-2,
        l1_coefficient=0.6,
        dead_window=10_000,
        calibration_tokens=8192,
        strength_tokens=8192,
        logging_steps=50,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
    )
    args = SparseAutoencoderTrainerConfig(**{**options, **kwargs})
    return SparseAutoencoderTrainer(sae, args, train_dataset=data or Mixtures(), eval_dataset=Mixtures(8, seed=1))


def test_defaults_are_those_of_the_paper(tmp_path):
    args = SparseAutoencoderTrainerConfig(output_dir=str(tmp_path))
    assert args.learning_rate == 5e-5
    assert args.lr_scheduler_type == "cosine"
    assert args.get_warmup_steps(1000) == 30


@pytest.mark.parametrize("options", [{}, TOPK])
@pytest.mark.parametrize(("scale", "offset"), [(1.0, 0.0), (50.0, 3.0)])
def test_training_reconstructs_raw_hidden_states_of_any_scale_and_offset(tmp_path, options, scale, offset):
    sae = build_sae(**options)
    trainer = build_trainer(tmp_path, sae, Mixtures(scale=scale, offset=offset))
    trainer.train()
    quality = evaluate_sae(sae, Mixtures(8, scale=scale, offset=offset, seed=1))
    assert quality["explained_variance"] > 0.9
    assert quality["l0_share"] < 0.3
    assert quality["dead_share"] < 0.3
    torch.testing.assert_close(sae.W_dec.norm(dim=1), torch.ones(D_SAE))


def test_saved_weights_read_raw_hidden_states_at_a_checkpoint_and_at_the_end(tmp_path):
    sae = build_sae(**TOPK)
    data = Mixtures(scale=20.0, offset=2.0)
    trainer = build_trainer(tmp_path, sae, data, max_steps=100, save_strategy="steps", save_steps=100)
    trainer.train()
    trainer.save_model()
    final = SparseAutoencoder.from_pretrained(tmp_path)
    checkpoint = SparseAutoencoder.from_pretrained(tmp_path / "checkpoint-100")
    for name, value in sae.state_dict().items():
        assert torch.equal(final.state_dict()[name], value)
        if name != "usual_strength":
            assert torch.equal(checkpoint.state_dict()[name], value)
    assert evaluate_sae(final, data)["explained_variance"] > 0.7


def test_the_penalty_in_the_config_is_that_of_raw_hidden_states(tmp_path):
    sae = build_sae()
    data = Mixtures(scale=20.0)
    build_trainer(tmp_path, sae, data, max_steps=2, l1_coefficient=0.5).train()
    tokens = torch.cat(list(take_tokens(data, 8192)))
    assert sae.config.l1_coefficient == pytest.approx(0.5 * tokens.var(0, correction=0).mean().sqrt().item(), rel=1e-4)


def test_resuming_continues_from_the_checkpoint(tmp_path):
    whole, resumed = build_sae(**TOPK), build_sae(**TOPK)
    data = Mixtures(scale=20.0, offset=2.0)
    options = dict(max_steps=60, save_strategy="steps", save_steps=30, dead_window=10**9)
    build_trainer(tmp_path, whole, data, **options).train()
    build_trainer(tmp_path, resumed, data, **options).train(resume_from_checkpoint=str(tmp_path / "checkpoint-30"))
    # Equal up to the rounding of the change of frame, which near-ties among the k largest amplify a little.
    losses = [evaluate_sae(sae, Mixtures(8, scale=20.0, offset=2.0, seed=1))["mse"] for sae in (whole, resumed)]
    assert losses[1] == pytest.approx(losses[0], rel=1e-2)


def test_training_a_trained_autoencoder_again_starts_from_what_it_knows(tmp_path):
    sae = build_sae(**TOPK)
    data = Mixtures(scale=20.0, offset=2.0)
    build_trainer(tmp_path, sae, data).train()
    before = evaluate_sae(sae, data)["mse"]
    build_trainer(tmp_path, sae, data, max_steps=1, learning_rate=1e-9).train()
    # The change of frame and back costs only float32 rounding.
    assert evaluate_sae(sae, data)["mse"] == pytest.approx(before, rel=1e-3)


def test_dead_features_are_revived_and_help(tmp_path):
    deadshares, errors = [], []
    for revive_until in (0.0, 0.8):
        sae = build_sae(**TOPK)
        with torch.no_grad():
            sae.W_enc[:, 16:] = 0  # three in four never win a place among the k largest
        trainer = build_trainer(tmp_path, sae, revive_until=revive_until)
        trainer.train()
        quality = evaluate_sae(sae, Mixtures(8, seed=1))
        deadshares.append(quality["dead_share"])
        errors.append(quality["mse"])
    assert deadshares[0] > 0.7
    assert deadshares[1] < 0.3
    assert errors[1] < 0.85 * errors[0]


def test_revived_features_forget_their_optimizer_state_and_others_keep_theirs(tmp_path):
    sae = build_sae(**TOPK)
    trainer = build_trainer(tmp_path, sae, max_steps=20)
    dead = torch.tensor([3, 40])
    seen = {}

    def revive_once():
        SparseAutoencoderTrainer._after_step(trainer)
        if trainer.state.global_step == 10:
            with torch.no_grad():
                kept = sae.W_dec[4].clone()
                trainer._revive(dead)
            seen["state"] = {n: trainer.optimizer.state[p]["exp_avg"].clone() for n, p in sae.named_parameters()}
            seen["kept"] = torch.equal(kept, sae.W_dec[4])
            seen["cosine"] = torch.cosine_similarity(sae.W_dec[dead], sae.W_enc[:, dead].T)

    trainer._after_step = revive_once
    trainer.train()
    assert not seen["state"]["W_dec"][dead].any() and not seen["state"]["W_enc"][:, dead].any()
    assert seen["state"]["W_dec"].any() and seen["state"]["W_enc"].any() and seen["kept"]
    torch.testing.assert_close(seen["cosine"], torch.ones(2))


def test_logs_name_explained_variance_l0_and_dead_share(tmp_path):
    sae = build_sae(**TOPK)
    trainer = build_trainer(tmp_path, sae)
    trainer.train()
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert len(logs) == 6
    for entry in logs:
        # With "topk" the loss is the unexplained share, up to the reconstruction's constant bias and the calibration.
        assert entry["explained_variance"] == pytest.approx(1 - entry["loss"], abs=0.03)
        assert 0 < entry["l0"] <= 4
        assert 0 <= entry["dead_share"] <= 1
    assert logs[-1]["explained_variance"] > logs[0]["explained_variance"]


def test_evaluation_during_training_leaves_the_training_as_it_was(tmp_path):
    plain, evaluated = build_sae(**TOPK), build_sae(**TOPK)
    data = Mixtures(scale=20.0, offset=2.0)
    build_trainer(tmp_path, plain, data, max_steps=20).train()
    trainer = build_trainer(tmp_path, evaluated, data, max_steps=20, eval_strategy="steps", eval_steps=5)
    trainer.train()
    assert sum("eval_explained_variance" in entry for entry in trainer.state.log_history) == 4
    assert all(torch.equal(value, evaluated.state_dict()[name]) for name, value in plain.state_dict().items())


def test_usual_strength_is_the_mean_over_the_tokens_where_a_feature_is_active():
    sae = build_sae()
    with torch.no_grad():
        sae.b_enc[5] = -1e6
    z = torch.randn(40, D_IN, generator=torch.Generator().manual_seed(0))
    measure_usual_strength(sae, z.split(7))
    h = sae.encode(z)
    for j in (0, 17, 63):
        torch.testing.assert_close(sae.usual_strength[j], h[:, j][h[:, j] > 0].mean())
    assert sae.usual_strength[5] == 1  # never active: not measured


def test_training_measures_usual_strength(tmp_path):
    sae = build_sae(**TOPK)
    data = Mixtures(scale=20.0)
    build_trainer(tmp_path, sae, data, max_steps=100).train()
    trained = sae.usual_strength.clone()
    measure_usual_strength(sae, take_tokens(data, 8192))
    assert torch.equal(trained, sae.usual_strength)
    assert trained.median() > 5  # in units of the raw hidden states, not of the training frame


def test_evaluation_gives_the_named_formulas():
    sae = build_sae()
    with torch.no_grad():
        sae.b_dec.fill_(0.5)  # a constant bias: forgiven by the explained variance, not by the error
        sae.b_enc[:8] = -1e6
    z = torch.randn(50, D_IN, generator=torch.Generator().manual_seed(0)) + 3
    quality = evaluate_sae(sae, z.split(9))
    h = sae.encode(z)
    residual = z - sae.decode(h)
    unexplained = residual.var(0, correction=0).sum() / z.var(0, correction=0).sum()
    active = (h > 0).float()
    expected = {
        "explained_variance": 1 - unexplained.item(),
        "l0": active.sum(1).mean().item(),
        "l0_share": active.mean().item(),
        "dead_share": (active.sum(0) == 0).float().mean().item(),
        "mse": residual.square().sum(1).mean().item(),
        "tokens": 50,
    }
    assert quality.keys() == expected.keys()
    for name, value in expected.items():
        assert math.isclose(quality[name], value, rel_tol=1e-4), name
    assert quality["dead_share"] >= 8 / D_SAE


def test_no_activations_cannot_be_evaluated():
    with pytest.raises(ValueError, match="0 activations"):
        evaluate_sae(build_sae(), [])


def test_activations_that_do_not_vary_cannot_be_trained_on(tmp_path):
    class Constant(IterableDataset):
        def __iter__(self):
            yield from [torch.ones(32, D_IN)] * 4

    with pytest.raises(ValueError, match=r"standard deviation is 0\.0 over 128 tokens"):
        build_trainer(tmp_path, build_sae(), Constant()).train()


def test_taking_tokens_stops_without_asking_for_another_batch():
    def source():
        yield from (torch.zeros(10, 2), torch.zeros(10, 2))
        raise AssertionError("a batch too many")

    assert [len(z) for z in take_tokens(source(), 15)] == [10, 10]
