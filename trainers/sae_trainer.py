"""Training and evaluation of the sparse autoencoder (section 3.2, Eq. 7, appendix A.1) on transformers' Trainer.

Knows nothing about where hidden states come from: a dataset of ready-made (N, d_in) batches is all it reads, see
`trainers.activations.ActivationDataset` and `trainers.activation_cache.CachedActivations`.

Hidden states come at any scale and with any offset, and both spoil the conditioning of the problem. Training therefore
runs in a frame z' = (z - mean) / scale, with mean and scale measured first, in which the variance is d_in. As the
activation is homogeneous, only the biases and thresholds differ between the frames:

    h = scale * act(z' W_enc + b_enc'),  b_enc = scale * b_enc' - mean W_enc,  b_dec = scale * b_dec' + mean

Everything that leaves the trainer (checkpoints, evaluation, the trained model) reads raw hidden states.
"""

import json
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path

import torch
from accelerate.utils import broadcast
from safetensors.torch import load_file, save_file
from torch.utils.data import DataLoader, IterableDataset
from transformers import Trainer, TrainerCallback, TrainingArguments

from segcompass.modeling_segcompass.modeling_sparse_autoencoder import SparseAutoencoder

from .activations import SPECIAL, TOKEN_TYPES, keep_finite

FRAME_FILE = "training_frame.safetensors"
"""What a checkpoint holds beside raw weights, so that resuming is exact: the frame, and all that differs in it."""


@dataclass
class SparseAutoencoderTrainerConfig(TrainingArguments):
    """Training arguments of a sparse autoencoder; learning rate, warm-up and schedule default to appendix A.1.

    The number of tokens in a step is the dataset's `batch_size`; `per_device_train_batch_size` is not read. The data
    are gone through again and again until `max_steps`; `examples/train_sae.py` finds it from `num_train_epochs`.
    """

    num_train_epochs: float = field(default=10, metadata={"help": "Passes over the samples (train_sae.py)."})
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
    l0_coefficient: float = field(
        default=1.0, metadata={"help": "Price of an active feature, on the same scale ('jumprelu' only)."}
    )
    bandwidth: float = field(
        default=0.5, metadata={"help": "Window in which thresholds learn, on the same scale ('jumprelu' only)."}
    )
    l1_warmup: float = field(
        default=0.05, metadata={"help": "Share of the steps over which the sparsity penalty grows from 0."}
    )
    dead_window: int = field(
        default=1_000_000,
        metadata={
            "help": "A feature is dead when it was active on none of this many tokens; the dead are then revived."
        },
    )
    revive_until: float = field(
        default=0.8, metadata={"help": "Share of the steps after which dead features are left alone."}
    )
    on_nonfinite: str = field(
        default="stop",
        metadata={"help": "What a batch with NaN or infinity does: 'stop' the training or be 'skip'ped, whole."},
    )
    calibration_tokens: int = field(
        default=65_536, metadata={"help": "Tokens from which the hidden states' mean and scale are measured."}
    )
    strength_tokens: int = field(
        default=262_144, metadata={"help": "Tokens over which `mean_active_activation` is measured after training."}
    )


def take_tokens(activations: Iterable, num_tokens: int) -> Iterator:
    """Yield batches until they hold `num_tokens` tokens or run out; the last batch is not cut."""
    for batch in activations:
        yield batch
        num_tokens -= len(split_batch(batch)[0])
        if num_tokens <= 0:
            return


def split_batch(batch) -> tuple[torch.Tensor, torch.Tensor | None]:
    """A batch as datasets give it, (N, d_in) alone or with its token types (N,) -> both, the types None if unknown."""
    return (batch, None) if torch.is_tensor(batch) else tuple(batch)


