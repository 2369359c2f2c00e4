"""transformers' common tests of models and configurations, on whole tiny SegCompass models, masks included.

What is left out, and why, is in `exclusions.py` and docs/outside_suites.md.
"""

import copy
import functools
import unittest

from segcompass.modeling_segcompass import SegCompassConfig, SegCompassModel
from segcompass.modeling_segcompass.generation_options import OUR_INPUTS
from tests.outside.exclusions import LANGUAGE_ALONE
from tests.outside.transformers_suite import suite_module
from tests.support.scripted import INSTRUCTIONS, noise_images
from tests.support.tiny import tiny_segcompass

modeling = suite_module("test_modeling_common")
configuration = suite_module("test_configuration_common")
RESPONSE = "<think>left of it</think><REF_POS><REF_POS>"


@functools.cache
def parts(backbone):
    """A configuration with an MLLM of two layers; inputs of two samples, with and without responses."""
    model, processor = tiny_segcompass(backbone)
    config = model.config.to_dict()
    text = config["mllm_config"]["text_config"]
    text["num_hidden_layers"] = 2
    if text.get("layer_types"):
        text["layer_types"] = text["layer_types"][:2]
    config["sae_config"]["layer"] = 1
    image = noise_images()[0]  # one, so that no sample is padded
    inputs = processor(images=[image, image], text=INSTRUCTIONS[:1] * 2, response=[RESPONSE] * 2)
    prompts = processor(images=noise_images()[:2], text=INSTRUCTIONS[:2])
    return SegCompassConfig(**config), dict(inputs), dict(prompts)


class TinyComposite:
    """What the suite asks of a model's tester: a configuration, and inputs for it."""

    is_training = True
    batch_size, hidden_size, num_hidden_layers, num_attention_heads = 2, 32, 2, 4

    def __init__(self, backbone):
        self.config, inputs, self.prompts = map(copy.copy, parts(backbone))
        self.left_out = {name: inputs.pop(name) for name in ("labels", "original_sizes")}
        self.inputs = inputs
        self.seq_length = self.encoder_seq_length = self.key_length = inputs["input_ids"].shape[1]

    def without_masks(self):
        self.inputs = {name: value for name, value in self.inputs.items() if name not in OUR_INPUTS}

    def get_config(self):
        return copy.deepcopy(self.config)

    def prepare_config_and_inputs_for_common(self):
        return self.get_config(), {name: value.clone() for name, value in self.inputs.items()}


class Common(modeling.ModelTesterMixin, modeling.GenerationTesterMixin):
    all_model_classes = (SegCompassModel,)
    _is_composite = True
    test_all_params_have_gradient = False  # `loss` is the language loss; the trainers add those of the masks
    backbone = ""

    def setUp(self):
        self.model_tester = TinyComposite(self.backbone)
        self.config_tester = configuration.ConfigTester(self, config_class=SegCompassConfig, has_text_modality=False)
        if self._testMethodName in LANGUAGE_ALONE:
            self.model_tester.without_masks()

    def test_config(self):
        self.config_tester.run_common_tests()

    def _prepare_for_class(self, inputs_dict, model_class, return_labels=False):
        inputs = copy.deepcopy(dict(inputs_dict))
        if return_labels:
            inputs["labels"] = self.model_tester.left_out["labels"].clone()
        return inputs


class LlavaTest(Common, unittest.TestCase):
    backbone = "llava"


class Qwen25VLTest(Common, unittest.TestCase):
    backbone = "qwen2_5_vl"


del Common
