"""The one error a user's mistake raises; it is defined on the ground floor, where `models` can reach it."""

from checked import UserError, unknown

__all__ = ["UserError", "unknown"]
