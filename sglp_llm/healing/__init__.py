"""Returns a healed checkpoint: a shortened model that was trained on the original's predictions. Start with `heal.py`.

`opening.py` opens both models and `preparing.py` makes everything ready; `trained.py` chooses the parameters,
`teacher.py` gives the targets, `loss.py` compares; `training.py` runs transformers' Trainer, and `keeping.py` keeps
the best weights.
"""
