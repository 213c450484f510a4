"""Returns numbers and sets of layers: the mathematics, without models, files or devices. Start with `similarity.py`.

`similarity.py` is CKA, `segmentation.py` Fisher's optimal partition, `selection.py` turns scores and a budget into layers,
`proposals.py` finds sets of layers worth a trial, `least_squares.py` is weighted ridge regression.
"""
