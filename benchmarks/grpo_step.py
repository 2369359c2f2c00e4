"""What does a joint step cost beside plain GRPO? One MLLM, the same rollouts, the same batch, in one process.

    python benchmarks/grpo_step.py
    python benchmarks/grpo_step.py --beta 0 --repeats 9
    python benchmarks/grpo_step.py --hidden 768 --layers 12                                      # 90 M parameters
    python benchmarks/grpo_step.py --device cuda --bf16 --lora --hidden 4096 --layers 32 --image-side 384

Both trainers are given the same scripted responses (ours also the states that generating them leaves behind), so that
neither generates: what is compared is scoring, reference, loss, backward and update. The peer is TRL's GRPOTrainer on
the bare MLLM with a constant reward. Steps of the two alternate; seconds are the processor's, which other work on the
machine changes less than the clock's (on a GPU the clock's), and the ratio is the median of the pairs'. With --whole
ours takes the gradients that trainers/constant_prefix.py spares; with --lora both train adapters and the LM head, on
the same frozen weights, and the reference is the MLLM without adapters.
Keys of RESULT: ratio, pairs (lowest and highest), clock_ratio, joint_s, plain_s, mllm_parameters, ...
"""

import argparse
import contextlib
import copy
import json
import statistics
import time
from typing import Any

import torch
from peft import LoraConfig
from trl import GRPOConfig, GRPOTrainer
from trl.trainer.utils import add_fused_lm_head
from workload import add_size, benchmark_rows, clock_of, machine, scripted_ids, sized_model

from segcompass.modeling_segcompass.states import open_recorder
from segcompass.trainers import SegCompassGRPOConfig, SegCompassGRPOTrainer, joint_forward
from segcompass.trainers.policy import freeze, learned_rows, lora_config


def parse(argv):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_size(parser)
    parser.add_argument("--image-side", type=int, default=128, help="pixels, 16 of which are an image token's side")
    parser.add_argument("--bf16", action="store_true", help="autocast, as with bf16=True in training")
    parser.add_argument("--lora", action="store_true", help="train adapters of rank 16 and the LM head")
    parser.add_argument("--response", type=int, default=192, help="tokens of a response")
    parser.add_argument("--batch", type=int, default=4, help="responses of a micro-batch")
    parser.add_argument("--accumulation", type=int, default=2)
    parser.add_argument("--beta", type=float, default=0.2)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--whole", action="store_true", help="with all gradients below the SAE's layer")
    return parser.parse_args(argv)


