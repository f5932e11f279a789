"""Estimates of the needs of a run: memory, disk space and FLOPs.

The transformer has closed formulas of its sizes. The steps of other networks are counted with tensors that have no
content. ``runs.preflight`` uses these estimates; docs/scaling.md compares them with measurements.
"""
