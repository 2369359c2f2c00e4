"""Several questions about one image read it once, and get the answers that each gets alone."""

import random
from contextlib import contextmanager
from threading import Thread

import pytest
import torch

from segcompass.modeling_segcompass.shared_prompts import common_beginnings, number_alike
from tests.support.operators import OperatorsCalled
from tests.support.scripted import INSTRUCTIONS, Script, lively_segcompass, noise_image
from tests.support.tiny import BACKBONES

IMAGES = [noise_image(40, 40, 0), noise_image(30, 44, 1)]
ASKED = [(0, INSTRUCTIONS[0]), (1, "it"), (0, "it"), (0, INSTRUCTIONS[2]), (1, INSTRUCTIONS[3]), (0, INSTRUCTIONS[0])]
TEXTS = [f"<think>{text}</think><REF_POS><REF_POS><REF_POS>" for text in ("a", "left of it", "b, c", "", "d", "e f g")]
LENGTH = dict(max_new_tokens=40)


@pytest.fixture(scope="module", params=BACKBONES)
def parts(request):
    return lively_segcompass(request.param)


def inputs_of(processor, rows=None):
    asked = ASKED if rows is None else [ASKED[row] for row in rows]
    return processor(images=[IMAGES[image] for image, _ in asked], text=[text for _, text in asked])


@contextmanager
def read_by(model):
    """The tokens (rows, tokens) of each pass of the decoder, and the images that the image encoder saw."""
    passes, images = [], []
    hooks = [
        model.backbone.blocks(model.mllm)[0].register_forward_hook(lambda m, a, out: passes.append(out.shape[:2])),
        model.image_encoder.register_forward_pre_hook(
            lambda m, a, k: images.append(len(next(iter([*a, *k.values()])))), with_kwargs=True
        ),
    ]
    yield passes, images
    for hook in hooks:
        hook.remove()


def test_each_question_gets_its_own_answer_and_images_are_read_once(parts):
    model, processor = parts
    inputs = inputs_of(processor)
    script = Script(processor.tokenizer, TEXTS)
    with read_by(model) as (passes, images):
        sequences, states = model.reason(**inputs, **LENGTH, logits_processor=[script])
    batch, length = inputs["input_ids"].shape
    (groups, begun), (rows, rest), *steps = passes
    shown = int((inputs["input_ids"] == processor.image_token_id).sum(1).max())
    assert (groups, rows) == (2, batch) and begun > shown and rest < length - shown
    assert images == [2] and set(steps) == {(batch, 1)}
    assert states.z.shape[1] == states.input_ids.shape[1]
    together = model.decode_masks(**states._asdict())
    for row, text in enumerate(TEXTS):
        script = Script(processor.tokenizer, [text])
        _, alone = model.reason(**inputs_of(processor, [row]), **LENGTH, logits_processor=[script])
        assert processor.decode(sequences[row, length:], skip_special_tokens=True) == text
        ours, count = states.rows([row]).trimmed(), alone.input_ids.shape[1]  # alone, the end token is not read back
        assert torch.equal(ours.input_ids[:, :count], alone.input_ids)
        for name in ("z", "last_hidden"):  # float32, sums in another order
            one = getattr(alone, name)
            assert (getattr(ours, name)[:, :count] - one).abs().max() <= 1e-5 * one.abs().max(), name
        masks = model.decode_masks(**alone._asdict())
        gap = (together.pred_masks[row] - masks.pred_masks[0]).abs().max()
        assert masks.slot_mask.all() and gap <= 1e-4 * masks.pred_masks.abs().max()


def test_what_the_model_writes_itself_is_the_same(parts):
    model, processor = parts
    sequences, _ = model.reason(**inputs_of(processor), max_new_tokens=12, min_new_tokens=12)
    for row in range(len(ASKED)):
        alone, _ = model.reason(**inputs_of(processor, [row]), max_new_tokens=12, min_new_tokens=12)
        assert torch.equal(sequences[row, -12:], alone[0, -12:])


