"""Evaluation of an SAE in one of several processes, each with its own share: torchrun runs this file.

torchrun --nproc_per_node 2 tests/support/sae_on_two_processes.py OUTPUT
"""

import json
import sys
from pathlib import Path

import torch

from segcompass.modeling_segcompass import SparseAutoencoder, SparseAutoencoderConfig
from segcompass.trainers.activations import process_share
from segcompass.trainers.sae_quality import measure_mean_active_activation
from segcompass.trainers.sae_trainer import SparseAutoencoderTrainer, SparseAutoencoderTrainerConfig


def fixed_sae():
    torch.manual_seed(0)
    return SparseAutoencoder(SparseAutoencoderConfig(d_in=8, d_sae=16, layer=1))


def tokens_of(rank):
    """Hidden states and token types of a process; they differ in scale and number, and rank 1 has no image tokens."""
    numbers = torch.Generator().manual_seed(rank)
    for _ in range(3 - rank):
        z = torch.randn(64, 8, generator=numbers) * (1 + 4 * rank)
        yield z, torch.randint(rank, 3, (64,), generator=numbers)


def everybodys_tokens():
    pairs = [pair for rank in (0, 1) for pair in tokens_of(rank)]
    return tuple(torch.cat(parts) for parts in zip(*pairs, strict=True))


class Share(torch.utils.data.IterableDataset):
    def __iter__(self):
        yield from tokens_of(process_share()[0])


def main(output):
    sae = fixed_sae()
    args = SparseAutoencoderTrainerConfig(
        output, max_steps=2, use_cpu=True, report_to="none", disable_tqdm=True, save_strategy="no"
    )
    trainer = SparseAutoencoderTrainer(sae, args, train_dataset=Share(), eval_dataset=Share())
    evaluation = trainer.evaluate()
    measure_mean_active_activation(sae, Share(), trainer.accelerator.reduce)
    result = {"evaluation": evaluation, "means": sae.mean_active_activation.tolist()}
    Path(output, f"{process_share()[0]}.json").write_text(json.dumps(result))


if __name__ == "__main__":
    main(sys.argv[1])
    torch.distributed.destroy_process_group()