@torch.no_grad()
def evaluate_sae(sae: SparseAutoencoder, activations: Iterable) -> dict:
    """Score an autoencoder on hidden states it has not been trained on: (N, d_in) batches, or pairs with token types.

    Returns:
        `explained_variance` 1 - Σ_d Var(z - ẑ) / Σ_d Var(z), variances over all tokens (a constant bias of ẑ is
        forgiven); `fvu` Σ ||z - ẑ||² / Σ ||z - mean||² (it is counted); `l0` active features a token; `l0_share`
        l0 / d_sae; `dead_share` share of features active on none of the tokens; `mse` mean of ||z - ẑ||²; `l2_ratio`
        mean of ||ẑ|| / ||z||; `relative_reconstruction_bias` Σ ||ẑ||² / Σ z·ẑ, below 1 where ẑ is too short;
        `density_histogram` features by the decade of the share of tokens on which they are active, from the rarest
        (`never`, then `1e-06` for [1e-6, 1e-5), ...); `tokens` how many were seen, without which `dead_share` says
        little. Where the batches name token types, `by_type` holds the same of each type that occurs, and special
        tokens, which no SAE here is trained on, count only there.

    Raises:
        ValueError: `activations` is empty, or of another width than the autoencoder's.
    """
    sums, fired, typed = {}, 0, False
    for batch in activations:
        z, types = split_batch(batch)
        z = z.to(sae.device)
        h = sae.encode(z)
        groups = _groups(types, z, torch.float64)
        on = (h > 0).double()
        z = z.double()
        _add(sums, _moments(z, sae.decode(h).double(), on.sum(1), groups))
        fired = fired + groups.T @ on
        typed |= types is not None
    if not sums:
        raise ValueError(
            "there are 0 activations to evaluate on; give an iterable of (N, d_in) tensors, N of at least 1."
        )
    quality = _quality(sums, fired, 0)
    if typed:
        quality["by_type"] = {
            name: _quality(sums, fired, group) for group, name in enumerate(TOKEN_TYPES, 1) if sums["tokens"][group] > 0
        }
    return quality


def _groups(types, z, dtype):
    """(N, 1 + number of types): a column for all tokens but special ones, then one that marks each type's tokens."""
    if types is None:
        return torch.ones(len(z), 1, dtype=dtype, device=z.device)
    types = types.to(z.device)
    kinds = torch.arange(len(TOKEN_TYPES), device=z.device)
    return torch.cat([(types != SPECIAL)[:, None], types[:, None] == kinds], 1).to(dtype)


def _moments(z, z_hat, active, groups):
    """Sums over the tokens of each group, from which `_quality` comes; (G,) or (G, d_in) each."""
    residual = z - z_hat
    columns = {
        "square": z.square().sum(1),
        "residual_square": residual.square().sum(1),
        "reconstruction_square": z_hat.square().sum(1),
        "product": (z * z_hat).sum(1),
        "active": active.to(groups.dtype),
    }
    columns["ratio"] = (columns["reconstruction_square"] / columns["square"].clamp_min(1e-30)).sqrt()
    sums = {name: groups.T @ column for name, column in columns.items()}
    return sums | {"tokens": groups.sum(0), "sum": groups.T @ z, "residual_sum": groups.T @ residual}


def _add(sums, more):
    for name, value in more.items():
        sums[name] = sums.get(name, 0) + value


def _variances(sums, group):
    """Variance of z and of z - ẑ over the tokens of a group, summed over dimensions."""
    tokens = sums["tokens"][group]
    return [
        sums[square][group] / tokens - (sums[mean][group] / tokens).square().sum()
        for square, mean in (("square", "sum"), ("residual_square", "residual_sum"))
    ]


def _quality(sums, fired, group):
    tokens = sums["tokens"][group]
    variance, residual_variance = _variances(sums, group)
    l0 = (sums["active"][group] / tokens).item()
    density = fired[group] / tokens
    decades = density[density > 0].log10().floor().clamp(-6, -1).long()
    return {
        "explained_variance": 1 - (residual_variance / variance).item(),
        "fvu": (sums["residual_square"][group] / tokens / variance).item(),
        "l0": l0,
        "l0_share": l0 / len(density),
        "dead_share": (density == 0).double().mean().item(),
        "mse": (sums["residual_square"][group] / tokens).item(),
        "l2_ratio": (sums["ratio"][group] / tokens).item(),
        "relative_reconstruction_bias": (sums["reconstruction_square"][group] / sums["product"][group]).item(),
        "density_histogram": {"never": int((density == 0).sum())}
        | {f"1e-{-decade:02d}": int((decades == decade).sum()) for decade in range(-6, 0)},
        "tokens": int(tokens),
    }


