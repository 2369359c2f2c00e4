"""A small Hub in a folder: LLaVA-1.5, Qwen2.5-VL (7B and 3B) and SAM as their repositories lay them out.

    python -m tests.support.hub_world FOLDER                        # small vocabularies
    python -m tests.support.hub_world FOLDER --vocabularies WHERE   # Llama-2's and Qwen2.5's own

The classes, the layout of files, the tokenizers' normalizers, pre-tokenizers and added tokens, padded and tied
embeddings are those of the repositories; weights are random and everything is small. In a working directory with this
folder's contents, `llava-hf/llava-1.5-7b-hf` is a path, so that the recipes run as they are. WHERE holds
`qwen.tiktoken` and `llama-tokenizer.js`, which are fetched out of two packages where they are missing.
"""

import argparse
import base64
import json
import math
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from pathlib import Path

import torch
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import (
    GenerationConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    SamConfig,
    SamModel,
    SamVisionConfig,
)
from transformers.convert_slow_tokenizer import bytes_to_unicode

from segcompass.modeling_segcompass.processing_segcompass import PROMPT
from tests.support.tiny import CHAT

LLAVA, QWEN, QWEN_TIED = "llava-hf/llava-1.5-7b-hf", "Qwen/Qwen2.5-VL-7B-Instruct", "Qwen/Qwen2.5-VL-3B-Instruct"
SAM = "facebook/sam-vit-huge"
CLIP_MEAN, CLIP_STD = [0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]
VIEW = 56  # side of what LLaVA sees, in pixels; 16 image tokens
SAID = "a the red green blue yellow box boxes ball balls one two on left right and it is that purple elephant"
TRACES = (
    "Asked for The instruction says I look go through image There see single Only in are shows Beside there What meant "
    "So fits It lies find at tiny small medium sized large very leftmost rightmost topmost lowest largest smallest "
    "above below of to upper lower top centre bottom Therefore By things Both all Nothing here nothing segment None "
    "what asked no mask needed not"
)
WORDS = [*dict.fromkeys(re.findall("[A-Za-z]+", f"{SAID} {PROMPT} {TRACES}"))]
BARE = SAID.split()
"""Words that follow a quotation mark."""
STD = 0.1
"""Of the weights. At this width the classes' own 0.02 starts too near to nothing, and learning waits for long."""
QWEN_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN_SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|object_ref_start|>", "<|object_ref_end|>"]
QWEN_SPECIAL += ["<|box_start|>", "<|box_end|>", "<|quad_start|>", "<|quad_end|>", "<|vision_start|>"]
QWEN_SPECIAL += ["<|vision_end|>", "<|vision_pad|>", "<|image_pad|>", "<|video_pad|>"]
QWEN_PLAIN = ["<tool_call>", "</tool_call>", "<|fim_prefix|>", "<|fim_middle|>", "<|fim_suffix|>", "<|fim_pad|>"]
QWEN_PLAIN += ["<|repo_name|>", "<|file_sep|>"]


VOCABULARIES = ("qwen.tiktoken", "llama-tokenizer.js")


# -- vocabularies ------------------------------------------------------------------------------------------------------


def fetch_vocabularies(folder):
    """Get the vocabularies of Llama-2 and Qwen2.5 out of a Python and a JavaScript package, with pip and npm.

    A folder that has both stays as it is; what is fetched is written when both are there.
    """
    folder = Path(folder)
    if all((folder / name).exists() for name in VOCABULARIES):
        return
    if shutil.which("npm") is None:
        raise SystemExit(f"npm fetches Llama-2's vocabulary and was not found: install it, or fill {folder} elsewhere.")
    with tempfile.TemporaryDirectory() as work:
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "dashscope==1.20.0"]
        for command in (pip, ["npm", "pack", "--silent", "llama-tokenizer-js@1.2.2"]):
            subprocess.run(command, cwd=work, check=True, stdout=subprocess.DEVNULL)
        with zipfile.ZipFile(next(Path(work).glob("dashscope*.whl"))) as wheel:
            qwen = wheel.read("dashscope/resources/qwen.tiktoken")
        with tarfile.open(next(Path(work).glob("llama-tokenizer-js*.tgz"))) as package:
            llama = package.extractfile("package/llama-tokenizer.js").read()
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in zip(VOCABULARIES, (qwen, llama), strict=True):
        (folder / name).write_bytes(content)


