"""Returns numbers about a model: perplexity, scores in tasks of lm-eval, speed and memory. Start with `perplexity.py`.

`harness.py` runs lm-eval and is slow to import, `suites.py` defines which tasks, `benchmark.py` measures speed.
"""
