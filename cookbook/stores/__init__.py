"""Recipes: the output of `nemoretriever embed` into vector stores, and searched from there.

Each file stands alone, but for `retrievers.py`. Vectors go from Parquet to the store as Arrow or
numpy arrays, a batch at a time. Loading again, or more, is safe: a row replaces that of its id.
"""
