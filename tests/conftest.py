"""No deadline a property test: CI shares its cores, and a slow moment is no fault."""

from hypothesis import settings

settings.register_profile("anytime", deadline=None)
settings.load_profile("anytime")
