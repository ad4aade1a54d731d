"""Text to token ids, with the prefix of its role and cut to the limit where that is asked for."""

from __future__ import annotations

import itertools
import json
import re
import secrets
import unicodedata
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

TEXTS_AT_ONCE, CHARACTERS_AT_ONCE = 256, 2**19
"""Of one call of the library, which holds some 70 bytes for a character meanwhile."""
_CHARACTERS_PER_TOKEN = 16
"""Of a huge text, so many are tokenised for each token of the limit, and more if they are few."""
_MARGIN = 512
"""Tokens beside a cut that may be others than those of the whole text."""
_GUARD = 128
"""Characters beside a cut that are looked at, and stay; no usual token has more."""
_UNIT = 3 * 128
"""Periods of a run that can be left out: digits go by threes, all else by powers of two."""
_SLACK = 2 * _UNIT * _GUARD
"""Characters over those that are enough up to which a text stays whole."""
_MOST_RUNS, _QUIET = 8, 4
"""Runs that are followed back at most, and so many times `_GUARD` without one are the end of it."""
_BLOCK = 4096
"""Characters that are compared at once."""
_SPACE = re.compile(r"[^\S\x1c-\x1f]*")  # which are white space to Python only
_IMAGE_TOKENS = ("<img>", "<IMG_CONTEXT>", "</img>")


@contextmanager
def _panics_as_errors() -> Iterator[None]:
    """Let a panic of the library, which is no Exception, be one: a worker would end of it."""
    try:
        yield
    except BaseException as exc:
        if type(exc).__name__ != "PanicException":
            raise
        raise RuntimeError(f"the tokenizers library panicked: {exc}") from None


