"""Joint GRPO on tiny models: rows, settings, scripted responses, a trainer."""

import datasets
import numpy as np
import torch
from PIL import Image
from pycocotools import mask as coco_mask

from segcompass.trainers.grpo_config import SegCompassGRPOConfig
from segcompass.trainers.grpo_trainer import SegCompassGRPOTrainer
from tests.support.tiny import make_sure, tiny_segcompass

SLOTS = 3
SIZES = [(40, 40), (30, 44), (44, 28)]


def scenes(count, targets=(1, 2, 0)):
    """Rows of the shared schema: noise images of several shapes with 1, 2 and 0 rectangles."""
    rng = np.random.default_rng(0)
    rows = []
    for number in range(count):
        height, width = SIZES[number % len(SIZES)]
        masks = []
        for target in range(targets[number % len(targets)]):
            mask = np.zeros((height, width), np.uint8, order="F")
            mask[4 + 10 * target : 12 + 10 * target, 5:20] = 1
            rle = coco_mask.encode(mask)
            masks.append({"size": rle["size"], "counts": rle["counts"].decode()})
        rows.append(
            {
                "image": Image.fromarray(rng.integers(0, 255, (height, width, 3), dtype=np.uint8)),
                "image_id": f"image-{number}",
                "sample_id": f"sample-{number}",
                "dataset": "noise",
                "split": "train",
                "instruction": "the box" + "!" * (number % 4),
                "reasoning": None,
                "masks": masks,
                "ignore": None,
                "height": height,
                "width": width,
            }
        )
    return datasets.Dataset.from_list(rows).cast_column("image", datasets.Image())


DEFAULTS = dict(
    per_device_train_batch_size=4,
    per_device_eval_batch_size=4,
    gradient_accumulation_steps=2,
    num_generations=4,
    max_completion_length=24,
    max_steps=2,
    learning_rate=1e-3,
    logging_steps=1,
    report_to=[],
    use_cpu=True,
    bf16=False,
    gradient_checkpointing=False,
    save_strategy="no",
    disable_tqdm=True,
)


def settings(folder, **changes):
    return SegCompassGRPOConfig(**{"output_dir": str(folder), **DEFAULTS, **changes})


def scripted_rows(processor):
    """Token ids (4, R) a trained policy could write (a random one never writes concentration tokens), of four forms."""
    ref = "<REF_POS>" * SLOTS
    texts = [f"<think>a box</think>{ref}", f"<think>it</think>{ref}", f"well <think>b</think>{ref}", "<think>no"]
    rows = [processor.tokenizer(t + "</s>", add_special_tokens=False)["input_ids"] for t in texts]
    longest = max(map(len, rows))
    return torch.tensor([row + [processor.tokenizer.pad_token_id] * (longest - len(row)) for row in rows])


def script_responses(model, processor):
    """Instead of generating: no states are left, so the masks to reward take a pass of their own, as with vLLM."""
    rows = scripted_rows(processor)

    def generate(input_ids, **kwargs):
        return torch.cat([input_ids, rows.repeat(len(input_ids) // len(rows), 1).to(input_ids.device)], 1)

    model.generate = generate


def force_responses(model, processor):
    """Real generation, token by token, of the same responses."""
    rows, generate = scripted_rows(processor), model.generate

    def force(input_ids, **kwargs):
        def only_the_next(ids, scores):
            wanted = rows[:, ids.shape[1] - input_ids.shape[1]].repeat(len(ids) // len(rows))
            return torch.full_like(scores, -torch.inf).scatter(1, wanted[:, None], 0.0)

        return generate(input_ids=input_ids, logits_processor=[only_the_next], **kwargs)

    model.generate = force
    return rows.shape[1]


def make_trainer(folder, backbone="llava", rows=8, scripted=True, model_config=None, trainer_kwargs=None, **changes):
    model, processor = tiny_segcompass(backbone, num_slots=SLOTS, **(model_config or {}))
    make_sure(model)
    if scripted:
        script_responses(model, processor)
    return SegCompassGRPOTrainer(
        model,
        args=settings(folder, **changes),
        train_dataset=scenes(rows),
        processing_class=processor,
        **(trainer_kwargs or {}),
    )


def weights(model):
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def rollout(trainer):
    """One generated and scored batch, as the training loop would buffer it."""
    trainer.model.train()
    batch = next(iter(trainer.get_train_dataloader()))
    trainer.current_gradient_accumulation_steps = 1
    return trainer._generate_and_score_completions(batch)
