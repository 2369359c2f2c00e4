"""Train a sparse autoencoder on the hidden states of an MLLM over image, instruction and response tokens.

    segcompass train sae --config mini/sae
    segcompass train sae --config llava-1.5-7b/sae --estimate    # what it will take
    segcompass train sae --config mini/sae --sweep 8 16 32 64    # quality over sparsity, as a curve

A recipe is a YAML file, or a name that `segcompass recipes` lists; options replace its values. The hidden states are
streamed from the model while the SAE trains, or gathered once into a folder (--cache-dir). Repeat the command to resume
an interrupted run: both gathering and training continue where they stopped.
"""

import copy
import json
import logging
from dataclasses import asdict, dataclass, field
from itertools import islice
from pathlib import Path

from datasets import Dataset, IterableDataset
from torch.utils.data import DataLoader
from transformers import PreTrainedConfig, PreTrainedModel

from segcompass.journal import weights_of
from segcompass.loaders.image_text import has_splits, image_text, image_text_digest, load_image_text
from segcompass.loading import load_mllm
from segcompass.modeling_segcompass import SparseAutoencoder, SparseAutoencoderConfig
from segcompass.modeling_segcompass.backbone_files import check_mllm, read_config
from segcompass.modeling_segcompass.manifest import signing
from segcompass.modeling_segcompass.sae_origin import origin_of
from segcompass.modeling_segcompass.whole_files import write_whole
from segcompass.recipes import parse_with_recipe
from segcompass.sae_sweep import swept_field, write_sweep
from segcompass.trainers import SparseAutoencoderTrainer, SparseAutoencoderTrainerConfig
from segcompass.trainers.activation_cache import CachedActivations, cache_activations
from segcompass.trainers.activations import ActivationDataset, take_tokens
from segcompass.trainers.checkpoints import alone_in_output, last_checkpoint
from segcompass.trainers.collator import ImageTextCollator
from segcompass.trainers.sae_estimate import estimate_sae_training
from segcompass.trainers.sae_quality import evaluate_sae

from . import options

logger = logging.getLogger(__name__)


@dataclass
class SAEArguments:
    """Whose hidden states, over which rows, into what autoencoder."""

    model: str = field(metadata={"help": "SegCompass model or LLaVA-1.5 / Qwen2.5-VL model, as a folder or Hub id"})
    dataset: str = field(default="scenes", metadata={"help": options.TEXT_ROWS})
    split: str = field(default="train", metadata={"help": "split to train on"})
    evaluation_split: str | None = field(
        default="val",
        metadata={"help": "split to score the SAE on; null holds out evaluation_samples rows by the seed"},
    )
    dataset_seed: int = field(default=0, metadata={"help": "seed of which rows are drawn, and of procedural scenes"})
    num_samples: int | None = field(
        default=100_000, metadata={"help": "how many rows, drawn by the seed; null takes all of them"}
    )
    token_window: int = field(default=3400, metadata={"help": "skip, and count, samples of more tokens than this"})
    d_sae: int | None = field(default=None, metadata={"help": "features; null takes those of the SegCompass model"})
    layer: int | None = field(default=None, metadata={"help": "L: the SAE reads the output of the L-th decoder block"})
    activation: str | None = field(default=None, metadata={"help": "relu, topk, batchtopk, matryoshka or jumprelu"})
    k: int | None = field(default=None, metadata={"help": "features that a token keeps (topk, batchtopk, matryoshka)"})
    samples_per_batch: int = field(default=64, metadata={"help": "samples that the MLLM reads at once"})
    tokens_per_batch: int = field(default=4096, metadata={"help": "tokens in one step of the SAE, per process"})
    buffer_size: int = field(default=32_768, metadata={"help": "tokens that are shuffled together"})
    evaluation_tokens: int = field(default=100_000, metadata={"help": "held-out tokens to score the SAE on"})
    evaluation_samples: int = field(default=1000, metadata={"help": "rows held out where evaluation_split is null"})
    cache_dir: str | None = field(
        default=None, metadata={"help": "folder to gather the hidden states in once; null streams them"}
    )
    cache_gb: float = field(default=100.0, metadata={"help": "stop gathering when the cache has this size"})
    samples_per_shard: int = field(default=128, metadata={"help": "samples in each file of the cache"})
    sweep: list[float] | None = field(
        default=None,
        metadata={
            "help": "train one SAE for each of these values of k (relu, jumprelu: of the penalty's coefficient), in "
            "folders of their own, and draw quality over L0"
        },
    )
    estimate: bool = field(
        default=False, metadata={"help": "only print the tokens, disk, memory and hours that training will take"}
    )
    image_tokens: int = field(default=576, metadata={"help": "for the estimate: image tokens per sample"})
    text_tokens: int = field(default=100, metadata={"help": "for the estimate: other tokens per sample"})
    tflops: float = field(default=300.0, metadata={"help": "for the estimate: 10^12 operations per second and process"})
    processes: int = field(default=1, metadata={"help": "for the estimate: number of processes"})

    def __post_init__(self):
        if self.evaluation_split == "null":  # as a command line says it
            self.evaluation_split = None


