"""Models, data and losses by name: ``hf:DIR``, ``text:corpus.txt`` -> `Problem`.

Importing this package imports neither torch nor any library of a scheme.
"""
