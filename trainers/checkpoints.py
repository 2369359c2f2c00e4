"""Checkpoints that are whole or not there, and what a training resumes from. One rule for every trainer.

A checkpoint is written beside its place, signed with a manifest as its last file, and then renamed; a folder without a
manifest, or one whose files are no longer those that the manifest lists, is no checkpoint. Resuming takes the newest
whole one and says which it passed over, and a training that has made its steps makes no further one. This file knows
nothing about models; what else a trainer keeps in a checkpoint it writes in `save_beside`.
"""

import logging
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

from transformers import TrainingArguments
from transformers.trainer_utils import HubStrategy, rotate_checkpoints

from segcompass.loaders.folder_lock import folder_lock
from segcompass.modeling_segcompass.manifest import HASH_BELOW, MANIFEST, check, findings, signing
from segcompass.modeling_segcompass.whole_files import flush

from .adapter_base import base_of, note_base
from .signed_saves import SignedSaves

logger = logging.getLogger(__name__)

WRITING = ".writing"
"""Folder inside the output folder in which a checkpoint is written; what a killed run left there is cleared."""


def last_checkpoint(folder: str | Path) -> str | None:
    """The newest whole checkpoint of a training; what is newer and not whole is named in a warning.

    Args:
        folder: the output folder; need not exist.

    Returns:
        The checkpoint's path; None if there is none that is whole.
    """
    found = {int(match[1]): path for path in Path(folder).glob("checkpoint-*") if (match := _number(path))}
    for step in sorted(found, reverse=True):
        fault = fault_of(found[step])
        if fault is None:
            return str(found[step])
        logger.warning("%s is passed over: %s.", found[step], fault)
    return None


def fault_of(checkpoint: str | Path) -> str | None:
    """Why a folder is no whole checkpoint; None if it is one.

    Sizes are compared always, hashes of everything below 1 GiB.
    """
    if not Path(checkpoint).is_dir():
        return "there is no such folder"
    if not (Path(checkpoint) / MANIFEST).exists():
        return (
            f"it has no {MANIFEST}, which is written last (one of an earlier version, if it is whole, can be signed: "
            f"segcompass verify {checkpoint} --sign)"
        )
    try:
        wrong = findings(checkpoint, hash_below=HASH_BELOW)
    except ValueError as error:
        return str(error)
    return ", ".join(f"{name} ({finding})" for name, finding in wrong[:3]) or None


class WholeCheckpoints(SignedSaves):
    """Writes a trainer's checkpoints whole or not at all, and resumes from whole ones only.

    A mixin before a class of transformers' `Trainer`.

    Example:
        class MyTrainer(WholeCheckpoints, Trainer):
            def save_beside(self, folder):
                torch.save(self.more, folder / "more.pt")
    """

    model: Any
    _writing: Path | None = None
    _base: dict[str, Any] | None = None

    def train(
        self,
        resume_from_checkpoint: str | bool | None = None,
        trial: Any = None,
        ignore_keys_for_eval: list[str] | None = None,
    ) -> Any:
        """As `Trainer.train`, but a checkpoint that is not whole is never resumed from.

        Args:
            resume_from_checkpoint: a checkpoint, or True for the newest whole one in the output folder.
            trial: as in `Trainer.train`.
            ignore_keys_for_eval: as in `Trainer.train`.

        Returns:
            As `Trainer.train`. A training that has made all its steps makes none.

        Raises:
            ValueError: there is no such checkpoint, or it is not whole.
            FolderHeldError: another training writes into the output folder; it is named.
        """
        with alone_in_output(self.args):
            start = whole_checkpoint(resume_from_checkpoint, self.args.output_dir)
            self._base = base_of(self.model)  # as it is before the first step; somebody may write there meanwhile
            return super().train(start, trial, ignore_keys_for_eval)  # type: ignore[misc]  # the Trainer's

    def _run_epoch(self, *args, **kwargs):
        if self.state.global_step >= self.state.max_steps:  # a finished training is repeated
            if self.args.should_log:
                logger.warning(
                    "the training in %s is finished (%d steps), so no step is made, and options that are others now "
                    "are not followed; raise max_steps or num_train_epochs to go on, or name another output_dir.",
                    self.args.output_dir,
                    self.state.global_step,
                )
            self.control.should_training_stop = True  # type: ignore[attr-defined]
            return None
        return super()._run_epoch(*args, **kwargs)  # type: ignore[misc]

    def _save(self, output_dir=None, state_dict=None):
        folder = output_dir or self.args.output_dir
        with signing(folder) if self.args.should_save else nullcontext():
            super()._save(output_dir, state_dict)
            if self._base is not None:
                note_base(self._base, folder)

    def _get_output_dir(self, trial):
        run = super()._get_output_dir(trial=trial)  # type: ignore[misc]
        return run if self._writing is None else str(self._writing)

    def _save_checkpoint(self, model, trial):
        run = Path(super()._get_output_dir(trial=trial))
        name = f"checkpoint-{self.state.global_step}"
        if self.args.should_save:
            shutil.rmtree(run / WRITING, ignore_errors=True)
        self.accelerator.wait_for_everyone()
        self._writing = run / WRITING
        try:
            super()._save_checkpoint(model, trial)  # signed within, after save_beside
        except Exception as error:
            error.add_note(
                f"{run / name} was not written; the checkpoints before it are whole. Make room, or see to it that the "
                "folder can be written, and repeat the command to resume."
            )
            raise
        finally:
            self._writing = None
        if self.args.should_save:
            _put(run / WRITING / name, run / name)
            shutil.rmtree(run / WRITING, ignore_errors=True)
            limits = self.args.save_total_limit, self.state.best_model_checkpoint
            rotate_checkpoints(str(run), *limits, use_mtime=True)
        self.accelerator.wait_for_everyone()

    def save_beside(self, folder: Path) -> None:
        """Write what else belongs to a checkpoint, as `SignedSaves.save_beside`; called before it is signed."""
        super().save_beside(folder)
        best = self.state.best_global_step
        kept = folder.parent.parent / f"checkpoint-{best}"
        if best and (best == self.state.global_step or kept.is_dir()) and self.args.save_strategy != "no":
            self.state.best_model_checkpoint = str(kept)  # where it will be, not where it is written
            if self.args.should_save:
                self.state.save_to_json(str(folder / "trainer_state.json"))


