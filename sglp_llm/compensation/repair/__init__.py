"""Returns new values of weights that compensate for removed layers. Start with `cuts.py`.

`cuts.py` fits a map at each cut, `branch.py` folds it into weights, `refine.py` refines weights by gradient descent, `student.py`
is the model that is trained.
"""
