"""Returns the processes of one run, which share the calibration sequences. Start with `base.py`.

`distributed.py` implements them on torch.distributed, `launch.py` tells whether a launcher started more than one.
"""

from __future__ import annotations

# Nothing here imports torch: the command line reads the number of processes, and ``--help`` must stay fast.
from sglp_llm.processes.base import ALONE, Processes
from sglp_llm.processes.launch import process_count, process_index

__all__ = ["ALONE", "Processes", "process_count", "process_index"]
