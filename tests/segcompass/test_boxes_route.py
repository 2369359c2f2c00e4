"""The boxes route on tiny backbones in the Hub's layout and whole tiny SAMs: a box that an MLLM says becomes its mask.

The answers are scripted, everything else is real: tokenizers, image processors, chat templates, SamModel.
"""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from pycocotools import mask as coco_mask
from transformers import SamModel
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize

from segcompass import cli, evaluation
from segcompass.box_formats import NO_BOX, UNUSABLE, Region
from segcompass.boxes_route import BoxesRoute
from segcompass.commands import evaluate, explain, segment, write_traces
from segcompass.loaders import load_scenes
from segcompass.shipped import MODEL, default_scene
from segcompass.trace_teachers import BackboneTeacher
from tests.support.hub_world import LLAVA, QWEN, make_world
from tests.support.promptable import WHOLE, by_transformers, save_promptable
from tests.support.scripted import noise_image

SIZES = [(100, 60), (64, 100), (57, 57)]  # width, height
LIMITS = {"min_pixels": 3136, "max_pixels": 705_600}


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """LLaVA-1.5 and Qwen2.5-VL as their repositories lay them out, and three whole SAMs."""
    folder = tmp_path_factory.mktemp("world")
    make_world(folder, (LLAVA, QWEN))
    for name in WHOLE:
        save_promptable(name, folder / name)
    return folder


