"""Estimates of the needs of a run: memory, disk space, FLOPs, traffic between ranks, and time.

The transformer has closed formulas of its sizes. Other networks are measured by a replay of their step with fake
tensors, which computes nothing. ``runs.preflight`` and ``benchmarks/scaling.py`` use these estimates; docs/scaling.md
compares them with measurements.
"""
