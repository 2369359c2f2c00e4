"""`generation_kwargs` of GRPO: mask rewards stay the same, or the option is refused by name before anything runs."""

import pytest

from tests.support.grpo import force_responses, make_trainer, rollout, settings
from tests.support.tiny import BACKBONES


def scores(folder, backbone, **changes):
    trainer = make_trainer(folder, backbone, scripted=False, beta=0.0, gradient_checkpointing=True, **changes)
    force_responses(trainer.core, trainer.processing_class)
    return rollout(trainer)["mask_scores"].tolist()


@pytest.mark.parametrize("backbone", BACKBONES)
def test_rollouts_without_a_cache_or_with_a_static_one_earn_the_same_mask_rewards(tmp_path, backbone):
    expected = scores(tmp_path, backbone)
    assert max(expected) > 0
    for options in ({"generation_kwargs": {"use_cache": False}}, {"cache_implementation": "static"}):
        assert scores(tmp_path, backbone, **options) == pytest.approx(expected, abs=1e-4)  # float32 in another order


@pytest.mark.parametrize("name", ["num_beams", "num_return_sequences", "guidance_scale", "penalty_alpha"])
def test_options_that_masks_cannot_follow_are_refused_before_the_first_step(tmp_path, name):
    with pytest.raises(ValueError, match=f"{name} is 2; .*use {name}="):
        settings(tmp_path, generation_kwargs={name: 2})
    with pytest.raises(ValueError, match="generation_kwargs sets return_dict_in_generate=True"):
        settings(tmp_path, generation_kwargs={"return_dict_in_generate": True})
