"""Rarely used parts: quantizers, export of graphs, inspection pages and small data sets, about one file each.

They keep the contracts of their kinds but have no promise of bit-exact results. Other modules name them as
strings, in a registry or in the table of commands, and import them when they are used.
"""
