"""transformers' common tests of processors, on SegCompassProcessor.

What is left out, and why, is in `exclusions.py` and docs/outside_suites.md.
"""

import unittest

from segcompass.modeling_segcompass import SegCompassProcessor
from tests.outside.transformers_suite import suite_module
from tests.support.tiny import tiny_processor

processing = suite_module("test_processing_common")


class Common(processing.ProcessorTesterMixin):
    processor_class = SegCompassProcessor
    backbone = ""

    @classmethod
    def _setup_from_components(cls):
        return tiny_processor(cls.backbone)

    @classmethod
    def _setup_image_processor(cls):
        return tiny_processor(cls.backbone).image_processor

    @classmethod
    def _setup_encoder_image_processor(cls):
        return tiny_processor(cls.backbone).encoder_image_processor

    @classmethod
    def _setup_tokenizer(cls):
        return tiny_processor(cls.backbone).tokenizer


class LlavaProcessorTest(Common, unittest.TestCase):
    backbone = "llava"


class Qwen25VLProcessorTest(Common, unittest.TestCase):
    backbone = "qwen2_5_vl"


del Common
