"""What holds for every test."""

from __future__ import annotations

import torch

# The models are tiny: threads that wait for each other cost more than they bring, a hundred times more on a busy machine.
torch.set_num_threads(1)
