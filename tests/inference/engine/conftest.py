import random

import pytest

from tests.inference.fixture_models import FAMILIES, weights


@pytest.fixture(params=FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    weights(request.param)
    return request.param


@pytest.fixture
def lot(family: str) -> random.Random:
    return random.Random(family)
