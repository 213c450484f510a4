"""Returns a `Comparison`: many methods at many depths on one model. Start with `compare.py`.

`methods.py` resolves names of methods, `choices.py` selects layers, `measurements.py` defines what `measured.py` measures.
"""
