"""RefCOCO, RefCOCO+, RefCOCOg and gRefCOCO from the files their authors released.

Masks follow the reference loaders: all polygons of an instance united, degenerate polygons dropped, and for gRefCOCO
crowd annotations dropped and `ann_id: [-1]` read as "no target".
"""

import os
from collections.abc import Iterator
from pathlib import Path

from datasets import Dataset, Features, IterableDataset

from .arrow_files import cached_json, file_stamps
from .files import inside_folder, need, read_json, read_pickle
from .masks import coco_rle, packed_polygons
from .registry import register_loader
from .rows import FEATURES, INSTANCES, LeftOut, expressions, target_kind, to_dataset

SPLIT_BY = {
    "refcoco": ("unc", "google"),
    "refcoco+": ("unc",),
    "refcocog": ("umd", "google"),
    "grefcoco": ("unc",),
}
"""Divisions into splits of each data set; the first is the default."""

NEEDED = ("id", "image_id", "segmentation", "iscrowd")
"""Of an annotation what rows need."""

WHERE = "the archives refcoco.zip, refcoco+.zip and refcocog.zip of the REFER project"
WHERE_GREF = "the files grefs(unc).json and instances.json of gRefCOCO (henghuiding/gRefCOCO)"


def load_refcoco(
    root: str | os.PathLike,
    name: str = "refcoco",
    split_by: str | None = None,
    split: str = "val",
    image_dir: str | os.PathLike | None = None,
    unit: str = "sentence",
    num_samples: int | None = None,
    streaming: bool = False,
    instances: bool = False,
) -> Dataset | IterableDataset:
    """Rows of a RefCOCO-like data set in the REFER layout.

    Args:
        root: holds NAME/instances.json and NAME/refs(SPLIT_BY).p, or for gRefCOCO NAME/grefs(SPLIT_BY).json.
        name: "refcoco", "refcoco+", "refcocog" or "grefcoco".
        split_by: whose division into splits: "unc", "umd" or "google"; None takes the first of the data set.
        split: as the refs name it: train, val, and testA and testB or test.
        image_dir: holds the COCO train2014 images. None leaves the images out: enough to score predictions.
        unit: one row per "sentence", per "ref" (with its first sentence), or per ref with all its sentences "merged".
        num_samples: the first so many rows, or None for all.
        streaming: make the rows while they are read, instead of all of them first.
        instances: rows also carry all annotated things of their image, as the white box's criteria need them; the
            expressions are those of the same split.

    Returns:
        Dataset, or IterableDataset when `streaming`, with the columns of `loaders.rows.FEATURES`, and of
        `loaders.rows.INSTANCES` when `instances`. `sample_id` is
        NAME-SPLIT_BY-SPLIT-REF-SENTENCE, `kind` "none", "single" or "multi" by the number of instances. What cannot be
        used is counted in a warning.

    Raises:
        FileNotFoundError: an annotation file or images are missing; they are named.
        ValueError: unknown name, split or unit; a damaged file; refs and annotations that do not fit each other.

    Example:
        rows = load_refcoco("REFER", "refcocog", split="test", image_dir="train2014")
    """
    split_by = _split_by(name, split_by)
    expressions([], unit)
    where = f"{WHERE_GREF if name == 'grefcoco' else WHERE} hold it. `root` is the folder that has {name}/ in it."
    annotated = need(Path(root) / name / "instances.json", where)
    refs = refs_file(root, name, split_by)
    if image_dir is not None:
        need(Path(image_dir), "`image_dir` is the folder of COCO's train2014 images (train2014.zip).")
    arguments = {
        "annotated": annotated,
        "refs": refs,
        "name": name,
        "split_by": split_by,
        "split": split,
        "image_dir": image_dir if image_dir is None else Path(image_dir).resolve(),
        "unit": unit,
        "instances": instances,
    }
    where = "They are in COCO's train2014.zip."
    features = Features({**FEATURES, **INSTANCES}) if instances else FEATURES
    return to_dataset(_rows, arguments, [annotated, refs], split, num_samples, where, streaming, features)


def held_out_images(root: str | os.PathLike, name: str, split_by: str | None = None) -> dict[str, list[int]]:
    """The COCO images of the splits that are not trained on.

    Args:
        root: see `load_refcoco`.
        name: see `load_refcoco`.
        split_by: see `load_refcoco`.

    Returns:
        {split: image ids in ascending order}, for each split of the refs but "train".

    Raises:
        FileNotFoundError: the refs are missing.
        ValueError: they are damaged, or `split_by` does not exist.

    Example:
        held_out_images("REFER", "refcocog")["val"][:3]
    """
    refs = refs_file(root, name, split_by)

    def find() -> dict[str, list[int]]:
        images: dict[str, set[int]] = {}
        for ref in all_refs(refs):
            if ref["split"] != "train":
                images.setdefault(ref["split"], set()).add(ref["image_id"])
        return {split: sorted(ids) for split, ids in sorted(images.items())}

    return cached_json(find, ("held-out images", file_stamps([refs])))


