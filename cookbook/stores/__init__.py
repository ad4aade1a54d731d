"""Recipes: the output of `nemoretriever embed` into vector stores, and searched from there.

Each file stands alone, but for `rows.py` and `retrievers.py`. Vectors go from Parquet to the store
as Arrow or numpy arrays of float32, a batch at a time; those of int8 and uint8 are scaled to unit
length, and packed bits are refused. Loading again, or more, is safe: a row replaces that of its id.
"""