def main(argv: list[str] | None = None) -> None:
    """Run the command with these options; None takes the process's own."""
    parser = options.recipe_parser("train sae", __doc__, (SAEArguments, SparseAutoencoderTrainerConfig))
    arguments, training = parse_with_recipe(parser, argv)
    model_config = read_config(arguments.model, "model")
    if model_config.model_type != "segcompass":
        check_mllm(model_config, arguments.model, "model")
    sae_config = make_sae_config(arguments, model_config)
    if arguments.estimate:
        print_estimate(arguments, training, model_config, sae_config)
        return
    field = swept_field(sae_config.activation, arguments.sweep, sae_config.d_sae) if arguments.sweep else None
    model, processor = load_mllm(arguments.model, "bfloat16" if training.bf16 else "float32", training.device)
    collate = ImageTextCollator(processor, image_text, arguments.token_window)
    rows, held_out = read_rows(arguments)

    def stream(rows: Dataset | IterableDataset) -> ActivationDataset:
        loader = DataLoader(
            rows, arguments.samples_per_batch, collate_fn=collate, num_workers=training.dataloader_num_workers
        )
        return ActivationDataset(
            model,
            loader,
            sae_config.layer,
            batch_size=arguments.tokens_per_batch,
            buffer_size=arguments.buffer_size,
            with_types=True,
            on_nonfinite=training.on_nonfinite,
        )

    gathered = None
    if arguments.cache_dir:
        gathered = cached(arguments.cache_dir, arguments, training, model, collate, rows, sae_config)
    if training.max_steps <= 0:
        training.max_steps = count_steps(arguments, training, rows, collate)
    if field is None:
        train_one(arguments, training, sae_config, gathered or stream(rows), stream(held_out))
        return
    qualities = {}
    for value in arguments.sweep or []:
        one, of_one = copy.copy(training), copy.deepcopy(sae_config)
        one.output_dir = str(Path(training.output_dir, f"{field}-{value:g}"))
        setattr(of_one if field == "k" else one, field, int(value) if field == "k" else value)
        qualities[value] = train_one(arguments, one, of_one, gathered or stream(rows), stream(held_out))
    if training.process_index == 0:
        print("RESULT", json.dumps(write_sweep(qualities, field, Path(training.output_dir))))


