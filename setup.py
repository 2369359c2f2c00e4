"""Install SegCompass: `pip install -c constraints.txt -e .`

The parts lie at the top of the repository and are installed inside the one package `segcompass`.
"""

import re
from pathlib import Path

from setuptools import find_packages, setup
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent
PARTS = ("modeling_segcompass", "trainers", "loaders", "hub_cards")


class BuildPy(build_py):
    """Installs of examples/ what the commands read (recipes, the small model, its scene), and none of the scripts."""

    def find_package_modules(self, package, package_dir):
        return [] if package == "segcompass.examples" else super().find_package_modules(package, package_dir)


setup(
    cmdclass={"build_py": BuildPy},
    name="segcompass",
    version=re.search(r'^__version__ = "(.+)"$', (ROOT / "segcompass" / "__init__.py").read_text(), re.M)[1],
    description="Reasoning segmentation whose path from words to masks can be looked at and intervened on",
    long_description=(ROOT / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    author="SegCompass developers",
    license="Apache-2.0",
    python_requires=">=3.11",  # as transformers 5.23 and TRL 1.16 do
    package_dir={"segcompass": "segcompass"} | {f"segcompass.{part}": part for part in (*PARTS, "examples")},
    packages=[
        *find_packages(include=["segcompass", "segcompass.*"]),
        *(f"segcompass.{part}" for part in PARTS),
        "segcompass.loaders.reasoning_segmentation",  # a script folder for evaluate.load, so it has no __init__.py
        "segcompass.examples",  # recipes, the small model and its scene, as data
    ],
    package_data={
        "segcompass": ["py.typed"],
        "segcompass.loaders.reasoning_segmentation": ["README.md"],
        "segcompass.hub_cards": ["templates/*", "endpoint/*", "space/*"],
        "segcompass.examples": ["accelerate/*.yaml", "recipes/*/*.yaml", "checkpoints/mini/*", "scene.*"],
    },
    entry_points={"console_scripts": ["segcompass = segcompass.cli:main"]},
    install_requires=[
        "torch>=2.6",
        "transformers>=5.10,<5.25",  # dev/versions.py runs the saved model with each minor; trainers want a later one
        "trl>=1.16,<1.17",  # trainers override private methods of this minor: tests/trainers/test_trl_contract.py
        "accelerate>=1.10",
        "datasets>=5",
        "peft>=0.18",
        "huggingface-hub>=1.31,<3",
        "evaluate>=0.4.6",
        "scipy>=1.14",
        "pycocotools>=2.0.8",
        "matplotlib>=3.9",
        "contourpy>=1.2",
        "pillow>=11",
        "safetensors>=0.8",
        "numpy>=2",
        "packaging>=24",
        "tqdm>=4.66",
        "filelock>=3.16",
    ],
    extras_require={
        "test": [
            *("pytest>=9", "pytest-xdist>=3.8", "parameterized", "ruff", "mypy", "pydoclint", "tensorboard"),
            "bitsandbytes>=0.46",
        ],
        "demo": ["gradio>=6", "mcp"],
        "docs": ["mkdocs-material>=9.7", "mkdocstrings[python]>=1", "nbclient>=0.10", "ipykernel>=7"],  # the site
        "browser": ["gradio>=6", "mcp", "selenium>=4.40"],  # tests of the Space; and chromium, chromium-driver
        "serve": ["fastapi>=0.115", "uvicorn>=0.30", "python-multipart>=0.0.18"],
        "qlora": ["bitsandbytes>=0.46"],
        "vllm": ["vllm>=0.27,<0.31"],  # TRL 1.16 stops at 0.31, and 0.31 wants an older transformers
        "sam": ["segment-anything", "torchvision"],
        "photos": ["scikit-image"],  # whose photographs benchmarks/pasted_photographs.py cuts up
        "peers": ["sae-lens", "eai-sparsify"],  # what benchmarks/ compares with
    },
)
