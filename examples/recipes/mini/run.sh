#!/usr/bin/env bash
# The whole story of the embedded model, in order: backbones, reasoning, SAE, masks, joint GRPO, evaluation.
# Two CPU cores, about two and a quarter hours; run stage by stage with these settings, not yet in one go (dev/log.md).
# Repeat the command to resume: finished stages are skipped, an unfinished training continues from its last checkpoint.
# Everything is written to runs/mini.
set -euo pipefail
cd "$(dirname "$0")/../../.."
recipe=examples/recipes/mini
# Two processes with a thread each beat one with two; glibc must not give big blocks back after every tensor.
export OMP_NUM_THREADS=1 MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=100000000000 MALLOC_TOP_PAD_=268435456
done_or() { [ -f "runs/mini/$1" ] || "${@:2}"; }

two="torchrun --nproc_per_node 2"
done_or sam/model.safetensors $two $recipe/make_backbones.py image_encoder --output runs/mini/sam --minutes 8
done_or mllm/model.safetensors $two $recipe/make_backbones.py mllm --output runs/mini/mllm --minutes 70
done_or reason/model.safetensors $two -m segcompass train sft --config $recipe/reason.yaml
done_or sae/quality.json env OMP_NUM_THREADS=2 segcompass train sae --config $recipe/sae.yaml
done_or masks/model.safetensors $two -m segcompass train sft --config $recipe/masks.yaml
done_or grpo/model.safetensors env OMP_NUM_THREADS=2 segcompass train grpo --config $recipe/grpo.yaml
for stage in masks grpo; do
    segcompass evaluate --model runs/mini/$stage --dataset scenes --split test --seed 100 --num-samples 500 \
        --output runs/mini/evaluation-$stage
done
python $recipe/save_checkpoint.py --model runs/mini/masks --output runs/mini/checkpoint  # what the docs measured
