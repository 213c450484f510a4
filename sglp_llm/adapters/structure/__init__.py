"""Returns the adapter of a model type without a file of its own, from its configuration and its modules. Start with `derive.py`.

`config_keys.py` is the one table of configuration keys that depend on the layers, `exceptions.py` what neither the table nor the
modules say about a type, `proof.py` compares the shortened model with the original on the meta device.
"""
