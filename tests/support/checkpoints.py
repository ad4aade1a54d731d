"""Checkpoint folders with the files and tensor names of NVIDIA's text repos and random weights.

A fixture is a row of SHAPES; `build_checkpoint` writes it. Equal seeds give equal values for
tensors of equal name and size, so two layouts of one model must embed alike.
"""

from __future__ import annotations

import json
import math
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    import torch
    from tokenizers import Tokenizer

BOS, EOS = "<|begin_of_text|>", "<|end_of_text|>"  # the pad token is EOS; nothing appends it
PROMPTS = {"query": "query: ", "document": "passage: "}

# Published with Llama 3. Its order matters: contractions, words, up to three digits, punctuation.
LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)

# The published values but for the context, 8192 there: 64 puts frequencies of a head of 16 in
# every branch of the formula, and makes the scaling show in texts of ten tokens.
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "factor": 32.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}

# Of Nemotron-3, with an original length so small that it acts in short texts.
YARN_ROPE = {
    "rope_type": "yarn",
    "rope_theta": 1_000_000.0,
    "factor": 16.0,
    "original_max_position_embeddings": 32,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
    "llama_4_scaling_beta": 0.1,
}

# A linear layer of gain g turns inputs of size 1 into outputs of size g. At 2 attention scores
# spread by 4: peaked enough that mask, positions and prefix show in the mean of a long text, and
# float32 still gives vectors right to about 1e-6.
GAIN = 2.0

_CORPUS = """\
query: what is a retrieval model, and how does it embed a query?
passage: A retrieval model turns every passage and every query into a vector of numbers.
query: how many tokens are there in a document of 300 words?
passage: The tokens of a document are counted after the prefix has been added to the text.
The quick brown fox jumps over the lazy dog; the dog doesn't mind, and they're friends.
In 2024 the price rose by 12.5% to $1,234.56, and in 1999 it had fallen to 0.99.
def embed(texts: list[str]) -> list[list[float]]:\n    return [vector(text) for text in texts]
Die Anfrage wird mit den Dokumenten verglichen, und das beste Dokument steht oben.
La question est comparée aux documents, et le meilleur document est en tête de la liste.
La pregunta se compara con los documentos y el mejor documento aparece el primero.
La domanda viene confrontata con i documenti e il migliore compare per primo.
Вопросы сравниваются, документы сравниваются, и лучший документ стоит первым.
質問は文書と比較され、最も良い文書が最初に表示されます。
问题与文档进行比较。最好的文档排在最前面。
질문은 문서와 비교되고 가장 좋은 문서가 먼저 나옵니다.
تتم مقارنة السؤال بالوثائق وتظهر أفضل وثيقة أولا.
प्रश्न की तुलना दस्तावेज़ों से की जाती है और सबसे अच्छा दस्तावेज़ पहले आता है।
שאלה מושווית למסמכים והמסמך הטוב ביותר מופיע ראשון.
😀 😀 🎉 👍🏽 👩‍💻 emoji are text too 🎉
"""


@dataclass(frozen=True)
class Shape:
    """All that varies between fixtures."""

    hidden_size: int = 64
    intermediate_size: int = 160
    num_hidden_layers: int = 3
    num_attention_heads: int = 4
    num_key_value_heads: int = 2
    head_dim: int = 16
    vocab_size: int | None = None  # None: as many as the tokenizer has
    max_position_embeddings: int = 2048
    rms_norm_eps: float = 1e-5
    rope_theta: float = 500_000.0
    rope: Mapping[str, Any] | None = field(default_factory=lambda: dict(LLAMA3_ROPE), hash=False)
    # transformers 4 wrote rope_scaling and torch_dtype, 5 writes rope_parameters and dtype.
    rope_spelling: Literal["rope_scaling", "rope_parameters"] = "rope_scaling"
    tie_word_embeddings: bool = True
    key_prefix: Literal["", "model."] = ""
    shards: int = 1  # more than one writes model.safetensors.index.json
    with_lm_head: bool = False  # a tensor that no embedder uses
    with_rotary_buffers: bool = False  # rotary_emb.inv_freq, which old exports carry: wrong here
    dtype: Literal["bfloat16", "float16", "float32"] = "bfloat16"
    matryoshka_dimensions: tuple[int, ...] | None = None
    # Prompts for the sentence-transformers files, such as PROMPTS; None leaves the files out.
    prompts: Mapping[str, str] | None = field(default=None, hash=False)
    # Entries that replace those of config.json, for configs that must be refused.
    config: Mapping[str, Any] = field(default_factory=dict, hash=False)

    @property
    def vocabulary(self) -> int:
        """Rows of the embedding table."""
        return self.vocab_size or tokenizer().get_vocab_size()

    @property
    def parameters(self) -> int:
        """Parameters that an embedder uses."""
        return sum(math.prod(size) for size in text_sizes(self).values())


