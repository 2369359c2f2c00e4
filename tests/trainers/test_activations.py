import pytest
import torch
from PIL import Image

from segcompass.modeling_segcompass.token_layout import IMAGE, INSTRUCTION, RESPONSE
from segcompass.trainers.activations import (
    SPECIAL,
    TOKEN_TYPES,
    ActivationDataset,
    layer_hidden_states,
    stream_activations,
    token_types,
)
from tests.support.tiny import BACKBONES, tiny_mllm, tiny_processor

LAYERS, LAYER = 4, 2


@pytest.fixture(scope="module", params=BACKBONES)
def parts(request):
    """A tiny MLLM and 6 batches of 2 samples of unequal length, with all that the SegCompass processor adds."""
    torch.manual_seed(0)
    processor = tiny_processor(request.param)
    mllm = tiny_mllm(request.param, processor, layers=LAYERS).eval()
    batches = []
    for number in range(6):
        images = [Image.new("RGB", (28, 28), (40 * number, 90, 10 * side)) for side in range(2)]
        texts = [f"find the mug number {number}", "the cat" + number * " sat"]
        responses = [f"<think>it is {number}</think>", "<think>no</think>"]
        batches.append(dict(processor(images=images, text=texts, response=responses, return_tensors="pt")))
    assert all("labels" in batch and "encoder_pixel_values" in batch for batch in batches)
    assert not all(batch["attention_mask"].all() for batch in batches)
    return mllm, batches


def rows(tokens):
    return sorted(map(tuple, tokens.tolist()))


def reference(mllm, batches, dropped=()):
    """Hidden states of each real token, from a whole forward pass."""
    kept = []
    for batch in batches:
        inputs = {
            name: batch[name] for name in batch if name not in ("labels", "encoder_pixel_values", "original_sizes")
        }
        inputs.pop("reshaped_input_sizes")
        with torch.no_grad():
            hidden = mllm(**inputs, output_hidden_states=True).hidden_states[LAYER]
        keep = batch["attention_mask"].bool() & ~torch.isin(batch["input_ids"], torch.tensor(dropped))
        kept.append(hidden[keep])
    return torch.cat(kept)


def test_layer_output_is_the_hidden_states_of_that_layer(parts):
    mllm, batches = parts
    mask = batches[0]["attention_mask"].bool()
    for layer in range(1, LAYERS):
        inputs = {
            name: batches[0][name] for name in batches[0] if name in ("input_ids", "attention_mask", "pixel_values")
        }
        inputs |= {name: batches[0][name] for name in ("image_grid_thw", "mm_token_type_ids") if name in batches[0]}
        expected = mllm(**inputs, output_hidden_states=True).hidden_states[layer]
        hidden = layer_hidden_states(mllm, batches[0], layer)
        assert not hidden.requires_grad
        assert torch.equal(hidden[mask], expected[mask])


def test_deeper_blocks_and_the_language_head_are_never_called(parts):
    mllm, batches = parts
    called = []
    blocks = mllm.get_decoder().layers
    modules = [*blocks, mllm.get_output_embeddings()]
    hooks = [module.register_forward_hook(lambda m, *_: called.append(modules.index(m))) for module in modules]
    layer_hidden_states(mllm, batches[0], LAYER)
    for hook in hooks:
        hook.remove()
    assert called == list(range(LAYER))


def test_the_model_is_left_without_hooks_even_when_it_fails(parts):
    mllm, batches = parts
    blocks = mllm.get_decoder().layers
    before = [list(block._forward_hooks) for block in blocks]
    layer_hidden_states(mllm, batches[0], LAYER)
    with pytest.raises((RuntimeError, ValueError, IndexError)):
        layer_hidden_states(mllm, {**batches[0], "input_ids": batches[0]["input_ids"] + 10_000}, LAYER)
    assert [list(block._forward_hooks) for block in blocks] == before


def test_every_real_token_comes_once_and_padding_never(parts):
    mllm, batches = parts
    streamed = torch.cat(list(stream_activations(mllm, batches, LAYER, batch_size=16, buffer_size=64)))
    assert streamed.dtype == torch.float32
    assert len(streamed) == sum(int(batch["attention_mask"].sum()) for batch in batches)
    # Same tokens: the whole pass computes the very same operations up to block L.
    assert rows(streamed) == rows(reference(mllm, batches))


def test_special_tokens_never_enter(parts):
    mllm, batches = parts
    dropped = tuple(batches[0]["input_ids"][0, -3:].tolist())
    streamed = torch.cat(
        list(stream_activations(mllm, batches, LAYER, batch_size=16, buffer_size=64, special_token_ids=dropped))
    )
    assert rows(streamed) == rows(reference(mllm, batches, dropped))


