"""Logging set-up. Only entry points call it; everything else just gets a logger."""

import logging

FORMAT = "%(asctime)s %(levelname)s %(name)s %(message)s"


def configure_logging(level: str) -> None:
    """Send records of `level` and above to standard error, one event per line."""
    logging.basicConfig(level=level.upper(), format=FORMAT, force=True)
    for noisy in ("httpx", "httpcore", "urllib3", "alembic", "matplotlib"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
