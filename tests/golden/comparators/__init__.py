"""Compares this project with arrays recorded from the released code: one comparator for each kind of file.

``folder`` reads and checks a folder of recorded arrays, ``comparison`` holds what a comparison is, ``every`` runs all
comparators over a folder. Used by ``check.py`` beside this package and by ``tests/test_golden.py``.
"""
