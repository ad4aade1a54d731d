"""Files of documents to files of vectors, on one machine or many."""
