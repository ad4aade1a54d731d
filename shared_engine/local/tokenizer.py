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
                content, names = _hidden_image_tokens(content)
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
        self._slack = 8 + max(len(p.encode()) for p in self._prompts.values())  # and specials
        self._bounded = self._tokenizer.normalizer is None  # a normalizer may lengthen a text
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

    def encode_with_image(self, tiles: int, text: str) -> tuple[TokenIds, int]:
        """Return the ids of an image with a text, or with "", and how many of them are the image's.

        The prefix of a document, `<img>`, so many `<IMG_CONTEXT>` for every tile, `</img>`, a
        space and the text.
        """
        head = [self._before_image, *[self._tile] * tiles, self._after_image]
        words = self._tokenizer.encode(f" {text}", add_special_tokens=False).ids
        ids = np.concatenate([*head, np.array(words, np.int32)])
        return ids, len(ids) - len(words)

    def cut_with_image(self, ids: TokenIds, head: int, truncate: Truncate) -> TokenIds:
        """Do as `cut` does with the text of an image; the first `head` tokens always stay.

        Raises:
            ImageTooLargeError: the image alone is over the limit.
            InputTooLongError: over the limit, and `truncate` is "NONE".
        """
        limit = self.limit_with_image
        if len(ids) <= limit:
            return ids
        if head > limit:
            raise ImageTooLargeError(
                f"has an image of {head} tokens; the limit is {limit}. Set a smaller "
                "max_tiles, or a larger max_tokens",
            )
        return self._cut(ids, head, limit, truncate)

    def encode(self, texts: Sequence[str], role: Role) -> list[TokenIds]:
        """Return the ids of every text, BOS and prefix included, however long they are.

        The prefix always goes before the text, also where the text begins with the same word. Where
        a checkpoint has neither prefix nor BOS, an empty text is a lone BOS.
        """
        prompt = self._prompts[role]
        encodings = self._tokenizer.encode_batch_fast([prompt + text for text in texts])
        return [np.array(encoding.ids or [self._bos], np.int32) for encoding in encodings]

    def surely_fits(self, text: str) -> bool:
        """Tell without tokenising that a text is within the limit; False means that it may not be.

        A byte-level vocabulary gives at most one token for each byte of UTF-8.
        """
        size = len(text) if text.isascii() else len(text.encode())
        return self._bounded and size + self._slack <= self.limit

    def cut(self, ids: TokenIds, role: Role, truncate: Truncate) -> TokenIds:
        """Return ids of at most `limit` tokens: as they are, or cut as a NIM's `truncate` does.

        "END" drops tokens from the end of the text, "START" from its beginning. BOS and prefix
        stay.

        Raises:
            InputTooLongError: over the limit, and `truncate` is "NONE".
        """
        if len(ids) <= self.limit:
            return ids
        head = 0
        for kept, actual in zip(self._kept[role], ids, strict=False):
            if kept != actual or head == self.limit:
                break
            head += 1
        return self._cut(ids, head, self.limit, truncate)

    def _cut(self, ids: TokenIds, head: int, limit: int, truncate: Truncate) -> TokenIds:
        if truncate == "NONE":
            raise InputTooLongError(
                f"has {len(ids)} tokens; the limit is {limit}. Split it, or set "
                'truncate="END" (or "START") to embed a part of it',
                tokens=len(ids),
                limit=limit,
            )
        if truncate == "END":
            return ids[:limit]
        return np.concatenate([ids[:head], ids[len(ids) - (limit - head) :]])


def _hidden_image_tokens(content: str) -> tuple[str, list[str]]:
    """Return a tokenizer.json whose image tokens have names that no text holds, and those names.

    So a text that quotes `<IMG_CONTEXT>` means the word, and cannot shift an image.
    """
    parsed = json.loads(content)
    names = {name: f"{name}{secrets.token_hex(16)}" for name in _IMAGE_TOKENS}
    for token in parsed.get("added_tokens") or ():
        token["content"] = names.get(token["content"], token["content"])
    return json.dumps(parsed), list(names.values())
