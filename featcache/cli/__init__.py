"""The command line: options in, one call, text or --json out. Nothing else.

Exit codes: 0 done, 1 a known failure (one line on stderr), 2 wrong usage, 3 done but some images failed,
130 and 143 interrupted by Ctrl-C or SIGTERM. Anything else is a bug and keeps its traceback. The verbs are
listed in the order in which their modules are imported here.
"""

from featcache.cli import embedding, heads, compare, models, tuning, shipping, stores, others  # noqa: F401, I001
from featcache.cli.group import main

__all__ = ["main"]
