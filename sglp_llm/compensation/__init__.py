"""Returns `Compensated`: new values of kept weights that compensate for removed layers. Start with `base.py`, then `linear.py`.

One file per method; the file name is its name on the command line. To add one, add a file with a `METHOD`; the contract tests
then cover it automatically. What methods share is in `repair/`.
"""

from __future__ import annotations

from sglp_llm.adapters import DecoderAdapter
from sglp_llm.compensation.base import Compensated, Method
from sglp_llm.compensation.repair.settings import FitSettings
from sglp_llm.errors import UserError, unknown
from sglp_llm.registry import member, member_names

__all__ = ["NONE", "Compensated", "FitSettings", "Method", "check_compensation", "compensation_names", "get_method"]

NONE = "none"
"""The name for no compensation."""


def compensation_names() -> list[str]:
    """The names of all methods, sorted, without `NONE`."""
    return member_names(__path__)


def get_method(name: str) -> Method:
    """The method of that name.

    Raises:
        UserError: No method has that name; the message lists the known names and the closest one.
    """
    if name not in compensation_names():
        raise unknown("compensation", name, [NONE, *compensation_names()])
    method: Method = member(__name__, __path__, name, "compensation").METHOD
    return method


def check_compensation(name: str, adapter: DecoderAdapter, config: object, samples: int) -> None:
    """Rejects, before any work is done, a method that cannot work for this model.

    Args:
        name: Name of the method, or `NONE`.
        adapter: The model's family.
        config: The model's configuration.
        samples: Number of calibration sequences.

    Raises:
        UserError: There is no such method, it does not support the family, or there are too few sequences to hold one out.
    """
    if name == NONE:
        return
    get_method(name).check(adapter, config)
    if samples < 2:
        raise UserError(
            f"compensate {name} holds out some calibration sequences: give at least 2 samples, not {samples}"
        )
