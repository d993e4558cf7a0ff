"""Sweeps: settings times seeds over local processes; arms that share their dense training branch from one trunk.

A sweep folder holds ``sweep.json`` (the plan and its hash), ``trunks/<12 hex>/<seed>/`` and ``arms/<12 hex>/<seed>/``,
each a complete recording; the 12 hex digits are those of the run's configuration. Finished runs are kept, so the same
command goes on where it was stopped. ``confirmation/`` is a sweep of the same plan on seeds that it has not used.
"""

from .confirmation import confirmation_of as confirmation_of
from .cost import foresight as foresight
from .folder import run_status as run_status
from .folder import standing as standing
from .plan import Plan as Plan
from .plan import make_plan as make_plan
from .plan import read_grid as read_grid
from .plan_file import find_plan as find_plan
from .plan_file import packaged_plan as packaged_plan
from .running import cores as cores
from .running import run_sweep as run_sweep