def merged(letters, words):
    """Merges that build each word from its letters, left to right, and what they add to a vocabulary."""
    merges, made = [], []
    for word in words:
        for end in range(2, len(word) + 1):
            pair = (word[: end - 1], word[end - 1])
            if pair not in merges and set(word) <= set(letters):
                merges.append(pair)
                made.append(word[:end])
    return merges, list(dict.fromkeys(made))


def llama_vocabulary(vocabularies):
    """Tokens and merges: Llama-2's own, or the same layout with letters and a few words."""
    if vocabularies is None:
        letters = ["▁", *map(chr, range(33, 127))]
        merges, made = merged(letters, [*(f"▁{word}" for word in WORDS), *BARE])
        return ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *made, *letters], merges
    source = (Path(vocabularies) / "llama-tokenizer.js").read_text()
    tokens = base64.b64decode(re.search(r'llama_vocab_base64 = "([^"]+)"', source)[1]).decode().split("\n")
    raw = base64.b64decode(re.search(r'llama_merges_binary = "([^"]+)"', source)[1])
    numbers = [int.from_bytes(raw[at : at + 2], "little") for at in range(0, len(raw), 2)]
    return tokens, [(tokens[a], tokens[b]) for a, b in zip(numbers[::2], numbers[1::2], strict=True)]


def qwen_vocabulary(vocabularies):
    """Tokens and merges: Qwen2.5's own, or the same layout with bytes and a few words."""
    letter = bytes_to_unicode()
    if vocabularies is None:
        letters = list(letter.values())
        merges, made = merged(letters, [*(f"Ġ{word}" for word in WORDS), *BARE])
        return [*letters, *made], merges
    lines = (Path(vocabularies) / "qwen.tiktoken").read_bytes().split(b"\n")
    ranks = {base64.b64decode(token): int(rank) for token, rank in (line.split() for line in lines if line)}
    merges = []
    for token, own in ranks.items():
        parts = [token[at : at + 1] for at in range(len(token))]
        while len(parts) > 2:  # as far as the merges before its own take it
            pairs = [ranks.get(left + right, own) for left, right in zip(parts, parts[1:], strict=False)]
            at = pairs.index(min(pairs))
            parts[at : at + 2] = [parts[at] + parts[at + 1]]
        if len(parts) == 2:
            merges.append(tuple("".join(letter[byte] for byte in part) for part in parts))
    return ["".join(letter[byte] for byte in token) for token in ranks], merges


# -- repositories ------------------------------------------------------------------------------------------------------


def write(folder, **files):
    for name, content in files.items():
        (folder / f"{name}.json").write_text(json.dumps(content, indent=2))


def added(tokens, tokenizer, special):
    return {
        str(tokenizer.token_to_id(token)): {
            **dict.fromkeys(("lstrip", "rstrip", "normalized", "single_word"), False),
            "content": token,
            "special": token in special,
        }
        for token in tokens
    }


