"""Returns norms of gradients of every sequence of a batch, without the gradients. Start with `ghost.py`."""
