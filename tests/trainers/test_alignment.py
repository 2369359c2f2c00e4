"""The alignment term: words against patches, by an independent formula, on whole frames, and in training."""

import math

import numpy as np
import pytest
import torch
from transformers.models.sam.image_processing_pil_sam import SamImageProcessorPil

from segcompass.loaders.masks import encode_mask
from segcompass.loaders.scene_questions import word_kind
from segcompass.loaders.scenes import load_mixed_scenes
from segcompass.modeling_segcompass.patch_boxes import grid_boxes
from segcompass.trainers import SegCompassSFTConfig, SegCompassSFTTrainer
from segcompass.trainers.alignment import Alignment, AlignmentTargets, alignment_loss
from segcompass.trainers.collator import SegCompassCollator
from segcompass.trainers.targets import patch_coverage
from tests.support.tiny import tiny_segcompass

WORDS, PATCHES, KINDS = 7, 11, (0, 0, 1, 1)


def example(seed=0):
    """Random words and patches in two samples; meanings 0, 1 are of one kind, 2, 3 of another."""
    generator = torch.Generator().manual_seed(seed)
    shown = torch.rand(PATCHES, len(KINDS), generator=generator) > 0.6
    shown[0] = False  # a patch of the ground
    shown[1] = True
    meanings = torch.tensor([0, 1, 2, 3, 0, 2, 1])
    words = torch.tensor([[index % 2, index] for index in range(WORDS)])
    patches = torch.tensor([[index % 2, 10 + index] for index in range(PATCHES)])
    return Alignment(words, meanings, patches, shown, torch.tensor(KINDS))


def direct(states, alignment):
    """The term written out in Python numbers, one pair at a time."""
    z = states.detach().double().numpy()
    words = np.stack([z[b, t] for b, t in alignment.words.tolist()])
    patches = np.stack([z[b, t] for b, t in alignment.patches.tolist()])
    shown, meanings = alignment.shown.numpy(), alignment.meanings.tolist()
    words -= words.mean(0)
    patches -= patches[shown.any(1)].mean(0)
    s = [[math.exp(w @ p / np.linalg.norm(w) / np.linalg.norm(p) / 0.1) for p in patches] for w in words]
    first = []
    for word, meaning in enumerate(meanings):
        mine = sum(s[word][patch] for patch in range(PATCHES) if shown[patch, meaning])
        if mine:
            first.append(-math.log(mine / sum(s[word])))
    by_kind = {0: [], 1: []}
    for patch in range(PATCHES):
        for meaning in range(len(KINDS)):
            if shown[patch, meaning]:
                mine = sum(s[word][patch] for word in range(WORDS) if meanings[word] == meaning)
                others = [
                    word
                    for word in range(WORDS)
                    if KINDS[meanings[word]] == KINDS[meaning] and not shown[patch, meanings[word]]
                ]
                by_kind[KINDS[meaning]].append(-math.log(mine / (mine + sum(s[word][patch] for word in others))))
    return (np.mean(first) + np.mean([np.mean(losses) for losses in by_kind.values()])) / 2