def rows(tokenizer):
    """Rows of a vocabulary that is padded to a round number, with room for a few tokens more."""
    return -(-(tokenizer.get_vocab_size() + 8) // 64) * 64


def make_llava(folder, vocabularies=None):
    """LLaVA-1.5 as in its repository."""
    tokens, merges = llama_vocabulary(vocabularies)
    numbers = {token: number for number, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(numbers, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    tokenizer.decoder = decoders.Sequence(steps)
    special = ["<unk>", "<s>", "</s>", "<image>", "<pad>"]
    tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in special])
    tokenizer.post_processor = processors.TemplateProcessing("<s> $A", "<s> $A <s> $B", [("<s>", 1)])
    folder.mkdir(parents=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    image, pad = tokenizer.token_to_id("<image>"), tokenizer.token_to_id("<pad>")
    names = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}
    write(
        folder,
        tokenizer_config={
            **names,
            "add_bos_token": True,
            "add_eos_token": False,
            "added_tokens_decoder": added(special, tokenizer, special),
            "image_token": "<image>",
            "extra_special_tokens": {"image_token": "<image>"},
            "legacy": False,
            "padding_side": "left",
            "processor_class": "LlavaProcessor",
            "tokenizer_class": "LlamaTokenizer",
        },
        special_tokens_map={**names, "image_token": "<image>"},
        added_tokens={"<image>": image, "<pad>": pad},
        chat_template={"chat_template": CHAT["llava"]},
        processor_config={
            "image_token": "<image>",
            "num_additional_image_tokens": 1,
            "patch_size": 14,
            "processor_class": "LlavaProcessor",
            "vision_feature_select_strategy": "default",
        },
        preprocessor_config={
            **dict.fromkeys(("do_center_crop", "do_convert_rgb", "do_normalize", "do_rescale", "do_resize"), True),
            "crop_size": {"height": VIEW, "width": VIEW},
            "image_mean": CLIP_MEAN,
            "image_std": CLIP_STD,
            "image_processor_type": "CLIPImageProcessor",
            "processor_class": "LlavaProcessor",
            "resample": 3,
            "rescale_factor": 1 / 255,
            "size": {"shortest_edge": VIEW},
        },
    )
    vision = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=2, projection_dim=32)
    text = dict(hidden_size=64, intermediate_size=128, num_hidden_layers=4, num_attention_heads=4)
    text |= {"initializer_range": STD}
    config = LlavaConfig(
        vision_config=dict(model_type="clip_vision_model", image_size=VIEW, patch_size=14, **vision),
        text_config=dict(
            model_type="llama",
            num_key_value_heads=4,
            vocab_size=rows(tokenizer),
            max_position_embeddings=4096,
            rms_norm_eps=1e-5,
            **text,
        ),
        image_token_index=image,
        pad_token_id=pad,
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
        tie_word_embeddings=False,
    )
    mllm = LlavaForConditionalGeneration(config).to(torch.float16)
    mllm.generation_config = GenerationConfig(bos_token_id=1, eos_token_id=2, pad_token_id=pad)
    mllm.save_pretrained(folder)


def telling_norm(tokens, width):
    """The norm of a random head's rows at which a state that lies along one of them prefers it to all others by 5 nats.

    The state's norm is √width behind the last norm, its logit √width · n; those of the others have a standard deviation
    of n, so that together they weigh ln(tokens) + n² / 2.
    """
    return width**0.5 - (width - 2 * (5 + math.log(tokens))) ** 0.5


