"""What an H200 is expected to give, and no GPU has confirmed: worked out, not measured.

From 790 TFLOP/s of matrix product and 4.3 TB/s of memory: products of the models' shapes at 0.76 to
0.86 of the peak, fused elementwise kernels at 0.72 to 0.88 of the bandwidth, flash attention 2 at
230 to 330 TFLOP/s. Explain a figure outside its range before anything is changed.
"""

EXPECTED: dict[str, dict[str, tuple[float, float]]] = {
    "machine": {
        "copy": (4.0, 4.6),
        "product, square": (700, 800),
        "product, 300m gate_up": (620, 680),
        "product, 1b gate_up": (620, 680),
        "product in fp8, 1b gate_up": (1_000, 1_250),
        "attention, 512 tokens": (230, 330),
        "attention, 8,192 tokens": (230, 330),
    },
    "tests": {"failed": (0, 0)},
    "300m": {
        "step, 512 tokens": (742, 869),
        "step, 16 to 512 tokens": (800, 924),
        "step, 8,192 tokens": (262, 349),
        "step, 512 tokens, share of the peak": (0.60, 0.72),
        "full step": (20, 26),
        "texts, 512 tokens": (700, 869),
        "texts, 16 to 512 tokens": (740, 924),
        "texts, 8,192 tokens": (250, 349),
        "query alone, p50": (0.7, 1.0),
        "query without graph, p50": (1.3, 2.3),
        "query during an ingest, p99": (1, 50),
        "the ingest keeps": (0.85, 1.05),
        "step, 512 tokens, torch's operators": (630, 782),
    },
    "pages": {
        "1 tile": (267, 319),
        "1 tile, share of the peak": (0.50, 0.60),
        "7 tiles": (37, 44),
        "7 tiles, share of the peak": (0.50, 0.60),
    },
    "peers": {
        "sentence-transformers, padded": (130, 250),
        "sentence-transformers, without padding": (250, 400),
        "times sentence-transformers": (2, 6),
    },
    "1b": {
        "step, 512 tokens": (253, 293),
        "step, 16 to 512 tokens": (253, 300),
        "step, 8,192 tokens": (120, 155),
        "step, 512 tokens, share of the peak": (0.63, 0.75),
        "full step": (21, 27),
        "texts, 512 tokens": (240, 293),
        "query alone, p50": (1.2, 1.5),
        "rerank 40 candidates of 256 tokens": (40, 60),
        "step, 512 tokens, torch's operators": (215, 265),
    },
    "fresh": {"first vector": (6, 15)},
    "fp8": {
        "step, 512 tokens": (994, 1_261),
        "step, 16 to 512 tokens": (1_101, 1_380),
    },
}
"""By group and figure, in the unit that the figure is printed with."""
