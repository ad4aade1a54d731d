"""The image input of a multimodal model: how an image becomes pixels, patches and tokens.

There are two kinds, for the two vision towers: tiles of one size (`siglip.py`), and the whole image
in its own proportions (`pixtral.py`).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

from shared_engine import images
from shared_engine.local.config import (
    MAX_TILES,
    MistralFile,
    MultimodalFile,
    MultimodalRerankerFile,
    PixtralConfig,
    PixtralImages,
    PixtralProcessor,
    ProcessorConfig,
    Tiling,
    TowerConfig,
    read,
    refuse,
)

if TYPE_CHECKING:
    from shared_engine.images.sources import AcceptedImage
    from shared_engine.images.tiles import Tiles

_TokenT = TypeVar("_TokenT")


@dataclass(frozen=True)
class VisionConfig(ABC):
    """The image input of a model."""

    names: ClassVar[tuple[str, str, str]]
    """Names of the tokens of an image."""
    context_name: ClassVar[str]
    """The one of them whose embeddings are replaced by the rows of the tower."""
    smaller: ClassVar[str]
    """Advice of errors about too many tokens."""
    guards_text: ClassVar[bool]
    """Whether a text is read without special tokens, and without white space at its end."""

    context_token: int
    """Id of `context_name`."""
    cache_bytes: int = field(default=0, kw_only=True)
    """Device memory for the rows of recent images; 0 for none."""

    @property
    @abstractmethod
    def detail(self) -> int:
        """The value that changes the vector of an image."""

    @property
    @abstractmethod
    def description(self) -> str:
        """The detail in words."""

    @abstractmethod
    def prepare(self, source: AcceptedImage, urls: bool, on_device: bool) -> Tiles:
        """Decode an image to the pixels that the tower takes.

        Args:
            source: The image.
            urls: Whether it may be fetched from a URL.
            on_device: Whether the device can cut tiles.
        """

    @abstractmethod
    def count_patches(self, image: Tiles) -> int:
        """Return the number of rows of the tower for a prepared image."""

    @abstractmethod
    def lay_out(self, image: Tiles, tokens: Sequence[_TokenT]) -> list[_TokenT]:
        """Return the tokens of a prepared image.

        Args:
            image: The image.
            tokens: The id or name of each of `names`.
        """


@dataclass(frozen=True)
class TiledVision(VisionConfig):
    """The input of SigLIP: an image is cut into tiles of one size."""

    names = ("<img>", "<IMG_CONTEXT>", "</img>")
    context_name = "<IMG_CONTEXT>"
    smaller = "a smaller max_tiles"
    guards_text = False

    tower: TowerConfig
    max_tiles: int
    """Maximum number of tiles of an image, without the thumbnail."""

    @property
    def detail(self) -> int:
        """The option that changes the vector of an image."""
        return self.max_tiles

    @property
    def description(self) -> str:
        """The detail in words."""
        return f"at most {self.max_tiles} tiles per image"

    @property
    def tile_size(self) -> int:
        """Pixels of a tile's side."""
        return self.tower.image_size

    @property
    def patches_per_side(self) -> int:
        """Patches along a tile's side."""
        return self.tile_size // self.tower.patch_size

    @property
    def patches_per_tile(self) -> int:
        """Rows of the tower per tile."""
        return self.patches_per_side**2

    def prepare(self, source: AcceptedImage, urls: bool, on_device: bool) -> Tiles:
        """Cut it into tiles, or leave that to the device."""
        prepare = images.decode_picture if on_device else images.cut_tiles
        return prepare(source, self.max_tiles, self.tile_size, urls)

    def count_patches(self, image: Tiles) -> int:
        """Return the number of rows of the tower for a prepared image."""
        return len(image) * self.patches_per_tile

    def lay_out(self, image: Tiles, tokens: Sequence[_TokenT]) -> list[_TokenT]:
        """Return its tokens, tile by tile, one per 2 x 2 patches."""
        start, context, end = tokens
        return [start, *[context] * (self.count_patches(image) // 4), end]


@dataclass(frozen=True)
class PixtralVision(VisionConfig):
    """The input of Pixtral: an image is resized as a whole, and its rows of patches are lines."""

    names = ("[IMG]", "[IMG_BREAK]", "[IMG_END]")
    context_name = "[IMG]"
    smaller = "a smaller image"
    guards_text = True

    tower: PixtralConfig
    longest_edge: int
    """Maximum of an image's longer side in pixels, before it is rounded up to whole tokens."""

    @property
    def detail(self) -> int:
        """The value that changes the vector of an image."""
        return self.longest_edge

    @property
    def description(self) -> str:
        """The detail in words."""
        return f"images of at most {self.longest_edge} pixels per side"

    @property
    def token_size(self) -> int:
        """Pixels of the side of a token: one token per 2 x 2 patches."""
        return 2 * self.tower.patch_size

    def prepare(self, source: AcceptedImage, urls: bool, on_device: bool) -> Tiles:
        """Resize it as a whole."""
        return images.resize_image(source, self.longest_edge, self.token_size, urls)

    def count_patches(self, image: Tiles) -> int:
        """Return the number of rows of the tower for a prepared image."""
        rows, cols = self._count_tokens(image)
        return 4 * rows * cols

    def lay_out(self, image: Tiles, tokens: Sequence[_TokenT]) -> list[_TokenT]:
        """Return its tokens, line by line."""
        context, line_break, end = tokens
        rows, cols = self._count_tokens(image)
        lines = [*[context] * cols, line_break] * rows
        return [*lines[:-1], end]

    def _count_tokens(self, image: Any) -> tuple[int, int]:
        _, height, width, _ = image.shape
        return height // self.token_size, width // self.token_size


def read_tiled(
    path: Path, file: MultimodalFile | MultimodalRerankerFile, max_tiles: int | None
) -> TiledVision:
    """Return the image input that config.json and processor_config.json define.

    Args:
        path: config.json.
        file: Its content.
        max_tiles: The option; None reads the files, processor_config.json first, as vLLM does.

    Raises:
        CheckpointError: images are cut in a way that the engine does not support.
    """
    processor = read(path.with_name("processor_config.json"), ProcessorConfig)
    tiling: dict[str, Any] = {}
    for part in (file, processor.image_processor, processor):
        tiling |= part.model_dump(include=set(Tiling.model_fields), exclude_none=True)
    default = tiling.get("max_input_tiles", 2) if tiling.get("dynamic_image_size", True) else 1
    if max_tiles is None:
        if not 1 <= default <= MAX_TILES:
            refuse(path.parent, "max_input_tiles", default, f"1 to {MAX_TILES}")
        for name, value in (
            {"use_thumbnail": True, "min_input_tiles": 1}.items() if default > 1 else ()
        ):
            if (given := tiling.get(name, value)) != value:
                refuse(path.parent, name, given, repr(value))
    return TiledVision(file.img_context_token_id, file.vision_config, max_tiles or default)


def read_pixtral(path: Path, file: MistralFile, max_tiles: int | None) -> PixtralVision:
    """Return the image input that config.json and the file of the image processor define.

    Args:
        path: config.json.
        file: Its content.
        max_tiles: The option, which has no meaning for these models.

    Raises:
        CheckpointError: images are resized in a way that the engine does not support, or
            `max_tiles` is set.
    """
    if max_tiles is not None:
        refuse(path.parent, "max_tiles", max_tiles, "None, as images are not cut into tiles")
    processor = read(path.with_name("processor_config.json"), PixtralProcessor)
    tower = file.vision_config
    for name, value, expected in (
        ("patch_size", processor.patch_size, tower.patch_size),
        ("spatial_merge_size", processor.spatial_merge_size, file.spatial_merge_size),
    ):
        if value not in (None, expected):
            refuse(path.with_name("processor_config.json"), name, value, f"{expected}")
    # transformers 5 writes one file for both, transformers 4 one for each.
    old = path.with_name("preprocessor_config.json")
    pixels = processor.image_processor or read(old, PixtralImages)
    if pixels.size is None:
        refuse(path.parent, "size.longest_edge", None, f"pixels, in {old.name}")
    return PixtralVision(file.image_token, tower, pixels.size.longest_edge)
