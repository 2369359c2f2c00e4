"""Checks of `generate`, in the place of transformers' own, which its source distribution lacks.

What comes out is compared with passes of the bare MLLM, or with `forward` read token by token.
"""

import torch
from transformers import set_seed

from segcompass.modeling_segcompass import SegCompassModel

NEW = 5


class GenerationChecks:
    """A mixin of a model's tests, whose tester has `prompts`: a processor's outputs for prompts of several lengths."""

    def _generating(self):
        set_seed(3)
        model = SegCompassModel(self.model_tester.get_config()).eval()
        with torch.no_grad():
            for weight in model.mllm.parameters():
                if weight.dim() > 1:
                    weight.mul_(8)  # as initialised, hardly anything depends on the input
        prompts = {name: value.clone() for name, value in self.model_tester.prompts.items()}
        options = dict(max_new_tokens=NEW, min_new_tokens=NEW, do_sample=False, pad_token_id=0)
        return model, prompts, options

    def _of_mllm(self, model, inputs):
        return model.backbone.mllm_inputs(model.mllm, inputs)

    @torch.no_grad()
    def test_greedy_generation_is_the_largest_logit_of_forward_token_by_token(self):
        model, prompts, options = self._generating()
        written = model.generate(**prompts, **options)
        inputs = self._of_mllm(model, prompts)
        ends = torch.tensor(model.generation_config.eos_token_id).flatten()
        for _ in range(NEW):
            logits = model(**inputs, use_cache=False).logits[:, -1]
            logits[:, ends] = -torch.inf  # min_new_tokens
            for name, added in (("input_ids", logits.argmax(-1)), ("attention_mask", torch.ones(len(logits)))):
                inputs[name] = torch.cat([inputs[name], added[:, None].to(inputs[name].dtype)], 1)
            if "mm_token_type_ids" in inputs:
                inputs["mm_token_type_ids"] = torch.nn.functional.pad(inputs["mm_token_type_ids"], (0, 1))
        self.assertTrue(torch.equal(written, inputs["input_ids"]))
        self.assertGreater(len(written[:, -NEW:].unique()), 2)

    @torch.no_grad()
    def test_generation_takes_all_that_the_processor_returns(self):
        model, prompts, options = self._generating()
        inputs = {**self.model_tester.inputs, **self.model_tester.left_out}  # with a response
        self.assertLessEqual({"labels", "response_mask", "encoder_pixel_values", "original_sizes"}, set(inputs))
        for given in (prompts, inputs):
            expected = model.mllm.generate(**self._of_mllm(model, given), **options)
            self.assertTrue(torch.equal(model.generate(**given, **options), expected))

    @torch.no_grad()
    def test_padding_on_the_left_changes_no_response(self):
        model, prompts, options = self._generating()
        lengths = prompts["attention_mask"].sum(1).tolist()
        self.assertNotEqual(*lengths)
        together = model.generate(**prompts, **options)[:, -NEW:]
        for row, length in enumerate(lengths):
            alone = model.backbone.select_rows(prompts, [row], model.config.image_token_id)
            alone = model.backbone.select_tokens(alone, slice(-length, None))
            self.assertTrue(torch.equal(model.generate(**alone, **options)[0, -NEW:], together[row]))

    @torch.no_grad()
    def test_sampling_and_beams_are_the_mllms(self):
        model, prompts, options = self._generating()
        bare, several = self._of_mllm(model, prompts), dict(num_beams=3, num_return_sequences=2)
        found = []
        for changes in (dict(do_sample=True, temperature=2.0), several, dict(repetition_penalty=1.4)):
            set_seed(5)
            found.append(model.generate(**prompts, **{**options, **changes}))
            set_seed(5)
            self.assertTrue(torch.equal(found[-1], model.mllm.generate(**bare, **{**options, **changes})))
        set_seed(6)
        other = model.generate(**prompts, **{**options, "do_sample": True, "temperature": 2.0})
        self.assertFalse(torch.equal(found[0], other))
        self.assertEqual(len(found[1]), 2 * len(prompts["input_ids"]))

    @torch.no_grad()
    def test_every_kind_of_cache_writes_the_same(self):
        model, prompts, options = self._generating()
        expected = model.generate(**prompts, **options)
        for changes in (dict(use_cache=False), dict(cache_implementation="static", disable_compile=True)):
            self.assertTrue(torch.equal(model.generate(**prompts, **options, **changes), expected), changes)

    @torch.no_grad()
    def test_generation_goes_on_from_a_cache(self):
        model, prompts, options = self._generating()
        whole = model.generate(**prompts, **options)
        part = {**options, "max_new_tokens": 2, "min_new_tokens": 2}
        first = model.generate(**prompts, **part, return_dict_in_generate=True)
        rest = {**options, "max_new_tokens": NEW - 2, "min_new_tokens": NEW - 2}
        mask = torch.nn.functional.pad(prompts["attention_mask"], (0, 2), value=1)
        cache = first.past_key_values
        going_on = model.generate(first.sequences, attention_mask=mask, past_key_values=cache, **rest)
        self.assertTrue(torch.equal(going_on, whole))

    @torch.no_grad()
    def test_scores_attentions_and_hidden_states_of_generation(self):
        model, prompts, options = self._generating()
        model.set_attn_implementation("eager")
        asked = ("output_scores", "output_attentions", "output_hidden_states", "return_dict_in_generate")
        output = model.generate(**prompts, **options, **dict.fromkeys(asked, True))
        layers, length = model.config.get_text_config().num_hidden_layers, prompts["input_ids"].shape[1]
        self.assertTrue(torch.equal(torch.stack(output.scores, 1).argmax(-1), output.sequences[:, -NEW:]))
        for step in range(NEW):
            read, keys = (length if step == 0 else 1), length + step
            self.assertEqual(len(output.attentions[step]), layers)
            self.assertEqual(output.attentions[step][-1].shape[-2:], (read, keys))
            self.assertEqual(len(output.hidden_states[step]), layers + 1)
            self.assertEqual(output.hidden_states[step][-1].shape[:2], (len(prompts["input_ids"]), read))
