"""What every test shares."""

import torch
from hypothesis import settings

# No example of hypothesis fails for being slow on a busy machine.
settings.register_profile("alignkd", deadline=None)
settings.load_profile("alignkd")

# Models here are tiny: a second thread costs more than it brings.
torch.set_num_threads(1)

pytest_plugins = ["s3_server"]
