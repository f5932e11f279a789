"""What a run needs before it is started: memory, disk, arithmetic, traffic between ranks, data.

Plain arithmetic on sizes, and for networks without a regular shape a replay of their step in which nothing is computed.
``maskgit doctor`` and ``benchmarks/scaling.py`` use it; docs/scaling.md has the formulas in one place.
"""
