"""Settings of all tests."""

import os

from hypothesis import settings

# Speed is judged by benchmarks, never by a test: a busy machine must not fail one.
settings.register_profile("daruma", deadline=None)
settings.register_profile("soak", deadline=None, max_examples=20_000)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "daruma"))
