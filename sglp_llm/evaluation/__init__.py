"""Measures what a model is worth: perplexity, benchmark suites, speed and memory."""
