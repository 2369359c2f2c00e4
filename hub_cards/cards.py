"""Cards of models, SAEs, data sets and the metric, rendered from `templates/` by huggingface_hub's card classes.

A card says only what it is given: a figure that nobody measured leaves no row behind. Each card's Python block runs as
it stands once the repository exists.
"""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import transformers
from huggingface_hub import (
    DatasetCard,
    DatasetCardData,
    EvalResult,
    EvalResultEntry,
    ModelCard,
    ModelCardData,
    RepoCard,
    SpaceCardData,
)
from huggingface_hub.utils import HFValidationError, validate_repo_id

from segcompass.modeling_segcompass import SegCompassConfig, SparseAutoencoderConfig

TEMPLATES = Path(__file__).parent / "templates"
TAGS = ["segcompass", "reasoning-segmentation", "sparse-autoencoder", "custom_code"]
SCORES = ("gIoU", "cIoU", "N-acc", "T-acc")
FEATURES_SHOWN = 12
"""Rows of an SAE card's table of features."""


class Evaluation(NamedTuple):
    """What `segcompass evaluate` measured on one data set.

    Example:
        metrics = json.loads(Path("runs/test/metrics.json").read_text())
        evaluation = Evaluation(metrics, "Scenes, test", "scenes", "test")
        card = model_card("USER/segcompass", config, "the mug", [evaluation])
    """

    metrics: dict
    """the content of metrics.json: fractions in [0, 1] by name, with "protocol" and "n"."""
    name: str
    """how people call the data set, like "ReasonSeg"."""
    dataset: str
    """its Hub id, or the name of a loader."""
    split: str
    command: str | None = None
    """the command that measured it."""
    revision: str | None = None
    """the commit of the data set, if it is on the Hub."""

    def scores(self) -> dict[str, float]:
        """The metrics that compare models, where there was something to divide by; no Pr@X, counts or groups."""
        return {name: self.metrics[name] for name in SCORES if self.metrics.get(name) is not None}

    def results(self) -> list[EvalResult]:
        """The scores in huggingface_hub's form, each with the protocol and the number of samples."""
        counted = {"protocol": self.metrics["protocol"], "n": self.metrics["n"]}
        return [
            EvalResult(
                task_type="image-segmentation",
                task_name="Reasoning segmentation",
                dataset_type=self.dataset,
                dataset_name=self.name,
                dataset_split=self.split,
                dataset_revision=self.revision,
                metric_type=metric,
                metric_name=f"{metric} ({counted['protocol']} protocol)",
                metric_value=value,
                metric_args=counted,
            )
            for metric, value in self.scores().items()
        ]

    def entries(self) -> list[EvalResultEntry]:
        """The scores as files in `.eval_results` hold them, by a task `<split>_<metric>` of the data set.

        Such a file points at a data set on the Hub; of any other (a loader's name, a file) there are no entries.
        """
        try:
            validate_repo_id(self.dataset)
        except HFValidationError:
            return []
        if self.dataset.count("/") != 1 or Path(self.dataset).exists():
            return []
        notes = f"{self.metrics['protocol']} protocol, {self.metrics['n']} samples, fractions from 0 to 1"
        if self.command:
            notes += f"; {self.command}"
        return [
            EvalResultEntry(
                dataset_id=self.dataset,
                task_id=f"{self.split}_{metric}",
                value=value,
                dataset_revision=self.revision,
                notes=notes,
            )
            for metric, value in self.scores().items()
        ]


def model_card(
    repo_id: str,
    config: SegCompassConfig,
    instruction: str,
    evaluations: Sequence[Evaluation] = (),
    *,
    license: str = "apache-2.0",
    base_model: Iterable[str] | None = None,
    datasets: list[str] | None = None,
    language: str = "en",
    training: dict | None = None,
    sae_quality: dict | None = None,
    limitations: str | None = None,
    emissions: float | None = None,
    picture: str | None = None,
) -> ModelCard:
    """The card of a SegCompass model.

    Args:
        repo_id: the model's repository.
        config: the model's; its `references` become a table.
        instruction: what the snippet asks about the `example.png` beside the model.
        evaluations: they become the table and the model-index.
        license: of the weights.
        base_model: Hub ids of the backbones; None takes those that the config names, without local folders.
        datasets: Hub ids of the training data.
        language: of instructions and reasoning.
        training: argument -> value.
        sae_quality: measure -> value.
        limitations: sentences about what the model cannot do.
        emissions: grams of CO2 of the training; None where unknown.
        picture: file beside the card that shows why the example's mask is where it is.

    Returns:
        The card, not yet saved.

    Raises:
        ValueError: an evaluation without its protocol.
    """
    for evaluation in evaluations:
        if not evaluation.metrics.get("protocol"):
            raise ValueError(f"the evaluation on {evaluation.name!r} names no protocol; pass metrics.json as it is.")
    base_model = backbones(config) if base_model is None else list(base_model)
    optional: dict[str, Any] = {"base_model_relation": "finetune"} if base_model else {}
    if emissions is not None:
        optional["co2_eq_emissions"] = {"emissions": emissions}
    data = ModelCardData(
        library_name="transformers",
        pipeline_tag="image-segmentation",
        license=license,
        language=language,
        base_model=base_model or None,
        datasets=datasets,
        tags=TAGS,
        metrics=sorted({metric for evaluation in evaluations for metric in evaluation.scores()}) or None,
        model_name=repo_id.split("/")[-1],
        eval_results=[result for evaluation in evaluations for result in evaluation.results()] or None,
        **optional,
    )
    return ModelCard.from_template(
        data,
        template_path=str(TEMPLATES / "model.md"),
        repo_id=repo_id,
        config=config,
        instruction=instruction,
        evaluations=evaluations,
        training=training,
        sae_quality=sae_quality,
        limitations=limitations,
        emissions=emissions,
        picture=picture,
        transformers_version=transformers.__version__,
    )


