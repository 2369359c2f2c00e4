from types import SimpleNamespace

import pytest
import torch

from segcompass.trainers.rewards import (
    MaskPrediction,
    find_rewards,
    format_reward,
    format_score,
    mask_reward,
    mask_scores,
)

RUN = "<REF_POS>" * 3
ALL = torch.ones(3, dtype=torch.bool)


@pytest.mark.parametrize(
    ("text", "score"),
    [
        # the paper's five cases
        ("no reasoning at all", 0.0),
        (f"<think>it is the cup</think>{RUN}", 1.0),
        (f"<think>{'a' * 2049}</think>{RUN}", 0.9),
        (f"Sure. <think>it is the cup</think>{RUN}", 0.9),
        (f"<think>it is the cup</think>{RUN} Done.", 0.9),
        # their edges
        (f"<think>{'a' * 2048}</think>{RUN}", 1.0),
        (f" \n<think>it is\nthe cup</think>\n{RUN}\n", 1.0),
        (f"<think>it is the cup</think> {' '.join(['<REF_POS>'] * 3)}", 1.0),
        (f"<think>it is the cup</think>The cup on the left: {RUN}", 1.0),
        (f"Sure. <think>{'a' * 2049}</think>{RUN} Done.", 0.9),
        (f"<think> \n</think>{RUN}", 0.0),
        (f"<think></think>{RUN}", 0.0),
        (f"<think>it is the cup</think>{RUN}<REF_POS>", 0.0),
        ("<think>it is the cup</think><REF_POS><REF_POS>", 0.0),
        ("<think>it is the cup</think>", 0.0),
        ("<think>it is the cup</think><REF_POS><REF_POS> and <REF_POS>", 0.0),
        (f"<think>it is the cup{RUN}</think>", 0.0),
        ("<think>it is the cup<REF_POS></think><REF_POS><REF_POS>", 0.0),
        (f"{RUN}<think>it is the cup</think>", 0.0),
        (f"<think>a</think><think>b</think>{RUN}", 0.0),
        (f"<think>a<think>b</think>{RUN}", 0.0),
        (f"<think>a</think></think>{RUN}", 0.0),
        (f"</think>a<think>{RUN}", 0.0),
        (f"<think>it is the cup{RUN}", 0.0),
        ("", 0.0),
    ],
)
def test_format_score(text, score):
    assert format_score(text, 3) == score


def test_format_score_with_one_slot_is_the_papers_single_token():
    assert format_score("<think>a</think><REF_POS>", 1) == 1.0
    assert format_score("<think>a</think><REF_POS><REF_POS>", 1) == 0.0
    assert format_score("<think>a</think>[SEG.]", 1, ref_token="[SEG.]") == 1.0


def test_format_reward_takes_text_and_messages():
    good = f"<think>a</think>{RUN}"
    assert format_reward(completions=[good, "no"], num_slots=[3, 3], prompts=["", ""], trainer_state=None) == [1.0, 0.0]
    assert format_reward(completions=[[{"role": "assistant", "content": good}]], num_slots=[3]) == [1.0]


def test_mask_reward_is_each_prediction_s_score():
    parts = (torch.zeros(1, 1, 4), torch.zeros(1), ALL[:1], torch.zeros(0, 1, 4), torch.tensor([1, 4]))
    predictions = [MaskPrediction(*parts, score=score) for score in (0.25, 1.0)]
    assert mask_reward(predictions=predictions, completions=["a", "b"], prompts=[]) == [0.25, 1.0]


def mask_score(pred_masks, pred_logits, slot_mask, targets, valid_extent):
    """`mask_scores` of one sample: the same arguments without their batch dimension."""
    batch = SimpleNamespace(pred_masks=pred_masks[None], pred_logits=pred_logits[None], slot_mask=slot_mask[None])
    return mask_scores(batch, [targets], torch.as_tensor(valid_extent)[None])[0]


def masks(*rows):
    """Mask logits (K, 1, W) that saturate to the given 0/1 cells."""
    return (torch.tensor(rows, dtype=torch.float32)[:, None, :] - 0.5) * 200


def score(kept, targets, predictions=((1, 1, 0, 0), (0, 0, 1, 1), (1, 0, 0, 0)), slot_mask=ALL):
    logits = torch.tensor([1.0 if index in kept else -1.0 for index in range(3)])
    targets = torch.tensor(targets, dtype=torch.float32).reshape(-1, 1, 4)
    return mask_score(masks(*predictions), logits, slot_mask, targets, (1, 4))


def test_mask_score_by_hand():
    left, right = (1, 1, 0, 0), (0, 0, 1, 1)
    assert score({0}, [left]) == pytest.approx(1.0)
    assert score({2}, [left]) == pytest.approx(0.5)  # one kept, one target: their IoU
    assert score({0, 1}, [right, left]) == pytest.approx(1.0)
    assert score({0, 1, 2}, [left, right]) == pytest.approx(2 / 3)  # a spurious slot costs
    assert score({0}, [left, right]) == pytest.approx(1 / 2)  # a missing one too
    assert score({0, 2}, [left]) == pytest.approx(1 / 2)
    assert score({0, 2}, [left, (1, 0, 0, 0)]) == pytest.approx(1.0)  # the best assignment, not the greedy one
    assert score({1}, [left]) == pytest.approx(0.0, abs=1e-6)


