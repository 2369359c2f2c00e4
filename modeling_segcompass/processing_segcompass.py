"""From images and instructions to model inputs, and from model outputs to masks at the image's own size.

One processor for all backbones: it expands image tokens as the MLLM's own processor does (`backbone.py`), without a
video part, so it works without torchvision, and says which part of the image each of them shows (`patch_boxes.py`). It
knows nothing about weights.
"""

import os
from collections.abc import Mapping, Sequence
from functools import partial
from itertools import groupby
from typing import Any

import numpy as np
import torch
from transformers import BatchFeature, ProcessorMixin
from transformers.image_utils import make_flat_list_of_images
from transformers.utils import CONFIG_NAME

from .backbone import TOKEN_TYPE_INPUTS, Backbone, backbone_of
from .backbone_files import holds_processor, read_image_encoder, read_mllm
from .image_encoder import Frame, frame_of, prepare_pixels, without_torchvision
from .images import MAX_PIXELS, read_image
from .manifest import MANIFEST, READ_BY_PROCESSORS
from .old_names import with_new_names
from .patch_boxes import REMEMBERED, Views, pad_boxes
from .row_errors import RowError, check_prompt_lengths
from .saved_folders import check_saved, signing_saved
from .tokens import (
    PROBE,
    REF_TOKEN,
    THINK,
    THINK_END,
    add_response_tokens,
    check_prompt_template,
    check_response_tokens,
    reserved_in,
)

ENCODER_INPUTS = ("encoder_pixel_values", "original_sizes", "reshaped_input_sizes")
"""What `SegCompassProcessor.encoder_inputs` makes."""

TOKENIZER_CONFIG = "tokenizer_config.json"
SENTENCE_ENDS = ".!?。！？\n"

UNUSED = ("batch_num_images",)
"""Inputs left out because a sample has one image, which MLLMs take for granted where nothing is said."""

STRIP = 1 << 18
"""Pixels of a mask that are resized at once: small enough to stay in a processor's cache."""

PROMPT = (
    "Find '{instruction}' in the image. First reason inside think tags: name the objects that could be meant, compare "
    "them, and decide which ones match. Then emit the reference position token exactly {num_slots} times, with nothing "
    "between and nothing after; the masks are decoded from these."
)


