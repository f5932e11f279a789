"""Measures a model once and remembers: its images, the rows of the ledger, the report."""
