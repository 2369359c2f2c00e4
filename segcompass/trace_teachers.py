"""Models that write traces: an MLLM that is loaded here, or any server that speaks OpenAI's chat completions.

A teacher answers questions about pictures, several at once. Knows nothing about what is asked.
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
from typing import Any, Protocol

import torch
from PIL import Image

from segcompass.loading import load_mllm
from segcompass.modeling_segcompass.backbone import backbone_of

KEY = "OPENAI_API_KEY"
"""The environment variable with the server's key, where it wants one."""
WAIT = 1.0
"""Seconds before a request is repeated; doubled each time."""


class NoAnswer(Exception):
    """A teacher could not be asked: nothing is known about the sample, and it can be asked again later."""


class Teacher(Protocol):
    """What answers questions about pictures."""

    name: str
    """what results are noted to come from."""

    def ask(self, questions: Sequence[tuple[Image.Image, str]]) -> list[str | NoAnswer]:
        """One answer per (picture, text), or why there is none."""


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

    Example:
        teacher = BackboneTeacher("Qwen/Qwen2.5-VL-3B-Instruct")
    """

    def __init__(self, path: str, max_tokens: int = 300):
        dtype = "bfloat16" if torch.cuda.is_available() else "float32"
        self.model, self.processor = load_mllm(path, dtype)
        self.model.eval()
        self.name, self.max_tokens = path, max_tokens

    @torch.no_grad()
    def ask(self, questions: Sequence[tuple[Image.Image, str]]) -> list[str | NoAnswer]:
        """Ask the model, all questions in one batch.

        Args:
            questions: pictures with texts.

        Returns:
            One answer each.

        Raises:
            ValueError: a question that the processor refuses, such as one that is too long.
        """
        images, texts = zip(*questions, strict=True)
        batch = self.processor(images=list(images), text=list(texts), image_encoder=False)
        mllm: Any = getattr(self.model, "mllm", self.model)
        inputs = {name: value.to(mllm.device) for name, value in backbone_of(mllm).mllm_inputs(mllm, batch).items()}
        made = mllm.generate(**inputs, max_new_tokens=self.max_tokens, do_sample=False)
        return self.processor.batch_decode(made[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


def data_url(image: Image.Image) -> str:
    """An image as the data: URL of a JPEG."""
    file = io.BytesIO()
    image.save(file, format="JPEG", quality=90)
    return "data:image/jpeg;base64," + base64.b64encode(file.getvalue()).decode("ascii")
