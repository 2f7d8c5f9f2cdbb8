"""The surrogates by their public place: ``objectives/surrogates/`` has them."""

from .objectives.surrogates import BUILT_IN as BUILT_IN
from .objectives.surrogates import CLIPPED_DUAL as CLIPPED_DUAL
from .objectives.surrogates import CLIPPED_HIGH as CLIPPED_HIGH
from .objectives.surrogates import CLIPPED_LOW as CLIPPED_LOW
from .objectives.surrogates import SURROGATES as SURROGATES
from .objectives.surrogates import Cispo as Cispo
from .objectives.surrogates import Clip as Clip
from .objectives.surrogates import DppoKL as DppoKL
from .objectives.surrogates import DppoTV as DppoTV
from .objectives.surrogates import Dro as Dro
from .objectives.surrogates import Gmpo as Gmpo
from .objectives.surrogates import Point as Point
from .objectives.surrogates import Reinforce as Reinforce
from .objectives.surrogates import Sapo as Sapo
from .objectives.surrogates import Surrogate as Surrogate
from .objectives.surrogates import Terms as Terms
from .objectives.surrogates import Unclipped as Unclipped
from .objectives.surrogates import Vespo as Vespo
