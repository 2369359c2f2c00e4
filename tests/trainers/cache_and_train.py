"""A whole run that tests kill and start again: gather hidden states into a cache, then train on it, then save.

python cache_and_train.py FOLDER
"""

import os
import sys
import time
from pathlib import Path

import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from segcompass.loaders.image_text import image_text
from segcompass.modeling_segcompass import SparseAutoencoder, SparseAutoencoderConfig
from segcompass.trainers.activation_cache import CachedActivations, cache_activations
from segcompass.trainers.checkpoints import last_checkpoint
from segcompass.trainers.collator import ImageTextCollator
from segcompass.trainers.sae_trainer import SparseAutoencoderTrainer, SparseAutoencoderTrainerConfig
from tests.support.tiny import tiny_mllm, tiny_processor


class Rows(list):
    def select(self, indices):
        return Rows(self[index] for index in indices)


def main(folder):
    torch.set_num_threads(1)
    args = SparseAutoencoderTrainerConfig(
        output_dir=str(folder / "sae"),
        max_steps=40,
        learning_rate=1e-2,
        dead_window=500,
        save_steps=5,
        save_total_limit=2,
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
    )
    assert args.device.type == "cpu"  # asking starts the process group, where there are several processes
    torch.manual_seed(0)
    processor = tiny_processor("llava")
    mllm = tiny_mllm("llava", processor)
    rows = Rows(
        {"image": Image.new("RGB", (28, 28), (10 * number, 90, 10)), "text": f"find mug {number}"}
        for number in range(24)
    )
    collate = ImageTextCollator(processor, image_text)

    def slowly(rows):  # so that there is a middle to be killed in
        time.sleep(float(os.environ.get("PAUSE", 0)))
        return collate(rows)

    cache_activations(folder / "cache", mllm, rows, slowly, 2, {}, samples_per_batch=2, samples_per_shard=4)
    torch.manual_seed(1)
    sae = SparseAutoencoder(SparseAutoencoderConfig(d_in=32, d_sae=64, activation="topk", k=4, layer=2))
    trainer = SparseAutoencoderTrainer(
        sae, args, train_dataset=CachedActivations(folder / "cache", 32, batch_size=64, buffer_size=256)
    )
    if os.environ.get("PAUSE"):
        trainer.training_step = _paused(trainer.training_step, float(os.environ["PAUSE"]))
    trainer.train(resume_from_checkpoint=last_checkpoint(args.output_dir))
    trainer.save_model(str(folder / "final"))


def _paused(step, seconds):
    def paused(*args, **kwargs):
        time.sleep(seconds)
        return step(*args, **kwargs)

    return paused


if __name__ == "__main__":
    main(Path(sys.argv[1]))
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()  # gloo threads left at exit now and then abort the process
