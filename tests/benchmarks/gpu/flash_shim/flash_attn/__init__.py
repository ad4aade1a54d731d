"""The functions of flash-attn 2 that transformers calls, over torch's own flash kernel.

With it sentence-transformers pads nothing, so the comparison is with its fastest form.
"""

import torch


def flash_attn_varlen_func(  # noqa: PLR0917
    q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p=0.0,
    softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0, alibi_slopes=None,
    deterministic=False, return_attn_probs=False, block_table=None,
):  # fmt: skip
    """Attend within each sequence of packed rows (T, heads, d)."""
    assert not any((causal, dropout_p, softcap))
    assert tuple(window_size) == (-1, -1)
    ends = (cu_seqlens_q.int(), cu_seqlens_k.int(), int(max_seqlen_q), int(max_seqlen_k))
    options = (0.0, False, False)
    return torch.ops.aten._flash_attention_forward(q, k, v, *ends, *options, scale=softmax_scale)[0]


def flash_attn_func(  # noqa: PLR0917
    q, k, v, dropout_p=0.0, softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0,
    alibi_slopes=None, deterministic=False, return_attn_probs=False,
):  # fmt: skip
    """Attend within each row of a batch (batch, length, heads, d)."""
    assert not any((causal, dropout_p, softcap))
    assert tuple(window_size) == (-1, -1)
    options = (None, None, q.shape[1], k.shape[1], 0.0, False, False)
    return torch.ops.aten._flash_attention_forward(q, k, v, *options, scale=softmax_scale)[0]


def flash_attn_with_kvcache(*_, **__):
    """No embedding model calls it, but transformers imports it."""
    raise NotImplementedError