@torch.no_grad()
def measure_usual_strength(sae: SparseAutoencoder, activations: Iterable) -> None:
    """Set `sae.mean_active_activation` to each feature's mean activation over the tokens where it is active.

    A feature that is never active keeps 1.
    """
    total = torch.zeros(sae.config.d_sae, dtype=torch.float64, device=sae.device)
    counts = torch.zeros_like(total)
    for batch in activations:
        h = sae.encode(split_batch(batch)[0].to(sae.device))
        total += h.sum(0)
        counts += torch.count_nonzero(h, dim=0)
    sae.mean_active_activation.copy_(torch.where(counts > 0, total / counts.clamp(min=1), 1.0))


def last_checkpoint(folder: str | Path) -> str | None:
    """The newest checkpoint in a folder that was written to its end, or None: a kill may have cut off the newest."""
    found = sorted(Path(folder).glob("checkpoint-*"), key=lambda path: int(path.name.rpartition("-")[2]), reverse=True)
    for path in found:
        try:
            json.loads((path / "trainer_state.json").read_text())  # the Trainer writes it last
        except (OSError, ValueError):
            continue
        if (path / FRAME_FILE).exists():
            return str(path)
    return None


class _Endless(IterableDataset):
    """Pass after pass over a dataset; batches of the wrong width or with NaN or infinity are found out here."""

    def __init__(self, dataset, d_in, on_nonfinite):
        self.dataset = dataset
        self.d_in = d_in
        self.on_nonfinite = on_nonfinite

    def __iter__(self):
        for number in count():
            yield from self.one_pass(number)

    def one_pass(self, number=0):
        """The batches of a pass. Raises ValueError when there is none, so that no loop waits for one for ever."""
        if hasattr(self.dataset, "set_epoch"):
            self.dataset.set_epoch(number)
        empty = True
        for index, batch in enumerate(self.dataset):
            z, _ = split_batch(batch)
            if z.shape[-1] != self.d_in:
                raise ValueError(
                    f"batch {index} of the training data is {z.shape[-1]} wide, but the SAE reads {self.d_in}; "
                    "gather hidden states of its backbone, or make an SAE of this width."
                )
            if keep_finite(z, f"batch {index} of the training data", self.on_nonfinite):
                empty = False
                yield batch
        if empty:
            raise ValueError(
                "train_dataset gives 0 activations to train on; it is empty, or every batch of it was skipped."
            )


