"""Generation: prefill, latent caches with absorbed decoding, sampling, and speculation with the MTP
modules.

Letters: B batch, T new tokens, S these and the cached ones, D model, W vocabulary, C latent, R
rotated key, K routed experts of a token.
"""

from .chain import Chain
from .decoder import Decoder
from .generation import Generation, check_request, generate
from .sampler import Choice, Sampler

__all__ = ["Chain", "Choice", "Decoder", "Generation", "Sampler", "check_request", "generate"]
