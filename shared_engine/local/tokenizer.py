"""Tokenize texts with the prefix of their role or after a query, and truncate them on request."""

from __future__ import annotations

import itertools
import json
import re
import secrets
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from shared_engine.documents import Role
from shared_engine.errors import CheckpointError, ImageTooLargeError, InputTooLongError
from shared_engine.local.checkpoint import Checkpoint
from shared_engine.local.config import VisionConfig, refuse
from shared_engine.options import Truncate

TokenIds = NDArray[np.int32]

TEXTS_PER_CALL, CHARACTERS_PER_CALL = 256, 2**19
"""Limits of one call of the library, which holds some 70 bytes per character."""
_CHARACTERS_PER_TOKEN = 16
"""Characters of a very long text that are tokenized per token of the limit; more if too few."""
_MARGIN = 512
"""Tokens next to a cut that may differ from those of the whole text."""
_MAX_WORD = 128
"""Characters that are searched for white space next to a cut."""
_SPACE = re.compile(r"\s")
_IMAGE_TOKENS = ("<img>", "<IMG_CONTEXT>", "</img>")


@contextmanager
def _panics_as_errors() -> Iterator[None]:
    """Raise a panic of the library as a RuntimeError; it is no Exception and would end a worker."""
    try:
        yield
    except BaseException as exc:
        if type(exc).__name__ != "PanicException":
            raise
        raise RuntimeError(f"the tokenizers library panicked: {exc}") from None


