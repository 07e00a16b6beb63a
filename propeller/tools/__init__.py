"""Command-line tools: `python -m propeller.tools.NAME`."""
