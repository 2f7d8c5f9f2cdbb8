"""The per-token maths of the policy term: every surrogate, its value and its slopes.

A new surrogate is one class in ``token.py`` or ``sequence.py`` (value and slopes) and its value in
``reference/terms.py``; CONTRIBUTING.md tells how to make it one-pass. registration.py has
``register_surrogate``, for classes of a user's own.
"""

from .base import CLIPPED_DUAL as CLIPPED_DUAL
from .base import CLIPPED_HIGH as CLIPPED_HIGH
from .base import CLIPPED_LOW as CLIPPED_LOW
from .base import Clipped as Clipped
from .base import Point as Point
from .base import Surrogate as Surrogate
from .base import Terms as Terms
from .sequence import Gmpo as Gmpo
from .sequence import Vespo as Vespo
from .token import Cispo as Cispo
from .token import Clip as Clip
from .token import DppoKL as DppoKL
from .token import DppoTV as DppoTV
from .token import Dro as Dro
from .token import NoSurrogate as NoSurrogate
from .token import Reinforce as Reinforce
from .token import Sapo as Sapo
from .token import Unclipped as Unclipped

BUILT_IN = (Reinforce, Unclipped, Clip, Cispo, Sapo, DppoTV, DppoKL, Dro, Vespo, Gmpo)
SURROGATES: dict[str, type[Surrogate]] = {cls.name: cls for cls in BUILT_IN}
"""Every surrogate by name, registered ones as well. Tables and tests enumerate ``BUILT_IN``."""
