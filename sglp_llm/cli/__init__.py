"""The command line: one file a verb. Start with `main.py`, then `prune.py`.

Heavy imports happen inside the verbs, so that ``--help`` is quick.
"""
