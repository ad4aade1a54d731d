"""Text to token ids, with the prefix of its role and cut to the limit where that is asked for."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from shared_engine.checkpoint import Checkpoint
from shared_engine.documents import Role
from shared_engine.errors import CheckpointError, InputTooLongError
from shared_engine.options import Truncate

TokenIds = NDArray[np.int32]


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
            self._tokenizer = Tokenizer.from_file(str(path))
        except Exception as exc:  # the library raises a bare Exception
            raise CheckpointError(f"{path} cannot be read: {exc}") from exc
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self.limit = checkpoint.max_tokens
        self._bos = int(checkpoint.config.get("bos_token_id") or 0)
        self._prompts = checkpoint.prompts
        self._slack = 8 + max(len(p.encode()) for p in self._prompts.values())  # and specials
        self._bounded = self._tokenizer.normalizer is None  # a normalizer may lengthen a text
        # What truncation keeps: BOS and prefix. The space that ends a prefix joins the first word.
        self._kept = {
            role: self._tokenizer.encode(prompt.rstrip()).ids
            for role, prompt in self._prompts.items()
        }

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

    def cut(self, ids: TokenIds, role: Role, truncate: Truncate, index: int) -> TokenIds:
        """Return ids of at most `limit` tokens: as they are, or cut as a NIM's `truncate` does.

        "END" drops tokens from the end of the text, "START" from its beginning. BOS and prefix
        stay.

        Raises:
            InputTooLongError: over the limit, and `truncate` is "NONE".
        """
        if len(ids) <= self.limit:
            return ids
        if truncate == "NONE":
            raise InputTooLongError(
                f"input {index} has {len(ids)} tokens; the limit is {self.limit}. Split it, or set "
                'truncate="END" (or "START") to embed a part of it',
                index=index,
                tokens=len(ids),
                limit=self.limit,
            )
        if truncate == "END":
            return ids[: self.limit]
        head = 0
        for kept, actual in zip(self._kept[role], ids, strict=False):
            if kept != actual or head == self.limit:
                break
            head += 1
        return np.concatenate([ids[:head], ids[len(ids) - (self.limit - head) :]])
