"""Checkpoints on disk: read their headers, copy their tensors, publish the result in one step."""
