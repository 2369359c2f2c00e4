"""Install SegCompass: `pip install -c constraints.txt -e .`"""

from pathlib import Path

from setuptools import find_packages, setup

FOLDERS = ("modeling_segcompass", "trainers", "loaders", "hub_cards")

setup(
    name="segcompass",
    version="0.1.0",
    description="Reasoning segmentation whose path from words to masks can be looked at and intervened on",
    long_description=Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    author="SegCompass developers",
    license="Apache-2.0",
    python_requires=">=3.11",  # as transformers 5.23 and TRL 1.16 do
    packages=[
        *find_packages(include=[pattern for folder in FOLDERS for pattern in (folder, f"{folder}.*")]),
        "loaders.reasoning_segmentation",  # a script folder for evaluate.load, so it has no __init__.py
    ],
    package_data={"loaders.reasoning_segmentation": ["README.md"], "hub_cards": ["templates/*.md", "space/*"]},
    install_requires=[
        "torch>=2.6",
        "transformers>=5.23,<5.24",
        "trl>=1.16,<1.17",  # trainers override private methods of this minor: tests/trainers/test_trl_contract.py
        "accelerate>=1.10",
        "datasets>=5",
        "peft>=0.18",
        "huggingface-hub>=2,<3",
        "evaluate>=0.4.6",
        "scipy>=1.14",
        "pycocotools>=2.0.8",
        "matplotlib>=3.9",
        "pillow>=11",
        "safetensors>=0.8",
        "numpy>=2",
        "tqdm>=4.66",
    ],
    extras_require={
        "test": ["pytest>=9", "ruff", "tensorboard", "bitsandbytes>=0.46"],
        "demo": ["gradio>=6"],
        "browser": ["gradio>=6", "selenium>=4.40"],  # the Space's test; also Debian's chromium and chromium-driver
        "qlora": ["bitsandbytes>=0.46"],
        "vllm": ["vllm>=0.27,<0.31"],  # TRL 1.16 stops at 0.31, and 0.31 wants an older transformers
        "sam": ["segment-anything", "torchvision"],
        "peers": ["sae-lens", "eai-sparsify"],  # what benchmarks/ compares with
    },
)
