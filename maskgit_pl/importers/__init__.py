"""Importers: convert weights that other projects released to pretrained folders."""
