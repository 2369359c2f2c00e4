"""What goes to the Hub beside weights and data: cards, pushing, and a Space (see docs/hub.md)."""

from .cards import Evaluation, dataset_card, metric_card, model_card, sae_card
from .push import push_dataset, push_metric, push_model, push_sae
from .push_space import push_space, space_card

__all__ = [
    "Evaluation",
    "dataset_card",
    "metric_card",
    "model_card",
    "push_dataset",
    "push_metric",
    "push_model",
    "push_sae",
    "push_space",
    "sae_card",
    "space_card",
]
