"""The command `ernie`: what there is to do with an exported model, and how to find good settings."""
