"""Tell whether a search found an answer, by questions that no document answers.

The cosine of a question and the passage nearest to it differs between models, sets of documents and
sizes of passages: of a question from elsewhere it was up to 0.46 in this package's handbook, 0.33
in a manual of R, and 0.49 in the short passages of `make pages`. So the bound is measured: the
questions of ELSEWHERE are searched for too, and an answer is nearer to its question than their
passages are to them.

Refused, of 24 other questions from elsewhere and of those that the documents answer, in the
handbook, a FAQ of R and the manual:

    make rag, the stand-in           21, 21 and 23 of 24      3 of 95, 0 of 20, 0 of 20
    make rag, all-MiniLM-L6-v2       24, 24 and 24 of 24      1 of 95, 0 of 20, 0 of 20
    make pages, the stand-in              24 and 24 of 24               0 of 20, 0 of 20

A question of the same field that the documents do not answer is nearer: of 36, `make rag` refused 7
with the stand-in and 16 with all-MiniLM-L6-v2.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import bm25s
import numpy as np

NO_ANSWER = "Nothing in these documents answers this."
MIN_LOGIT = 0.0  # of a reranker's best source: a probability of one half
ELSEWHERE = (
    "What is the capital of Australia?",
    "How do I cook rice?",
    "Who wrote Romeo and Juliet?",
    "When was the French Revolution?",
    "How many calories does an apple have?",
    "What is the best treatment for a cold?",
    "Who won the last Olympic marathon?",
    "How deep is the Pacific Ocean?",
    "How do I prune roses?",
    "Which bus goes to the airport?",
    "How do I teach a puppy to sit?",
    "Do I need a visa for Japan?",
    "How do I apply for a loan at a bank?",
    "Why do leaves turn red in autumn?",
    "What should I wear to a wedding?",
    "How do I tune a guitar?",
)


def find_bound(cosines: Sequence[float]) -> float:
    """Return the lowest cosine of a passage that may answer a question.

    Args:
        cosines: of each question of ELSEWHERE and the passage nearest to it.
    """
    return float(np.mean(cosines) + 2 * np.std(cosines))


def has_all_words(question: str, texts: Iterable[str]) -> bool:
    """Tell whether a text has every word of a question: a name that a model does not know.

    Frequent words of English do not count.

    >>> has_all_words("What is Greenmantle?", ["A sheep", "Greenmantle 2.5 650"])
    True
    >>> has_all_words("What is it?", ["What it is"])
    False
    """
    asked, *read = (
        set(words)
        for words in bm25s.tokenize(
            [question, *texts], stopwords="english_plus", return_ids=False, show_progress=False
        )
    )
    return bool(asked) and any(asked <= words for words in read)
