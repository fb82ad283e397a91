"""A measurement that was killed goes on where it was: what it had found, kept beside it and asked for again.

Nothing here knows mathematics. Whatever forms products asks `once` for its result under a name; the same
measurement asks in the same order, so what was found is given back one by one, and the next is formed.
"""

from hessdiag.resume.kept import Kept, once
from hessdiag.resume.log import Log
from hessdiag.resume.pace import Pace

RESUME = "resume"
"""Folder in the cache of those that were killed."""

__all__ = ["RESUME", "Kept", "Log", "Pace", "once"]
