"""Pretrained networks: their folders, and weights for a network of other sizes."""