def _split_by(name: str, split_by: str | None) -> str:
    """Whose division into splits, the default filled in. Raises ValueError."""
    if name not in SPLIT_BY:
        raise ValueError(f"name={name!r} is not one of {', '.join(SPLIT_BY)}.")
    split_by = split_by or SPLIT_BY[name][0]
    if split_by not in SPLIT_BY[name]:
        raise ValueError(f"split_by={split_by!r} does not exist for {name}; choose from {', '.join(SPLIT_BY[name])}.")
    return split_by


def refs_file(root: str | os.PathLike, name: str, split_by: str | None = None) -> Path:
    """The file of a data set's refs. Raises FileNotFoundError or ValueError, as `load_refcoco`."""
    split_by = _split_by(name, split_by)
    where = f"{WHERE_GREF if name == 'grefcoco' else WHERE} hold it. `root` is the folder that has {name}/ in it."
    return need(Path(root) / name / (f"grefs({split_by}).json" if name == "grefcoco" else f"refs({split_by}).p"), where)


def _register(name: str) -> None:
    @register_loader(name)
    def load(
        root: str | os.PathLike,
        split: str = "val",
        split_by: str | None = None,
        image_dir: str | os.PathLike | None = None,
        unit: str = "sentence",
        num_samples: int | None = None,
        instances: bool = False,
    ) -> Dataset | IterableDataset:
        # Without `streaming`, so that by name all images are looked for first and DataLoader workers get shards.
        return load_refcoco(root, name, split_by, split, image_dir, unit, num_samples, instances=instances)


for _name in SPLIT_BY:
    _register(_name)


def _rows(
    annotated: Path,
    refs: Path,
    name: str,
    split_by: str,
    split: str,
    image_dir: Path | None,
    unit: str,
    instances: bool,
) -> Iterator[dict]:
    found = _read_refs(refs, split)
    images, annotations = _read_instances(annotated, found)
    left_out, known = LeftOut(), dict[int, dict | None]()
    there = _Surroundings(annotated, found) if instances else None
    for ref in found:
        image = images.get(ref["image_id"])
        if image is None:
            raise ValueError(f"ref {ref['ref_id']} is about image {ref['image_id']}, which {annotated} does not hold.")
        if image_dir is not None:
            try:
                inside_folder(image_dir, image["file_name"])
            except ValueError as error:
                raise ValueError(f"{annotated}, image {image['id']}: {error}") from error
        masks = _masks(ref, image, annotations, name, left_out, known)
        if masks is None:
            continue
        asked = expressions([(str(each["sent_id"]), each["sent"]) for each in ref["sentences"]], unit)
        if len(asked) < (len(ref["sentences"]) if unit == "sentence" else 1):
            left_out.add("blank expressions", f"ref {ref['ref_id']}")
        for suffix, instruction in asked:
            yield {
                "image": None if image_dir is None else {"path": str(image_dir / image["file_name"]), "bytes": None},
                "image_id": str(image["id"]),
                "sample_id": f"{name}-{split_by}-{split}-{ref['ref_id']}-{suffix}",
                "dataset": name,
                "split": split,
                "instruction": instruction,
                "reasoning": None,
                "masks": masks,
                "ignore": None,
                "height": image["height"],
                "width": image["width"],
                "kind": target_kind(len(masks)),
                **({} if there is None else {"instances": there.of(image)}),
            }
    left_out.warn()


class _Surroundings:
    """All annotated things of the images that some refs are about, read when an image is asked for."""

    def __init__(self, annotated: Path, refs: list[dict]):
        content = read_json(annotated, packed_polygons)
        self.path = annotated
        self.categories = {each["id"]: each["name"] for each in content.get("categories", ())}
        self.annotations: dict[int, list[dict]] = {ref["image_id"]: [] for ref in refs}
        for each in content["annotations"]:
            if each["image_id"] in self.annotations:
                self.annotations[each["image_id"]].append(each)
        self.said: dict[int, list[str]] = {}
        for ref in refs:
            if len(ids := annotation_ids(ref)) == 1:
                self.said.setdefault(ids[0], []).extend(text for _, text in _spoken(ref))
        self.image, self.found = None, list[dict]()

    def of(self, image: dict) -> list[dict]:
        """The things of an image, as `loaders.rows.INSTANCES` has them. Raises ValueError."""
        if self.image == image["id"]:
            return self.found
        self.image, self.found = image["id"], []
        for each in self.annotations[image["id"]]:
            try:
                mask = coco_rle(each["segmentation"], image["height"], image["width"])
            except (ValueError, TypeError) as error:
                raise ValueError(f"{self.path}, annotation {each['id']}: {error}") from error
            if mask is not None:
                self.found.append(
                    {
                        "category": self.categories.get(each.get("category_id")),
                        "expressions": list(dict.fromkeys(self.said.get(each["id"], ()))),
                        "crowd": bool(each.get("iscrowd")),
                        "mask": mask,
                    }
                )
        return self.found


