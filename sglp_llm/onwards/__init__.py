"""Returns a shortened checkpoint in the form that another program takes. Start with `targets.py`."""
