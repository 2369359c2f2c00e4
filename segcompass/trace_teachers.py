"""Models that are asked about pictures: an MLLM that is loaded here, or any server with OpenAI's chat completions.

A teacher answers questions, several at once, and says by boxes where something is. Knows nothing about traces or masks.
"""

import base64
import http.client
import io
import json
import os
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple, Protocol

import torch
from PIL import Image

from segcompass.box_formats import Answer, Box, BoxFormat, format_of, known_format, possible_boxes
from segcompass.loading import load_mllm
from segcompass.modeling_segcompass.backbone import backbone_of
from segcompass.modeling_segcompass.backbone_files import read_config
from segcompass.modeling_segcompass.tokens import THINK

KEY = "OPENAI_API_KEY"
"""The environment variable with the server's key, where it wants one."""
WAIT = 1.0
"""Seconds before a request is repeated; doubled each time."""


class NoAnswer(Exception):
    """A teacher could not be asked: nothing is known about the sample, and it can be asked again later."""


ANY_BOX = (
    'Give the bounding box of what is meant by "{instruction}" in this image as [x1, y1, x2, y2]. If several things '
    "are meant, one box for each. If nothing is meant, answer: none."
)
"""What is asked of a model of which it is not known how it writes boxes."""


class Located(NamedTuple):
    """Where something is, as a teacher says it."""

    text: str
    """the answer."""
    readings: list[list[Box]]
    """the boxes, once for each way in which the numbers can be meant; [] without a usable box."""


class Teacher(Protocol):
    """What answers questions about pictures."""

    name: str
    """what results are noted to come from."""

    def ask(self, questions: Sequence[tuple[Image.Image, str]]) -> list[str | NoAnswer]:
        """One answer per (picture, text), or why there is none."""

    def locate(self, questions: Sequence[tuple[Image.Image, str]]) -> list[Located | NoAnswer]:
        """The boxes of what is meant, per (picture, instruction), or why there is no answer."""


class ServerTeacher:
    """A server with OpenAI's chat completions, as vLLM, SGLang, TGI and llama.cpp start it.

    Args:
        url: up to and with the version, such as "http://localhost:8000/v1".
        model: the name under which it serves the model.
        parallel: requests at once.
        timeout: seconds without an answer after which a request is given up.
        retries: how often a request that failed is repeated.
        max_tokens: longest answer.

    Example:
        teacher = ServerTeacher("http://localhost:8000/v1", "Qwen/Qwen2.5-VL-7B-Instruct")
        (answer,) = teacher.ask([(image, "What is this?")])
    """

    def __init__(
        self,
        url: str,
        model: str,
        parallel: int = 8,
        timeout: float = 120.0,
        retries: int = 3,
        max_tokens: int = 300,
    ):
        if not url.startswith(("http://", "https://")):
            raise ValueError(f"the server is {url!r}; give its address with http://, such as http://localhost:8000/v1.")
        self.url, self.model, self.name = url.rstrip("/"), model, f"{model} at {url}"
        self.parallel, self.timeout, self.retries, self.max_tokens = parallel, timeout, retries, max_tokens

    def ask(self, questions: Sequence[tuple[Image.Image, str]]) -> list[str | NoAnswer]:
        """Ask the server.

        Args:
            questions: pictures with texts.

        Returns:
            One answer each; NoAnswer where the server gave none after all retries.

        Raises:
            ValueError: the server refuses the request itself: no such model, no key, a malformed question.
        """
        with ThreadPoolExecutor(self.parallel) as pool:
            return list(pool.map(lambda question: self._one(*question), questions))

    def locate(self, questions: Sequence[tuple[Image.Image, str]]) -> list[Located | NoAnswer]:
        """Ask the server for boxes; how it counts is not known, so every reading is given.

        Args:
            questions: pictures with instructions.

        Returns:
            One each.

        Raises:
            ValueError: as `ask`.
        """
        answers = self.ask([(image, ANY_BOX.format(instruction=text)) for image, text in questions])
        return [
            answer if isinstance(answer, NoAnswer) else Located(answer, possible_boxes(answer, image.size))
            for answer, (image, _) in zip(answers, questions, strict=True)
        ]

    def _one(self, image: Image.Image, text: str) -> str | NoAnswer:
        content = [
            {"type": "image_url", "image_url": {"url": data_url(image)}},
            {"type": "text", "text": text},
        ]
        body: dict[str, Any] = {"model": self.model, "messages": [{"role": "user", "content": content}]}
        body |= {"max_tokens": self.max_tokens, "temperature": 0}
        failure = "no answer"
        for attempt in range(self.retries + 1):
            if attempt:
                time.sleep(WAIT * 2 ** (attempt - 1))
            try:
                return self._post(body)
            except urllib.error.HTTPError as error:
                said = error.read()[:300].decode("utf-8", "replace")
                if error.code < 500 and error.code not in (408, 429):
                    raise ValueError(
                        f"{self.url} refuses the request with status {error.code}: {said}. Check --server, "
                        f"--server-model={self.model!r} and the key in {KEY}."
                    ) from error
                failure = f"status {error.code}: {said}"
            except (OSError, http.client.HTTPException) as error:  # time-outs and broken connections among them
                failure = f"{type(error).__name__}: {error}"
            except (ValueError, KeyError, IndexError, TypeError) as error:
                failure = f"no chat completion came back ({type(error).__name__}: {error})"
        return NoAnswer(f"{self.url}: {failure}, {self.retries + 1} times")

    def _post(self, body: dict[str, Any]) -> str:
        headers = {"Content-Type": "application/json"}
        if key := os.environ.get(KEY):
            headers["Authorization"] = f"Bearer {key}"
        request = urllib.request.Request(f"{self.url}/chat/completions", json.dumps(body).encode(), headers)
        with urllib.request.urlopen(request, timeout=self.timeout) as response:
            answer = json.loads(response.read())["choices"][0]["message"]["content"]
        if not isinstance(answer, str):
            raise TypeError(f"the answer is a {type(answer).__name__}")
        return answer


