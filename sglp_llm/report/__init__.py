"""Returns what a person reads: the model card, tables and plots. Start with `model_card.py`."""
