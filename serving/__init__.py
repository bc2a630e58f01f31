"""Answers chat requests as an OpenAI-compatible gateway and changes models without a gap.

`engine` says what a model runtime must offer, `embedded` and `openai_upstream` are two of them,
`gateway` is the HTTP face, `watcher` follows the champion, `recorder` keeps every answer. Which
version is champion, and where answers are stored, is decided elsewhere and handed in.
"""
