"""Images of any kind as input for a model or a NIM: the only package with Pillow."""

from typing import TYPE_CHECKING

from shared_engine._lazy import attach

if TYPE_CHECKING:
    from shared_engine.images.encode import encode_data_url as encode_data_url
    from shared_engine.images.sources import accept as accept
    from shared_engine.images.sources import decode_data_url as decode_data_url
    from shared_engine.images.sources import describe as describe
    from shared_engine.images.sources import draw_sample as draw_sample
    from shared_engine.images.tiles import cut_tiles as cut_tiles
    from shared_engine.images.tiles import decode_picture as decode_picture
    from shared_engine.images.tiles import resize_image as resize_image
else:
    __getattr__, __dir__ = attach(
        __name__,
        {
            "encode": ("encode_data_url",),
            "sources": ("accept", "decode_data_url", "describe", "draw_sample"),
            "tiles": ("cut_tiles", "decode_picture", "resize_image"),
        },
    )