def _spoken(ref: dict) -> list[tuple[str, str]]:
    """(id, text) of a ref's sentences that are not blank."""
    return expressions([(str(each["sent_id"]), each["sent"]) for each in ref["sentences"]], "sentence")


def _read_refs(path: Path, split: str) -> list[dict]:
    """The refs of a split. Raises ValueError."""
    refs = all_refs(path)
    found = [ref for ref in refs if ref["split"] == split]
    if not found:
        raise ValueError(f"{path} has no split {split!r}; it has {', '.join(sorted({ref['split'] for ref in refs}))}.")
    return found


def all_refs(path: Path) -> list[dict]:
    """The refs of all splits. Raises ValueError."""
    refs = read_json(path, _spoken_part) if path.suffix == ".json" else read_pickle(path)
    keys = {"ref_id", "ann_id", "image_id", "split", "sentences"}
    if not isinstance(refs, list) or not all(isinstance(ref, dict) and keys <= ref.keys() for ref in refs):
        raise ValueError(f"{path} is not a list of refs with the keys {', '.join(sorted(keys))}.")
    return refs


def _spoken_part(found: dict) -> dict:
    """Of a ref's sentence what rows need: its tokens take as much memory as all else."""
    return {key: found[key] for key in ("sent_id", "sent")} if {"sent_id", "sent"} <= found.keys() else found


def _read_instances(path: Path, refs: list[dict]) -> tuple[dict, dict]:
    """The images and annotations by id that the refs need. Raises ValueError."""
    wanted = {ref["image_id"] for ref in refs}
    named = {name for ref in refs for name in annotation_ids(ref)}

    def needed(found: dict) -> dict | None:
        if not {"id", "segmentation"} <= found.keys():
            return found  # no annotation
        if found["id"] not in named:
            return None
        return packed_polygons({key: found[key] for key in NEEDED if key in found})

    content = read_json(path, needed)
    if not isinstance(content, dict) or not {"images", "annotations"} <= content.keys():
        raise ValueError(f"{path} is not a COCO annotation file: it needs the keys images and annotations.")
    images = {image["id"]: image for image in content["images"] if image["id"] in wanted}
    return images, {each["id"]: each for each in content["annotations"] if each is not None and each["id"] in named}


def annotation_ids(ref: dict) -> list[int]:
    """The annotations that a ref is about; [] for no target."""
    ids = ref["ann_id"] if isinstance(ref["ann_id"], list) else [ref["ann_id"]]
    return [] if ids == [-1] else ids


def _masks(
    ref: dict, image: dict, annotations: dict, name: str, left_out: LeftOut, known: dict[int, dict | None]
) -> list[dict] | None:
    """One RLE per instance; None when the ref has targets but none with a usable mask. Raises ValueError.

    `known` holds the masks of annotations that other refs were about, and is added to.
    """
    ids = annotation_ids(ref)
    masks = []
    for annotation_id in ids:
        annotation = annotations.get(annotation_id)
        if annotation is None or annotation["image_id"] != ref["image_id"]:
            raise ValueError(
                f"ref {ref['ref_id']} is about annotation {annotation_id} of image {ref['image_id']}, which "
                "instances.json does not hold; take refs and instances from one archive."
            )
        if name == "grefcoco" and annotation.get("iscrowd"):
            continue
        if annotation_id not in known:
            try:
                known[annotation_id] = coco_rle(annotation["segmentation"], image["height"], image["width"])
            except (ValueError, TypeError) as error:
                raise ValueError(f"annotation {annotation_id}: {error}") from error
        if (rle := known[annotation_id]) is not None:
            masks.append(rle)
        elif len(ids) > 1:
            left_out.add("instances without a polygon inside the image", f"annotation {annotation_id}")
    if ids and not masks:
        left_out.add("refs without a usable mask", f"ref {ref['ref_id']}")
        return None
    return masks
