"""The command line. Start with `main.py`, then `verbs/prune.py`: a file of `verbs/` is a verb.

Heavy imports happen inside the verbs, so that ``--help`` is quick.
"""
