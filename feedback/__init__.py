"""The ingestion API for apps: what users asked, what was answered, what users thought of it.

`records` are the values, `store` the protocol they are kept behind, `sql_store` its SQLite and
PostgreSQL home, `api` the HTTP surface. Deciding what to learn from feedback is left to training.
"""
