"""Comparators of this project with arrays recorded from the released code, one for each kind of file."""
