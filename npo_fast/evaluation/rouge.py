"""ROUGE over the words of an answer, in any script."""

import re
import unicodedata
from functools import cache

from rouge_score.rouge_scorer import RougeScorer
from rouge_score.tokenizers import Tokenizer

NOT_ASCII = 0.3  # share of an answer's letters; 0.25 at most in TOFU's answers
# scripts without spaces between words: Thai to Burmese, Khmer, kana, Chinese characters
_UNSPACED = re.compile(r"[\u0e00-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff]")


def words(text: str) -> list[str]:
    """Splits into runs of letters, digits and their marks.

    Each letter of a script without spaces is a word by itself. A mark that follows no letter or
    digit is in no word.
    """
    runs: list[str] = []
    in_run = in_word = False
    for character in unicodedata.normalize("NFC", text.lower()):
        category = unicodedata.category(character)[0]
        if category == "M":  # a vowel sign or accent of the letter before
            if in_word:
                runs[-1] += character
        elif category in "LN":
            unspaced = _UNSPACED.match(character) is not None
            if in_run and not unspaced:
                runs[-1] += character
            else:
                runs.append(character)
            in_run, in_word = not unspaced, True
        else:
            in_run = in_word = False
    return runs


class _AnyScript(Tokenizer):
    def tokenize(self, text: str) -> list[str]:
        return words(text)


def rouge_scorer(truth: str, stem: bool = True) -> RougeScorer:
    """Returns the scorer of ROUGE-1 and ROUGE-L for answers like ``truth``.

    TOFU's scorer stems words of [a-z0-9] and drops every other letter; MUSE's does not stem.
    Answers with 30 % or more other letters are split into Unicode ``words`` instead, not stemmed.
    """
    letters = [c for c in truth if c.isalpha()]
    others = sum(not c.isascii() for c in letters)
    return _scorer(others > 0 and others >= NOT_ASCII * len(letters), stem)


@cache
def _scorer(any_script: bool, stem: bool) -> RougeScorer:
    kinds = ["rouge1", "rougeL"]
    if any_script:
        return RougeScorer(kinds, tokenizer=_AnyScript())
    return RougeScorer(kinds, use_stemmer=stem)
