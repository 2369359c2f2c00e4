"""Pushing models, SAEs, data sets and the metric, each with its card, in one commit where the Hub allows it.

A push that changes nothing makes no commit, and an interrupted push leaves the repository as it was. All functions take
the Hub from the environment (`HF_ENDPOINT`, `HF_TOKEN`) and raise the Hub's own errors.
"""

import copy
import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import yaml
from datasets import Dataset, DatasetDict
from huggingface_hub import CommitInfo, DatasetCard, HfApi, RepoCard, eval_result_entries_to_yaml
from huggingface_hub.errors import EntryNotFoundError, RepositoryNotFoundError, RevisionNotFoundError
from PIL import Image
from transformers.utils import cached_file

from segcompass.modeling_segcompass import SegCompassModel, SegCompassProcessor, SparseAutoencoder
from segcompass.modeling_segcompass.checkpoints import load_submodel
from segcompass.modeling_segcompass.concept_labels import DICTIONARY, read_labels
from segcompass.modeling_segcompass.manifest import MANIFEST, noted_files, sha256, signing

from .cards import Evaluation, dataset_card, metric_card, model_card, sae_card

EXAMPLE, PICTURE, RESULTS = "example.png", "explanation.png", ".eval_results/segcompass-results.yaml"
DASHBOARD, FEATURES, NEURONPEDIA = "dashboard.html", "features.json", "neuronpedia"
STALE = [  # of an earlier push, when this one has fewer files
    "*.safetensors",
    "*.safetensors.index.json",
    "*.py",
    DICTIONARY,
    PICTURE,
    RESULTS,
    DASHBOARD,
    FEATURES,
    f"{NEURONPEDIA}/*",
]
ENDPOINT = Path(__file__).parent / "endpoint"


def push_model(
    model: SegCompassModel,
    processor: SegCompassProcessor,
    repo_id: str,
    example: tuple[Image.Image, str],
    *,
    references: dict[str, str] | None = None,
    branch: str | None = None,
    tag: str | None = None,
    private: bool | None = None,
    token: str | None = None,
    **card: Any,
) -> CommitInfo:
    """Push a SegCompass model with its processor, its code and its card, ready for Inference Endpoints.

    The example is segmented once, for the card's picture of why its mask is where it is.

    Args:
        model: the model.
        processor: its processor.
        repo_id: the repository; made if it does not exist.
        example: PIL image and instruction that the card's snippet asks about; the image becomes `example.png`.
        references: "mllm", "image_encoder" or "sae" -> "repo_id" or "repo_id@revision": parts to refer to instead of
            carrying them. The revision is pinned to the commit it names now, and the part must be the same there,
            bit for bit.
        branch: where to push, made from main when it is new; None pushes to main.
        tag: name for the commit afterwards.
        private: whether a new repository is private.
        token: None takes the environment's.
        **card: what else `model_card` takes (evaluations, license, training, limitations, …).

    Returns:
        Its `oid` is the revision to pin.

    Raises:
        ValueError: a reference whose weights differ from the model's.
    """
    api = HfApi(token=token)
    image, instruction = example
    pinned = {part: pin(api, model, part, repo) for part, repo in (references or {}).items()}
    with TemporaryDirectory() as folder:
        model.save_pretrained(folder, references=pinned)
        processor.save_pretrained(folder)
        with signing(folder):
            image.save(Path(folder, EXAMPLE))
            copy_dictionary(model, folder)
            for name in ("handler.py", "requirements.txt"):
                shutil.copyfile(ENDPOINT / name, Path(folder, name))
            picture = kept_picture(api, repo_id, branch, instruction, folder) or draw_explanation(
                model, processor, image, instruction, folder
            )
        write_results(card.get("evaluations", ()), Path(folder, RESULTS))
        config: Any = type(model.config).from_pretrained(folder)
        described = model_card(repo_id, config, instruction, picture=PICTURE if picture else None, **card)
        return upload(api, folder, described, repo_id, "model", "Push SegCompass model", branch, tag, private)


