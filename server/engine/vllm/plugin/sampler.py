"""vLLM's sampler, with log-probabilities that have no bias."""

from torch import Tensor
from vllm.v1.sample.sampler import Sampler


class ExactSampler(Sampler):
    """Computes log-probabilities as logits minus their `logsumexp`, in float32.

    vLLM's `log_softmax` sums a wide row differently: its values are off by some 1e-5, all in one
    direction, so that a text's sum would drift with its length.
    """

    @staticmethod
    def compute_logprobs(logits: Tensor) -> Tensor:
        """Return the log-probabilities of rows: (n, vocabulary) -> (n, vocabulary) float32."""
        logits = logits.float()
        return logits - logits.logsumexp(dim=-1, keepdim=True)
