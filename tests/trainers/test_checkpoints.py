"""Checkpoints that are whole or not there: every state a crash can leave, for each of the three trainers."""

import shutil
from functools import partial
from pathlib import Path

import pytest
import torch
from torch.optim import SGD

from segcompass.modeling_segcompass import SparseAutoencoder, SparseAutoencoderConfig
from segcompass.modeling_segcompass.manifest import MANIFEST
from segcompass.trainers import (
    SegCompassSFTConfig,
    SegCompassSFTTrainer,
    SparseAutoencoderTrainer,
    SparseAutoencoderTrainerConfig,
)
from segcompass.trainers.checkpoints import WRITING, last_checkpoint
from segcompass.trainers.optimization import one_cycle
from tests.support.grpo import make_trainer, scenes
from tests.support.tiny import tiny_segcompass

QUIET = dict(save_strategy="steps", save_steps=1, report_to=[], disable_tqdm=True, use_cpu=True, seed=3)


def sft(folder, eval_dataset=None, concept_reading="feature", **changes):
    model, processor = tiny_segcompass("llava", num_slots=3, concept_reading=concept_reading)
    rows = scenes(8).map(lambda row: {"reasoning": "a box"})
    args = SegCompassSFTConfig(
        **{**dict(output_dir=str(folder), max_steps=3, per_device_train_batch_size=2), **QUIET, **changes}
    )
    return SegCompassSFTTrainer(model, args, processor, train_dataset=rows, eval_dataset=eval_dataset)


def grpo(folder, **changes):
    # a rollout serves two steps, so that checkpoints 1 and 3 lie within one
    return make_trainer(folder, **{**dict(max_steps=3, beta=0.0, steps_per_generation=4), **QUIET, **changes})


def sae(folder, **changes):
    torch.manual_seed(0)
    model = SparseAutoencoder(SparseAutoencoderConfig(d_in=8, d_sae=16, activation="topk", k=4, layer=1))
    data = [torch.randn(32, 8, generator=torch.Generator().manual_seed(number)) for number in range(4)]
    args = SparseAutoencoderTrainerConfig(**{**dict(output_dir=str(folder), max_steps=3), **QUIET, **changes})
    return SparseAutoencoderTrainer(model, args, train_dataset=data)


TRAINERS = {"sft": sft, "sft grounded": partial(sft, concept_reading="grounded"), "grpo": grpo, "sae": sae}


def state(trainer):
    return {name: value.clone() for name, value in trainer.model.state_dict().items()}


def same(first, second):
    return first.keys() == second.keys() and all(torch.equal(value, second[name]) for name, value in first.items())


@pytest.fixture(scope="module", params=TRAINERS)
def finished(request, tmp_path_factory):
    """A finished training of three steps: how to make it again, its folder, its final weights."""
    make, folder = TRAINERS[request.param], tmp_path_factory.mktemp(request.param)
    trainer = make(folder)
    trainer.train()
    return make, folder, state(trainer)


def crash_states(whole, folder):
    """Each state in which a crash can leave checkpoint 3 while it is written or put into its place, made in `folder`.

    Yields the name of each; checkpoint-2 is whole in all of them.
    """
    files = [path for path in (whole / "checkpoint-3").rglob("*") if path.is_file() and path.name != MANIFEST]
    files = sorted(files, key=lambda path: path.stat().st_mtime_ns) + [whole / "checkpoint-3" / MANIFEST]
    names = [path.relative_to(whole / "checkpoint-3") for path in files]
    for place in (f"{WRITING}/checkpoint-3", "checkpoint-3"):
        for number, name in enumerate(names):
            for form in ("missing", "empty", "half"):
                written = names[: number + (form != "missing")]  # the later ones are not there yet
                yield f"{place}: {name} {form}", place, written, (name, form)
    for name in names[:-1]:  # after the manifest: a file system that lost what was not flushed
        for form in ("missing", "empty", "half"):
            written = [other for other in names if form != "missing" or other != name]
            yield f"damaged later: {name} {form}", "checkpoint-3", written, (name, form)