@pytest.mark.parametrize(
    "options",
    [
        dict(cache_implementation="static"),
        dict(use_cache=False),
        dict(concept_scale={0: 0.0}),
        dict(return_dict_in_generate=True, output_hidden_states=True),
    ],
    ids=lambda options: "-".join(options),
)
def test_where_it_cannot_be_done_the_pass_stays_whole(parts, options):
    model, processor = parts
    inputs, length = inputs_of(processor), dict(max_new_tokens=5, min_new_tokens=5)
    with read_by(model) as (passes, _):
        sequences, states = model.reason(**inputs, **length, **options)
    assert passes[0] == inputs["input_ids"].shape
    shared, expected = model.reason(**inputs, **length)
    if "concept_scale" not in options:
        assert torch.equal(sequences, shared)
        real = expected.attention_mask.bool()
        gap = (states.z - expected.z)[real].abs().max()
        assert gap <= 1e-5 * expected.z[real].abs().max()


def test_different_images_are_read_as_ever(parts):
    model, processor = parts
    with read_by(model) as (passes, images):
        model.reason(**inputs_of(processor, [0, 1]), max_new_tokens=3, min_new_tokens=3)
    assert len(passes) == 3 and images == [2]


def test_in_train_mode_rows_are_read_apart(parts):
    """Dropout would fall on all rows of an image alike."""
    model, processor = parts
    try:
        with read_by(model.train()) as (passes, _):
            model.reason(**inputs_of(processor, [0, 2]), max_new_tokens=3, min_new_tokens=3)
    finally:
        model.eval()
    assert len(passes) == 3


def test_two_threads_that_share_do_not_mix(parts):
    model, processor = parts
    halves, found = [[0, 2, 3], [1, 4]], {}

    def ask(number):
        found[number] = model.reason(**inputs_of(processor, halves[number]), max_new_tokens=8, min_new_tokens=8)

    threads = [Thread(target=ask, args=(number,)) for number in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for number, rows in enumerate(halves):
        sequences, states = model.reason(**inputs_of(processor, rows), max_new_tokens=8, min_new_tokens=8)
        assert torch.equal(found[number][0], sequences) and torch.equal(found[number][1].z, states.z)


def test_a_call_that_fails_leaves_nothing_behind(parts):
    model, processor = parts

    def leave(input_ids, scores):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        model.reason(**inputs_of(processor), logits_processor=[leave], max_new_tokens=3)
    assert not model.mllm._forward_pre_hooks and not model.mllm._forward_hooks


def test_beginnings_and_rests_are_the_prompts_again():
    """Random prompts: what is read once and what is read after it hold each token of each prompt, in order."""
    draw = random.Random(0)
    parted = 0
    for _ in range(200):
        pictures = [[9] * draw.randint(1, 6) for _ in range(draw.randint(1, 3))]
        images = [draw.randrange(len(pictures)) for _ in range(draw.randint(2, 6))]
        rows = [[1, *pictures[i], *draw.choices([2, 3], k=draw.randint(0, 5))] for i in images]
        length = max(map(len, rows))
        ids = torch.tensor([[0] * (length - len(row)) + row for row in rows])
        mask = torch.tensor([[0] * (length - len(row)) + [1] * len(row) for row in rows])
        found = common_beginnings(ids, mask, images, image_token_id=9)
        if found is None:
            continue
        parted += 1
        once = ids[found.firsts[:, None], found.columns].masked_fill(~found.begun, -1)  # (G, P)
        rest = ids[:, -found.left.shape[1] :].masked_fill(~found.left, -2)  # (B, R)
        assert (rest != 9).all(), "an image token is left to the pass without images"
        again = torch.cat([once[found.group], rest], 1).gather(1, found.places)
        assert torch.equal(again[mask.bool()], ids[mask.bool()])
        assert once.numel() + rest.numel() < ids.numel()
    assert parted > 50


def test_equal_rows_get_equal_numbers_and_equal_sums_are_not_enough():
    rows = [
        [torch.tensor([1.0, 2.0])],
        [torch.tensor([2.0, 1.0])],
        [torch.tensor([1.0, 2.0])],
        [torch.ones(1, 2) * 1.5],
    ]
    assert number_alike(rows) == [0, 1, 0, 3]


def test_rows_are_told_apart_with_one_wait_for_the_device():
    rows = [[torch.full((3,), float(number)), torch.ones(2)] for number in range(8)]
    with OperatorsCalled() as called:
        assert number_alike(rows) == list(range(8))
    assert called.times["_local_scalar_dense"] == 0, "a number was fetched for itself; all come together, by one tolist"
    assert number_alike([[torch.tensor(float("nan"))]] * 2) == [0, 1]
    assert number_alike([]) == [] and number_alike(rows[:1]) == [0]
    assert number_alike([[], []]) == [0, 0], "rows without pictures are alike"
