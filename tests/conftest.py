"""What every test stands on: no network, and one thread, also in the processes that tests start beside others."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"
if "PYTEST_XDIST_WORKER" in os.environ:  # with as many workers as cores, a test's own processes have a core each
    os.environ["OMP_NUM_THREADS"] = "1"

import pytest
import torch

torch.set_num_threads(1)


@pytest.hookimpl(optionalhook=True)  # pytest-xdist asks, where it is installed
def pytest_xdist_auto_num_workers():
    """`-n auto`: one worker for each core that this process may use, at most eight (one takes up to 3 GB)."""
    return min(8, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)


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
        help="tests/families: try every family of MLLMs, and print the table of docs/families.md",
    )
