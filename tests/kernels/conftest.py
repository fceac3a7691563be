import os

import pytest


@pytest.fixture(autouse=True)
def as_on_a_gpu():
    """With SOFTVQ_EMULATE=90 in the environment, or another architecture, the kernels run compiled,
    in bench's emulator of that GPU. A test then takes up to a minute.
    """
    architecture = os.environ.get("SOFTVQ_EMULATE")
    if architecture is None:
        yield
        return
    from bench.emulator import emulated

    with emulated(int(architecture)):
        yield
