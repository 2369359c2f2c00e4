"""How docstrings are read for the site: the lines of an `Example:` are code. An extension of griffe, see mkdocs.yml."""

import re
from textwrap import dedent, indent
from typing import Any

import griffe

EXAMPLE = re.compile(r"^(Example:\n)((?:[ ]{4}.*\n?|\n(?=[ ]{4}))+)", re.M)


class ExamplesAreCode(griffe.Extension):
    """Fences the lines of each `Example:`.

    Example:
        extensions = griffe.load_extensions("dev/docs_docstrings.py")
        package = griffe.load("segcompass", extensions=extensions)
        print(package["modeling_segcompass.Explanation"].docstring.value)
    """

    def on_object(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        """Called for each object that is read.

        Args:
            obj: the object.
            **kwargs: what griffe adds.
        """
        if obj.docstring:
            obj.docstring.value = EXAMPLE.sub(_fenced, obj.docstring.value)


def _fenced(example: re.Match) -> str:
    code = dedent(example[2]).strip("\n")
    return example[1] + indent(f"```python\n{code}\n```\n", "    ")