def make_qwen(folder, vocabularies=None, tied=False):
    """Qwen2.5-VL as in its repositories; embedding and head of the 3B model are one matrix."""
    tokens, merges = qwen_vocabulary(vocabularies)
    numbers = {token: number for number, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(numbers, merges))
    tokenizer.normalizer = normalizers.NFC()
    words = pre_tokenizers.Split(Regex(QWEN_WORDS), behavior="isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [words, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in QWEN_SPECIAL])
    tokenizer.add_tokens([AddedToken(token, normalized=False, special=False) for token in QWEN_PLAIN])
    folder.mkdir(parents=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "vocab.json").write_text(json.dumps(numbers, ensure_ascii=False))
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(map(" ".join, merges)) + "\n")
    write(
        folder,
        tokenizer_config={
            "add_bos_token": False,
            "add_prefix_space": False,
            "added_tokens_decoder": added(QWEN_SPECIAL + QWEN_PLAIN, tokenizer, QWEN_SPECIAL),
            "additional_special_tokens": QWEN_SPECIAL[1:],
            "bos_token": None,
            "chat_template": CHAT["qwen2_5_vl"],
            "eos_token": "<|im_end|>",
            "pad_token": "<|endoftext|>",
            "split_special_tokens": False,
            "tokenizer_class": "Qwen2Tokenizer",
            "unk_token": None,
        },
        chat_template={"chat_template": CHAT["qwen2_5_vl"]},
        preprocessor_config={
            "min_pixels": 3136,
            "max_pixels": 12_845_056,
            "patch_size": 14,
            "temporal_patch_size": 2,
            "merge_size": 2,
            "image_mean": CLIP_MEAN,
            "image_std": CLIP_STD,
            "image_processor_type": "Qwen2VLImageProcessor",
            "processor_class": "Qwen2_5_VLProcessor",
        },
    )
    number = tokenizer.token_to_id
    text = dict(hidden_size=64, intermediate_size=128, num_hidden_layers=4, num_attention_heads=4)
    text |= {"initializer_range": STD}
    vision = dict(depth=2, hidden_size=32, intermediate_size=64, num_heads=2, out_hidden_size=64)
    config = Qwen2_5_VLConfig(
        text_config=dict(
            num_key_value_heads=2,
            vocab_size=rows(tokenizer),
            max_position_embeddings=128_000,
            rope_parameters={"rope_type": "default", "rope_theta": 1e6, "mrope_section": [2, 3, 3]},
            tie_word_embeddings=tied,
            bos_token_id=number("<|endoftext|>"),
            eos_token_id=number("<|im_end|>"),
            **text,
        ),
        vision_config=dict(fullatt_block_indexes=[1], window_size=112, patch_size=14, spatial_merge_size=2, **vision),
        image_token_id=number("<|image_pad|>"),
        video_token_id=number("<|video_pad|>"),
        vision_start_token_id=number("<|vision_start|>"),
        vision_end_token_id=number("<|vision_end|>"),
        tie_word_embeddings=tied,
    )
    mllm = Qwen2_5_VLForConditionalGeneration(config).to(torch.bfloat16)
    if tied:  # a head that does not learn must be able to prefer a token, as a trained one is
        weight = mllm.get_input_embeddings().weight.data
        weight.mul_(telling_norm(*weight.shape) / (STD * weight.shape[1] ** 0.5))
    mllm.generation_config = GenerationConfig(
        bos_token_id=number("<|endoftext|>"),
        pad_token_id=number("<|endoftext|>"),
        eos_token_id=[number("<|im_end|>"), number("<|endoftext|>")],
        do_sample=True,
        repetition_penalty=1.05,
        temperature=1e-6,
    )
    mllm.save_pretrained(folder)


def make_sam(folder, side=64):
    """A whole SAM as in its repository, with a small vision encoder."""
    vision = SamVisionConfig(
        hidden_size=32,
        output_channels=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=side,
        patch_size=4,
        window_size=7,
        global_attn_indexes=[1],
        mlp_dim=64,
        initializer_range=0.02,  # the class's own 1e-10 leaves features of 1e-22, the same for every image
    )
    config = SamConfig(
        vision_config=vision.to_dict(),
        prompt_encoder_config=dict(hidden_size=32, image_size=side, patch_size=4, image_embedding_size=side // 4),
        mask_decoder_config=dict(hidden_size=32, mlp_dim=64, num_attention_heads=2, iou_head_hidden_dim=32),
    )
    SamModel(config).save_pretrained(folder)
    write(
        folder,
        preprocessor_config={
            **dict.fromkeys(("do_convert_rgb", "do_normalize", "do_pad", "do_rescale", "do_resize"), True),
            "image_mean": [0.485, 0.456, 0.406],
            "image_std": [0.229, 0.224, 0.225],
            "image_processor_type": "SamImageProcessor",
            "pad_size": {"height": side, "width": side},
            "processor_class": "SamProcessor",
            "resample": 2,
            "rescale_factor": 1 / 255,
            "size": {"longest_edge": side},
        },
    )


def make_world(folder, names=(LLAVA, QWEN, QWEN_TIED, SAM), vocabularies=None):
    """Write the named repositories into a folder.

    Args:
        folder: where.
        names: Hub ids.
        vocabularies: folder of `fetch_vocabularies`; None makes small ones.
    """
    folder = Path(folder)
    torch.manual_seed(0)
    make = {
        LLAVA: lambda where: make_llava(where, vocabularies),
        QWEN: lambda where: make_qwen(where, vocabularies),
        QWEN_TIED: lambda where: make_qwen(where, vocabularies, tied=True),
        SAM: make_sam,
    }
    for name in names:
        shutil.rmtree(folder / name, ignore_errors=True)
        make[name](folder / name)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--vocabularies", type=Path, help="folder of the two vocabularies, fetched if it is not there")
    arguments = parser.parse_args()
    if arguments.vocabularies:
        fetch_vocabularies(arguments.vocabularies)
    make_world(arguments.folder, vocabularies=arguments.vocabularies)
