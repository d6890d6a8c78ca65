"""What every test shares: one thread each, since pytest-xdist fills the cores, and no deadline for a property."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # read when torch is first imported, which is after this

from hypothesis import settings  # noqa: E402

# CI shares its cores: a slow moment is no fault.
settings.register_profile("anytime", deadline=None)
settings.load_profile("anytime")