SHAPES: dict[str, Shape] = {
    "gqa": Shape(),
    "mha": Shape(num_key_value_heads=4),
    "one-kv-head": Shape(num_key_value_heads=1),
    "two-layers": Shape(
        hidden_size=96, num_attention_heads=6, num_key_value_heads=3, num_hidden_layers=2
    ),
    "wide-heads": Shape(head_dim=32),  # 4 heads of 32 on a hidden size of 64
    "narrow-heads": Shape(hidden_size=96, head_dim=16),  # 4 heads of 16 on a hidden size of 96
    "plain-rope": Shape(rope=None, rope_theta=10_000.0),
    "rope-parameters": Shape(rope_spelling="rope_parameters"),
    "plain-rope-parameters": Shape(rope=None, rope_theta=10_000.0, rope_spelling="rope_parameters"),
    "large-eps": Shape(rms_norm_eps=0.25),
    "untied": Shape(tie_word_embeddings=False, with_lm_head=True),
    "prefixed": Shape(key_prefix="model."),
    "sharded": Shape(shards=3),
    "training-export": Shape(
        key_prefix="model.", shards=2, with_lm_head=True, with_rotary_buffers=True, dtype="float32"
    ),
    "float16": Shape(dtype="float16"),
    "spare-rows": Shape(vocab_size=640),  # an embedding table longer than the tokenizer
    "sentence-transformers": Shape(prompts=PROMPTS, matryoshka_dimensions=(16, 32, 64)),
}

# Fits the published 569 million parameters, 307 without the table; the real file was not seen.
TRUE_300M = Shape(
    hidden_size=2048,
    intermediate_size=3840,
    num_hidden_layers=9,
    num_attention_heads=32,
    num_key_value_heads=8,
    head_dim=64,
    vocab_size=128_256,
    max_position_embeddings=131_072,
    rope={**LLAMA3_ROPE, "original_max_position_embeddings": 8192},
)


def build_checkpoint(
    folder: Path, shape: Shape = SHAPES["gqa"], seed: int = 0, **overrides: Any
) -> Path:
    """Write `shape`, with the fields named in `overrides` replaced, into `folder`; return it."""
    import torch

    shape = replace(shape, **overrides)
    _write_texts(folder, shape)
    tensors = {
        name: torch.cat(list(draw(shape, name, size, seed))).reshape(size)
        for name, size in file_sizes(shape).items()
    }
    save_tensors(folder, tensors, shape.shards)
    return folder


def true_shape_300m(folder: Path, seed: int = 0) -> Path:
    """Write a 1.1 GB checkpoint of the 300m model's likely shape, holding little in memory.

    The tokenizer is the tiny one: its ids are the first of the 128,256 rows.
    """
    _write_texts(folder, TRUE_300M)
    sizes = text_sizes(TRUE_300M)
    stream_bfloat16(folder, sizes, lambda name: draw(TRUE_300M, name, sizes[name], seed))
    return folder