def test_term_and_gradient_follow_the_formula():
    alignment = example()
    states = torch.randn(2, 24, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    states.requires_grad_(True)
    loss = alignment_loss(states, alignment)
    assert loss.item() == pytest.approx(direct(states, alignment), rel=1e-5)  # the term is float32
    loss.backward()
    direction = torch.randn(states.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    with torch.no_grad():
        numeric = (direct(states + 1e-5 * direction, alignment) - direct(states - 1e-5 * direction, alignment)) / 2e-5
    assert (states.grad * direction).sum().item() == pytest.approx(numeric, rel=1e-3)


def test_no_named_patch_gives_a_zero_that_is_connected():
    alignment = example()
    states = torch.randn(2, 24, 5, requires_grad=True)
    empty = Alignment(
        alignment.words, alignment.meanings, alignment.patches, torch.zeros_like(alignment.shown), alignment.kinds
    )
    loss = alignment_loss(states, empty)
    loss.backward()
    assert loss.item() == 0 and torch.equal(states.grad, torch.zeros_like(states))


def test_patches_of_a_padded_image_are_covered_where_the_mask_lies():
    mask = np.zeros((40, 80), dtype=bool)
    mask[10:20, 40:80] = True  # rows 1 of 8, columns 4 to 7 of 8, in cells of 10 pixels
    cover = patch_coverage([encode_mask(mask)], 40, 80, grid_boxes(8, 8, (0, 0, 1, 2)))[0].view(8, 8)
    expected = torch.zeros(8, 8)
    expected[1, 4:] = 1
    assert torch.equal(cover, expected)
    # A crop of the centre: 40 x 40 pixels from (20, 0), of which the mask holds the right half of columns 2 and 3.
    cropped = patch_coverage([encode_mask(mask)], 40, 80, grid_boxes(4, 4, (0.25, 0, 0.75, 1)))[0].view(4, 4)
    expected = torch.zeros(4, 4)
    expected[1, 2:] = 1
    assert torch.equal(cropped, expected)


@pytest.fixture(scope="module")
def parts():
    rows = list(load_mixed_scenes("train", seed=5, num_samples=4, streaming=True))
    model, processor = tiny_segcompass("llava", image_view="frame")
    processor.image_processor = SamImageProcessorPil(
        size={"longest_edge": 28}, pad_size={"height": 28, "width": 28}, image_mean=[0.5] * 3, image_std=[0.5] * 3
    )
    return model, processor, rows


def test_words_and_patches_of_rows_are_those_of_their_phrases(parts):
    model, processor, rows = parts
    make = AlignmentTargets(processor, word_kind)
    batch = SegCompassCollator(processor, alignment=make)(rows)
    alignment = batch["alignment_targets"]
    said = {}
    for (sample, position), meaning in zip(alignment.words.tolist(), alignment.meanings.tolist(), strict=True):
        text = processor.tokenizer.decode(batch["input_ids"][sample, : position + 1])
        said.setdefault(meaning, set()).add(text[-1])
    assert all(len(ends) <= 2 for ends in said.values())  # one letter ends a word, another its plural
    assert len(said) == alignment.shown.shape[1]
    assert (batch["input_ids"][tuple(alignment.patches.T)] == processor.image_token_id).all()
    assert (~alignment.shown.any(1)).any() and alignment.shown.any()
    per_kind = torch.stack([alignment.shown[:, alignment.kinds == kind].sum(1) for kind in alignment.kinds.unique()])
    assert per_kind.max() == 1  # a thing has one colour, one shape, one size, one column and one row


def test_misnamed_words_change_the_pairs_and_nothing_else(parts):
    model, processor, rows = parts
    batch = SegCompassCollator(processor)(rows)
    right = AlignmentTargets(processor, word_kind)(rows, batch)
    wrong = AlignmentTargets(processor, word_kind, {"small": "large", "large": "small"})(rows, batch)
    assert torch.equal(right.shown, wrong.shown)
    assert len(right.words) == len(wrong.words) and not torch.equal(right.meanings, wrong.meanings)


def test_rows_without_phrases_and_phrases_out_of_place_are_refused(parts):
    model, processor, rows = parts
    collate = SegCompassCollator(processor, alignment=AlignmentTargets(processor))
    with pytest.raises(ValueError, match="has no phrases; .*lambda_align"):
        collate([{**rows[0], "phrases": None}])
    moved = [{**phrase, "start": phrase["start"] + 1} for phrase in rows[0]["phrases"]]
    with pytest.raises(ValueError, match="does not stand at character 1"):
        collate([{**rows[0], "phrases": moved}])


def test_a_few_steps_raise_the_cosine_of_words_and_their_patches_over_others(parts, tmp_path):
    model, processor, rows = parts

    def gap():
        """Mean cosine of centred word and patch over pairs that match, minus over those that do not."""
        batch = SegCompassCollator(processor, alignment=AlignmentTargets(processor, word_kind))(rows)
        alignment = batch.pop("alignment_targets")
        with torch.no_grad():
            states = model(**batch, output_hidden_states=True).hidden_states[model.config.sae_config.layer]
        words, patches = states[tuple(alignment.words.T)], states[tuple(alignment.patches.T)]
        things = alignment.shown.any(1)
        words, patches = words - words.mean(0), (patches - patches[things].mean(0))[things]
        cosine = torch.nn.functional.cosine_similarity(words[:, None], patches[None], dim=-1)
        same = alignment.shown[things].T[alignment.meanings]
        return (cosine[same].mean() - cosine[~same].mean()).item()

    before = gap()
    settings = dict(
        output_dir=str(tmp_path), max_steps=12, per_device_train_batch_size=4, learning_rate=3e-3, report_to="none",
        use_cpu=True, disable_tqdm=True, logging_steps=1, save_strategy="no", lambda_s=0, lambda_c=0,
        query_source="tokens", lambda_align=1.0, train_below_sae_layer=True, train_vision_tower=True,
    )  # fmt: skip
    trainer = SegCompassSFTTrainer(
        model, SegCompassSFTConfig(**settings), processor, word_kind=word_kind, train_dataset=rows
    )
    trainer.train()
    logged = [entry["alignment"] for entry in trainer.state.log_history if "alignment" in entry]
    assert logged[-1] < 0.9 * logged[0]
    assert gap() > before + 0.05
    with pytest.raises(ValueError, match="lambda_align=1.0 changes the states at the SAE's layer"):
        SegCompassSFTTrainer(
            model, SegCompassSFTConfig(**{**settings, "train_below_sae_layer": False}), processor, train_dataset=rows
        )
