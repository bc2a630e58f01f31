"""The ingestion API for apps: what users asked, what was answered, what users thought of it.

`records` are the values, `store` the protocol they are kept behind, `sql_store` its SQLite and
PostgreSQL home, `committer` the one writer in front of it, `api` the HTTP surface; `formats` reads
what others write. Deciding what to learn from feedback is left to training.
"""