class SparseAutoencoderTrainer(Trainer):
    """Trains a `SparseAutoencoder` on batches of hidden states.

    Decoder rows have norm 1 after every step, their norm moving into the encoder. Features dead for `dead_window`
    tokens are revived: they restart in the direction of what the last batch reconstructs worst. Logs explained
    variance (as `evaluate_sae`, over the steps since the last log), L0, density (L0 / d_sae) and the dead share, the
    first three also for each token type the data name; a revived feature counts as alive until another window has
    passed.

    Resuming is exact: a training that was cut off ends with the same weights as one that was not.

    Args:
        model: the autoencoder; one whose biases are zero is taken for untrained and starts at the activations' mean.
        args: `SparseAutoencoderTrainerConfig`.
        train_dataset, eval_dataset: iterable datasets of (N, d_in) float tensors, or of pairs of them and their token
            types (N,), which can be gone through repeatedly; if one has `set_epoch`, it is told which pass begins.
    """

    def __init__(
        self,
        model: SparseAutoencoder,
        args: SparseAutoencoderTrainerConfig,
        train_dataset: IterableDataset | None = None,
        eval_dataset: IterableDataset | None = None,
        **kwargs,
    ):
        if train_dataset is not None:
            train_dataset = _Endless(train_dataset, model.config.d_in, args.on_nonfinite)
        super().__init__(model=model, args=args, train_dataset=train_dataset, eval_dataset=eval_dataset, **kwargs)
        self.add_callback(_AfterStep(self))
        self._frame = None  # (mean (d_in,), scale) while the weights are those of the training frame
        self._tokens_since_active = torch.zeros(model.config.d_sae, dtype=torch.long, device=args.device)
        self._tokens_since_revival = 0
        self._running = {}
        self._last_batch = None

    def train(self, resume_from_checkpoint=None, **kwargs):
        """Train, as `Trainer.train`; then bring the weights to raw hidden states and measure `mean_active_activation`.

        Args:
            resume_from_checkpoint: a checkpoint, or True for the newest whole one in the output folder.
        """
        if resume_from_checkpoint is True:
            resume_from_checkpoint = last_checkpoint(self.args.output_dir)
            if resume_from_checkpoint is None:
                raise ValueError(f"{self.args.output_dir} holds no whole checkpoint to resume from; train without.")
        if not resume_from_checkpoint:
            self._frame = self._measure_activations()
            if self.model.b_enc.any() or self.model.b_dec.any():
                self._enter_frame()
            else:
                self._start()
        try:
            output = super().train(resume_from_checkpoint=resume_from_checkpoint, **kwargs)
        finally:
            if self._frame is not None:
                self._leave_frame()
                self._frame = None
        self.model.eval()
        measure_usual_strength(self.model, take_tokens(self.train_dataset.one_pass(), self.args.strength_tokens))
        self.model.mean_active_activation.copy_(broadcast(self.model.mean_active_activation))
        return output

    def get_train_dataloader(self):
        # Batches are ready made and each process makes its own, so accelerate has nothing to batch or dispatch.
        return DataLoader(self.train_dataset, batch_size=None, collate_fn=_as_inputs)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        mean, scale = self._frame
        z = (inputs["hidden_states"] - mean) / scale
        outputs = model(hidden_states=z, output_feature_acts=return_outputs)
        warmup = self.args.l1_warmup * self.state.max_steps
        grown = min(1.0, (self.state.global_step + 1) / max(warmup, 1))
        loss = outputs.mse
        if self.model.config.activation == "relu":
            loss = loss + self.args.l1_coefficient * grown * outputs.l1
        elif self.model.config.activation == "jumprelu":
            loss = loss + self.args.l0_coefficient * grown * outputs.l0
        self._follow(z, inputs.get("token_types"), outputs)
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
            for group, name in enumerate(("", *(f"_{name}" for name in TOKEN_TYPES))[: len(running["tokens"])]):
                if running["tokens"][group] > 0:
                    variance, residual_variance = _variances(running, group)
                    l0 = (running["active"][group] / running["tokens"][group]).item()
                    logs[f"explained_variance{name}"] = 1 - (residual_variance / variance).item()
                    logs[f"l0{name}"] = l0
                    logs[f"density{name}"] = l0 / self.model.config.d_sae
            logs["dead_share"] = (self._tokens_since_active >= self.args.dead_window).float().mean().item()
            self._running = {}
        super().log(logs, start_time)

    @torch.no_grad()
    def _measure_activations(self):
        """Mean (d_in,) and scale, the root of the variance a dimension, of the first `calibration_tokens` tokens."""
        moments = torch.zeros(2, self.model.config.d_in, dtype=torch.float64, device=self.args.device)
        tokens = torch.zeros((), dtype=torch.float64, device=self.args.device)
        for batch in take_tokens(self.train_dataset.one_pass(), self.args.calibration_tokens):
            z = split_batch(batch)[0].to(self.args.device).double()
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
    def _start(self):
        """Scale an untrained encoder so that the first batch is reconstructed with the least error.

        The transposed decoder alone overshoots: hundreds of random atoms answer every token.
        """
        mean, scale = self._frame
        z = (split_batch(next(self.train_dataset.one_pass()))[0].to(self.args.device) - mean) / scale
        self.model.config.bandwidth = self.args.bandwidth
        if self.model.config.activation == "jumprelu":
            self.model.threshold.fill_(self.args.bandwidth / 2)
        self.model.train()
        z_hat = self.model(z).reconstruction
        factor = broadcast((z * z_hat).sum() / z_hat.square().sum())
        self.model.W_enc.mul_(factor)
        if self.model.config.activation == "batchtopk":
            self.model.threshold.zero_()

    @torch.no_grad()
    def _enter_frame(self):
        mean, scale = self._frame
        self.model.b_enc.add_(mean @ self.model.W_enc).div_(scale)
        self.model.b_dec.sub_(mean).div_(scale)
        if hasattr(self.model, "threshold"):
            self.model.threshold.div_(scale)
        self.model.config.bandwidth = self.args.bandwidth

    @torch.no_grad()
    def _leave_frame(self):
        mean, scale = self._frame
        self.model.b_enc.mul_(scale).sub_(mean @ self.model.W_enc)
        self.model.b_dec.mul_(scale).add_(mean)
        if hasattr(self.model, "threshold"):
            self.model.threshold.mul_(scale)
        config = self.model.config
        if config.activation == "relu":
            config.l1_coefficient = self.args.l1_coefficient * scale.item()
        elif config.activation == "jumprelu":
            config.l0_coefficient = self.args.l0_coefficient * scale.item() ** 2
            config.bandwidth = self.args.bandwidth * scale.item()

    def _in_frame(self):
        """Copies of what differs between the frames."""
        names = ("b_enc", "b_dec", "threshold")
        return {name: getattr(self.model, name).detach().clone() for name in names if hasattr(self.model, name)}

    @torch.no_grad()
    def _put_back(self, in_frame):
        for name, value in in_frame.items():
            getattr(self.model, name).copy_(value)
        self.model.config.bandwidth = self.args.bandwidth

    @contextmanager
    def _raw_weights(self):
        """Within it the model reads raw hidden states; afterwards it is bit for bit what it was."""
        if self._frame is None:
            yield
            return
        in_frame = self._in_frame()
        self._leave_frame()
        try:
            yield
        finally:
            self._put_back(in_frame)

    def _save(self, output_dir=None, state_dict=None):
        if self._frame is not None:
            os.makedirs(output_dir, exist_ok=True)
            mean, scale = self._frame
            state = self._in_frame() | {"mean": mean, "scale": scale}
            state["tokens_since_active"] = self._tokens_since_active
            state["tokens_since_revival"] = torch.tensor(self._tokens_since_revival)
            state = {name: value.contiguous().cpu() for name, value in state.items()}
            save_file(state, os.path.join(output_dir, FRAME_FILE))
        with self._raw_weights():
            super()._save(output_dir, None if self._frame else state_dict)

    def _load_from_checkpoint(self, resume_from_checkpoint, model=None):
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        path = os.path.join(resume_from_checkpoint, FRAME_FILE)
        if not os.path.exists(path):
            raise ValueError(
                f"{resume_from_checkpoint} holds no {FRAME_FILE}, so it is no checkpoint of this trainer; to train on "
                "from its weights, load them with SparseAutoencoder.from_pretrained and train anew."
            )
        state = load_file(path, device=str(self.args.device))
        self._frame = state.pop("mean"), state.pop("scale")
        self._tokens_since_active = state.pop("tokens_since_active")
        self._tokens_since_revival = state.pop("tokens_since_revival").item()
        self._put_back(state)

    def _load_best_model(self):
        super()._load_best_model()
        self._enter_frame()

    @torch.no_grad()
    def _follow(self, z, types, outputs):
        z_hat = outputs.reconstruction.detach().to(z.dtype)
        _add(self._running, _moments(z, z_hat, outputs.active, _groups(types, z, z.dtype)))
        tokens = self.accelerator.reduce(torch.tensor(len(z), device=z.device))
        self._tokens_since_active += tokens
        self._tokens_since_active.masked_fill_(self.accelerator.reduce(outputs.fired) > 0, 0)
        self._tokens_since_revival += len(z) * self.accelerator.num_processes
        self._last_batch = z, z - z_hat

    @torch.no_grad()
    def _after_step(self):
        norm = self.model.W_dec.norm(dim=1)
        self.model.W_dec.div_(norm[:, None])
        self.model.W_enc.mul_(norm)
        self.model.b_enc.mul_(norm)
        if self.model.config.activation == "jumprelu":
            self.model.threshold.mul_(norm).clamp_(min=0)
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
        fresh = [
            (self.model.W_dec, dead),
            (self.model.W_enc, (slice(None), dead)),
            (self.model.b_enc, dead),
        ]
        if self.model.config.activation == "jumprelu":
            self.model.threshold[dead] = 0
            fresh.append((self.model.threshold, dead))
        for parameter, rows in fresh:
            for state in self.optimizer.state[parameter].values():
                if torch.is_tensor(state) and state.shape == parameter.shape:
                    state[rows] = 0
        self._tokens_since_active[dead] = 0


class _AfterStep(TrainerCallback):
    def __init__(self, trainer):
        self.trainer = trainer

    def on_step_end(self, args, state, control, **kwargs):
        self.trainer._after_step()


def _as_inputs(batch):
    z, types = split_batch(batch)
    return {"hidden_states": z} if types is None else {"hidden_states": z, "token_types": types}
