"""Refuses the trainers where nobody has tried them: they override private methods of TRL and transformers.

Imported before everything else of this folder. The model itself runs with every transformers that setup.py allows.
"""

from importlib.metadata import version

from packaging.specifiers import SpecifierSet

TESTED = {"transformers": ">=5.20,<5.25", "trl": ">=1.16,<1.17"}
"""Package -> the versions with which steps of supervised training and of joint GRPO were run."""


def check_tested(installed: dict[str, str]) -> None:
    """Refuse versions outside the tested range.

    Args:
        installed: package -> its version.

    Raises:
        ImportError: a package is older or newer.
    """
    for package, tested in TESTED.items():
        if not SpecifierSet(tested).contains(installed[package], prereleases=True):
            raise ImportError(
                f"segcompass.trainers is tested with {package}{tested}, but {installed[package]} is installed; "
                f"pip install '{package}{tested}'. Loading a model and segmenting need no trainer."
            )


check_tested({package: version(package) for package in TESTED})
