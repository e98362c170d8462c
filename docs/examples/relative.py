"""A score of one's own: tokens on which the policy lost relative to how hard they are at all.

`python -m rho1_jax.main --config=configs/math.py
--config.select.score=docs.examples.relative:relative`
"""

from jax import Array


def relative(loss: Array, ref_loss: Array) -> Array:
    """Excess loss over the reference's, in relation; [b, S], higher is kept first."""
    return (loss - ref_loss) / (ref_loss + 1.0)