def leave(whole, folder, place, written, damaged):
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(whole / "checkpoint-2", folder / "checkpoint-2")
    target = folder / place
    target.mkdir(parents=True)
    name, form = damaged
    for other in written:
        (target / other).parent.mkdir(parents=True, exist_ok=True)
        content = (whole / "checkpoint-3" / other).read_bytes()
        if other == name:
            content = {"empty": b"", "half": content[: len(content) // 2]}[form]
        (target / other).write_bytes(content)


def test_whatever_a_crash_leaves_the_newest_whole_checkpoint_is_resumed(finished, tmp_path, caplog):
    make, whole, weights = finished
    states = list(crash_states(whole, tmp_path))
    assert len(states) >= 50
    for title, place, written, damaged in states:
        leave(whole, tmp_path / "run", place, written, damaged)
        caplog.clear()
        assert last_checkpoint(tmp_path / "run") == str(tmp_path / "run" / "checkpoint-2"), title
        assert ("checkpoint-3 is passed over" in caplog.text) == (place == "checkpoint-3"), title
    # Beside the whole checkpoint-2 lies what is left of the next; once for each place it ends bit for bit the same.
    for title, place, written, damaged in (states[4], states[len(states) // 2], states[-2]):
        leave(whole, tmp_path / "run", place, written, damaged)
        trainer = make(tmp_path / "run")
        trainer.train(resume_from_checkpoint=True)
        assert same(state(trainer), weights), title
        assert last_checkpoint(tmp_path / "run") == str(tmp_path / "run" / "checkpoint-3")
        assert not (tmp_path / "run" / WRITING).exists()


def test_an_explicit_checkpoint_that_is_not_whole_is_refused(finished, tmp_path):
    make, whole, _ = finished
    shutil.copytree(whole / "checkpoint-3", tmp_path / "checkpoint-3")
    (tmp_path / "checkpoint-3" / MANIFEST).unlink()
    with pytest.raises(ValueError, match=r"checkpoint-3 is no whole checkpoint: it has no manifest.json"):
        make(tmp_path).train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    with pytest.raises(ValueError, match="no whole checkpoint to resume from"):
        make(tmp_path).train(resume_from_checkpoint=True)


def test_a_finished_training_that_is_repeated_changes_nothing(finished):
    make, folder, weights = finished
    files = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file() and "runs" not in path.parts}
    trainer = make(folder)
    trainer.train(resume_from_checkpoint=True)
    assert trainer.state.global_step == 3 and same(state(trainer), weights)
    assert {path: path.read_bytes() for path in files} == files
    assert not list(folder.glob("checkpoint-4"))


def test_a_finished_training_goes_on_with_more_steps(finished, tmp_path):
    make, whole, weights = finished
    shutil.copytree(whole, tmp_path / "run")
    trainer = make(tmp_path / "run", max_steps=5)
    trainer.train(resume_from_checkpoint=True)
    assert trainer.state.global_step == 5 and not same(state(trainer), weights)
    assert last_checkpoint(tmp_path / "run") == str(tmp_path / "run" / "checkpoint-5")


def test_a_failed_write_leaves_the_checkpoints_before_and_says_what_to_do(tmp_path, monkeypatch):
    trainer = sae(tmp_path)
    write = torch.save

    def full(value, path, *args, **kwargs):
        if "checkpoint-2" in str(path):
            raise OSError(28, "No space left on device")
        write(value, path, *args, **kwargs)

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(OSError, match="No space left") as failure:
        trainer.train()
    assert "checkpoint-2 was not written" in failure.value.__notes__[0] and "Make room" in failure.value.__notes__[0]
    monkeypatch.undo()
    assert last_checkpoint(tmp_path) == str(tmp_path / "checkpoint-1") and not (tmp_path / "checkpoint-2").exists()
    sae(tmp_path).train(resume_from_checkpoint=True)
    assert Path(last_checkpoint(tmp_path)).name == "checkpoint-3"


def test_the_limit_counts_whole_checkpoints_and_the_best_one_is_named_where_it_lies(tmp_path):
    rows = scenes(4).map(lambda row: {"reasoning": "a box"})
    evaluation = dict(eval_strategy="steps", eval_steps=1, load_best_model_at_end=True)
    trainer = sft(tmp_path, rows, save_total_limit=1, **evaluation)
    trainer.train()
    best = Path(trainer.state.best_model_checkpoint)
    assert best.parent == tmp_path and best.is_dir()
    assert {path.name for path in tmp_path.glob("checkpoint-*")} <= {best.name, "checkpoint-3"}


def test_a_cycle_of_more_steps_has_the_longer_cycles_rates_from_there_on():
    def cycle(steps):
        optimizer = SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
        return optimizer, one_cycle(optimizer, steps, 6.7)

    optimizer, scheduler = cycle(10)
    rates = []
    for _ in range(10):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step() if len(rates) < 10 else None
    short_optimizer, short = cycle(4)
    for _ in range(3):
        short_optimizer.step()
        short.step()
    longer_optimizer, longer = cycle(10)
    longer_optimizer.load_state_dict(short_optimizer.state_dict())
    longer.load_state_dict(short.state_dict())
    resumed = []
    for _ in range(7):
        resumed.append(longer_optimizer.param_groups[0]["lr"])
        longer_optimizer.step()
        longer.step() if len(resumed) < 7 else None
    assert resumed == pytest.approx(rates[3:])
