#!/usr/bin/env bash
# The grounded small model: the MLLM of the small model goes on with the alignment term, then SAE, masks, read-out, ties.
# Give the small model to start from, or run examples/recipes/mini/run.sh first. Two CPU cores, about an hour and a half.
# Repeat the command to resume: finished stages are skipped, an unfinished one continues from its last state.
# Everything is written to runs/mini-grounded. Whether bfloat16 is used hangs on the machine: one step of each is timed.
set -euo pipefail
cd "$(dirname "$0")/../../.."
recipe=examples/recipes/mini-grounded runs=runs/mini-grounded
export OMP_NUM_THREADS=1 MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=100000000000 MALLOC_TOP_PAD_=268435456
done_or() { [ -f "$runs/$1" ] || "${@:2}"; }

start=${1:-runs/mini/masks}  # a small model with the attention read-out, from examples/recipes/mini/run.sh
two="torchrun --nproc_per_node 2"
done_or mllm/model.safetensors $two examples/recipes/mini/make_backbones.py mllm --grounded $start --output $runs/mllm \
    --minutes 48
done_or joined/model.safetensors python $recipe/stages.py join --mllm $runs/mllm --weights $start --output $runs/joined
done_or sae/quality.json env OMP_NUM_THREADS=2 segcompass train sae --config $recipe/sae.yaml
done_or masks/masks.pt $two $recipe/stages.py masks --model $runs/joined --output $runs/masks --minutes 15
done_or read/model.safetensors env OMP_NUM_THREADS=2 python $recipe/stages.py read --model $runs/joined \
    --sae $runs/sae --masks $runs/masks/masks.pt --output $runs/read
done_or ties/model.safetensors env OMP_NUM_THREADS=2 python $recipe/stages.py ties --model $runs/read \
    --states $runs/read/states --output $runs/ties
for dataset in scenes mixed-scenes; do
    segcompass evaluate --model $runs/ties --dataset $dataset --split test --seed 100 --num-samples 500 \
        --output $runs/evaluation-$dataset
done
