"""The verbs of the command line, one file each; what several of them share is in the folder above."""