def check_pushing(args: Any) -> None:
    """Refuse pushes to the Hub while training goes on: the Trainer uploads an output folder that it never signs.

    Args:
        args: transformers' TrainingArguments.

    Raises:
        ValueError: `push_to_hub` with another `hub_strategy` than "end".
    """
    if args.push_to_hub and args.hub_strategy != HubStrategy.END:
        raise ValueError(
            f"push_to_hub=True with hub_strategy={str(args.hub_strategy.value)!r} uploads a folder at each checkpoint "
            "whose manifest is not the one of its files, and without the model's code; set hub_strategy='end', which "
            "pushes the whole folder when training is over, or push a checkpoint with `segcompass push`."
        )


def whole_checkpoint(asked: str | bool | None, output_dir: str | Path | None) -> str | None:
    """What to resume from.

    Args:
        asked: a checkpoint, True for the newest whole one of the output folder, False or None for none.
        output_dir: the training's output folder.

    Returns:
        The checkpoint's path; None to train from the start.

    Raises:
        ValueError: there is no such checkpoint, it is not whole, or it holds weights alone.
    """
    if not asked:
        return None
    if asked is True:
        newest = last_checkpoint(output_dir or "")
        if newest is None:
            raise ValueError(f"{output_dir} holds no whole checkpoint to resume from; train without.")
        return _with_optimizer(newest)
    fault = fault_of(asked)
    if fault is not None:
        raise ValueError(f"{asked} is no whole checkpoint: {fault}. Resume from another, or train without.")
    check(asked)
    return _with_optimizer(str(asked))


def _with_optimizer(checkpoint):
    """The checkpoint; raises ValueError when it has no state of an optimizer, which transformers then starts anew."""
    if not any(any(Path(checkpoint).glob(pattern)) for pattern in ("optimizer*", "*-optimizer*", "global_step*")):
        raise ValueError(
            f"{checkpoint} holds weights alone (save_only_model=True), and a resumed training would go on with a new "
            "optimizer and schedule; load its weights with from_pretrained, and train into another folder."
        )
    return checkpoint


@contextmanager
def alone_in_output(args: TrainingArguments) -> Iterator[None]:
    """Within it no other training writes into the output folder, see `folder_lock`.

    Args:
        args: the training's; the process that saves takes the lock.

    Yields:
        None.

    Raises:
        FolderHeldError: another training writes there; it is named.
    """
    with folder_lock(args.output_dir or "") if args.should_save else nullcontext():
        yield


def _put(written: Path, place: Path) -> None:
    """Rename a whole checkpoint to its place; one that is there already gives way."""
    for path in written.rglob("*"):
        if path.is_file():
            flush(path)
    if place.exists():
        replaced = written.with_name("replaced")
        os.replace(place, replaced)
        os.replace(written, place)
        shutil.rmtree(replaced)
    else:
        os.replace(written, place)


def _number(path):
    return re.fullmatch(r"checkpoint-(\d+)", path.name)
