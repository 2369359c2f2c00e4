"""The grounded read-out on tiny real backbones: exact sums, no e_k, words choose, steering, batches, checkpoints."""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from segcompass.modeling_segcompass import (
    SegCompassConfig,
    SegCompassModel,
    SparseAutoencoderConfig,
    grounded_reading,
)
from segcompass.modeling_segcompass.grounded_reading import (
    GroundedReading,
    GuidedUpsampling,
    all_present,
    centred,
    concept_spread,
)
from segcompass.modeling_segcompass.image_encoder import Frame
from segcompass.modeling_segcompass.token_layout import conclusion_mask, gather_positions
from segcompass.trainers.optimization import RateMultipliers, parameter_groups, segmentation_modules
from segcompass.trainers.policy import lora_config
from segcompass.white_box.faithfulness import slot_faithfulness
from tests.support.scripted import INSTRUCTIONS, Script, lively_segcompass, noise_image, noise_images
from tests.support.tiny import BACKBONES, tiny_processor

RESPONSES = [
    "<think>a box. it is left of it.</think><REF_POS><REF_POS><REF_POS>",
    "<think>a</think><REF_POS><REF_POS><REF_POS>",
    "<think>x? one token is missing</think><REF_POS><REF_POS>",
    "<think>b c</think><REF_POS><REF_POS><REF_POS>",
]
CONCLUSIONS = [" it is left of it", "a", " one token is missing", "b c"]


def grounded_segcompass(backbone, **config):
    """A tiny grounded model, half of whose concepts count as places, with every learned part away from its start."""
    model, processor = lively_segcompass(backbone, concept_reading="grounded", tied_place_share=0.6, **config)
    torch.manual_seed(1)
    reading = model.grounded_reading
    with torch.no_grad():
        reading.spread[::2] = 0.2
        for weight in (reading.concept_bias, reading.slot_bias, reading.confidence_concepts, reading.end_bias):
            weight.normal_(std=0.3)
        if reading.word_side is not None:
            reading.patch_side.normal_()
            reading.word_side.normal_(std=0.1)
    return model, processor


@pytest.fixture(scope="module", params=BACKBONES)
def grounded(request):
    """Model, processor, teacher-forced inputs, their outputs and the states that masks are decoded from."""
    topk = SparseAutoencoderConfig(d_in=32, d_sae=128, layer=2, activation="topk", k=24)
    config = {
        "llava": {"grounded_rank": 8, "grounded_map": "places"},
        "qwen2_5_vl": {"grounded_rank": 0, "sae_config": topk},
    }
    model, processor = grounded_segcompass(request.param, **config[request.param])
    inputs = processor(images=noise_images(), text=INSTRUCTIONS, response=RESPONSES)
    with torch.no_grad():
        outputs = model(**inputs)
        states = states_of(model, inputs)
    return model, processor, inputs, outputs, states


def states_of(model, inputs):
    language = {
        name: value
        for name, value in inputs.items()
        if name in ("input_ids", "attention_mask", "pixel_values", "image_grid_thw", "mm_token_type_ids")
    }
    with torch.no_grad(), model.reading_states() as recorder:
        model.mllm(**language)
        states = recorder.states_of_pass(inputs["input_ids"], inputs["attention_mask"], inputs["response_mask"])
        return states._replace(
            patch_boxes=inputs["patch_boxes"],
            image_embeddings=model.get_image_embeddings(inputs["encoder_pixel_values"]),
            reshaped_input_sizes=inputs["reshaped_input_sizes"],
        )


def decode(model, states, **changes):
    with torch.no_grad():
        return model.decode_masks(**states._asdict(), **changes)


# -- the sum -----------------------------------------------------------------------------------------------------------


def test_contributions_add_up_to_the_heatmap(grounded):
    _, _, _, outputs, _ = grounded
    account = outputs.grounding
    for sample in range(4):
        for slot in range(3):
            patches = account.on_patches(sample, slot).sum(0) + account.offset
            cells = account.on_keys(sample, slot).sum(0) + account.key_offset
            # logits reach 40 here: float32 sums in two orders
            torch.testing.assert_close(patches, account.patch_heatmaps[sample, slot], atol=1e-5, rtol=1e-6)
            torch.testing.assert_close(cells, outputs.heatmaps[sample, slot], atol=1e-5, rtol=1e-6)
    assert (outputs.heatmaps.amax((2, 3)) - outputs.heatmaps.amin((2, 3))).max() > 0.1  # not everywhere the same


