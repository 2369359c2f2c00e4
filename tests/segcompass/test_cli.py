"""The command `segcompass`: its table, its help, how options are spelled, and how it fails."""

import json
import re
import subprocess
import sys
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace

import pytest
from PIL import Image

import segcompass
from segcompass import cli, hub_cards
from segcompass.commands import demo, options, plan_memory, push, recipes, train_grpo
from segcompass.journal import weights_of
from segcompass.loaders.folder_lock import folder_lock


def test_every_command_has_a_module_and_a_sentence_and_every_module_a_command():
    files = {path.stem for path in Path(cli.__file__).parent.glob("commands/*.py")}
    assert {module for module, _ in cli.COMMANDS.values()} == files - {"__init__", "options"}
    for _, sentence in cli.COMMANDS.values():
        assert sentence[0].isupper() and sentence.endswith(".")


def test_help_lists_the_commands_and_imports_nothing_heavy():
    code = """
import sys
from segcompass.cli import COMMANDS, main
main(["--help"])
for command in COMMANDS:
    if not command.startswith("train "):
        try:
            main([*command.split(), "--help"])
        except SystemExit as stopped:
            assert not stopped.code, command
assert not {"torch", "transformers", "datasets"} & sys.modules.keys(), sorted(sys.modules)
"""
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    for command, (_, sentence) in cli.COMMANDS.items():
        assert f"{command:<21}{sentence}" in shown
        assert command.startswith("train ") or f"usage: segcompass {command}" in shown


def test_version_and_the_stages_of_training(capsys):
    cli.main(["--version"])
    assert capsys.readouterr().out == f"segcompass {segcompass.__version__}\n"
    cli.main(["train", "--help"])
    shown = capsys.readouterr().out
    assert "train sae" in shown and "train grpo" in shown and "evaluate" not in shown


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "usage: segcompass COMMAND"),
        (["train"], "usage: segcompass train STAGE"),
        (["train", "grp"], "'train grp' is no command; choose one of train sae, train sft, train grpo."),
        (["segmnt"], "'segmnt' is no command; choose one of segment, explain,"),
    ],
)
def test_what_is_no_command_is_named_beside_those_that_are(words, message, capsys):
    with pytest.raises(SystemExit) as stopped:
        cli.main(words)
    assert stopped.value.code == 2 and message in capsys.readouterr().err


@pytest.mark.parametrize("spelling", ["--num-samples", "--num_samples"])
def test_options_are_spelled_either_way(spelling, monkeypatch):
    taken = []
    monkeypatch.setattr(import_module("segcompass.commands.evaluate"), "main", taken.append)
    cli.main(["evaluate", f"{spelling}=5", spelling, "5", "--output", "runs/my_run", "a_b--c_d"])
    assert taken == [["--num-samples=5", "--num-samples", "5", "--output", "runs/my_run", "a_b--c_d"]]


def test_modules_of_the_current_folder_are_found_last(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.path", list(sys.path))
    (tmp_path / "my_data.py").write_text("def load(split):\n    raise ValueError('asked for ' + split)\n")
    with pytest.raises(ValueError, match="asked for dusk"):
        cli.main(["prepare-data", "my_data.load", "--split", "dusk", "--output", "out"])
    assert sys.path[-1] == str(tmp_path)  # behind everything installed, which it must not shadow


def test_errors_of_ours_are_one_line_and_others_keep_their_traceback(monkeypatch, capsys):
    with pytest.raises(SystemExit) as stopped:
        cli.main(["recipes", "nowhere"])
    assert stopped.value.code == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("segcompass recipes: 'nowhere' is neither a file nor the name of a recipe; there are ")
    assert "llava-1.5-7b/sft, " in line
    with pytest.raises(ValueError, match="nowhere"):
        cli.main(["--debug", "recipes", "nowhere"])

    def fail(argv):
        raise ValueError("from somewhere else")

    monkeypatch.setattr(recipes, "main", fail)
    with pytest.raises(ValueError, match="from somewhere else"):
        cli.main(["recipes"])


def test_wrong_values_of_shared_options_are_named(capsys):
    parser = options.command_parser("x", None)
    options.add_rows(parser, "test", 5)
    assert vars(parser.parse_args(["--dataset-seed", "3"])) == vars(parser.parse_args(["--seed", "3"]))
    for value in ("0", "-1", "many"):
        with pytest.raises(SystemExit):
            parser.parse_args([f"--num-samples={value}"])
        assert f"argument --num-samples: it is '{value}'; it must be a whole number" in capsys.readouterr().err


WRITERS = sorted(
    path.stem
    for path in Path(cli.__file__).parent.glob("commands/*.py")
    if path.stem != "options" and re.search(r'"--output"|add_image\(', path.read_text())
)


@pytest.mark.parametrize("module", WRITERS)
def test_a_file_in_place_of_the_output_folder_is_named_before_anything_is_loaded(module, tmp_path, capsys):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(SystemExit):
        import_module(f"segcompass.commands.{module}").parse(["--output", str(tmp_path / "notes.txt")])
    assert f"{tmp_path}/notes.txt is a file; name a folder" in capsys.readouterr().err
    with (
        pytest.raises(NotADirectoryError, match=r"notes\.txt is a file; name a folder"),
        folder_lock(tmp_path / "notes.txt"),
    ):
        pass


def test_memory_is_planned_for_a_recipe_by_name(capsys):
    result = plan_memory.main(["--recipe", "llava-1.5-7b/grpo", "--lora-rank", "16"])
    assert result["peak"] < result["room"]
    assert "grpo.yaml: fsdp2 on 8 GPUs of 80 GB" in capsys.readouterr().out


def test_the_demo_says_what_it_lacks(monkeypatch):
    monkeypatch.setitem(sys.modules, "gradio", None)  # as if it were not installed
    with pytest.raises(ValueError, match=r'gradio is missing, .*pip install "segcompass\[demo\]"'):
        demo.main([])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--model_revision", "abc"], "model_revision='abc' is not followed"),
        (["--dtype", "bfloat16"], "dtype='bfloat16' is not followed"),
        (["--use_peft", "--lora_modules_to_save", "lm_head"], r"lora_modules_to_save=\['lm_head'\] is not followed"),
        (["--lora_r", "8"], "lora_r=8 is given without use_peft"),
        (["--use_dora"], "use_dora=True is given without use_peft"),
    ],
)
def test_options_of_trl_that_would_change_nothing_are_refused(options, message, tmp_path):
    arguments = ["--model", "nowhere", "--output_dir", str(tmp_path), "--use_cpu", "--bf16", "false"]
    with pytest.raises(ValueError, match=message):
        train_grpo.main([*arguments, *options])


