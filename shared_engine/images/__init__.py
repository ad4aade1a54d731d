"""Any image, to what a model or a NIM takes: the only room with Pillow, loaded when first used."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from shared_engine.images.sample import draw_sample as draw_sample
    from shared_engine.images.sources import MAX_BYTES as MAX_BYTES
    from shared_engine.images.sources import accept as accept
    from shared_engine.images.sources import decode_data_url as decode_data_url
    from shared_engine.images.sources import describe as describe
    from shared_engine.images.tiles import Picture as Picture
    from shared_engine.images.tiles import Tiles as Tiles
    from shared_engine.images.tiles import cut_tiles as cut_tiles
    from shared_engine.images.tiles import decode_picture as decode_picture
    from shared_engine.images.tiles import encode_data_url as encode_data_url
else:
    _FILES = {
        "sample": ("draw_sample",),
        "sources": ("MAX_BYTES", "accept", "decode_data_url", "describe"),
        "tiles": ("Picture", "Tiles", "cut_tiles", "decode_picture", "encode_data_url"),
    }

    def __getattr__(name: str) -> Any:
        for module, names in _FILES.items():
            if name in names:
                return getattr(import_module(f"{__name__}.{module}"), name)
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
