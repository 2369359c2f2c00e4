"""A Hub on localhost in a process of its own."""

import pytest

from tests.support.hub_client import local_hub


@pytest.fixture(scope="package")
def hub(tmp_path_factory):
    with local_hub(tmp_path_factory.mktemp("hub")) as hub:
        yield hub
