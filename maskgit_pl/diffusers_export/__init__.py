"""Exports a model as a folder of 🤗 diffusers, whose pipeline and networks are classes of this package.

Used by ``maskgit export --format diffusers``. The folder is a pretrained folder too, which ``MaskGIT`` reads.
"""
