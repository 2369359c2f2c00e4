"""Sizes that the benchmarks' authors published, to check a conversion against."""

SIZES = {
    ("refcoco", "unc", "train"): {"refs": 42_404, "sentences": 120_624},
    ("refcoco", "unc", "val"): {"refs": 3_811, "sentences": 10_834},
    ("refcoco", "unc", "testA"): {"refs": 1_975, "sentences": 5_657},
    ("refcoco", "unc", "testB"): {"refs": 1_810, "sentences": 5_095},
    ("refcoco+", "unc", "val"): {"refs": 3_805, "sentences": 10_758},
    ("refcoco+", "unc", "testA"): {"refs": 1_975, "sentences": 5_726},
    ("refcoco+", "unc", "testB"): {"refs": 1_798, "sentences": 4_889},
    ("refcocog", "umd", "val"): {"refs": 2_573, "sentences": 4_896},
    ("refcocog", "umd", "test"): {"refs": 5_023, "sentences": 9_602},
    ("grefcoco", "unc", "val"): {"images": 1_500},
    ("grefcoco", "unc", "testA"): {"images": 750},
    ("grefcoco", "unc", "testB"): {"images": 750},
    ("reasonseg", None, "train"): {"images": 239},
    ("reasonseg", None, "val"): {"images": 200},
    ("reasonseg", None, "test"): {"images": 779},
}
"""(data set, division, split): number of refs, of their sentences, or of images; what is not known is not there."""

SPLITS = {
    ("refcoco", "unc"): ("train", "val", "testA", "testB"),
    ("refcoco", "google"): ("train", "val", "test"),
    ("refcoco+", "unc"): ("train", "val", "testA", "testB"),
    ("refcocog", "umd"): ("train", "val", "test"),
    ("refcocog", "google"): ("train", "val"),
    ("grefcoco", "unc"): ("train", "val", "testA", "testB"),
    ("reasonseg", None): ("train", "val", "test"),
}
"""The splits of each division."""


def compare(name: str, split_by: str | None, split: str, unit: str, found: dict[str, int]) -> str:
    """Compare a split's size with the published one.

    Args:
        name: of the data set.
        split_by: whose division into splits; None where there is only one.
        split: which split.
        unit: what one row is, see `rows.UNITS`.
        found: number of "rows", "refs" and "images".

    Returns:
        "as published", "nothing published", or each count that differs.
    """
    published = dict(SIZES.get((name, split_by, split), {}))
    if "sentences" in published:
        sentences = published.pop("sentences")
        published["rows"] = sentences if unit == "sentence" else published["refs"]
    differing = [
        f"{found[each]:,} {each}, published {number:,}" for each, number in published.items() if found[each] != number
    ]
    return "; ".join(differing) or ("as published" if published else "nothing published")
