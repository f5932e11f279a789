"""Weights that others released, as pretrained folders."""
