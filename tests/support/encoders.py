"""Every kind of image encoder, tiny, with random weights and transformers' real classes; and what each must pass.

`CHECKS` has a function per column of the table in docs/encoders.md. Each takes a name in `TINY` and an empty folder,
and fails with an AssertionError. The tests run some of them, benchmarks/image_encoders.py all.
"""

import numpy as np
import torch
import transformers as T
from PIL import Image

from segcompass.modeling_segcompass import SegCompassModel, SegCompassProcessor
from segcompass.modeling_segcompass.image_encoder import encoder_of, image_processor_of
from segcompass.trainers.targets import mask_targets
from tests.support.scripted import noise_image

SHAPES = [(40, 56), (120, 40)]
"""(H, W) of the images that every check sees."""

VIT = dict(hidden_size=16, num_hidden_layers=2, num_attention_heads=2)
SAM = dict(**VIT, output_channels=16, image_size=32, patch_size=4, window_size=4, global_attn_indexes=[1], mlp_dim=32)
SAM |= {"initializer_range": 0.02}  # the class's own 1e-10 leaves features of 1e-22, the same for every image
HIERA = dict(
    model_type="sam2_hiera_det_model",
    hidden_size=8,
    num_attention_heads=1,
    image_size=[64, 64],
    blocks_per_stage=[1, 1, 2, 1],
    embed_dim_per_stage=[8, 16, 32, 64],
    num_attention_heads_per_stage=[1, 2, 4, 8],
    window_size_per_stage=[8, 8, 4, 2],
    global_attention_blocks=[3],
    window_positional_embedding_background_size=[4, 4],
)
SAM2 = dict(
    backbone_config=HIERA,
    backbone_channel_list=[64, 32, 16, 8],
    backbone_feature_sizes=[[16, 16], [8, 8], [4, 4]],
    fpn_hidden_size=16,
)
SAM3_VIT = dict(
    model_type="sam3_vit_model",
    **VIT,
    intermediate_size=32,
    image_size=56,
    pretrain_image_size=28,
    patch_size=7,
    window_size=4,
    global_attn_indexes=[1],
)
SAM3 = dict(backbone_config=SAM3_VIT, fpn_hidden_size=16, backbone_feature_sizes=[[32, 32], [16, 16], [8, 8]])
DINO = dict(**VIT, image_size=32, patch_size=4)
CONVNEXT = dict(hidden_sizes=[8, 8, 16, 16], depths=[1, 1, 1, 1], image_size=128)

TINY = {
    "SAM": lambda: T.SamVisionModel(T.SamVisionConfig(**SAM)),
    "SAM-HQ": lambda: T.SamHQVisionModel(T.SamHQVisionConfig(**SAM)),
    "SAM 2": lambda: T.Sam2VisionModel(T.Sam2VisionConfig(**SAM2)),
    "SAM 3": lambda: T.Sam3VisionModel(T.Sam3VisionConfig(**SAM3)),
    "DINOv2": lambda: T.Dinov2Model(T.Dinov2Config(**DINO)),
    "DINOv2 with registers": lambda: T.Dinov2WithRegistersModel(T.Dinov2WithRegistersConfig(**DINO)),
    "DINOv3 ViT": lambda: T.DINOv3ViTModel(T.DINOv3ViTConfig(**DINO, intermediate_size=32, num_register_tokens=4)),
    "DINOv3 ConvNeXt": lambda: T.DINOv3ConvNextModel(T.DINOv3ConvNextConfig(**CONVNEXT)),
}


def tiny_encoder(name):
    """With weights that let something through."""
    torch.manual_seed(0)
    encoder = TINY[name]().eval()
    with torch.no_grad():
        for weight in encoder.parameters():
            if weight.dim() > 1:
                weight.normal_(std=0.3)
    return encoder


def tiny_model(name):
    from tests.support.tiny import tiny_segcompass

    encoder = tiny_encoder(name)
    stretched = encoder_of(encoder).frame(encoder.config).stretched
    return tiny_segcompass("qwen2_5_vl" if stretched else "llava", image_encoder=encoder)  # LLaVA sees a square only


def teacher_forced(processor, image):
    return processor(images=image, text="the box", response="<think>a box</think><REF_POS><REF_POS><REF_POS>")


def preprocess(name, folder):
    """The pixels are those of an independent resize, mean and standard deviation, padded or stretched."""
    encoder = tiny_encoder(name)
    images, frame = image_processor_of(encoder), encoder_of(encoder).frame(encoder.config)
    mean, std = (torch.tensor(values)[:, None, None] for values in (images.image_mean, images.image_std))
    for height, width in SHAPES:
        image = noise_image(height, width)
        pixels = images([image], return_tensors="pt")["pixel_values"]
        assert pixels.shape == (1, 3, frame.side, frame.side)
        plain = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None].float()
        size = frame.reshaped_size(height, width)
        scaled = torch.nn.functional.interpolate(plain, size, mode="bilinear", antialias=True)[0]
        expected = torch.zeros(3, frame.side, frame.side)
        expected[:, : size[0], : size[1]] = (scaled / 255 - mean) / std
        # PIL rounds each of the two axes to a whole grey level
        torch.testing.assert_close(pixels[0], expected, atol=1.6 / 255 / std.min().item(), rtol=0)
        assert frame.stretched or (pixels[0, :, size[0] :] == 0).all() and (pixels[0, :, :, size[1] :] == 0).all()


