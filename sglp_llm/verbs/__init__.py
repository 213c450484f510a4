"""One module a verb of the command line. Heavy imports happen inside the verbs, so that ``--help`` is quick."""
