"""What every test shares: no example of hypothesis fails for being slow on a busy machine."""

from hypothesis import settings

settings.register_profile("alignkd", deadline=None)
settings.load_profile("alignkd")
