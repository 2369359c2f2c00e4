"""Training of the sparse autoencoder (section 3.2, Eq. 7, appendix A.1) on transformers' Trainer.

Knows nothing about where hidden states come from: a dataset of ready-made (N, d_in) batches is all it reads, see
`trainers.activations.ActivationDataset` and `trainers.activation_cache.CachedActivations`. What the autoencoder's
activation decides is in `modeling_segcompass.sae_activations`.

Training runs in a frame of unit variance per dimension that is measured first, see `trainers.sae_frame`. Everything
that leaves the trainer (checkpoints, evaluation, the trained model) reads raw hidden states.
"""

import os
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from itertools import count
from typing import Any

import torch
from accelerate.utils import broadcast
from safetensors.torch import load_file, save_file
from torch.utils.data import DataLoader, IterableDataset
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_utils import TrainOutput

from segcompass.modeling_segcompass.modeling_sparse_autoencoder import SparseAutoencoder

from .activations import TOKEN_TYPES, keep_finite, split_batch, take_tokens
from .checkpoints import WholeCheckpoints, check_pushing, whole_checkpoint
from .checks import check_loss, check_precision
from .optimization import check_fp16, check_warmup
from .options import SAE_OPTIONS, refuse_options
from .sae_frame import Frame, put_back, tensors_in_frame
from .sae_quality import (
    add_moments,
    evaluate_sae,
    measure_mean_active_activation,
    token_groups,
    variance_moments,
    variances,
)

FRAME_FILE = "training_frame.safetensors"
"""What a checkpoint holds beside raw weights, so that resuming is exact: the frame, and all that differs in it."""


