"""Returns a `Comparison`: many methods at many depths on one model. Start with `compare.py`.

`methods.py` knows the methods by name, `choices.py` their layers, `measurements.py` what is measured, `measured.py` measures it.
"""
