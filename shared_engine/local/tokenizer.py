"""Text to token ids, with the prefix of its role and cut to the limit where that is asked for."""

from __future__ import annotations

import json
import secrets
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from shared_engine.documents import Role
from shared_engine.errors import CheckpointError, ImageTooLargeError, InputTooLongError
from shared_engine.local.checkpoint import Checkpoint
from shared_engine.local.config import VisionConfig
from shared_engine.options import Truncate

TokenIds = NDArray[np.int32]

TEXTS_AT_ONCE = 256
"""Of one call of the library, which holds much more for a text than its ids."""
_IMAGE_TOKENS = ("<img>", "<IMG_CONTEXT>", "</img>")


class TextTokenizer:
    """The checkpoint's own tokenizer.json, read by the tokenizers library; safe to share."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        """Read tokenizer.json.

        Raises:
            CheckpointError: the file is missing, or not a tokenizer.
        """
        path = checkpoint.folder / "tokenizer.json"
        if not path.is_file():
            raise CheckpointError(f"{checkpoint.folder} has no tokenizer.json")
        try:
            content = path.read_text(encoding="utf-8")
            if checkpoint.vision:
                content, names = _hide_image_tokens(content)
            self._tokenizer = Tokenizer.from_str(content)
        except Exception as exc:  # the library raises a bare Exception
            raise CheckpointError(f"{path} cannot be read: {exc}") from exc
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self.size = self._tokenizer.get_vocab_size()
        self.limit = checkpoint.max_tokens
        self.limit_with_image = checkpoint.max_tokens_with_image
        self._bos = checkpoint.config.bos_token_id or 0
        self._prompts = checkpoint.prompts
        # What truncation keeps: BOS and prefix. The space that ends a prefix joins the first word.
        self._kept = {
            role: self._tokenizer.encode(prompt.rstrip()).ids
            for role, prompt in self._prompts.items()
        }
        if checkpoint.vision:
            self._prepare_for_images(checkpoint.vision, names, path)

    def _prepare_for_images(self, vision: VisionConfig, names: list[str], path: Path) -> None:
        start, context, end = (self._tokenizer.token_to_id(name) for name in names)
        if start is None or end is None or context != vision.context_token:
            raise CheckpointError(
                f"{path} has {', '.join(_IMAGE_TOKENS)} as {start}, {context}, {end}; expected "
                f"three tokens, the second {vision.context_token} as config.json says"
            )
        prompt = self._tokenizer.encode(self._prompts["document"]).ids
        self._before_image = np.array([*prompt, start], np.int32)
        self._tile = np.full(vision.tokens_per_tile, context, np.int32)
        self._after_image = np.array([end], np.int32)

    def encode(
        self, texts: Sequence[str], role: Role, truncate: Truncate
    ) -> list[TokenIds | InputTooLongError]:
        """Return the ids of every text, BOS and prefix included: at most `limit`, or an error.

        The prefix always goes before the text, also where the text begins with the same word. Where
        a checkpoint has neither prefix nor BOS, an empty text is a lone BOS. Over the limit, "END"
        drops tokens from the end of the text, "START" from its beginning, as a NIM does; BOS and
        prefix stay. "NONE" gives an error in the place of the ids.
        """
        prompt = self._prompts[role]
        out: list[TokenIds | InputTooLongError] = []
        for start in range(0, len(texts), TEXTS_AT_ONCE):
            some = [prompt + text for text in texts[start : start + TEXTS_AT_ONCE]]
            for encoding in self._tokenizer.encode_batch_fast(some):
                ids = np.array(encoding.ids or [self._bos], np.int32)
                if len(ids) > self.limit:
                    out.append(_cut(ids, self._count_kept(ids, role), self.limit, truncate))
                else:
                    out.append(ids)
        return out

    def encode_with_image(self, tiles: int, text: str, truncate: Truncate) -> TokenIds:
        """Return the ids of an image with a text, or with "": at most `limit_with_image`.

        The prefix of a document, `<img>`, so many `<IMG_CONTEXT>` for every tile, `</img>`, a
        space and the text. Only the text is cut.

        Raises:
            ImageTooLargeError: the image alone is over the limit.
            InputTooLongError: over the limit, and `truncate` is "NONE".
        """
        limit = self.limit_with_image
        image = np.concatenate([self._before_image, *[self._tile] * tiles, self._after_image])
        if len(image) > limit:
            raise ImageTooLargeError(
                f"has an image of {len(image)} tokens; the limit is {limit}. Set a smaller "
                "max_tiles, or a larger max_tokens",
            )
        words = self._tokenizer.encode(f" {text}", add_special_tokens=False).ids
        ids = np.concatenate([image, np.array(words, np.int32)])
        if len(ids) <= limit:
            return ids
        cut = _cut(ids, len(image), limit, truncate)
        if isinstance(cut, InputTooLongError):
            raise cut
        return cut

    def _count_kept(self, ids: TokenIds, role: Role) -> int:
        """Return how many of the first ids truncation keeps: those of BOS and prefix."""
        kept = self._kept[role][: self.limit]
        same = [a == b for a, b in zip(kept, ids.tolist(), strict=False)]
        return same.index(False) if False in same else len(same)


def _cut(ids: TokenIds, kept: int, limit: int, truncate: Truncate) -> TokenIds | InputTooLongError:
    """Return `limit` of more ids, the first `kept` among them, or the error of "NONE"."""
    if truncate == "END":
        return ids[:limit]
    if truncate == "START":
        return np.concatenate([ids[:kept], ids[len(ids) - (limit - kept) :]])
    return InputTooLongError(
        f"has {len(ids)} tokens; the limit is {limit}. Split it, or set "
        'truncate="END" (or "START") to embed a part of it',
        tokens=len(ids),
        limit=limit,
    )


def _hide_image_tokens(content: str) -> tuple[str, list[str]]:
    """Return a tokenizer.json whose image tokens have names that no text holds, and those names.

    So a text that quotes `<IMG_CONTEXT>` means the word, and cannot shift an image.
    """
    parsed = json.loads(content)
    names = {name: f"{name}{secrets.token_hex(16)}" for name in _IMAGE_TOKENS}
    for token in parsed.get("added_tokens") or ():
        token["content"] = names.get(token["content"], token["content"])
    return json.dumps(parsed), list(names.values())
