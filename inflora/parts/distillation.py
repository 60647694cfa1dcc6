"""Knowledge distillation: a model kept close to an older one by the scores of both."""

from torch import Tensor


def distillation(scores: Tensor, old_scores: Tensor, temperature: float) -> Tensor:
    """Cross-entropy between the softened class probabilities of an old model and of the current one.

    Convention: not multiplied by temperature^2, as in PyCIL and PILOT; the gradient then shrinks with the temperature.

    Args:
        scores: (B, C) logits of the current model.
        old_scores: (B, C) logits of the old model for the same images and classes.
        temperature: both are divided by it.

    Returns:
        (B,) losses, in float32.

    Source: Hinton et al. 2015; Li & Hoiem 2016, eq. 2 and 3.
    """
    old = (old_scores.detach().float() / temperature).softmax(1)
    return -(old * (scores.float() / temperature).log_softmax(1)).sum(1)


def check_distillation(temperature: float, distillation_weight: float) -> None:
    """Refuse what distillation cannot work with.

    Raises:
        ValueError: naming the key.
    """
    if temperature <= 0:
        raise ValueError(f"method.temperature={temperature} is not above 0; choose a positive number, such as 2")
    if distillation_weight < 0:
        raise ValueError(f"method.distillation_weight={distillation_weight} is negative; choose 0 or more")
