"""What cards say of an SAE's features and of a data set's rows, and that their front matter can be read."""

import json

import pytest
import yaml
from huggingface_hub import DatasetCard, ModelCard

from segcompass.hub_cards import dataset_card, metric_card, sae_card
from segcompass.hub_cards.cards import COLUMNS, size_category
from segcompass.hub_cards.push import copy_dashboard, count_rows
from segcompass.loaders import load_scenes
from segcompass.loaders.rows import FEATURES, PHRASES
from segcompass.modeling_segcompass import SparseAutoencoderConfig

SAE = SparseAutoencoderConfig(d_in=8, d_sae=16, layer=1)
PURPLE = {"index": 3, "label": "purple", "density": 0.012, "strength": 3.0}
DETECTS = {"attribute": "purple", "reading": "patch", "f1": 0.9, "lift": 0.88}
STEERS = {"masks": 3, "weight": 0.4, "lost": 0.7}


def test_an_sae_with_a_dashboard_has_its_files_and_a_table(tmp_path):
    source, folder = tmp_path / "dashboard", tmp_path / "pushed"
    (source / "neuronpedia" / "features").mkdir(parents=True)
    folder.mkdir()
    (source / "neuronpedia" / "features" / "batch-0.jsonl.gz").write_bytes(b"x")
    (source / "dashboard.html").write_text("page")
    unnamed = {**PURPLE, "index": 4, "label": None, "detects": None, "steers": None}
    (source / "features.json").write_text(json.dumps([{**PURPLE, "detects": DETECTS, "steers": STEERS}, unnamed]))
    features = copy_dashboard(source, folder, SAE.d_sae)
    assert (folder / "dashboard.html").read_text() == "page"
    assert (folder / "neuronpedia" / "features" / "batch-0.jsonl.gz").read_bytes() == b"x"
    card = str(sae_card("me/sae", SAE, features=features))
    assert "| 3 | purple | 1.20% | purple (patch, 0.88) | 3 masks, 70% gone without it |" in card
    assert "| 4 |" not in card and "](dashboard.html)" in card
    assert "dashboard" not in str(sae_card("me/sae", SAE))
    assert ModelCard(card).data.library_name == "transformers"


def test_a_data_set_card_counts_rows_and_names_all_columns():
    assert set(COLUMNS) == set(FEATURES) | set(PHRASES)
    rows = load_scenes("test", seed=3, num_samples=12)
    counts = count_rows(rows)
    assert counts["rows"] == 12 and counts["masks"] == sum(map(len, rows["masks"]))
    assert counts["no_target"] == sum(not masks for masks in rows["masks"])
    columns = [*FEATURES, "odd"]
    card = str(dataset_card("me/x", "test", description="Twelve.", splits={"test": counts}, columns=columns))
    assert f"| test | 12 | {counts['no_target']} | {counts['masks']} |" in card
    for name in columns:
        assert f"| `{name}` |" in card
    assert "`phrases`" not in card and "| `odd` | | not of the schema |" in card
    data = DatasetCard(card).data
    assert data.size_categories == "n<1K" and data.pretty_name == "x"


@pytest.mark.parametrize(
    ("rows", "name"), [(0, "n<1K"), (1000, "1K<n<10K"), (99_999, "10K<n<100K"), (10**6, "1M<n<10M"), (10**13, "n>1T")]
)
def test_sizes_have_the_hubs_names(rows, name):
    assert size_category(rows) == name


def test_the_metrics_front_matter_is_a_spaces():
    front = yaml.safe_load(str(metric_card("me/metric", "text")).split("---")[1])
    assert front["sdk"] == "static" and front["license"] == "apache-2.0" and len(front["short_description"]) <= 60
    assert {front["colorFrom"], front["colorTo"]} <= {
        "red",
        "yellow",
        "green",
        "blue",
        "indigo",
        "purple",
        "pink",
        "gray",
    }