@dataclass
class SparseAutoencoderTrainerConfig(TrainingArguments):
    """Training arguments of a sparse autoencoder; learning rate, warm-up and schedule default to appendix A.1.

    The number of tokens in a step is the dataset's `batch_size`; `per_device_train_batch_size` is refused. Training
    iterates over the data until `max_steps`; `segcompass train sae` computes it from `num_train_epochs`.

    Example:
        >>> args = SparseAutoencoderTrainerConfig("runs/sae", max_steps=1000, learning_rate=1e-3)
        >>> trainer = SparseAutoencoderTrainer(sae, args, train_dataset=dataset)
        >>> trainer.train(resume_from_checkpoint=last_checkpoint("runs/sae"))  # of trainers.checkpoints
    """

    num_train_epochs: float = field(default=10, metadata={"help": "Passes over the samples (`segcompass train sae`)."})
    learning_rate: float = field(default=5e-5, metadata={"help": "Peak learning rate. Small SAEs take more, 1e-3."})
    warmup_steps: float = field(default=0.03, metadata={"help": "Warm-up, as a share of the steps or their number."})
    lr_scheduler_type: str = field(default="cosine", metadata={"help": "Learning rate schedule."})
    l1_coefficient: float = field(
        default=5.0,
        metadata={
            "help": "α of Eq. 7 for hidden states scaled to unit variance per dimension ('relu' only). The trained "
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
        metadata={"help": "At a batch with NaN or infinity: 'stop' the training, or 'skip' the whole batch."},
    )
    logging_nan_inf_filter: bool = field(
        default=False, metadata={"help": "Needless: a loss that is not finite ends training; it waits for each step."}
    )
    calibration_tokens: int = field(
        default=65_536, metadata={"help": "Tokens from which the hidden states' mean and scale are measured."}
    )
    strength_tokens: int = field(
        default=262_144, metadata={"help": "Tokens over which `mean_active_activation` is measured after training."}
    )

    def __post_init__(self):
        super().__post_init__()
        refuse_options(self, SAE_OPTIONS)
        check_pushing(self)
        check_warmup(self)
        check_fp16(self)


class _Endless(IterableDataset):
    """Pass after pass over a dataset; refuses batches of the wrong width, and stops or skips at NaN and infinity."""

    def __init__(self, dataset, d_in, on_nonfinite):
        self.dataset = dataset
        self.d_in = d_in
        self.on_nonfinite = on_nonfinite

    def __iter__(self):
        for number in count():
            yield from self.one_pass(number)

    def one_pass(self, number=0):
        """The batches of a pass. Raises ValueError when there is none, so that no loop waits forever."""
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


class SparseAutoencoderTrainer(WholeCheckpoints, Trainer):
    """Trains a `SparseAutoencoder` on batches of hidden states.

    Decoder rows have norm 1 after every step, their norm moving into the encoder. Features dead for `dead_window`
    tokens are revived: they restart in the direction of what the last batch reconstructs worst. Logs explained
    variance (as `evaluate_sae`, over the steps since the last log), L0, density (L0 / d_sae) and the dead share, the
    first three also for each token type that the data name; a revived feature counts as alive until another window
    has passed.

    Resuming is exact: a training that was cut off ends with the same weights as one that was not.

    Args:
        model: the autoencoder; one whose biases are zero is taken for untrained and starts at the activations' mean.
        args: the training arguments.
        train_dataset: yields (N, d_in) float tensors, or pairs of them and their token types (N,), pass after pass.
            Before pass n its `set_epoch(n)` is called, if it has one.
        eval_dataset: likewise, for `evaluate`.
        **kwargs: other arguments of `Trainer`.

    Example:
        >>> dataset = ActivationDataset(mllm, dataloader, layer=16, batch_size=4096)
        >>> trainer = SparseAutoencoderTrainer(sae, SparseAutoencoderTrainerConfig("runs/sae", max_steps=1000), dataset)
        >>> trainer.train()
    """

    model: SparseAutoencoder
    args: SparseAutoencoderTrainerConfig
    train_dataset: _Endless

    def __init__(
        self,
        model: SparseAutoencoder,
        args: SparseAutoencoderTrainerConfig,
        train_dataset: IterableDataset | None = None,
        eval_dataset: IterableDataset | None = None,
        **kwargs: Any,
    ):
        check_precision(model)
        if train_dataset is not None:
            train_dataset = _Endless(train_dataset, model.config.d_in, args.on_nonfinite)
        super().__init__(model=model, args=args, train_dataset=train_dataset, eval_dataset=eval_dataset, **kwargs)
        self.add_callback(_AfterStep(self))
        self._frame: Any = None  # a Frame while the weights are those of the training frame
        self._tokens_since_active = torch.zeros(model.config.d_sae, dtype=torch.long, device=args.device)
        self._tokens_since_revival = 0
        self._running: dict[str, torch.Tensor] = {}  # `variance_moments` since the last log
        self._last_batch: tuple[torch.Tensor, torch.Tensor] | None = None  # hidden states and residuals, (N, d_in)

    def train(
        self,
        resume_from_checkpoint: str | bool | None = None,
        trial: Any = None,
        ignore_keys_for_eval: list[str] | None = None,
    ) -> TrainOutput:
        """Train, as `Trainer.train`; then bring the weights to raw hidden states and measure `mean_active_activation`.

        Args:
            resume_from_checkpoint: a checkpoint, or True for the newest whole one in the output folder.
            trial: as in `Trainer.train`.
            ignore_keys_for_eval: as in `Trainer.train`.

        Returns:
            As `Trainer.train`.

        Raises:
            ValueError: there is no such checkpoint, or the data are empty, of another width, or do not vary.
        """
        resume_from_checkpoint = whole_checkpoint(resume_from_checkpoint, self.args.output_dir)
        if resume_from_checkpoint is None:
            batches = take_tokens(self.train_dataset.one_pass(), self.args.calibration_tokens)
            self._frame = Frame.measure(batches, self.model.config.d_in, self.args.device, self.accelerator.reduce)
            if self.model.b_enc.any() or self.model.b_dec.any():
                self._enter_frame()
            else:
                self._start()
        try:
            output = super().train(resume_from_checkpoint, trial, ignore_keys_for_eval)
        finally:
            if self._frame is not None:
                self._frame.leave(self.model)
                self._frame = None
        self.model.eval()
        measure_mean_active_activation(
            self.model,
            take_tokens(self.train_dataset.one_pass(), self.args.strength_tokens),
            self.accelerator.reduce,
        )
        return output

    def get_train_dataloader(self) -> DataLoader:
        # Batches are ready made and each process makes its own, so accelerate has nothing to batch or dispatch.
        return DataLoader(self.train_dataset, batch_size=None, collate_fn=self._as_inputs)

    def _as_inputs(self, batch):
        z, types = split_batch(batch)
        inputs = {"hidden_states": z} if types is None else {"hidden_states": z, "token_types": types}
        if not self.args.dataloader_pin_memory:
            return inputs
        return {name: _on_its_way(value, self.args.device) for name, value in inputs.items()}

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        z = self._frame.to_frame(inputs["hidden_states"])  # (N, d_in)
        outputs = model(hidden_states=z, output_feature_acts=return_outputs)
        warmup = self.args.l1_warmup * self.state.max_steps
        grown = min(1.0, (self.state.global_step + 1) / max(warmup, 1))
        loss = outputs.misfit
        if self.model.activation.coefficient is not None:
            loss = loss + getattr(self.args, self.model.activation.coefficient) * grown * outputs.penalty
        self._follow(z, inputs.get("token_types"), outputs)
        check_loss({"mse": outputs.mse, "loss": loss})
        loss = loss / self.model.config.d_in  # the variance: the loss is the unexplained share plus the penalty
        return (loss, outputs) if return_outputs else loss

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Run `evaluate_sae` on the evaluation dataset, each process on its share; metrics carry the prefix `eval_`."""
        held_out: Any = self.eval_dataset if eval_dataset is None else eval_dataset
        with self._raw_weights():
            metrics = evaluate_sae(self.model, held_out, self.accelerator.reduce)
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in metrics.items()}
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs and self._running:
            running = self.accelerator.reduce(self._running)
            for group, name in enumerate(("", *(f"_{name}" for name in TOKEN_TYPES))[: len(running["tokens"])]):
                if running["tokens"][group] > 0:
                    variance, residual_variance = variances(running, group)
                    l0 = (running["active"][group] / running["tokens"][group]).item()
                    logs[f"explained_variance{name}"] = 1 - (residual_variance / variance).item()
                    logs[f"l0{name}"] = l0
                    logs[f"density{name}"] = l0 / self.model.config.d_sae
            logs["dead_share"] = (self._tokens_since_active >= self.args.dead_window).float().mean().item()
            self._running = {}
        super().log(logs, start_time)

    @torch.no_grad()
    def _start(self):
        """Scale an untrained encoder so that the first batch is reconstructed with the least error.

        The transposed decoder alone overshoots: hundreds of random atoms answer every token.
        """
        self._fields_from_args()
        self.model.activation.start_training(self.model)
        z = self._frame.to_frame(split_batch(next(self.train_dataset.one_pass()))[0].to(self.args.device))
        self.model.train()
        z_hat = self.model(z).reconstruction
        factor = broadcast((z * z_hat).sum() / z_hat.square().sum())
        self.model.W_enc.mul_(factor)
        self.model.activation.start_training(self.model)  # again: what the pass has moved is of the unscaled encoder

    def _fields_from_args(self):
        """In the frame, the configuration's fields that depend on the scale of hidden states are the arguments'."""
        for name in self.model.activation.fields:
            setattr(self.model.config, name, getattr(self.args, name))

    def _enter_frame(self):
        self._frame.enter(self.model)
        self._fields_from_args()

    def _raw_weights(self) -> AbstractContextManager:
        """Within it the model reads raw hidden states; afterwards it is bit for bit what it was."""
        return nullcontext() if self._frame is None else self._frame.left(self.model)

    def _save(self, output_dir=None, state_dict=None):
        if self._frame is not None:
            os.makedirs(output_dir, exist_ok=True)
            state = tensors_in_frame(self.model) | {"mean": self._frame.mean, "scale": self._frame.scale}
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
        self._frame = Frame(state.pop("mean"), state.pop("scale"))
        self._tokens_since_active = state.pop("tokens_since_active")
        self._tokens_since_revival = state.pop("tokens_since_revival").item()
        put_back(self.model, state)
        self._fields_from_args()

    def _load_best_model(self):
        super()._load_best_model()
        self._enter_frame()

    @torch.no_grad()
    def _follow(self, z, types, outputs):
        residual = z - outputs.reconstruction.detach().to(z.dtype)
        add_moments(self._running, variance_moments(z, residual, outputs.active, token_groups(types, z, z.dtype)))
        tokens = self.accelerator.reduce(torch.tensor(len(z), device=z.device))
        self._tokens_since_active += tokens
        self._tokens_since_active.masked_fill_(self.accelerator.reduce(outputs.fired) > 0, 0)
        self._tokens_since_revival += len(z) * self.accelerator.num_processes
        self._last_batch = z, residual

    @torch.no_grad()
    def _after_step(self):
        norm = self.model.W_dec.norm(dim=1)  # (d_sae,)
        self.model.W_dec.div_(norm[:, None])
        self.model.W_enc.mul_(norm)
        self.model.b_enc.mul_(norm)
        self.model.activation.follow_norms(self.model, norm)
        if self._tokens_since_revival >= self.args.dead_window:
            self._tokens_since_revival = 0
            if self.state.global_step < self.args.revive_until * self.state.max_steps:
                self._revive((self._tokens_since_active >= self.args.dead_window).nonzero().squeeze(1))

    def _revive(self, dead):
        """Point dead features at badly reconstructed tokens, drawn with probability ∝ ||z - ẑ||²; fire on the like."""
        if not len(dead):
            return
        z, residual = self._last_batch
        error = residual.square().sum(1)  # (N,)
        tokens = torch.multinomial(error, len(dead), replacement=len(dead) > int((error > 0).sum()))
        directions = broadcast(torch.nn.functional.normalize(residual[tokens], dim=1))  # (dead, d_in)
        projections = broadcast((z[tokens] * directions).sum(1)).clamp(min=0)  # (dead,)
        norm = self.model.W_enc.norm(dim=0).mean()
        self.model.W_dec[dead] = directions
        self.model.W_enc[:, dead] = norm * directions.T
        self.model.b_enc[dead] = -norm * projections / 2
        fresh = [
            (self.model.W_dec, dead),
            (self.model.W_enc, (slice(None), dead)),
            (self.model.b_enc, dead),
            *((parameter, dead) for parameter in self.model.activation.revive(self.model, dead)),
        ]
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


def _on_its_way(value, device):
    """A tensor of the CPU as a GPU fetches it while it still computes the step before; another device's as it is."""
    if device.type != "cuda" or value.device.type != "cpu":
        return value
    return value.pin_memory().to(device, non_blocking=True)
