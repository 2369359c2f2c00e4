"""Training and evaluation of the sparse autoencoder (section 3.2, Eq. 7, appendix A.1) on transformers' Trainer.

Knows nothing about where hidden states come from: a dataset of ready-made (N, d_in) batches is all it reads, see
`trainers.activations.ActivationDataset`.

Hidden states come at any scale and with any offset, and both spoil the conditioning of the problem. Training therefore
runs in a frame z' = (z - mean) / scale, with mean and scale measured first, in which the variance is d_in. As the
activation is homogeneous, only the biases differ between the frames:

    h = scale * act(z' W_enc + b_enc'),  b_enc = scale * b_enc' - mean W_enc,  b_dec = scale * b_dec' + mean

Everything that leaves the trainer (checkpoints, evaluation, the trained model) reads raw hidden states.
"""

from collections.abc import Iterable
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from accelerate.utils import broadcast
from torch.utils.data import DataLoader, IterableDataset
from transformers import Trainer, TrainerCallback, TrainingArguments

from modeling_segcompass.modeling_sparse_autoencoder import SparseAutoencoder


@dataclass
class SparseAutoencoderTrainerConfig(TrainingArguments):
    """Training arguments of a sparse autoencoder; learning rate, warm-up and schedule default to appendix A.1.

    The number of tokens in a step is the dataset's `batch_size`; `per_device_train_batch_size` is not read. As the
    data are streamed, `max_steps` says how long to train.
    """

    learning_rate: float = field(default=5e-5, metadata={"help": "Peak learning rate. Small SAEs take more, 1e-3."})
    warmup_steps: float = field(default=0.03, metadata={"help": "Warm-up, as a share of the steps or their number."})
    lr_scheduler_type: str = field(default="cosine", metadata={"help": "Learning rate schedule."})
    l1_coefficient: float = field(
        default=5.0,
        metadata={
            "help": "α of Eq. 7 for hidden states scaled to unit variance a dimension ('relu' only). The trained "
            "model's config holds its value for raw hidden states."
        },
    )
    l1_warmup: float = field(default=0.05, metadata={"help": "Share of the steps over which α grows from 0."})
    dead_window: int = field(
        default=1_000_000,
        metadata={
            "help": "A feature is dead when it was active on none of this many tokens; the dead are then revived."
        },
    )
    revive_until: float = field(
        default=0.8, metadata={"help": "Share of the steps after which dead features are left alone."}
    )
    calibration_tokens: int = field(
        default=65_536, metadata={"help": "Tokens from which the hidden states' mean and scale are measured."}
    )
    strength_tokens: int = field(
        default=262_144, metadata={"help": "Tokens over which `usual_strength` is measured after training."}
    )


def take_tokens(activations: Iterable[torch.Tensor], num_tokens: int) -> Iterable[torch.Tensor]:
    """Yield batches (N, d_in) until they hold `num_tokens` tokens or run out; the last batch is not cut."""
    for z in activations:
        yield z
        num_tokens -= len(z)
        if num_tokens <= 0:
            return


@torch.no_grad()
def evaluate_sae(sae: SparseAutoencoder, activations: Iterable[torch.Tensor]) -> dict[str, float]:
    """Score an autoencoder on hidden states (N, d_in) it has not been trained on.

    Returns:
        `explained_variance` 1 - Σ_d Var(z - ẑ) / Σ_d Var(z), variances over all tokens (a constant bias of ẑ is
        forgiven; `mse` counts it); `l0` active features a token; `l0_share` l0 / d_sae; `dead_share` share of features
        active on none of the tokens; `mse` mean of ||z - ẑ||²; `tokens` how many were seen, without which `dead_share`
        says little.

    Raises:
        ValueError: `activations` is empty, or of another width than the autoencoder's.
    """
    tokens = 0
    moments = torch.zeros(4, sae.config.d_in, dtype=torch.float64, device=sae.device)
    counts = torch.zeros(sae.config.d_sae, dtype=torch.long, device=sae.device)
    for z in activations:
        z = z.to(sae.device)
        output = sae(z)
        tokens += len(z)
        counts += torch.count_nonzero(output.feature_acts, dim=0)
        z = z.double()
        residual = z - output.reconstruction
        moments += torch.stack([x.sum(0) for x in (z, z.square(), residual, residual.square())])
    if not tokens:
        raise ValueError(
            "there are 0 activations to evaluate on; give an iterable of (N, d_in) tensors, N of at least 1."
        )
    mean, square, residual_mean, residual_square = moments / tokens
    unexplained = (residual_square - residual_mean.square()).sum() / (square - mean.square()).sum()
    l0 = counts.sum().item() / tokens
    return {
        "explained_variance": 1 - unexplained.item(),
        "l0": l0,
        "l0_share": l0 / sae.config.d_sae,
        "dead_share": (counts == 0).double().mean().item(),
        "mse": residual_square.sum().item(),
        "tokens": tokens,
    }