def forward(name, folder):
    """Masks of the shape that the configuration says, from keys of the shape that it says."""
    model, processor = tiny_model(name)
    config = model.config
    for shape in SHAPES:
        inputs = teacher_forced(processor, noise_image(*shape))
        with torch.no_grad():
            keys = model.get_image_embeddings(inputs["encoder_pixel_values"])
            masks = model(**inputs).pred_masks
        assert keys.shape == (1, config.key_channels, config.key_grid, config.key_grid)
        assert masks.shape == (1, 3, 4 * config.key_grid, 4 * config.key_grid) and masks.isfinite().all()
        assert masks.std() > 0


def backward(name, folder):
    """Gradients reach the mask decoder, and the encoder when it is to learn; frozen, it has none."""
    model, processor = tiny_model(name)
    inputs = teacher_forced(processor, noise_image(*SHAPES[0]))
    model(**inputs).pred_masks.square().mean().backward()
    assert all(weight.grad is None for weight in model.image_encoder.parameters())
    assert model.mask_decoder.mask_token.grad.abs().sum() > 0
    model.image_encoder.requires_grad_(True)
    model(**inputs).pred_masks.square().mean().backward()
    first = next(weight for path, weight in model.image_encoder.named_parameters() if path.endswith("weight"))
    assert first.grad.isfinite().all() and first.grad.abs().sum() > 0


def segment(name, folder):
    """What `segment` decodes is what a teacher-forced pass over the same tokens decodes."""
    from tests.support.grpo import force_responses

    model, processor = tiny_model(name)
    prompt = processor(images=[noise_image(*SHAPES[0])] * 4, text=["the box"] * 4)
    length = force_responses(model, processor)
    written = model.segment(**prompt, max_new_tokens=length)
    ids = written.sequences
    response = torch.zeros_like(ids, dtype=torch.bool)
    response[:, prompt["input_ids"].shape[1] :] = True
    inputs = {key: value for key, value in prompt.items() if key not in ("input_ids", "attention_mask")}
    if "mm_token_type_ids" in inputs:  # of the prompt; what was written are words
        kinds = inputs["mm_token_type_ids"]
        inputs["mm_token_type_ids"] = torch.nn.functional.pad(kinds, (0, ids.shape[1] - kinds.shape[1]))
    with torch.no_grad():
        again = model(input_ids=ids, attention_mask=(ids != 0).long(), response_mask=response, **inputs)
    assert written.slot_mask[:3].all() and torch.equal(again.slot_mask, written.slot_mask)
    torch.testing.assert_close(again.pred_masks[:3], written.pred_masks[:3], atol=1e-4, rtol=1e-4)


def batch(name, folder):
    """Two images of different shapes at once, and one after the other."""
    model, processor = tiny_model(name)
    images = [noise_image(*shape) for shape in SHAPES]
    alone = [teacher_forced(processor, image) for image in images]
    together = processor(images=images, text=["the box"] * 2, response=["<think>a box</think>" + "<REF_POS>" * 3] * 2)
    with torch.no_grad():
        masks = model(**together).pred_masks
        for row, inputs in enumerate(alone):
            torch.testing.assert_close(masks[row], model(**inputs).pred_masks[0], atol=1e-4, rtol=1e-4)


def save_load(name, folder):
    """Model, processor, and a checkpoint that refers to the encoder's own folder, come back as they were."""
    model, processor = tiny_model(name)
    inputs = teacher_forced(processor, noise_image(*SHAPES[1]))
    model.image_encoder.save_pretrained(folder / "encoder")
    model.save_pretrained(folder / "whole")
    processor.save_pretrained(folder / "whole")
    where = {"image_encoder": {"repo_id": str(folder / "encoder"), "revision": "main"}}
    model.save_pretrained(folder / "refers", references=where)
    again = SegCompassProcessor.from_pretrained(folder / "whole")
    assert again.frame == processor.frame
    pixels = again.encoder_inputs(noise_image(*SHAPES[1]))["encoder_pixel_values"]
    assert torch.equal(pixels, inputs["encoder_pixel_values"])
    with torch.no_grad():
        masks = model(**inputs).pred_masks
        for saved in ("whole", "refers"):
            loaded = SegCompassModel.from_pretrained(folder / saved)
            for path, weight in loaded.state_dict().items():
                assert torch.equal(weight, model.state_dict()[path]), f"{saved}: {path}"
            # weights lie elsewhere in memory, which decides in what order a product is summed
            torch.testing.assert_close(loaded(**inputs).pred_masks, masks, atol=1e-5, rtol=1e-4)