def save_tensors(folder: Path, tensors: Mapping[str, torch.Tensor], shards: int) -> None:
    """Write tensors in the order given: one file, or several and their index."""
    from safetensors.torch import save_file

    if shards == 1:
        save_file(dict(tensors), folder / "model.safetensors", metadata={"format": "pt"})
        return
    names = list(tensors)
    weight_map: dict[str, str] = {}
    for shard in range(shards):  # runs of equal count, which cut layers in two
        part = names[shard * len(names) // shards : (shard + 1) * len(names) // shards]
        file = f"model-{shard + 1:05}-of-{shards:05}.safetensors"
        save_file({name: tensors[name] for name in part}, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    total = sum(tensor.nbytes for tensor in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    write_json(folder / "model.safetensors.index.json", index)


def stream_bfloat16(
    folder: Path,
    sizes: Mapping[str, tuple[int, ...]],
    values: Callable[[str], Iterator[torch.Tensor]],
) -> None:
    """Write one bfloat16 file from the chunks that `values` yields for each name of `sizes`."""
    import torch

    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, size in sizes.items():
        start, end = end, end + 2 * math.prod(size)
        header[name] = {"dtype": "BF16", "shape": size, "data_offsets": [start, end]}
    head = json.dumps(header).encode()
    head += b" " * (-len(head) % 8)  # the data starts on a multiple of 8
    with (folder / "model.safetensors").open("wb") as file:
        file.write(len(head).to_bytes(8, "little") + head)
        for name in sizes:
            for chunk in values(name):
                file.write(chunk.view(torch.uint8).numpy().data)


def rope_branches(shape: Shape) -> dict[str, int]:
    """Count the rotary frequencies of `shape` in each branch of Llama 3's scaling."""
    counts = {"unscaled": 0, "interpolated": 0, "scaled": 0}
    rope = shape.rope or {}
    for i in range(0, shape.head_dim, 2):
        wavelength = 2 * math.pi * shape.rope_theta ** (i / shape.head_dim)
        turns = rope.get("original_max_position_embeddings", math.inf) / wavelength
        if turns > rope.get("high_freq_factor", 0.0):
            counts["unscaled"] += 1
        elif turns < rope["low_freq_factor"]:
            counts["scaled"] += 1
        else:
            counts["interpolated"] += 1
    return counts


@cache
def tokenizer() -> Tokenizer:
    """Train a byte-level BPE of 512 entries with Llama 3's split, specials last, BOS in front."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    made = Tokenizer(models.BPE(ignore_merges=True))
    made.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(LLAMA3_SPLIT), behavior="isolated", invert=False),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    made.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=510,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    made.train_from_iterator(_CORPUS.splitlines(keepends=True), trainer)
    made.add_special_tokens([BOS, EOS])  # after training: their ids follow the words', as in Llama
    made.post_processor = processors.Sequence(
        [
            processors.ByteLevel(trim_offsets=False),
            processors.TemplateProcessing(
                single=f"{BOS} $A",
                pair=f"{BOS} $A {BOS}:1 $B:1",
                special_tokens=[(BOS, made.token_to_id(BOS))],
            ),
        ]
    )
    assert made.get_vocab_size() == 512, made.get_vocab_size()
    return made


def text_sizes(shape: Shape) -> dict[str, tuple[int, ...]]:
    """Name and size of each tensor that an embedder uses, in file order, without key_prefix."""
    hidden, mlp = shape.hidden_size, shape.intermediate_size
    queries = shape.num_attention_heads * shape.head_dim
    keys = shape.num_key_value_heads * shape.head_dim
    layer: dict[str, tuple[int, ...]] = {
        "input_layernorm": (hidden,),
        "self_attn.q_proj": (queries, hidden),
        "self_attn.k_proj": (keys, hidden),
        "self_attn.v_proj": (keys, hidden),
        "self_attn.o_proj": (hidden, queries),
        "post_attention_layernorm": (hidden,),
        "mlp.gate_proj": (mlp, hidden),
        "mlp.up_proj": (mlp, hidden),
        "mlp.down_proj": (hidden, mlp),
    }
    return {
        "embed_tokens.weight": (shape.vocabulary, hidden),
        **{
            f"layers.{i}.{name}.weight": size
            for i in range(shape.num_hidden_layers)
            for name, size in layer.items()
        },
        "norm.weight": (hidden,),
    }


def file_sizes(shape: Shape) -> dict[str, tuple[int, ...]]:
    """Name and size of each tensor as the file has them, with those that must be ignored."""
    sizes = {shape.key_prefix + name: size for name, size in text_sizes(shape).items()}
    if shape.with_rotary_buffers:
        for i in range(shape.num_hidden_layers):
            name = f"{shape.key_prefix}layers.{i}.self_attn.rotary_emb.inv_freq"
            sizes[name] = (shape.head_dim // 2,)
    if shape.with_lm_head:
        sizes["lm_head.weight"] = (shape.vocabulary, shape.hidden_size)
    return sizes


def draw(shape: Shape, name: str, size: tuple[int, ...], seed: int) -> Iterator[torch.Tensor]:
    """Yield the values of a tensor in flat chunks, drawn from a generator of its own."""
    import torch

    name = name.removeprefix("model.")
    generator = torch.Generator().manual_seed(zlib.crc32(f"{seed} {name}".encode()))
    count, step = math.prod(size), 1 << 24
    for start in range(0, count, step):
        chunk = torch.randn(min(step, count - start), generator=generator)
        if len(size) == 1:  # the norms' weights
            chunk = chunk.mul_(0.3).add_(1.0)
        elif name != "embed_tokens.weight":
            chunk = chunk.mul_(GAIN / math.sqrt(size[1]))
        yield chunk.to(getattr(torch, shape.dtype))


def _write_texts(folder: Path, shape: Shape) -> None:
    """Write everything but the weights."""
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "config.json", config_json(shape))
    write_tokenizer(folder, tokenizer(), shape.max_position_embeddings)
    if shape.prompts is not None:
        _write_sentence_transformers(folder, shape, shape.prompts)


def write_tokenizer(folder: Path, made: Tokenizer, limit: int, **config: Any) -> None:
    """Write the three files of a tokenizer; `config` adds to tokenizer_config.json."""
    made.save(str(folder / "tokenizer.json"))
    plain = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False}
    tokens = {"bos_token": BOS, "eos_token": EOS, "pad_token": EOS}
    specials = {key: {"content": token, **plain} for key, token in tokens.items()}
    write_json(folder / "special_tokens_map.json", specials)
    added = {
        str(number): {"content": token.content, **plain, "special": True}
        for number, token in made.get_added_tokens_decoder().items()
    }
    config = {
        "added_tokens_decoder": added,
        **tokens,
        "clean_up_tokenization_spaces": True,
        "model_input_names": ["input_ids", "attention_mask"],
        "model_max_length": limit,
        **config,
        "tokenizer_class": "PreTrainedTokenizerFast",
    }
    write_json(folder / "tokenizer_config.json", config)


def config_json(shape: Shape) -> dict[str, Any]:
    """Return config.json, with the fields and the constants of the public 1b sibling."""
    if (shape.rope or {}).get("rope_type") == "llama3":
        assert all(rope_branches(shape).values()), rope_branches(shape)
    code = "llama_bidirectional_model.LlamaBidirectional"  # a file that is not there: never run it
    old = shape.rope_spelling == "rope_scaling"
    rope = dict(shape.rope) if shape.rope else None
    config: dict[str, Any] = {
        "architectures": ["LlamaBidirectionalModel"],
        "attention_bias": False,
        "attention_dropout": 0.0,
        "auto_map": {"AutoConfig": f"{code}Config", "AutoModel": f"{code}Model"},
        "bos_token_id": tokenizer().token_to_id(BOS),
        "eos_token_id": tokenizer().token_to_id(EOS),
        "head_dim": shape.head_dim,
        "hidden_act": "silu",
        "hidden_size": shape.hidden_size,
        "initializer_range": 0.02,
        "intermediate_size": shape.intermediate_size,
        "max_position_embeddings": shape.max_position_embeddings,
        "mlp_bias": False,
        "model_type": "llama_bidirec",
        "num_attention_heads": shape.num_attention_heads,
        "num_hidden_layers": shape.num_hidden_layers,
        "num_key_value_heads": shape.num_key_value_heads,
        "pooling": "avg",
        "pretraining_tp": 1,
        "rms_norm_eps": shape.rms_norm_eps,
        "temperature": 1.0,
        "tie_word_embeddings": shape.tie_word_embeddings,
        "transformers_version": "4.44.2" if old else "5.23.0",
        "use_cache": True,
        "vocab_size": shape.vocabulary,
    }
    if old:
        config |= {"rope_theta": shape.rope_theta, "rope_scaling": rope, "torch_dtype": shape.dtype}
    else:
        rope = {**(rope or {"rope_type": "default"}), "rope_theta": shape.rope_theta}
        config |= {"rope_parameters": rope, "dtype": shape.dtype}
    if shape.matryoshka_dimensions is not None:
        config["matryoshka_dimensions"] = list(shape.matryoshka_dimensions)
    return dict(sorted({**config, **shape.config}.items()))


def _write_sentence_transformers(folder: Path, shape: Shape, prompts: Mapping[str, str]) -> None:
    """Write the files that make a folder a sentence-transformers model."""
    kinds = {"Transformer": "", "Pooling": "1_Pooling", "Normalize": "2_Normalize"}
    modules = [
        {"idx": i, "name": str(i), "path": path, "type": f"sentence_transformers.models.{kind}"}
        for i, (kind, path) in enumerate(kinds.items())
    ]
    write_json(folder / "modules.json", modules)
    (folder / "1_Pooling").mkdir(exist_ok=True)
    pooling = {
        "word_embedding_dimension": shape.hidden_size,
        "pooling_mode_cls_token": False,
        "pooling_mode_mean_tokens": True,
        "include_prompt": True,
    }
    write_json(folder / "1_Pooling" / "config.json", pooling)
    limit = {"max_seq_length": shape.max_position_embeddings, "do_lower_case": False}
    write_json(folder / "sentence_bert_config.json", limit)
    config = {
        "__version__": {"sentence_transformers": "5.1.0"},
        "prompts": dict(prompts),
        "default_prompt_name": None,
        "similarity_fn_name": "cosine",
    }
    write_json(folder / "config_sentence_transformers.json", config)


def write_json(path: Path, content: Any) -> None:
    """Write JSON the way transformers does."""
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