def copy_dictionary(pretrained: SegCompassModel | SparseAutoencoder, folder: str) -> None:
    """Put the concept dictionary into a folder, if one lies beside what was loaded: without it concepts have no names.

    Args:
        pretrained: the model or the SAE, as `from_pretrained` made it.
        folder: what will be pushed.
    """
    source, revision = pretrained.config._name_or_path, getattr(pretrained.config, "_commit_hash", None)
    lenient: dict[str, Any] = {
        f"_raise_exceptions_for_{what}": False for what in ("missing_entries", "connection_errors", "gated_repo")
    }
    try:
        path = cached_file(str(source), DICTIONARY, revision=revision, **lenient) if source else None
    except OSError:  # what it was loaded from is gone
        path = None
    if path is not None:
        shutil.copyfile(path, Path(folder, DICTIONARY))


def kept_picture(api: HfApi, repo_id: str, branch: str | None, instruction: str, folder: str) -> bool:
    """Take the repository's own `explanation.png`, if it is of the very same files and instruction.

    Drawn again, it would differ in the last bits that matrix products round, and the same push would be a new commit.

    Args:
        api: the Hub.
        repo_id: the repository.
        branch: the branch that is pushed to; None = main.
        instruction: what the picture must be of.
        folder: what will be pushed, whole but for the picture, which is put there.

    Returns:
        Whether it was taken.
    """
    try:
        there = Path(api.hf_hub_download(repo_id, MANIFEST, revision=branch)).parent
        noted = noted_files(there)
        picture = Path(api.hf_hub_download(repo_id, PICTURE, revision=branch))
    except (EntryNotFoundError, RepositoryNotFoundError, RevisionNotFoundError, ValueError):
        return False
    ours = {path.name: path for path in Path(folder).iterdir() if path.name != MANIFEST}
    if noted.keys() - {PICTURE} != ours.keys():
        return False
    sizes = all(path.stat().st_size == noted[name]["size"] for name, path in ours.items())
    if not sizes or any(sha256(path) != noted[name]["sha256"] for name, path in ours.items()):
        return False
    with Image.open(picture) as drawn:
        if drawn.info.get("Description") != instruction:
            return False
    shutil.copyfile(picture, Path(folder, PICTURE))
    return True


def draw_explanation(
    model: SegCompassModel, processor: SegCompassProcessor, image: Image.Image, instruction: str, folder: str
) -> bool:
    """Segment an image, and draw which concepts made the mask of the most confident slot, as `explanation.png`.

    Args:
        model: the model.
        processor: its processor.
        image: PIL image.
        instruction: what to segment in it.
        folder: where to write; a concept dictionary in it names the concepts.

    Returns:
        Whether it was written; False where no slot is confident, so that there is no mask to explain.
    """
    processor = copy.deepcopy(processor)  # a tokenizer that was used saves how it padded last
    inputs = processor(images=image, text=instruction).to(model.device)
    outputs: Any = model.segment(**inputs)
    found = processor.post_process_instance_segmentation(outputs, target_sizes=inputs["original_sizes"])[0]
    if not len(found["slots"]) or outputs.concept_weights is None:
        return False
    best = int(found["scores"].argmax())
    labels = read_labels(folder, model.config.sae_config.d_sae)
    explanation = model.explain(outputs, slot=int(found["slots"][best]), labels=labels, processor=processor)
    figure = explanation.to_figure(image, found["masks"][best].cpu().numpy(), instruction)
    figure.savefig(Path(folder, PICTURE), dpi=100, metadata={"Description": instruction})
    return True


def write_results(evaluations: Sequence[Evaluation], path: Path) -> None:
    """Write evaluation results as the Hub reads them beside a model; nothing where none is of a data set on the Hub.

    Args:
        evaluations: what was measured.
        path: of the YAML file, in a folder `.eval_results` that is made.
    """
    entries = [entry for evaluation in evaluations for entry in evaluation.entries()]
    if entries:
        path.parent.mkdir(exist_ok=True)
        text = yaml.safe_dump(eval_result_entries_to_yaml(entries), sort_keys=False, allow_unicode=True)
        path.write_text(text, encoding="utf-8")


