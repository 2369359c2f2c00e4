"""Train a sparse autoencoder on the hidden states of an MLLM over image, instruction and response tokens.

    python examples/train_sae.py --config examples/recipes/mini/sae.yaml

The hidden states are streamed from the model while it trains, up to the layer the SAE reads; nothing is stored.
"""

import json
from dataclasses import dataclass, field
from pathlib import Path

from torch.utils.data import DataLoader
from trl import TrlParser

from loaders import load_rows
from modeling_segcompass import SegCompassModel, SegCompassProcessor, SparseAutoencoder
from trainers import SparseAutoencoderTrainer, SparseAutoencoderTrainerConfig
from trainers.activations import ActivationDataset
from trainers.collator import SegCompassCollator
from trainers.sae_trainer import evaluate_sae, take_tokens


@dataclass
class ScriptArguments:
    """Whose hidden states, over which rows."""

    model: str = field(metadata={"help": "SegCompass folder or Hub id; its sae_config says width, layer, variant"})
    dataset: str = field(default="scenes", metadata={"help": "'scenes' or a folder written by save_to_disk"})
    split: str = "train"
    dataset_seed: int = 0
    num_samples: int = 100_000
    samples_per_batch: int = field(default=64, metadata={"help": "samples the MLLM reads at a time"})
    tokens_per_batch: int = field(default=4096, metadata={"help": "tokens in one step of the SAE"})
    evaluation_tokens: int = field(default=100_000, metadata={"help": "tokens of the val split to score it on"})


def main():
    arguments, training = TrlParser((ScriptArguments, SparseAutoencoderTrainerConfig)).parse_args_and_config()
    processor = SegCompassProcessor.from_pretrained(arguments.model)
    model = SegCompassModel.from_pretrained(arguments.model, dtype="float32")
    config = model.config.sae_config
    config.backbone = config.backbone or model.config.mllm_config.model_type

    def activations(split, num_samples):
        rows = load_rows(arguments.dataset, split, arguments.dataset_seed, num_samples, streaming=True)
        workers = training.dataloader_num_workers
        collate = SegCompassCollator(processor)
        loader = DataLoader(rows, arguments.samples_per_batch, collate_fn=collate, num_workers=workers)
        return ActivationDataset(model, loader, config.layer, arguments.tokens_per_batch)

    sae = SparseAutoencoder(config)
    trainer = SparseAutoencoderTrainer(sae, training, train_dataset=activations(arguments.split, arguments.num_samples))
    trainer.train()
    trainer.save_model()
    held_out = take_tokens(activations("val", arguments.num_samples), arguments.evaluation_tokens)
    quality = evaluate_sae(sae, held_out)
    print(json.dumps(quality, indent=2))
    Path(training.output_dir, "quality.json").write_text(json.dumps(quality, indent=2))


if __name__ == "__main__":
    main()
