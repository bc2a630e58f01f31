"""Watches live traffic and says when the live model has gone stale: `Retrain` or `Hold`.

`windows` cuts traffic into a reference and a current window, `drift` and `feedback_rates` compare
them, `policy` decides, `check` puts the four together as one pure function, `report` draws what a
person reads, `check_store` keeps every check. Where rows come from and what a decision sets in
motion belong to `flows`.
"""
