"""transformers' common tests of processors, on SegCompassProcessor.

What is left out, and why, is in `exclusions.py` and docs/outside_suites.md.
"""

import unittest

from transformers import AutoImageProcessor, AutoTokenizer

from segcompass.modeling_segcompass import SegCompassProcessor
from tests.outside.transformers_suite import suite_module
from tests.support.tiny import CHAT, tiny_processor

processing = suite_module("test_processing_common")


class EncoderImageProcessors:
    """What the suite's table of kinds lacks: how the image encoder's image processor is loaded from a folder."""

    @staticmethod
    def from_pretrained(folder, **kwargs):
        return SegCompassProcessor.from_pretrained(folder).encoder_image_processor


processing.MODALITY_TO_AUTOPROCESSOR_MAPPING = {
    "image_processor": AutoImageProcessor,
    "encoder_image_processor": EncoderImageProcessors,
    "tokenizer": AutoTokenizer,
}


class Common(processing.ProcessorTesterMixin):
    processor_class = SegCompassProcessor
    backbone = ""

    @classmethod
    def _setup_from_components(cls):
        return tiny_processor(cls.backbone)

    @classmethod
    def prepare_processor_dict(cls):
        settings = dict(prompt_template="{instruction}", num_slots=3, max_prompt_length=300, patch_size=7)
        return {"chat_template": CHAT[cls.backbone], **settings}

    def prepare_text_inputs(self, batch_size=None, modalities=None):
        return super().prepare_text_inputs(batch_size)  # instructions: the processor puts the image token before them


class LlavaProcessorTest(Common, unittest.TestCase):
    backbone = "llava"


class Qwen25VLProcessorTest(Common, unittest.TestCase):
    backbone = "qwen2_5_vl"


del Common
