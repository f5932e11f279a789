"""``MaskGIT``: the pipeline that users load, from a run, a folder or the Hub, and save or share."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Unpack

import torch

from maskgit_pl.checks import CHANNELS, pixels_text
from maskgit_pl.decoding import DecodingConfig, check_parallel
from maskgit_pl.errors import printable
from maskgit_pl.pipeline.card import STAGES, RunOrigin, check_run, fingerprints, write_card
from maskgit_pl.pipeline.edit import Editor
from maskgit_pl.pipeline.fine_tuning import PretrainedTokenizer, PretrainedTransformer
from maskgit_pl.pipeline.negative import NegativeModelLike
from maskgit_pl.pipeline.options import Classes, GenerateKeywords, GenerateOptions, read_options
from maskgit_pl.pipeline.pretrained import (
    check_stage_folder,
    fingerprint,
    load_decoding,
    load_tokenizer,
    load_transformer,
    read_decoding,
    read_negative_model,
    remove_negative_model,
    save_decoding,
    save_negative_model,
    save_tokenizer,
    save_transformer,
)
from maskgit_pl.pipeline.sharing import HubOptions, find_folder
from maskgit_pl.schedules import MaskSchedule, mask_schedules

if TYPE_CHECKING:
    from maskgit_pl.pipeline.display import Recording

__all__ = ["MaskGIT"]


class MaskGIT(Editor):
    """Generates and edits images of classes with a tokenizer and a transformer.

    Example::

        pipe = MaskGIT.from_pretrained("runs/fashion-mnist-adaln")
        images = pipe.generate(["Sneaker", "Bag", 0], num_steps=8, seed=0)
        images[0].save("sneaker.png")

    Args:
        tokenizer: Encodes images to tokens and decodes tokens to images.
        transformer: Predicts the tokens of a class.
        mask_schedule: Mask schedule to decode with and to save, in place of that of the transformer's training: a name,
            a mapping, or an object of a registered class.
        decoding: Decoding settings; by default those that were exported with the transformer.
        negative_model: Default of the option ``negative_model``; see ``GenerateOptions``.
        pack_weights: See ``Generator``.
        origin: Folder that the networks were loaded from, for the card that ``save_pretrained`` writes.

    Raises:
        ValueError: if the transformer was trained on the tokens of another tokenizer, or the negative model predicts
            other tokens.
    """

    def __init__(
        self,
        tokenizer: PretrainedTokenizer,
        transformer: PretrainedTransformer,
        *,
        mask_schedule: str | Mapping[str, Any] | MaskSchedule | None = None,
        decoding: DecodingConfig | None = None,
        negative_model: NegativeModelLike | None = None,
        pack_weights: bool = True,
        origin: RunOrigin | None = None,
    ) -> None:
        if mask_schedule is not None:
            check_parallel("mask_schedule", is_autoregressive=transformer.mask_schedule is None)
            schedule = mask_schedules.build(mask_schedules.spec(mask_schedule))
            transformer = replace(transformer, mask_schedule=schedule)
        super().__init__(
            tokenizer, transformer, decoding=decoding, negative_model=negative_model, pack_weights=pack_weights
        )
        self._origin = origin or RunOrigin()

    @classmethod
    def from_pretrained(
        cls,
        path_or_hub_id: Path | str,
        *,
        decoding: DecodingConfig | Path | str | None = None,
        negative_model: NegativeModelLike | None = None,
        device: torch.device | str = "cpu",
        dtype: torch.dtype | None = None,
        pack_weights: bool = True,
        **hub: Unpack[HubOptions],
    ) -> MaskGIT:
        """Loads the model of a run, a pretrained folder, or a repository of the Hugging Face Hub.

        Args:
            path_or_hub_id: Run folder (``runs/RUN``), folder with ``tokenizer/`` and ``transformer/``, the model of
                the package ``fashion-mnist-demo``, or ``owner/name`` on the Hub. Downloaded files are read as data and
                never executed.
            decoding: Default decoding settings, or a file with them. Without it, those of ``decoding.json`` in the
                folder (``maskgit tune`` writes it), else those exported with the transformer.
            negative_model: Default of the option ``negative_model`` (see ``GenerateOptions``). Without it, the one that
                the file of decoding settings names.
            device: Device such as ``cpu`` or ``cuda``.
            dtype: Type of the weights, such as ``torch.bfloat16``; None keeps that of the file.
            pack_weights: True keeps a second copy of the transformer's weights on a CPU, packed for faster matrix
                products; False saves the memory.
            hub: Options of a download: ``revision``, ``cache_dir``, ``local_files_only`` and ``token``; see
                ``sharing.HubOptions``.

        Raises:
            FileNotFoundError: if a folder, repository or file is missing.
            ValueError: if a file is damaged, the transformer was trained with another tokenizer, or the negative model
                predicts other tokens.
        """
        folder = find_folder(path_or_hub_id, **hub)
        # decoding.json is found by `maskgit tune`; an argument takes precedence over it.
        own = decoding is None
        if negative_model is None and not isinstance(decoding, DecodingConfig):
            negative_model = read_negative_model(folder / "decoding.json" if own else Path(str(decoding)))
        if decoding is None:
            decoding = read_decoding(folder)
        elif not isinstance(decoding, DecodingConfig):
            decoding = load_decoding(decoding)
        origin = RunOrigin.of(folder, tuned=own)
        tokenizer, transformer = load_tokenizer(folder / "tokenizer"), load_transformer(folder / "transformer")
        pipe = cls(
            tokenizer,
            transformer,
            decoding=decoding,
            negative_model=negative_model,
            pack_weights=pack_weights,
            origin=origin,
        )
        return pipe.to(device, dtype=dtype)

    def save_pretrained(
        self,
        folder: Path | str,
        *,
        run: Path | str | None = None,
        license: str | None = None,  # noqa: A002  # the Hub's word
        name: str | None = None,
    ) -> None:
        """Writes the files that ``from_pretrained`` reads, ``config.json`` and a model card.

        Args:
            folder: Folder to write. A pipeline in it is replaced, with its negative model.
            run: Run folder that the weights come from, for the card; by default the run that they were loaded from, if
                they have not changed.
            license: License of the weights as the Hub spells it; None leaves it open in the card.
            name: Name for ``from_pretrained`` in the card, such as ``owner/name``.

        Raises:
            FileExistsError: if the folder of a network has other files.
            FileNotFoundError: if there is no such run, or the folder of the negative model is gone.
            ValueError: if the negative model was not read from a folder.
        """
        if run is not None:
            check_run(Path(run))
        # The folder may be the one that was loaded: its fingerprints are read before it is overwritten.
        folder, before = Path(folder), self._origin.weights()
        for stage in STAGES:
            check_stage_folder(folder / stage)
        # First, because it may be read from a folder that is overwritten next.
        negative = None if self._negative_model is None else save_negative_model(folder, self._negative_model.folder)
        self._save_networks(folder)
        if self._decoding is not None or negative is not None:
            save_decoding(folder, self.decoding, tuned=self._origin.tuned, negative_model=negative)
        else:
            (folder / "decoding.json").unlink(missing_ok=True)
        if negative is None:
            remove_negative_model(folder)
        # Facts of the run are kept only if the weights are still those of the run.
        after = fingerprints(folder)
        write_card(
            folder,
            run=run if run is not None else self._origin.run() if before == after else None,
            known=self._origin.facts(after),
            license=license,
            name=name,
        )

    def record(self, classes: Classes, **options: Unpack[GenerateKeywords]) -> Recording:
        """Decodes one batch of images and keeps every step. A notebook shows the result as an animation.

        Args:
            classes: See ``generate``.
            options: See ``generate``.
        """
        from maskgit_pl.pipeline.display import Recording  # which imports Pillow

        read, decoding = read_options(GenerateOptions, options, self.decoding)
        request = self._request(classes, read, decoding)
        names = [
            "no class" if label == self.outline.null_label else self.class_names[label] for label in request.labels
        ]
        steps = list(self._decode(request, range(len(names))))
        return Recording(
            steps,
            self.tokenizer.decode,
            self.tokenizer.grid,
            decoding,
            names,
            request.seeds,
            token_size=self.outline.token_size,
        )

    def __repr__(self) -> str:
        """Returns name, classes, image size, tokens, steps, parameters, device and type of the weights in one line."""
        tokenizer, transformer = self.tokenizer.network.config, self.transformer.network.config
        parts = [list(part.parameters()) for part in (self.tokenizer.network, self.transformer.network)]
        counts = " + ".join(f"{sum(each.numel() for each in part):,}" for part in parts)
        name = f"{printable(self._origin.name)}: " if self._origin.name else ""
        size, (rows, columns) = self.tokenizer.image_size, transformer.grid
        colours = CHANNELS[tokenizer.in_channels]
        return (
            f"MaskGIT({name}{len(self.class_names)} classes, {colours} images of {pixels_text(size)} pixels, {rows} x "
            f"{columns} tokens of {tokenizer.codebook_size} codes, {self.decoding.num_steps} steps, "
            f"{counts} parameters, {str(parts[1][0].dtype).removeprefix('torch.')} on {self.device})"
        )

    def _save_networks(self, folder: Path) -> None:
        network = self.tokenizer.network
        save_tokenizer(folder / "tokenizer", network.config, network.state_dict(), image_size=self.tokenizer.image_size)
        schedule = self.transformer.mask_schedule
        save_transformer(
            folder / "transformer",
            self.transformer.network.config,
            self.transformer.network.state_dict(),
            mask_schedule=None if schedule is None else mask_schedules.spec(schedule),
            decoding=self.transformer.decoding,
            class_names=self.class_names,
            tokenizer_fingerprint=fingerprint(folder / "tokenizer"),
        )