@torch.no_grad()
def measure_usual_strength(sae: SparseAutoencoder, activations: Iterable[torch.Tensor]) -> None:
    """Set `sae.usual_strength` to each feature's mean activation over the tokens where it is active.

    A feature that is never active keeps 1.
    """
    total = torch.zeros(sae.config.d_sae, dtype=torch.float64, device=sae.device)
    counts = torch.zeros_like(total)
    for z in activations:
        h = sae.encode(z.to(sae.device))
        total += h.sum(0)
        counts += torch.count_nonzero(h, dim=0)
    sae.usual_strength.copy_(torch.where(counts > 0, total / counts.clamp(min=1), 1.0))


class SparseAutoencoderTrainer(Trainer):
    """Trains a `SparseAutoencoder` on batches of hidden states.

    Decoder rows have norm 1 after every step, their norm moving into the encoder. Features dead for `dead_window`
    tokens are revived: they restart in the direction of what the last batch reconstructs worst. Logs explained
    variance (as `evaluate_sae`, but of each batch, over the steps since the last log), L0 and the dead share; a revived
    feature counts as alive until another window has passed.

    Args:
        model: the autoencoder; one whose biases are zero is taken for untrained and starts at the activations' mean.
        args: `SparseAutoencoderTrainerConfig`.
        train_dataset, eval_dataset: iterable datasets of (N, d_in) float tensors, which can be gone through repeatedly.
    """

    def __init__(
        self,
        model: SparseAutoencoder,
        args: SparseAutoencoderTrainerConfig,
        train_dataset: IterableDataset | None = None,
        eval_dataset: IterableDataset | None = None,
        **kwargs,
    ):
        super().__init__(model=model, args=args, train_dataset=train_dataset, eval_dataset=eval_dataset, **kwargs)
        self.add_callback(_AfterStep(self))
        self._frame = None  # (mean (d_in,), scale) while the weights are those of the training frame
        self._tokens_since_active = torch.zeros(model.config.d_sae, dtype=torch.long, device=args.device)
        self._tokens_since_revival = 0
        self._running = {}
        self._last_batch = None

    def train(self, *args, **kwargs):
        """Train, as `Trainer.train`; then bring the weights to raw hidden states and measure `usual_strength`."""
        self._frame = self._measure_activations()
        if self.model.b_enc.any() or self.model.b_dec.any():
            self._enter_frame()
        else:
            self._scale_encoder()
        try:
            output = super().train(*args, **kwargs)
        finally:
            self._leave_frame()
            self._frame = None
        measure_usual_strength(self.model, take_tokens(self.train_dataset, self.args.strength_tokens))
        self.model.usual_strength.copy_(broadcast(self.model.usual_strength))
        return output

    def get_train_dataloader(self):
        # Batches are ready made and each process makes its own, so accelerate has nothing to batch or dispatch.
        return DataLoader(self.train_dataset, batch_size=None, collate_fn=_as_inputs)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        mean, scale = self._frame
        z = (inputs["hidden_states"] - mean) / scale
        outputs = model(hidden_states=z)
        loss = outputs.mse
        if self.model.config.activation == "relu":
            warmup = self.args.l1_warmup * self.state.max_steps
            loss = (
                loss + self.args.l1_coefficient * min(1.0, (self.state.global_step + 1) / max(warmup, 1)) * outputs.l1
            )
        self._follow(z, outputs)
        loss = loss / self.model.config.d_in  # the variance: the loss is the unexplained share plus the penalty
        return (loss, outputs) if return_outputs else loss

    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix="eval"):
        """Run `evaluate_sae` on the evaluation dataset; metrics carry the prefix `eval_`."""
        with self._raw_weights():
            metrics = evaluate_sae(self.model, self.eval_dataset if eval_dataset is None else eval_dataset)
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in metrics.items()}
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def log(self, logs, start_time=None):
        if "loss" in logs and self._running:
            running = self.accelerator.reduce(self._running)
            logs["explained_variance"] = 1 - (running["residual_variance"] / running["variance"]).item()
            logs["l0"] = (running["active"] / running["tokens"]).item()
            logs["dead_share"] = (self._tokens_since_active >= self.args.dead_window).float().mean().item()
            self._running = {}
        super().log(logs, start_time)

    @torch.no_grad()
    def _measure_activations(self):
        """Mean (d_in,) and scale, the root of the variance a dimension, of the first `calibration_tokens` tokens."""
        moments = torch.zeros(2, self.model.config.d_in, dtype=torch.float64, device=self.args.device)
        tokens = torch.zeros((), dtype=torch.float64, device=self.args.device)
        for z in take_tokens(self.train_dataset, self.args.calibration_tokens):
            z = z.to(self.args.device).double()
            moments += torch.stack([z.sum(0), z.square().sum(0)])
            tokens += len(z)
        mean, square = self.accelerator.reduce(moments) / self.accelerator.reduce(tokens)
        scale = (square - mean.square()).mean().sqrt()
        if not scale > 0:
            raise ValueError(
                f"the activations' standard deviation is {scale.item()} over {int(tokens)} tokens; it must be "
                "positive: give a train_dataset with activations that vary."
            )
        return mean.float(), scale.float()

    @torch.no_grad()
    def _scale_encoder(self):
        """Scale an untrained encoder so that the first batch is reconstructed with the least error.

        The transposed decoder alone overshoots: hundreds of random atoms answer every token.
        """
        mean, scale = self._frame
        z = (next(iter(self.train_dataset)).to(self.args.device) - mean) / scale
        z_hat = self.model(z).reconstruction
        self.model.W_enc.mul_(broadcast((z * z_hat).sum() / z_hat.square().sum()))

    @torch.no_grad()
    def _enter_frame(self):
        mean, scale = self._frame
        self.model.b_enc.add_(mean @ self.model.W_enc).div_(scale)
        self.model.b_dec.sub_(mean).div_(scale)

    @torch.no_grad()
    def _leave_frame(self):
        mean, scale = self._frame
        self.model.b_enc.mul_(scale).sub_(mean @ self.model.W_enc)
        self.model.b_dec.mul_(scale).add_(mean)
        if self.model.config.activation == "relu":
            self.model.config.l1_coefficient = self.args.l1_coefficient * scale.item()

    @contextmanager
    def _raw_weights(self):
        """Within it the model reads raw hidden states; afterwards it is bit for bit what it was."""
        if self._frame is None:
            yield
            return
        biases = self.model.b_enc.detach().clone(), self.model.b_dec.detach().clone()
        self._leave_frame()
        try:
            yield
        finally:
            with torch.no_grad():
                self.model.b_enc.copy_(biases[0])
                self.model.b_dec.copy_(biases[1])

    def _save(self, output_dir=None, state_dict=None):
        with self._raw_weights():
            super()._save(output_dir, None if self._frame else state_dict)

    def _load_from_checkpoint(self, resume_from_checkpoint, model=None):
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        self._enter_frame()

    def _load_best_model(self):
        super()._load_best_model()
        self._enter_frame()

    @torch.no_grad()
    def _follow(self, z, outputs):
        residual = z - outputs.reconstruction
        fired = outputs.feature_acts.sign().sum(0, dtype=torch.float32)
        tokens = torch.tensor(len(z), device=z.device)
        statistics = {
            "variance": len(z) * z.var(0, correction=0).sum(),
            "residual_variance": len(z) * residual.var(0, correction=0).sum(),
            "active": fired.sum(),
            "tokens": tokens,
        }
        for name, value in statistics.items():
            self._running[name] = self._running.get(name, 0) + value
        self._tokens_since_active += self.accelerator.reduce(tokens)
        self._tokens_since_active[self.accelerator.reduce(fired) > 0] = 0
        self._tokens_since_revival += len(z) * self.accelerator.num_processes
        self._last_batch = z, residual

    @torch.no_grad()
    def _after_step(self):
        norm = self.model.W_dec.norm(dim=1)
        self.model.W_dec.div_(norm[:, None])
        self.model.W_enc.mul_(norm)
        self.model.b_enc.mul_(norm)
        if self._tokens_since_revival >= self.args.dead_window:
            self._tokens_since_revival = 0
            if self.state.global_step < self.args.revive_until * self.state.max_steps:
                self._revive((self._tokens_since_active >= self.args.dead_window).nonzero().squeeze(1))

    def _revive(self, dead):
        """Point dead features at badly reconstructed tokens, drawn with probability ∝ ||z - ẑ||²; fire on the like."""
        if not len(dead):
            return
        z, residual = self._last_batch
        error = residual.square().sum(1)
        tokens = torch.multinomial(error, len(dead), replacement=len(dead) > int((error > 0).sum()))
        directions = broadcast(torch.nn.functional.normalize(residual[tokens], dim=1))
        projections = broadcast((z[tokens] * directions).sum(1)).clamp(min=0)
        norm = self.model.W_enc.norm(dim=0).mean()
        self.model.W_dec[dead] = directions
        self.model.W_enc[:, dead] = norm * directions.T
        self.model.b_enc[dead] = -norm * projections / 2
        for parameter, rows in (
            (self.model.W_dec, dead),
            (self.model.W_enc, (slice(None), dead)),
            (self.model.b_enc, dead),
        ):
            for state in self.optimizer.state[parameter].values():
                if torch.is_tensor(state) and state.shape == parameter.shape:
                    state[rows] = 0
        self._tokens_since_active[dead] = 0


class _AfterStep(TrainerCallback):
    def __init__(self, trainer):
        self.trainer = trainer

    def on_step_end(self, args, state, control, **kwargs):
        self.trainer._after_step()


def _as_inputs(z):
    return {"hidden_states": z}
