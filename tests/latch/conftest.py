"""All programs of these tests are tiny."""

import pytest


@pytest.fixture(scope="module", autouse=True)
def compile_quickly(quick_compile):
    pass
