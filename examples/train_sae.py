"""Train a sparse autoencoder on the hidden states of an MLLM over image, instruction and response tokens.

    python examples/train_sae.py --config examples/recipes/mini/sae.yaml
    python examples/train_sae.py --config examples/recipes/llava-1.5-7b/sae.yaml --estimate true   # what it will take

The hidden states are streamed from the model while it trains, up to the layer the SAE reads, or gathered once into a
folder (--cache_dir). Repeat the command after an interruption: caching and training go on where they were cut off.
"""

import json
import logging
from dataclasses import asdict, dataclass, field
from itertools import islice
from pathlib import Path

from datasets import IterableDataset
from torch.utils.data import DataLoader
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor, SamImageProcessorPil
from trl import TrlParser

from segcompass.loaders.image_text import image_text, load_image_text
from segcompass.modeling_segcompass import (
    SegCompassModel,
    SegCompassProcessor,
    SparseAutoencoder,
    SparseAutoencoderConfig,
)
from segcompass.trainers import SparseAutoencoderTrainer, SparseAutoencoderTrainerConfig
from segcompass.trainers.activation_cache import CachedActivations, cache_activations
from segcompass.trainers.activations import ActivationDataset, take_tokens
from segcompass.trainers.collator import ImageTextCollator
from segcompass.trainers.sae_estimate import estimate_sae_training
from segcompass.trainers.sae_quality import evaluate_sae
from segcompass.trainers.sae_trainer import last_checkpoint

logger = logging.getLogger(__name__)


@dataclass
class ScriptArguments:
    """Whose hidden states, over which rows, into what autoencoder."""

    model: str = field(metadata={"help": "SegCompass folder or Hub id, or a LLaVA-1.5 / Qwen2.5-VL model"})
    dataset: str = field(default="scenes", metadata={"help": "'scenes', a save_to_disk folder, a .jsonl, a Hub id"})
    split: str = "train"
    evaluation_split: str | None = field(
        default="val", metadata={"help": "Split to score it on; null holds the first evaluation_samples rows out"}
    )
    dataset_seed: int = 0
    num_samples: int | None = field(default=100_000, metadata={"help": "Rows at most; null takes all"})
    token_window: int = field(default=3400, metadata={"help": "Longer samples are skipped and counted"})
    d_sae: int | None = field(default=None, metadata={"help": "Width; null leaves what a SegCompass model says"})
    layer: int | None = field(default=None, metadata={"help": "L: read the output of the L-th decoder block"})
    activation: str | None = field(default=None, metadata={"help": "relu, topk, batchtopk or jumprelu"})
    k: int | None = field(default=None, metadata={"help": "Features a token keeps (topk, batchtopk)"})
    samples_per_batch: int = field(default=64, metadata={"help": "samples the MLLM reads at a time"})
    tokens_per_batch: int = field(default=4096, metadata={"help": "tokens in one step of the SAE, a process"})
    buffer_size: int = field(default=32_768, metadata={"help": "tokens mixed with one another"})
    evaluation_tokens: int = field(default=100_000, metadata={"help": "held-out tokens to score it on"})
    evaluation_samples: int = field(default=1000, metadata={"help": "rows held out without evaluation_split"})
    cache_dir: str | None = field(default=None, metadata={"help": "Gather hidden states there once; null streams"})
    cache_gb: float = field(default=100.0, metadata={"help": "Size of the cache at which gathering stops"})
    samples_per_shard: int = field(default=128, metadata={"help": "Samples in a file of the cache"})
    estimate: bool = field(default=False, metadata={"help": "Print tokens, disk, memory and hours, and do nothing"})
    image_tokens: int = field(default=576, metadata={"help": "--estimate: image tokens of a sample"})
    text_tokens: int = field(default=100, metadata={"help": "--estimate: other tokens of a sample"})
    tflops: float = field(default=300.0, metadata={"help": "--estimate: 10^12 operations a second of a process"})
    processes: int = field(default=1, metadata={"help": "--estimate: number of processes"})


