"""The reference by its public place: ``verification/reference/`` has it."""

from .verification.reference import VALUES as VALUES
from .verification.reference import Inputs as Inputs
from .verification.reference import grpo_loss as grpo_loss
from .verification.reference import kl_penalty as kl_penalty
