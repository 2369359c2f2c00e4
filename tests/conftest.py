"""What every test stands on: no network and one thread."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"

import torch

torch.set_num_threads(1)


def pytest_configure(config):
    config.addinivalue_line("markers", "all_options: tried only with --all-options")


def pytest_addoption(parser):
    parser.addoption(
        "--all-options",
        action="store_true",
        help="tests/trainers/test_trl_options.py: try every option of TRL, not only the fast ones",
    )
    parser.addoption(
        "--all-families",
        action="store_true",
        help="tests/families: try every family of MLLMs, and renew the table of docs/families.md",
    )