def pin(api: HfApi, model: SegCompassModel, part: str, repo: str) -> dict[str, str]:
    """Where a part is kept, once its weights there are known to be the model's.

    Args:
        api: the Hub.
        model: the model that is pushed.
        part: "mllm", "image_encoder" or "sae".
        repo: "repo_id" or "repo_id@revision".

    Returns:
        "repo_id" and "revision", a commit.

    Raises:
        ValueError: its weights there differ from the model's.
    """
    repo_id, _, wanted = repo.partition("@")
    revision: Any = api.repo_info(repo_id, revision=wanted or None).sha
    theirs = load_submodel(model.config, part, repo_id, revision=revision, token=api.token).state_dict()
    ours = getattr(model, part).state_dict()
    for name in sorted(ours.keys() | theirs.keys()):
        if name not in ours or name not in theirs or not same(ours[name], theirs[name]):
            raise ValueError(
                f"{part} of this model differs from {repo_id} at {revision[:7]} (first in {name!r}), so it cannot be "
                f"referred to; push the {part} it has to a repository of its own, or leave it out of references."
            )
    return {"repo_id": repo_id, "revision": revision}


def same(ours: torch.Tensor, theirs: torch.Tensor) -> bool:
    """Whether two tensors are equal bit for bit, in shape and dtype too."""
    return ours.shape == theirs.shape and ours.dtype == theirs.dtype and bool((ours.cpu() == theirs.cpu()).all())


def push_sae(
    sae: SparseAutoencoder,
    repo_id: str,
    *,
    dashboard: str | Path | None = None,
    branch: str | None = None,
    tag: str | None = None,
    private: bool | None = None,
    token: str | None = None,
    **card: Any,
) -> CommitInfo:
    """Push a sparse autoencoder with its code and its card.

    Args:
        sae: the SAE.
        repo_id: the repository; made if it does not exist.
        dashboard: output folder of `segcompass dashboard`, whose page and Neuronpedia files are pushed beside it.
        branch: where to push; None pushes to main.
        tag: name for the commit afterwards.
        private: whether a new repository is private.
        token: None takes the environment's.
        **card: what else `sae_card` takes.

    Returns:
        Its `oid` is the revision to pin.

    Raises:
        ValueError: the dashboard's folder is not one, or of another SAE.
    """
    with TemporaryDirectory() as folder:
        sae.save_pretrained(folder)
        with signing(folder):
            copy_dictionary(sae, folder)
        if dashboard is not None:
            card["features"] = copy_dashboard(Path(dashboard), Path(folder), sae.config.d_sae)
        described = sae_card(repo_id, sae.config, **card)
        return upload(HfApi(token=token), folder, described, repo_id, "model", "Push SAE", branch, tag, private)


def copy_dashboard(source: Path, folder: Path, d_sae: int) -> list[dict[str, Any]]:
    """Put a dashboard's page, its features and its Neuronpedia files into a folder.

    Args:
        source: output folder of `segcompass dashboard`.
        folder: what will be pushed.
        d_sae: features of the SAE that is pushed.

    Returns:
        The features, for the card.

    Raises:
        ValueError: files are missing, or it is of an SAE with fewer features.
    """
    for name in (DASHBOARD, FEATURES, NEURONPEDIA):
        if not (source / name).exists():
            raise ValueError(f"{source} holds no {name}; name the output folder of `segcompass dashboard`.")
    features = json.loads((source / FEATURES).read_text(encoding="utf-8"))
    last = max((feature["index"] for feature in features), default=0)
    if last >= d_sae:
        raise ValueError(
            f"{source} is of an SAE with a feature {last}, this one has {d_sae} features; run `segcompass dashboard` "
            "on a model with this SAE."
        )
    shutil.copyfile(source / DASHBOARD, folder / DASHBOARD)
    shutil.copyfile(source / FEATURES, folder / FEATURES)
    shutil.copytree(source / NEURONPEDIA, folder / NEURONPEDIA)
    return features


