"""Training as one process, as two DDP processes, or as two FSDP2 processes: torchrun runs this file.

    torchrun --nproc_per_node 2 tests/support/two_processes.py fsdp2 OUTPUT grounded grpo

Accelerate keeps FSDP for accelerators; `fsdp2` tells it that this machine's gloo processes are such.
"""

import json
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch

from segcompass.loaders import load_scenes
from tests.support.grpo import SLOTS, scenes, script_responses, settings
from tests.support.tiny import make_sure, tiny_segcompass

RESPONSES = 4


def force_fsdp2():
    from accelerate import PartialState
    from accelerate.utils import DistributedType

    os.environ |= {
        "ACCELERATE_USE_FSDP": "true",
        "FSDP_VERSION": "2",
        "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
        "FSDP_RESHARD_AFTER_FORWARD": "true",
        "FSDP_STATE_DICT_TYPE": "FULL_STATE_DICT",
        "FSDP_CPU_RAM_EFFICIENT_LOADING": "false",
    }
    PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU


def complete_responses(model, processor):
    """As script_responses, but every one has all its concentration tokens: each micro-batch then weighs the same."""
    script_responses(model, processor)
    ref = "<REF_POS>" * SLOTS
    texts = [f"<think>a box</think>{ref}", f"<think>it</think>{ref}", f"well <think>b</think>{ref}"]
    texts.append(f"<think>a third</think>{ref} so")
    rows = [processor.tokenizer(t + "</s>", add_special_tokens=False)["input_ids"] for t in texts]
    longest = max(map(len, rows))
    rows = torch.tensor([row + [processor.tokenizer.pad_token_id] * (longest - len(row)) for row in rows])
    model.generate = lambda input_ids, **kwargs: torch.cat([input_ids, rows.repeat(len(input_ids) // len(rows), 1)], 1)


def joint(folder, processes):
    from segcompass.trainers.grpo_trainer import SegCompassGRPOTrainer

    args = settings(
        folder,
        per_device_train_batch_size=RESPONSES // processes,
        gradient_accumulation_steps=2,
        num_generations=RESPONSES,
        max_steps=3,
        beta=0.2,
        shuffle_dataset=False,
    )
    return SegCompassGRPOTrainer, args, scenes(8, targets=(1, 2))


def cold(folder, processes):
    from segcompass.trainers.sft_trainer import SegCompassSFTConfig, SegCompassSFTTrainer

    args = SegCompassSFTConfig(
        output_dir=str(folder),
        per_device_train_batch_size=4 // processes,
        max_steps=4,
        learning_rate=1e-3,
        logging_steps=1,
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
    )
    found = load_scenes("train", seed=5, num_samples=50, size=64, streaming=True)
    rows = [row for row in found if len(row["masks"]) == 1][:16]
    words = {name: rows[0][name] for name in ("instruction", "reasoning", "phrases")}
    return SegCompassSFTTrainer, args, [{**row, **words} for row in rows]  # each micro-batch then weighs the same


def main(mode, output, reading, stage):
    torch.set_num_threads(1)
    processes = int(os.environ.get("WORLD_SIZE", 1))
    make, args, rows = {"grpo": joint, "sft": cold}[stage](Path(output) / mode, processes)
    assert args.device.type == "cpu"
    if mode == "fsdp2":
        force_fsdp2()
    model, processor = tiny_segcompass("llava", num_slots=SLOTS, concept_reading=reading)
    if stage == "grpo":
        make_sure(model)
        complete_responses(model, processor)
    trainer = make(model, args=args, train_dataset=rows, processing_class=processor)
    trainer.train()
    kinds = {type(p).__name__ for p in trainer.model_wrapped.parameters()}
    trainer.save_model(str(Path(output) / mode / "final"))
    if trainer.accelerator.is_main_process:
        history = {"log": trainer.state.log_history, "kinds": sorted(kinds), "processes": processes}
        (Path(output) / f"{mode}.json").write_text(json.dumps(history))


if __name__ == "__main__":
    main(*sys.argv[1:])
    if torch.distributed.is_initialized():  # gloo's threads may abort a process that ends, even without a group
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)