def test_metrics_of_another_model_or_split_do_not_get_on_a_card(tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    run = {"model": "runs/x", "weights": weights_of(str(tmp_path / "model")), "split": "val"}
    (tmp_path / "run.json").write_text(json.dumps(run))
    arguments = ["model", str(tmp_path / "model"), "org/name", "--evaluation", str(tmp_path / "metrics.json")]
    push.check_evaluation(push.parse([*arguments, "--evaluation-split", "val"]))
    with pytest.raises(ValueError, match="measured on split 'val', the card would say 'test'"):
        push.check_evaluation(push.parse(arguments))
    (tmp_path / "model" / "config.json").write_text("[]")
    with pytest.raises(ValueError, match="measured on the model 'runs/x' as it was then"):
        push.check_evaluation(push.parse([*arguments, "--evaluation-split", "val"]))


def test_photographs_that_say_where_they_were_taken_are_not_published_unasked(tmp_path, monkeypatch):
    pushed = []
    commit = SimpleNamespace(oid="1")
    monkeypatch.setattr(hub_cards, "push_dataset", lambda rows, *_, **__: pushed.append(len(rows)) or commit)
    lines = [{"image": f"{number % 3}.jpg", "instruction": "it", "masks": []} for number in range(600)]
    (tmp_path / "mine.jsonl").write_text("\n".join(map(json.dumps, lines)))
    for number in range(3):
        exif = Image.Exif()
        exif[0x0112] = 6  # every photograph has EXIF, one of them a place
        if number == 1:
            exif[0x8825] = {2: (52.0, 31.0, 12.0)}
        Image.new("RGB", (9, 6)).save(tmp_path / f"{number}.jpg", exif=exif)
    words = ["dataset", str(tmp_path / "mine.jsonl"), "me/mine", "--split", "train"]
    with pytest.raises(
        ValueError, match="1 of 3 images say where they were taken .* of sample 'mine-2', and everybody"
    ):
        push.main(words)
    assert not pushed
    for further in (["--with-places"], ["--private"]):
        push.main([*words, *further])
    exif = Image.Exif()
    Image.new("RGB", (9, 6)).save(tmp_path / "1.jpg", exif=exif)
    push.main(words)
    assert pushed == [600] * 3, "all rows: 500 is the default of drawn scenes alone"


def test_splits_are_pushed_together(tmp_path, monkeypatch):
    pushed = {}

    def push_dataset(rows, *_, split, **__):
        pushed.update({name: part["instruction"][:] for name, part in rows.items()} | {"named": split})
        return SimpleNamespace(oid="1")

    monkeypatch.setattr(hub_cards, "push_dataset", push_dataset)
    Image.new("RGB", (9, 6)).save(tmp_path / "a.jpg")
    lines = [{"image": "a.jpg", "instruction": name, "masks": [], "split": name} for name in ("train", "val", "test")]
    (tmp_path / "mine.jsonl").write_text("\n".join(map(json.dumps, lines)))
    push.main(["dataset", str(tmp_path / "mine.jsonl"), "me/mine", "--split", "train", "val"])
    assert pushed == {"train": ["train"], "val": ["val"], "named": None}
