"""Returns new values of weights that make up for removed layers. Start with `cuts.py`.

`cuts.py` repairs cuts by a fit, `branch.py` folds it into weights, `refine.py` goes on by gradient, `student.py` is the model
that is trained.
"""
