"""The estimators of advantages by their public place: ``objectives/advantages.py`` has them."""

from .objectives.advantages import centered as centered
from .objectives.advantages import gae as gae
from .objectives.advantages import group_centered as group_centered
from .objectives.advantages import group_normalized as group_normalized
from .objectives.advantages import has_signal as has_signal
from .objectives.advantages import leave_one_out as leave_one_out
from .objectives.advantages import n_step as n_step
from .objectives.advantages import overlong_penalty as overlong_penalty
from .objectives.advantages import raw as raw
from .objectives.advantages import reward_to_go as reward_to_go
from .objectives.advantages import value_loss as value_loss