def test_heatmap_is_the_formula_computed_densely(grounded):
    """Against one sample's SAE codes, dense, with loops where the model has tensors."""
    model, processor, inputs, outputs, states = grounded
    reading, sae, sample = model.grounded_reading, model.sae, 0
    with torch.no_grad():
        h = sae.encode(states.z[sample]) / sae.mean_active_activation
        text = [processor.tokenizer.decode([number]) for number in inputs["input_ids"][sample].tolist()]
        end = "".join(text).index("</think>")
        places = np.cumsum([0, *map(len, text)])
        last = int(np.searchsorted(places, end))  # the token </think>
        words = list(range(last - len(CONCLUSIONS[0]) - 1, last - 1))  # one token per character; the stop is left out
        assert "".join(text[i] for i in words) == CONCLUSIONS[0]
        said = h[words].clamp(max=5)
        heard = reading.reach.sigmoid()
        phrases = torch.stack(
            [torch.stack([said[i - o] * heard[o] for o in range(5) if i >= o]).amax(0) for i in range(len(words))]
        )
        keys = reading.word_key(reading.word_norm(states.last_hidden[sample, words]))
        scores = reading.slot_queries @ keys.T / 8
        scores += reading.end_bias[:, None] * torch.arange(len(words)).flip(0).add(1).log()
        t = scores.softmax(-1) @ phrases
        places = reading.spread < 0.53
        patches = h[inputs["input_ids"][sample] == model.config.image_token_id]  # a square image: all are valid
        maps = (patches - patches.mean(0)).clamp_min(0)
        s = reading.same_concept * t.clamp(max=2) * maps.amax(0).clamp(max=2) + reading.concept_bias
        s += reading.slot_bias * places
        if reading.word_side is not None:
            s += t @ reading.word_side @ reading.patch_side.T * places
        xy = outputs.grounding.patch_xy[sample]
        for slot in range(3):
            shares = {}
            for group, count in ((~places, 3), (places, 2)):
                best = sorted((j for j in range(128) if group[j] and maps[:, j].any()), key=lambda j: -s[slot, j])
                chosen = best[:count]
                shares[count] = torch.zeros(128)
                shares[count][chosen] = s[slot, chosen].softmax(0)
            there = torch.ones(len(maps))
            for j in shares[3].nonzero()[:, 0].tolist():
                there *= (maps[:, j] / maps[:, j].max()).clamp(min=0.02) ** shares[3][j]
            rho = tied_share(there, xy)
            w = (1 - rho) * shares[3] + rho * shares[2]
            heat = reading.offset + reading.gain.abs() * (maps * w).sum(-1)
            torch.testing.assert_close(outputs.grounding.patch_heatmaps[sample, slot], heat, atol=1e-4, rtol=1e-4)
            top = heat.topk(4).values
            confidence = reading.confidence_concepts @ t[slot] + reading.confidence_bias[0]
            confidence += reading.confidence_map @ torch.stack([top[0], top.mean()])
            torch.testing.assert_close(outputs.pred_logits[sample, slot], confidence, atol=1e-4, rtol=1e-4)


def tied_share(looks, xy):
    """ρ of one slot, by numpy."""
    looks, xy = np.array(looks, float), np.array(xy, float)
    there = looks >= 0.4 * looks.max()
    if looks.max() == 0:
        return 0.25
    scatter = np.cov(xy[there].T, aweights=looks[there], ddof=0)
    return 0.6 if np.linalg.eigvalsh(scatter)[-1] ** 0.5 > 0.15 else 0.25


def test_few_concepts_share_a_slot_and_each_is_of_its_group(grounded):
    model, _, _, outputs, _ = grounded
    is_place = model.grounded_reading.is_place[outputs.concept_indices]  # (B, M)
    for group, count, least, most in ((~is_place, 3, 0.4, 0.75), (is_place, 2, 0.25, 0.6)):
        weights = outputs.concept_weights * group[:, None]
        assert ((weights > 0).sum(-1) <= count).all()
        sums = weights.sum(-1)
        within = (sums > least - 1e-5) & (sums < most + 1e-5)
        assert (within | (sums == 0)).all() and (sums > 0).any()
    assert ((outputs.concept_values > 0) == (outputs.concept_weights.amax(1) > 0)).all()


