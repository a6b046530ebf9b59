"""ROUGE by the words of an answer, in any script."""

import re
import unicodedata
from functools import cache

from rouge_score.rouge_scorer import RougeScorer
from rouge_score.tokenizers import Tokenizer

NOT_ASCII = 0.3  # share of an answer's letters; TOFU's answers have 0.25 at most
# scripts that put no space between words: Thai to Burmese, Khmer, kana, Chinese characters
_UNSPACED = re.compile(r"[\u0e00-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff]")


def words(text: str) -> list[str]:
    """Runs of letters, digits and their marks; each letter of an unspaced script by itself."""
    found: list[str] = []
    within = False  # a word that goes on
    for character in unicodedata.normalize("NFC", text.lower()):
        kind = unicodedata.category(character)[0]
        if kind == "M" and found:  # a vowel sign or accent of the letter before
            found[-1] += character
        elif kind in "LN":
            unspaced = _UNSPACED.match(character) is not None
            if within and not unspaced:
                found[-1] += character
            else:
                found.append(character)
            within = not unspaced
        else:
            within = False
    return found


class _AnyScript(Tokenizer):
    def tokenize(self, text: str) -> list[str]:
        return words(text)


def rouge_scorer(truth: str) -> RougeScorer:
    """ROUGE-1 and ROUGE-L as TOFU has them, stemmed and of [a-z0-9] alone.

    That drops every other letter, so answers with 30 % or more of those are split into Unicode
    ``words`` instead, and not stemmed.
    """
    letters = [c for c in truth if c.isalpha()]
    other = sum(not c.isascii() for c in letters)
    return _scorer(other > 0 and other >= NOT_ASCII * len(letters))


@cache
def _scorer(any_script: bool) -> RougeScorer:
    kinds = ["rouge1", "rougeL"]
    if any_script:
        return RougeScorer(kinds, tokenizer=_AnyScript())
    return RougeScorer(kinds, use_stemmer=True)
