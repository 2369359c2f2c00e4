"""What joint training adds: held-out gIoU before it and after it, over seeds, and how the rewards rose.

    for seed in 1 2 3; do
        segcompass train grpo --config mini/grpo --seed $seed --dataset-seed 4$seed \\
            --output-dir runs/mini/grpo-$seed
        segcompass evaluate --model runs/mini/grpo-$seed --dataset scenes --split test --seed 100 \\
            --num-samples 500 --output runs/mini/evaluation-grpo-$seed
    done
    python examples/recipes/mini/joint_gain.py --start runs/mini/evaluation-masks --runs runs/mini/grpo-[123] \\
        --output docs/figures/joint_training.png

The evaluation of runs/mini/NAME is in runs/mini/evaluation-NAME. Draws the mean reward of each step, one line per seed,
and gIoU before and after; prints the metrics, and the mean gain beside the spread of the seeds (greatest minus least).
"""

import argparse
import json
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure


def read(path: Path) -> dict:
    """The content of a JSON file."""
    return json.loads(path.read_text())


def last_log(run: Path) -> np.ndarray:
    """Steps and mean rewards of a training, float (2, n)."""
    states = sorted(run.glob("checkpoint-*/trainer_state.json"), key=lambda path: int(path.parent.name.split("-")[1]))
    if not states:
        raise SystemExit(f"{run} holds no checkpoint-*/trainer_state.json; name the output_dir of a training.")
    log = read(states[-1])["log_history"]
    return np.array([(entry["step"], entry["reward"]) for entry in log if "reward" in entry]).T


def main() -> None:
    """Draw and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--start", type=Path, required=True, help="evaluation of the model joint training started from")
    parser.add_argument("--runs", type=Path, nargs="+", required=True)
    parser.add_argument("--output", type=Path, required=True, help="PNG")
    args = parser.parse_args()
    start = read(args.start / "metrics.json")
    ends = [read(run.with_name(f"evaluation-{run.name}") / "metrics.json") for run in args.runs]
    gains = np.array([end["gIoU"] - start["gIoU"] for end in ends])

    figure = Figure(figsize=(9, 3.2), layout="constrained")
    curve, bars = figure.subplots(1, 2, width_ratios=(2, 1))
    for run in args.runs:
        curve.plot(*last_log(run), label=run.name)
    curve.set(xlabel="step", ylabel="mean reward (0.3 format + 0.7 mask)")
    curve.legend(frameon=False)
    values = [start["gIoU"], *(end["gIoU"] for end in ends)]
    bars.bar(["start", *(run.name for run in args.runs)], values, color=["0.6", *["C0"] * len(ends)])
    bars.set(ylabel="gIoU, held out", ylim=(min(values) - 0.05, max(values) + 0.02))
    bars.tick_params(axis="x", rotation=30)
    args.output.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(args.output, dpi=130)

    for name, metrics in zip(["start", *(run.name for run in args.runs)], [start, *ends], strict=True):
        print(f"{name:<12}" + "   ".join(f"{key} {metrics[key]:.4f}" for key in ("gIoU", "cIoU", "N-acc", "T-acc")))
    spread = gains.max() - gains.min()
    print(f"gain in gIoU {gains.mean():+.4f} on average, {gains.min():+.4f} at least; spread of the seeds {spread:.4f}")


if __name__ == "__main__":
    main()
