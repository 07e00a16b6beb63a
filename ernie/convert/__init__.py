"""Weights and files of other projects, read into this project's own names and plain arrays.

Nothing here imports `ernie.pretrained` or `ernie.modeling`, and nothing here runs foreign code: pickles
are read through an allow-list only (`unpickle`).
"""
