#!/usr/bin/env bash
# The whole story of the embedded model, in order: backbones, reasoning, SAE, masks, joint GRPO, evaluation.
# Two CPU cores, about two and a quarter hours; run stage by stage with these settings, not yet in one go (dev/log.md).
# Repeat the command after an interruption: finished stages are skipped and an unfinished training goes on from its last
# checkpoint. Everything lies under runs/mini.
set -euo pipefail
cd "$(dirname "$0")/../../.."
recipe=examples/recipes/mini
# Two processes with a thread each beat one with two; glibc must not give big blocks back after every tensor.
export OMP_NUM_THREADS=1 MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=100000000000 MALLOC_TOP_PAD_=268435456
done_or() { [ -f "runs/mini/$1" ] || "${@:2}"; }

two="torchrun --nproc_per_node 2"
done_or sam/model.safetensors $two $recipe/make_backbones.py sam --output runs/mini/sam --minutes 8
done_or mllm/model.safetensors $two $recipe/make_backbones.py mllm --output runs/mini/mllm --minutes 70
done_or reason/model.safetensors $two examples/train_sft.py --config $recipe/reason.yaml
done_or sae/quality.json env OMP_NUM_THREADS=2 python examples/train_sae.py --config $recipe/sae.yaml
done_or masks/model.safetensors $two examples/train_sft.py --config $recipe/masks.yaml
done_or grpo/model.safetensors env OMP_NUM_THREADS=2 python examples/train_grpo.py --config $recipe/grpo.yaml
for stage in masks grpo; do
    python examples/evaluate.py --model runs/mini/$stage --dataset scenes --split test --seed 100 --num-samples 500 \
        --output runs/mini/evaluation-$stage
done
python $recipe/save_checkpoint.py --model runs/mini/masks --output runs/mini/checkpoint  # what the docs measured
