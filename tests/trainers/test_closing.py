"""Responses that the sampler closes: every one has its concentration tokens, and forced tokens are no actions."""

import pytest
import torch

from segcompass.trainers import SegCompassGRPOConfig, SegCompassGRPOTrainer
from segcompass.trainers.closing import CloseResponse, closed_generation, closing
from segcompass.trainers.rewards import format_score
from tests.support.grpo import scenes, settings
from tests.support.tiny import BACKBONES, tiny_segcompass

END, THINK_END, REF = 2, 5, 6


def write(choose, slots=3, limit=12):
    """One response, sampled greedily from scores that `choose` gives at each step."""
    close, ids = CloseResponse(THINK_END, REF, [END], slots, limit), [7, 7]
    while len(ids) < 2 + limit and ids[-1] != END:
        scores = torch.zeros(1, 10)
        scores[0, choose(len(ids) - 2)] = 9.0
        ids.append(int(close(torch.tensor([ids]), scores).argmax()))
    return ids[2:], close.actions(ids[2:])


@pytest.mark.parametrize(
    ("choose", "ids", "actions"),
    [
        (lambda t: THINK_END if t == 2 else 8, [8, 8, THINK_END, REF, REF, REF, END], [1, 1, 1, 0, 0, 0, 0]),
        (lambda t: END if t == 2 else 8, [8, 8, THINK_END, REF, REF, REF, END], [1, 1, 1, 0, 0, 0, 0]),
        (lambda t: 8, [8] * 7 + [THINK_END, REF, REF, REF, END], [1] * 7 + [0] * 5),  # the limit of 12
        (lambda t: REF, [THINK_END, REF, REF, REF, END], [1, 0, 0, 0, 0]),  # no such token before </think>
    ],
    ids=["</think>", "end", "limit", "too early"],
)
def test_a_response_is_closed(choose, ids, actions):
    assert write(choose) == (ids, actions)


def test_rows_are_closed_each_at_its_own_time():
    close = CloseResponse(THINK_END, REF, [END], 2, 20)
    scores = torch.zeros(3, 10)
    close(torch.full((3, 4), 7), scores)  # the prompts
    written = torch.tensor([[8, 8, 8], [8, 8, THINK_END], [THINK_END, REF, REF]])
    after = close(torch.cat([torch.full((3, 4), 7), written], 1), scores)
    assert after[0].isfinite().sum() == 8  # all but the end and the concentration token
    assert after[0, THINK_END] == pytest.approx(torch.tensor(2.0).log().item())  # with the end's share
    assert after[1].isfinite().nonzero().tolist() == [[REF]] and after[2].isfinite().nonzero().tolist() == [[END]]


def test_without_room_it_is_refused(tmp_path):
    with pytest.raises(ValueError, match="a response of 8 tokens has no room to reason: </think>, 6 concentration"):
        CloseResponse(THINK_END, REF, [END], 6, 8)
    model, processor = tiny_segcompass("llava")
    args = settings(tmp_path, close_response=True, max_completion_length=5)
    with pytest.raises(ValueError, match="no room to reason"):
        SegCompassGRPOTrainer(model, args=args, train_dataset=scenes(8), processing_class=processor)
    with pytest.raises(ValueError, match="close_response=True forces tokens while transformers samples"):
        SegCompassGRPOConfig(str(tmp_path), use_vllm=True, close_response=True, use_cpu=True, bf16=False)


@pytest.mark.parametrize("backbone", BACKBONES)
def test_an_untrained_model_gets_all_its_slots(backbone):
    model, processor = tiny_segcompass(backbone)
    inputs = processor(images=[row["image"] for row in scenes(2)], text=["a", "b"])
    plain = model.segment(**inputs)
    assert not plain.slot_mask.all()
    outputs = model.segment(**inputs, logits_processor=[closing(model, 12)], max_new_tokens=12)
    assert outputs.slot_mask.all()
    with closed_generation(model, 12) as close:
        again = model.segment(**inputs, max_new_tokens=12)
    assert torch.equal(again.sequences, outputs.sequences) and torch.equal(again.pred_masks, outputs.pred_masks)
    assert "generate" not in vars(model)
    for ids in outputs.sequences[:, outputs.prompt_length :].tolist():
        assert sum(close.actions(ids)) <= 12 - model.config.num_slots - 2 + 1


def test_forced_tokens_do_not_count_in_the_loss(tmp_path):
    model, processor = tiny_segcompass("llava")
    args = settings(tmp_path, close_response=True, max_steps=1, beta=0.0)
    trainer = SegCompassGRPOTrainer(model, args=args, train_dataset=scenes(8), processing_class=processor)
    seen = []
    compute = trainer._compute_loss

    def keep(model, inputs):
        seen.append(inputs)
        return compute(model, inputs)

    trainer._compute_loss = keep
    trainer.train()
    ids, chosen = seen[0]["completion_ids"], seen[0]["tool_mask"]
    assert ((ids == model.config.ref_token_id).sum(1) == model.config.num_slots).all()
    assert not chosen[ids == model.config.ref_token_id].any() and chosen.sum(1).min() >= 1
    texts = [processor.tokenizer.decode(row, skip_special_tokens=True) for row in ids]
    assert all(format_score(f"<think>{text}", model.config.num_slots) in (0.0, 0.9, 1.0) for text in texts)
    (entry,) = [entry for entry in trainer.state.log_history if "seg/slots_found" in entry]
    assert entry["seg/slots_found"] == model.config.num_slots
    plain = dict(seen[0])
    plain["completion_ids"] = ids.clone()
    # the loss of another continuation in the forced places alone is the same
    with torch.no_grad():
        trainer.model.train()
        trainer.args.training_mode = "rl"
        base = compute(trainer.model, seen[0])
        places = (chosen == 0) & (seen[0]["completion_mask"] == 1)
        last = places & (places.cumsum(1) == places.sum(1, keepdim=True))  # nothing comes after it
        plain["completion_ids"][last] = 9
        assert torch.allclose(compute(trainer.model, plain), base, atol=1e-6)