def main():
    arguments, training = TrlParser((ScriptArguments, SparseAutoencoderTrainerConfig)).parse_args_and_config()
    model_config = AutoConfig.from_pretrained(arguments.model)
    sae_config = make_sae_config(arguments, model_config)
    if arguments.estimate:
        print_estimate(arguments, training, model_config, sae_config)
        return
    model, processor = load(arguments.model, model_config, training)
    collate = ImageTextCollator(processor, image_text, arguments.token_window)
    rows, held_out = read_rows(arguments)

    def stream(rows):
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

    train_dataset = cached(arguments, training, model, collate, rows, sae_config) if arguments.cache_dir else None
    train_dataset = train_dataset or stream(rows)
    if training.max_steps <= 0:
        training.max_steps = count_steps(arguments, training, rows, collate)
    sae = SparseAutoencoder(sae_config)
    trainer = SparseAutoencoderTrainer(sae, training, train_dataset=train_dataset)
    trainer.train(resume_from_checkpoint=last_checkpoint(training.output_dir))
    trainer.save_model()
    if isinstance(train_dataset, ActivationDataset):
        logger.warning("samples over all passes: %s", dict(train_dataset.report))
    if trainer.is_world_process_zero():
        quality = evaluate_sae(sae, take_tokens(stream(held_out), arguments.evaluation_tokens))
        print(json.dumps(quality, indent=2))
        Path(training.output_dir, "quality.json").write_text(json.dumps(quality, indent=2))


def make_sae_config(arguments, model_config):
    """The SAE's configuration: a SegCompass model's own, or that of a bare MLLM; options of the command win."""
    segcompass = model_config.model_type == "segcompass"
    mllm_config = model_config.mllm_config if segcompass else model_config
    text = mllm_config.get_text_config()
    fields = model_config.sae_config.to_dict() if segcompass else {"layer": text.num_hidden_layers // 2}
    named = {name: getattr(arguments, name) for name in ("d_sae", "layer", "activation", "k")}
    fields |= {name: value for name, value in named.items() if value is not None}
    fields |= {"d_in": text.hidden_size, "dataset": arguments.dataset, "token_window": arguments.token_window}
    fields["backbone"] = fields.get("backbone") or (mllm_config.model_type if segcompass else arguments.model)
    return SparseAutoencoderConfig(**fields)


def load(name, model_config, training):
    """The model on the training's device, and a SegCompassProcessor."""
    dtype = "bfloat16" if training.bf16 else "float32"
    if model_config.model_type == "segcompass":
        model = SegCompassModel.from_pretrained(name, dtype=dtype)
        return model.to(training.device), SegCompassProcessor.from_pretrained(name)
    parts = AutoProcessor.from_pretrained(name)
    llava = ("patch_size", "vision_feature_select_strategy", "num_additional_image_tokens")
    processor = SegCompassProcessor(
        image_processor=parts.image_processor,
        tokenizer=parts.tokenizer,
        encoder_image_processor=SamImageProcessorPil(),
        chat_template=parts.chat_template,
        prompt_template="{instruction}",
        **{field: getattr(parts, field) for field in llava if getattr(parts, field, None) is not None},
    )
    return AutoModelForImageTextToText.from_pretrained(name, dtype=dtype).to(training.device), processor


def read_rows(arguments):
    """Rows to train on and rows to score on."""

    def rows(split, num_samples):
        return load_image_text(arguments.dataset, split, arguments.dataset_seed, num_samples)

    if arguments.evaluation_split:
        return rows(arguments.split, arguments.num_samples), rows(arguments.evaluation_split, arguments.num_samples)
    everything = rows(arguments.split, arguments.num_samples)
    return everything.skip(arguments.evaluation_samples), everything.take(arguments.evaluation_samples)


def cached(arguments, training, model, collate, rows, sae_config):
    names = ("model", "dataset", "split", "evaluation_split", "evaluation_samples", "dataset_seed", "token_window")
    report = cache_activations(
        arguments.cache_dir,
        model,
        rows,
        collate,
        sae_config.layer,
        description={name: getattr(arguments, name) for name in names},
        samples_per_batch=arguments.samples_per_batch,
        samples_per_shard=arguments.samples_per_shard,
        max_gb=arguments.cache_gb,
        on_nonfinite=training.on_nonfinite,
    )
    print(json.dumps({"cache": report}, indent=2))
    return CachedActivations(
        arguments.cache_dir, sae_config.d_in, arguments.tokens_per_batch, arguments.buffer_size, training.data_seed or 0
    )


def count_steps(arguments, training, rows, collate):
    """Steps of `num_train_epochs` passes, from the length of the first samples."""
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


def print_estimate(arguments, training, model_config, sae_config):
    mllm_config = model_config.mllm_config if model_config.model_type == "segcompass" else model_config
    names = ("image_tokens", "text_tokens", "tokens_per_batch", "buffer_size", "tflops", "processes")
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


if __name__ == "__main__":
    main()