class TextTokenizer:
    """The tokenizer of a checkpoint, tokenizer.json. Thread-safe."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        """Read tokenizer.json.

        Raises:
            CheckpointError: the file is missing, invalid, or has ids outside the vocabulary.
        """
        path = checkpoint.folder / "tokenizer.json"
        if not path.is_file():
            raise CheckpointError(f"{checkpoint.folder} has no tokenizer.json")
        try:
            content = path.read_text(encoding="utf-8")
            if checkpoint.vision:
                content, names = _hide_image_tokens(content)
            with _panics_as_errors():
                self._tokenizer = Tokenizer.from_str(content)
                self._tokenizer.no_truncation()
                self._tokenizer.no_padding()
                # Kept by truncation: BOS and prefix, without the last space, which joins the text.
                self._kept = {
                    role: self._tokenizer.encode(prompt.rstrip()).ids
                    for role, prompt in checkpoint.prompts.items()
                }
                prompt = self._tokenizer.encode(checkpoint.prompts.get("document", "")).ids
        except Exception as exc:  # the library raises a bare Exception
            raise CheckpointError(f"{path} cannot be read: {exc}") from exc
        if dropout := getattr(self._tokenizer.model, "dropout", None):
            refuse(path, "model.dropout", dropout, "null, as ids would be random")
        self.limit = checkpoint.max_tokens
        self.limit_with_image = checkpoint.max_tokens_with_image
        self._bos = checkpoint.config.bos_token_id or 0
        self._prompts, self._scoring = checkpoint.prompts, checkpoint.scoring
        vocabulary = self._tokenizer.get_vocab().values()
        self.size = 1 + max([*vocabulary, *itertools.chain(*self._kept.values())], default=-1)
        rows = max(checkpoint.config.vocab_size, len(vocabulary))
        if self.size > rows:
            raise CheckpointError(
                f"{path} has a token with id {self.size - 1}; expected ids below {rows}, the "
                "number of tokens or vocab_size of config.json"
            )
        if checkpoint.vision:
            self._prepare_for_images(checkpoint.vision, prompt, names, path)

    def _prepare_for_images(
        self, vision: VisionConfig, prompt: list[int], names: list[str], path: Path
    ) -> None:
        start, context, end = (self._tokenizer.token_to_id(name) for name in names)
        if start is None or end is None or context != vision.context_token:
            raise CheckpointError(
                f"{path} has {', '.join(_IMAGE_TOKENS)} as {start}, {context}, {end}; expected "
                f"three ids, the second {vision.context_token} (img_context_token_id)"
            )
        self._before_image = np.array([*prompt, start], np.int32)
        self._tile = np.full(vision.tokens_per_tile, context, np.int32)
        self._after_image = np.array([end], np.int32)

    @_panics_as_errors()
    def encode(
        self, texts: Sequence[str], role: Role, truncate: Truncate
    ) -> list[TokenIds | InputTooLongError]:
        """Return the ids of each text with BOS and prefix: at most `limit` ids, or an error.

        The prefix is added even if the text begins with the same word. Without prefix and BOS, an
        empty text becomes one BOS. Over the limit, "END" drops tokens from the end of the text and
        "START" from its beginning, as at a NIM, and keeps BOS and prefix; "NONE" returns an error
        in place of the ids.
        """
        return self._encode_all(self._prompts[role], self._kept[role], texts, truncate)

    @_panics_as_errors()
    def check_query(self, query: str) -> None:
        """Refuse a query that leaves no space for a document.

        Raises:
            InputTooLongError: it does.
        """
        assert self._scoring is not None
        rest = query + self._scoring.before_document
        ((ids, is_whole),) = self._encode(self._scoring.before_query, [rest], self.limit, "NONE")
        tokens = len(ids)
        if tokens >= self.limit:
            over = "" if is_whole else "over "
            raise InputTooLongError(
                f"the query has {over}{tokens} tokens with its prompt; expected less than "
                f"{self.limit}, the limit of query and document together; use a shorter query",
                tokens=tokens,
                limit=self.limit,
            )

    @_panics_as_errors()
    def encode_pairs(
        self, query: str, texts: Sequence[str], truncate: Truncate
    ) -> list[TokenIds | InputTooLongError]:
        """Return the ids of each text after a query, with BOS: at most `limit` ids, or an error.

        Query and text are tokenized as one string, because words may join where they meet. Unlike
        NVIDIA's code, which deletes the first `<image>` in a prompt, all of both stays text.
        """
        return self._encode_all(self._prompt_of(query), [], texts, truncate)

    @_panics_as_errors()
    def encode_with_image(
        self, tiles: int, text: str, truncate: Truncate, query: str | None = None
    ) -> TokenIds:
        """Return the ids of an image with a text, at most `limit_with_image`.

        They are the prefix of a document, `<img>`, `<IMG_CONTEXT>` for each row of each tile,
        `</img>`, a space, the prompt of the query if there is one, and the text, which may be
        empty. Only the text is cut.

        Raises:
            ImageTooLargeError: the image alone exceeds the limit.
            InputTooLongError: image and text exceed the limit, and `truncate` is "NONE"; or image
                and query leave no space for a text.
        """
        limit = self.limit_with_image
        image = np.concatenate([self._before_image, *[self._tile] * tiles, self._after_image])
        if len(image) > limit:
            raise ImageTooLargeError(
                f"has an image of {len(image)} tokens; the limit is {limit}; use a smaller "
                "max_tiles or a larger max_tokens",
            )
        before, free = " ", limit - len(image)
        if query is not None:
            before += self._prompt_of(query)
            tokens = len(self._tokenizer.encode(before, add_special_tokens=False).ids)
            if tokens >= free:
                raise InputTooLongError(
                    f"has an image of {len(image)} tokens for a query of {tokens}; expected less "
                    f"than {limit} together; use a smaller max_tiles or a shorter query",
                    tokens=len(image) + tokens,
                    limit=limit,
                )
        ((words, is_whole),) = self._encode(before, [text], free, truncate, special=False)
        ids = np.concatenate([image, words])
        if len(ids) <= limit:
            return ids
        cut = _cut(ids, len(image), limit, truncate, is_whole)
        if isinstance(cut, InputTooLongError):
            raise cut
        return cut

    def _prompt_of(self, query: str) -> str:
        assert self._scoring is not None
        return f"{self._scoring.before_query}{query}{self._scoring.before_document}"

    def _encode_all(
        self, prompt: str, kept: list[int], texts: Sequence[str], truncate: Truncate
    ) -> list[TokenIds | InputTooLongError]:
        """Return the ids of each text after a prompt; see `encode`.

        Args:
            kept: The ids of the prompt, which "START" keeps.
        """
        out: list[TokenIds | InputTooLongError] = []
        for batch in self._split(texts):
            for ids, is_whole in self._encode(prompt, batch, self.limit, truncate):
                if len(ids) > self.limit:
                    count = _count_equal(kept[: self.limit], ids.tolist())
                    out.append(_cut(ids, count, self.limit, truncate, is_whole))
                else:
                    out.append(ids if len(ids) else np.array([self._bos], np.int32))
        return out

    def _split(self, texts: Sequence[str]) -> Iterator[list[str]]:
        """Yield the texts in batches for one call of the library each."""
        longest = _CHARACTERS_PER_TOKEN * (self.limit + _MARGIN) + _MAX_WORD
        batch: list[str] = []
        characters = 0
        for text in texts:
            length = min(len(text), longest)
            is_full = len(batch) == TEXTS_PER_CALL or characters + length > CHARACTERS_PER_CALL
            if batch and is_full:
                yield batch
                batch, characters = [], 0
            batch.append(text)
            characters += length
        if batch:
            yield batch

    def _encode(
        self,
        before: str,
        texts: Sequence[str],
        limit: int,
        truncate: Truncate,
        special: bool = True,
    ) -> Iterator[tuple[TokenIds, bool]]:
        """Yield the ids of each text after `before`, and whether they are of the whole text.

        Of a very long text they are enough for `_cut`.
        """
        enough = limit + _MARGIN
        characters = _CHARACTERS_PER_TOKEN * enough
        parts = [shorten(text, characters, truncate) for text in texts]
        encodings = self._tokenizer.encode_batch_fast(
            [before + part for part in parts], add_special_tokens=special
        )
        for text, first, encoding in zip(texts, parts, encodings, strict=True):
            part, ids, length = first, encoding.ids, characters
            while part is not text and len(ids) < enough:
                length = length * max(2, 1 + enough // (len(ids) + 1))
                part = shorten(text, length, truncate)
                ids = self._tokenizer.encode(before + part, add_special_tokens=special).ids
            yield np.array(ids, np.int32), part is text


def _count_equal(a: Sequence[int], b: Sequence[int]) -> int:
    """Return the number of ids in which the beginnings of two sequences are equal."""
    same = [x == y for x, y in zip(a, b, strict=False)]
    return same.index(False) if False in same else len(same)


def shorten(text: str, length: int, truncate: Truncate) -> str:
    """Return the beginning of a very long text, or its end for "START", cut at white space.

    The part has at least `length` characters. Its tokens are those of the whole text, except up to
    `_MARGIN` tokens next to the cut. With "START", a run of one character or of digits across the
    cut may be split into other tokens than in the whole text.
    """
    if len(text) <= length + _MAX_WORD:
        return text
    if truncate == "START":
        begin = len(text) - length
        space = _SPACE.search(text, begin - _MAX_WORD, begin)
        return text[space.start() if space else begin :]
    space = _SPACE.search(text, length, length + _MAX_WORD)
    return text[: space.start() if space else length]


def _cut(
    ids: TokenIds, kept: int, limit: int, truncate: Truncate, is_whole: bool
) -> TokenIds | InputTooLongError:
    """Return `limit` of the ids with the first `kept`, or for "NONE" an error."""
    if truncate == "END":
        return ids[:limit]
    if truncate == "START":
        return np.concatenate([ids[:kept], ids[len(ids) - (limit - kept) :]])
    tokens = len(ids) if is_whole else len(ids) - _MARGIN
    return InputTooLongError(
        f"has {'' if is_whole else 'over '}{tokens} tokens; the limit is {limit}; split it, or use "
        'truncate="END" to cut it off there',
        tokens=tokens,
        limit=limit,
    )


def _hide_image_tokens(content: str) -> tuple[str, list[str]]:
    """Return a tokenizer.json with random names for the image tokens, and the names.

    Then `<IMG_CONTEXT>` in a text is ordinary text and cannot move an image.
    """
    parsed = json.loads(content)
    names = {name: f"{name}{secrets.token_hex(16)}" for name in _IMAGE_TOKENS}
    for token in parsed.get("added_tokens") or ():
        token["content"] = names.get(token["content"], token["content"])
    return json.dumps(parsed), list(names.values())