def test_words_add_up_to_the_concepts_logit(grounded):
    model, _, _, outputs, states = grounded
    account = outputs.grounding
    conclusion = conclusion_mask(states.input_ids, states.attention_mask, states.response_mask, model.config)
    positions, found = gather_positions(conclusion)
    with torch.no_grad():
        rows = torch.arange(4)[:, None]
        codes = model.sae.encode(states.z[rows, positions]) / model.sae.mean_active_activation
        words = model.grounded_reading.read_words(codes, states.last_hidden[rows, positions], found)
        image = gather_positions(states.input_ids == model.config.image_token_id)[0]
        patches = model.sae.encode(states.z[rows, image]) / model.sae.mean_active_activation
        salience = centred(patches, account.patch_mask).amax(1)
        logits = model.grounded_reading.concept_logits(words.strengths, salience)
    logits = logits.gather(2, outputs.concept_indices[:, None].expand(-1, 3, -1))
    torch.testing.assert_close(account.word_logits.sum(2) + account.logit_bias, logits, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(account.word_shares.sum(-1), torch.ones(4, 3), atol=1e-5, rtol=0)


# -- the parts ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backbone", BACKBONES)
def test_conclusion_is_the_last_sentence_of_the_reasoning(backbone):
    processor = tiny_processor(backbone)
    config = SegCompassConfig(
        sae_config=SparseAutoencoderConfig(d_in=4096), mllm_config={"model_type": "llava"}, **processor.model_tokens()
    )
    cases = {
        "<think>one. two.</think><REF_POS>": " two",
        "<think>one! two three?\n</think>a. b<REF_POS>": " two three",
        "<think>no stop at all</think>": "no stop at all",
        "<think>never over. so": " so",
        "<think>...</think>": "",
        "": "",
    }
    for response, expected in cases.items():
        prompt = processor.tokenizer("a prompt. here", add_special_tokens=False).input_ids
        written = processor.tokenizer(response, add_special_tokens=False).input_ids if response else []
        ids = torch.tensor([prompt + written])
        response_mask = torch.tensor([[False] * len(prompt) + [True] * len(written)])
        words = conclusion_mask(ids, torch.ones_like(ids), response_mask, config)
        assert processor.tokenizer.decode(ids[words]) == expected, response


def test_unknown_sentence_ends_are_refused(grounded):
    model, _, inputs, _, _ = grounded
    known, model.config.sentence_end_ids = model.config.sentence_end_ids, []
    try:
        with pytest.raises(ValueError, match="sentence_end_ids is empty.*from_backbones"):
            model(**inputs)
    finally:
        model.config.sentence_end_ids = known


def test_rows_of_the_upsampling_sum_to_one_and_leave_padding_out(grounded):
    _, _, _, outputs, _ = grounded
    upsampling, mask = outputs.grounding.upsampling, outputs.grounding.patch_mask
    assert (upsampling >= 0).all()
    torch.testing.assert_close(upsampling.sum(-1), torch.ones(upsampling.shape[:-1]), atol=1e-5, rtol=0)
    assert not upsampling[~mask[:, None, None].expand_as(upsampling)].any()


def test_upsampling_without_a_guide_is_a_gaussian_and_the_guide_reads_the_keys_under_a_patch():
    model, _ = lively_segcompass("llava", concept_reading="grounded")
    upsampling = GuidedUpsampling(model.config)
    torch.manual_seed(0)
    keys = torch.randn(1, 16, 8, 8)
    side = (torch.arange(4) + 0.5) / 4
    xy = torch.stack([side.repeat(4), side.repeat_interleave(4)], -1)[None]  # 4 x 4 patches, row by row
    size, mask = torch.full((1, 1, 2), 0.25), torch.ones(1, 16, dtype=torch.bool)
    cell = torch.stack(torch.meshgrid((torch.arange(8) + 0.5) / 2, (torch.arange(8) + 0.5) / 2, indexing="ij"), -1)
    distance = (cell.flip(-1)[:, :, None] - 4 * xy[0]).square().sum(-1)  # (8, 8, 16), in patches
    with torch.no_grad():
        upsampling.log_sigma.fill_(-0.3)
        means = torch.nn.functional.avg_pool2d(keys, 2).flatten(2)[0].T  # (16, c), the four cells of a patch
        guide = upsampling.query(keys[0].flatten(1).T) @ upsampling.key(means).T / 32**0.5
        expected = (guide.view(8, 8, 16) - distance * torch.exp(torch.tensor(0.6)) / 2).softmax(-1)
        torch.testing.assert_close(upsampling(keys, xy, size, mask)[0], expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(
    ("view", "first", "valid"),
    [
        ("whole", (0.125 / 2, 0.125), [True] * 16),  # a 16 x 32 (wide 16, high 32) image in a frame of 32
        ("center_crop", (0.0625, 0.25 + 0.0625), [True] * 16),
        ("center_pad", (-0.25 + 0.125, 0.125), [False, True, True, False] * 4),
        ("frame", (0.125, 0.125), [True, True, False, False] * 4),
    ],
)
def test_patches_lie_on_the_frame_as_the_mllm_saw_the_image(view, first, valid):
    side = (torch.arange(4) + 0.5) / 4
    xy = torch.stack([side.repeat(4), side.repeat_interleave(4)], -1)[None]
    places, _, mask = Frame(32).place_patches(xy, torch.tensor([[32, 16]]), view)
    assert places[0, 0].tolist() == pytest.approx(first) and mask[0].tolist() == valid
    _, _, narrow = Frame(32).place_patches(xy, torch.tensor([[32, 1]]), "frame")
    assert narrow[0].tolist() == [True, False, False, False] * 4  # no centre lies on it: the nearest column counts


def test_spread_is_one_everywhere_and_small_in_one_place():
    maps = torch.zeros(4, 3)
    maps[:, 0], maps[2, 1] = 1.0, 5.0
    torch.testing.assert_close(concept_spread(maps), torch.tensor([1.0, 0.25, 1.0]))


# -- what it reads -----------------------------------------------------------------------------------------------------


def test_concentration_tokens_states_do_not_matter(grounded):
    model, _, inputs, outputs, states = grounded
    at = inputs["input_ids"] == model.config.ref_token_id
    noise = torch.randn_like(states.z) * at[..., None] * 100
    changed = decode(model, states._replace(z=states.z + noise, last_hidden=states.last_hidden - noise))
    assert torch.equal(changed.pred_masks, decode(model, states).pred_masks)
    assert torch.equal(changed.pred_logits, decode(model, states).pred_logits)
    with pytest.raises(ValueError, match="'tokens'.*grounded"):
        decode(model, states, query_source="tokens")


def test_with_anothers_words_the_mask_is_anothers(grounded):
    """Two questions about one image: the words' states are swapped, and with them everything that is shown."""
    model, processor, _, _, _ = grounded
    thoughts = ["a red box", "left ones"]
    responses = [f"<think>{thought}</think><REF_POS><REF_POS><REF_POS>" for thought in thoughts]
    states = states_of(model, processor(images=[noise_image(40, 40)] * 2, text=["it", "it"], response=responses))
    before = decode(model, states)
    words = conclusion_mask(states.input_ids, states.attention_mask, states.response_mask, model.config)
    assert words.sum(1).tolist() == [9, 9] and (words[0] == words[1]).all()
    swap = {name: getattr(states, name).clone() for name in ("z", "last_hidden")}
    for name, value in swap.items():
        value[:, words[0]] = getattr(states, name).flip(0)[:, words[0]]
    after = decode(model, states._replace(**swap))
    assert (before.heatmaps[0] - before.heatmaps[1]).abs().max() > 1e-3
    torch.testing.assert_close(after.heatmaps, before.heatmaps.flip(0), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(after.pred_masks, before.pred_masks.flip(0), atol=1e-3, rtol=1e-3)


def test_another_slots_looks_with_this_slots_places(grounded):
    """What hand-over training asks for."""
    reading = grounded[0].grounded_reading
    torch.manual_seed(0)
    looks, places, fires = torch.randn(128), torch.randn(128), torch.ones(128, dtype=torch.bool)
    mixed = reading.weigh(looks, fires, place_logits=places)
    torch.testing.assert_close(mixed * ~reading.is_place, reading.weigh(looks, fires) * ~reading.is_place)
    torch.testing.assert_close(mixed * reading.is_place, reading.weigh(places, fires) * reading.is_place)


def test_codes_alone_give_the_same_heatmaps_as_the_model(grounded):
    """`forward` on kept codes, as training on cached states calls it, dense in the SAE's features."""
    model, _, _, outputs, states = grounded
    account = outputs.grounding
    rows = torch.arange(4)[:, None]
    patches, _ = gather_positions(states.input_ids == model.config.image_token_id)
    codes = {
        name: model.sae.encode(states.z[rows, at]) / model.sae.mean_active_activation
        for name, at in (("words", account.word_positions), ("patches", patches))
    }
    with torch.no_grad():
        read = model.grounded_reading(
            codes["words"],
            states.last_hidden[rows, account.word_positions],
            account.word_mask,
            codes["patches"],
            account.patch_mask,
            account.patch_xy,
        )
    inside = account.patch_mask[:, None].expand_as(read.heatmaps)
    torch.testing.assert_close(read.heatmaps[inside], account.patch_heatmaps[inside], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(read.confidences, outputs.pred_logits, atol=1e-4, rtol=1e-4)
    keys = model.grounded_reading.to_keys(read.heatmaps, account.upsampling)
    torch.testing.assert_close(keys, outputs.heatmaps, atol=1e-4, rtol=1e-4)


def test_places_have_more_of_a_slot_where_two_parts_of_the_image_look_alike(grounded):
    reading = grounded[0].grounded_reading
    line = torch.stack([torch.linspace(0.05, 0.95, 10), torch.full((10,), 0.5)], -1)[None]  # (1, 10, 2)
    looks = torch.zeros(1, 6, 10)
    looks[0, :, 1] = 0.8
    looks[0, 0, 1:6] = 0.8  # a wide one: from .15 to .55, √2 tenths around .35
    looks[0, 1, 8] = 0.31  # not enough of it
    looks[0, 2, 6] = 0.33  # at .65
    looks[0, 3, [4, 6]] = 0.33  # between them one that fills the gap
    looks[0, 4, 3] = 0.8  # beside it, at .35: √1 tenths around .25
    looks[0, 5] = 0.0  # nothing looks like it
    inside = torch.ones(1, 10, dtype=torch.bool)
    rho = reading.share_of_places(looks, line, inside)[0, :, 0]
    torch.testing.assert_close(rho, torch.tensor([0.25, 0.25, 0.6, 0.6, 0.25, 0.25]))
    assert torch.equal(reading.share_of_places(looks, line.flip(-1), inside)[0, :, 0], rho)  # one above the other
    slope = torch.stack([line[..., 0] * 0.6, line[..., 0] * 0.8], -1)  # as far apart, in a direction between
    assert torch.equal(reading.share_of_places(looks, slope, inside)[0, :, 0], rho)
    inside[0, 6] = False  # padding is no second place
    assert (reading.share_of_places(looks, line, inside) == 0.25).all()


def test_where_every_concept_shares_a_slot_the_heaviest_looks_still_say_whether_there_is_a_tie(monkeypatch):
    """In the first steps of training shares are small, and what is a small part of a slot would be there everywhere."""
    model, _ = grounded_segcompass("llava")
    reading, seen = model.grounded_reading, []
    monkeypatch.setattr(reading, "soft", True)
    monkeypatch.setattr(
        grounded_reading, "all_present", lambda maps, shares: seen.append(shares) or all_present(maps, shares)
    )
    codes, words = torch.rand(2, 9, 128), torch.ones(2, 3, dtype=torch.bool)
    read = reading(
        torch.rand(2, 3, 128),
        torch.randn(2, 3, 32),
        words,
        codes,
        torch.ones(2, 9, dtype=torch.bool),
        torch.rand(2, 9, 2),
    )
    (shares,) = seen
    assert ((read.weights > 0).sum(-1) > 20).all() and shares.shape[-1] == 3
    torch.testing.assert_close(shares.sum(-1), torch.ones(shares.shape[:2]))


def test_a_look_that_is_equal_everywhere_is_there_nowhere():
    """Its mean over 49 patches is rounded, so that 6e-8 of it stands out all over the image."""
    inside, alone = torch.ones(1, 49, dtype=torch.bool), torch.ones(1, 1, 1)
    equal = torch.stack([centred(torch.full((1, 49, 1), value.item()), inside) for value in torch.linspace(0.5, 2, 40)])
    assert (equal > 0).any(), "nothing was rounded, so nothing is shown"
    assert not any(all_present(maps, alone).any() for maps in equal)
    maps = torch.zeros(1, 49, 2)
    maps[0, 3, 0] = 1.0  # the other look is nowhere: the first still says where
    both = all_present(maps, torch.full((1, 1, 2), 0.5))
    assert both[0, 0, 3] > 0.1 and both.sum() == both[0, 0, 3]


def test_ties_are_looked_for_only_where_they_change_something(grounded, monkeypatch):
    model, _, _, _, states = grounded
    calls, encode = [], model.sae.encode_selected
    monkeypatch.setattr(model.sae, "encode_selected", lambda *args: calls.append(1) or encode(*args))
    decode(model, states)
    assert len(calls) == 2
    monkeypatch.setattr(model.grounded_reading, "tied_place_share", model.grounded_reading.place_share)
    calls.clear()
    weights = decode(model, states).concept_weights
    assert len(calls) == 1
    places = weights * model.grounded_reading.is_place[decode(model, states).concept_indices][:, None]
    sums = places.sum(-1)
    assert (((sums - 0.25).abs() < 1e-6) | (sums == 0)).all() and (sums > 0).any()


def test_of_two_things_that_look_alike_the_named_place_is_shown():
    """One look fires on two patches, a little stronger on the left; the word also fires the place on the right."""
    model, _ = grounded_segcompass("llava", grounded_rank=0)
    reading = model.grounded_reading
    reading.init_weights()
    with torch.no_grad():
        reading.spread.fill_(1.0)
        reading.spread[1] = 0.1
        patches = torch.zeros(1, 10, 128)
        patches[0, 1, 0], patches[0, 8, 0], patches[0, 8, 1] = 2.0, 1.7, 1.0
        words = torch.zeros(1, 1, 128)
        words[0, 0, :2] = 2.0
        xy = torch.stack([torch.linspace(0.05, 0.95, 10), torch.full((10,), 0.5)], -1)[None]
        states, yes = torch.randn(1, 1, 32), torch.ones(1, 1, dtype=torch.bool)
        read = reading(words, states, yes, patches, yes.expand(1, 10), xy)
        assert read.weights[0, :, 1].tolist() == pytest.approx([0.6] * 3) and (read.heatmaps.argmax(-1) == 8).all()
        words[0, 0, 1], patches[0, 8, 1] = 0.0, 0.0  # no place is named: the stronger one
        read = reading(words, states, yes, patches, yes.expand(1, 10), xy)
        assert (read.heatmaps.argmax(-1) == 1).all()


@pytest.mark.parametrize("backbone", BACKBONES)
def test_map_to_places_leaves_looks_to_shared_firing(backbone):
    model, _ = grounded_segcompass(backbone, grounded_rank=8, grounded_map="places")
    reading, strengths, salience = model.grounded_reading, torch.rand(1, 3, 128), torch.rand(1, 128)
    with torch.no_grad():
        logits = reading.concept_logits(strengths, salience)
        mapped = strengths @ reading.word_side @ reading.patch_side.T
        reading.word_side.zero_()
        without = reading.concept_logits(strengths, salience)
    torch.testing.assert_close(logits - without, mapped * reading.is_place, atol=1e-5, rtol=1e-4)
    assert (mapped[..., ::2] != 0).all() and reading.is_place.tolist() == [index % 2 == 0 for index in range(128)]


def test_soft_weights_share_a_slot_among_all_that_fire(grounded):
    model, _, _, _, _ = grounded
    reading = model.grounded_reading
    reading.soft = True
    try:
        fires = torch.arange(128) < 60
        weights = reading.weigh(torch.zeros(128), fires)
    finally:
        reading.soft = False
    assert ((weights > 0) == fires).all() and weights.sum() == pytest.approx(1, abs=1e-5)


# -- steering ----------------------------------------------------------------------------------------------------------


def heaviest(outputs, sample=0, slot=0):
    return int(outputs.concept_indices[sample, outputs.concept_weights[sample, slot].argmax()])


def test_concept_scaled_to_zero_takes_its_contribution_out_and_nothing_else(grounded):
    model, _, _, outputs, states = grounded
    index = heaviest(outputs)
    column = int((outputs.concept_indices[0] == index).nonzero())
    for factor in (0.0, 2.0):
        after = decode(model, states, concept_scale={index: factor})
        for slot in range(3):
            expected = outputs.heatmaps[0, slot] + (factor - 1) * outputs.grounding.on_keys(0, slot)[column]
            torch.testing.assert_close(after.heatmaps[0, slot], expected, atol=1e-5, rtol=1e-5)
    assert outputs.grounding.on_keys(0, 0)[column].max() > 1e-2
    assert not after.heatmaps.isnan().any()


def test_labels_of_the_dictionary_name_concepts(grounded):
    model, _, _, outputs, states = grounded
    index = heaviest(outputs)
    first, second = [other for other in (3, 4, 5) if other != index][:2]
    model.concept_labels = {index: "Blue", first: "box", second: "box"}
    try:
        by_label, by_index = (decode(model, states, concept_scale={key: 0.0}).heatmaps for key in ("blue", index))
        assert torch.equal(by_label, by_index)
        with pytest.raises(ValueError, match="no concept is called 'blu'; close labels: 'Blue'"):
            decode(model, states, concept_scale={"blu": 0.0})
        with pytest.raises(ValueError, match=f"concept {first} would be replaced by box, which is the same"):
            decode(model, states, concept_replace={first: "box"})
    finally:
        model.concept_labels = {}
    with pytest.raises(ValueError, match="'blue' is a label, but no concepts.json"):
        decode(model, states, concept_replace={"blue": 3})
    with pytest.raises(ValueError, match="weight to add for concept 3 is -1"):
        decode(model, states, concept_add={3: -1})
    with pytest.raises(ValueError, match="concept 128 is out of range"):
        decode(model, states, concept_add={128: 1})


def absent_and_firing(model, outputs, states):
    """A concept that fires on sample 0's image and has no weight in any slot."""
    patches = states.input_ids[0] == model.config.image_token_id
    h = model.sae.encode(states.z[0, patches]) / model.sae.mean_active_activation
    used = set(outputs.concept_indices[0, outputs.concept_weights[0].amax(0) > 0].tolist())
    maps = (h - h.mean(0)).clamp_min(0).detach()
    index = next(j for j in maps.amax(0).argsort(descending=True).tolist() if j not in used)
    return index, maps[:, index]


def test_absent_concept_is_switched_on(grounded):
    model, _, _, outputs, states = grounded
    index, fires = absent_and_firing(model, outputs, states)
    assert fires.max() > 0
    after = decode(model, states.rows([0]), concept_add={index: 0.5})
    valid = outputs.grounding.patch_mask[0]
    if valid.all():  # `absent_and_firing` centres over all patches
        gained = after.grounding.patch_heatmaps[0, 1] - outputs.grounding.patch_heatmaps[0, 1, : len(fires)]
        torch.testing.assert_close(gained, 0.5 * model.grounded_reading.gain.abs() * fires, atol=1e-4, rtol=1e-4)
    assert (after.concept_weights[0][:, after.concept_indices[0] == index] == 0.5).all()


def test_concept_is_replaced_by_another(grounded):
    model, _, _, outputs, states = grounded
    old = heaviest(outputs)
    new, _ = absent_and_firing(model, outputs, states)
    after = decode(model, states.rows([0]), concept_replace={old: new})
    before = outputs.concept_weights[0][:, outputs.concept_indices[0] == old]
    torch.testing.assert_close(after.concept_weights[0][:, after.concept_indices[0] == new], before)
    assert not after.concept_weights[0][:, after.concept_indices[0] == old].any()


def test_labels_are_read_from_beside_the_model(grounded, tmp_path):
    model, _, _, outputs, states = grounded
    index = heaviest(outputs)
    model.save_pretrained(tmp_path)
    content = {"tokens": 1, "source": "x", "features": 128, "concepts": [{"index": index, "label": "blue"}]}
    (tmp_path / "concepts.json").write_text(json.dumps(content))
    loaded = SegCompassModel.from_pretrained(tmp_path)
    assert loaded.concept_labels == {index: "blue"}
    assert torch.equal(
        decode(loaded, states, concept_scale={"blue": 0}).heatmaps,
        decode(model, states, concept_scale={index: 0}).heatmaps,
    )
    (tmp_path / "concepts.json").write_text(json.dumps({**content, "features": 64}))
    with pytest.raises(ValueError, match="describes 64 features, this model's SAE has 128"):
        _ = SegCompassModel.from_pretrained(tmp_path).concept_labels


def test_attention_path_refuses_what_only_a_sum_can_do():
    model, processor = lively_segcompass("llava")
    inputs = processor(images=noise_image(40, 40), text="it", response=RESPONSES[0])
    with pytest.raises(ValueError, match="need concept_reading='grounded', this model has 'feature'"):
        model(**inputs, concept_add={3: 1.0})
    with torch.no_grad(), pytest.raises(ValueError, match="not grounded .*decode_masks"):
        model.explain(model(**inputs), image_embeddings=torch.zeros(1, 16, 8, 8))


# -- batches, generation, gradients, checkpoints -----------------------------------------------------------------------


def test_batch_equals_single_and_segment_equals_forward(grounded):
    model, processor, _, outputs, _ = grounded
    for sample, (image, text, response) in enumerate(zip(noise_images(), INSTRUCTIONS, RESPONSES, strict=True)):
        script = Script(processor.tokenizer, [response])
        written = model.segment(**processor(images=image, text=text), logits_processor=[script], max_new_tokens=90)
        with torch.no_grad():
            alone = model(**processor(images=image, text=text, response=response))
        for name in ("pred_masks", "pred_logits", "heatmaps"):  # sums in another order: rounding
            torch.testing.assert_close(alone[name][0], outputs[name][sample], atol=2e-3, rtol=1e-3)
            torch.testing.assert_close(written[name][0], outputs[name][sample], atol=2e-3, rtol=1e-3)
        assert torch.equal(alone.slot_mask[0], outputs.slot_mask[sample])


def test_gradients_reach_every_part_and_the_mllm(grounded):
    model, _, inputs, _, _ = grounded
    model.zero_grad()
    outputs = model(**inputs)
    (outputs.pred_masks.square().mean() + outputs.pred_logits.square().mean() + outputs.heatmaps.mean()).backward()
    silent = [name for name, p in model.grounded_reading.named_parameters() if p.grad is None or not p.grad.any()]
    # a bias of all words' keys moves no softmax
    assert set(silent) <= {"word_key.bias", "upsampling.key.bias"}
    block = model.backbone.blocks(model.mllm)[1]
    assert any(p.grad is not None and p.grad.any() for p in block.parameters())
    assert all(p.grad is None for p in model.sae.parameters())
    model.zero_grad()


def test_saved_model_loads_the_same_and_old_ones_load_as_feature(grounded, tmp_path):
    model, _, inputs, outputs, _ = grounded
    model.save_pretrained(tmp_path)
    names = load_file(tmp_path / "model.safetensors").keys()
    assert not [name for name in names if name.startswith(("query_codebook", "slot_mapper"))]
    loaded = SegCompassModel.from_pretrained(tmp_path)
    assert loaded.config.concept_reading == "grounded"
    with torch.no_grad():
        assert torch.equal(loaded(**inputs).pred_masks, outputs.pred_masks)
    assert SegCompassConfig.from_dict({"mllm_config": {"model_type": "llava"}}).concept_reading == "feature"


def test_fresh_reading_is_initialised():
    model, _ = lively_segcompass("llava", concept_reading="grounded", phrase_window=2)
    reading = model.grounded_reading
    assert isinstance(reading, GroundedReading) and reading.reach.tolist() == [3.0, 2.0]
    assert reading.same_concept == 3 and reading.offset == -2 and not reading.is_place.any()
    assert 0.2 < reading.slot_queries.std() < 0.8


# -- explanations ------------------------------------------------------------------------------------------------------


def test_explanation_names_concepts_with_their_places_words_and_losses(grounded):
    model, processor, _, outputs, states = grounded
    model.concept_labels = {heaviest(outputs): "blue"}
    try:
        with torch.no_grad():
            report = model.explain(outputs, processor=processor, image_embeddings=states.image_embeddings)
    finally:
        model.concept_labels = {}
    assert report.concepts[0].label == "blue" and 1 <= len(report.concepts) <= 5
    assert sum(concept.weight for concept in report.concepts) + report.rest == pytest.approx(1, abs=1e-5)
    total = sum(concept.contribution for concept in report.concepts) + outputs.grounding.key_offset.item()
    np.testing.assert_allclose(1 / (1 + np.exp(-total)), report.heatmap, atol=1e-4)
    shares = [word.strength for word in report.words]
    assert sum(shares) == pytest.approx(1, abs=1e-4)
    assert "".join(word.text for word in report.words if word.strength > 0) == CONCLUSIONS[0]
    read, window = [word for word in report.words if word.strength > 0], model.config.phrase_window
    for place, word in enumerate(read):  # a word is read together with those before it
        together = read[max(0, place + 1 - window) : place + 1]
        assert word.phrase == "".join(one.text for one in together).strip()
    assert not any(word.phrase for word in report.words if word.position < read[0].position)
    full = decode(model, states).pred_masks[0, 0] > 0
    for concept in report.concepts:
        # the confidence does not enter a grounded mask, so scaling by 0 is the same decoding
        without = decode(model, states, concept_scale={concept.index: 0.0}).pred_masks[0, 0] > 0
        gone = float((full & ~without).sum() / full.sum().clamp_min(1))
        assert concept.lost == pytest.approx(gone, abs=0.02)  # a pixel on the edge may round either way
    assert "without it the mask loses" in report.to_html(noise_image(40, 40))


def test_where_every_concept_is_switched_off_none_is_left_to_lose(grounded):
    model, processor, _, _, states = grounded
    off = decode(model, states, concept_scale=dict.fromkeys(range(128), 0.0))
    with torch.no_grad():
        report = model.explain(off, processor=processor, image_embeddings=states.image_embeddings)
    assert not report.concepts and report.rest == 0


def test_faithfulness_and_erasing_take_contributions_away(grounded):
    model, _, inputs, outputs, states = grounded
    measured = slot_faithfulness(model, states, slot=0, sample=0, draws=2)
    assert measured.full == 1 and measured.without_top <= 1
    with torch.no_grad():
        erased = model(**inputs, num_erased_concepts=5).erased
    sure = (outputs.pred_logits >= 0) | (outputs.pred_logits == outputs.pred_logits.amax(1, keepdim=True))
    flat = erased.heatmaps.amax((2, 3)) - erased.heatmaps.amin((2, 3))
    assert (flat[sure & outputs.slot_mask] < 1e-5).all()


def test_training_knows_its_modules(grounded):
    """Its own rate, and with adapters it learns whole."""
    model = grounded[0]
    assert segmentation_modules(model) == ("grounded_reading", "mask_decoder")
    assert all(hasattr(model, name) for name in segmentation_modules(model))
    assert {"grounded_reading", "mask_decoder", "lm_head"} == set(lora_config(model).modules_to_save)
    groups = parameter_groups(
        model, 1.0, 0.0, set(), RateMultipliers(grounded_reading_lr_multiplier=7.0).rate_multipliers()
    )
    (own,) = (group for group in groups if group["lr"] == 7.0)
    learning = [p for p in model.grounded_reading.parameters() if p.requires_grad]
    assert {id(p) for p in own["params"]} == {id(p) for p in learning} and learning
