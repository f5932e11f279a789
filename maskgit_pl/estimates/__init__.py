"""Estimates of what a run needs: memory, disk space, FLOPs, traffic between ranks, time.

Closed formulas of sizes, and for networks that have none a replay of their step in which nothing is computed.
``runs.preflight`` and ``benchmarks/scaling.py`` use them; docs/scaling.md compares them with measurements.
"""