def sft_step(name, folder):
    """A step of supervised training: finite, and the mask decoder moves while the encoder does not."""
    from segcompass.trainers import SegCompassSFTConfig, SegCompassSFTTrainer
    from tests.support.grpo import scenes

    model, processor = tiny_model(name)
    rows = scenes(4).map(lambda row: {"reasoning": "a box"})
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    args = SegCompassSFTConfig(
        str(folder),
        max_steps=1,
        per_device_train_batch_size=4,
        learning_rate=1e-2,
        logging_steps=1,
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
    )
    trainer = SegCompassSFTTrainer(model, args, processor, train_dataset=rows)
    trainer.train()
    _finite_and_moved(trainer, model, before)


def grpo_step(name, folder):
    """A step of joint GRPO: finite, and the mask decoder moves while the encoder does not."""
    from segcompass.trainers.grpo_trainer import SegCompassGRPOTrainer
    from tests.support.grpo import scenes, script_responses, settings

    model, processor = tiny_model(name)
    script_responses(model, processor)
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    args = settings(folder, max_steps=1, gradient_accumulation_steps=1, learning_rate=1e-2)
    trainer = SegCompassGRPOTrainer(model, args=args, train_dataset=scenes(4), processing_class=processor)
    trainer.train()
    _finite_and_moved(trainer, model, before)


def _finite_and_moved(trainer, model, before):
    logs = [value for entry in trainer.state.log_history for key, value in entry.items() if "loss" in key]
    assert logs and np.isfinite(logs).all(), trainer.state.log_history
    moved = {name.split(".")[0] for name, weight in model.state_dict().items() if not torch.equal(weight, before[name])}
    assert "mask_decoder" in moved and "image_encoder" not in moved, moved


def frame(name, folder):
    """A square is painted on an image that is not square: the keys change most in the cells that the frame says, its
    mask's target is there, and masks of these cells come back to where it was painted."""
    model, processor = tiny_model(name)
    for module in model.image_encoder.modules():  # random 3 x 3 kernels of a neck would move a change to a neighbour
        if isinstance(module, torch.nn.Conv2d) and module.kernel_size == (3, 3):
            module.weight.data *= torch.eye(3)[1] * torch.eye(3)[1][:, None]
    grid, side = model.config.key_grid, model.config.frame.side
    for height, width in ((400, 560), (1200, 400)):
        rows, columns = model.config.frame.reshaped_size(height, width)
        cells = (rows * grid // side, columns * grid // side)  # whole cells that are image
        for row, column in {(0, cells[1] - 1), (cells[0] - 1, 0), (cells[0] // 2, cells[1] // 2)}:
            top, bottom = (round(n * side / grid * height / rows) for n in (row, row + 1))
            left, right = (round(n * side / grid * width / columns) for n in (column, column + 1))
            plain = np.full((height, width, 3), 110, np.uint8)
            painted = plain.copy()
            painted[top:bottom, left:right] = (250, 250, 20)
            pixels = [processor.encoder_inputs(Image.fromarray(i))["encoder_pixel_values"] for i in (plain, painted)]
            with torch.no_grad():
                before, after = map(model.get_image_embeddings, pixels)
            change = (after - before)[0].norm(dim=0)  # (h, w)
            assert divmod(int(change.argmax()), grid) == (row, column), f"{height} x {width}"
            _check_masks(processor, grid, (row, column), (height, width), (top, left, bottom, right))


def _check_masks(processor, grid, cell, size, box):
    """A mask of one cell comes back to its box, and the box's target is on the cell."""
    (row, column), (top, left, bottom, right) = cell, box
    logits = torch.full((1, 1, 4 * grid, 4 * grid), -9.0)
    logits[..., 4 * row : 4 * row + 4, 4 * column : 4 * column + 4] = 9.0
    mask = processor.post_process_masks(logits, [size])[0][0] > 0
    inside = mask[top:bottom, left:right].float().mean()
    outside = mask.sum() - mask[top:bottom, left:right].sum()
    assert inside > 0.95 and outside < 0.05 * (bottom - top) * (right - left), (inside, outside)

    from pycocotools import mask as coco_mask

    drawn = np.zeros(size, np.uint8, order="F")
    drawn[top:bottom, left:right] = 1
    rle = coco_mask.encode(drawn)
    target = mask_targets([rle], *size, processor.frame, grid)[0]
    assert divmod(int(target.argmax()), grid) == cell and target.max() > 0.9 and target.sum() < 1.2, target


CHECKS = {
    "preprocess": preprocess,
    "forward": forward,
    "backward": backward,
    "segment = forward": segment,
    "batch = single": batch,
    "save/load": save_load,
    "SFT step": sft_step,
    "GRPO step": grpo_step,
    "frame": frame,
}
