"""The boxes route: an MLLM writes boxes, a SAM turns them into masks, both with the weights that the Hub has.

The paper's Figure 1(b). Nothing is trained, so it works on photographs; and nothing but the boxes passes from the one
to the other. `BoxesRoute.segment` returns what `SegCompassModel.segment` returns, as far as there is any of it, so that
post-processing, evaluation and drawing are the same. How boxes are asked for and read is decided in box_formats.py.
"""

from collections.abc import Sequence
from typing import Any

import torch
from PIL import Image
from transformers import AutoConfig, AutoModelForMaskGeneration

from segcompass.box_formats import Answer, Region, known_format
from segcompass.modeling_segcompass import SegCompassOutput
from segcompass.modeling_segcompass.finite import refuse_non_finite
from segcompass.modeling_segcompass.image_encoder import image_processor_of
from segcompass.modeling_segcompass.saved_folders import check_loaded
from segcompass.trace_teachers import BackboneTeacher

MASK_MODELS = {"sam": "SAM", "sam_hq": "SAM-HQ", "sam2": "SAM 2", "sam2_video": "SAM 2"}
"""`model_type` of the models that turn boxes and points into masks -> what they are called."""
LONGEST = 1024
"""Tokens of an answer: about thirty boxes, or the reasoning of a model that thinks first."""
CERTAIN = 1e-6
"""Confidences are kept so far from 0 and 1, so that they have a logit."""