def test_special_tokens_default_to_the_models_own(parts):
    mllm, batches = parts
    dropped = tuple(batches[0]["input_ids"][0, -3:].tolist())
    mllm.config.special_token_ids = list(dropped)
    streamed = torch.cat(list(stream_activations(mllm, batches, LAYER, batch_size=16, buffer_size=64)))
    del mllm.config.special_token_ids
    assert rows(streamed) == rows(reference(mllm, batches, dropped))


def test_batches_are_whole_and_mix_samples(parts):
    mllm, batches = parts
    streamed = list(stream_activations(mllm, batches, LAYER, batch_size=16, buffer_size=10_000))
    assert {len(batch) for batch in streamed[:-1]} == {16} and 0 < len(streamed[-1]) <= 16
    owner = {row: number for number, batch in enumerate(batches) for row in rows(reference(mllm, [batch]))}
    assert len({owner[row] for row in rows(streamed[0])}) >= 3


def test_the_buffer_reads_no_further_ahead_than_it_holds(parts):
    mllm, batches = parts
    read = []

    def source():
        for batch in batches:
            read.append(int(batch["attention_mask"].sum()))
            yield batch

    buffer_size = 40
    yielded = 0
    for batch in stream_activations(mllm, source(), LAYER, batch_size=8, buffer_size=buffer_size):
        assert sum(read) - yielded < buffer_size + max(read)
        yielded += len(batch)


def test_same_seed_gives_the_same_batches_and_another_gives_others(parts):
    mllm, batches = parts
    first, again, other = (
        list(stream_activations(mllm, batches, LAYER, batch_size=16, buffer_size=64, seed=seed)) for seed in (0, 0, 1)
    )
    assert all(torch.equal(*pair) for pair in zip(first, again, strict=True))
    assert not torch.equal(first[0], other[0])


def test_streaming_runs_in_evaluation_mode_and_without_gradients(parts):
    mllm, batches = parts
    mllm.train()
    assert not next(stream_activations(mllm, batches, LAYER, batch_size=16, buffer_size=64)).requires_grad
    assert not mllm.training


def test_the_dataset_shuffles_each_pass_differently(parts):
    mllm, batches = parts
    dataset = ActivationDataset(mllm, batches, LAYER, batch_size=16, buffer_size=10_000)
    first, second = torch.cat(list(dataset)), torch.cat(list(dataset))
    assert rows(first) == rows(second)
    assert not torch.equal(first, second)


def test_processes_share_the_samples(parts, monkeypatch):
    mllm, batches = parts
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    shares = []
    for rank in range(2):
        monkeypatch.setattr(torch.distributed, "get_rank", lambda rank=rank: rank)
        shares.append(torch.cat(list(ActivationDataset(mllm, batches, LAYER, batch_size=16, buffer_size=64))))
    assert rows(shares[0]) == rows(reference(mllm, batches[0::2]))
    assert rows(shares[1]) == rows(reference(mllm, batches[1::2]))


def test_no_samples_give_no_batches(parts):
    assert list(stream_activations(parts[0], [], LAYER, batch_size=16, buffer_size=64)) == []


@pytest.mark.parametrize("layer", [0, LAYERS + 1])
def test_a_layer_the_mllm_does_not_have_is_refused(parts, layer):
    mllm, batches = parts
    with pytest.raises(ValueError, match=f"layer is {layer}, but the MLLM has {LAYERS} decoder blocks; choose"):
        layer_hidden_states(mllm, batches[0], layer)


def test_a_buffer_too_small_to_mix_is_refused(parts):
    with pytest.raises(ValueError, match="buffer_size is 31 tokens.*at least 32"):
        next(stream_activations(*parts, LAYER, batch_size=16, buffer_size=31))


def test_a_loader_that_can_be_read_only_once_is_refused(parts):
    mllm, batches = parts
    with pytest.raises(ValueError, match="read once.*DataLoader or a list"):
        ActivationDataset(mllm, iter(batches), LAYER)


def test_token_types_are_the_models_kinds_and_special_and_caches_can_rely_on_their_numbers(parts):
    mllm, batches = parts
    assert TOKEN_TYPES == ("image", "instruction", "response", "special")
    assert (IMAGE, INSTRUCTION, RESPONSE, SPECIAL) == (0, 1, 2, 3)
    ids, response = batches[0]["input_ids"], batches[0]["response_mask"].bool()
    dropped = [int(ids[0, -1]), mllm.config.image_token_id]
    types = token_types(mllm, batches[0], dropped)
    image, special = ids == mllm.config.image_token_id, ids == dropped[0]
    assert types.dtype == torch.uint8 and image.any() and special.any()
    assert torch.equal(types == IMAGE, image)
    assert torch.equal(types == SPECIAL, special & ~image)
    assert torch.equal(types == RESPONSE, response & ~special & ~image)
    assert set(token_types(mllm, {"input_ids": ids}, ()).unique().tolist()) == {IMAGE, INSTRUCTION}