def train_one(
    arguments: SAEArguments,
    training: SparseAutoencoderTrainerConfig,
    sae_config: SparseAutoencoderConfig,
    train_dataset: CachedActivations | ActivationDataset,
    held_out: ActivationDataset,
) -> dict:
    """Train an autoencoder, save it, and score it.

    Args:
        arguments: the command's options.
        training: the trainer's.
        sae_config: of the autoencoder.
        train_dataset: hidden states to train on.
        held_out: hidden states to score it on.

    Returns:
        What `evaluate_sae` found, which is also written to `quality.json`.
    """
    output = Path(training.output_dir or "")
    sae = SparseAutoencoder(sae_config)
    trainer = SparseAutoencoderTrainer(sae, training, train_dataset=train_dataset)
    with alone_in_output(training):
        trainer.train(training.resume_from_checkpoint or last_checkpoint(output))
        trainer.save_model()
        if isinstance(train_dataset, ActivationDataset):
            logger.warning("samples over all passes: %s", dict(train_dataset.report))
        share = -(-arguments.evaluation_tokens // training.world_size)  # each process streams its own rows
        quality = evaluate_sae(sae, take_tokens(held_out, share), trainer.accelerator.reduce)
        if trainer.is_world_process_zero():
            print(json.dumps(quality, indent=2))
            with signing(output):
                write_whole(output / "quality.json", json.dumps(quality, indent=2) + "\n")
    return quality


def make_sae_config(arguments: SAEArguments, model_config: PreTrainedConfig) -> SparseAutoencoderConfig:
    """The SAE's configuration: a SegCompass model's own, or that of a bare MLLM; options of the command win."""
    segcompass = model_config.model_type == "segcompass"
    mllm_config = model_config.mllm_config if segcompass else model_config
    text = mllm_config.get_text_config()
    fields = model_config.sae_config.to_dict() if segcompass else {"layer": text.num_hidden_layers // 2}
    named = {name: getattr(arguments, name) for name in ("d_sae", "layer", "activation", "k")}
    fields |= {name: value for name, value in named.items() if value is not None}
    fields |= {"d_in": text.hidden_size, "dataset": arguments.dataset, "token_window": arguments.token_window}
    if not fields.get("backbone"):
        origin = origin_of(mllm_config)
        fields["backbone"] = origin.name if segcompass else arguments.model
        fields["backbone_revision"] = origin.revision
    return SparseAutoencoderConfig(**fields)


def read_rows(arguments: SAEArguments) -> tuple[Dataset | IterableDataset, Dataset | IterableDataset]:
    """Rows to train on and rows to score on. Raises ValueError where these would be the same."""

    def rows(split: str, num_samples: int | None) -> Dataset | IterableDataset:
        return load_image_text(arguments.dataset, split, arguments.dataset_seed, num_samples, shuffled=True)

    if arguments.evaluation_split:
        if not has_splits(arguments.dataset):
            raise ValueError(
                f"evaluation_split is {arguments.evaluation_split!r}, but {arguments.dataset} is not divided into "
                "splits, and the SAE would be scored on the rows that it was trained on; set evaluation_split to null, "
                "which holds out evaluation_samples rows."
            )
        return rows(arguments.split, arguments.num_samples), rows(arguments.evaluation_split, arguments.num_samples)
    everything = rows(arguments.split, arguments.num_samples)
    rest, held_out = everything.skip(arguments.evaluation_samples), everything.take(arguments.evaluation_samples)
    if Path(arguments.dataset).exists() and next(iter(rest), None) is None:
        raise ValueError(
            f"{arguments.dataset} has no more rows than the {arguments.evaluation_samples} that evaluation_samples "
            "holds out, so that none is left to train on; hold out fewer, such as a twentieth."
        )
    return rest, held_out


def cached(
    folder: str,
    arguments: SAEArguments,
    training: SparseAutoencoderTrainerConfig,
    model: PreTrainedModel,
    collate: ImageTextCollator,
    rows: Dataset | IterableDataset,
    sae_config: SparseAutoencoderConfig,
) -> CachedActivations:
    """The activations of a cache, which is filled first.

    Args:
        folder: of the cache.
        arguments: the command's options.
        training: the trainer's.
        model: SegCompass model or MLLM.
        collate: makes inputs of rows.
        rows: rows to train on.
        sae_config: of the SAE that will be trained.

    Returns:
        What the trainer reads.
    """
    names = ("model", "dataset", "split", "evaluation_split", "evaluation_samples", "dataset_seed", "token_window")
    description = {name: getattr(arguments, name) for name in names} | {"order": "by the seed"}
    description["weights"] = weights_of(arguments.model)
    if Path(arguments.dataset).exists():  # a file or a folder, whose rows and images may change under its name
        description["content"] = image_text_digest(rows)
    report = cache_activations(
        folder,
        model,
        rows,
        collate,
        sae_config.layer,
        description=description,
        samples_per_batch=arguments.samples_per_batch,
        samples_per_shard=arguments.samples_per_shard,
        max_gb=arguments.cache_gb,
        on_nonfinite=training.on_nonfinite,
    )
    print(json.dumps({"cache": report}, indent=2))
    return CachedActivations(
        folder, sae_config.d_in, arguments.tokens_per_batch, arguments.buffer_size, training.data_seed or 0
    )


def count_steps(
    arguments: SAEArguments,
    training: SparseAutoencoderTrainerConfig,
    rows: Dataset | IterableDataset,
    collate: ImageTextCollator,
) -> int:
    """Steps of `num_train_epochs` passes, from the length of the first samples.

    Args:
        arguments: the command's options.
        training: the trainer's.
        rows: rows to train on.
        collate: makes inputs of them.

    Returns:
        At least 1.

    Raises:
        ValueError: the number of rows is unknown, or none of the first can be used.
    """
    samples = arguments.num_samples if isinstance(rows, IterableDataset) else len(rows)
    if samples is None:
        raise ValueError("num_samples is null and the rows are streamed, so their number is unknown; give max_steps.")
    some = list(islice(rows, 64))
    batch = collate(some)
    if "attention_mask" not in batch:
        raise ValueError(
            f"none of the first {len(some)} rows of {arguments.dataset!r} can be used ({dict(batch['skipped'])}); give "
            "rows with an image that opens and a text."
        )
    tokens = samples * int(batch["attention_mask"].sum()) / len(some)
    return max(1, round(training.num_train_epochs * tokens / arguments.tokens_per_batch / training.world_size))


def print_estimate(
    arguments: SAEArguments,
    training: SparseAutoencoderTrainerConfig,
    model_config: PreTrainedConfig,
    sae_config: SparseAutoencoderConfig,
) -> None:
    """Print what training will take, as JSON. Raises ValueError without a number of samples."""
    mllm_config = model_config.mllm_config if model_config.model_type == "segcompass" else model_config
    names = ("image_tokens", "text_tokens", "tokens_per_batch", "buffer_size", "tflops", "processes")
    if arguments.num_samples is None:
        raise ValueError("num_samples is null, so there is nothing to estimate from; give the number of rows.")
    held_out = 0 if arguments.evaluation_split else arguments.evaluation_samples
    expected = estimate_sae_training(
        mllm_config,
        sae_config,
        samples=arguments.num_samples - held_out,
        epochs=training.num_train_epochs,
        bf16=training.bf16,
        **{name: getattr(arguments, name) for name in names},
    )
    print(json.dumps(asdict(expected), indent=2))
