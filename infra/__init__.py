"""What the components stand on: settings, errors, clock, database, artefacts, logging.

Flat modules with no domain types. Nothing here imports a component or `flows`.
"""
