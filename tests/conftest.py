"""Runs of the tests keep no cache where a user's runs have theirs."""

import os
import tempfile

os.environ["EXO_CACHE"] = tempfile.mkdtemp(prefix="exo-cache-")
