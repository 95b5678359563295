"""Stage one: run the teacher once and write its targets to a cache."""

import logging

logging.getLogger("alignkd").addHandler(logging.NullHandler())  # quiet until the caller configures logging