class BackboneTeacher:
    """An MLLM in this process: the backbone that will be trained, or another of its families.

    Args:
        path: folder or Hub id of an MLLM, or of a SegCompass model.
        max_tokens: longest answer.
        device: where the MLLM goes; by default the GPU, or the CPU where there is none.
        chat_template: of an MLLM that comes without one; such an MLLM is refused where None is given.

    Example:
        teacher = BackboneTeacher("Qwen/Qwen2.5-VL-3B-Instruct")
        (answer,) = teacher.ask([(image, "What is this?")])
        (answer,) = teacher.point([(image, "the mug nearest the sink")])  # its regions are in the image's pixels
    """

    boxes: BoxFormat | None
    """how it writes boxes; None where that is not known."""

    def __init__(
        self,
        path: str,
        max_tokens: int = 300,
        device: str | torch.device | None = None,
        chat_template: str | None = None,
    ):
        dtype = "bfloat16" if torch.cuda.is_available() else "float32"
        self.boxes = format_of(read_config(path))
        self.model, self.processor = load_mllm(path, dtype, device, chat_template)
        self.model.eval()
        self.mllm: Any = getattr(self.model, "mllm", self.model)
        self.name, self.max_tokens = path, max_tokens
        places = self.mllm.config.get_text_config().max_position_embeddings
        self.processor.max_prompt_length = places - min(max_tokens, places // 2)

    def ask(self, questions: Sequence[tuple[Image.Image, str]]) -> list[str | NoAnswer]:
        """Ask the model, all questions in one batch.

        Args:
            questions: pictures with texts.

        Returns:
            One answer each.

        Raises:
            ValueError: a question that the processor refuses, such as one that is too long.
        """
        return [*self._write(questions, "{instruction}")[0]]

    def point(self, questions: Sequence[tuple[Image.Image, str]]) -> list[Answer]:
        """Ask for boxes in the MLLM's own format, all questions in one batch.

        Args:
            questions: pictures with instructions.

        Returns:
            One answer each, with regions in pixels of the image.

        Raises:
            ValueError: the MLLM's format is not known, or a question that the processor refuses.
        """
        written = known_format(self.mllm.config, self.name)
        images = self.processor.image_processor
        given = [(written.picture(image, images), text) for image, text in questions]
        texts, batch = self._write(given, written.question)
        return [
            written.read(text, image.size, written.shown_size(batch, row, images))
            for row, (text, (image, _)) in enumerate(zip(texts, questions, strict=True))
        ]

    def locate(self, questions: Sequence[tuple[Image.Image, str]]) -> list[Located | NoAnswer]:
        """Ask for boxes; of an MLLM whose format is not known every reading is given.

        Args:
            questions: pictures with instructions.

        Returns:
            One each.

        Raises:
            ValueError: a question that the processor refuses.
        """
        if self.boxes is None:
            texts, _ = self._write(questions, ANY_BOX)
            pairs = zip(texts, questions, strict=True)
            return [Located(text, possible_boxes(text, image.size)) for text, (image, _) in pairs]
        located: list[Located | NoAnswer] = []
        for answer in self.point(questions):
            found = [region.box for region in answer.regions if region.box is not None]
            located.append(Located(answer.text, [found] if found else []))
        return located

    @torch.no_grad()
    def _write(self, questions, template):
        """The answers' texts, and the batch that the MLLM was given."""
        images, texts = zip(*questions, strict=True)
        self.processor.prompt_template = template
        batch = self.processor(images=list(images), text=list(texts), image_encoder=False)
        taken = backbone_of(self.mllm).mllm_inputs(self.mllm, batch)
        inputs = {name: value.to(self.mllm.device) for name, value in taken.items()}
        made = self.mllm.generate(**inputs, max_new_tokens=self.max_tokens, do_sample=False)
        prompts = self.processor.batch_decode(inputs["input_ids"][:, -4:])  # some templates begin the reasoning
        answers = self.processor.batch_decode(made[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        begun = [THINK if prompt.rstrip().endswith(THINK) else "" for prompt in prompts]
        return [start + answer for start, answer in zip(begun, answers, strict=True)], batch


def data_url(image: Image.Image) -> str:
    """An image as the data: URL of a JPEG."""
    file = io.BytesIO()
    image.save(file, format="JPEG", quality=90)
    return "data:image/jpeg;base64," + base64.b64encode(file.getvalue()).decode("ascii")
