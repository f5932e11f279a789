"""The pipeline of this folder for 🤗 diffusers. Its code is in a package: pip install 'maskgit_pl[diffusers]'."""

try:
    from maskgit_pl.diffusers_export.pipeline import MaskGITPipeline
except ImportError as error:
    raise ImportError("this pipeline requires maskgit_pl; install it with pip install 'maskgit_pl[diffusers]'") from error

__all__ = ["MaskGITPipeline"]
