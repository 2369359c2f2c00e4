"""Held-out rows are segmented at each evaluation, and the log says how well."""

import json

import pytest
import torch
from datasets import Dataset

from segcompass.commands.options import training_rows
from segcompass.evaluation import Evaluation, evaluate
from segcompass.loaders import load_scenes
from segcompass.loaders.rows import leave_images_encoded
from segcompass.trainers import SegCompassGRPOTrainer, SegCompassSFTConfig, SegCompassSFTTrainer
from tests.support.grpo import scenes, settings
from tests.support.tiny import tiny_segcompass

NAMES = {"eval_gIoU", "eval_cIoU", "eval_N_acc", "eval_T_acc", "eval_format_share", "eval_slots_found"}


def rows(count, reasoning=True):
    """Small pictures with 1, 2 and 0 boxes; without reasoning they are as a benchmark's."""
    drawn = leave_images_encoded(scenes(count))
    return drawn.map(lambda row: {"reasoning": "a box"}) if reasoning else drawn


def cold_start(folder, evaluated, **changes):
    model, processor = tiny_segcompass("llava")
    args = dict(max_steps=2, per_device_train_batch_size=2, per_device_eval_batch_size=3, report_to="none")
    args |= dict(eval_strategy="steps", eval_steps=1, logging_steps=1, save_strategy="no", use_cpu=True, bf16=False)
    args = SegCompassSFTConfig(str(folder), **{"eval_masks": True, **args, **changes})
    return SegCompassSFTTrainer(model, args, processor, train_dataset=rows(4), eval_dataset=evaluated)


@pytest.mark.parametrize("reasoning", [True, False], ids=["traces", "no traces"])
def test_the_cold_starts_log_has_metrics_format_and_slots(tmp_path, reasoning):
    trainer = cold_start(tmp_path, rows(5, reasoning))
    trainer.train()
    logged = [entry for entry in trainer.state.log_history if "eval_gIoU" in entry]
    assert [entry["step"] for entry in logged] == [1, 2]
    for entry in logged:
        assert NAMES - {"eval_N_acc"} <= entry.keys() and ("eval_loss" in entry) == reasoning
        assert all(0 <= entry[name] <= (3 if name == "eval_slots_found" else 1) for name in NAMES & entry.keys())


def test_the_metrics_are_those_that_evaluate_finds(tmp_path, monkeypatch):
    trainer = cold_start(tmp_path / "run", rows(5))
    torch.nn.init.zeros_(trainer.model.get_output_embeddings().weight)  # no response ever closes its reasoning
    measured = trainer.evaluate()
    assert measured["eval_format_share"] == 0 and measured["eval_slots_found"] == 0
    trainer.model.save_pretrained(tmp_path / "model")
    trainer.processing_class.save_pretrained(tmp_path / "model")
    monkeypatch.setattr("segcompass.evaluation.read_rows", lambda run: rows(5))
    found = evaluate(Evaluation(tmp_path / "evaluation", model=str(tmp_path / "model"), batch_size=3))
    for name in ("gIoU", "cIoU", "N-acc", "T-acc"):
        if found[name] is not None:
            assert measured[f"eval_{name.replace('-', '_')}"] == pytest.approx(found[name])


def test_it_can_be_left_out(tmp_path):
    measured = cold_start(tmp_path, rows(3), eval_masks=False).evaluate()
    assert "eval_loss" in measured and not NAMES & measured.keys()


def test_joint_training_logs_them_beside_its_rewards(tmp_path):
    model, processor = tiny_segcompass("llava")
    args = settings(tmp_path, max_steps=1, eval_strategy="steps", eval_steps=1, eval_masks=True)
    trainer = SegCompassGRPOTrainer(
        model, args=args, train_dataset=rows(8), eval_dataset=rows(2, False), processing_class=processor
    )
    trainer.train()
    (entry,) = [entry for entry in trainer.state.log_history if "eval_gIoU" in entry]
    assert NAMES - {"eval_N_acc", "eval_T_acc"} <= entry.keys() and "eval_reward" in entry


def test_sharded_models_are_refused_by_name(tmp_path):
    trainer = cold_start(tmp_path, rows(3))
    trainer.is_fsdp_enabled = True
    with pytest.raises(ValueError, match="not segmented while weights are sharded .* leave out eval_dataset"):
        trainer.segment_held_out(rows(3))


class Options:
    dataset, split, dataset_seed, num_samples = "scenes", "train", 0, 6
    eval_dataset, eval_split, eval_num_samples = None, "val", 2


def test_commands_hold_rows_out_or_say_what_is_missing(tmp_path, capsys):
    options = Options()
    training = SegCompassSFTConfig(str(tmp_path), use_cpu=True, bf16=False, eval_strategy="steps", eval_steps=1)
    with pytest.raises(ValueError, match="eval_strategy is 'steps' and eval_dataset is None; give both"):
        training_rows(options, training)
    line = {"image": "a.png", "instruction": "it", "masks": []}
    for name in ("a.png", "b.png"):
        load_scenes("val", num_samples=1)[0]["image"].save(tmp_path / name)
    lines = [{**line, "image": image, "split": split} for image, split in (("a.png", "train"), ("b.png", "train"))]
    lines.append({**line, "split": "val"})
    (tmp_path / "own.jsonl").write_text("\n".join(map(json.dumps, lines)))
    options.dataset = options.eval_dataset = str(tmp_path / "own.jsonl")
    trained, held_out = training_rows(options, training)
    assert list(trained["image_id"]) == ["b.png"] and list(held_out["image_id"]) == ["a.png"]
    assert isinstance(trained, Dataset) and training.eval_masks
    assert "1 of 2 rows on 2 images; 1 rows on 1 held-out images are removed" in capsys.readouterr().out
