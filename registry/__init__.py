"""Which version is live, which round made it, on what evidence it was let in.

The database is the truth; MLflow shows it and is repaired from it. Models are neither trained nor
loaded here, and nothing here reaches for another component.
"""
