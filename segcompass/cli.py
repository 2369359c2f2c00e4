"""The command `segcompass`: a table from its subcommands to the modules in segcompass/commands/.

A module is imported when its command is run, so that `segcompass --help` is quick. Options may be written with hyphens
or, as the recipes' fields are, with underscores. Knows nothing about any command's options.
"""

import os
import re
import sys
import traceback
from importlib import import_module

import segcompass

COMMANDS = {
    "segment": ("segment", "Segment what an instruction means in an image, and draw every step."),
    "explain": ("explain", "Show which concepts made each mask, and which words and patches they came from."),
    "evaluate": ("evaluate", "Score a model, or any model's predictions, on a data set."),
    "prepare-data": ("prepare_data", "Convert a data set once to parquet files that the other commands read."),
    "write-traces": ("write_traces", "Write the reasoning traces of the cold start, from annotations or by a model."),
    "train sae": ("train_sae", "Train a sparse autoencoder on an MLLM's hidden states."),
    "train sft": ("train_sft", "Cold start: teach the reasoning and the masks from reference traces."),
    "train grpo": ("train_grpo", "Train the reasoning by GRPO and the masks by supervision, together."),
    "curves": ("curves", "Draw what one or several trainings logged as a page."),
    "merge": ("merge", "Merge trained adapters into their model; the result is a model like any other."),
    "evaluate-sae": ("evaluate_sae", "Measure what a sparse autoencoder reconstructs, and what the MLLM loses by it."),
    "dictionary": ("dictionary", "List what each concept of a model fires on, and name the concepts."),
    "dashboard": ("dashboard", "Draw what each feature does: fires on, detects, steers; and export for Neuronpedia."),
    "faithfulness": ("faithfulness", "Measure whether the concepts make the masks, by switching them off."),
    "white-box": ("white_box", "Measure whether the concepts mean what is shown, by six criteria with controls."),
    "interpret": ("interpret", "Draw the paper's interpretability figures of a model."),
    "precompute-features": ("precompute_features", "Encode a data set's images once, for training and evaluation."),
    "plan-memory": ("plan_memory", "Print what each GPU will hold under a recipe, before anything is downloaded."),
    "verify": ("verify", "Compare a saved folder with its manifest, every byte of it, or sign it anew."),
    "push": ("push", "Push a model, an SAE, a data set or the metric to the Hub, with its card."),
    "demo": ("demo", "Start the demo in a browser: ask, look into the slots, switch concepts off."),
    "serve": ("serve", "Serve a model over HTTP: image and instruction in; text, masks and concepts out."),
    "recipes": ("recipes", "List the training recipes that ship with the package, or print one."),
}
"""command -> (module in segcompass/commands/, what it does in one sentence)."""


def main(argv: list[str] | None = None) -> None:
    """Run a command; bad input ends with one line that says what to do, and exit status 1.

    Args:
        argv: the words after `segcompass`; None takes the process's own.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    debug = words[:1] == ["--debug"]
    words = words[debug:]
    if words in (["--version"], ["-V"]):
        print(f"segcompass {segcompass.__version__}")
        return
    command = next((name for name in (" ".join(words[:2]), *words[:1]) if name in COMMANDS), None)
    if command is None:
        _show_commands(words)
        return
    options = [_hyphens(word) for word in words[len(command.split()) :]]
    if os.getcwd() not in sys.path:  # for dotted paths of the user's own rewards and data sets
        sys.path.append(os.getcwd())  # last, so that a folder there hides nothing that is installed
    try:
        import_module(f"segcompass.commands.{COMMANDS[command][0]}").main(options)
    except (ValueError, OSError) as error:
        if debug or not (isinstance(error, OSError) or _is_ours(error)):
            raise
        print(f"segcompass {command}: {error}", file=sys.stderr)
        raise SystemExit(1) from error


def _hyphens(word: str) -> str:
    """`--num_samples=5` -> `--num-samples=5`; what is no option stays as it is."""
    return re.sub(r"^--[^=]+", lambda option: option[0].replace("_", "-"), word)


def _is_ours(error: BaseException) -> bool:
    """Whether this project raised the error: its message says what to do. Others are better read with a traceback."""
    *_, (frame, _) = traceback.walk_tb(error.__traceback__)
    return frame.f_globals["__name__"].startswith("segcompass.")


def _show_commands(words: list[str]) -> None:
    """Print the commands, of `train` alone where that was asked; exit with status 2 unless it was help that was."""
    group = words[0] if words and any(name.startswith(f"{words[0]} ") for name in COMMANDS) else ""
    rest = words[1:] if group else words
    shown = {name: does for name, (_, does) in COMMANDS.items() if name.startswith(group)}
    lines = [
        f"usage: segcompass {group or 'COMMAND'} {'STAGE ' if group else ''}[options]",
        "",
        *(f"  {name:<21}{does}" for name, does in shown.items()),
        "",
        f"`segcompass {group + ' STAGE' if group else 'COMMAND'} --help` lists the options of one.",
    ]
    if not group:
        lines += [
            "`segcompass --version` prints the version.",
            "`segcompass --debug COMMAND …` shows the traceback of an error.",
        ]
    if rest in (["--help"], ["-h"], ["help"]):
        print("\n".join(lines))
        return
    known = ", ".join(shown)
    unknown = f"{' '.join([group, *rest[:1]]).strip()!r} is no command; " if rest else ""
    print("\n".join(lines) if not rest else f"segcompass: {unknown}choose one of {known}.", file=sys.stderr)
    raise SystemExit(2)
