"""Nemotron-3.5-Embed: texts and images against transformers' own `Mistral3Model`.

The original length is 32, so that YaRN and the scale of queries act in short inputs.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, normalizers
from transformers import Ministral3Config, Mistral3Config, Mistral3Model, PixtralVisionConfig
from transformers.models.mistral3 import modeling_mistral3
from transformers.models.pixtral import modeling_pixtral
from transformers.models.pixtral.image_processing_pil_pixtral import PixtralImageProcessorPil

from shared_engine import CheckpointError, Embedder, EmbeddingInput, ImageTooLargeError, Options
from shared_engine.catalogue import lookup
from shared_engine.cli.main import main
from shared_engine.images.tiles import choose_size, resize_image
from shared_engine.local.checkpoint import resolve
from shared_engine.local.tokenizer import TextTokenizer
from tests.support.checkpoints import YARN_ROPE, tokenizer, write_json, write_tokenizer
from tests.support.vl_checkpoints import page

IMG, BREAK, END = "[IMG]", "[IMG_BREAK]", "[IMG_END]"
LONGEST = 150  # not a multiple of 28, so sides are made smaller and rounded up
PICTURES = [page(0, 131, 67), page(1, 57, 28), page(2, 301, 17), page(3, 90, 400)]
INPUTS = [
    EmbeddingInput("A text."),
    EmbeddingInput("many words " * 60),
    *[EmbeddingInput(image=picture) for picture in PICTURES],
    EmbeddingInput("  A page about [IMG] and <s>. \n", PICTURES[0]),
    EmbeddingInput("The quick brown fox jumps over the lazy dog. " * 4, PICTURES[3]),
]
HOSTILE = f"{IMG}{IMG}{BREAK}{END}[INST]<s></s> [[IMG]] and {IMG} in the middle, [\u200c by a user "


def build(folder: Path, **changes: Any) -> Path:
    """Write a checkpoint as transformers saves it, with the files of its processor."""
    torch.manual_seed(0)
    made = Tokenizer.from_str(tokenizer().to_str())
    made.add_special_tokens([IMG, BREAK, END, "[INST]", "<s>", "</s>"])
    # The characters that the checkpoint's processor puts after brackets, to be removed again.
    made.normalizer = normalizers.Sequence(
        [normalizers.Replace(f"{bracket}\u200c", bracket) for bracket in "[<"]
    )
    text = Ministral3Config(
        vocab_size=made.get_vocab_size(),
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=3,
        num_attention_heads=3,
        num_key_value_heads=1,
        head_dim=32,
        max_position_embeddings=2048,
        rope_parameters=YARN_ROPE,
        bos_token_id=0,
        pad_token_id=None,
        is_causal=False,
    )
    vision = PixtralVisionConfig(
        hidden_size=48,
        intermediate_size=80,
        num_hidden_layers=2,
        num_attention_heads=3,
        patch_size=14,
        hidden_act="silu",
    )
    config = Mistral3Config(
        text_config=text, vision_config=vision, image_token_index=made.token_to_id(IMG)
    )
    model = Mistral3Model(config)
    for name, weight in model.named_parameters():
        if weight.ndim > 1 and "embed" not in name:
            torch.nn.init.normal_(weight, std=2 / math.sqrt(weight[0].numel()))
        elif weight.ndim == 1:
            torch.nn.init.normal_(weight, 1.0, 0.3)
        else:
            torch.nn.init.normal_(weight)
    model.save_pretrained(folder)
    write_tokenizer(folder, made, 2048)
    processor = PixtralImageProcessorPil(size={"longest_edge": LONGEST}).to_dict()
    write_json(
        folder / "processor_config.json",
        {"image_processor": processor, "patch_size": 14, "spatial_merge_size": 2},
    )
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(tmp_path_factory.mktemp("pixtral"))


def prepare(made: Tokenizer, item: EmbeddingInput, prefix: str) -> tuple[list[int], Any]:
    """Return ids and pixels, as the checkpoint's processor makes them."""
    text = item.text or ""
    for bracket in "[<":
        text = text.replace(bracket, f"{bracket}\u200c")
    pixels = None
    if item.image is not None:
        processor = PixtralImageProcessorPil(
            size={"longest_edge": LONGEST}, patch_size={"height": 28, "width": 28}
        )
        pixels = processor(item.image, return_tensors="pt")
        height, width = pixels["image_sizes"][0]
        lines = [f"{IMG * (width // 28)}{BREAK}"] * (height // 28)
        text = f"{''.join(lines).removesuffix(BREAK)}{END} {text}"
    return made.encode((prefix + text).strip()).ids, pixels


def expected(folder: Path, items: list[EmbeddingInput], prefix: str = "passage: ") -> np.ndarray:
    """Embed with transformers' class in float64, one input at a time."""
    model = Mistral3Model.from_pretrained(folder, dtype=torch.float64)
    made = Tokenizer.from_file(str(folder / "tokenizer.json"))
    vectors = []
    for item in items:
        ids, pixels = prepare(made, item, prefix)
        inputs = {name: value.double() for name, value in (pixels or {}).items()}
        if pixels:
            inputs["image_sizes"] = pixels["image_sizes"]
        with torch.inference_mode():
            states = model(torch.tensor([ids]), use_cache=False, **inputs).last_hidden_state
        vectors.append(torch.nn.functional.normalize(states[0].mean(0), dim=0).numpy())
    return np.stack(vectors)


def embed(folder: Path, items: Any = INPUTS, role: Any = "document", **options: Any) -> Any:
    options = {"device": "cpu", "dtype": "float32", **options}
    with Embedder(Options(model=str(folder), **options)) as embedder:
        return embedder.embed(items, role)


def test_vectors_equal_those_of_transformers(folder):
    np.testing.assert_allclose(embed(folder), expected(folder, INPUTS), atol=1e-5)
    texts = ["A question?", "", HOSTILE]
    queries = [EmbeddingInput(text) for text in texts]
    np.testing.assert_allclose(
        embed(folder, texts, "query"), expected(folder, queries, "query: "), atol=1e-5
    )


def test_a_vector_does_not_depend_on_other_inputs(folder):
    inputs = [*INPUTS, EmbeddingInput(image=page(4, 10, 10))]  # one token
    together = embed(folder, inputs * 2, max_batch_tokens=4096)
    alone = np.concatenate([embed(folder, [item]) for item in inputs])
    np.testing.assert_allclose(together, np.concatenate([alone] * 2), atol=1e-5)


def test_bfloat16_is_near(folder):
    vectors = embed(folder, dtype="bfloat16")
    assert (vectors * embed(folder)).sum(1).min() > 0.995


def causal(monkeypatch: pytest.MonkeyPatch) -> None:
    change = Mistral3Model.__init__

    def init(self, config):
        config.text_config.is_causal = True
        change(self, config)

    monkeypatch.setattr(Mistral3Model, "__init__", init)


def one_image(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows of an image at other places: columns before rows."""
    forward = modeling_pixtral.PixtralVisionRotaryEmbedding.forward
    monkeypatch.setattr(
        modeling_pixtral.PixtralVisionRotaryEmbedding,
        "forward",
        lambda self, x, position_ids: forward(self, x, position_ids.flip(-1)),
    )


def no_merger_norm(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(modeling_mistral3.Mistral3RMSNorm, "forward", lambda self, x: x)


def no_break_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(prepare.__globals__, "BREAK", "")


def no_query_scale(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "transformers.models.ministral3.modeling_ministral3.get_llama_4_attn_scale",
        lambda *_: torch.ones(()),
    )


def other_order_of_merging(monkeypatch: pytest.MonkeyPatch) -> None:
    unfold = torch.nn.functional.unfold

    def changed(grid, kernel_size, stride):
        out = unfold(grid, kernel_size=kernel_size, stride=stride)
        return out.view(1, -1, 4, out.shape[-1]).transpose(1, 2).reshape(out.shape)

    monkeypatch.setattr(torch.nn.functional, "unfold", changed)


@pytest.mark.parametrize(
    "mistake",
    [causal, one_image, no_merger_norm, no_break_tokens, no_query_scale, other_order_of_merging],
)
def test_a_mistake_would_show(mistake, folder, monkeypatch):
    item = [EmbeddingInput("The quick brown fox jumps. " * 6, PICTURES[0])]
    right = embed(folder, item)
    mistake(monkeypatch)
    assert np.abs(expected(folder, item) - right).max() > 1e-3


@pytest.mark.parametrize(
    "size", [(131, 67), (28, 28), (29, 27), (1, 1), (1000, 999), (37, 1213), (150, 149)]
)
def test_pixels_equal_those_of_the_image_processor(size):
    picture = page(5, *size)
    theirs = PixtralImageProcessorPil(
        size={"longest_edge": LONGEST}, patch_size={"height": 28, "width": 28}
    )(picture, return_tensors="np", do_normalize=False, do_rescale=False)
    ours = resize_image(picture, LONGEST, 28)
    np.testing.assert_array_equal(ours.transpose(0, 3, 1, 2), theirs["pixel_values"])


def test_an_image_of_extreme_proportions_keeps_one_token_per_side(folder):
    assert choose_size(16_384, 3, LONGEST, 28) == (168, 28)
    line = Image.new("RGB", (2000, 3), "red")
    assert np.isfinite(embed(folder, [EmbeddingInput(image=line)])).all()


def test_a_text_cannot_contain_the_tokens_of_an_image(folder):
    made = TextTokenizer(resolve(Options(model=str(folder))))
    plain = Tokenizer.from_file(str(folder / "tokenizer.json"))
    special = {plain.token_to_id(token) for token in (IMG, BREAK, END, "[INST]", "<s>", "</s>")}
    (ids,) = made.encode([HOSTILE], "document", "NONE")
    assert not special & set(ids.tolist())
    assert special & set(plain.encode(HOSTILE).ids)  # which would be read otherwise
    image = resize_image(PICTURES[0], LONGEST, 28)
    with_text = made.encode_with_image(image, HOSTILE, "NONE").tolist()
    alone = made.encode_with_image(image, "", "NONE").tolist()
    assert with_text[: len(alone)] == alone
    assert not special & set(with_text[len(alone) :])
    _, height, width, _ = image.shape
    assert alone.count(plain.token_to_id(IMG)) == height // 28 * (width // 28)
    assert alone.count(plain.token_to_id(BREAK)) == height // 28 - 1
    assert alone[-1] == plain.token_to_id(END)


def test_an_image_over_the_limit_is_refused(folder):
    with pytest.raises(
        ImageTooLargeError, match="has an image of 22 tokens; the limit is 20; use a smaller image"
    ):
        embed(folder, [EmbeddingInput(image=PICTURES[0])], max_tokens=20)


def test_the_reference_agrees(folder, capsys):
    assert main(["check", "--model", str(folder), "--reference", "--dtype", "float32"]) == 0
    printed = capsys.readouterr().out
    assert f"images of at most {LONGEST} pixels per side" in printed
    assert "\nimage: cosine 0.99999" in printed or "\nimage: cosine 1.0" in printed


def change_config(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    def apply(folder: Path, name: str = "config.json") -> None:
        content = json.loads((folder / name).read_text(encoding="utf-8"))
        change(content)
        write_json(folder / name, content)

    return apply


def change_processor(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    apply: Any = change_config(change)
    return lambda folder: apply(folder, "processor_config.json")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            change_config(lambda config: config["text_config"].pop("is_causal")),
            r"text_config\.is_causal is missing",
        ),
        (
            change_config(lambda config: config["vision_config"].update(hidden_act="gelu")),
            r"vision_config\.hidden_act is 'gelu'; expected 'silu'",
        ),
        (
            change_config(lambda config: config.update(vision_feature_layer=-2)),
            "vision_feature_layer is -2",
        ),
        (
            change_config(lambda config: config.update(spatial_merge_size=1)),
            "spatial_merge_size is 1; expected 2",
        ),
        (
            change_config(lambda config: config.update(image_token_index=3)),
            r"expected three ids, that of \[IMG\] 3",
        ),
        (
            change_processor(lambda config: config["image_processor"].pop("size")),
            r"size\.longest_edge is None; expected pixels",
        ),
        (
            change_processor(lambda config: config["image_processor"].update(resample=2)),
            r"image_processor\.resample is 2; expected 3",
        ),
        (
            change_processor(lambda config: config["image_processor"].update(image_mean=[0.5] * 3)),
            r"image_processor\.image_mean is",
        ),
        (
            change_processor(lambda config: config.update(patch_size=16)),
            "patch_size is 16; expected 14",
        ),
    ],
)
def test_a_model_that_is_computed_otherwise_is_refused(change, message, tmp_path):
    folder = build(tmp_path)
    change(folder)
    with pytest.raises(CheckpointError, match=message):
        embed(folder)


def test_another_layout_of_the_same_model_is_read(folder, tmp_path):
    """Other names of tensors, a file of its own for images, and `rope_theta` of the tower."""
    old = shutil.copytree(folder, tmp_path / "old")
    tensors = {
        f"model.{name.replace('language_model.model.', 'language_model.')}": tensor
        for name, tensor in load_file(old / "model.safetensors").items()
    }
    save_file(tensors, old / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((old / "config.json").read_text(encoding="utf-8"))
    theta = config["vision_config"].pop("rope_parameters")["rope_theta"]
    config["vision_config"]["rope_theta"] = theta
    write_json(old / "config.json", config)
    path = old / "processor_config.json"
    processor = json.loads(path.read_text(encoding="utf-8"))
    write_json(old / "preprocessor_config.json", processor.pop("image_processor"))
    write_json(path, processor)
    # Which images share a step depends on when they are prepared, and rounding on that.
    np.testing.assert_allclose(embed(old), embed(folder), rtol=0, atol=1e-6)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU here")
@pytest.mark.parametrize(("dtype", "least"), [("float32", 0.999999), ("bfloat16", 0.999)])
def test_a_gpu_gives_the_same_vectors(folder, dtype, least):
    ours = embed(folder, device="cuda", dtype=dtype)
    assert (ours * expected(folder, INPUTS)).sum(1).min() >= least


def test_max_tiles_is_refused(folder):
    with pytest.raises(CheckpointError, match="max_tiles is 6; expected None, as images are not"):
        embed(folder, max_tiles=6)


def test_the_published_number_of_parameters_follows_from_the_shapes():
    """1,554,710,528: that of the text model, the tower and the connector."""
    spec = lookup("nvidia/Nemotron-3.5-Embed-1B-BF16")
    assert spec.is_multimodal
    rope = {**YARN_ROPE, "original_max_position_embeddings": 16_384}
    text = Ministral3Config(
        vocab_size=131_072,
        hidden_size=spec.hidden_size,
        intermediate_size=6144,
        num_hidden_layers=spec.num_hidden_layers,
        num_attention_heads=24,
        num_key_value_heads=8,
        head_dim=128,
        rope_parameters=rope,
    )
    vision = PixtralVisionConfig(patch_size=14, hidden_act="silu")
    with torch.device("meta"):
        model = Mistral3Model(Mistral3Config(text_config=text, vision_config=vision))
    assert sum(weight.numel() for weight in model.parameters()) == 1_554_710_528