class Stepper:
    """One optimizer step of a trainer at a time, on the same batch of rows each time."""

    def __init__(self, trainer, rows):
        self.trainer, self.rows = trainer, rows
        trainer.accelerator.prepare_model(trainer.model)  # autocast, where it is asked for
        self.trainer.model.train()
        self.trainer.create_optimizer()
        self.optimizer = self.trainer.optimizer
        self.accumulation = trainer.args.gradient_accumulation_steps
        trainer.current_gradient_accumulation_steps = self.accumulation

    def step(self):
        for _ in range(self.accumulation):
            inputs = self.trainer._prepare_inputs(copy.copy(self.rows))
            loss = self.trainer.compute_loss(self.trainer.model, inputs)
            loss.backward()
            self.trainer._step += 1
        torch.nn.utils.clip_grad_norm_([p for p in self.trainer.model.parameters() if p.requires_grad], 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()


def script(model, ids):
    """Let `generate` return these responses at once, with the states that generating them would have left behind."""
    written = []

    def generate(input_ids, attention_mask, pixel_values, **kwargs):
        rows = ids[: len(input_ids)].to(input_ids.device)
        sequences = torch.cat([input_ids, rows], 1)
        recorder = open_recorder(getattr(model, "mllm", model))
        if recorder is None:
            return sequences
        if not written:
            mask = torch.cat([attention_mask, torch.ones_like(rows)], 1)
            inputs = {"input_ids": sequences[:, :-1], "attention_mask": mask[:, :-1], "pixel_values": pixel_values}
            with torch.no_grad():
                model.mllm.model(**inputs)
            eos = model.generation_config.eos_token_id
            written.append(recorder.states_of_generation(sequences, input_ids, attention_mask, eos))
        recorder.states = written[0]
        return sequences

    model.generate = generate


def main(argv=None):
    args = parse(argv)
    args.threads = args.threads or torch.get_num_threads()
    model, processor = sized_model(args, image_side=args.image_side)
    rows = benchmark_rows(2, args.batch * args.accumulation // 2)
    ids = scripted_ids(model, processor, args.response, args.batch * args.accumulation)
    shared = dict(
        output_dir="runs/benchmark",
        per_device_train_batch_size=args.batch,
        gradient_accumulation_steps=args.accumulation,
        num_generations=args.batch * args.accumulation // 2,
        max_completion_length=args.response,
        max_steps=1,
        beta=args.beta,
        learning_rate=1e-6,
        report_to=[],
        use_cpu=args.device == "cpu",
        bf16=args.bf16,
        gradient_checkpointing=False,
        disable_tqdm=True,
    )
    adapters: dict[str, Any] = {"joint": None, "plain": None}
    if args.lora:
        model.config.think_id = processor.think_id
        frozen = {id(weight): weight for weight in model.mllm.parameters()}
        mllm = copy.deepcopy(model.mllm, frozen)  # adapters are put on frozen weights, which both may have
        adapters["joint"] = lora_config(model, r=16)
        targets = adapters["joint"].target_modules.replace(r".*mllm\.", ".*")
        rows_learned = {"embed_tokens": learned_rows(model)}
        adapters["plain"] = LoraConfig(
            r=16, target_modules=targets, modules_to_save=["lm_head"], trainable_token_indices=rows_learned
        )
    else:
        mllm = copy.deepcopy(model.mllm)
        freeze(model)
        for own, copied in zip(model.mllm.parameters(), mllm.parameters(), strict=True):
            copied.requires_grad_(own.requires_grad)  # both trainers train the same weights of the MLLM
    reference = copy.deepcopy(mllm) if args.beta and not args.lora else None

    if args.whole:
        joint_forward.constant_prefix = lambda *args: contextlib.nullcontext()
    script(model, ids)
    script(mllm, ids)
    joint = SegCompassGRPOTrainer(
        model,
        args=SegCompassGRPOConfig(**shared),
        train_dataset=rows,
        processing_class=processor,
        peft_config=adapters["joint"],
    )
    settings = dict(loss_type="grpo", use_bias_correction_kl=False, remove_unused_columns=False)
    if not args.lora:
        settings["beta"] = 0.0  # TRL would load a reference by name; it is given below
    plain_rows = rows.map(lambda row: {"prompt": processor.build_messages(row["instruction"])})
    plain = GRPOTrainer(
        mllm,
        reward_funcs=lambda completions, **kwargs: [0.5] * len(completions),
        args=GRPOConfig(**{**shared, **settings}),
        train_dataset=plain_rows,
        processing_class=processor,
        peft_config=adapters["plain"],
    )
    if reference is not None:
        add_fused_lm_head(reference.requires_grad_(False).eval(), temperature=1.0, outputs=("log_probs", "entropy"))
        reference = plain.accelerator.prepare_model(reference, evaluation_mode=True)
        plain.ref_model, plain.beta = reference, args.beta

    batch = [row for row in rows for _ in range(shared["num_generations"])]
    plain_batch = [row for row in plain_rows for _ in range(shared["num_generations"])]
    steppers = {"joint": Stepper(joint, batch), "plain": Stepper(plain, plain_batch)}
    seconds, clock = ({name: [] for name in steppers} for _ in range(2))
    now = time.process_time if args.device == "cpu" else clock_of(args)
    for repeat in range(args.repeats + 1):
        for name, stepper in steppers.items():
            began, used = time.perf_counter(), now()
            stepper.step()
            if repeat:  # the first warms up
                seconds[name].append(now() - used)
                clock[name].append(time.perf_counter() - began)
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    for name, value in medians.items():
        print(f"{name:<8}{value:8.3f} s a step   (all: {', '.join(f'{v:.2f}' for v in seconds[name])})")
    pairs = [joint / plain for joint, plain in zip(seconds["joint"], seconds["plain"], strict=True)]
    result = {
        "ratio": round(statistics.median(pairs), 4),
        "pairs": [round(min(pairs), 4), round(max(pairs), 4)],
        "clock_ratio": round(statistics.median(clock["joint"]) / statistics.median(clock["plain"]), 4),
        "joint_s": round(medians["joint"], 4),
        "plain_s": round(medians["plain"], 4),
        "mllm_parameters": sum(p.numel() for p in mllm.parameters()),
        "responses": args.batch * args.accumulation,
        "response_tokens": args.response,
        "beta": args.beta,
        "whole": args.whole,
        "lora": args.lora,
        "bf16": args.bf16,
        "image_tokens": (args.image_side // 16) ** 2,
        **machine(args),
    }
    print("RESULT", json.dumps(result))


if __name__ == "__main__":
    main()
