"""`theory` is the package at the top level, not this folder; hypothesis is derandomised unless a seed is asked for."""
import os
import sys
from pathlib import Path

import torch
from hypothesis import settings

# A regular package wins over a folder without __init__.py wherever the two stand on sys.path, so this line is enough.
sys.path.insert(0, str(Path(__file__).parents[2]))
torch.set_num_threads(1)                                    # small matrices: more threads are slower
settings.register_profile("ci", derandomize=True, deadline=None, database=None)
settings.register_profile("random", deadline=None, database=None)       # HYPOTHESIS_PROFILE=random pytest --hypothesis-seed=N
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))
