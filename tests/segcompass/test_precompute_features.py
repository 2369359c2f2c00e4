"""`segcompass precompute-features`, and the commands that read what it wrote."""

import json

from segcompass.commands import evaluate, precompute_features, train_grpo

SCENES = ["--dataset", "scenes", "--seed", "3"]


def test_evaluation_and_training_read_what_was_encoded_once(saved, tmp_path, writes, capsys):
    folder, processor = saved
    features = tmp_path / "features"
    arguments = ["--model", str(folder), *SCENES, "--output", str(features), "--batch-size", "2"]
    precompute_features.main([*arguments, "--split", "test", "--num-samples", "4"])
    assert "4 images of encoder" in (printed := capsys.readouterr().out) and "4 of them new" in printed
    precompute_features.main([*arguments, "--split", "test", "--num-samples", "4"])
    assert "0 of them new" in capsys.readouterr().out
    precompute_features.main([*arguments, "--split", "train", "--num-samples", "4"])

    writes("<think>a red ball</think>" + "<REF_POS>" * 3, processor)
    arguments = ["--model", str(folder), *SCENES, "--split", "test", "--num-samples", "4", "--threshold", "0"]
    encoded = evaluate.main([*arguments, "--output", str(tmp_path / "encoded")])
    read = evaluate.main([*arguments, "--output", str(tmp_path / "read"), "--image-features", str(features)])
    assert abs(encoded["gIoU"] - read["gIoU"]) < 0.02, "features are kept in float16"

    options = "--max-steps 1 --per-device-train-batch-size 2 --gradient-accumulation-steps 1 --num-generations 2"
    options += " --max-completion-length 24 --logging-steps 1 --save-strategy no --report-to none --use-cpu true"
    options += " --bf16 false --split train --num-samples 4 --dataset-seed 3 --dataset scenes"
    train_grpo.main(
        ["--model", str(folder), "--output-dir", str(tmp_path / "grpo"), "--image-features", str(features)]
        + options.split()
    )
    assert json.loads((tmp_path / "read" / "metrics.json").read_text())["n"] == 4
