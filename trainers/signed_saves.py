"""What our trainers save is signed, model and checkpoint alike, and a checkpoint is checked before it is resumed.

A mixin before a class of transformers' `Trainer`; knows nothing about models.
"""

from contextlib import nullcontext
from pathlib import Path
from typing import Any

from segcompass.modeling_segcompass.manifest import check, signing


class SignedSaves:
    """Signs every folder that the trainer saves, once, after the last file of it; see `manifest.signing`.

    A subclass that keeps more in a checkpoint writes it in `save_beside`, so that it is signed as well.

    Example:
        class MyTrainer(SignedSaves, Trainer):
            def save_beside(self, folder):
                torch.save(self.more, folder / "more.pt")
    """

    args: Any
    accelerator: Any
    state: Any

    def save_beside(self, folder: Path) -> None:
        """Write what else belongs to a checkpoint; called in every process, the folder being there."""

    def _save(self, output_dir=None, state_dict=None):
        with signing(output_dir or self.args.output_dir) if self.args.should_save else nullcontext():
            super()._save(output_dir, state_dict)  # type: ignore[misc]  # the Trainer's

    def _save_checkpoint(self, model, trial):
        run = self._get_output_dir(trial=trial)  # type: ignore[attr-defined]  # the Trainer's
        folder = Path(run) / f"checkpoint-{self.state.global_step}"
        with signing(folder) if self.args.should_save else nullcontext():
            super()._save_checkpoint(model, trial)  # type: ignore[misc]  # the Trainer's
            self.save_beside(folder)
            self.accelerator.wait_for_everyone()  # every process may have written there

    def _load_from_checkpoint(self, resume_from_checkpoint, model=None):
        check(resume_from_checkpoint, ("",))
        try:
            super()._load_from_checkpoint(resume_from_checkpoint, model)  # type: ignore[misc]  # the Trainer's
        except RuntimeError as error:
            if "size mismatch" not in str(error) and "Missing key" not in str(error):
                raise
            raise ValueError(
                f"{resume_from_checkpoint} is of a model of another shape than the one that is trained here, so this "
                "training cannot go on from it; name another output_dir, or repeat the command that began it. "
                f"({str(error).strip().splitlines()[-1].strip()[:300]})"
            ) from error