def test_mask_score_when_a_side_is_empty():
    assert score(set(), []) == 1.0
    assert score(set(), [(1, 1, 0, 0)]) == 0.0
    assert score({0}, []) == 0.0


def test_mask_score_is_soft():
    half = mask_score(torch.zeros(1, 1, 4), torch.ones(1), ALL[:1], torch.tensor([[[1.0, 1.0, 0.0, 0.0]]]), (1, 4))
    assert half == pytest.approx(1 / (2 + 2 - 1))


def test_a_slot_at_half_confidence_is_kept_and_one_without_its_token_is_not():
    target = torch.tensor([[[1.0, 1.0, 0.0, 0.0]]])
    prediction = masks((1, 1, 0, 0))
    assert mask_score(prediction, torch.zeros(1), ALL[:1], target, (1, 4)) == pytest.approx(1.0)
    assert mask_score(prediction, torch.full((1,), -1e-3), ALL[:1], target, (1, 4)) == 0.0
    assert mask_score(prediction, torch.ones(1), ~ALL[:1], target, (1, 4)) == 0.0
    assert mask_score(prediction, torch.ones(1), ~ALL[:1], target[:0], (1, 4)) == 0.0  # no answer is not "nothing"
    assert mask_score(prediction, -torch.ones(1), ALL[:1], target[:0], (1, 4)) == 1.0


def test_batch_scores_are_the_samples_own_and_ignore_the_padding():
    generator = torch.Generator().manual_seed(0)
    outputs = SimpleNamespace(
        pred_masks=torch.randn(4, 3, 8, 8, generator=generator),
        pred_logits=torch.randn(4, 3, generator=generator),
        slot_mask=torch.rand(4, 3, generator=generator) > 0.2,
    )
    targets = [torch.rand(count, 8, 8, generator=generator).round() for count in (2, 0, 4, 1)]
    extent = torch.tensor([[8, 8], [8, 5], [3, 8], [2, 2]])
    scores = mask_scores(outputs, targets, extent)
    rows = zip(outputs.pred_masks, outputs.pred_logits, outputs.slot_mask, targets, extent, strict=True)
    assert scores == pytest.approx([mask_score(*row) for row in rows])
    outputs.pred_masks[3, :, 2:] = torch.nan
    targets[3][:, :, 2:] = 1.0
    assert mask_scores(outputs, targets, extent) == scores
    assert all(isinstance(value, float) and 0.0 <= value <= 1.0 for value in scores)


def test_unequal_batches_are_refused():
    outputs = SimpleNamespace(pred_masks=torch.zeros(1, 3, 8, 8), pred_logits=torch.zeros(1, 3), slot_mask=ALL[None])
    with pytest.raises(ValueError, match="2 targets"):
        mask_scores(outputs, [torch.zeros(1, 8, 8)] * 2, [(8, 8)])


def test_a_mask_that_is_not_finite_is_refused_not_scored():
    with pytest.raises(ValueError, match=r"slots \[0\] is not finite"):
        mask_score(torch.full((1, 1, 4), torch.nan), torch.ones(1), ALL[:1], torch.ones(1, 1, 4), (1, 4))


# -- rewards by name --------------------------------------------------------------------------------------------------


def test_a_module_of_ones_own_is_found_by_its_dotted_path(tmp_path, monkeypatch):
    (tmp_path / "own_rewards.py").write_text(
        "def brevity(completions, **kwargs):\n    return [1.0 for _ in completions]\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    brevity, builtin = find_rewards(["own_rewards.brevity", "segcompass.trainers.rewards.mask_reward"])
    assert brevity(completions=["a"], prompts=[]) == [1.0] and builtin is mask_reward


def test_functions_and_reward_models_stay_as_they_are():
    model = torch.nn.Linear(1, 1)
    assert find_rewards([mask_reward, model]) == [mask_reward, model]


@pytest.mark.parametrize(
    ("reward", "error", "message"),
    [
        ("brevity", ValueError, "'brevity', which is no dotted path; write package.module.function"),
        ("nowhere.rewards.brevity", ValueError, r"nowhere.rewards cannot be imported \(No module named 'nowhere'\)"),
        (
            "segcompass.trainers.rewards.mask_rewards",
            ValueError,
            "has no function 'mask_rewards'; its functions are: .*format_reward.*mask_reward",
        ),
        ("segcompass.trainers.rewards.MAX_THINK_CHARACTERS", ValueError, "has no function 'MAX_THINK_CHARACTERS'"),
        (0.5, TypeError, "a reward is a float, 0.5; give the dotted path of a function"),
        (lambda completions: [0.0], ValueError, r"<lambda>\(completions\) takes no \*\*kwargs"),
    ],
)
def test_what_is_no_reward_is_refused(reward, error, message):
    with pytest.raises(error, match=message):
        find_rewards([reward])