def backbones(config: SegCompassConfig) -> list[str]:
    """Hub ids among the names that the config's backbones were loaded under."""
    names = [config.mllm_config._name_or_path, config.image_encoder_config._name_or_path]
    return [name for name in names if name and name.count("/") == 1 and not Path(name).exists()]


def sae_card(
    repo_id: str,
    config: SparseAutoencoderConfig,
    *,
    quality: dict | None = None,
    license: str = "apache-2.0",
    datasets: list[str] | None = None,
    training: dict | None = None,
    command: str | None = None,
    features: Sequence[Mapping[str, Any]] = (),
) -> ModelCard:
    """The card of a sparse autoencoder.

    Args:
        repo_id: the SAE's repository.
        config: the SAE's.
        quality: measure -> value, as in the quality.json of `segcompass evaluate-sae`.
        license: of the weights.
        datasets: Hub ids of the data whose hidden states it was trained on.
        training: argument -> value.
        command: what measured the quality.
        features: the features.json of `segcompass dashboard`, whose page is pushed beside the card; () without one.

    Returns:
        The card, not yet saved.
    """
    on_hub = config.backbone is not None and config.backbone.count("/") == 1
    optional: dict[str, Any] = {"base_model_relation": "adapter"} if on_hub else {}
    data = ModelCardData(
        library_name="transformers",
        license=license,
        base_model=config.backbone if on_hub else None,
        datasets=datasets,
        tags=[*TAGS, "interpretability"],
        **optional,
    )
    return ModelCard.from_template(
        data,
        template_path=str(TEMPLATES / "sae.md"),
        repo_id=repo_id,
        config=config,
        quality=quality,
        training=training,
        command=command,
        features=[feature for feature in features if feature["label"]][:FEATURES_SHOWN],
        dashboard=bool(features),
    )


def dataset_card(
    repo_id: str,
    split: str,
    *,
    description: str,
    license: str = "apache-2.0",
    language: str = "en",
    metadata: dict[str, Any] | None = None,
    splits: Mapping[str, Mapping[str, int]] | None = None,
    columns: Sequence[str] = (),
) -> DatasetCard:
    """The card of a data set in the project's row schema.

    Args:
        repo_id: the data set's repository.
        split: the one that the snippet loads.
        description: what the rows are and where they come from.
        license: of the rows.
        language: of the instructions.
        metadata: what `datasets` noted in the repository's card (`dataset_info`, `configs`), kept as it is.
        splits: split -> {"rows", "no_target", "masks"}, counted; they become a table and `size_categories`.
        columns: the rows' own, to describe those alone; () describes all of the schema.

    Returns:
        The card, not yet saved.
    """
    data = DatasetCardData(
        license=license,
        language=language,
        task_categories=["image-segmentation"],
        size_categories=size_category(sum(counts["rows"] for counts in splits.values())) if splits else None,
        pretty_name=repo_id.split("/")[-1],
        tags=["reasoning-segmentation", "segcompass"],
        **(metadata or {}),
    )
    return DatasetCard.from_template(
        data,
        template_path=str(TEMPLATES / "dataset.md"),
        repo_id=repo_id,
        split=split,
        description=description,
        splits=splits or {},
        columns={name: text for name, text in COLUMNS.items() if name in columns or not columns},
        others=[name for name in columns if name not in COLUMNS],
    )


COLUMNS = {
    "image": ("image", "null where only masks are needed"),
    "image_id": ("string", "several rows may ask about one image"),
    "sample_id": ("string", "unique"),
    "dataset": ("string", "where the row is from"),
    "split": ("string", ""),
    "instruction": ("string", "what to segment; one sentence is one sample"),
    "reasoning": ("string or null", "reference trace"),
    "phrases": ("list", "what words of the reasoning name: text, start, masks"),
    "masks": ("list of COCO RLE", "one per instance; empty where nothing matches"),
    "ignore": ("COCO RLE or null", "pixels that count neither way"),
    "height": ("int", "of the image, in pixels"),
    "width": ("int", "of the image, in pixels"),
    "kind": ("string or null", "groups rows in reports"),
}
"""Columns of the row schema -> (type, meaning), for data-set cards."""


def size_category(rows: int) -> str:
    """The Hub's name for so many rows, like "1K<n<10K"."""
    steps = ("1K", "10K", "100K", "1M", "10M", "100M", "1B", "10B", "100B", "1T")
    place = next((place for place in range(len(steps)) if rows < 1000 * 10**place), len(steps))
    if place == 0:
        return "n<1K"
    return "n>1T" if place == len(steps) else f"{steps[place - 1]}<n<{steps[place]}"


def metric_card(repo_id: str, text: str) -> RepoCard:
    """The card of the metric, which is a Space.

    Args:
        repo_id: the Space.
        text: the module's own README without its metadata.

    Returns:
        The card, not yet saved.
    """
    data = SpaceCardData(
        title="Reasoning segmentation",
        sdk="static",
        license="apache-2.0",
        colorFrom="red",
        colorTo="blue",
        pinned=False,
        short_description="gIoU, cIoU, N-acc and T-acc of masks, by protocol",
        tags=["evaluate", "metric", "image-segmentation"],
    )
    return RepoCard.from_template(data, template_path=str(TEMPLATES / "metric.md"), repo_id=repo_id, text=text)
