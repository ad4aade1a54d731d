"""Configs of models at their real shape, without weights."""

from __future__ import annotations

from shared_engine.local.config import ModelConfig

SHAPES = {"300M": (9, 3840), "1B": (16, 8192), "tiny": (2, 128)}


def config(name: str) -> ModelConfig:
    layers, inner = SHAPES[name]
    return ModelConfig.model_validate(
        {
            "vocab_size": 128_256,
            "hidden_size": 2048,
            "intermediate_size": inner,
            "num_hidden_layers": layers,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "head_dim": 64,
            "max_position_embeddings": 131_072,
            "rope_theta": 5e5,
        }
    )