def as_llava(size, box):
    """(what LLaVA-1.5 says of a box, the box that this is): two digits of shares of the square."""
    side = max(size)
    offset = [(side - length) // 2 for length in size]
    said = [round((edge + offset[n % 2]) / side, 2) for n, edge in enumerate(box)]
    return str(said), [number * side - offset[n % 2] for n, number in enumerate(said)]


def as_qwen(size, box):
    """(what Qwen2.5-VL says of a box, the box that this is): pixels of what transformers resizes it to."""
    height, width = smart_resize(size[1], size[0], factor=28, **LIMITS)
    shown = (width, height)
    assert shown != size
    said = [round(edge * shown[n % 2] / size[n % 2]) for n, edge in enumerate(box)]
    meant = [number * size[n % 2] / shown[n % 2] for n, number in enumerate(said)]
    return json.dumps([{"bbox_2d": said, "label": "it"}]), meant


FAMILIES = {LLAVA: as_llava, QWEN: as_qwen}


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("mllm", FAMILIES)
def test_a_box_arrives_at_sam_as_that_box_and_its_mask_is_sams(world, says, mllm, size):
    image = noise_image(size[1], size[0], seed=1)
    text, meant = FAMILIES[mllm](size, (size[0] // 5, size[1] // 4, size[0] // 2, size[1] - 6))
    mask, confidence, prompt = by_transformers(world / "SAM", image, meant)
    says(text)
    route = BoxesRoute(str(world / mllm), str(world / "SAM"))
    given = []
    route.sam.register_forward_pre_hook(lambda _, args, kwargs: given.append(kwargs), with_kwargs=True)
    outputs, (answer,) = route.segment([image], ["it"])
    assert answer.text == text
    torch.testing.assert_close(given[0]["input_boxes"][0, 0], prompt, atol=1e-4, rtol=0)
    found = route.processor.post_process_instance_segmentation(outputs, 0.0, target_sizes=[(size[1], size[0])])[0]
    assert (found["masks"][0].numpy() == mask).all() and 0 < mask.mean() < 1
    assert found["scores"].tolist() == pytest.approx([min(max(confidence, 0), 1)], abs=2e-6)


def test_a_batch_gives_what_each_image_gives_alone(world, says):
    sizes = SIZES[:2]
    images = [noise_image(height, width, seed=n) for n, (width, height) in enumerate(sizes)]
    texts = [as_qwen(size, (5, 6, 40, 50))[0] for size in sizes]
    both = '[{"bbox_2d": [5, 6, 40, 50]}, {"bbox_2d": [9, 9, 30, 30], "point_2d": [12, 14]}, {"point_2d": [20, 20]}]'
    says(both, texts[1], "[]", "A mug.")
    route = BoxesRoute(str(world / QWEN), str(world / "SAM"))
    outputs, answers = route.segment([*images, *images], ["it"] * 4)
    assert outputs.slot_mask.tolist() == [[True] * 3, [True, False, False], [False] * 3, [False] * 3]
    assert [answer.nothing for answer in answers] == [False, False, True, False]
    assert [answer.fault for answer in answers] == [None, None, None, NO_BOX]
    for row in (0, 1):
        says((both, texts[1])[row])
        alone, _ = route.segment([images[row]], ["it"])
        count = int(outputs.slot_mask[row].sum())
        torch.testing.assert_close(outputs.pred_masks[row, :count], alone.pred_masks[0, :count])
        torch.testing.assert_close(outputs.pred_logits[row, :count], alone.pred_logits[0, :count])
    says('[{"point_2d": [20, 20]}]')
    point, _ = route.segment([images[0]], ["it"])
    torch.testing.assert_close(outputs.pred_masks[0, 2], point.pred_masks[0, 0])


@pytest.mark.parametrize("name", WHOLE)
def test_every_sam_takes_boxes_points_and_both(world, says, name):
    says("[]")
    route = BoxesRoute(str(world / LLAVA), str(world / name))
    size = (100, 60)
    image = noise_image(60, 100, seed=2)
    inputs = route.processor.encoder_inputs([image])
    box, point = (10.0, 5.0, 60.0, 50.0), (30.0, 20.0)
    regions = [Region(box), Region(None, point), Region(box, point)]
    masks, confidences = route.masks_of(inputs["encoder_pixel_values"], size, regions)
    assert masks.shape[0] == 3 and masks.isfinite().all() and confidences.shape == (3,)
    assert not torch.equal(masks[0], masks[1]) and not torch.equal(masks[0], masks[2])
    prompts = route.prompts(regions[2:], size)
    scale = (64 / 100, 64 / 60) if name == "SAM 2" else (64 / 100, 38 / 60)  # stretched, or padded: 60 · 0.64 = 38.4
    expected = [10 * scale[0], 5 * scale[1], 60 * scale[0], 50 * scale[1]]
    torch.testing.assert_close(prompts["input_boxes"][0, 0], torch.tensor(expected))
    torch.testing.assert_close(prompts["input_points"][0, 0, 0], torch.tensor([30 * scale[0], 20 * scale[1]]))


# -- the commands ------------------------------------------------------------------------------------------------------


@pytest.fixture
def photo(tmp_path):
    path = tmp_path / "photo.png"
    noise_image(60, 100, seed=3).save(path)
    return path


def run(world, photo, output, *options, mllm=QWEN):
    route = ["--route", "boxes", "--mllm", str(world / mllm), "--image-encoder", str(world / "SAM")]
    segment.main([str(photo), "the mug", *route, "--output", str(output), *options])
    return json.loads((output / "result.json").read_text())


def test_segment_writes_what_the_other_routes_write(world, photo, tmp_path, says, capsys):
    text, meant = as_qwen((100, 60), (10, 5, 60, 50))
    says(text[:-1] + ', {"bbox_2d": [900, 1, 950, 40]}]')
    result = run(world, photo, tmp_path / "out")
    assert result["no_target"] is False and result["concepts"] == [] and result["fault"] is None
    (prompt,) = result["prompts"]
    assert prompt["box"] == pytest.approx(meant) and prompt["point"] is None and result["left_out"] == 1
    (instance,) = result["instances"]
    assert set(instance) == {"slot", "score", "box", "segmentation"}
    mask = coco_mask.decode(instance["segmentation"])
    assert (np.asarray(Image.open(tmp_path / "out" / "masks.png")) == mask).all()
    assert Image.open(tmp_path / "out" / "overlay.jpg").width == 1600
    printed = capsys.readouterr().out
    assert "1 instance, 1 of the answer's boxes left out" in printed and "note" not in printed


@pytest.mark.parametrize(
    ("text", "no_target", "fault", "printed"),
    [
        ("[]", True, None, "no target"),
        ("A mug.", False, NO_BOX, f"no mask: {NO_BOX}"),
        ('[{"bbox_2d": [9, 9, 9, 30]}]', False, UNUSABLE, f"no mask: {UNUSABLE}"),
    ],
)
def test_an_answer_without_a_usable_box_is_no_mask_and_said_so(
    world, photo, tmp_path, says, capsys, text, no_target, fault, printed
):
    says(text)
    result = run(world, photo, tmp_path / "out")
    assert (result["instances"], result["no_target"], result["fault"]) == ([], no_target, fault)
    assert not np.asarray(Image.open(tmp_path / "out" / "masks.png")).any()
    assert printed in capsys.readouterr().out


def test_masks_below_the_threshold_are_named(world, photo, tmp_path, says, capsys):
    says(as_qwen((100, 60), (10, 5, 60, 50))[0])
    assert run(world, photo, tmp_path / "out", "--threshold", "1")["instances"] == []
    assert "no mask: SAM made none with a pixel and a confidence of 1 or more" in capsys.readouterr().out


def test_evaluate_by_boxes_counts_the_masks_it_writes_and_resumes(world, tmp_path, says, monkeypatch):
    says('[{"bbox_2d": [10, 20, 90, 110]}]', "[]", "A mug.", '[{"bbox_2d": [30, 20, 90, 60]}]')
    arguments = ["--route", "boxes", "--mllm", str(world / QWEN), "--image-encoder", str(world / "SAM")]
    arguments += ["--split", "test", "--seed", "3", "--num-samples", "8", "--batch-size", "4"]
    folder = tmp_path / "run"
    metrics = evaluate.main([*arguments, "--output", str(folder)])
    records = [json.loads(line) for line in (folder / "predictions.jsonl").read_text().splitlines()]
    ious = []
    for row, record in zip(load_scenes("test", seed=3, num_samples=8), records, strict=True):
        assert row["sample_id"] == record["sample_id"]
        wanted, found = np.zeros((128, 128), bool), np.zeros((128, 128), bool)
        for mask in row["masks"]:
            wanted |= coco_mask.decode(mask).astype(bool)
        for slot in record["slots"]:
            found |= coco_mask.decode(slot["segmentation"]).astype(bool)
        either = (wanted | found).sum()
        ious.append((wanted & found).sum() / either if wanted.any() else float(not found.any()))
    assert metrics["gIoU"] == pytest.approx(np.mean(ious))
    assert [len(record["slots"]) for record in records] == [1, 0, 0, 1] * 2
    assert [record["format"] for record in records] == [1, 1, 0, 1] * 2 and metrics["n_format_fail"] == 2
    noted = json.loads((folder / "run.json").read_text())
    assert noted["route"] == "boxes" and noted["mllm_weights"] and noted["image_encoder_weights"]
    assert "query_source" not in noted and (folder / "gallery.html").exists()

    written = (folder / "predictions.jsonl").read_text().splitlines(keepends=True)
    (folder / "predictions.jsonl").write_text("".join(written[:5])[:-9])  # killed in the second batch
    again = evaluate.main([*arguments, "--output", str(folder)])
    assert again == metrics
    scored = evaluate.main(
        ["--predictions", str(folder / "predictions.jsonl"), *arguments[6:], "--output", str(tmp_path / "scored")]
    )
    assert scored["gIoU"] == metrics["gIoU"]
    monkeypatch.setattr(evaluation, "BoxesRoute", None)  # a finished run loads nothing
    assert evaluate.main([*arguments, "--output", str(folder)]) == metrics
    with pytest.raises(ValueError, match="choose another --output"):
        evaluate.main([*arguments, "--threshold", "0.5", "--output", str(folder)])


def test_a_trace_is_checked_by_the_box_that_the_teacher_says_in_its_own_way(world, tmp_path, says, capsys):
    Image.new("RGB", (100, 60)).save(tmp_path / "a.png")
    line = {"image": "a.png", "instruction": "it", "polygons": [[10, 5, 60, 5, 60, 50, 10, 50]]}
    lines = [json.dumps({**line, "id": str(number)}) for number in range(2)]
    (tmp_path / "own.jsonl").write_text("\n".join(lines))
    options = ["--mllm", str(world / QWEN), "--check", "box", "--batch-size", "2"]
    asked = []
    right, wrong = (as_qwen((100, 60), box)[0] for box in ((10, 5, 60, 50), (60, 5, 95, 50)))
    says("The thing at the left is meant, because it is large.")
    point = BackboneTeacher.point

    def then_say_boxes(self, questions):
        asked.extend(text for _, text in questions)
        says(right, wrong)
        return point(self, questions)

    BackboneTeacher.point = then_say_boxes
    try:
        report = write_traces.main([str(tmp_path / "own.jsonl"), *options, "--output", str(tmp_path / "out")])
    finally:
        BackboneTeacher.point = point
    assert report["kept"] == 1 and report["dropped"] == {"the check picks another place": 1}
    assert asked == ["it (The thing at the left is meant, because it is large.)"] * 2


# -- bad input ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--route", "boxes"], "--route boxes needs an MLLM and a SAM, such as --route boxes --mllm Qwen"),
        (["--route", "boxes", "--mllm", "a"], "needs an MLLM and a SAM"),
        (["--route", "boxes", "--mllm", "a", "--image-encoder", "b", "--model", "c"], "--model is for the routes"),
        (["--route", "boxes", "--mllm", "a", "--image-encoder", "b", "--explain"], "has none; use --route concepts"),
        (["--route", "tokens", "--explain"], "the route tokens has none"),
        (["--mllm", "a"], "--mllm is for --route boxes, but the route is concepts"),
        (["--route", "tokens", "--image-encoder", "a"], "--image-encoder is for --route boxes"),
    ],
)
def test_options_of_another_route_are_named(options, message, capsys):
    with pytest.raises(SystemExit):
        segment.main(["photo.png", "it", *options])
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"route": "boxes"}, "needs an MLLM and a SAM"),
        ({"route": "boxes", "mllm": "a", "image_encoder": "b", "model": "c"}, "model is 'c' with route 'boxes'"),
        ({"route": "boxes", "mllm": "a", "image_encoder": "b", "image_features": "c"}, "image_features is 'c'"),
        ({"route": "boxes", "mllm": "a", "image_encoder": "b", "query_source": "both"}, "query_source is 'both'"),
        (
            {"route": "tokens", "model": "c", "query_source": "concepts"},
            "query_source is 'concepts' with route 'tokens'",
        ),
        ({"route": "tokens", "predictions": Path("c")}, "route is 'tokens' with predictions"),
        ({"predictions": Path("c"), "close_response": True}, "close_response closes the responses that a SegCompass"),
        ({"route": "boxes", "mllm": "a", "image_encoder": "b", "close_response": True}, "close_response closes the"),
        ({}, "either a model or predictions"),
    ],
)
def test_settings_of_another_route_are_named(settings, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        evaluation.Evaluation(tmp_path, **settings)


def test_what_is_no_mllm_or_no_sam_is_named_before_anything_is_loaded(world, tmp_path):
    with pytest.raises(
        ValueError, match=r"mllm='.*SAM' is of type 'sam', of which it is not known how it writes boxes"
    ):
        BoxesRoute(str(world / "SAM"), str(world / "SAM"))
    with pytest.raises(ValueError, match="image_encoder='.*' is of type 'llava', which makes no masks of boxes"):
        BoxesRoute(str(world / LLAVA), str(world / LLAVA))
    with pytest.raises(ValueError, match="image_encoder='nowhere' is no folder or Hub id of a SAM"):
        BoxesRoute(str(world / LLAVA), "nowhere")
    with pytest.raises(ValueError, match="mllm='nowhere' is no folder or Hub id of an MLLM"):
        BoxesRoute("nowhere", str(world / "SAM"))


def test_a_sam_with_missing_or_broken_weights_is_refused(world, says, tmp_path):
    says('[{"bbox_2d": [10, 20, 60, 50]}]')
    sam = SamModel.from_pretrained(world / "SAM")
    weights = sam.state_dict()
    gone = {name: weights[name].clone() for name in weights if "iou_prediction_head.proj_in" not in name}
    sam.save_pretrained(tmp_path / "gone", state_dict=gone)
    with pytest.raises(ValueError, match="iou_prediction_head.proj_in"):
        BoxesRoute(str(world / QWEN), str(tmp_path / "gone"))
    with torch.no_grad():
        sam.mask_decoder.iou_token.weight[0, 0] = float("nan")
    sam.save_pretrained(tmp_path / "broken")
    with pytest.raises(ValueError, match="mask_decoder.iou_token.weight.*NaN or infinity|NaN.*iou_token"):
        BoxesRoute(str(world / QWEN), str(tmp_path / "broken"))


def test_control_tokens_in_an_instruction_are_refused(world, says):
    says("[]")
    route = BoxesRoute(str(world / QWEN), str(world / "SAM"))
    with pytest.raises(ValueError, match="contains '<|im_end|>', which is reserved"):
        route.segment([noise_image(60, 100)], ["the <|im_end|> mug"])


# -- the other routes --------------------------------------------------------------------------------------------------


def test_the_small_model_says_what_it_never_learned_wherever_it_lies(photo, tmp_path, capsys):
    copied = shutil.copytree(MODEL, tmp_path / "somebody" / "small")
    for model in (MODEL, copied):
        segment.main([str(photo), "the mug and the star", "--model", str(model), "--output", str(tmp_path / "out")])
        printed = capsys.readouterr().out
        assert "note         It never learned “mug” (as written), so its answer is a guess." in printed
        assert "knows drawn scenes only; for a photograph: segcompass segment " in printed
        assert f'{photo} "…" --route boxes --mllm Qwen/Qwen2.5-VL-7B-Instruct --image-encoder facebook/sam-' in printed
        assert json.loads((tmp_path / "out" / "result.json").read_text())["unknown_words"] == ["mug"]
    explain.main([str(photo), "the mug", "--output", str(tmp_path / "out")])
    assert "never learned “mug”" in capsys.readouterr().out
    segment.main(["--output", str(tmp_path / "out")])  # its own scene, its own words
    assert "note" not in capsys.readouterr().out
    assert json.loads((tmp_path / "out" / "result.json").read_text())["unknown_words"] == []


def test_a_small_model_of_somebody_else_is_not_taken_for_it(saved, writes, photo, tmp_path, capsys):
    folder, processor = saved
    writes("<think>a red ball</think>" + "<REF_POS>" * 3, processor)
    segment.main([str(photo), "the mug", "--model", str(folder), "--output", str(tmp_path)])
    assert "note" not in capsys.readouterr().out
    assert json.loads((tmp_path / "result.json").read_text())["unknown_words"] == []


def test_a_grounded_model_refuses_the_tokens_route_by_name(tmp_path):
    image, instruction = default_scene()
    options = ["--route", "tokens", "--model", str(MODEL), "--output", str(tmp_path)]
    with pytest.raises(SystemExit):
        cli.main(["segment", str(image), instruction, *options])
    with pytest.raises(ValueError, match="route is 'tokens', but this model has concept_reading='grounded'"):
        segment.main([str(image), instruction, *options])
    with pytest.raises(ValueError, match="route is 'tokens', but this model has concept_reading='grounded'"):
        evaluate.main([*options[:-1], str(tmp_path / "run"), "--num-samples", "2"])


def test_the_tokens_route_is_the_query_source_of_that_name(saved, writes, photo, tmp_path):
    from segcompass.loading import load

    folder, processor = saved
    writes("<think>a red ball</think>" + "<REF_POS>" * 3, processor)
    options = ["--model", str(folder), "--threshold", "0", "--output", str(tmp_path / "out")]
    segment.main([str(photo), "the mug", "--route", "tokens", *options])
    result = json.loads((tmp_path / "out" / "result.json").read_text())
    assert result["concepts"] == [] and result["instances"]
    model, processor = load(folder)
    inputs = processor(images=Image.open(photo), text="the mug")
    outputs = model.segment(**inputs, query_source="tokens")
    found = processor.post_process_instance_segmentation(outputs, 0, target_sizes=[(60, 100)])[0]
    assert [instance["score"] for instance in result["instances"]] == pytest.approx(found["scores"].tolist())
    for instance, mask in zip(result["instances"], found["masks"].numpy(), strict=True):
        assert (coco_mask.decode(instance["segmentation"]) == mask).all()