def push_dataset(
    dataset: Dataset | DatasetDict,
    repo_id: str,
    description: str,
    *,
    split: str | None = None,
    branch: str | None = None,
    tag: str | None = None,
    private: bool | None = None,
    token: str | None = None,
    **card: Any,
) -> CommitInfo:
    """Push rows as parquet through `datasets`, then their card.

    Args:
        dataset: rows in the project's schema.
        repo_id: the repository; made if it does not exist.
        description: what the rows are and where they come from.
        split: the name of a Dataset's split; None takes "train".
        branch: where to push; None pushes to main.
        tag: name for the commit afterwards.
        private: whether a new repository is private.
        token: None takes the environment's.
        **card: what else `dataset_card` takes.

    Returns:
        The last commit: the card's, or the data's when the card is unchanged.
    """
    api = HfApi(token=token)
    names = {"split": split} if split else {}
    committed = dataset.push_to_hub(repo_id, revision=branch, private=private, token=token, **names)
    noted = DatasetCard.load(api.hf_hub_download(repo_id, "README.md", repo_type="dataset", revision=committed.oid))
    metadata = {name: noted.data.get(name) for name in ("dataset_info", "configs") if noted.data.get(name)}
    split = split or next(iter(getattr(dataset, "keys", lambda: ["train"])()))
    parts = dataset if isinstance(dataset, DatasetDict) else {split: dataset}
    counts = {name: count_rows(rows) for name, rows in parts.items()}
    columns = parts[split].column_names
    described = dataset_card(
        repo_id, split, description=description, metadata=metadata, splits=counts, columns=columns, **card
    )
    with TemporaryDirectory() as folder:
        return upload(api, folder, described, repo_id, "dataset", "Describe the data", branch, tag, private)


def count_rows(rows: Dataset) -> dict[str, int]:
    """How many rows a split has, how many of them have no target, and how many masks there are."""
    masks = [len(row["masks"]) for row in rows.select_columns(["masks"])]
    return {"rows": len(masks), "no_target": masks.count(0), "masks": sum(masks)}


def push_metric(
    folder: str | Path,
    repo_id: str,
    *,
    branch: str | None = None,
    tag: str | None = None,
    private: bool | None = None,
    token: str | None = None,
) -> CommitInfo:
    """Push a metric module as the Space that `evaluate.load(repo_id)` reads.

    Args:
        folder: holds `<name>.py`, the files it imports from beside it, and README.md, as `segcompass.METRIC` does.
        repo_id: the Space; the module is renamed after it, because `evaluate` looks it up by that name.
        branch: where to push; None pushes to main.
        tag: name for the commit afterwards.
        private: whether a new repository is private.
        token: None takes the environment's.

    Returns:
        Its `oid` is the revision to pin.
    """
    folder = Path(folder)
    text = RepoCard.load(folder / "README.md").text
    card = metric_card(repo_id, text.replace("segcompass.METRIC", f'"{repo_id}"'))  # who pulls it has no segcompass
    with TemporaryDirectory() as copy:
        for path in folder.glob("*.py"):  # the module, and what it imports from beside it
            name = f"{repo_id.split('/')[-1]}.py" if path.stem == folder.name else path.name
            shutil.copyfile(path, Path(copy, name))
        return upload(HfApi(token=token), copy, card, repo_id, "space", "Push metric", branch, tag, private)


def upload(
    api: HfApi,
    folder: str,
    card: RepoCard,
    repo_id: str,
    kind: str,
    message: str,
    branch: str | None,
    tag: str | None,
    private: bool | None,
) -> CommitInfo:
    """One commit with everything in the folder and the card; none where nothing changed.

    Args:
        api: the Hub.
        folder: what to upload.
        card: becomes the folder's README.md.
        repo_id: the repository; made if it does not exist.
        kind: "model", "dataset" or "space".
        message: of the commit.
        branch: where to push; None pushes to main.
        tag: name for the commit afterwards.
        private: whether a new repository is private.

    Returns:
        The commit, or the last one where nothing changed.
    """
    card.save(Path(folder, "README.md"))
    sdk: dict[str, Any] = {"space_sdk": "static"} if kind == "space" else {}
    api.create_repo(repo_id, repo_type=kind, private=private, exist_ok=True, **sdk)
    if branch:
        api.create_branch(repo_id, branch=branch, repo_type=kind, exist_ok=True)
    commit = api.upload_folder(
        repo_id=repo_id,
        folder_path=folder,
        repo_type=kind,
        revision=branch,
        commit_message=message,
        delete_patterns=STALE if kind != "dataset" else None,
    )
    if tag:
        api.create_tag(repo_id, tag=tag, revision=commit.oid, repo_type=kind)
    return commit
