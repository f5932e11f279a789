"""Discriminators by name: the networks of the adversarial loss, which ``Tokenizer`` trains against the VQGAN.

``AdversarialConfig`` takes one by a recipe value (``patchgan``, or ``{name: patchgan, num_layers: 2}``); a value
without a name is ``stylegan``. Other packages add their own in the entry point group ``maskgit_pl.discriminators``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from typing import Any, Protocol

from torch import nn

from maskgit_pl.checks import shorten
from maskgit_pl.image_format import ImageSize
from maskgit_pl.registry import Registry

__all__ = ["DEFAULT_DISCRIMINATOR", "DiscriminatorSpec", "build_discriminator", "discriminators", "with_defaults"]

DEFAULT_DISCRIMINATOR = "stylegan"
"""The discriminator of recipes that name none."""

_PLAIN = (str, int, float, bool, tuple, type(None))


class DiscriminatorSpec(Protocol):
    """A registered discriminator: a frozen dataclass of the values in a recipe, which builds the module.

    A spec whose network normalises over the batch has the attribute ``mixes_images = True``: a logit then depends on
    other images too, and R1 is refused.
    """

    def create(self, *, in_channels: int, image_size: ImageSize) -> nn.Module:
        """Builds the network: images (B, C, H, W) float in [0, 1] to logits (B, ...), high if they look real.

        Args:
            in_channels: Channels of an image.
            image_size: Side of square images, or (height, width), in pixels.

        Raises:
            ValueError: if the network does not support images of this size.
        """
        ...


def _check_spec(name: str, spec: DiscriminatorSpec) -> None:
    if not callable(getattr(spec, "create", None)):
        raise ValueError(f"discriminator {name!r} must have a method create(), got {shorten(spec)}")


discriminators: Registry[DiscriminatorSpec] = Registry(
    "discriminator",
    "maskgit_pl.discriminators",
    check=_check_spec,
    modules=("maskgit_pl.networks.discriminator", "maskgit_pl.networks.patch_discriminator"),
)


def build_discriminator(
    spec: str | Mapping[str, Any] | DiscriminatorSpec, *, where: str = "discriminator"
) -> DiscriminatorSpec:
    """Builds the spec of a discriminator; a spec that is built already is returned as it is.

    Args:
        spec: Name, or mapping of arguments with the key ``name`` (``stylegan`` without it), or built spec.
        where: File and key of the values, for messages.

    Raises:
        ValueError: if the name is unknown, or an argument is unknown or wrong.
    """
    if isinstance(spec, Mapping):
        spec = {"name": DEFAULT_DISCRIMINATOR, **spec}
    elif not isinstance(spec, str):
        _check_spec(type(spec).__name__, spec)
        return spec
    name = spec if isinstance(spec, str) else spec["name"]
    try:
        if isinstance(name, str):
            discriminators.factory(name)
    except ValueError as error:  # the message of an unknown name lacks the key
        raise ValueError(f"{where}: {error}") from error
    return discriminators.build(spec, where=where)


def with_defaults(spec: str | Mapping[str, Any]) -> dict[str, Any]:
    """Returns the mapping of a discriminator with all its values, without the name of the default one.

    A wrong name or key stays, for ``build_discriminator`` to report.
    """
    given = {"name": spec} if isinstance(spec, str) else dict(spec)
    name = given.pop("name", DEFAULT_DISCRIMINATOR)
    factory = discriminators.factory(name) if name in discriminators.names() else None
    defaults: dict[str, Any] = {}
    if isinstance(factory, type) and is_dataclass(factory):
        plain = [each for each in fields(factory) if each.init and isinstance(each.default, _PLAIN)]
        defaults = {each.name: each.default for each in plain}
    # Without a name, the values of the default one are settings of their own, which a resuming run compares by key.
    return {**({} if name == DEFAULT_DISCRIMINATOR else {"name": name}), **defaults, **given}