class TextTokenizer:
    """The checkpoint's own tokenizer.json, read by the tokenizers library; safe to share."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        """Read tokenizer.json.

        Raises:
            CheckpointError: the file is missing, not a tokenizer, or one of another vocabulary.
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
                # What truncation keeps: BOS and prefix, whose last space joins the first word.
                self._kept = {
                    role: self._tokenizer.encode(prompt.rstrip()).ids
                    for role, prompt in checkpoint.prompts.items()
                }
        except Exception as exc:  # the library raises a bare Exception
            raise CheckpointError(f"{path} cannot be read: {exc}") from exc
        if dropout := getattr(self._tokenizer.model, "dropout", None):
            refuse(path, "model.dropout", dropout, "null, as ids would differ each time")
        self.limit = checkpoint.max_tokens
        self.limit_with_image = checkpoint.max_tokens_with_image
        self._bos = checkpoint.config.bos_token_id or 0
        self._prompts = checkpoint.prompts
        vocabulary = self._tokenizer.get_vocab().values()
        self.size = 1 + max([*vocabulary, *itertools.chain(*self._kept.values())], default=-1)
        rows = max(checkpoint.config.vocab_size, len(vocabulary))
        if self.size > rows:
            raise CheckpointError(
                f"{path} has a token of id {self.size - 1}; expected ids below {rows}, as "
                "config.json's vocab_size and the number of tokens say"
            )
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

    @_panics_as_errors()
    def encode(
        self, texts: Sequence[str], role: Role, truncate: Truncate
    ) -> list[TokenIds | InputTooLongError]:
        """Return the ids of every text, BOS and prefix included: at most `limit`, or an error.

        The prefix always goes before the text, also where the text begins with the same word. Where
        a checkpoint has neither prefix nor BOS, an empty text is a lone BOS. Over the limit, "END"
        drops tokens from the end of the text, "START" from its beginning, as a NIM does; BOS and
        prefix stay. "NONE" gives an error in the place of the ids.
        """
        out: list[TokenIds | InputTooLongError] = []
        for some in self._split(texts):
            for ids, is_whole in self._encode(self._prompts[role], some, self.limit, truncate):
                if len(ids) > self.limit:
                    kept = self._count_kept(ids, role)
                    out.append(_cut(ids, kept, self.limit, truncate, is_whole))
                else:
                    out.append(ids if len(ids) else np.array([self._bos], np.int32))
        return out

    @_panics_as_errors()
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
        room = limit - len(image)
        ((words, is_whole),) = self._encode(" ", [text], room, truncate, special=False)
        ids = np.concatenate([image, words])
        if len(ids) <= limit:
            return ids
        cut = _cut(ids, len(image), limit, truncate, is_whole)
        if isinstance(cut, InputTooLongError):
            raise cut
        return cut

    def _split(self, texts: Sequence[str]) -> Iterator[list[str]]:
        """Give the texts in portions of what one call of the library may have."""
        most = _CHARACTERS_PER_TOKEN * (self.limit + _MARGIN) + _SLACK
        some: list[str] = []
        room = CHARACTERS_AT_ONCE
        for text in texts:
            length = min(len(text), most)
            if some and (len(some) == TEXTS_AT_ONCE or room < length):
                yield some
                some, room = [], CHARACTERS_AT_ONCE
            some.append(text)
            room -= length
        if some:
            yield some

    def _encode(
        self,
        before: str,
        texts: Sequence[str],
        limit: int,
        truncate: Truncate,
        special: bool = True,
    ) -> Iterator[tuple[TokenIds, bool]]:
        """Give the ids of `before` with each text, and whether they are of all of it.

        Of a huge text they are enough to `_cut`.
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

    def _count_kept(self, ids: TokenIds, role: Role) -> int:
        """Return how many of the first ids truncation keeps: those of BOS and prefix."""
        kept = self._kept[role][: self.limit]
        same = [a == b for a, b in zip(kept, ids.tolist(), strict=False)]
        return same.index(False) if False in same else len(same)


def shorten(text: str, length: int, truncate: Truncate) -> str:
    """Return a part of a huge text whose tokens begin, or with "START" end, as those of the text.

    It has at least so many characters; a text of not many more is returned as it is. Beside the cut
    `_MARGIN` tokens may be others than those of the text, where a word or a special token was cut.

    Before a cut at the end one thing counts however far away it is: whether the white space ends
    with a line break. After one at the start, it is how far a run has gone: digits go by threes,
    and a run of one token is merged in twos from its beginning, and twos of twos, whose last may
    take from what follows. So the text is followed back to where no run is, and of every run a
    multiple of that is left out. Two different tokens are merged wherever they meet, in order of
    rank: what was cut off changes one more token only by a merge of a higher rank than the one
    before, and of those no known vocabulary has a chain of `_MARGIN`.
    """
    if len(text) <= length + _SLACK:
        return text
    if truncate != "START":
        rest = _SPACE.match(text, length)
        end = rest.end() if rest else length
        is_broken = any(text.find(mark, length, end) >= 0 for mark in "\n\r")
        return text[:length] + "\n" * is_broken + text[end : end + _GUARD]
    begin = len(text) - length
    parts, runs, quiet = [text[begin:]], 0, 0
    while begin > _GUARD and runs < _MOST_RUNS and quiet < _QUIET:
        start, unit = _find_run(text, begin)
        if unit:
            left_out = max(0, (begin - start) // unit - 1) * unit
            runs, quiet = runs + 1, 0
        else:
            start, left_out, quiet = begin - _GUARD, 0, quiet + 1
        parts.append(text[start : begin - left_out])
        begin = start
    return text[: min(begin, _GUARD)] + "".join(reversed(parts))


def _find_run(text: str, end: int) -> tuple[int, int]:
    """Return where the run before `end` begins, and how many of its characters can be left out.

    It is a repetition or of digits; the number may be taken several times, and is 0 without a run.
    """
    last = text[max(0, end - _GUARD) : end]
    for period in range(1, _GUARD // 2 + 1):
        if last[period:] == last[:-period]:
            start = end - period
            for size in (_BLOCK, 1):
                while start >= size and (
                    text[start - size : start] == text[start - size + period : start + period]
                ):
                    start -= size
            return start, period * _UNIT
    start = end
    for size in (_GUARD, 1):
        while start >= size and _is_number(text[start - size : start]):
            start -= size
    return (start, _UNIT) if end - start >= _GUARD else (end, 0)


def _is_number(part: str) -> bool:
    """Return whether all are numbers to a pre-tokenizer's pattern, which 一 is not."""
    return part.isdecimal() or all(unicodedata.category(each)[0] == "N" for each in part)


def _cut(
    ids: TokenIds, kept: int, limit: int, truncate: Truncate, is_whole: bool
) -> TokenIds | InputTooLongError:
    """Return `limit` of more ids, the first `kept` among them, or the error of "NONE"."""
    if truncate == "END":
        return ids[:limit]
    if truncate == "START":
        return np.concatenate([ids[:kept], ids[len(ids) - (limit - kept) :]])
    tokens = len(ids) if is_whole else len(ids) - _MARGIN
    return InputTooLongError(
        f"has {'' if is_whole else 'over '}{tokens} tokens; the limit is {limit}. Split it, or set "
        'truncate="END" (or "START") to embed a part of it',
        tokens=tokens,
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