class SegCompassProcessor(ProcessorMixin):
    """Wraps the MLLM's image processor, its tokenizer and the image encoder's image processor.

    Args:
        image_processor: the MLLM's (CLIP for LLaVA-1.5, Qwen2-VL's for Qwen2.5-VL).
        tokenizer: the MLLM's; `<think>`, `</think>` and `<REF_POS>` are added as ordinary tokens when absent.
        encoder_image_processor: the image encoder's, as `image_processor_of` makes it (SAM: longest side to S, padded
            right and bottom to a square).
        chat_template: Jinja template of the MLLM's conversations.
        prompt_template: text with `{instruction}` and optionally `{num_slots}`; it must not contain `<REF_POS>`.
        num_slots: K_s, how many concentration tokens a response ends with.
        max_prompt_length: longest prompt in tokens, image tokens included.
        patch_size: as in LlavaProcessor; unused for Qwen.
        vision_feature_select_strategy: as in LlavaProcessor; unused for Qwen.
        num_additional_image_tokens: as in LlavaProcessor; unused for Qwen.
        mllm_type: `model_type` of the MLLM's configuration; None = LLaVA-1.5 or Qwen2.5-VL, as the image processor
            shows.
        family_settings: settings of the family's own processor that differ from its defaults, such as
            `{"image_seq_length": 64}` of InternVL (`family_processor.py`).
        **kwargs: as ProcessorMixin's.

    Raises:
        ValueError: the prompt template contains `<REF_POS>`, other fields, or no `{instruction}`; the tokenizer does
            not find the tokens of a well-formed response; or the family's own processor cannot be made.

    Example:
        processor = SegCompassProcessor.from_pretrained(path)
        outputs = model.segment(**processor(images=image, text="the mug nearest the sink"))
        result = processor.post_process_instance_segmentation(outputs, target_sizes=[(image.height, image.width)])[0]
    """

    encoder_image_processor: Any  # ProcessorMixin sets what its constructor is given

    def __init__(
        self,
        image_processor: Any = None,
        tokenizer: Any = None,
        encoder_image_processor: Any = None,
        chat_template: str | None = None,
        prompt_template: str = PROMPT,
        num_slots: int = 6,
        max_prompt_length: int = 1400,
        patch_size: int = 14,
        vision_feature_select_strategy: str = "default",
        num_additional_image_tokens: int = 1,
        mllm_type: str | None = None,
        family_settings: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ):
        check_prompt_template(prompt_template)
        self.prompt_template = prompt_template
        self.num_slots = num_slots
        self.max_prompt_length = max_prompt_length
        self.patch_size = patch_size
        self.vision_feature_select_strategy = vision_feature_select_strategy
        self.num_additional_image_tokens = num_additional_image_tokens
        self.mllm_type = mllm_type
        self.family_settings = dict(family_settings or {})
        self.image_processor = image_processor  # which tells the family, where mllm_type does not
        self.tokenizer = tokenizer
        self.own = self.backbone.own_processor(self)
        """the family's own processor, None for a family of which transformers has none."""
        self._known_boxes: dict[tuple[tuple[int, int], str], torch.Tensor] = {}
        self._views = Views(image_processor)
        taken = self.backbone.taken_inputs(mllm_type) or ()
        self.token_types = next((name for name in reversed(TOKEN_TYPE_INPUTS) if name in taken), None)
        """the name under which the MLLM takes token types, None if it takes none."""
        self.return_mm_token_type_ids = self.token_types is not None
        self.new_tokens = add_response_tokens(tokenizer)
        """the tokens of a response that the tokenizer lacked when this processor was made."""
        check_response_tokens(tokenizer, self.format_response(PROBE), num_slots)
        image_token: str | None = self.backbone.image_token or getattr(self.own, "image_token", None)
        if image_token is None:
            raise ValueError(
                f"{mllm_type!r} is a family for which transformers has no processor with an image token; choose "
                "another MLLM, or define one in a class of this family (docs/extending.md)."
            )
        self.image_token = image_token
        """the text that stands for an image in a prompt."""
        self.image_token_id = self._image_token_id()
        """the token that stands once per image token in a prompt's ids."""
        self.ref_token_id = tokenizer.convert_tokens_to_ids(REF_TOKEN)
        self.think_id, self.think_end_id = tokenizer.convert_tokens_to_ids([THINK, THINK_END])
        super().__init__(image_processor, tokenizer, encoder_image_processor, chat_template=chat_template)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> Any:
        """As transformers', after the folder's manifest was checked; what was edited is named in a warning."""
        local = os.path.isdir(pretrained_model_name_or_path)
        keywords = dict(kwargs)
        if local:
            check_saved(pretrained_model_name_or_path, keywords, READ_BY_PROCESSORS, TOKENIZER_CONFIG)
        processor = super().from_pretrained(pretrained_model_name_or_path, *args, **kwargs)
        if not local:  # now its files are in the Hub's cache
            check_saved(pretrained_model_name_or_path, keywords, READ_BY_PROCESSORS, TOKENIZER_CONFIG)
        return processor

    @classmethod
    def from_backbones(
        cls,
        mllm: Any,
        image_encoder: Any,
        whole_image: bool = True,
        min_pixels: int | None = None,
        max_pixels: int | None = None,
        **settings: Any,
    ) -> "SegCompassProcessor":
        """The processor of a model that is built from a plain MLLM and a plain image encoder.

        Args:
            mllm: folder or Hub id. If the folder was saved with a SegCompassProcessor, that one is returned as it is.
            image_encoder: folder, Hub id or original `.pth` file.
            whole_image: where the MLLM's own image processor keeps only a square out of the image's centre
                (LLaVA-1.5), pad the image to a square instead, or stretch it to one if the image encoder stretches.
                False lets the MLLM see less than is segmented.
            min_pixels: where the MLLM's family limits pixels (Qwen2.5-VL), smaller images are enlarged to so many; None
                takes the paper's 3,136.
            max_pixels: likewise, larger images are reduced to so many; None takes the paper's 705,600.
            **settings: of the class, such as `num_slots`, `prompt_template` and `max_prompt_length`.

        Returns:
            SegCompassProcessor: to be handed to `SegCompassModel.from_backbones` as well.

        Raises:
            ValueError: no MLLM, no image encoder, a file that is missing, or limits that the family does not know.
        """
        if os.path.isdir(mllm) and holds_processor(mllm, cls.__name__):
            given = {"whole_image": not whole_image, "min_pixels": min_pixels, "max_pixels": max_pixels, **settings}
            given = {name: value for name, value in given.items() if value}
            if given:
                raise ValueError(
                    f"{', '.join(given)} cannot be set: {str(mllm)!r} was saved with a SegCompassProcessor, whose "
                    "settings stand in its processor_config.json; change them there."
                )
            return cls.from_pretrained(mllm)
        encoder = read_image_encoder(image_encoder)
        parts = read_mllm(mllm, whole_image, min_pixels, max_pixels, frame_of(encoder).stretched)
        return cls(encoder_image_processor=encoder, **{**parts, **settings})

    def save_pretrained(self, save_directory: Any, push_to_hub: bool = False, **kwargs: Any) -> Any:
        """As transformers'; a model's folder is signed anew.

        Args:
            save_directory: made if absent. Alone in it, a processor is not signed: its manifest would take the place
                of a model's where both are pushed to one repository.
            push_to_hub: must be False; call `push_to_hub(repo_id)`.
            **kwargs: as transformers'.

        Returns:
            As transformers': names of files.

        Raises:
            ValueError: `push_to_hub`, which would upload the folder before it is signed.
        """
        beside_model = any(os.path.exists(os.path.join(save_directory, name)) for name in (CONFIG_NAME, MANIFEST))
        keywords = {"push_to_hub": push_to_hub, "is_main_process": beside_model}
        backend = getattr(self.tokenizer, "backend_tokenizer", None)
        if backend is not None:  # how the last batch was padded is no part of a tokenizer, and each call sets it anew
            backend.no_padding()
            backend.no_truncation()
        with signing_saved(save_directory, keywords):
            saved = super().save_pretrained(save_directory, **kwargs)
        vars(self).pop("auto_map", None)  # what transformers noted for the file alone
        return saved

    @classmethod
    def get_processor_dict(cls, pretrained_model_name_or_path: Any, **kwargs: Any) -> tuple[dict[str, Any], dict]:
        """As transformers', and reads what earlier versions saved."""
        fields, kwargs = super().get_processor_dict(pretrained_model_name_or_path, **kwargs)
        fields = with_new_names(fields)
        if "encoder_image_processor" in fields:
            fields["encoder_image_processor"] = without_torchvision(fields["encoder_image_processor"])
        return fields, kwargs

    @property
    def views(self) -> Views:
        """Which parts of an image the MLLM's pictures of it show; the image processor may be exchanged."""
        if self._views.image_processor is not self.image_processor:
            self._views = Views(self.image_processor)
        return self._views

    def to_dict(self) -> dict[str, Any]:
        """As transformers', which would copy the family's own processor with its tokenizer."""
        own, self.own = self.own, None
        try:
            return super().to_dict()
        finally:
            self.own = own

    @property
    def backbone(self) -> Backbone:
        """The MLLM's family."""
        return backbone_of(self)

    @property
    def model_input_names(self) -> list[str]:
        """What a call without `response` returns, by name."""
        names = [*self.tokenizer.model_input_names, *self.image_processor.model_input_names]
        names += [] if self.token_types is None else [self.token_types]
        names = [name for name in dict.fromkeys(names) if self._is_kept(name) and name not in self.unused_input_names]
        return [*names, "patch_boxes", *ENCODER_INPUTS]

    @property
    def frame(self) -> Frame:
        """Where an image lies in the image encoder's square input."""
        return frame_of(self.encoder_image_processor)

    def check_fits(self, config: Any) -> None:
        """Refuse a model that this processor was not made for: it would see no image token, or find no slot.

        Args:
            config: the model's SegCompassConfig.

        Raises:
            ValueError: naming what differs.
        """
        ours = {name: getattr(self, name) for name in ("num_slots", "ref_token_id", "think_end_id", "image_token_id")}
        theirs = {name: getattr(config, name) for name in ours}
        ours["frame"], theirs["frame"] = self.frame.side, config.frame.side
        wrong = [f"{name} is {ours[name]} and {theirs[name]}" for name in ours if ours[name] != theirs[name]]
        if wrong:
            raise ValueError(
                f"processor and model do not fit each other ({', '.join(wrong)}); load both from one folder, or build "
                "the model with SegCompassModel.from_backbones(..., processor=processor)."
            )

    def model_tokens(self) -> dict[str, Any]:
        """What SegCompassConfig must know of tokens and of the MLLM's view of an image."""
        special = {*self.tokenizer.all_special_ids, self.ref_token_id} - {self.image_token_id}
        return {
            "ref_token_id": self.ref_token_id,
            "think_end_id": self.think_end_id,
            "think_id": self.think_id,
            "special_token_ids": sorted(special),
            "sentence_end_ids": self._sentence_ends(),
            "image_view": self.backbone.image_view(self.image_processor),
        }

    def _sentence_ends(self):
        """Ids of full stops, line ends and `<think>`: tokens that hold one of these and no letter or digit."""
        ends = []
        for token, number in self.tokenizer.get_vocab().items():
            text = token.replace("Ġ", " ").replace("▁", " ").replace("Ċ", "\n").replace("<0x0A>", "\n")
            if token == THINK or (set(text) & set(SENTENCE_ENDS) and not any(map(str.isalnum, text))):
                ends.append(number)
        return sorted(ends)

    def _image_options(self):
        """What the family asks of its image processor on every call."""
        return {} if self.own is None else self.own.image_options

    def _image_token_id(self):
        """In some families an image is written by one token in a prompt and by another one, many times, in its ids."""
        known = self.tokenizer.convert_tokens_to_ids(self.image_token)
        if self.own is None or self.backbone.image_token is not None or self.backbone.processor_fields:
            return known
        text = self._process_images([[read_image(np.zeros((64, 64, 3), np.uint8))]])[1][0]
        ids = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        runs = [(len(list(run)), token) for token, run in groupby(ids)]
        return max(runs)[1]  # the one that stands most often in a row

    # -- prompts and responses ---------------------------------------------------------------------------------------

    def prompt_text(self, instruction: str) -> str:
        """The text of the user turn for one instruction, on one line with single spaces.

        Raises ValueError when it is empty or holds `<REF_POS>`.
        """
        if not isinstance(instruction, str) or not instruction.strip():
            raise ValueError(f"the instruction is {instruction!r}; say what to segment, like 'the mug by the sink'.")
        if any("\ud800" <= character <= "\udfff" for character in instruction):
            raise ValueError(f"the instruction {ascii(instruction):.80} holds half a character; send whole ones.")
        token = reserved_in(self.tokenizer, instruction, self.image_token)
        if token is not None:
            raise ValueError(f"the instruction contains {token!r}, which is reserved; remove it.")
        return self.prompt_template.format(instruction=" ".join(instruction.split()), num_slots=self.num_slots)

    def build_messages(self, instruction: str) -> list[dict[str, Any]]:
        """The conversation for one instruction, in the chat-template form with one image."""
        content = [{"type": "image"}, {"type": "text", "text": self.prompt_text(instruction)}]
        return [{"role": "user", "content": content}]

    def format_response(self, reasoning: str) -> str:
        """A well-formed response: the reasoning in think tags, then K_s concentration tokens."""
        return f"{THINK}{reasoning}{THINK_END}{REF_TOKEN * self.num_slots}"

    def check_response(self, response: str) -> None:
        """Refuse a response that holds a control token, such as `</s>`: the model would be taught to end there.

        Args:
            response: a response, or reasoning, without the end token.

        Raises:
            ValueError: naming the token.
        """
        text = response
        token: str | None
        for token in (THINK, THINK_END, REF_TOKEN):
            text = text.replace(token, " ")
        token = reserved_in(self.tokenizer, text, self.image_token)
        if token is not None:
            raise ValueError(
                f"the response holds {token!r}, which is a control token and no text; leave it out (the end token is "
                "added by itself)."
            )

    def _is_finished_prompt(self, text):
        """Whether a text is what the chat template makes, rather than an instruction that holds the image token."""
        if self.image_token not in text or self.chat_template is None:
            return self.image_token in text
        made = self.apply_chat_template(
            [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "x"}]}],
            tokenize=False,
            add_generation_prompt=True,
        )
        before, _, after = made.partition(self.image_token)
        words_before, words_after = before.split(), after.split()
        begins = text.lstrip().startswith(words_before[0] if words_before else self.image_token)
        return begins or bool(words_after) and text.rstrip().endswith(words_after[-1])

    # -- inputs ------------------------------------------------------------------------------------------------------

    def __call__(
        self,
        images: Any = None,
        text: str | Sequence[str] | None = None,
        response: str | Sequence[str] | None = None,
        image_encoder: bool | None = None,
        **kwargs: Any,
    ) -> BatchFeature:
        """Make model inputs.

        Args:
            images: one image or a list, each in any form of the table of `images.py`; an array of four axes is a list.
            text: one instruction or a list of as many. A text that already holds the image token is a finished prompt
                (as `apply_chat_template` makes): then this is the MLLM's own processor and the image encoder's inputs
                are left out.
            response: optional responses (without the end token) to append; adds `labels` and `response_mask`.
            image_encoder: False leaves out the image encoder's inputs (for language alone, or with cached image
                embeddings); None makes them.
            **kwargs: options of tokenizer and image processors; return_tensors="pt" (also the default for
                instructions) or "np".

        Returns:
            BatchFeature: input_ids, attention_mask (B, T) long, prompts padded left, responses right; pixel_values
            and what else the family takes (image_grid_thw, token types); patch_boxes float (B, P, 4), see
            `patch_boxes`, except with finished prompts; encoder_pixel_values float (B, 3, S, S); original_sizes and
            reshaped_input_sizes (B, 2) long, (H, W); labels (B, T) long and response_mask (B, T) bool with `response`.

        Raises:
            ValueError: no or empty image, empty or too long text, control tokens in text or response, lengths that
                differ.
            OSError: an image that cannot be read.
        """
        if kwargs.get("videos") is not None:
            raise ValueError("videos are given; masks are made of one image: pass a frame as images=.")
        texts = [text] if isinstance(text, str) else list(text or [])
        if texts and all(map(self._is_finished_prompt, texts)):
            if response is not None:
                raise ValueError(
                    "a response was given with a finished prompt, which already holds the image token; give the plain "
                    "instruction as text, and the processor makes the prompt."
                )
            return self._finished(_read_all(images), texts, kwargs)
        images = self._check_images(images)
        self._check_aspects(images, self.backbone.largest_aspect(self.image_processor), "the MLLM")
        if len(images) != len(texts):
            raise ValueError(
                f"{len(images)} images but {len(texts)} instructions; give one instruction per image (repeat the image "
                "to ask several questions about it)."
            )
        prompts = [
            self.apply_chat_template(self.build_messages(t), tokenize=False, add_generation_prompt=True) for t in texts
        ]
        return_tensors = kwargs.pop("return_tensors", None) or kwargs.get("common_kwargs", {}).get("return_tensors")
        kwargs = {**kwargs, **self._padding(kwargs, ("padding", "padding_side"))}
        inputs = self._named(super().__call__(images=images, text=prompts, return_tensors="pt", **kwargs))
        lengths = inputs["attention_mask"].sum(-1).tolist()
        if max(lengths) > self.max_prompt_length:
            ids = [row[mask.bool()] for row, mask in zip(inputs["input_ids"], inputs["attention_mask"], strict=True)]
            check_prompt_lengths(
                [row.tolist() for row in ids],
                self.max_prompt_length,
                self.image_token_id,
                [image.size for image in images],
            )
        if image_encoder is not False:
            inputs.update(self.encoder_inputs(images))
        if response is not None:
            self._append_responses(inputs, [response] if isinstance(response, str) else list(response))
        return BatchFeature(dict(inputs), tensor_type=return_tensors or "pt")

    def _finished(self, images, texts, kwargs):
        """The MLLM's own inputs of finished prompts, as its own processor makes them."""
        several = max(text.count(self.image_token) for text in texts)
        if several > 1:
            raise ValueError(
                f"a prompt holds {several} images; masks are made of one image per prompt: ask about one at a time."
            )
        # a tokenizer whose files name no side pads right (Qwen2.5-VL's), and a prompt is written on from its end
        kwargs = {**kwargs, **self._padding(kwargs, ("padding_side",))}
        inputs = self._named(super().__call__(images=images, text=texts, **kwargs))
        inputs.pop("patch_boxes", None)  # the MLLM does not take them
        return inputs

    def _padding(self, kwargs, names):
        """Of these options of padding a prompt, ours where the caller gives none."""
        given = {**kwargs.get("text_kwargs", {}), **kwargs}
        ours = {"padding": self.tokenizer.init_kwargs.get("padding", True), "padding_side": "left"}
        return {name: ours[name] for name in names if name not in given}

    def _named(self, inputs):
        """Token types under the name that the MLLM takes."""
        for name in TOKEN_TYPE_INPUTS:
            if name in inputs and name != self.token_types:
                value = inputs.pop(name)
                if name == "mm_token_type_ids" and self.token_types is not None:
                    inputs[self.token_types] = value
        for name in set(inputs) - {"patch_boxes"}:
            if not self._is_kept(name):
                inputs.pop(name)
        return inputs

    def _is_kept(self, name):
        """Whether an input is the MLLM's, rather than one that only counts tokens."""
        if name in TOKEN_TYPE_INPUTS:
            return name == self.token_types
        taken = self.backbone.taken_inputs(self.mllm_type)
        # what processors make on request only, as notes, is nobody's input and stays
        kept = taken is None or name in taken or name in getattr(self, "skip_tensor_conversion", ())
        return name not in (*UNUSED, *ENCODER_INPUTS) and kept

    def patch_boxes(self, images: Any) -> torch.Tensor:
        """Which part of its image each image token shows.

        Args:
            images: one image or a list, as for the call.

        Returns:
            float (B, P, 4), (left, top, right, bottom) in fractions of the image's width and height, of the image
            tokens in order. A box without area is a token that shows no patch: the end of a row, or none at all where
            an image has fewer tokens than P.

        Raises:
            ValueError: no or an empty image, or a family of which it cannot be told.
            OSError: an image that cannot be read.
        """
        images, settings = self._check_images(images), repr(vars(self.image_processor))
        sized = {(image.size, settings): image for image in images}
        if len(self._known_boxes) + len(sized) > REMEMBERED:
            self._known_boxes.clear()
        for key, image in sized.items():
            if key not in self._known_boxes:
                self._known_boxes[key] = self._process_images([[image]], return_tensors="pt")[0]["patch_boxes"][0]
        return pad_boxes([self._known_boxes[image.size, settings] for image in images])

    def encoder_inputs(self, images: Any) -> dict[str, torch.Tensor]:
        """The image encoder's part of the inputs.

        Args:
            images: one image or a list, as for the call.

        Returns:
            dict: encoder_pixel_values float (B, 3, S, S); original_sizes and reshaped_input_sizes long (B, 2), (H, W).

        Raises:
            ValueError: no or an empty image, or one so narrow that nothing would be left of it.
            OSError: an image that cannot be read.
        """
        images = self._check_images(images)
        frame = self.frame
        if not frame.stretched:
            self._check_aspects(images, 2 * frame.side, "the image encoder")
        sizes = [(image.height, image.width) for image in images]
        return {
            "encoder_pixel_values": prepare_pixels(self.encoder_image_processor, images),
            "original_sizes": torch.tensor(sizes),  # (B, 2)
            "reshaped_input_sizes": torch.tensor([frame.reshaped_size(*size) for size in sizes]),
        }

    @staticmethod
    def _check_aspects(images, limit, reader):
        for row, image in enumerate(images):
            if max(image.size) > limit * min(image.size):
                raise RowError(
                    row,
                    f"the image is {image.size[0]} x {image.size[1]} pixels; the limit is a ratio of {limit}, beyond "
                    f"which nothing of its shorter side would be left for {reader}: crop it.",
                )

    def _check_images(self, images):
        if images is None or (isinstance(images, (list, tuple)) and not images):
            raise ValueError("no image was given; pass images=<PIL image, array or path>, or a list of them.")
        batch = isinstance(images, (list, tuple)) or getattr(images, "ndim", 0) == 4
        images = list(images) if batch else [images]
        return [read_image(image, f"image {number}") for number, image in enumerate(images)]

    def _append_responses(self, inputs, responses):
        if len(responses) != len(inputs["input_ids"]):
            raise ValueError(f"{len(inputs['input_ids'])} prompts but {len(responses)} responses; give one per prompt.")
        for response in responses:
            self.check_response(response)
        rows = self.tokenizer(
            [r + self.tokenizer.eos_token for r in responses],
            add_special_tokens=False,
            padding=True,
            padding_side="right",
            return_tensors="pt",
        )
        mask = rows["attention_mask"].bool()
        prompt = torch.full_like(inputs["input_ids"], -100)
        inputs["labels"] = torch.cat([prompt, rows["input_ids"].masked_fill(~mask, -100)], 1)
        inputs["response_mask"] = torch.cat([torch.zeros_like(prompt, dtype=torch.bool), mask], 1)
        inputs["input_ids"] = torch.cat([inputs["input_ids"], rows["input_ids"]], 1)
        inputs["attention_mask"] = torch.cat([inputs["attention_mask"], rows["attention_mask"]], 1)
        self.backbone.append_text(inputs, mask.shape[1])

    def _process_images(self, images, **kwargs):
        """Called by ProcessorMixin: the image processor's tensors with `patch_boxes`, and each image's tokens."""
        flat = make_flat_list_of_images(images)
        kwargs = {**self._image_options(), **kwargs}
        processed = self.image_processor([[image] for image in flat], **kwargs)  # one per sample
        written = [self.replace_image_token(processed, place, **kwargs) for place in range(len(flat))]
        if hasattr(self, "image_token_id"):
            token = self.tokenizer.convert_ids_to_tokens(self.image_token_id)
            options = {name: value for name, value in kwargs.items() if name != "return_tensors"}
            boxes = []
            for place, (image, text) in enumerate(zip(flat, written, strict=True)):
                views = partial(self.views.of, *image.size, options)
                boxes.append(self.backbone.image_boxes(self, processed, place, image.size, text.count(token), views))
            processed["patch_boxes"] = pad_boxes(boxes)
        return processed, written

    def create_mm_token_type_ids(self, input_ids: Any) -> list[list[int]]:
        """The token types of prompts, as the family has them."""
        return self.backbone.prompt_types(self, [row if isinstance(row, list) else row.tolist() for row in input_ids])

    def _check_special_mm_tokens(self, text, text_inputs, modalities):
        """As ProcessorMixin's, of the token that stands once per image token."""
        token = self.tokenizer.convert_ids_to_tokens(self.image_token_id)
        for number, (words, ids) in enumerate(zip(text, text_inputs["input_ids"], strict=True)):
            ids = ids.tolist() if hasattr(ids, "tolist") else list(ids)  # one call, not one for each token
            if words.count(token) != ids.count(self.image_token_id):
                raise ValueError(f"prompt {number} lost image tokens when it was cut; shorten it, or do not cut it.")

    @property
    def unused_input_names(self) -> list[str]:
        """What the image processor returns only to count tokens by."""
        return [] if self.own is None else self.own.unused_input_names

    def replace_image_token(self, image_inputs: Any, image_idx: int, **kwargs: Any) -> str:
        """The image placeholder repeated once per image token of the backbone (called by ProcessorMixin)."""
        return self.backbone.replace_image_token(self, image_inputs, image_idx)

    # -- outputs -----------------------------------------------------------------------------------------------------

    def post_process_masks(self, pred_masks: torch.Tensor, original_sizes: Any) -> list[torch.Tensor]:
        """Mask logits on the image encoder's frame to mask logits at each image's own size.

        Args:
            pred_masks: float (B, K, s, s).
            original_sizes: (B, 2), (H, W) in pixels.

        Returns:
            list: B float tensors (K, H, W).

        Raises:
            ValueError: not one size per prediction.
        """
        side = self.frame.side
        sizes = self._sizes(pred_masks, original_sizes)
        frames = torch.nn.functional.interpolate(pred_masks.float(), (side, side), mode="bilinear", align_corners=False)
        masks = []
        for frame, (height, width) in zip(frames, sizes, strict=True):
            rows, columns = self.frame.reshaped_size(height, width)
            inside = frame[None, :, :rows, :columns]  # (1, K, rows, columns)
            if inside.shape[-2:] != (height, width):
                inside = torch.nn.functional.interpolate(inside, (height, width), mode="bilinear", align_corners=False)
            masks.append(inside[0])
        return masks

    def post_process_instance_segmentation(
        self, outputs: Any, threshold: float = 0.5, mask_threshold: float = 0.5, target_sizes: Any = None
    ) -> list[dict[str, torch.Tensor]]:
        """One instance per slot whose confidence reaches the threshold.

        Args:
            outputs: SegCompassOutput.
            threshold: confidence from which a slot is kept, in [0, 1].
            mask_threshold: probability above which a pixel belongs to a mask, in [0, 1].
            target_sizes: (B, 2), the images' (H, W), e.g. `inputs["original_sizes"]`.

        Returns:
            list: B dicts of scores float (n,), boxes float (n, 4) xyxy in pixels, masks bool (n, H, W), slots long
            (n,). n is 0 when nothing matches the instruction or the response had no concentration tokens.

        Raises:
            ValueError: no target sizes, not one per image, or of another shape than the images that were segmented; a
                threshold outside [0, 1].
        """
        if target_sizes is None:
            raise ValueError("target_sizes is None; pass inputs['original_sizes'] or a list of (H, W).")
        for name, value in (("threshold", threshold), ("mask_threshold", mask_threshold)):
            if not 0 <= value <= 1:
                raise ValueError(f"{name} is {value}; it is a probability, choose a value from 0 to 1.")
        sizes = self._sizes(outputs.pred_masks, target_sizes)
        self._check_shapes(sizes, getattr(outputs, "reshaped_input_sizes", None))
        scores = outputs.pred_logits.float().sigmoid()
        kept = (scores >= threshold) & outputs.slot_mask
        results = []
        for row, size in enumerate(sizes):
            slots = kept[row].nonzero()[:, 0]
            masks = self._masks_at(outputs.pred_masks[row, slots], size, mask_threshold)  # (slots, H, W)
            boxes = [self._box(mask) for mask in masks]
            found = [number for number, box in enumerate(boxes) if box]  # a slot whose mask is empty is no instance
            for place, number in enumerate(found):
                if place != number:  # in place: at an image's own size a copy is large
                    masks[place] = masks[number]
            slots, masks, boxes = slots[found], masks[: len(found)], [boxes[number] for number in found]
            results.append(
                {
                    "scores": scores[row, slots],
                    "boxes": torch.tensor(boxes, dtype=torch.float32).view(-1, 4),
                    "masks": masks,
                    "slots": slots,
                }
            )
        return results

    def _sizes(self, pred_masks, original_sizes):
        """One (H, W) per prediction, as whole numbers. Raises ValueError."""
        sizes: list[tuple[int, ...]] = []
        for given in original_sizes:
            try:
                size = tuple(int(n) for n in given)
                whole = all(n == side for n, side in zip(given, size, strict=True))
            except (TypeError, ValueError, OverflowError):  # None, "a", NaN or infinity
                size, whole = given, False
            sizes.append(size)
            if not whole or len(size) != 2 or min(size) < 1 or size[0] * size[1] > MAX_PIXELS:
                raise ValueError(
                    f"a target size is {size if whole else given}; it is an image's (H, W) in whole pixels, each at "
                    f"least 1, and at most {MAX_PIXELS:,} together."
                )
            if min(self.frame.reshaped_size(*size)) < 1:
                raise ValueError(
                    f"a target size is {size}, so narrow that nothing of it is left in the encoder's square."
                )
        if len(sizes) != len(pred_masks):
            raise ValueError(f"{len(pred_masks)} predictions but {len(sizes)} target sizes; give one (H, W) per image.")
        return sizes

    def _check_shapes(self, sizes, reshaped):
        """Refuse sizes whose sides have another ratio than the images': masks would be stretched. Raises ValueError."""
        if reshaped is None or len(reshaped) not in (1, len(sizes)):
            return
        for row, (height, width) in enumerate(sizes):
            segmented = tuple(reshaped[row if len(reshaped) > 1 else 0].tolist())
            off = max(abs(a - b) for a, b in zip(self.frame.reshaped_size(height, width), segmented, strict=True))
            if off > 1 + self.frame.side / max(height, width):  # the rounding of a smaller copy's sides
                raise ValueError(
                    f"target size {row} is {(height, width)} (H, W), but the image that was segmented has the shape of "
                    f"{segmented}; give the sizes of these images, upright as their EXIF orientation says: "
                    "inputs['original_sizes']."
                )

    def _masks_at(self, logits, size, mask_threshold):
        """What `post_process_masks` gives for one image, above a threshold, without ever holding the large logits.

        The image is made in strips of rows: columns are resized first, of the few source rows that a strip needs, and
        then rows, which is the order in which `interpolate` rounds.
        """
        (height, width), side = size, self.frame.side
        rows, columns = self.frame.reshaped_size(height, width)
        masks = torch.zeros(len(logits), height, width, dtype=torch.bool, device=logits.device)
        probability = torch.tensor(mask_threshold, dtype=torch.float64)
        limit = (probability.log() - (1 - probability).log()).item()  # as a logit
        position = (torch.arange(height, device=logits.device) + 0.5) * (rows / height) - 0.5
        position = position.clamp_min(0)
        upper = position.long().clamp_max(rows - 1)
        lower = (upper + 1).clamp_max(rows - 1)
        share = position - upper  # (H,), of the lower row
        strip = max(1, STRIP // width)
        for slot in range(len(logits)):
            frame = logits[slot, None, None].float()
            frame = torch.nn.functional.interpolate(frame, (side, side), mode="bilinear", align_corners=False)
            frame = frame[..., :rows, :columns]  # (1, 1, rows, columns)
            for start in range(0, height, strip):
                end = min(start + strip, height)
                first, last = int(upper[start]), int(lower[end - 1]) + 1
                wide = frame[..., first:last, :]
                if columns != width:
                    wide = torch.nn.functional.interpolate(
                        wide, (last - first, width), mode="bilinear", align_corners=False
                    )
                wide = wide[0, 0]  # (source rows, W)
                if rows != height:
                    above_it, below_it = upper[start:end] - first, lower[start:end] - first
                    wide = wide.index_select(0, above_it).lerp_(wide.index_select(0, below_it), share[start:end, None])
                torch.gt(wide, limit, out=masks[slot, start:end])
        return masks

    @staticmethod
    def _box(mask):
        cells = mask.view(torch.uint8)  # of which amax is many times faster than any of bool
        rows, columns = cells.amax(1).nonzero()[:, 0], cells.amax(0).nonzero()[:, 0]
        if not len(rows):
            return None
        return [int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1]

    def post_process_semantic_segmentation(
        self, outputs: Any, target_sizes: Any = None, threshold: float = 0.5, mask_threshold: float = 0.5
    ) -> list[torch.Tensor]:
        """The union of the confident slots' masks; arguments as for instances.

        Args:
            outputs: SegCompassOutput.
            target_sizes: (B, 2), the images' (H, W).
            threshold: confidence from which a slot is kept, in [0, 1].
            mask_threshold: probability above which a pixel belongs to a mask, in [0, 1].

        Returns:
            list: B bool tensors (H, W), all False when there is no target.
        """
        results = self.post_process_instance_segmentation(outputs, threshold, mask_threshold, target_sizes)
        return [result["masks"].any(0) for result in results]


def _read_all(images):
    """Images in any form, in lists of lists as they were. Raises as `read_image`."""
    if images is None or isinstance(images, (list, tuple)):
        return images if images is None else [_read_all(each) for each in images]
    return [read_image(each) for each in images] if getattr(images, "ndim", 0) == 4 else read_image(images)


SegCompassProcessor.register_for_auto_class("AutoProcessor")
