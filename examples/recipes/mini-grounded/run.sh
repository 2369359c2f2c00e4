#!/usr/bin/env bash
# The grounded small model from nothing: backbones with the alignment term, SAE, masks, read-out, evaluation.
# Two CPU cores; stages of at most 75 minutes, about two and three quarter hours in all (not yet run as a whole).
# Repeat the command to resume: finished stages are skipped, an unfinished one continues from its last state.
# Everything is written to runs/mini-grounded. Whether bfloat16 is used hangs on the machine: one step of each is timed.
set -euo pipefail
cd "$(dirname "$0")/../../.."
recipe=examples/recipes/mini-grounded runs=runs/mini-grounded
export OMP_NUM_THREADS=1 MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=100000000000 MALLOC_TOP_PAD_=268435456
done_or() { [ -f "$runs/$1" ] || "${@:2}"; }

two="torchrun --nproc_per_node 2"
backbones="$two examples/recipes/mini/make_backbones.py"
done_or sam/model.safetensors $backbones image_encoder --grounded --output $runs/sam --minutes 6
done_or mllm/model.safetensors $backbones mllm --grounded --output $runs/mllm --minutes 75
done_or joined/model.safetensors python $recipe/stages.py join --mllm $runs/mllm --image-encoder $runs/sam \
    --output $runs/joined
done_or sae/quality.json env OMP_NUM_THREADS=2 segcompass train sae --config $recipe/sae.yaml
done_or masks/masks.pt $two $recipe/stages.py masks --model $runs/joined --output $runs/masks --minutes 25
done_or read/model.safetensors env OMP_NUM_THREADS=2 python $recipe/stages.py read --model $runs/joined \
    --sae $runs/sae --masks $runs/masks/masks.pt --output $runs/read
for dataset in scenes mixed-scenes; do
    segcompass evaluate --model $runs/read --dataset $dataset --split test --seed 100 --num-samples 500 \
        --output $runs/evaluation-$dataset
done
