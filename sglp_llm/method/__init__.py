"""Returns numbers and sets of layers: the mathematics, without models or files. Start with `similarity.py`.

`similarity.py` is CKA, `segmentation.py` Fisher's optimal partition, `selection.py` turns scores and a budget into the layers to
remove, `proposals.py` proposes candidate sets of layers for the search, `least_squares.py` is weighted ridge regression.
"""
