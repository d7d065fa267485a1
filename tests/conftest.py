"""What all tests share: the fast BLAS, which has to be there before MLX, and the fixture models."""

from mlx_manager.inference.blas import use_fast_blas

use_fast_blas()

from collections.abc import Iterator  # noqa: E402 - MLX comes after its BLAS
from pathlib import Path  # noqa: E402

import pytest  # noqa: E402
from hypothesis import settings  # noqa: E402

from mlx_manager.hub.local import find_models  # noqa: E402
from mlx_manager.inference.engine.device import Device  # noqa: E402
from mlx_manager.inference.loader import EngineLimits  # noqa: E402
from mlx_manager.inference.pool import Pool  # noqa: E402

# How long an example takes says how busy the machine is.
settings.register_profile("untimed", deadline=None)
settings.load_profile("untimed")

MODELS = Path(__file__).parent / "fixtures" / "models"


@pytest.fixture(scope="session")
def device() -> Iterator[Device]:
    device = Device()
    device.start()
    yield device
    device.stop()


@pytest.fixture(scope="session")
def pool(device: Device) -> Pool:
    """The fixture models; what is loaded stays for the session."""
    return Pool(device, lambda: list(find_models([MODELS], None).models), EngineLimits())
