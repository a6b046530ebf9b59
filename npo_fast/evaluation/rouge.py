"""ROUGE by the words of an answer, in any script."""

import re
from functools import cache

from rouge_score.rouge_scorer import RougeScorer
from rouge_score.tokenizers import Tokenizer

OTHER_SCRIPT = 0.3  # share of an answer's letters outside of ASCII; TOFU's have 0.25 at most
# a letter of a script without spaces is a word: Thai to Burmese, kana, Chinese characters
_WORDS = re.compile(r"[\u0e00-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff]|\w+")


class _AnyScript(Tokenizer):
    def tokenize(self, text: str) -> list[str]:
        return _WORDS.findall(text.lower())


def rouge_scorer(truth: str) -> RougeScorer:
    """ROUGE-1 and ROUGE-L as TOFU has them, for answers in Latin letters: stemmed, [a-z0-9] alone.

    That drops every letter of another script, so answers with 30 % or more of those are split
    into Unicode words instead, and not stemmed.
    """
    letters = [c for c in truth if c.isalpha()]
    other = sum(not c.isascii() for c in letters)
    return _scorer(other >= OTHER_SCRIPT * max(1, len(letters)) and other > 0)


@cache
def _scorer(any_script: bool) -> RougeScorer:
    kinds = ["rouge1", "rougeL"]
    if any_script:
        return RougeScorer(kinds, tokenizer=_AnyScript())
    return RougeScorer(kinds, use_stemmer=True)
