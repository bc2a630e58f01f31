"""A process that promotes what it reads: `URL [die]`, then a version per line, answers per line.

With `die` it kills itself as soon as the first promotion is committed.
"""

import os
import signal
import sys

from perennial.infra.clock import utc_now
from perennial.infra.db import Database
from perennial.infra.errors import ConflictError
from perennial.registry.champion import ChampionStore


def main(url: str, *, is_to_die: bool) -> None:
    store = ChampionStore(Database(url), utc_now)
    store.current("support")
    print("ready", flush=True)
    for line in sys.stdin:
        version = line.strip()
        try:
            store.promote(
                "support",
                version,
                decision_id=version,
                expected=None,
                decided_by="race",
                evidence_digest="e" * 64,
                reasons=(),
            )
        except ConflictError:
            print("lost", flush=True)
            continue
        if is_to_die:
            os.kill(os.getpid(), signal.SIGKILL)
        print("won", flush=True)


if __name__ == "__main__":
    main(sys.argv[1], is_to_die="die" in sys.argv[2:])
