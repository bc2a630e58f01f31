"""From feedback to a candidate adapter: compile, replay, mix, train, evaluate.

The modules that decide (compile, replay, mix, config, grading, batching) are pure. Those that touch
a model run in a process of their own, started as `python -m perennial.training.run`. What becomes
of a candidate is left to the registry.
"""
