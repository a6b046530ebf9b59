"""Unlearning losses: from the log-probs of tokens to one value a sequence (or a pair of them).

With ``l_n`` the log-prob of a token, ``l_i`` that of sequence i (their sum), ``r_i = l_i -
l_i(reference)`` and ``|y_i|`` its length, a loss is a frozen dataclass that maps token log-probs
to ``L_i``. The fused backward pass needs only its derivative in the token log-probs, so a new loss
is the few lines of its formula. Minimising a forget loss lowers ``l_i``. ``KL`` depends on the
whole distribution, a ``LayerLoss`` on the hidden states of a layer.
"""

from npo_fast.losses.beta import suggest_beta
from npo_fast.losses.kl import KL
from npo_fast.losses.layer import RMU, HeldStates, LayerLoss
from npo_fast.losses.sequence import DPO, GA, KTO, NLL, NPO, Averaged, SimNPO, npo_loss
from npo_fast.losses.tokens import CEU, TNPO, WGA, SatImp

__all__ = [
    "CEU", "DPO", "GA", "KL", "KTO", "NLL", "NPO", "RMU", "TNPO", "WGA", "Averaged", "HeldStates",
    "LayerLoss", "SatImp", "SimNPO", "npo_loss", "suggest_beta",
]  # fmt: skip