class BoxesRoute:
    """An MLLM that writes boxes and a SAM that makes masks of them.

    Args:
        mllm: folder or Hub id of an MLLM that is listed in `box_formats.FORMATS`.
        image_encoder: folder or Hub id of a whole SAM, with prompt encoder and mask decoder.
        device: where both go; by default the GPU, or the CPU where there is none.

    Raises:
        ValueError: an MLLM of which it is not known how it writes boxes, no SAM, or weights that are missing.
        OSError: nothing there, or behind a gate.

    Example:
        route = BoxesRoute("Qwen/Qwen2.5-VL-7B-Instruct", "facebook/sam-vit-huge")
        outputs, answers = route.segment([image], ["the mug nearest the sink"])
        found = route.processor.post_process_instance_segmentation(outputs, 0.0, target_sizes=[image.size[::-1]])[0]
    """

    def __init__(self, mllm: str, image_encoder: str, device: str | torch.device | None = None):
        written = known_format(_config(mllm, "mllm", "an MLLM"), mllm)
        kind = _config(image_encoder, "image_encoder", "a SAM").model_type
        if kind not in MASK_MODELS:
            raise ValueError(
                f"image_encoder={image_encoder!r} is of type {kind!r}, which makes no masks of boxes; choose a whole "
                f"{', '.join(dict.fromkeys(MASK_MODELS.values()))}, such as facebook/sam-vit-huge."
            )
        self.teacher = BackboneTeacher(mllm, LONGEST, device, written.chat_template)
        self.processor = self.teacher.processor
        self.processor.encoder_image_processor = image_processor_of(image_encoder)
        load: Any = AutoModelForMaskGeneration.from_pretrained
        asked = {"output_loading_info": True, "ignore_mismatched_sizes": True}  # `check_loaded` refuses them
        sam, info = load(image_encoder, dtype=torch.float32, **asked)
        check_loaded(sam, info, image_encoder, unexpected=False)
        self.sam: Any = sam.to(self.teacher.mllm.device).eval()

    def segment(
        self, images: Sequence[Image.Image], instructions: Sequence[str]
    ) -> tuple[SegCompassOutput, list[Answer]]:
        """Ask the MLLM for boxes, and SAM for a mask of each.

        Args:
            images: B upright RGB images.
            instructions: what to segment in each.

        Returns:
            A SegCompassOutput with `pred_masks`, `pred_logits` (SAM's own estimate of each mask's IoU), `slot_mask` and
            `reshaped_input_sizes`, one slot per region, (B, K) where K is the largest number of regions, at least 1;
            and the MLLM's answers, whose regions are the slots.

        Raises:
            ValueError: an empty or too long instruction, one with control tokens, an image that is too narrow, or NaN
                or infinity out of SAM.
        """
        inputs = self.processor.encoder_inputs(list(images))
        answers = self.teacher.point(list(zip(images, instructions, strict=True)))
        made = [
            self.masks_of(pixels[None], image.size, answer.regions)
            for pixels, image, answer in zip(inputs["encoder_pixel_values"], images, answers, strict=True)
        ]
        slots = max(1, *(len(answer.regions) for answer in answers))
        side = max(masks.shape[-1] for masks, _ in made)
        pred_masks = torch.zeros(len(answers), slots, side, side)
        pred_logits = torch.zeros(len(answers), slots)
        slot_mask = torch.zeros(len(answers), slots, dtype=torch.bool)
        for row, (masks, confidences) in enumerate(made):
            count = len(masks)
            if count:
                pred_masks[row, :count] = masks
                pred_logits[row, :count] = confidences.clamp(CERTAIN, 1 - CERTAIN).logit()
                slot_mask[row, :count] = True
        outputs = SegCompassOutput(
            pred_masks=pred_masks,
            pred_logits=pred_logits,
            slot_mask=slot_mask,
            reshaped_input_sizes=inputs["reshaped_input_sizes"],
        )
        return outputs, answers

    @torch.no_grad()
    def masks_of(
        self, pixels: torch.Tensor, size: tuple[int, int], regions: Sequence[Region]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """SAM's masks of an image's regions.

        A box asks for the one mask that it bounds. A point alone could mean a thing or its part: of the three masks
        that SAM makes of it, the one is taken that SAM thinks best.

        Args:
            pixels: float (1, 3, S, S), the image as SAM takes it.
            size: of the image, (width, height).
            regions: in pixels of the image.

        Returns:
            Mask logits on the frame, float (n, s, s), and SAM's estimates of their IoU, float (n,); on the CPU.
        """
        if not regions:
            return torch.zeros(0, 1, 1), torch.zeros(0)
        masks: list[Any] = [None] * len(regions)
        confidences = torch.zeros(len(regions))
        kinds = [(region.box is not None, region.point is not None) for region in regions]
        for kind in dict.fromkeys(kinds):  # SAM wants the same kind of prompt for all of a pass
            places = [place for place, other in enumerate(kinds) if other == kind]
            prompts = self.prompts([regions[place] for place in places], size)
            made = self.sam(
                pixel_values=pixels.to(self.sam.device),
                multimask_output=not kind[0],
                **{name: prompt.to(self.sam.device) for name, prompt in prompts.items()},
            )
            refuse_non_finite({"pred_masks": made.pred_masks, "iou_scores": made.iou_scores}, self.sam)
            best = made.iou_scores[0].argmax(-1)  # (n,)
            for number, place in enumerate(places):
                masks[place] = made.pred_masks[0, number, best[number]].float().cpu()
                confidences[place] = made.iou_scores[0, number, best[number]].float().cpu()
        return torch.stack(masks), confidences

    def prompts(self, regions: Sequence[Region], size: tuple[int, int]) -> dict[str, torch.Tensor]:
        """Regions as SAM takes them: in pixels of its square input.

        Args:
            regions: all with a box or all without, and likewise for points.
            size: of the image, (width, height).

        Returns:
            `input_boxes` float (1, n, 4), `input_points` float (1, n, 1, 2) and `input_labels` long (1, n, 1), those
            that there are.
        """
        height, width = self.processor.frame.reshaped_size(size[1], size[0])
        scale = torch.tensor([width / size[0], height / size[1]])
        prompts = {}
        if regions[0].box is not None:
            prompts["input_boxes"] = (torch.tensor([region.box for region in regions]) * scale.repeat(2))[None]
        if regions[0].point is not None:
            points = torch.tensor([region.point for region in regions]) * scale  # (n, 2)
            prompts["input_points"] = points[None, :, None]
            prompts["input_labels"] = torch.ones(1, len(regions), 1, dtype=torch.long)
        return prompts


def _config(source, option, what):
    """The configuration of a folder or Hub id. Raises ValueError where there is none."""
    try:
        return AutoConfig.from_pretrained(source)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{option}={source!r} is no folder or Hub id of {what}: {str(error).splitlines()[0]}"
        ) from error
